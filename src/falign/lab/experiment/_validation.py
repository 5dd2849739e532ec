"""Checks of experiments, claims, pictures and papers when they are made: what is wrong with one, in a sentence."""

import re
from collections.abc import Mapping, Sequence
from inspect import signature
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, get_args

import polars as pl

from falign.lab.experiment._axes import mismatch

if TYPE_CHECKING:
    from falign.lab.experiment._specification import Claim, Experiment, Paper, Picture

PRESETS = ("smoke", "quick", "paper")
"""Sizes and repetitions: seconds, minutes on two cores, the paper's own. The mathematics is the same."""
Origin = Literal["paper", "theory", "beyond"]
"""Where a statement comes from: the paper; derived from the theory that it is about; or neither."""
RESERVED = ("seed", "key", "status", "message", "seconds")
"""Names of columns that the store itself writes beside the points and the records; so are all that begin with __."""
_LONGEST = 200
"""Letters of a column's name."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""A name of an experiment is the name of a folder."""
_SHORT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
"""A name of a claim, a picture or a paper is a part of a link, or the name of a file."""
_PLACE = re.compile(r"[\w.]+:[\w.]+")
"""A value of a module."""
_FOLDERS = ("leases", "report")
"""Folders of a store that hold no runs."""


class _Refusal:
    """Says of which value something is wrong."""

    def __init__(self, kind: str, name: object) -> None:
        self._who = f"{kind} {name!r:.80}"

    def __call__(self, what: str) -> None:
        raise ValueError(f"{self._who}: {what}")

    def name(self, name: object, pattern: re.Pattern[str], expected: str) -> None:
        if not (isinstance(name, str) and pattern.fullmatch(name)):
            self(f"its name is {name!r:.80}, expected {expected}")

    def texts(self, value: object, names: Sequence[str], *, empty: bool = False) -> None:
        for name in names:
            text = getattr(value, name)
            if not isinstance(text, str) or not (empty or text.strip()):
                self(f"its {name} is {text!r:.80}, expected a text")

    def function(self, name: str, value: object, of: str) -> None:
        """Refuse what cannot be called with one argument."""
        if not callable(value):
            self(f"its {name} is {_a(value)}, expected a function of {of}")
        try:
            signature(value).bind(None)  # pyright: ignore[reportArgumentType]
        except ValueError:  # built-in functions may have no signature
            return
        except TypeError as error:
            self(f"its {name} cannot be called with {of} alone ({error}): give a function of one argument")

    def all_of(self, name: str, values: object, kind: type) -> None:
        """Refuse what is no sequence of values of a kind, of which no two have the same name."""
        if isinstance(values, kind):
            self(f"its {name} is {_a(values)}, expected a tuple of them: write ({name.rstrip('s')},) with a comma")
        if not isinstance(values, Sequence) or isinstance(values, str):
            self(f"its {name} is {_a(values)}, expected a tuple of {kind.__name__}")
        assert isinstance(values, Sequence)
        if wrong := [each for each in values if not isinstance(each, kind)]:
            self(f"its {name} has {_a(wrong[0])}, expected {kind.__name__} alone")
        self.no_twins(name, [getattr(each, "name", str(number)) for number, each in enumerate(values)])

    def no_twins(self, what: str, names: Sequence[str]) -> None:
        if len(set(names)) < len(names):
            twice = next(each for each in names if names.count(each) > 1)
            self(f"two of its {what} are called {twice!r}: names are the keys by which results are found")


def _a(value: object) -> str:
    """Name the kind of a value, with its article."""
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOaeiou' else 'a'} {kind}"


def check_claim(claim: "Claim") -> None:
    """Raise ``ValueError`` if a claim cannot be judged or shown."""
    refuse = _Refusal("claim", claim.name)
    refuse.name(claim.name, _SHORT, "letters, digits and hyphens, as in a link")
    refuse.texts(claim, ("statement", "reference", "method", "tolerance_reason"))
    refuse.texts(claim, ("quotation", "headline"), empty=True)
    if claim.origin not in get_args(Origin):
        refuse(f"its origin is {claim.origin!r:.80}, expected {', '.join(get_args(Origin))}")
    if claim.quotation and claim.origin != "paper":
        refuse(f"it quotes a paper, but its origin is {claim.origin!r}: leave the quotation out, or say “paper”")
    refuse.function("read", claim.read, "the table of runs")
    if claim.scope is not None and not isinstance(claim.scope, pl.Expr):
        refuse(f"its scope is {_a(claim.scope)}, expected a polars expression such as pl.col('p') > 100, or None")


def check_picture(picture: "Picture") -> None:
    """Raise ``ValueError`` if a picture cannot be drawn or shown."""
    refuse = _Refusal("picture", picture.name)
    refuse.name(picture.name, _SHORT, "letters, digits and hyphens, as in a link")
    refuse.texts(picture, ("caption",))
    refuse.function("data", picture.data, "the table of runs")
    refuse.function("draw", picture.draw, "what data gives")


def check_paper(paper: "Paper") -> None:
    """Raise ``ValueError`` if a paper cannot be run or shown; experiments that are imported later are not imported."""
    from falign.lab.experiment._specification import Experiment, Interpretation, LazyExperiments

    refuse = _Refusal("paper", paper.name)
    refuse.name(paper.name, _SHORT, "letters, digits, hyphens and underscores, as of a file")
    refuse.texts(paper, ("title",))
    refuse.texts(paper, ("authors", "venue", "address"), empty=True)
    refuse.all_of("interpretations", paper.interpretations, Interpretation)
    if not isinstance(paper.experiments, LazyExperiments):
        refuse.all_of("experiments", paper.experiments, Experiment)
    elif wrong := [text for text in paper.experiments.where.values() if not _PLACE.fullmatch(str(text))]:
        refuse(f"an experiment is {wrong[0]!r:.80}, expected module:VALUE")
    if not paper.names:
        refuse("it has no experiments: give at least one")
    for name in paper.names:
        if not name.startswith(f"{paper.name}."):
            refuse(f"its experiment {name!r} is not named after it: call it {paper.name}.{name.rpartition('.')[2]}")


def check_experiment(experiment: "Experiment") -> None:
    """Raise ``ValueError`` if an experiment cannot be run, kept in a store or shown."""
    from falign.lab.experiment._specification import Claim, Picture

    refuse = _Refusal("experiment", experiment.name)
    refuse.name(experiment.name, _NAME, "at most 100 letters, digits, dots, hyphens and underscores, as of a folder")
    if experiment.name in _FOLDERS:
        refuse("its name is that of a folder of the store's own: rename it")
    refuse.texts(experiment, ("title", "source"))
    if not _whole(experiment.revision, 0):
        refuse(f"its revision is {experiment.revision!r}, expected a whole number, at least 0")
    if not _whole(experiment.at_most, 1):
        refuse(f"at_most is {experiment.at_most!r}, expected a whole number, at least 1")
    if not (isinstance(experiment.agreement, float) and 0 <= experiment.agreement < 1):
        refuse(f"its agreement is {experiment.agreement!r}, expected a number from 0 to 1")
    for name, function in (("run", experiment.run), ("memory", experiment.memory), ("cost", experiment.cost)):
        if not callable(function) and (name == "run" or function is not None):
            refuse(f"its {name} is {_a(function)}, expected a function")
    _check_presets(experiment, refuse)
    for name in ("together", "timed"):
        if isinstance(names := getattr(experiment, name), str) or not all(isinstance(each, str) for each in names):
            refuse(f"{name} is {names!r:.80}, expected a tuple of names, such as ('rate',)")
    axes = {axis for points in experiment.grid.values() for point in points for axis in point}
    if unknown := [axis for axis in experiment.together if axis not in axes and axis != "seed"]:
        refuse(f"together names {unknown[0]!r}, which is no axis of its grid")
    refuse.all_of("claims", experiment.claims, Claim)
    refuse.all_of("pictures", experiment.pictures, Picture)
    for points in experiment.grid.values():
        _check_axes(experiment.name, points)
        if (wrong := mismatch(experiment.run, points, experiment.together)) is not None:
            refuse(wrong)


def _check_presets(experiment: "Experiment", refuse: _Refusal) -> None:
    for name, value in (("grid", experiment.grid), ("seeds", experiment.seeds)):
        if not isinstance(value, Mapping):
            refuse(f"its {name} is {_a(value)}, expected {{preset: …}} with presets of {', '.join(PRESETS)}")
    presets = dict.fromkeys([*experiment.grid, *experiment.seeds])
    if not presets:
        refuse(f"it has no preset: give grid and seeds of at least one of {', '.join(PRESETS)}")
    for preset in presets:
        if preset not in PRESETS:
            refuse(f"it has a preset {preset!r}, expected {', '.join(PRESETS)}")
        if preset not in experiment.grid or preset not in experiment.seeds:
            lacking = "grid" if preset in experiment.seeds else "seeds"
            refuse(f"its {lacking} leave out the preset {preset!r}: give both grid and seeds, or neither")
        if not _whole(seeds := experiment.seeds[preset], 1):
            refuse(f"its seeds of preset {preset} are {seeds!r}, expected their number, a whole one of at least 1")
        points = experiment.grid[preset]
        if not isinstance(points, Sequence) or isinstance(points, str):
            refuse(f"its grid of preset {preset} is {_a(points)}, expected a tuple of points, as grid(…) makes it")
        if not points:
            refuse(f"its grid of preset {preset} has no points: leave the preset out of grid and seeds")
        if wrong := [point for point in points if not isinstance(point, Mapping)]:
            refuse(f"its grid of preset {preset} has {_a(wrong[0])}, expected points as grid(…) makes them")


def _check_axes(name: str, points: Sequence[Mapping[str, Any]]) -> None:
    kinds: dict[str, set[type]] = {}
    seen = set()
    for point in points:
        for axis, value in point.items():
            _check_axis(name, axis, value)
            kinds.setdefault(axis, set()).add(type(value))
        if (content := frozenset(point.items())) in seen:
            listed = ", ".join(f"{axis}={value}" for axis, value in point.items())
            raise ValueError(f"the grid of {name} has a point twice, {listed}: leave one out")
        seen.add(content)
    for axis, types in kinds.items():
        if len(types) > 1 and types != {int, float}:
            listed = ", ".join(sorted(kind.__name__ for kind in types))
            raise ValueError(f"the grid of {name} has {listed} on axis {axis!r}, expected one kind")


def _check_axis(name: str, axis: object, value: object) -> None:
    wrong = misnamed(axis) or ("it is a name of the store's own" if axis in RESERVED else None)
    if wrong is not None:
        raise ValueError(f"the grid of {name} has an axis {axis!r}: {wrong}: rename it")
    if type(value) is str and value.encode(errors="replace").decode() != value:
        raise ValueError(f"the grid of {name} has {value!r:.40} on axis {axis!r}, expected a text of UTF-8")
    plain = type(value) in (bool, str) or (type(value) is int and -(2**63) <= value < 2**63)
    if not plain and not (type(value) is float and isfinite(value)):
        shown = repr(value)[:40] if isinstance(value, float) else f"a {type(value).__name__}"
        raise ValueError(
            f"the grid of {name} has {shown} on axis {axis!r}, expected a text, a truth value, "
            "a whole number of 64 bits or a finite float"
        )


def misnamed(name: object) -> str | None:
    """The reason why something cannot name a column; None if it can."""
    if not isinstance(name, str):
        return f"its name is a {type(name).__name__}, expected a text"
    if not name.strip() or not name.isprintable():  # which half a pair of surrogates and NUL are not
        return "its name is empty, or has letters that cannot be seen"
    if len(name) > _LONGEST:
        return f"its name has {len(name)} letters, expected at most {_LONGEST}"
    return "names that begin with __ are the store's own" if name.startswith("__") else None


def _whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least
