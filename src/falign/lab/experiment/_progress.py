"""What is shown while runs are computed: a bar for each experiment in a terminal, now and then a line elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from falign.lab._text import print_plain
from falign.lab.experiment._execution import Block, cost, price
from falign.lab.experiment._specification import Experiment, Task

# How the runs of an experiment stand while they are computed, and how long the rest will take.

Kind = tuple[str, ...]


@dataclass(kw_only=True, eq=False)
class _AtWork:
    """A block that is being computed: when it first and last told which share of it was over, and which.

    What comes before the first report, such as the start of a worker and the loading of data, is no matter of its size.
    """

    block: Block
    first: tuple[float, float] | None = None
    last: tuple[float, float] = (0.0, 0.0)

    @property
    def share(self) -> float:
        """Which share of it is over."""
        return self.last[1]

    @property
    def learned(self) -> tuple[float, float]:
        """Seconds, and the share of the block that took them."""
        first = self.first or self.last
        return self.last[0] - first[0], self.last[1] - first[1]


@dataclass(kw_only=True, eq=False)
class _Rate:
    """Seconds that were spent, and what was done in them, in the unit of the experiment."""

    seconds: float = 0.0
    cost: float = 0.0

    def add(self, seconds: float, cost: float) -> None:
        self.seconds += seconds
        self.cost += cost


@dataclass(kw_only=True, eq=False)
class Tally:
    """The count of an experiment's runs; changes as they are computed.

    How long runs take is learned from the blocks that have ended and from the share that is over of those at work:
    seconds for a unit of cost, of each kind of run by itself. Runs are of one kind if their texts are the same, such
    as activation and rule: what the numbers of a point do to the time is the matter of the experiment's ``cost``.

    Args:
        experiment: The experiment.
        total: Number of its runs.
        left: Runs that are not there yet, by key.
        status: {status: number of runs} of those that are there.
        clock: Tells the time in seconds.
    """

    experiment: Experiment
    total: int
    left: dict[str, Task]
    status: dict[str, int]
    clock: Callable[[], float] = monotonic
    elsewhere: int = 0
    """Runs that other processes have taken."""
    _at_work: dict[tuple[Task, ...], _AtWork] = field(default_factory=dict)
    _ended: dict[Kind, _Rate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._left: dict[Kind, float] = {}
        """What the runs that are left cost, those at work included."""
        for task in self.left.values():
            self._count(task, 1)

    @property
    def running(self) -> int:
        """Runs that this process computes."""
        return sum(len(tasks) for tasks in self._at_work)

    def settle(self, task: Task, status: str) -> None:
        """Count a run that is there now."""
        if self.left.pop(task.key, None) is not None:
            self._count(task, -1)
            self.status[status] = self.status.get(status, 0) + 1

    def begin(self, block: Block) -> None:
        """Count a block as at work."""
        self._at_work[block.tasks] = _AtWork(block=block)

    def seen(self, block: Block, share: float) -> None:
        """Note which share of a block at work is over."""
        found = self._at_work.get(block.tasks)
        if found is not None and share > found.share:  # which NaN is not
            found.last = self.clock(), min(share, 1.0)
            found.first = found.first or found.last

    def end(self, block: Block, seconds: float | None) -> None:
        """Count a block as no longer at work, and learn from it how long such runs take.

        Args:
            block: The block.
            seconds: How long it took; None if it left nothing, which tells nothing.
        """
        self._at_work.pop(block.tasks, None)
        if seconds is not None:
            self._ended.setdefault(_kind(block.tasks[0]), _Rate()).add(seconds, cost(block))

    def seconds(self, block: Block) -> float | None:
        """How long a block should take; None as long as nothing is known."""
        rates, all_together = self._rates()
        rate = rates.get(_kind(block.tasks[0]), all_together)
        return rate.seconds / rate.cost * cost(block) if rate.cost else None

    def estimate(self, slots: int) -> float | None:
        """Seconds until the experiment's runs are there; None as long as nothing is known.

        Args:
            slots: How many blocks are at work at once.
        """
        if not self.left:
            return 0.0
        rates, all_together = self._rates()
        if not all_together.cost:
            return None

        def seconds(kind: Kind, units: float) -> float:
            rate = rates.get(kind, all_together)
            return rate.seconds / rate.cost * units

        rest = dict(self._left)
        longest = 0.0
        for tasks, at_work in self._at_work.items():
            kind, whole = _kind(tasks[0]), cost(at_work.block)
            rest[kind] = rest.get(kind, 0.0) - at_work.share * whole
            longest = max(longest, seconds(kind, (1 - at_work.share) * whole))
        whole = sum(seconds(kind, max(units, 0.0)) for kind, units in rest.items())
        return max(whole / slots, longest)

    def _rates(self) -> tuple[dict[Kind, _Rate], _Rate]:
        """Of each kind of which something is known, and of all together."""
        rates = {kind: _Rate(seconds=rate.seconds, cost=rate.cost) for kind, rate in self._ended.items()}
        for tasks, at_work in self._at_work.items():
            seconds, share = at_work.learned
            if share:
                rates.setdefault(_kind(tasks[0]), _Rate()).add(seconds, share * cost(at_work.block))
        all_together = _Rate()
        for rate in rates.values():
            all_together.add(rate.seconds, rate.cost)
        return rates, all_together

    def _count(self, task: Task, sign: int) -> None:
        kind = _kind(task)
        self._left[kind] = self._left.get(kind, 0.0) + sign * price(self.experiment, task)

    def __str__(self) -> str:
        """Such as "120 of 350 runs there (2 failed), 50 running, 180 left"."""
        there = self.total - len(self.left)
        special = [f"{self.status[name]} {name}" for name in ("diverged", "failed", "no data") if self.status.get(name)]
        parts = [f"{there} of {self.total} runs there" + (f" ({', '.join(special)})" if special else "")]
        if self.running:
            parts.append(f"{self.running} running{self._over()}")
        if self.elsewhere:
            parts.append(f"{self.elsewhere} taken by other processes")
        if rest := len(self.left) - self.running - self.elsewhere:
            parts.append(f"{rest} left")
        return ", ".join(parts)

    def _over(self) -> str:
        """Which share of the runs at work is over, by what they cost; nothing as long as no block has told."""
        whole = [(each.share, cost(each.block)) for each in self._at_work.values()]
        over = sum(share * costs for share, costs in whole)
        return f" ({100 * over / sum(costs for _, costs in whole):.0f} % done)" if over else ""


def _kind(task: Task) -> Kind:
    """The texts of a run's point."""
    return tuple(value for _, value in sorted(task.point.items()) if isinstance(value, str))


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


_PAUSE = 10.0
"""Seconds between two lines of an experiment, without a terminal."""


class Progress:
    """The bars or lines of one reproduction; a context manager.

    Args:
        console: Where to.
        tallies: One an experiment; read at each update.
        slots: Says how many blocks are at work at once.
    """

    def __init__(self, console: Console, tallies: Sequence[Tally], slots: Callable[[], int]) -> None:
        self._console = console
        self._tallies = tallies
        self._slots = slots
        self._start = monotonic()
        self._next = self._start + _PAUSE
        self._begun: set[str] = set()
        self._next_begun = self._start
        self._open = {tally.experiment.name for tally in tallies if tally.left}
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._rows: dict[str, TaskID] = {
            tally.experiment.name: self._bars.add_task(tally.experiment.name, total=tally.total, state="")
            for tally in tallies
            if tally.left
        }

    def __enter__(self) -> "Progress":
        for tally in self._tallies:
            self.say(f"{tally.experiment.name}: {tally}")
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        print_plain(self._console, text)

    def begun(self, name: str, runs: int) -> None:
        """Say that the first runs of an experiment are at work: a block may take long, and says nothing itself.

        Args:
            name: The experiment.
            runs: How many have begun.
        """
        if self._bars.disable and name not in self._begun and monotonic() >= self._next_begun:
            self._begun.add(name)
            self._next_begun = monotonic() + _PAUSE
            self.say(f"{name}: {runs} {'run' if runs == 1 else 'runs'} begun")

    def update(self) -> None:
        """Show how the runs stand: a finished experiment by a line at once, others by bars, or a line at times."""
        for tally in self._tallies:
            name = tally.experiment.name
            if name in self._rows:
                state = f"{tally}{self._estimate(tally)}"
                self._bars.update(self._rows[name], completed=tally.total - len(tally.left), state=state)
            if name in self._open and not tally.left:
                self._open.remove(name)
                self.say(f"{name}: {tally}, after {duration(monotonic() - self._start)}")
        if self._bars.disable and monotonic() >= self._next:
            self._next = monotonic() + _PAUSE
            for tally in self._tallies:
                if tally.running or tally.elsewhere:
                    self.say(f"{tally.experiment.name}: {tally}{self._estimate(tally)}")

    def _estimate(self, tally: Tally) -> str:
        seconds = tally.estimate(max(1, self._slots()))
        return f", about {duration(seconds)}" if seconds else ""
