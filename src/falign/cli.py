"""The command ``falign``, from its words to its exit code: whatever goes wrong is one sentence on standard error.

Needs nothing but Python's standard library: what a command needs beyond it, the extra ``falign[lab]``, may be missing,
and importing PyTorch takes seconds, for which neither the help nor a mistyped word shall have to wait.
"""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from errno import EINVAL, ELOOP, ENAMETOOLONG
from signal import SIGINT
from traceback import walk_tb

from falign.lab._streams import echo, flush, plain, prepare_streams

__all__ = ["main"]

_LONG_WORD = 400
"""A word of more letters is shortened in messages."""
_IMPOSSIBLE_NAME = (ENAMETOOLONG, ELOOP, EINVAL)
"""Errors of paths that can never exist."""


def main(tokens: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        tokens: Its words; None is those of the command line.

    Returns:
        0: done; 1: it went wrong on the way; 2: an argument is wrong; 128 and a signal's number: stopped by that
        signal, 130 by Ctrl-C.
    """
    words = sys.argv[1:] if tokens is None else list(tokens)
    prepare_streams()
    code = _exit_code(words)
    if error := flush(sys.stdout):
        code = code or 1
        if not isinstance(error, BrokenPipeError):  # whoever closed a pipe knows
            _echo_error(f"the output cannot be written: {error.strerror or error}")
    flush(sys.stderr)
    return code


def _exit_code(words: list[str]) -> int:
    for word in words:
        if not _is_argument(word):
            return _fail(f"{word!r} holds a character that no argument can: leave it out", 2, words)
    try:
        from falign._commands import run

        return run(words)
    except KeyboardInterrupt as error:  # by Ctrl-C, or by the signal whose number it carries
        return _fail("interrupted", 128 + getattr(error, "number", SIGINT), words)
    except SystemExit as error:
        if _is_from_printing(error):  # rich's answer to a closed pipe
            return 1
        return _fail(f"the code that was run asked to end ({error.code!r}): the command was not done", 1, words)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_from_printing(error):
            return 1
        explanation = _explain(error)
        if explanation is None:
            raise
        return _fail(*explanation, words)


def _is_argument(word: str) -> bool:
    """Test for a word that a system could hand over, and that is fit for a path: no NUL, no half of a letter."""
    try:
        return b"\0" not in os.fsencode(word)
    except UnicodeEncodeError:
        return False


def _is_from_printing(error: BaseException) -> bool:
    """Test for an error of printing: its innermost frame is that of what prints."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") in ("rich.console", "falign.lab._streams")


def _explain(error: Exception) -> tuple[str, int] | None:
    """The message and the exit code of an error that a user can do something about; None for faults of falign."""
    from falign.lab._requirements import lacking

    if isinstance(error, OSError):
        subject = "the output cannot be written: " if _is_from_printing(error) else ""
        subject = subject if error.filename is None else f"{_file_name(error.filename)}: "
        return f"{subject}{error.strerror or error}", 2 if error.errno in _IMPOSSIBLE_NAME else 1
    if _is(error, "falign.lab._files", "RunError"):
        return str(error), getattr(error, "code", 1)
    if _is(error, "falign.lab.config", "ConfigError") or _is(error, "falign.lab.data", "DataError"):
        return str(error), 2
    # On the CPU PyTorch has no class of its own for want of memory.
    memory = isinstance(error, MemoryError) or _is(error, "torch", "OutOfMemoryError")
    if memory or "DefaultCPUAllocator" in str(error):
        first = (str(error).splitlines() or [""])[0]
        return f"there is not enough memory{f' ({first})' if first else ''}: make what is computed smaller", 1
    return None if (sentence := lacking(error)) is None else (sentence, 1)


def _is(error: Exception, module: str, name: str) -> bool:
    """Test for an error of a class. If nobody has imported the class, nobody can have raised it."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)


def _file_name(path: object) -> str:
    return os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)


def _fail(message: str, code: int, words: Sequence[str]) -> int:
    if any("\n" in word or "\r" in word for word in words):  # which the message may repeat
        message = message.replace("\r", "\\r").replace("\n", "\\n")
    _echo_error(message)
    return code


def _echo_error(message: str) -> None:
    with suppress(OSError, ValueError):  # there may be nobody to read it
        echo(f"falign: {_shorten_words(plain(message))}", error=True)


def _shorten_words(message: str) -> str:
    """Cut the middle out of words that nobody would read to the end."""
    return re.sub(
        rf"\S{{{_LONG_WORD},}}", lambda word: f"{word[0][: _LONG_WORD // 4]}…{word[0][-_LONG_WORD // 8 :]}", message
    )
