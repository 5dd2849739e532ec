"""Text as it shall be seen: names, messages and paths are data, and never commands to a terminal or to rich."""

import sys
from io import TextIOWrapper
from typing import TextIO
from unicodedata import category

from rich.console import Console
from rich.text import Text

_KEPT = "\n\t"


def plain(text: object) -> str:
    r"""A text in which everything that is not seen, or that steers a terminal, is written out.

    Escapes and other control characters become ``\x1b`` and the like, as do signs that turn the direction of writing;
    a byte of a file name that is not UTF-8 becomes ``\xfc``. Line breaks and tabs stay.

    Args:
        text: A text, or what ``str`` makes one of.
    """
    return "".join(letter if _seen(letter) else _written(letter) for letter in str(text))


def cell(text: object) -> Text:
    """A text for a table of rich, shown literally: no markup, no emoji, no escapes."""
    return Text(plain(text))


def say(console: Console, text: object) -> None:
    """Print a text literally; lines may be longer than the terminal is wide."""
    console.print(cell(text), soft_wrap=True)


def tell(text: object, *, error: bool = False) -> None:
    """Print a text literally, without a console.

    Args:
        text: The text.
        error: Whether it goes to standard error.
    """
    stream = sys.stderr if error else sys.stdout
    _tolerant(stream)
    print(plain(text), file=stream)


def standard_console(*, error: bool = False) -> Console:
    """A console on standard output or standard error; what its encoding lacks becomes a question mark."""
    _tolerant(sys.stderr if error else sys.stdout)
    return Console(stderr=error)


def _tolerant(stream: TextIO) -> None:
    """Have a stream replace what it cannot encode: a run must not end because of a Greek letter."""
    if isinstance(stream, TextIOWrapper) and stream.errors != "replace":
        stream.reconfigure(errors="replace")


def _seen(letter: str) -> bool:
    return letter.isprintable() or letter in _KEPT or category(letter) == "Zs"


def _written(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte that the file system's encoding does not know
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape", "surrogatepass").decode()
