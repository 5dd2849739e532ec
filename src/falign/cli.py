"""The command ``falign``, from its words to its exit code: whatever goes wrong is one sentence on standard error.

Needs nothing beside PyTorch and Python: what the commands need, the extra ``falign[lab]``, may be missing.
"""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from errno import EINVAL, ELOOP, ENAMETOOLONG
from signal import SIGINT
from traceback import walk_tb

from falign.lab._streams import plain, prepare, settle, tell

_LONG = 400
"""A word of more letters is shortened in messages."""
_NO_NAMES = (ENAMETOOLONG, ELOOP, EINVAL)
"""What systems say of a path that can never be one."""


def main(tokens: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        tokens: Its words; None is those of the command line.

    Returns:
        0: done; 1: it went wrong on the way; 2: an argument is wrong; 128 and a signal's number: stopped by that
        signal, 130 by Ctrl-C.
    """
    words = sys.argv[1:] if tokens is None else list(tokens)
    prepare()
    code = _answered(words)
    if error := settle(sys.stdout):
        code = code or 1
        if not isinstance(error, BrokenPipeError):  # who closed a pipe knows
            _say(f"the output cannot be written: {error.strerror or error}")
    settle(sys.stderr)
    return code


def _answered(words: list[str]) -> int:
    for word in words:
        if not _is_argument(word):
            return _failed(f"{word!r} holds a character that no argument can: leave it out", 2, words)
    try:
        from falign._commands import run

        return run(words)
    except KeyboardInterrupt as error:  # by Ctrl-C, or by the signal whose number it carries
        return _failed("interrupted", 128 + getattr(error, "number", SIGINT), words)
    except SystemExit as error:
        if _unheard(error):  # rich's answer to a closed pipe
            return 1
        return _failed(f"the code that was run asked to end ({error.code!r}): the command was not done", 1, words)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _unheard(error):
            return 1
        told = _told(error)
        if told is None:
            raise
        return _failed(*told, words)


def _is_argument(word: str) -> bool:
    """Whether a system could hand over such a word: no NUL, no half of a letter. Then it is fit for a path, too."""
    try:
        return b"\0" not in os.fsencode(word)
    except UnicodeEncodeError:
        return False


def _unheard(error: BaseException) -> bool:
    """Whether an error comes from printing: its innermost frame is that of what prints."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") in ("rich.console", "falign.lab._streams")


def _told(error: Exception) -> tuple[str, int] | None:
    """The sentence and the exit code of an error that is none of falign's own code; None for others."""
    from falign.lab._requirements import lacking

    if isinstance(error, ImportError):
        return _with(1, lacking(error))
    if isinstance(error, OSError):
        named = "the output cannot be written: " if _unheard(error) else ""
        named = named if error.filename is None else f"{_name(error.filename)}: "
        return f"{named}{error.strerror or error}", 2 if error.errno in _NO_NAMES else 1
    if (code := _code(error)) is not None:
        return str(error), code
    if _is_memory(error):
        first = (str(error).splitlines() or [""])[0]
        return f"there is not enough memory{f' ({first})' if first else ''}: make what is computed smaller", 1
    return _with(1, lacking(error))


def _with(code: int, sentence: str | None) -> tuple[str, int] | None:
    return None if sentence is None else (sentence, code)


def _code(error: Exception) -> int | None:
    """The exit code of an error whose message is meant for the user; None for others."""
    try:
        from falign.lab._files import RunError
        from falign.lab.config import ConfigError
        from falign.lab.data import DataError
    except Exception:  # of packages that do not fit, which is what the error is about
        return None
    if isinstance(error, RunError):
        return error.code
    return 2 if isinstance(error, (ConfigError, DataError)) else None


def _is_memory(error: Exception) -> bool:
    import torch

    # On the CPU PyTorch has no class of its own for it.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _name(path: object) -> str:
    return os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)


def _failed(message: str, code: int, words: Sequence[str]) -> int:
    if any("\n" in word or "\r" in word for word in words):  # which the message may repeat
        message = message.replace("\r", "\\r").replace("\n", "\\n")
    _say(message)
    return code


def _say(message: str) -> None:
    with suppress(OSError, ValueError):  # there may be nobody to tell
        tell(f"falign: {_shortened(plain(message))}", error=True)


def _shortened(message: str) -> str:
    """The same, without the middle of words that nobody would read to the end."""
    return re.sub(rf"\S{{{_LONG},}}", lambda word: f"{word[0][: _LONG // 4]}…{word[0][-_LONG // 8 :]}", message)
