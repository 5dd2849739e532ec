"""Files that are whole or not there: atomic writes, bounded reads, checksums inside of files, locks of folders.

A run, a data set and a store all keep their files by these functions, because any of their processes may be killed at
any moment, and any of their files may be damaged or exchanged by another one.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from io import BufferedIOBase, BufferedReader
from itertools import count
from pathlib import Path
from secrets import token_hex
from stat import S_ISREG
from types import TracebackType
from typing import Any, ClassVar

from filelock import FileLock, Timeout

_NAME = 48
"""Letters of a file's name in the name of its half-written copy: a file system allows 255 bytes."""


class RunError(RuntimeError):
    """A folder or file that cannot be used as asked; the message says which file, why, and what to do."""

    code: ClassVar[int] = 2
    """Exit code of the command: an argument is wrong."""


class WriteError(RunError):
    """A file that could not be written while a run went on; what was there before is still there."""

    code = 1


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file so that its name always holds either the old content or the new one.

    Args:
        path: The file; its folder exists.
        content: The new content.

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
        _sync_folder(path.parent)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def unwritable(folder: Path, error: OSError) -> RunError:
    """Make the error for a folder in which nothing can be written."""
    return RunError(
        f"cannot write in {folder}: {error.strerror or error}; make it writable, or give another folder with --out"
    )


def unused_path(path: Path) -> Path:
    """Return the path, or the first of path-2, path-3 and so on that does not exist."""
    return next(each for n in count(1) if not os.path.lexists(each := Path(f"{path}-{n}" if n > 1 else path)))


def leftovers(folder: Path) -> list[Path]:
    """List the half-written files that killed processes left in a folder."""
    return list(folder.glob(".*.partial-*"))


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can synchronise folders."""
    with suppress(OSError):  # without it the file still has its new content
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Reading files that somebody else may have put there: pipes, devices, files larger than the memory.

_OPEN_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Opening a pipe would otherwise wait until another process writes into it."""


class Unreadable(ValueError):  # noqa: N818  # part of a sentence of the reader, who names the file
    """A file that is not read; the message says why."""


class TooLarge(Unreadable):
    """A file of more bytes than expected."""


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading, or refuse it without waiting.

    Args:
        path: The file, or a link to one.

    Raises:
        OSError: The system refuses to open it.
        Unreadable: It is a pipe, a device or a socket.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _OPEN_FLAGS)) as stream:
        if not S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise Unreadable("it is no regular file")
        yield stream


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a regular file.

    Args:
        path: The file, or a link to one.
        limit: Bytes that it may have.

    Returns:
        Its content.

    Raises:
        Unreadable: It is no regular file, or the system refuses it.
        TooLarge: It has more bytes.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise TooLarge(f"it has {size:,} bytes, expected at most {limit:,}")
            return stream.read(size)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None


# A checksum inside the file that it is of, so that not a bit of a sealed file can change unnoticed.
#
# The file holds the mark ``falign-sha256:`` and 64 digits wherever its format has room for a text: in the metadata of a
# Parquet or safetensors file, in a field of a JSON object. The digits are the SHA-256 of the file with zeros in their
# place. So one scheme serves all formats, and a checksum cannot be parted from its file.

_MARK, _DIGITS = b"falign-sha256:", 64
BLANK = _MARK.decode() + "0" * _DIGITS
"""Placeholder that ``sealed`` replaces with the checksum."""
_FIELD = "checksum"
"""Field of a JSON object that holds its checksum."""
_TRIED = 16
"""Marks of a file that are tried: its content may hold some by chance, and a hostile file a million."""
_PART = 2**20
"""Bytes of a large file that are read at a time."""


class Unsealed(ValueError):  # noqa: N818  # part of a sentence of the reader, who names the file
    """A file whose checksum is wrong or missing; the message says which."""


def sealed(content: bytes) -> bytes:
    """Put the checksum of a file into it.

    Args:
        content: The file, with ``BLANK`` where the checksum belongs; the first of several counts.

    Returns:
        The content with its checksum, of the same length.

    Raises:
        ValueError: There is no ``BLANK``.
    """
    at = content.find(BLANK.encode())
    if at < 0:
        raise ValueError(f"the content has no place for its checksum: it needs {BLANK!r}")
    at += len(_MARK)
    return b"".join((content[:at], sha256(content).hexdigest().encode(), content[at + _DIGITS :]))


def seal(stream: BufferedIOBase, at: int) -> None:
    """Put a checksum into a file that is too large for the memory.

    Args:
        stream: The file, open for reading and writing.
        at: Where the digits of its ``BLANK`` begin.
    """
    digest, _ = _digest(stream, at)
    stream.seek(at)
    stream.write(digest.encode())


def last_seal(content: bytes) -> int:
    """Find the digits of the last mark of a file, for formats that end with it; -1 if there is none."""
    at = content.rfind(_MARK)
    return at if at < 0 else at + len(_MARK)


def verify_seal(content: bytes, at: int | None = None) -> None:
    """Refuse a sealed file of which a bit has changed.

    Args:
        content: The file.
        at: Where its digits begin; None tries the first marks.

    Raises:
        Unsealed: Its checksum is wrong, or it has none.
    """
    places = list(_marks(content)) if at is None else [at]
    if not places:
        raise Unsealed("it has no checksum")
    if not any(_holds(content, at) for at in places):
        raise Unsealed("its checksum is wrong")


def verify_stream(stream: BufferedIOBase, at: int) -> None:
    """Refuse a sealed file of which a bit has changed and that is too large for the memory.

    Args:
        stream: The open file; it is left at its end.
        at: Where its digits begin.

    Raises:
        Unsealed: Its checksum is wrong.
    """
    digest, written = _digest(stream, at)
    if digest.encode() != written:
        raise Unsealed("its checksum is wrong")


def _digest(stream: BufferedIOBase, at: int) -> tuple[str, bytes]:
    """Compute the checksum that a file should have, and read the digits that it has."""
    digest, left = sha256(), at
    stream.seek(0)
    while left and (part := stream.read(min(left, _PART))):
        digest.update(part)
        left -= len(part)
    written = stream.read(_DIGITS)
    digest.update(b"0" * _DIGITS)
    while part := stream.read(_PART):
        digest.update(part)
    return digest.hexdigest(), written


def to_json(content: Mapping[str, Any]) -> bytes:
    """Write a sealed JSON object, readable by people.

    Args:
        content: The object; numbers that are not finite are refused.
    """
    return sealed((json.dumps({_FIELD: BLANK, **content}, indent=2, allow_nan=False) + "\n").encode())


def from_json(content: bytes) -> dict[str, Any]:
    """Read the object that ``to_json`` wrote.

    Raises:
        Unsealed: A bit of it has changed, or it is no JSON object.
    """
    verify_seal(content)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:  # the checksum tells that nothing changed, not that it was JSON
        raise Unsealed(str(error)) from None
    if not isinstance(values, dict):
        raise Unsealed(f"it holds a {type(values).__name__}, expected an object")
    values.pop(_FIELD, None)
    return values


def _marks(content: bytes) -> Iterator[int]:
    """Find the digits of the first marks."""
    at = -1
    for _ in range(_TRIED):
        at = content.find(_MARK, at + 1)
        if at < 0:
            return
        yield at + len(_MARK)


def _holds(content: bytes, at: int) -> bool:
    whole = memoryview(content)  # slices of a view are no copies: checkpoints are large
    digest = sha256(whole[:at])
    digest.update(b"0" * _DIGITS)
    digest.update(whole[at + _DIGITS :])
    return digest.hexdigest().encode() == content[at : at + _DIGITS]


# The lock of a run folder: one process at a time changes it, and others can tell whether one does.

_LOCK = ".lock"
_PATIENCE, _PAUSE = 0.25, 0.02
"""Seconds to wait for the lock, and between two tries: ``is_locked`` of another process holds it for a moment."""


class FolderLost(WriteError):  # noqa: N818  # the folder is lost
    """A folder that was deleted, or given to another run, while a run was at work in it."""


class FolderLock:
    """The right to change a folder; a context manager.

    The system itself frees the lock of a killed process, so no clock and no process number decides who is alive. The
    file is deleted at the end, while it is locked: a process that opened it before and locks it after that finds that
    it has no name any more, and tries again.

    Args:
        folder: It exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / _LOCK
        self._lock = FileLock(self._path)

    def __enter__(self) -> "FolderLock":
        try:
            self._lock.acquire(timeout=_PATIENCE, poll_interval=_PAUSE)
            self._mine = os.stat(self._path)
        except Timeout:
            raise folder_busy(self._folder) from None
        except (OSError, NotImplementedError) as error:
            self._lock.release()
            why = getattr(error, "strerror", None) or str(error)
            raise RunError(f"cannot lock {self._path}: {why}; give another folder with --out") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_mine():
            with suppress(OSError):  # where open files cannot be deleted it stays, and is not locked
                self._path.unlink()
        self._lock.release()

    def check(self) -> None:
        """Make sure that the folder is still the one that was locked.

        Raises:
            FolderLost: It was deleted or replaced.
        """
        if not self._is_mine():
            raise FolderLost(
                f"{self._folder} was deleted or replaced while its run was at work: the run has ended, and wrote "
                "nothing more there; begin it again"
            )

    def _is_mine(self) -> bool:
        """Compare inode numbers: an open file keeps its own, so that of a folder made anew is another one."""
        try:
            return os.path.samestat(os.stat(self._path), self._mine)
        except OSError:
            return False


def folder_busy(folder: Path) -> RunError:
    """Make the error for a folder in which another process is at work."""
    return RunError(
        f"another process is at work in {folder}: wait until it has ended, or begin a run in another folder with --out"
    )


def is_in_use(folder: Path) -> bool:
    """Tell whether a living process is at work in a run folder; nothing is written, so any folder may be asked."""
    return is_locked(folder / _LOCK)


def is_locked(path: Path) -> bool:
    """Tell whether a living process holds a lock; nothing is written.

    Args:
        path: The lock's file; one that does not exist, or may not be read, counts as not held.
    """
    if os.name != "posix":
        return _is_locked_by_trying(path)
    import fcntl  # of POSIX only

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError):  # it does not exist, or may not be read
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the file is closed
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _is_locked_by_trying(path: Path) -> bool:
    lock = FileLock(path)
    try:
        if path.exists():
            lock.acquire(timeout=0)
            lock.release()
    except Timeout:
        return True
    except OSError:
        return False
    return False
