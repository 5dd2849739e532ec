"""Frozen values that say what an experiment runs, which figures and claims are read off it, and what a paper is."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import product
from math import inf
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, overload

import polars as pl

from falign.lab.experiment._validation import PRESETS as PRESETS  # public from here
from falign.lab.experiment._validation import Origin, check_claim, check_experiment, check_paper, check_picture

if TYPE_CHECKING:  # drawing is for the report: a worker that computes runs never imports matplotlib
    import matplotlib.figure


class Missing(LookupError):  # noqa: N818  # it is an answer, not a fault
    """A claim cannot be read: which runs the table lacks."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure as a function of the table.

    Args:
        name: A short name of letters, digits and hyphens.
        caption: What is seen, in a sentence or two; where the paper has such a figure, its number.
        data: Table of the runs that were done -> what is drawn, which the report also offers as CSV.
        draw: What is drawn -> the figure.

    Raises:
        ValueError: It is no picture: what came, and what was expected.
    """

    name: str
    caption: str
    data: Callable[[pl.DataFrame], pl.DataFrame]
    draw: Callable[[pl.DataFrame], "matplotlib.figure.Figure"]

    def __post_init__(self) -> None:
        check_picture(self)


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
        """True if the number lies in the interval, ends included; NaN does not."""
        return bool(self.low <= self.measured <= self.high)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Measurements beside a claim, which holds if all its checks do.

    Args:
        checks: At least one.
        note: What else a reader should know, such as how many runs were read.

    Raises:
        ValueError: There is no check.
    """

    checks: tuple[Check, ...]
    note: str = ""

    def __post_init__(self) -> None:
        if not self.checks:
            raise ValueError("evidence without a check judges nothing: raise Missing if the table lacks the runs")

    @property
    def holds(self) -> bool:
        """True if every check holds."""
        return all(check.holds for check in self.checks)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement, beside the way in which it is measured.

    A report shows the paper's own claims apart from all others: a reader who asks whether a paper holds should not have
    to read what was added to it.

    Args:
        name: A short name of letters, digits and hyphens.
        statement: What is claimed.
        origin: "paper" if the paper states it, in whatever words; "theory" if it was derived from what the paper is
            about; "beyond" if it is neither, but measured to see how far the paper's statements go.
        reference: Section, theorem or figure of the paper; or how the statement was come by.
        method: How the number is read off the table.
        tolerance_reason: Why the interval is what it is: standard errors, a known scaling, a value of the paper.
        read: Table of the runs -> what was measured; raises Missing if these runs cannot tell. It is only called
            when every run of the scope is done.
        scope: Of which points the claim is about, as an expression of their columns; None is all.
        quotation: The paper's own words, letter for letter, with "…" where some are left out; empty where it makes no
            such statement, or could not be read.
        headline: What the first number of the evidence is, in a few words: it is then one of the figures on top of
            the page. Empty for most claims.

    Raises:
        ValueError: It is no claim: what came, and what was expected.
    """

    name: str
    statement: str
    origin: Origin = "paper"
    reference: str
    method: str
    tolerance_reason: str
    read: Callable[[pl.DataFrame], Evidence]
    scope: pl.Expr | None = None
    quotation: str = ""
    headline: str = ""

    def __post_init__(self) -> None:
        check_claim(self)


@dataclass(frozen=True)
class Interpretation:
    """An ambiguity of a paper, and how it was resolved here.

    Args:
        question: What the paper leaves open.
        answer: What was taken, and what depends on it.
    """

    question: str
    answer: str


Scalar = str | int | float | bool
Point = Mapping[str, Scalar]
"""A point of the grid: everything that a run depends on but its seed, sizes and number of steps included."""


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
        return _key(_beginning(self.experiment, self.revision, self.point), self.seed)

    def __hash__(self) -> int:
        return hash(self.key)


def _beginning(experiment: str, revision: int, point: Point) -> str:
    """Beginning that the keys of a point's runs share: JSON of a list, whose last element is still to come."""
    return json.dumps([experiment, revision, dict(sorted(point.items()))], allow_nan=False)[:-1]


def _key(beginning: str, seed: int) -> str:
    return sha256(f"{beginning}, {seed}]".encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Records of a run, and how it ended.

    Args:
        records: {column: values}, all of one length, one value a record; a value may be None.
        diverged: When and how the run left the finite numbers; None if it did not. Records of such a run end
            before that.
    """

    records: Mapping[str, Sequence[Scalar | None]]
    diverged: str | None = None


def nobody(share: float) -> None:
    """Takes how far a block is where nobody wants to know."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Device and data with which a block of runs is computed.

    Args:
        device: A torch device.
        data: Folder of the data sets; None is what ``FALIGN_DATA`` names, then the cache.
        report: Told now and then which share of the block's time is over, from 0 to 1; may be called often.
    """

    device: str = "cpu"
    data: Path | None = None
    report: Callable[[float], None] = nobody

    def each(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """The runs of a block that computes one after the other, reported as they end."""
        for number, task in enumerate(tasks, 1):
            yield task
            self.report(number / len(tasks))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A grid of runs, what computes them, and what is read off them.

    Args:
        name: Full name, such as "song2021.figure2".
        title: What it is about, in a few words.
        source: Paper and place.
        revision: Raised whenever ``run`` would leave other numbers; older runs are then no longer read.
        grid: {preset: points}.
        seeds: {preset: number of seeds a point}; a preset that both leave out has no runs.
        run: A function of the grid's axes, each a keyword with a type; a function of a module, so that other processes
            can import it. ``run(*, seed, setting, **axes) -> Outcome`` computes a run. ``run(*, seeds, setting, **axes)
            -> list[Outcome]`` computes a block of runs at once and gives their outcomes in the same order: axes of
            ``together`` are sequences, one value a run, the others are the same for all. See
            :mod:`falign.lab.experiment._axes`. A ``DataError`` says that a data set is not here.
        together: Axes along which the runs of a block may differ, beside the seed; what differs along another
            axis comes into another block.
        at_most: Largest number of runs in a block.
        memory: Bytes that a block needs, of ``seeds`` and those axes that it names.
        cost: What a run costs, in any unit, of those axes that it names; for the estimate of the time left.
        agreement: Largest difference between the records of a run computed in one block and in another, by any number
            of threads, on the same kind of machine, as
            :func:`falign.lab.experiment._run_file.relative_difference` has it: 0 is to the bit.
        timed: Columns of the records that are of the machine and its load, such as times: they are never compared.
        pictures: Figures.
        claims: Claims.

    Raises:
        ValueError: It is no experiment: what came, and what was expected.
    """

    name: str
    title: str
    source: str
    revision: int
    grid: Mapping[str, Sequence[Point]]
    seeds: Mapping[str, int]
    run: Callable[..., Outcome | Sequence[Outcome]]
    together: tuple[str, ...] = ()
    at_most: int = 500
    memory: Callable[..., int] | None = None
    cost: Callable[..., float] | None = None
    agreement: float = 0.0
    timed: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    claims: tuple[Claim, ...] = ()

    def __post_init__(self) -> None:
        check_experiment(self)

    def tasks(self, preset: str) -> tuple[Task, ...]:
        """All runs of a preset: every point with every seed, seeds counted from 0."""
        points, seeds = self.grid.get(preset, ()), self.seeds.get(preset, 0)
        size = (id(points), seeds)  # presets may have the same
        if size not in self._made:
            self._made[size] = tuple(self._tasks(points, seeds))
        return self._made[size]

    @cached_property
    def _made(self) -> dict[tuple[int, int], tuple[Task, ...]]:
        """{points and seeds: their runs}: making 100,000 keys takes half a second."""
        return {}

    def _tasks(self, points: Sequence[Point], seeds: int) -> Iterator[Task]:
        for point in points:
            beginning = _beginning(self.name, self.revision, point)
            for seed in range(seeds):
                task = Task(self.name, self.revision, point, seed)
                vars(task)["key"] = _key(beginning, seed)
                yield task


class LazyExperiments(Sequence[Experiment]):
    """Experiments whose modules are imported when they are asked for.

    To run one experiment nothing of the others is imported, nor what they need.

    Args:
        where: {full name: "module:VALUE"}, in the order of the paper.
    """

    def __init__(self, where: Mapping[str, str]) -> None:
        self.where = dict(where)

    def named(self, name: str) -> Experiment:
        """The experiment of a name."""
        return resolve_name(self.where[name])

    @overload
    def __getitem__(self, index: int) -> Experiment: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Experiment, ...]: ...
    def __getitem__(self, index: int | slice) -> Experiment | tuple[Experiment, ...]:
        names = list(self.where)[index]
        return self.named(names) if isinstance(names, str) else tuple(self.named(name) for name in names)

    def __len__(self) -> int:
        return len(self.where)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper: its experiments, and how its ambiguities were resolved.

    Args:
        name: Name on the command line, such as "song2021".
        title: The paper's title.
        authors: Its authors.
        venue: Where and when it appeared.
        address: Where it can be read.
        experiments: What is reproduced; the name of each begins with the paper's.
        interpretations: Its ambiguities and what was taken.

    Raises:
        ValueError: It is no paper: what came, and what was expected.
    """

    name: str
    title: str
    authors: str
    venue: str
    address: str
    experiments: Sequence[Experiment]
    interpretations: tuple[Interpretation, ...] = ()

    def __post_init__(self) -> None:
        check_paper(self)

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of its experiments, none of which is imported for it."""
        if isinstance(self.experiments, LazyExperiments):
            return tuple(self.experiments.where)
        return tuple(experiment.name for experiment in self.experiments)

    def experiment(self, name: str) -> Experiment:
        """The experiment of a full name."""
        return self.experiments[self.names.index(name)]


def grid(**axes: Scalar | Sequence[Scalar]) -> tuple[Point, ...]:
    """All points of a product of axes; a single value is an axis of one.

    Returns:
        The points, the last axis running fastest.
    """
    values = [(axis,) if isinstance(axis, (str, int, float, bool)) else tuple(axis) for axis in axes.values()]
    return tuple(dict(zip(axes, point, strict=True)) for point in product(*values))
