"""Progress bars: on standard error, and only where somebody watches (a terminal or a notebook)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.progress import track as rich_track

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, *, total: int, shown: bool) -> Iterable[Item]:
    """Show a bar while going through items.

    Args:
        items: What to go through.
        description: What the bar says.
        total: Number of items.
        shown: Whether to show it at all.

    Returns:
        The same items.
    """
    console = Console(stderr=True)
    disable = not (shown and _watched(console))
    return rich_track(items, description, total=total, console=console, disable=disable, transient=True)


class DownloadBar:
    """A rich task in the form that pooch drives: ``total``, ``update``, ``reset``, ``close``."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    @property
    def total(self) -> float | None:
        """Size of the download in bytes; None until the server has said it."""
        return self._progress.tasks[self._task].total

    @total.setter
    def total(self, size: int) -> None:
        self._progress.update(self._task, total=size or None)

    def update(self, size: int) -> None:
        """Add bytes."""
        self._progress.advance(self._task, size)

    def reset(self) -> None:
        """Go back to the start."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Do nothing: the bar ends with its block, also when a download fails and pooch never gets here."""


@contextmanager
def download_bar(name: str, *, shown: bool) -> Iterator[DownloadBar | bool]:
    """Show the bar of one download.

    Args:
        name: The file.
        shown: Whether to show it at all.

    Yields:
        What pooch takes as its ``progressbar``: the bar, or False.
    """
    console = Console(stderr=True)
    if not (shown and _watched(console)):
        yield False
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield DownloadBar(progress, progress.add_task(name, total=None))


def _watched(console: Console) -> bool:
    return console.is_terminal or console.is_jupyter
