"""What an experiment is: frozen values that say what to run, and how figures and claims are read off the runs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import product
from math import inf
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure

Scalar = str | int | float | bool
Point = Mapping[str, Scalar]
"""A point of the grid: everything that a run depends on but its seed, sizes and number of steps included."""

PRESETS = ("smoke", "quick", "paper")
"""Sizes and repetitions: seconds, minutes on two cores, the paper's own. The mathematics is the same."""


class Missing(LookupError):  # noqa: N818  # it is an answer, not a fault
    """A claim cannot be read: which runs the table lacks."""


@dataclass(frozen=True)
class Task:
    """One run: a point of an experiment's grid and a seed.

    Args:
        experiment: Full name of the experiment, such as "song2021.figure2".
        revision: The experiment's revision.
        point: Everything else that the run depends on.
        seed: Its seed.
    """

    experiment: str
    revision: int
    point: Point
    seed: int

    @cached_property
    def key(self) -> str:
        """``sha256(experiment, revision, point, seed)``: the name of the run in a store.

        The preset is no part of it: a point holds its sizes, so presets share the runs that they have in common.
        """
        content = [self.experiment, self.revision, dict(sorted(self.point.items())), self.seed]
        return sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()[:32]

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run left.

    Args:
        records: {column: values}, all of one length, one value a record; a value may be None.
        diverged: When and how the run left the finite numbers; None if it did not. Records of such a run end
            before that.
    """

    records: Mapping[str, Sequence[Scalar | None]]
    diverged: str | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a block of runs is computed.

    Args:
        device: A torch device.
        data: Folder of the data sets; None is what ``FALIGN_DATA`` names, then the cache.
    """

    device: str = "cpu"
    data: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure as a function of the table.

    Args:
        name: A short name of letters, digits and hyphens.
        caption: What is seen, in a sentence or two; where the paper has such a figure, its number.
        data: Table of the runs that were done -> what is drawn, which the report also offers as CSV.
        draw: What is drawn -> the figure.
    """

    name: str
    caption: str
    data: Callable[[pl.DataFrame], pl.DataFrame]
    draw: Callable[[pl.DataFrame], Figure]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A number beside the interval in which it should lie.

    Args:
        label: What the number is, such as "p = 1000".
        measured: The number.
        low: The interval's lower end.
        high: Its upper end.
    """

    label: str
    measured: float
    low: float = -inf
    high: float = inf

    @property
    def holds(self) -> bool:
        """Whether the number lies in the interval, ends included; NaN does not."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was measured for a claim, which holds if all its checks do.

    Args:
        checks: At least one.
        note: What else a reader should know, such as how many runs were read.
    """

    checks: tuple[Check, ...]
    note: str = ""

    def __post_init__(self) -> None:
        if not self.checks:
            raise ValueError("a reading without a check judges nothing: raise Missing if the table lacks the runs")

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper states, beside how it is measured.

    Args:
        name: A short name of letters, digits and hyphens.
        statement: What the paper states.
        place: Where it states it; or where else the statement comes from.
        how: How the number is read off the table.
        because: Why the interval is what it is: standard errors, a known scaling, a value of the paper.
        read: Table of the runs that were done -> what was measured; raises Missing if runs are lacking.
    """

    name: str
    statement: str
    place: str
    how: str
    because: str
    read: Callable[[pl.DataFrame], Reading]


@dataclass(frozen=True)
class Choice:
    """An ambiguity of a paper, the reading that was taken, and what depends on it."""

    question: str
    taken: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A grid of runs, what computes them, and what is read off them.

    Args:
        name: Full name, such as "song2021.figure2".
        title: What it is about, in a few words.
        source: Paper and place.
        revision: Raised whenever ``run`` would leave other numbers; older runs are then no longer read.
        grid: {preset: points}.
        seeds: {preset: number of seeds a point}.
        run: Computes a block of runs at once and gives their outcomes in the same order; a function of a module,
            so that other processes can import it.
        together: Axes along which the runs of a block may differ, beside the seed; what differs along another
            axis comes into another block.
        at_most: Largest number of runs in a block.
        memory: Bytes that a block needs.
        cost: What a run costs, in any unit, for the estimate of the time left.
        pictures: Figures.
        claims: Claims.
    """

    name: str
    title: str
    source: str
    revision: int
    grid: Mapping[str, Sequence[Point]]
    seeds: Mapping[str, int]
    run: Callable[[Sequence[Task], Setting], Sequence[Outcome]]
    together: tuple[str, ...] = ()
    at_most: int = 500
    memory: Callable[[Sequence[Task]], int] | None = None
    cost: Callable[[Task], float] | None = None
    pictures: tuple[Picture, ...] = ()
    claims: tuple[Claim, ...] = ()

    def tasks(self, preset: str) -> tuple[Task, ...]:
        """All runs of a preset: every point with every seed, seeds counted from 0."""
        return tuple(
            Task(self.name, self.revision, point, seed)
            for point in self.grid[preset]
            for seed in range(self.seeds[preset])
        )


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper: its experiments, and how its ambiguities were read.

    Args:
        name: Name on the command line, such as "song2021".
        title: The paper's title.
        authors: Its authors.
        venue: Where and when it appeared.
        address: Where it can be read.
        experiments: What is reproduced; the name of each begins with the paper's.
        choices: Ambiguities and the readings that were taken.
    """

    name: str
    title: str
    authors: str
    venue: str
    address: str
    experiments: tuple[Experiment, ...]
    choices: tuple[Choice, ...] = ()


def grid(**axes: Scalar | Sequence[Scalar]) -> tuple[Point, ...]:
    """All points of a product of axes; a single value is an axis of one.

    Returns:
        The points, the last axis running fastest.
    """
    values = [(axis,) if isinstance(axis, (str, int, float, bool)) else tuple(axis) for axis in axes.values()]
    return tuple(dict(zip(axes, point, strict=True)) for point in product(*values))
