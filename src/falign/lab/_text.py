"""Text for rich: names, messages and paths are data, and never markup or commands to a terminal."""

import sys

from rich.console import Console
from rich.text import Text

from falign.lab._streams import echo, plain, replace_unencodable

__all__ = ["echo", "one_line", "plain", "plain_cell", "print_plain", "standard_console"]


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
