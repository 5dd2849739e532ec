"""Writing a file whole or not at all."""

import os
from contextlib import suppress
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import ClassVar

_NAME = 48
"""So many letters of a file's name are in the name of its half-written copy: names may not exceed 255 bytes."""


class RunError(RuntimeError):
    """A run folder that cannot be used as asked: which file, why, what to do."""

    code: ClassVar[int] = 2
    """Exit code of a command that ends with it: an argument is wrong."""


class WriteError(RunError):
    """A file that could not be written while a run went on; what was there before is still there."""

    code = 1


def write(path: Path, content: bytes) -> None:
    """Write a file so that its name always holds either the old content or the new one.

    Args:
        path: The file; its folder exists.
        content: What it shall hold.

    Raises:
        WriteError: It cannot be written; what was there before is still there.
    """
    # Nobody can guess the name, and "x" follows no link: another user of the folder cannot direct what is written.
    partial = path.with_name(f".{path.name[:_NAME]}.partial-{token_hex(8)}")
    try:
        with partial.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _settle(path.parent)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def unwritable(folder: Path, error: OSError) -> RunError:
    """What to say of a folder in which nothing can be written."""
    return RunError(
        f"cannot write in {folder}: {error.strerror or error}; make it writable, or give another folder with --out"
    )


def free(path: Path) -> Path:
    """The path, or the first of path-2, path-3 and so on that is not there."""
    return next(each for n in count(1) if not os.path.lexists(each := Path(f"{path}-{n}" if n > 1 else path)))


def leftovers(folder: Path) -> list[Path]:
    """What killed processes left half-written in a folder."""
    return list(folder.glob(".*.partial-*"))


def _settle(folder: Path) -> None:
    """Make a rename last through a power cut, where a folder can be opened and synchronised."""
    with suppress(OSError):  # the file has its new content, whatever comes of this
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
