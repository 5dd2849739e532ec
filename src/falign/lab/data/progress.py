"""Progress bars: on standard error, and only where somebody watches (a terminal or a notebook)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.progress import track as rich_track

from falign.lab.text import plain, standard_console

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
        What takes the bytes that are there and those that are expected, 0 if nobody knows.
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
