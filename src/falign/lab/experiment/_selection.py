"""Selection of papers, experiments and preset by the words of the command line.

Imports neither PyTorch nor falign's experiments: a mistyped name is refused before any of them is needed.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pkgutil import resolve_name

from falign.lab._streams import suggestion
from falign.lab._text import one_line
from falign.lab.config import ConfigError
from falign.lab.experiment._specification import PRESETS, Experiment, Paper

_DEFAULT = "quick"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Papers, and those of their experiments that were asked for.

    Args:
        papers: The papers, whole: a report shows all of a paper, whichever of its experiments was asked for.
        experiments: The experiments that were asked for, in the order of their papers.
    """

    papers: tuple[Paper, ...]
    experiments: tuple[Experiment, ...]


def select(names: Sequence[str], papers: Mapping[str, Paper]) -> Selection:
    """Find papers and experiments by their names.

    Args:
        names: Names of papers, full names of experiments, or ``package.module:PAPER`` for a paper of the user's own;
            none is all of ``papers``.
        papers: {name: paper}.

    Returns:
        The selection, each experiment once.

    Raises:
        ConfigError: A name is neither of a paper nor of an experiment, or a paper of one's own cannot be imported.
    """
    named = {name: _imported(name, papers) for name in names if ":" in name}
    papers = {**papers, **{paper.name: paper for paper in named.values()}} if named else papers
    names = [named[name].name if name in named else name for name in names]
    known = {name for paper in papers.values() for name in paper.names}
    for name in names:
        if name not in papers and name not in known:
            listed = ", ".join([*papers, *sorted(known)]) or "none"
            close = suggestion(name, [*papers, *known])
            raise ConfigError(f"NAME is {name!r}{close}, expected a paper or an experiment: {listed}")
    chosen = tuple(
        paper.experiment(name)
        for paper in papers.values()
        for name in paper.names
        if not names or paper.name in names or name in names
    )
    asked = {experiment.name for experiment in chosen}
    return Selection(
        papers=tuple(paper for paper in papers.values() if not asked.isdisjoint(paper.names)), experiments=chosen
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


def _imported(name: str, papers: Mapping[str, Paper]) -> Paper:
    module, _, path = name.partition(":")
    if not all(part.isidentifier() for text in (module, path) for part in text.split(".")):
        raise ConfigError(f"NAME is {name!r:.80}, expected a paper, an experiment or package.module:PAPER")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # and it stays there: worker processes import the paper's functions as well
    try:
        paper = resolve_name(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too: what is imported is the user's own code
        raise ConfigError(f"NAME {name} cannot be imported: {one_line(error)}") from error
    if not isinstance(paper, Paper):
        raise ConfigError(f"NAME {name} is a {type(paper).__name__}, expected a falign.lab.experiment.Paper")
    if paper.name in papers:
        raise ConfigError(
            f"NAME {name} is a paper that calls itself {paper.name!r}, as one of falign's does: rename it"
        )
    return paper


def choose_preset(asked: str | None, counts: Mapping[str, int]) -> tuple[str, str]:
    """Choose the preset to show.

    Args:
        asked: The preset that was asked for; None is the one of which most runs are there.
        counts: {preset: number of its runs that are there}.

    Returns:
        The preset, and a note for the user; empty if there is nothing to note.
    """
    best = max(reversed(PRESETS), key=counts.__getitem__)  # of several that have equally many the largest
    number = "1 run is" if counts[best] == 1 else f"{counts[best]} runs are"
    if asked is None:
        return (best, f"preset {best}, of which {number} there") if counts[best] else (_DEFAULT, "")
    if counts[asked] or not counts[best]:
        return asked, ""
    return asked, f"no run of preset {asked} is there, but of preset {best} {number}: use --preset {best}"
