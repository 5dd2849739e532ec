"""Which papers and experiments the names on the command line mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from falign.lab.config import ConfigError
from falign.lab.experiment.specification import PRESETS, Experiment, Paper

_DEFAULT = "quick"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Papers, and those of their experiments that were asked for.

    Args:
        papers: The papers, whole: a report shows all of a paper, whichever experiment was run last.
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
        What they mean, each experiment once.

    Raises:
        ConfigError: A name is not known.
    """
    known = {experiment.name for paper in papers.values() for experiment in paper.experiments}
    for name in names:
        if name not in papers and name not in known:
            listed = ", ".join([*papers, *sorted(known)]) or "none"
            raise ConfigError(f"NAME is {name!r}, expected a paper or an experiment: {listed}")
    chosen = tuple(
        experiment
        for paper in papers.values()
        for experiment in paper.experiments
        if not names or paper.name in names or experiment.name in names
    )
    concerned = tuple(paper for paper in papers.values() if any(each in chosen for each in paper.experiments))
    return Selection(papers=concerned, experiments=chosen)


def choose(asked: str | None, counts: Mapping[str, int]) -> tuple[str, str]:
    """Choose which preset to show.

    Args:
        asked: The preset that was asked for; None is the one of which most runs are there, of several the largest.
        counts: {preset: how many of its runs are there}.

    Returns:
        The preset, and what a person should know of the choice; empty if nothing.
    """
    best = max(reversed(PRESETS), key=counts.__getitem__)
    number = "1 run is" if counts[best] == 1 else f"{counts[best]} runs are"
    if asked is None:
        return (best, f"preset {best}, of which {number} there") if counts[best] else (_DEFAULT, "")
    if counts[asked] or not counts[best]:
        return asked, ""
    return asked, f"no run of preset {asked} is there, but of preset {best} {number}: use --preset {best}"
