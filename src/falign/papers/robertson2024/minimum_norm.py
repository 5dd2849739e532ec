"""Two-layer linear networks with more weights than data: which of all solutions feedback alignment finds."""

from math import isfinite

import polars as pl
import torch
from torch import Tensor

from falign.feedback import generator
from falign.lab.data import Dataset
from falign.lab.experiment import Claim, Evidence, Experiment, Outcome, Picture, Point, Scalar, Setting, grid
from falign.lab.experiment.statistics import around, largest, slope, summary
from falign.lab.report.style import COLOURS, MARKERS, Figure, each_of, error_bars, law, logarithmic, panels
from falign.papers._images import load_images
from falign.papers.robertson2024._training import with_classes, with_images
from falign.theory.minimum_norm import minimum_norm

__all__ = ["MINIMUM_NORM"]

_SIZES = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
"""s: the first layer begins with entries N(0, s²/d)."""


def _points(dataset: str, **sizes: Scalar) -> tuple[Point, ...]:
    return grid(dataset=dataset, size=_SIZES, **sizes)


_FITTED = 1e-13
"""|f - Y|/|Y| at which a run ends."""


def _run(
    *,
    seed: int,
    setting: Setting,
    dataset: str,
    size: float,
    n: int,
    d: int,
    outputs: int,
    p: int,
    rate: float,
    steps: int,
) -> Outcome:
    """Train a network in float64 on the CPU until it fits, and measure how far it is from the least-norm solution."""
    if dataset == "gaussian":
        X, Y = _gaussian(n, d, outputs, seed)
    else:
        X, Y = _one_image_a_class(load_images(dataset, setting), n, seed)
    check = minimum_norm(
        X * (n**0.5 / torch.linalg.matrix_norm(X, 2)),  # the largest singular value is √n
        Y,
        hidden=p,
        sizes=[size],
        seeds=[seed],
        steps=steps,
        rate=rate,
        converged=_FITTED,
    )
    deviation = float(check.series["relative deviation"])
    if not isfinite(deviation):
        return Outcome(records={}, diverged="the weights were not finite at the end: lower the rate")
    fitted = next(assumption.measured for assumption in check.assumptions if assumption.name == "converged")
    return Outcome(records={"deviation": [deviation], "residual": [fitted], "bounded": [bool(check.held)]})


def _gaussian(n: int, d: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs (n, d) and targets (n, outputs), all independent normal numbers."""
    random = generator(seed, "", "data")
    X, Y = (torch.randn(n, size, generator=random, dtype=torch.float64) for size in (d, outputs))
    return X, Y


def _one_image_a_class(images: Dataset, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """An image of each of n classes, less the mean of all training images, and these classes."""
    part = with_classes(images, n, seed)
    # Shuffled, so that the first image of a class is another one for every seed.
    mixed = with_images(part, len(part.train_labels), seed)
    first = (mixed.train_labels == torch.arange(n)[:, None]).int().argmax(1)
    X = (mixed.train_images[first] - images.train_images.double().mean(0)).flatten(1)
    return X, torch.eye(n, dtype=torch.float64)


_SMALL = pl.col("size").is_between(1e-5, 0.1)
"""Sizes for which the deviation is of first order in s."""


def _exact(table: pl.DataFrame) -> Evidence:
    sets = [(str(name), runs) for (name,), runs in table.group_by(["dataset"], maintain_order=True)]
    note = f"fitted to |f - Y|/|Y| ≤ {table['residual'].to_numpy().max():.1g}"
    return largest(sets, "deviation", 1e-12, note=note, label="{label}: most of {rows} runs")


def _proportional(table: pl.DataFrame) -> Evidence:
    logs = table.with_columns(pl.col("size").log(), pl.col("deviation").log())
    sets = logs.group_by(["dataset"], maintain_order=True)
    return around([(f"{name}: exponent", slope(runs, "size", "deviation")) for (name,), runs in sets], 1, 0.01)


_ZERO = 1e-5
"""Place of s = 0 on the logarithmic axis."""


def _deviation_by_size(data: pl.DataFrame) -> Figure:
    """Deviation against s; the points at s = 0 stand at the left of the axis."""
    figure, (axes,) = panels(
        1, xlabels=["size s of the first layer at the start"], ylabels=["|W - X⁺Y| / |X⁺Y|"], width=5.5, height=3.4
    )
    for colour, marker, (name, runs) in zip(COLOURS, MARKERS, each_of(data, "dataset"), strict=False):
        shown = runs.with_columns(pl.col("size").replace(0.0, _ZERO)).sort("size")
        bars = error_bars(shown["mean"], shown["sd"])
        axes.errorbar(
            shown["size"], shown["mean"], yerr=bars, color=colour, marker=marker, linestyle="none", label=name
        )
    sizes = sorted(size for size in data["size"].unique().to_list() if size > 0)
    at = data.filter(pl.col("size") == sizes[0])["mean"].to_numpy().mean()
    law(axes, sizes, [at * size / sizes[0] for size in sizes], "∝ s")
    logarithmic(axes, "x", ticks=[_ZERO, *sizes])
    axes.set_xticklabels(["0", *(f"{size:g}" for size in sizes)])
    logarithmic(axes, "y")
    axes.legend()
    return figure


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    return summary(table, "deviation", by=["dataset", "size"])


MINIMUM_NORM = Experiment(
    name="robertson2024.minimum-norm",
    title="Convergence to the solution of least norm",
    source="Robertson and Koyejo 2024; abstract of its first version, arXiv 2306.01870v1",
    revision=1,
    grid={
        preset: (
            *_points("gaussian", n=20, d=60, outputs=3, p=p, rate=0.3, steps=20000),
            *(point for name, n in images for point in _points(name, n=n, d=0, outputs=0, p=p, rate=0.3, steps=20000)),
        )
        for preset, p, images in (
            ("smoke", 50, (("digits", 5),)),
            ("quick", 200, (("digits", 10),)),
            ("paper", 1000, (("digits", 10), ("mnist", 10), ("fashion-mnist", 10), ("cifar100", 100))),
        )
    },
    seeds={"smoke": 2, "quick": 8, "paper": 20},
    run=_run,
    agreement=1e-9,
    together=("size",),
    cost=lambda *, p: float(p),
    pictures=(
        Picture(
            name="minimum-norm",
            caption="How far the solution that feedback alignment finds is from X⁺Y, the one of least norm, against "
            "the size of the first layer's initial weights; mean ± standard deviation. At s = 0 rounding is left.",
            data=_picture_data,
            draw=_deviation_by_size,
        ),
    ),
    claims=(
        Claim(
            name="minimum-norm",
            statement="Overparameterized two-layer linear networks trained by feedback alignment converge to "
            "minimum-norm solutions.",
            reference="Abstract of version 1",
            headline="distance from the solution of least norm",
            method="|W - X⁺Y|/|X⁺Y|, W = (W₂W₁)ᵀ, once Y is fitted, W₁(0) = 0; the most of all runs.",
            tolerance_reason="Rounding. With W₁(0) = 0 the rows of W₁ stay in the span of the inputs, so that the one "
            "solution in that span is found exactly: derived here, the condition is not in what is readable of the "
            "paper.",
            read=_exact,
            scope=pl.col("size") == 0,
        ),
        Claim(
            name="minimum-norm-proportional",
            statement="From another start the deviation is proportional to the first layer's initial weights.",
            origin="theory",
            reference="Derived here: what W₁(0) has outside the span of the inputs is never trained",
            method="Slope of log deviation against log s for s ≤ 0.1, one a seed.",
            tolerance_reason="1, the first order in s; 0.01 for the next order and half the 99 % interval over the "
            "seeds (Student's t) on top.",
            read=_proportional,
            scope=_SMALL,
        ),
    ),
)
