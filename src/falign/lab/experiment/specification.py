"""What an experiment is: frozen values that say what to run, and what is read off the runs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import product
from pathlib import Path

from falign.lab.experiment.reading import Choice, Claim, Picture

Scalar = str | int | float | bool
Point = Mapping[str, Scalar]
"""A point of the grid: everything that a run depends on but its seed, sizes and number of steps included."""

PRESETS = ("smoke", "quick", "paper")
"""Sizes and repetitions: seconds, minutes on two cores, the paper's own. The mathematics is the same."""


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
            so that other processes can import it. A ``DataError`` says that a data set is not here.
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

    def price(self, tasks: Sequence[Task]) -> float:
        """What runs cost, in the experiment's unit; their number if it has none."""
        return float(len(tasks)) if self.cost is None else float(sum(self.cost(task) for task in tasks))

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
