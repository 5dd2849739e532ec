"""Selection of papers, experiments and preset by the words of the command line.

Imports neither PyTorch nor the experiments: a mistyped name is refused before any of them is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        names: Names of papers, or full names of experiments; none is all.
        papers: {name: paper}.

    Returns:
        The selection, each experiment once.

    Raises:
        ConfigError: A name is neither of a paper nor of an experiment.
    """
    known = {name for paper in papers.values() for name in paper.names}
    for name in names:
        if name not in papers and name not in known:
            listed = ", ".join([*papers, *sorted(known)]) or "none"
            raise ConfigError(f"NAME is {name!r}, expected a paper or an experiment: {listed}")
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
