"""Frozen values that say what an experiment runs, which figures and claims are read off it, and what a paper is."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import product
from math import inf, isfinite
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Literal, overload

import polars as pl

from falign.lab.experiment._axes import mismatch

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
    """

    name: str
    caption: str
    data: Callable[[pl.DataFrame], pl.DataFrame]
    draw: Callable[[pl.DataFrame], "matplotlib.figure.Figure"]


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


Origin = Literal["paper", "theory", "beyond"]
"""Where a statement comes from: the paper; derived from the theory that it is about; or neither."""


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
    """

    name: str
    statement: str
    origin: Origin = "paper"
    reference: str
    method: str
    tolerance_reason: str
    read: Callable[[pl.DataFrame], Evidence]
    scope: pl.Expr | None = None


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

RESERVED = ("seed", "key", "status", "message", "seconds")
"""Names of columns that the store itself writes beside the points and the records; so are all that begin with __."""

PRESETS = ("smoke", "quick", "paper")
"""Sizes and repetitions: seconds, minutes on two cores, the paper's own. The mathematics is the same."""
_LONGEST = 200
"""Letters of a column's name."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""A name of an experiment is the name of a folder."""
_FOLDERS = ("leases",)
"""Folders of a store that hold no runs."""


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
        _check(self)
        for points in self.grid.values():
            kinds: dict[str, set[type]] = {}
            for point in points:
                for axis, value in point.items():
                    self._check_axis(axis, value)
                    kinds.setdefault(axis, set()).add(type(value))
            for axis, types in kinds.items():
                if len(types) > 1 and types != {int, float}:
                    listed = ", ".join(sorted(kind.__name__ for kind in types))
                    raise ValueError(f"the grid of {self.name} has {listed} on axis {axis!r}, expected one kind")
            if (wrong := mismatch(self.run, points, self.together)) is not None:
                raise ValueError(f"experiment {self.name!r}: {wrong}")

    def _check_axis(self, axis: str, value: Scalar) -> None:
        wrong = misnamed(axis) or ("it is a name of the store's own" if axis in RESERVED else None)
        if wrong is not None:
            raise ValueError(f"the grid of {self.name} has an axis {axis!r}: {wrong}: rename it")
        if type(value) is str and value.encode(errors="replace").decode() != value:
            raise ValueError(f"the grid of {self.name} has {value!r:.40} on axis {axis!r}, expected a text of UTF-8")
        plain = type(value) in (bool, str) or (type(value) is int and -(2**63) <= value < 2**63)
        if not plain and not (type(value) is float and isfinite(value)):
            shown = repr(value)[:40] if isinstance(value, float) else f"a {type(value).__name__}"
            raise ValueError(
                f"the grid of {self.name} has {shown} on axis {axis!r}, expected a text, a truth value, "
                "a whole number of 64 bits or a finite float"
            )

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
    """

    name: str
    title: str
    authors: str
    venue: str
    address: str
    experiments: Sequence[Experiment]
    interpretations: tuple[Interpretation, ...] = ()

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


def misnamed(name: object) -> str | None:
    """The reason why something cannot name a column; None if it can."""
    if not isinstance(name, str):
        return f"its name is a {type(name).__name__}, expected a text"
    if not name.strip() or not name.isprintable():  # which half a pair of surrogates and NUL are not
        return "its name is empty, or has letters that cannot be seen"
    if len(name) > _LONGEST:
        return f"its name has {len(name)} letters, expected at most {_LONGEST}"
    return "names that begin with __ are the store's own" if name.startswith("__") else None


def _check(experiment: Experiment) -> None:
    """Raise ``ValueError`` if an experiment cannot be kept in a store or shown."""
    name = experiment.name

    def refuse(what: str) -> None:
        raise ValueError(f"experiment {name!r}: {what}")

    if not (isinstance(name, str) and _NAME.fullmatch(name)) or name in _FOLDERS:
        refuse("its name is that of a folder, expected at most 100 letters, digits, dots, hyphens and underscores")
    if not _whole(experiment.revision, 0):
        refuse(f"its revision is {experiment.revision!r}, expected a whole number, at least 0")
    if not _whole(experiment.at_most, 1):
        refuse(f"at_most is {experiment.at_most!r}, expected a whole number, at least 1")
    if not (isinstance(experiment.agreement, float) and 0 <= experiment.agreement < 1):
        refuse(f"its agreement is {experiment.agreement!r}, expected a number from 0 to 1")
    for preset in dict.fromkeys([*experiment.grid, *experiment.seeds]):
        if preset not in PRESETS:
            refuse(f"it has a preset {preset!r}, expected {', '.join(PRESETS)}")
        if preset not in experiment.grid or preset not in experiment.seeds:
            lacking = "grid" if preset in experiment.seeds else "seeds"
            refuse(f"its {lacking} leave out the preset {preset!r}: give both grid and seeds, or neither")
        if not _whole(seeds := experiment.seeds[preset], 1):
            refuse(f"its seeds of preset {preset} are {seeds!r}, expected their number, a whole one of at least 1")
        if not isinstance(experiment.grid[preset], Sequence):
            refuse(
                f"its grid of preset {preset} is a {type(experiment.grid[preset]).__name__}, expected a tuple of points"
            )
    axes = {axis for points in experiment.grid.values() for point in points for axis in point}
    if unknown := [axis for axis in experiment.together if axis not in axes and axis != "seed"]:
        refuse(f"together names {unknown[0]!r}, which is no axis of its grid")
    for what, parts in (("claims", experiment.claims), ("pictures", experiment.pictures)):
        names = [part.name for part in parts]
        if twice := [each for each in names if names.count(each) > 1]:
            refuse(f"two of its {what} are called {twice[0]!r}")


def _whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least
