"""The content of one file: opened without waiting, unpacked within bounds, summed up in a checksum, written whole."""

import gzip
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from io import BufferedIOBase, BufferedReader
from pathlib import Path

from filelock import FileLock, Timeout

from falign.lab.data.dataset import DataError
from falign.lab.memory import GIB, available
from falign.lab.text import tell
from falign.lab.writing import leftovers

GZIP_FAULTS = (gzip.BadGzipFile, EOFError, zlib.error)
"""What reading a truncated or altered gzip file raises."""

DEFLATED = 1032
"""No deflate stream, so no gzip or zip file, unpacks to more than so many times its size."""

_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20
_PARTIAL = ".partial-"
_PATIENCE = 2.0
"""Seconds to wait for another process in silence."""


@contextmanager
def raw(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading, as it is.

    Args:
        path: The file. A pipe, which would be waited for, a device, a socket and a folder are refused.

    Yields:
        The stream of its bytes.

    Raises:
        DataError: If it cannot be opened, or is no regular file.
    """
    try:
        stream = open(path, "rb", opener=_at_once)  # noqa: SIM115  # closed below: only opening ends in this sentence
    except (OSError, ValueError) as error:  # ValueError: a path with NUL
        raise DataError(
            f"{path} cannot be opened ({why(error)}), expected a readable file: check that it "
            "is there and yours to read"
        ) from error
    with stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise DataError(f"{path} is a pipe, a device or a socket, expected a regular file: replace or remove it")
        yield stream


@contextmanager
def opened(path: Path) -> Iterator[BufferedIOBase]:
    """Open a file for reading; a lone gzip file (no ``.tar.gz``) is unpacked on the way, whatever its name.

    Args:
        path: The file.

    Yields:
        The stream of its content. Reading a gzip file to its end verifies its CRC.

    Raises:
        DataError: If it cannot be opened, or is no regular file.
    """
    with raw(path) as stream:
        if is_gzip(stream) and not path.name.endswith((".tar.gz", ".tgz")):
            with gzip.GzipFile(fileobj=stream) as unpacked:
                yield unpacked
        else:
            yield stream


def is_gzip(stream: BufferedReader) -> bool:
    """Whether a stream that is at its beginning holds a gzip file."""
    return stream.peek(len(_GZIP)).startswith(_GZIP)


def digest(path: Path, *, at_most: int | None = None) -> str | None:
    """SHA-256 of a file's content, in hexadecimal.

    Of a lone gzip file it is that of the unpacked content: packing the same data again gives other bytes, and
    good copies differ in them.

    Args:
        path: The file.
        at_most: Bytes of content after which to give up; None to read on to the end.

    Returns:
        64 hexadecimal digits; None if there is more content.
    """
    found, size = sha256(), 0
    with opened(path) as stream:
        while block := stream.read(_CHUNK):
            size += len(block)
            if at_most is not None and size > at_most:
                return None
            found.update(block)
    return found.hexdigest()


def fits(size: int, what: str) -> None:
    """Refuse what cannot be read in this machine's memory, before any of it is taken.

    Args:
        size: Bytes of the decoded images and labels; reading takes up to twice as much, and 256 MiB.
        what: What needs them.

    Raises:
        DataError: If this machine has less.
    """
    most = max(0, available() - (256 << 20)) // 2
    if size > most:
        raise DataError(
            f"{what} needs {size / GIB:.3g} GiB of memory, expected at most the {most / GIB:.3g} GiB of which this "
            "machine's memory holds the two copies that reading takes: check that its sizes are right, or take a "
            "smaller set"
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder; what killed ones left half-written there is removed first.

    Args:
        folder: The folder, created if needed. All that write into it do so inside of this.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        tell(f"waiting for another process that writes to {folder}", error=True)
        lock.acquire()
    try:
        for leftover in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in leftovers(folder):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever waits for it notices, and makes another
        lock.release()


@contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """Write a file so that it appears under its name only when complete.

    Args:
        target: The file to appear; its folder is created if needed.

    Yields:
        The path to write to, in a temporary folder beside the target, removed if the writing fails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_PARTIAL, ignore_cleanup_errors=True) as scratch:
        partial = Path(scratch) / target.name
        yield partial
        os.replace(partial, target)


def why(error: BaseException) -> str:
    """An error of the system in few words: without the path, which the sentence around it names."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
