"""Text as it shall be seen: names, messages and paths are data, and never commands to a terminal or to rich."""

import sys

from rich.console import Console
from rich.text import Text

from falign.lab._streams import plain, tell, tolerant

__all__ = ["cell", "plain", "say", "standard_console", "tell"]


def cell(text: object) -> Text:
    """A text for a table of rich, shown literally: no markup, no emoji, no escapes."""
    return Text(plain(text))


def say(console: Console, text: object) -> None:
    """Print a text literally; lines may be longer than the terminal is wide."""
    console.print(cell(text), soft_wrap=True)


def standard_console(*, error: bool = False) -> Console:
    """A console on standard output or standard error; what its encoding lacks becomes a question mark."""
    tolerant(sys.stderr if error else sys.stdout)
    return Console(stderr=error)
