"""What a run shows while it goes: a line for each epoch, and in a terminal a bar under them."""

from collections.abc import Mapping
from time import monotonic
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from falign.lab.text import plain, say

_LISTED = 6
"""Up to so many layers are shown one by one, more in summary."""
_PAUSE = 0.1
"""Seconds between two updates of the bar."""


class Display:
    """The lines and the bar of one run; a context manager.

    Args:
        console: Where to; without a terminal there is no bar.
        epochs: Of the whole run.
        steps: Steps of an epoch.
        done: Steps done before.
    """

    def __init__(self, console: Console, *, epochs: int, steps: int, done: int) -> None:
        self._console = console
        self._epochs = epochs
        self._steps = steps
        self._latest = ""
        self._next = 0.0
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", total=max(1, epochs * steps), completed=done, epoch=self._epoch(done // steps), figures=""
        )

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        say(self._console, text)

    def step(self, done: int, loss: float, accuracy: float) -> None:
        """Move the bar, ten times a second at most.

        Args:
            done: Steps done.
            loss: Mean training loss of the running epoch.
            accuracy: Share of its images that were right.
        """
        if self._bar.disable or monotonic() < self._next:
            return
        self._next = monotonic() + _PAUSE
        figures = f"loss {loss:.4g}  train {accuracy:.1%}  {self._latest}"
        self._bar.update(self._task, completed=done, epoch=self._epoch(done // self._steps), figures=figures)

    def measured(self, row: Mapping[str, Any]) -> None:
        """Show a measured point: in the bar, and if it ends an epoch as a line."""
        self._latest = plain(angles_of(row))
        if row["test_loss"] is None:
            return
        trained = (
            "" if row["train_loss"] is None else f"loss {row['train_loss']:<8.4g} train {row['train_accuracy']:6.2%}  "
        )
        self.say(
            f"epoch {self._epoch(round(row['epoch']))}  {trained or ' ' * 30}"
            f"test {row['test_accuracy']:6.2%}  {angles_of(row)}  {_dominance_of(row)}{row['seconds']:.1f} s"
        )

    def _epoch(self, number: int) -> str:
        return f"{number:{len(str(self._epochs))}}/{self._epochs}"


def _dominance_of(row: Mapping[str, Any]) -> str:
    return "" if row["dominance"] is None else f"D {row['dominance']:.2f}  "


def angles_of(row: Mapping[str, Any]) -> str:
    """The angles of a record, layer by layer, or their range where there are many layers."""
    angles = {key.removeprefix("angle_"): row[key] for key in row if key.startswith("angle_") and row[key] is not None}
    if len(angles) <= _LISTED:
        return "angles " + " ".join(f"{name} {value:.0f}°" for name, value in angles.items())
    values = list(angles.values())
    mean = sum(values) / len(values)
    return f"angles {min(values):.0f}°-{max(values):.0f}°, mean {mean:.0f}° of {len(values)} layers"
