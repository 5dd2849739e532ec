"""How far the runs of one store are from the same runs in another: whether recomputed numbers are the same."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isinf

from rich.console import Console

from falign.lab.experiment.records import difference
from falign.lab.experiment.specification import PRESETS, Experiment, Task
from falign.lab.experiment.store import Store
from falign.lab.text import say

_COMPARED = ("done", "diverged")
"""Runs that failed have left nothing: the cause may have been the machine."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How the runs that two stores hold of an experiment compare.

    Args:
        experiment: The experiment.
        equal: Number of runs whose records are equal to the bit.
        within: Number of the others whose records differ by no more than ``experiment.agreement``.
        beyond: Number of those that differ by more, or of which one diverged and the other did not.
        worst: Of these the one that differs most, and by how much: see
            :func:`falign.lab.experiment.records.difference`.
    """

    experiment: Experiment
    equal: int
    within: int
    beyond: int
    worst: tuple[Task, float] | None

    def __str__(self) -> str:
        """Such as "toy.decay: 10 runs are in both: 8 equal to the bit, 2 within 1e-09"."""
        number = self.equal + self.within + self.beyond
        name, limit = self.experiment.name, f"{self.experiment.agreement:g}"
        if self.worst is None:
            counted = f"{self.equal} equal to the bit" + (f", {self.within} within {limit}" if self.within else "")
            return f"{name}: {_runs(number)} in both" + (f": {counted}" if number else "")
        task, by = self.worst
        point = ", ".join(f"{axis}={value}" for axis, value in {**task.point, "seed": task.seed}.items())
        how = "in what is no number, or in how it ended" if isinf(by) else f"by {by:.2g}"
        counted = f"{self.equal} equal to the bit, {self.within} within {limit}, {self.beyond} beyond"
        return f"{name}: {_runs(number)} in both: {counted}; the worst ({point}) differs {how}"


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
    there = {task.key: (status, records) for task, status, records in other.each(tuple(tasks.values()))}
    equal = within = 0
    beyond: list[tuple[Task, float]] = []
    for task, status, records in one.each(tuple(tasks.values())):
        if status not in _COMPARED or there.get(task.key, ("", None))[0] not in _COMPARED:
            continue
        theirs, others = there[task.key]
        if records is None or others is None:
            by = 0.0 if status == theirs else inf
        else:
            by = 0.0 if records.equals(others) else difference(records, others)
        if by == 0:
            equal += 1
        elif by <= experiment.agreement:
            within += 1
        else:
            beyond.append((task, by))
    worst = max(beyond, key=lambda found: found[1], default=None)
    return Agreement(experiment=experiment, equal=equal, within=within, beyond=len(beyond), worst=worst)


def show(one: Store, other: Store, experiments: Iterable[Experiment], console: Console) -> int:
    """Print how the runs of two stores compare.

    Returns:
        1 if a run differs by more than its experiment allows, 0 if none does.
    """
    found = [compare(one, other, experiment) for experiment in experiments]
    for agreement in found:
        say(console, agreement)
    return int(any(agreement.beyond for agreement in found))


def _runs(number: int) -> str:
    return "1 run is" if number == 1 else f"{number} runs are"
