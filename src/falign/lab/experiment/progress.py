"""What is shown while runs are computed: a bar for each experiment in a terminal, now and then a line elsewhere."""

from collections.abc import Callable, Sequence
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from falign.lab.experiment.tally import Tally, duration
from falign.lab.text import say

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
        say(self._console, text)

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
