"""From a block of runs that differ in their seeds to draws of B trained together, and back to each run's outcome."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from typing import NamedTuple

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from falign.feedback import generator
from falign.lab.data import DataError, load
from falign.lab.experiment import Check, Evidence, Outcome, Point, Setting, Task
from falign.lab.report.style import COLOURS, INK
from falign.theory import factorisation
from falign.theory.factorisation import State, Trajectory


def drawn(tasks: Sequence[Task], Y: Float[Tensor, "n m"]) -> Float[Tensor, "runs r n"]:
    """B of every run, entries N(0, 1/n); r is the point's."""
    seeds = [task.seed for task in tasks]
    return factorisation.feedback(len(Y), int(tasks[0].point["r"]), seeds=seeds).to(Y)


def begun(tasks: Sequence[Task], Y: Float[Tensor, "n m"], B: Float[Tensor, "runs r n"]) -> State:
    """Orthonormal rows of W for fa*; else entries N(0, scale²), scale the point's, where 0 is the zero start."""
    seeds, scale = [task.seed for task in tasks], float(tasks[0].point["scale"])
    if tasks[0].point["method"] == "fa*":
        return factorisation.orthonormal(Y, B, seeds=seeds)
    return factorisation.normal(Y, B, seeds=seeds, scale=scale) if scale else factorisation.zero(Y, B)


def trained(
    tasks: Sequence[Task],
    Y: Float[Tensor, "n m"],
    B: Float[Tensor, "runs r n"],
    *,
    rate: float,
    at: Sequence[int],
    names: Sequence[str],
    progress: Callable[[float], None] | None = None,
) -> Trajectory:
    """Train the runs of a block in steps.

    Args:
        tasks: The runs; their point has "method" and "scale".
        Y: What they factor.
        B: Their feedback.
        rate: η.
        at: Steps to record at; training ends with the last one.
        names: What is recorded.
        progress: Told now and then which share of the steps is done.
    """
    method = str(tasks[0].point["method"])
    here = begun(tasks, Y, B)
    return factorisation.gradient_descent(
        method, Y, B, here, rate=rate, steps=at[-1], names=names, at=at, progress=progress
    )


def outcomes(at: Sequence[int], columns: Mapping[str, Float[Tensor, "runs times"]]) -> list[Outcome]:
    """What each run of a block left.

    Args:
        at: Steps of its records.
        columns: What is kept, a row a run; "error" is among it.

    Returns:
        One outcome a run, with a record at every recorded step until it diverged; None for what is not defined there,
        such as the cosine of Z = 0.
    """
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


class Look(NamedTuple):
    """How a method from a start is drawn."""

    label: str
    colour: str
    marker: str


GD, ZERO, RANDOM, STAR = (
    Look("GD", INK, "s"),
    Look("FA, zero start", COLOURS[0], "o"),
    Look("FA, random start", COLOURS[1], "^"),
    Look("FA*", COLOURS[2], "D"),
)
LOOKS = (GD, ZERO, RANDOM, STAR)
"""In the order of legends."""


def look(method: str, scale: float) -> Look:
    """Of a method from a start of that scale."""
    if method == "fa":
        return RANDOM if scale else ZERO
    return STAR if method == "fa*" else GD


def methods(data: pl.DataFrame) -> list[tuple[Look, pl.DataFrame]]:
    """Each method and start that is there, with its rows, in the order of legends."""
    there = [(look(*key), data.filter(method=key[0], scale=key[1])) for key in _kinds(data)]
    return sorted(there, key=lambda found: LOOKS.index(found[0]))


def _kinds(data: pl.DataFrame) -> list[tuple[str, float]]:
    return data.select("method", "scale").unique().rows()


# How claims are read off groups of runs.


def groups(table: pl.DataFrame, by: Sequence[str]) -> Iterator[tuple[str, pl.DataFrame]]:
    """(such as "digits, fa, r = 8", its rows) of each group, sorted."""
    for values, own in table.sort(by).group_by(by, maintain_order=True):
        words = (
            value if isinstance(value, str) else f"{name} = {value:.4g}" for name, value in zip(by, values, strict=True)
        )
        yield ", ".join(words), own


def most(table: pl.DataFrame, value: pl.Expr, by: Sequence[str], high: float, note: str = "") -> Evidence:
    """The largest value of each group beside a limit."""
    rows = table.with_columns(value=value)
    return Evidence(
        checks=tuple(
            Check(label=f"{label}: most", measured=float(own["value"].to_numpy().max()), high=high)
            for label, own in groups(rows, by)
        ),
        note=note,
    )


# The matrices Y that are factored: spectra whose basis does not matter, normal entries, and images by pixels.

SYNTHETIC = ("power law", "gaussian")


def matrix(point: Point, setting: Setting) -> Float[Tensor, "n m"]:
    """The matrix of a point of a grid, in float64, scaled so that its largest singular value is 1.

    "power law" is diagonal with ``σ_i = i^(-1/2)``: B and the starts are normal, so that in law nothing depends on the
    basis. "gaussian" has normal entries. Any other name is a data set: its first n training images as rows.

    Args:
        point: Has "data", "n", "m" (of images the number of their pixels) and "rank": only the leading singular values
            are kept; 0 keeps all.
        setting: Where data sets are.

    Raises:
        DataError: There are fewer images, or they have another number of pixels.
    """
    name, n, m = str(point["data"]), int(point["n"]), int(point["m"])
    if name == "power law":
        found = torch.zeros(n, m, dtype=torch.float64)
        found.diagonal().copy_(torch.arange(1, min(n, m) + 1, dtype=torch.float64) ** -0.5)
    elif name == "gaussian":
        found = torch.randn(n, m, generator=generator(0, name, f"{n} by {m}"), dtype=torch.float64)
    else:
        found = _images(name, n, m, setting)
    return _leading(found, int(point["rank"]))


def _images(name: str, n: int, m: int, setting: Setting) -> Float[Tensor, "n m"]:
    data = load(name, folder=setting.data, progress=False)
    found = data.train_images[:n].double().flatten(1)
    if found.shape != (n, m):
        raise DataError(f"{name} gives {tuple(found.shape)} images by pixels, expected {(n, m)}: change n and m")
    return found


def _leading(Y: Float[Tensor, "n m"], rank: int) -> Float[Tensor, "n m"]:
    U, values, Vh = torch.linalg.svd(Y, full_matrices=False)
    kept = slice(rank or None)
    return U[:, kept] * (values[kept] / values[0]) @ Vh[kept]
