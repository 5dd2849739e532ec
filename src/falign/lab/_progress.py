"""Progress of downloads, decoding and trainings, shown by rich where somebody watches: a terminal or a notebook.

Bars of data go to standard error, so that what a command prints can be piped; those of a training to its console.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import track as rich_track

from falign.lab._text import plain, print_plain, standard_console

_Item = TypeVar("_Item")

_LISTED = 6
"""Up to so many layers are shown one by one, more in summary."""
_PAUSE = 0.1
"""Seconds between two updates of a training's bar: a step may take less than drawing it."""


def track(items: Iterable[_Item], description: str, *, total: int, shown: bool) -> Iterable[_Item]:
    """Show a bar while going through items.

    Args:
        items: What to go through.
        description: What the bar says.
        total: Number of items.
        shown: Whether to show it at all.

    Returns:
        The same items.
    """
    console = standard_console(error=True)
    disable = not (shown and _watched(console))
    return rich_track(items, escape(plain(description)), total=total, console=console, disable=disable, transient=True)


@contextmanager
def download_bar(name: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Show the bar of one download.

    Args:
        name: The file.
        shown: Whether to show it at all.

    Yields:
        A function of the bytes that are there and of those that are expected, 0 if nobody knows.
    """
    console = standard_console(error=True)
    if not (shown and _watched(console)):
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


def _watched(console: Console) -> bool:
    return console.is_terminal or console.is_jupyter


class TrainingProgress:
    """One line for each epoch of a training, and in a terminal a bar below them; a context manager.

    Args:
        console: The console to print on; without a terminal there is no bar.
        epochs: Epochs of the whole run.
        steps_per_epoch: Steps of an epoch.
        step: Steps done before.
    """

    def __init__(self, console: Console, *, epochs: int, steps_per_epoch: int, step: int) -> None:
        self._console = console
        self._epochs = epochs
        self._steps_per_epoch = steps_per_epoch
        self._latest_angles = ""
        self._next_update = 0.0
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
            "",
            total=max(1, epochs * steps_per_epoch),
            completed=step,
            epoch=self._of_all_epochs(step // steps_per_epoch),
            figures="",
        )

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, accuracy: float) -> None:
        """Move the bar, ten times a second at most.

        Args:
            step: Steps done.
            loss: Mean training loss of the running epoch.
            accuracy: Share of its labels that were right.
        """
        if self._bar.disable or monotonic() < self._next_update:
            return
        self._next_update = monotonic() + _PAUSE
        figures = f"loss {loss:.4g}  train {accuracy:.1%}  {self._latest_angles}"
        epoch = self._of_all_epochs(step // self._steps_per_epoch)
        self._bar.update(self._task, completed=step, epoch=epoch, figures=figures)

    def log_record(self, record: Mapping[str, Any]) -> None:
        """Show a record of the measurements: its angles in the bar, and as a line if it ends an epoch."""
        angles = _format_angles(record)
        self._latest_angles = plain(angles)
        if record["test_loss"] is None:
            return
        trained = " " * 30
        if record["train_loss"] is not None:
            trained = f"loss {record['train_loss']:<8.4g} train {record['train_accuracy']:6.2%}  "
        perplexity = "" if record.get("perplexity") is None else f"perplexity {record['perplexity']:.4g}  "
        dominance = "" if record["dominance"] is None else f"D {record['dominance']:.2f}  "
        lost = f"{record['unreadable']:.0f} unreadable  " if record.get("unreadable") else ""
        print_plain(
            self._console,
            f"epoch {self._of_all_epochs(round(record['epoch']))}  {trained}"
            f"test {record['test_accuracy']:6.2%}  {perplexity}{angles}  {dominance}{lost}{record['seconds']:.1f} s",
        )

    def _of_all_epochs(self, epoch: int) -> str:
        return f"{epoch:{len(str(self._epochs))}}/{self._epochs}"


def _format_angles(record: Mapping[str, Any]) -> str:
    """Return the angles of a record, layer by layer, or their range where there are many layers."""
    angles = {
        key.removeprefix("angle_"): value
        for key, value in record.items()
        if key.startswith("angle_") and value is not None
    }
    if not angles:
        return ""
    if len(angles) <= _LISTED:
        return "angles " + " ".join(f"{layer} {angle:.0f}°" for layer, angle in angles.items())
    values = list(angles.values())
    mean = sum(values) / len(values)
    return f"angles {min(values):.0f}°-{max(values):.0f}°, mean {mean:.0f}° of {len(values)} layers"
