"""Progress of a reproduction: how many runs are there, how long the rest will take, and the bars that show it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from falign.lab._text import print_plain
from falign.lab.experiment._execution import Block, block_cost, run_cost
from falign.lab.experiment._specification import Experiment, Task

Kind = tuple[str, ...]
"""Texts of a run's point, such as activation and rule: runs that have them in common take about equally long."""


@dataclass(kw_only=True, eq=False)
class _RunningBlock:
    """A block that is being computed, with its first and its last report: the time, and the share that was over.

    The time before the first report, such as the start of a worker and the loading of data, tells nothing of how long
    the rest will take.
    """

    block: Block
    first: tuple[float, float] | None = None
    last: tuple[float, float] = (0.0, 0.0)

    @property
    def share(self) -> float:
        """Share of it that is over."""
        return self.last[1]

    @property
    def measured(self) -> tuple[float, float]:
        """Seconds between the two reports, and the share of the block that was computed between them."""
        first = self.first or self.last
        return self.last[0] - first[0], self.last[1] - first[1]


@dataclass(kw_only=True, eq=False)
class _Rate:
    """Seconds, and the cost of what was computed in them, in the unit of the experiment."""

    seconds: float = 0.0
    cost: float = 0.0

    def add(self, seconds: float, cost: float) -> None:
        self.seconds += seconds
        self.cost += cost


@dataclass(kw_only=True, eq=False)
class RunCounts:
    """Counts of an experiment's runs while they are computed, and an estimate of the time that is left.

    Seconds for a unit of cost are measured on the blocks that have ended, and on the part that is over of the running
    ones, for each kind of run by itself. How the numbers of a point change the time is the matter of the experiment's
    ``cost``.

    Args:
        experiment: The experiment.
        total: Number of its runs.
        missing: {key: run} of those that are not in the store yet.
        status: {status: number of runs} of those that are.
        clock: Current time in seconds.
    """

    experiment: Experiment
    total: int
    missing: dict[str, Task]
    status: dict[str, int]
    clock: Callable[[], float] = monotonic
    elsewhere: int = 0
    """Number of the missing runs that other processes compute."""
    _running: dict[tuple[Task, ...], _RunningBlock] = field(default_factory=dict)
    _ended: dict[Kind, _Rate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._missing_cost: dict[Kind, float] = {}  # of the runs that are being computed, too
        for task in self.missing.values():
            self._add_cost(task, 1)

    @property
    def running(self) -> int:
        """Number of runs that this process has given to its executor."""
        return sum(len(tasks) for tasks in self._running)

    def add(self, task: Task, status: str) -> None:
        """Count a run that is in the store now."""
        if self.missing.pop(task.key, None) is not None:
            self._add_cost(task, -1)
            self.status[status] = self.status.get(status, 0) + 1

    def start(self, block: Block) -> None:
        """Count a block as running."""
        self._running[block.tasks] = _RunningBlock(block=block)

    def report(self, block: Block, share: float) -> None:
        """Note the share of a running block that is over."""
        running = self._running.get(block.tasks)
        if running is not None and share > running.share:  # which NaN is not
            running.last = self.clock(), min(share, 1.0)
            running.first = running.first or running.last

    def end(self, block: Block, seconds: float | None) -> None:
        """Count a block as no longer running, and learn from it how long such runs take.

        Args:
            block: The block.
            seconds: Time that it took; None if it failed, which tells nothing about the others.
        """
        self._running.pop(block.tasks, None)
        if seconds is not None:
            self._ended.setdefault(_kind(block.tasks[0]), _Rate()).add(seconds, block_cost(block))

    def seconds(self, block: Block) -> float | None:
        """Estimated time of a block in seconds; None as long as nothing was measured."""
        rates, average = self._rates()
        rate = rates.get(_kind(block.tasks[0]), average)
        return rate.seconds / rate.cost * block_cost(block) if rate.cost else None

    def estimate(self, slots: int) -> float | None:
        """Estimate the seconds until all runs of the experiment are there.

        Args:
            slots: Number of blocks that are computed at once.

        Returns:
            The time of all that is left, shared among the slots, but at least that of the longest running block; None
            as long as nothing was measured.
        """
        if not self.missing:
            return 0.0
        rates, average = self._rates()
        if not average.cost:
            return None

        def seconds(kind: Kind, cost: float) -> float:
            rate = rates.get(kind, average)
            return rate.seconds / rate.cost * cost

        rest = dict(self._missing_cost)
        longest = 0.0
        for tasks, running in self._running.items():
            kind, cost = _kind(tasks[0]), block_cost(running.block)
            rest[kind] = rest.get(kind, 0.0) - running.share * cost
            longest = max(longest, seconds(kind, (1 - running.share) * cost))
        whole = sum(seconds(kind, max(cost, 0.0)) for kind, cost in rest.items())
        return max(whole / slots, longest)

    def _rates(self) -> tuple[dict[Kind, _Rate], _Rate]:
        """Rates of the kinds of which something was measured, and of all kinds together."""
        rates = {kind: _Rate(seconds=rate.seconds, cost=rate.cost) for kind, rate in self._ended.items()}
        for tasks, running in self._running.items():
            seconds, share = running.measured
            if share:
                rates.setdefault(_kind(tasks[0]), _Rate()).add(seconds, share * block_cost(running.block))
        average = _Rate()
        for rate in rates.values():
            average.add(rate.seconds, rate.cost)
        return rates, average

    def _add_cost(self, task: Task, sign: int) -> None:
        kind = _kind(task)
        self._missing_cost[kind] = self._missing_cost.get(kind, 0.0) + sign * run_cost(self.experiment, task)

    def __str__(self) -> str:
        """Summary such as "120 of 350 runs there (2 failed), 50 running, 180 left"."""
        there = self.total - len(self.missing)
        special = [f"{self.status[name]} {name}" for name in ("diverged", "failed", "no data") if self.status.get(name)]
        parts = [f"{there} of {self.total} runs there" + (f" ({', '.join(special)})" if special else "")]
        if self.running:
            parts.append(f"{self.running} running{self._percentage()}")
        if self.elsewhere:
            parts.append(f"{self.elsewhere} taken by other processes")
        if rest := len(self.missing) - self.running - self.elsewhere:
            parts.append(f"{rest} left")
        return ", ".join(parts)

    def _percentage(self) -> str:
        """Share of the running blocks that is over, by their cost; empty as long as no block has reported."""
        costs = [(running.share, block_cost(running.block)) for running in self._running.values()]
        over = sum(share * cost for share, cost in costs)
        return f" ({100 * over / sum(cost for _, cost in costs):.0f} % done)" if over else ""


def _kind(task: Task) -> Kind:
    return tuple(value for _, value in sorted(task.point.items()) if isinstance(value, str))


def duration(seconds: float | int) -> str:
    """Format a time by its one or two largest units: "0.4 s", "12 s", "3 min 20 s", "1 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


_PAUSE = 10.0
"""Seconds between two lines of an experiment, without a terminal."""


class ProgressDisplay:
    """Bars of the experiments in a terminal, lines now and then elsewhere; a context manager.

    Args:
        console: Terminal, file or pipe to which it is written.
        counts: One an experiment; read at each update.
        slots: Gives the number of blocks that are computed at once.
    """

    def __init__(self, console: Console, counts: Sequence[RunCounts], slots: Callable[[], int]) -> None:
        self._console = console
        self._counts = counts
        self._slots = slots
        self._start = monotonic()
        self._next = self._start + _PAUSE
        self._started: set[str] = set()
        self._next_started = self._start
        self._unfinished = {each.experiment.name for each in counts if each.missing}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._rows: dict[str, TaskID] = {
            each.experiment.name: self._bars.add_task(each.experiment.name, total=each.total, state="")
            for each in counts
            if each.missing
        }

    def __enter__(self) -> "ProgressDisplay":
        for each in self._counts:
            self.log(f"{each.experiment.name}: {each}")
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def log(self, text: str) -> None:
        """Print one line."""
        print_plain(self._console, text)

    def started(self, name: str, runs: int) -> None:
        """Print a line when the first runs of an experiment are started: a block may take long and report nothing.

        Args:
            name: The experiment.
            runs: Number of runs that were started.
        """
        if self._bars.disable and name not in self._started and monotonic() >= self._next_started:
            self._started.add(name)
            self._next_started = monotonic() + _PAUSE
            self.log(f"{name}: {runs} {'run' if runs == 1 else 'runs'} begun")

    def update(self) -> None:
        """Show the counts: of a finished experiment by a line at once, of others by bars, or a line now and then."""
        for counts in self._counts:
            name = counts.experiment.name
            if name in self._rows:
                state = f"{counts}{self._estimate(counts)}"
                self._bars.update(self._rows[name], completed=counts.total - len(counts.missing), state=state)
            if name in self._unfinished and not counts.missing:
                self._unfinished.remove(name)
                self.log(f"{name}: {counts}, after {duration(monotonic() - self._start)}")
        if self._bars.disable and monotonic() >= self._next:
            self._next = monotonic() + _PAUSE
            for counts in self._counts:
                if counts.running or counts.elsewhere:
                    self.log(f"{counts.experiment.name}: {counts}{self._estimate(counts)}")

    def _estimate(self, counts: RunCounts) -> str:
        seconds = counts.estimate(max(1, self._slots()))
        return f", about {duration(seconds)}" if seconds else ""
