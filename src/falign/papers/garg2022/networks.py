"""The corollary: two-layer linear PyTorch networks on isotropic inputs are the factorisation."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import one_hot

import falign
from falign.feedback import generator
from falign.lab.experiment import Claim, Evidence, Experiment, Outcome, Picture, Point, Scalar, Setting
from falign.lab.experiment.statistics import final
from falign.lab.report.style import COLOURS, INK, Figure, each_of, facets, law, legend, logarithmic
from falign.papers._images import load_images
from falign.papers.garg2022._shared import largest_in_groups, matrix
from falign.theory import factorisation
from falign.theory.factorisation import best_error, stationary_error
from falign.theory.factorisation._network import from_network, isotropic
from falign.theory.two_layer import spaced

__all__ = ["NETWORKS"]


def _points(
    data: Sequence[str], *, points: int, m: int, outputs: int, steps: int, **sizes: Scalar
) -> tuple[Point, ...]:
    """FA and backpropagation on all inputs, r above and below the rank of what is learned; 10 classes have rank 9.

    Where r is below the rank half of the steps are enough.
    """
    kinds = [(name, rank, r) for name in ("isotropic", "fresh") for rank, r in ((4, 6), (outputs, 4))]
    kinds += [(name, 9, r) for name in data for r in (10, 4)]
    same = {"n": outputs, "m": m, "points": points, **sizes}
    return tuple(
        {"inputs": name, "rank": rank, "r": r, "method": method, "steps": steps if r >= rank else steps // 2, **same}
        for name, rank, r in kinds
        for method in ("fa", "bp")
    )


_Batch = tuple[Tensor, Tensor]
"""Inputs (points, m) and labels (points, n)."""


class _Problem(NamedTuple):
    """Data that a network is trained on.

    Attributes:
        Y: The best linear map (n, m) from inputs to labels; its largest singular value is 1.
        batch: Gives the next batch.
    """

    Y: Float[Tensor, "n m"]
    batch: Callable[[], _Batch]


def _problem(seed: int, inputs: str, setting: Setting, *, n: int, m: int, rank: int, points: int) -> _Problem:
    """The problem that inputs of a kind pose, in float64.

    "isotropic": fixed inputs with ``XᵀX = N I``, all in each batch. "fresh": normal inputs that are drawn anew for each
    batch, isotropic in the population. Both have labels ``Y x``, Y with ``σ_i = i^(-1/2)``. Any other name is a data
    set: its first N images less their mean, whitened along the leading m directions, with their classes as labels. The
    labels are not linear in the images, but what is not has no correlation with them, so that no gradient sees it.
    """
    if inputs not in ("isotropic", "fresh"):
        X, labels = _whitened(inputs, points, m, setting)
        Y = labels.mT @ X / points
        scale = torch.linalg.matrix_norm(Y, 2)
        whole = X, labels / scale
        return _Problem(Y / scale, lambda: whole)
    Y = matrix("power law", n, m, setting, rank=rank)
    if inputs == "isotropic":
        fixed = isotropic(points, m, seed=seed)
        whole = fixed, fixed @ Y.mT
        return _Problem(Y, lambda: whole)
    random = generator(seed, "fresh", "inputs")

    def batch() -> _Batch:
        X = torch.randn(points, m, generator=random, dtype=torch.float64)
        return X, X @ Y.mT

    return _Problem(Y, batch)


def _whitened(name: str, count: int, m: int, setting: Setting) -> _Batch:
    data = load_images(name, setting)
    images = data.train_images[:count].double().flatten(1)
    labels = one_hot(data.train_labels[:count], len(data.classes)).double()
    directions = torch.linalg.svd(images - images.mean(0), full_matrices=False).U[:, :m]
    return directions * count**0.5, labels


_RECORDS = 30


def _run(
    *,
    seed: int,
    setting: Setting,
    inputs: str,
    n: int,
    m: int,
    rank: int,
    r: int,
    method: str,
    points: int,
    rate: float,
    steps: int,
) -> Outcome:
    """Errors of a network along its training, beside what the factorisation predicts, and the closed forms."""
    given = _problem(seed, inputs, setting, n=n, m=m, rank=rank, points=points)
    Y, at = given.Y, spaced(steps, _RECORDS)
    network = _network(Y, r, seed)
    first, second = (layer.weight for layer in network)
    B, start = from_network(first, second, network[1].get_buffer("feedback.B"))  # pyright: ignore
    # Backpropagation's network is converted, too, and reverted: both start from the same weights and have one B.
    if method == "bp":
        falign.revert(network)
    simulated = "gd" if method == "bp" else method
    trajectory = factorisation.gradient_descent(simulated, Y, B, start, rate=rate, steps=at[-1], names=["error"], at=at)
    measured = _trained(network, given, rate, at)
    rests = {"stationary": float(stationary_error(Y, B)), "best": float(best_error(Y, B.shape[1]))}
    columns = {
        "error": measured,
        "predicted": trajectory.values["error"][0].tolist(),
        **{name: [value] * len(measured) for name, value in rests.items()},
    }
    size = float(Y.norm())
    return Outcome(
        records={
            "step": at[: len(measured)],
            **{name: [value / size for value in values[: len(measured)]] for name, values in columns.items()},
        },
        diverged=None
        if len(measured) == len(at)
        else f"the weights were not finite at step {at[len(measured)]}: lower the rate",
    )


def _network(Y: Float[Tensor, "n m"], r: int, seed: int) -> nn.Sequential:
    """Two linear layers with the initial weights of PyTorch, converted; the feedback's entries have variance 1/n."""
    n, m = Y.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Linear(size, out, bias=False, dtype=Y.dtype) for size, out in ((m, r), (r, n)))
        network = nn.Sequential(*layers)
    falign.convert(network, "fa", seed=seed, scale=1.0)
    return network


def _trained(network: nn.Sequential, given: _Problem, rate: float, at: Sequence[int]) -> list[float]:
    """|W₂W₁ - Y| at some steps of descent of the mean ½|f - y|²; those before the weights left the finite numbers."""
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    first, second = (layer.weight for layer in network)
    errors: list[float] = []
    for step in range(at[-1] + 1):
        if step == at[len(errors)]:
            with torch.no_grad():
                error = (second @ first - given.Y).norm()  # pyright: ignore
            if not error.isfinite():
                break
            errors.append(float(error))
        x, y = given.batch()
        optimizer.zero_grad()
        ((network(x) - y).square().sum(1).mean() / 2).backward()
        optimizer.step()
    return errors


_KIND = ["inputs", "method", "rank", "r"]
_ENOUGH = pl.col("r") >= pl.col("rank")
_FA = pl.col("method") == "fa"
_REACHED, _NEAR = 0.01, 0.05


def _ends(table: pl.DataFrame) -> pl.DataFrame:
    return final(table, by=_KIND)


def _reached(table: pl.DataFrame) -> Evidence:
    return largest_in_groups(_ends(table), pl.col("error"), _KIND, _REACHED)


def _apart(table: pl.DataFrame, closed: str) -> Evidence:
    return largest_in_groups(_ends(table), (pl.col("error") / pl.col(closed) - 1).abs(), _KIND, _NEAR)


_CLAIMS = (
    Claim(
        name="networks-reach-the-optimum",
        statement="Two-layer linear networks on isotropic inputs with linear labels, trained by FA, reach the optimum "
        "when the hidden layer is as wide as the rank of what they learn.",
        reference="Abstract, corollary",
        quotation="As a corollary, these results also hold for training two-layer linear neural networks when the "
        "training input is isotropic, and the output is a linear function of the input.",
        method="|W₂W₁ - Y|/|Y| at the end; the most of all networks.",
        tolerance_reason=f"At most {_REACHED:g}, which stands for 0: convergence is exponential, the length of a run "
        "decides.",
        read=_reached,
        scope=_FA & _ENOUGH,
    ),
    Claim(
        name="networks-end-above-the-optimum",
        statement="With a narrower hidden layer they end at Y(BY)⁺BY, above the optimum.",
        reference="Abstract, corollary, for “can be far from optimal”; the closed form is derived",
        quotation="As a corollary, these results also hold for training two-layer linear neural networks when the "
        "training input is isotropic, and the output is a linear function of the input.",
        method="|W₂W₁ - Y| at the end over |Y - Y(BY)⁺BY|, B read from the network, less 1; the most of all networks.",
        tolerance_reason=f"At most {_NEAR:g}: on fresh inputs each step is noisy as long as there is an error.",
        read=lambda table: _apart(table, "stationary"),
        scope=_FA & ~_ENOUGH,
    ),
    Claim(
        name="backpropagation-reaches-the-best",
        statement="Backpropagation reaches the optimum of the hidden layer's rank.",
        reference="Abstract, “gradient descent solves this problem optimally”, and its corollary",
        method="|W₂W₁ - Y| at the end over the least of that rank, less 1; the most of all networks.",
        tolerance_reason=f"At most {_NEAR:g}, as for networks-end-above-the-optimum.",
        read=lambda table: _apart(table, "best"),
        scope=~_FA & ~_ENOUGH,
    ),
)

_METHODS = {"fa": ("FA", COLOURS[0], "stationary"), "bp": ("backpropagation", INK, "best")}


def _errors_by_step(data: pl.DataFrame) -> Figure:
    """A column a kind of inputs; above a hidden layer that is wide enough, below one that is not."""
    images = sorted(set(data["inputs"].unique().to_list()) - {"isotropic", "fresh"})
    figure, kinds = facets(
        data,
        "inputs",
        2,
        order=("isotropic", "fresh", *images),
        titles=["{}, r ≥ rank(Y)", "{}, r < rank(Y)"],
        xlabels=["step"],
        ylabels=["|W₂W₁ - Y| / |Y|"] * 2,
        share="row",
        height=2.8,
    )
    wide = (pl.col("r") >= pl.col("rank"), pl.col("r") < pl.col("rank"))
    for _, whole, axes in kinds:
        for row, (panel, kept) in enumerate(zip(axes, wide, strict=True)):
            steps = whole.filter(kept & (pl.col("step") > 0)).sort("step")
            for method, runs in each_of(steps, "method", tuple(_METHODS)):
                words, colour, closed = _METHODS[method]
                panel.plot(runs["step"], runs["error"], color=colour, label=words)
                panel.plot(
                    runs["step"],
                    runs["predicted"],
                    color=colour,
                    marker="o",
                    markersize=3.5,
                    fillstyle="none",
                    linestyle="none",
                    label=f"{words}, predicted",
                )
                if row:
                    law(panel, runs["step"], runs[closed], "closed form")
            logarithmic(panel, "x" if row else "both")
    legend(figure)
    return figure


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    """Means over the seeds at every record."""
    keys = ["inputs", "rank", "r", "method", "step"]
    return table.group_by(keys).agg(pl.col("error", "predicted", "stationary", "best").mean()).sort(keys)


NETWORKS = Experiment(
    name="garg2022.networks",
    title="Two-layer linear networks",
    source="Garg and Vempala 2022; abstract, its corollary",
    revision=1,
    grid={
        "smoke": _points(("digits",), points=100, m=12, outputs=10, rate=0.1, steps=80),
        "quick": _points(("digits",), points=200, m=20, outputs=10, rate=0.1, steps=1200),
        "paper": _points(
            ("digits", "mnist-10k", "mnist", "fashion-mnist"), points=1000, m=40, outputs=10, rate=0.05, steps=20000
        ),
    },
    seeds={"smoke": 2, "quick": 2, "paper": 20},
    run=_run,
    agreement=1e-7,
    at_most=2,
    cost=lambda *, steps: float(steps),
    pictures=(
        Picture(
            name="networks",
            caption="Error |W₂W₁ - Y|/|Y| of two-layer linear PyTorch networks trained by FA and by backpropagation, "
            "mean over the seeds. Points: what the factorisation predicts from the initial weights and the feedback. "
            "Dashed: its closed form |Y - Y(BY)⁺BY|, and the optimum of that rank. Inputs: isotropic on the training "
            "points; normal and fresh in every batch; whitened images, with their classes as labels.",
            data=_picture_data,
            draw=_errors_by_step,
        ),
    ),
    claims=_CLAIMS,
)
