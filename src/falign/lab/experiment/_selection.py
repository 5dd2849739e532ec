"""Selection of papers, experiments and preset by the words of the command line.

Imports neither PyTorch nor falign's experiments: a mistyped name is refused before any of them is needed.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

from falign.lab._streams import suggestion
from falign.lab._text import explained
from falign.lab.config import ConfigError
from falign.lab.experiment._specification import PRESETS, Experiment, Paper

_DEFAULT = "quick"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Papers, and those of their experiments that were asked for.

    Args:
        papers: The papers, whole: a report shows all of a paper, whichever of its experiments was asked for.
        experiments: The experiments that were asked for, in the order of their papers.
        modules: Names of the modules of papers of the user's own, which other machines do not have.
    """

    papers: tuple[Paper, ...]
    experiments: tuple[Experiment, ...]
    modules: tuple[str, ...] = ()


def select(names: Sequence[str], papers: Mapping[str, Paper], own: Sequence[str] = ()) -> Selection:
    """Find papers and experiments by their names.

    Args:
        names: Names of papers, or full names of experiments; none is all of ``papers``, or of one's own if there are.
        papers: {name: paper}.
        own: Papers of the user's own, as ``package.module:PAPER`` or ``path/to/file.py:PAPER``.

    Returns:
        The selection, each experiment once.

    Raises:
        ConfigError: A name is neither of a paper nor of an experiment, or a paper of one's own cannot be imported.
    """
    imported: dict[str, tuple[Paper, str]] = {}
    for text in own:
        paper, module = _imported(text)
        if paper.name in papers:
            raise ConfigError(f"--paper {text} calls itself {paper.name!r}, as one of falign's papers does: rename it")
        imported[paper.name] = paper, module
    papers = {**papers, **{name: paper for name, (paper, _) in imported.items()}} if imported else papers
    names = names or tuple(imported)
    known = {name for paper in papers.values() for name in paper.names}
    for name in names:
        if ":" in name:
            raise ConfigError(f"NAME is {name!r}, expected a name: a paper of your own is --paper {name}")
        if name not in papers and name not in known:
            close = suggestion(name, [*papers, *known])
            raise ConfigError(
                f"NAME is {name!r}{close}, expected a paper or an experiment: {', '.join(papers) or 'none'}, or what "
                "falign list shows"
            )
    chosen = tuple(
        paper.experiment(name)
        for paper in papers.values()
        for name in paper.names
        if not names or paper.name in names or name in names
    )
    asked = {experiment.name for experiment in chosen}
    return Selection(
        papers=tuple(paper for paper in papers.values() if not asked.isdisjoint(paper.names)),
        experiments=chosen,
        modules=tuple(dict.fromkeys(module for _, module in imported.values())),
    )


def narrow(selection: Selection, only: Sequence[str], seeds: int | None, preset: str) -> Selection:
    """Keep a part of the runs of a selection: some values of some axes, and the first seeds.

    Args:
        selection: The experiments.
        only: "axis=value" or "axis=value,value"; an experiment without the axis, or without the values, is left out.
        seeds: How many seeds a point; None is all.
        preset: The preset whose runs are kept.

    Returns:
        The selection, its experiments with fewer runs; the names and the keys of these are the same.

    Raises:
        ConfigError: A text has another form, no run has these values, or the number of seeds is not positive.
    """
    wanted: dict[str, tuple[str, ...]] = {}
    for text in only:
        axis, equals, values = text.partition("=")
        if not (axis and equals and values) or axis in wanted:
            raise ConfigError(f"--only is {text!r:.80}, expected AXIS=VALUE or AXIS=VALUE,VALUE, each axis once")
        wanted[axis] = tuple(values.split(","))
    if seeds is not None and seeds < 1:
        raise ConfigError(f"--seeds is {seeds}, expected at least 1")
    kept = []
    for experiment in selection.experiments:
        points = tuple(
            point
            for point in experiment.grid.get(preset, ())
            if all(axis in point and str(point[axis]) in values for axis, values in wanted.items())
        )
        if points:
            number = min(experiment.seeds[preset], seeds or experiment.seeds[preset])
            kept.append(replace(experiment, grid={preset: points}, seeds={preset: number}))
    if not kept:
        points = [point for each in selection.experiments for point in each.grid.get(preset, ())]
        there = {axis: sorted({str(point[axis]) for point in points if axis in point}) for axis in wanted}
        listed = "; ".join(f"{axis} has {', '.join(values) or 'no values'}" for axis, values in there.items())
        raise ConfigError(f"--only {' '.join(only)[:80]} leaves no run of preset {preset}: {listed}")
    return replace(selection, experiments=tuple(kept))


def _imported(text: str) -> tuple[Paper, str]:
    """Import a paper of the user's own: the paper, and the name of the module that holds it.

    Its folder stays on ``sys.path``: worker processes import the paper's functions as well.
    """
    where, _, value = text.rpartition(":")
    path = Path(where) if where.endswith(".py") else None
    module = path.stem if path else where
    if not all(part.isidentifier() for name in (module, value) for part in name.split(".")):
        raise ConfigError(f"--paper is {text!r:.80}, expected package.module:PAPER or path/to/file.py:PAPER")
    if path and not path.is_file():
        raise ConfigError(f"--paper is {text}, but there is no file {path}: check the path")
    folder = str(path.resolve().parent) if path else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = import_module(module)
        paper = None if path and _is_other(found, path) else resolve_name(f"{module}:{value}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too: what is imported is the user's own code
        raise ConfigError(f"--paper {text} cannot be imported: {explained(error)}") from error
    if path and _is_other(found, path):
        raise ConfigError(f"--paper is {text}, but a module {module} is {found.__file__} already: rename the file")
    if not isinstance(paper, Paper):
        raise ConfigError(f"--paper {text} is of the kind {type(paper).__name__}, expected falign.lab.experiment.Paper")
    return paper, module


def _is_other(module: ModuleType, path: Path) -> bool:
    return Path(module.__file__ or "").resolve() != path.resolve()


There = Mapping[str, Mapping[str, set[str]]]
"""Full name of an experiment -> preset -> keys of its runs that are there."""


def choose_presets(
    papers: Sequence[Paper], there: There, asked: str | None = None, of: Sequence[Experiment] | None = None
) -> dict[str, str]:
    """Choose the preset at which each experiment is shown.

    A preset has been begun if a run of it is there that is of no smaller one: presets share runs.

    Args:
        papers: The papers.
        there: The runs that are there.
        asked: The preset that was asked for; None is, of each experiment, the one that has been begun of which most
            runs are there. Where none is there, it is the one of most other experiments.
        of: For which experiments the preset was asked for; None is all.

    Returns:
        {full name: preset}.
    """
    wanted = None if of is None else {experiment.name for experiment in of}
    experiments = [experiment for paper in papers for experiment in paper.experiments]
    chosen: dict[str, str] = {}
    for experiment in experiments:
        if asked is not None and (wanted is None or experiment.name in wanted):
            chosen[experiment.name] = asked
        elif (best := _most_there(experiment, there[experiment.name])) is not None:
            chosen[experiment.name] = best
    used = list(chosen.values())
    usual = asked or (max(PRESETS, key=used.count) if used else _DEFAULT)
    return {experiment.name: chosen.get(experiment.name, usual) for experiment in experiments}


def _most_there(experiment: Experiment, there: Mapping[str, set[str]]) -> str | None:
    """The preset that has been begun of which most runs are there; of several the one that is whole, or the largest."""
    smaller: set[str] = set()
    order = []
    for rank, preset in enumerate(PRESETS):
        whole = len(there[preset]) == len(experiment.tasks(preset))
        if there[preset] and (whole or there[preset] - smaller):
            order.append((len(there[preset]), whole, rank))
        smaller |= there[preset]
    return PRESETS[max(order)[2]] if order else None


_NAMED = 2
"""So many experiments of a preset are named, more are counted."""


def told_presets(chosen: Mapping[str, str], there: There, asked: str | None) -> str:
    """Make a note on the presets that are shown, for the user; empty if there is nothing to note."""
    counts = {preset: sum(len(each[preset]) for each in there.values()) for preset in PRESETS}
    best = max(reversed(PRESETS), key=counts.__getitem__)
    if not counts[best]:
        return ""
    if asked is not None:
        missing = f"no run of preset {asked} is there, but of preset {best} {_are(counts[best])}: use --preset {best}"
        return "" if counts[asked] else missing
    used: dict[str, list[str]] = {}
    for name, each in there.items():
        if any(each.values()):
            used.setdefault(chosen[name], []).append(name)
    if len(used) == 1:
        (preset,) = used
        return f"preset {preset}, of which {_are(counts[preset])} there"
    parts = [
        f"{preset} of {', '.join(names) if len(names) <= _NAMED else f'{len(names)} experiments'}"
        for preset, names in used.items()
    ]
    return f"presets are mixed, each the one of which most runs are there: {'; '.join(parts)}"


def _are(count: int) -> str:
    return "1 run is" if count == 1 else f"{count} runs are"
