"""Text for rich: names, messages and paths are data, and never markup or commands to a terminal."""

import sys
from collections.abc import Callable
from pathlib import Path
from traceback import walk_tb
from typing import Any

from rich.console import Console
from rich.text import Text

from falign.lab._streams import echo, plain, replace_unencodable

__all__ = ["echo", "explained", "one_line", "plain", "plain_cell", "print_plain", "standard_console"]


def plain_cell(text: object) -> Text:
    """Make a cell of a table that is shown literally: no markup, no emoji, no control characters."""
    return Text(plain(text))


def print_plain(console: Console, text: object) -> None:
    """Print a text literally; long lines are not broken, so that they can be copied."""
    console.print(plain_cell(text), soft_wrap=True)


def standard_console(*, error: bool = False) -> Console:
    """Make a console on standard output or standard error; what its encoding lacks becomes a question mark."""
    replace_unencodable(sys.stderr if error else sys.stdout)
    return Console(stderr=error)


_LENGTH = 300
"""Letters of an error's text that are repeated in a message."""


def one_line(error: BaseException) -> str:
    """Return kind and text of an error in one line, shortened and fit to be shown."""
    kind = type(error).__name__
    try:
        text = " ".join(plain(error).split())
    except Exception:  # errors of the user's code may fail at this, too
        text = ""
    text = text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"
    return f"{kind}: {text}" if text else kind


_OTHERS = ("<", str(Path(__file__).parents[1]), str(Path(walk_tb.__code__.co_filename).parent))
"""Beginnings of the files that are not the user's: of no file, falign's, Python's."""


def explained(error: BaseException, *functions: Callable[..., Any]) -> str:
    """Return kind, text and place of an error of the user's code: "KeyError: 'loss' (mine.py:31)".

    The place is the last line at work of a file of the functions, else of the user's own: polars raises an error deep
    inside of itself, and the line to look at is the one that asked for the column.

    Args:
        error: The error, caught.
        functions: The functions that were called.
    """
    own = {getattr(getattr(function, "__code__", None), "co_filename", None) for function in functions}
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)][1:]
    of_user = [frame for frame in frames if not frame[0].startswith(_OTHERS) and "site-packages" not in frame[0]]
    inside = [frame for frame in frames if frame[0] in own] or of_user
    where = f" ({plain(Path(inside[-1][0]).name)}:{inside[-1][1]})" if inside else ""
    return one_line(error) + where
