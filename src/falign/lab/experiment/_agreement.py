"""Comparison of the runs of one store with the same runs in another, for ``falign status --against``."""

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
"""Statuses of runs that have left something to compare."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Counts of the runs that two stores hold of an experiment, by how well they agree.

    Args:
        experiment: The experiment.
        equal: Number of runs that are done in both, with records that are equal to the bit.
        within: Number of the others whose records differ by no more than ``experiment.agreement``.
        diverged: Number of runs that diverged in both with the same message, which tells the time.
        beyond: Number of runs that differ by more, or ended differently.
        worst: The run of these that differs most, and its difference, see
            :func:`falign.lab.experiment._run_file.relative_difference`.
        failed: Runs that are done or have diverged in one store, each with the folder of the other, where they failed.
    """

    experiment: Experiment
    equal: int
    within: int
    diverged: int
    beyond: int
    worst: tuple[Task, float] | None
    failed: tuple[tuple[Task, Path], ...]

    def __str__(self) -> str:
        """Summary such as "toy.decay: 10 runs are in both: 8 equal to the bit, 2 within 1e-09"."""
        number = self.equal + self.within + self.diverged + self.beyond
        counts = [f"{self.equal} equal to the bit"]
        if self.within or self.worst:
            counts.append(f"{self.within} within {self.experiment.agreement:g}")
        if self.diverged:
            counts.append(f"{self.diverged} diverged with the same words")
        if self.worst:
            task, difference = self.worst
            how = "in what is no number, or in how it ended" if isinf(difference) else f"by {difference:.2g}"
            counts.append(f"{self.beyond} beyond; the worst ({_point(task)}) differs {how}")
        text = f"{self.experiment.name}: {_runs(number)} in both" + (f": {', '.join(counts)}" if number else "")
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
    others = {
        task.key: (status, message, records) for task, status, message, records in other.iterate(tuple(tasks.values()))
    }
    equal = within = diverged = 0
    beyond: list[tuple[Task, float]] = []
    failed: list[tuple[Task, Path]] = []
    for task, status, message, records in one.iterate(tuple(tasks.values())):
        other_status, other_message, other_records = others.get(task.key, ("", None, None))
        if status not in _COMPARED or other_status not in _COMPARED:
            if "failed" in (status, other_status) and (status in _COMPARED or other_status in _COMPARED):
                failed.append((task, one.folder if status == "failed" else other.folder))
            continue
        # A run that diverged has no records.
        difference = (
            inf
            if records is None or other_records is None
            else relative_difference(*(each.drop(experiment.timed, strict=False) for each in (records, other_records)))
        )
        if status == other_status == "diverged" and message == other_message:
            diverged += 1
        elif difference == 0:
            equal += 1
        elif difference <= experiment.agreement:
            within += 1
        else:
            beyond.append((task, difference))
    return Agreement(
        experiment=experiment,
        equal=equal,
        within=within,
        diverged=diverged,
        beyond=len(beyond),
        worst=max(beyond, key=lambda run: run[1], default=None),
        failed=tuple(failed),
    )


def show_agreements(one: Store, other: Store, experiments: Iterable[Experiment], console: Console) -> int:
    """Print how well the runs of two stores agree.

    Returns:
        1 if a run differs by more than its experiment allows, or failed in one store alone; 0 if none does.
    """
    agreements = [compare(one, other, experiment) for experiment in experiments]
    for agreement in agreements:
        print_plain(console, agreement)
    return int(any(agreement.beyond or agreement.failed for agreement in agreements))


def _point(task: Task) -> str:
    return ", ".join(f"{axis}={value}" for axis, value in {**task.point, "seed": task.seed}.items())


def _runs(number: int) -> str:
    return "1 run is" if number == 1 else f"{number} runs are"
