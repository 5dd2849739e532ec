"""Reading a file that may be anything: a pipe that never answers, a device that never ends, larger than memory."""

import os
from pathlib import Path
from stat import S_ISREG

_OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Whoever opens a pipe to read would wait for somebody to write into it."""


class Unreadable(ValueError):  # noqa: N818  # an answer of the reader, who names the file
    """What stands where a file is expected: why it is not read."""


class TooLarge(Unreadable):
    """A file of more bytes than expected."""


def read(path: Path, limit: int) -> bytes:
    """The content of a regular file.

    Args:
        path: The file, or a link to one.
        limit: So many bytes it may have.

    Raises:
        Unreadable: It is no regular file, or the system refuses it.
        TooLarge: It has more bytes.
    """
    try:
        descriptor = os.open(path, _OPEN)
        with open(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not S_ISREG(found.st_mode):
                raise Unreadable("it is no regular file")
            if found.st_size > limit:
                raise TooLarge(f"it has {found.st_size:,} bytes, expected at most {limit:,}")
            return stream.read(found.st_size)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
