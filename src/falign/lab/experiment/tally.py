"""How the runs of an experiment stand while they are computed, and how long the rest will take."""

from dataclasses import dataclass, field

from falign.lab.experiment.execution import Block
from falign.lab.experiment.specification import Experiment, Task


@dataclass(kw_only=True, eq=False)
class Tally:
    """The count of an experiment's runs; changes as they are computed.

    Args:
        experiment: The experiment.
        total: Number of its runs.
        left: Runs that are not there yet, by key.
        status: {status: number of runs} of those that are there.
    """

    experiment: Experiment
    total: int
    left: dict[str, Task]
    status: dict[str, int]
    running: int = 0
    """Runs that this process computes."""
    elsewhere: int = 0
    """Runs that other processes have taken."""
    seconds: float = 0.0
    """What the finished blocks took."""
    _cost: float = field(default=0.0)
    """What they cost, in the experiment's unit."""

    def __post_init__(self) -> None:
        self._cost_left = self.experiment.price(tuple(self.left.values()))

    def settle(self, task: Task, status: str) -> None:
        """Count a run that is there now."""
        if self.left.pop(task.key, None) is not None:
            self._cost_left -= self.experiment.price((task,))
            self.status[status] = self.status.get(status, 0) + 1

    def timed(self, block: Block, seconds: float) -> None:
        """Learn from a block that has finished how long such runs take."""
        self.seconds += seconds
        self._cost += self.experiment.price(block.tasks)

    def estimate(self, slots: int) -> float | None:
        """Seconds until the experiment's runs are there; None as long as nothing is known.

        Args:
            slots: How many blocks are at work at once.
        """
        if not self.left:
            return 0.0
        if not self._cost:
            return None
        return self.seconds / self._cost * self._cost_left / slots

    def __str__(self) -> str:
        """Such as "120 of 350 runs there (2 failed), 50 running, 180 left"."""
        there = self.total - len(self.left)
        special = [f"{self.status[name]} {name}" for name in ("diverged", "failed", "no data") if self.status.get(name)]
        parts = [f"{there} of {self.total} runs there" + (f" ({', '.join(special)})" if special else "")]
        if self.running:
            parts.append(f"{self.running} running")
        if self.elsewhere:
            parts.append(f"{self.elsewhere} taken by other processes")
        if rest := len(self.left) - self.running - self.elsewhere:
            parts.append(f"{rest} left")
        return ", ".join(parts)


def duration(seconds: float | int) -> str:
    """A time in the two largest units that matter: "0.4 s", "12 s", "3 min 20 s", "1 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
