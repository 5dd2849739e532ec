"""Draws of B that are trained together, back to each run's outcome; styles of methods; evidence; matrices."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from typing import NamedTuple

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from falign.feedback import generator
from falign.lab.data import DataError
from falign.lab.experiment import Evidence, Outcome, Setting
from falign.lab.experiment.statistics import above_zero, largest, mean, sorted_groups
from falign.lab.report.style import COLOURS, INK
from falign.papers._images import load_images
from falign.theory import factorisation
from falign.theory.factorisation import State, Trajectory


def sample_feedback(seeds: Sequence[int], Y: Float[Tensor, "n m"], r: int) -> Float[Tensor, "runs r n"]:
    """B of every run, entries N(0, 1/n)."""
    return factorisation.feedback(len(Y), r, seeds=seeds).to(Y)


def initial_state(
    seeds: Sequence[int], Y: Float[Tensor, "n m"], B: Float[Tensor, "runs r n"], *, method: str, scale: float
) -> State:
    """Orthonormal rows of W for fa*; else entries N(0, scale²), where 0 is the zero start."""
    # FA* conserves WWᵀ in the flow: from orthonormal rows it stays the identity, which its laws are stated for.
    if method == "fa*":
        return factorisation.orthonormal(Y, B, seeds=seeds)
    return factorisation.normal(Y, B, seeds=seeds, scale=scale) if scale else factorisation.zero(Y, B)


def train(
    seeds: Sequence[int],
    Y: Float[Tensor, "n m"],
    B: Float[Tensor, "runs r n"],
    *,
    method: str,
    scale: float,
    rate: float,
    at: Sequence[int],
    names: Sequence[str],
    progress: Callable[[float], None] | None = None,
) -> Trajectory:
    """Train the runs of a block in steps.

    Args:
        seeds: Of the runs.
        Y: The matrix that they factor.
        B: Their feedback.
        method: "fa", "fa*" or "gd".
        scale: Of the start: see :func:`initial_state`.
        rate: η.
        at: Steps to record at; training ends with the last one.
        names: What is recorded.
        progress: Told now and then which share of the steps is done.
    """
    state = initial_state(seeds, Y, B, method=method, scale=scale)
    return factorisation.gradient_descent(
        method, Y, B, state, rate=rate, steps=at[-1], names=names, at=at, progress=progress
    )


def outcomes(at: Sequence[int], columns: Mapping[str, Float[Tensor, "runs times"]]) -> list[Outcome]:
    """Turn columns of a block into outcomes of its runs.

    Args:
        at: Steps of its records.
        columns: What is kept, a row a run; "error" is among it.

    Returns:
        One outcome a run, with a record at every recorded step until it diverged; None for what is not defined there,
        such as the cosine of Z = 0.
    """
    # The first number that is not finite ends a run, whatever comes after it.
    lasted = columns["error"].isfinite().cumprod(1).sum(1).tolist()
    return [
        Outcome(
            records={"step": list(at[:kept]), **{name: _known(rows[run, :kept]) for name, rows in columns.items()}},
            diverged=None if kept == len(at) else f"the error was not finite at step {at[kept]}: lower the rate",
        )
        for run, kept in enumerate(lasted)
    ]


def _known(values: Float[Tensor, " times"]) -> list[float | None]:
    return [value if isfinite(value) else None for value in values.tolist()]


# What the pictures of Garg and Vempala 2022 share: how methods are told apart.


class Style(NamedTuple):
    """Label, colour and marker of a method from a start."""

    label: str
    colour: str
    marker: str


GD, ZERO, RANDOM, STAR = (
    Style("GD", INK, "s"),
    Style("FA, zero start", COLOURS[0], "o"),
    Style("FA, random start", COLOURS[1], "^"),
    Style("FA*", COLOURS[2], "D"),
)
STYLES = (GD, ZERO, RANDOM, STAR)
"""In the order of legends."""


def style_of(method: str, scale: float) -> Style:
    """Of a method from a start of that scale."""
    if method == "fa":
        return RANDOM if scale else ZERO
    return STAR if method == "fa*" else GD


def methods(data: pl.DataFrame) -> list[tuple[Style, pl.DataFrame]]:
    """Each method and start that is there, with its rows, in the order of legends."""
    kinds = data.select("method", "scale").unique().rows()
    styled = [(style_of(method, scale), data.filter(method=method, scale=scale)) for method, scale in kinds]
    return sorted(styled, key=lambda pair: STYLES.index(pair[0]))


def quartiles(name: str) -> dict[str, pl.Expr]:
    """Median and quartiles of a column over the draws, as the columns "median", "low" and "high" of a picture."""
    return {
        "median": pl.col(name).median(),
        "low": pl.col(name).quantile(0.25),
        "high": pl.col(name).quantile(0.75),
    }


# How claims are read off groups of runs.


def groups(table: pl.DataFrame, by: Sequence[str]) -> Iterator[tuple[str, pl.DataFrame]]:
    """(such as "digits, fa, r = 8", its rows) of each group, sorted."""
    for values, runs in sorted_groups(table, by):
        words = (
            value if isinstance(value, str) else f"{name} = {value:.4g}" for name, value in zip(by, values, strict=True)
        )
        yield ", ".join(words), runs


def largest_in_groups(table: pl.DataFrame, value: pl.Expr, by: Sequence[str], high: float, note: str = "") -> Evidence:
    """The largest value of each group beside a limit."""
    return largest(groups(table.with_columns(value=value), by), "value", high, note=note)


def above_gradient_descent(table: pl.DataFrame, column: str, by: Sequence[str], note: str = "") -> Evidence:
    """FA's value in a column over gradient descent's of the same draw: evidence that its log is above 0 in each group.

    The logarithm, because ratios have a heavy tail: one unlucky draw would be the mean.
    """
    keys = [*by, "seed"]
    fa, gd = (table.filter(method=method).select(*keys, column) for method in ("fa", "gd"))
    both = fa.join(gd, on=keys, suffix="_gd").with_columns(ratio=pl.col(column) / pl.col(f"{column}_gd"))
    return above_zero(
        [
            (f"{label}: log of the ratio (median {runs['ratio'].median():.3g})", mean(runs["ratio"].log(), of=label))
            for label, runs in groups(both, by)
        ],
        note=note,
    )


# The matrices Y that are factored: spectra whose basis does not matter, normal entries, and images by pixels.


def matrix(data: str, n: int, m: int, setting: Setting, *, rank: int = 0) -> Float[Tensor, "n m"]:
    """A matrix by its name, in float64, scaled so that its largest singular value is 1.

    "power law" is diagonal with ``σ_i = i^(-1/2)``: B and the starts are normal, so that in law nothing depends on the
    basis. "gaussian" has normal entries. Any other name is a data set: its first n training images as rows.

    Args:
        data: Its name.
        n: Rows.
        m: Columns; of images the number of their pixels.
        setting: Where data sets are.
        rank: So many of the leading singular values are kept; 0 keeps all.

    Raises:
        DataError: There are fewer images, or they have another number of pixels.
    """
    if data == "power law":
        whole = torch.zeros(n, m, dtype=torch.float64)
        whole.diagonal().copy_(torch.arange(1, min(n, m) + 1, dtype=torch.float64) ** -0.5)
    elif data == "gaussian":
        # One matrix for all runs: only the feedback and the starts are drawn anew.
        whole = torch.randn(n, m, generator=generator(0, data, f"{n} by {m}"), dtype=torch.float64)
    else:
        whole = _images(data, n, m, setting)
    return _leading(whole, rank)


def _images(name: str, n: int, m: int, setting: Setting) -> Float[Tensor, "n m"]:
    images = load_images(name, setting).train_images[:n].double().flatten(1)
    if images.shape != (n, m):
        raise DataError(f"{name} gives {tuple(images.shape)} images by pixels, expected {(n, m)}: change n and m")
    return images


def _leading(Y: Float[Tensor, "n m"], rank: int) -> Float[Tensor, "n m"]:
    U, values, Vh = torch.linalg.svd(Y, full_matrices=False)
    kept = slice(rank or None)
    return U[:, kept] * (values[kept] / values[0]) @ Vh[kept]
