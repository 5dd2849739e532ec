"""How far the runs of one store are from the same runs in another: whether recomputed numbers are the same."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isinf
from pathlib import Path

from rich.console import Console

from falign.lab._text import print_plain
from falign.lab.experiment._run_file import relative_difference
from falign.lab.experiment._specification import PRESETS, Experiment, Task
from falign.lab.experiment._store import Store

_COMPARED = ("done", "diverged")
"""Runs that failed have left nothing to compare."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How the runs that two stores hold of an experiment compare.

    Args:
        experiment: The experiment.
        equal: Number of runs that are done in both, with records that are equal to the bit.
        within: Number of the others whose records differ by no more than ``experiment.agreement``.
        diverged: Number of runs that diverged in both, at the same time by what they say.
        beyond: Number of those that differ by more, or in how they ended.
        worst: Of these the one that differs most, and by how much: see
            :func:`falign.lab.experiment._run_file.difference`.
        failed: Runs that are done or have diverged in one store, and the folder of the other, in which they failed.
    """

    experiment: Experiment
    equal: int
    within: int
    diverged: int
    beyond: int
    worst: tuple[Task, float] | None
    failed: tuple[tuple[Task, Path], ...]

    def __str__(self) -> str:
        """Such as "toy.decay: 10 runs are in both: 8 equal to the bit, 2 within 1e-09"."""
        number = self.equal + self.within + self.diverged + self.beyond
        counted = [f"{self.equal} equal to the bit"]
        if self.within or self.worst:
            counted.append(f"{self.within} within {self.experiment.agreement:g}")
        if self.diverged:
            counted.append(f"{self.diverged} diverged with the same words")
        if self.worst:
            task, by = self.worst
            how = "in what is no number, or in how it ended" if isinf(by) else f"by {by:.2g}"
            counted.append(f"{self.beyond} beyond; the worst ({_point(task)}) differs {how}")
        text = f"{self.experiment.name}: {_runs(number)} in both" + (f": {', '.join(counted)}" if number else "")
        if self.failed:
            task, folder = self.failed[0]
            text += f"; {len(self.failed)} failed in one of them, such as ({_point(task)}) in {folder}"
        return text


def compare(one: Store, other: Store, experiment: Experiment) -> Agreement:
    """Compare all runs of an experiment that are done or have diverged in both of two stores, at all presets.

    Args:
        one: A store.
        other: The other.
        experiment: The experiment.

    Raises:
        RunError: A file cannot be read.
    """
    tasks = {task.key: task for preset in PRESETS for task in experiment.tasks(preset)}
    there = {
        task.key: (status, words, records) for task, status, words, records in other.iterate(tuple(tasks.values()))
    }
    equal = within = diverged = 0
    beyond: list[tuple[Task, float]] = []
    failed: list[tuple[Task, Path]] = []
    for task, status, message, records in one.iterate(tuple(tasks.values())):
        theirs, words, others = there.get(task.key, ("", None, None))
        if status not in _COMPARED or theirs not in _COMPARED:
            if "failed" in (status, theirs) and (status in _COMPARED or theirs in _COMPARED):
                failed.append((task, one.folder if status == "failed" else other.folder))
            continue
        by = inf if records is None or others is None else relative_difference(records, others)
        if status == theirs == "diverged" and message == words:
            diverged += 1
        elif by == 0:
            equal += 1
        elif by <= experiment.agreement:
            within += 1
        else:
            beyond.append((task, by))
    return Agreement(
        experiment=experiment,
        equal=equal,
        within=within,
        diverged=diverged,
        beyond=len(beyond),
        worst=max(beyond, key=lambda found: found[1], default=None),
        failed=tuple(failed),
    )


def show_agreements(one: Store, other: Store, experiments: Iterable[Experiment], console: Console) -> int:
    """Print how the runs of two stores compare.

    Returns:
        1 if a run differs by more than its experiment allows, or failed in one store alone; 0 if none does.
    """
    found = [compare(one, other, experiment) for experiment in experiments]
    for agreement in found:
        print_plain(console, agreement)
    return int(any(agreement.beyond or agreement.failed for agreement in found))


def _point(task: Task) -> str:
    return ", ".join(f"{axis}={value}" for axis, value in {**task.point, "seed": task.seed}.items())


def _runs(number: int) -> str:
    return "1 run is" if number == 1 else f"{number} runs are"
