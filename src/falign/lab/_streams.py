"""Standard output and standard error, whatever they lead to, and text that is safe to print there.

Needs nothing but Python's standard library: the command must be able to say which package is missing.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from errno import EIO
from io import TextIOWrapper
from typing import Any

from falign._style import plain

_LONGEST_WORD = 100
"""Letters of a mistyped word that are compared."""


def echo(text: object, *, error: bool = False) -> None:
    """Print a text literally, without rich.

    Args:
        text: The text.
        error: Whether to print it to standard error.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # it was closed before the command began
        return
    replace_unencodable(stream)
    print(plain(text), file=stream)


def replace_unencodable(stream: Any) -> None:
    """Have a stream replace characters that its encoding lacks: no run shall end because of a Greek letter."""
    if isinstance(stream, TextIOWrapper) and stream.errors not in ("replace", "backslashreplace"):
        stream.reconfigure(errors="replace")


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return a remark on a mistyped word, ``" (did you mean dfa?)"``, or nothing where no known one is like it."""
    close = get_close_matches(word.lower()[:_LONGEST_WORD], list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


class TerminalStream:
    """Stream of a terminal, silent once the terminal is gone: the signal HUP shall end a command then, and no error.

    Args:
        stream: Standard output or standard error.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """Look up everything else on the stream."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text."""
        with self._silenced():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts."""
        with self._silenced():
            self._stream.writelines(lines)

    def flush(self) -> None:
        """Write what the stream still holds."""
        with self._silenced():
            self._stream.flush()

    @contextmanager
    def _silenced(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != EIO:
                raise
            flush(self._stream)


def prepare_streams() -> None:
    """Prepare the standard streams for whatever a command prints, and keep files from getting their numbers."""
    for descriptor, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:  # closed: the next file that is opened would get its number, and what libraries print
            try:
                os.fstat(descriptor)
            except OSError:
                with suppress(OSError):
                    os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        replace_unencodable(stream)
        if isinstance(stream, TextIOWrapper) and stream.isatty():
            setattr(sys, name, TerminalStream(stream))


def flush(stream: Any) -> OSError | None:
    """Write what a stream still holds, so that Python reports no error of it at its exit.

    Args:
        stream: Standard output or standard error.

    Returns:
        The error if it cannot be written, such as a closed pipe or a full disk; the stream is silent from then on.
    """
    if stream is None:
        return None
    try:
        stream.flush()
    except ValueError:  # somebody closed it
        return None
    except OSError as error:
        with suppress(OSError, ValueError):
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, stream.fileno())
            os.close(silence)
        return error
    return None
