"""Writing a file whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from io import BufferedIOBase
from itertools import count
from pathlib import Path
from secrets import token_hex
from stat import S_ISREG
from types import TracebackType
from typing import Any, ClassVar

from filelock import FileLock, Timeout

_NAME = 48
"""So many letters of a file's name are in the name of its half-written copy: names may not exceed 255 bytes."""


class RunError(RuntimeError):
    """A run folder that cannot be used as asked: which file, why, what to do."""

    code: ClassVar[int] = 2
    """Exit code of a command that ends with it: an argument is wrong."""


class WriteError(RunError):
    """A file that could not be written while a run went on; what was there before is still there."""

    code = 1


def atomic_write(path: Path, content: bytes) -> None:
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


def unused_path(path: Path) -> Path:
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


# Reading a file that may be anything: a pipe that never answers, a device that never ends, larger than memory.

_OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Whoever opens a pipe to read would wait for somebody to write into it."""


class Unreadable(ValueError):  # noqa: N818  # an answer of the reader, who names the file
    """What stands where a file is expected: why it is not read."""


class TooLarge(Unreadable):
    """A file of more bytes than expected."""


def read_bounded(path: Path, limit: int) -> bytes:
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


# A checksum inside the very file that it is of: not a bit of a sealed file can change unseen.
#
# The file holds the mark ``falign-sha256:`` and 64 digits, somewhere its format has room for a text: in the metadata of
# a Parquet or safetensors file, in a field of a JSON object. The digits are the SHA-256 of the file with zeros in their
# place. So one scheme serves all formats, and a checksum cannot be parted from what it vouches for.

_MARK, _DIGITS = b"falign-sha256:", 64
BLANK = _MARK.decode() + "0" * _DIGITS
"""What a file holds where ``sealed`` puts its checksum."""
_FIELD = "checksum"
"""Of a JSON object: where its checksum stands."""
_TRIED = 16
"""So many marks of a file are tried: what it holds may contain some, and a hostile file a million."""
_PART = 2**20
"""Bytes of a large file that are read at once."""


class Unsealed(ValueError):  # noqa: N818  # an answer of the reader, who names the file
    """Content whose checksum is wrong or missing: which of the two."""


def sealed(content: bytes) -> bytes:
    """Put the checksum of a file into it.

    Args:
        content: The file, with ``BLANK`` where the checksum belongs; of several the first counts.

    Returns:
        The same, of the same length, with its checksum.

    Raises:
        ValueError: There is no ``BLANK``.
    """
    at = content.find(BLANK.encode())
    if at < 0:
        raise ValueError(f"the content has no place for its checksum: it needs {BLANK!r}")
    at += len(_MARK)
    return b"".join((content[:at], sha256(content).hexdigest().encode(), content[at + _DIGITS :]))


def seal(stream: BufferedIOBase, at: int) -> None:
    """Put the checksum of a file into it that is too large to be held.

    Args:
        stream: The file, open for reading and writing.
        at: Where the digits of its ``BLANK`` begin.
    """
    digest, _ = _digest(stream, at)
    stream.seek(at)
    stream.write(digest.encode())


def last_seal(content: bytes) -> int:
    """Where the digits after the last mark of a file begin, for formats that end with it; -1 if there is none."""
    at = content.rfind(_MARK)
    return at if at < 0 else at + len(_MARK)


def verify_seal(content: bytes, at: int | None = None) -> None:
    """Make sure that not a bit of a sealed file has changed.

    Args:
        content: The file.
        at: Where its digits begin, if that is known.

    Raises:
        Unsealed: Its checksum is wrong, or it has none.
    """
    places = list(_marks(content)) if at is None else [at]
    if not places:
        raise Unsealed("it has no checksum")
    if not any(_holds(content, at) for at in places):
        raise Unsealed("its checksum is wrong")


def verify_stream(stream: BufferedIOBase, at: int) -> None:
    """Make sure of the same of a file that is too large to be held.

    Args:
        stream: The open file; it is left at its end.
        at: Where its digits begin.

    Raises:
        Unsealed: Its checksum is wrong.
    """
    found, written = _digest(stream, at)
    if found.encode() != written:
        raise Unsealed("its checksum is wrong")


def _digest(stream: BufferedIOBase, at: int) -> tuple[str, bytes]:
    """The checksum that a file should have, and the digits that it has."""
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
    """A sealed JSON object, readable by people.

    Args:
        content: What JSON can hold; numbers that are not finite are refused.
    """
    return sealed((json.dumps({_FIELD: BLANK, **content}, indent=2, allow_nan=False) + "\n").encode())


def from_json(content: bytes) -> dict[str, Any]:
    """The object that ``to_json`` was given.

    Raises:
        Unsealed: A bit of it has changed, or it is not one.
    """
    verify_seal(content)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:  # a seal says that nothing changed, not that it was JSON
        raise Unsealed(str(error)) from None
    if not isinstance(found, dict):
        raise Unsealed(f"it holds a {type(found).__name__}, expected an object")
    found.pop(_FIELD, None)
    return found


def _marks(content: bytes) -> Iterator[int]:
    """Where the digits after the first marks begin."""
    at = -1
    for _ in range(_TRIED):
        at = content.find(_MARK, at + 1)
        if at < 0:
            return
        yield at + len(_MARK)


def _holds(content: bytes, at: int) -> bool:
    whole = memoryview(content)  # slices of it are no copies: checkpoints are large
    digest = sha256(whole[:at])
    digest.update(b"0" * _DIGITS)
    digest.update(whole[at + _DIGITS :])
    return digest.hexdigest().encode() == content[at : at + _DIGITS]


# The lock of a run folder: one process at a time is at work in it, and others can tell whether one is.

_FILE = ".lock"
_PATIENCE, _PAUSE = 0.25, 0.02
"""Seconds to wait for the lock, and between two tries: somebody may just be looking whether it is held."""


class FolderLost(WriteError):  # noqa: N818  # the folder is
    """A folder that was taken away, or given to another run, while a run was at work in it."""


class FolderLock:
    """The right to change a folder; a context manager.

    The system itself frees the lock of a killed process, so no clock and no process number decides who is alive. The
    file is taken away at the end, while it is held: whoever opened it before and locks it after that finds that it has
    no name any more, and tries again.

    Args:
        folder: It exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / _FILE
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
        """Make sure that the folder is still the one that is held.

        Raises:
            Lost: It was taken away or replaced.
        """
        if not self._is_mine():
            raise FolderLost(
                f"{self._folder} was deleted or replaced while its run was at work: the run has ended, and wrote "
                "nothing more there; begin it again"
            )

    def _is_mine(self) -> bool:
        """The number of an open file is given to no other one, so it tells a folder that was made anew."""
        try:
            return os.path.samestat(os.stat(self._path), self._mine)
        except OSError:
            return False


def folder_busy(folder: Path) -> RunError:
    """What to say of a folder in which another process is at work."""
    return RunError(
        f"another process is at work in {folder}: wait until it has ended, or begin a run in another folder with --out"
    )


def is_in_use(folder: Path) -> bool:
    """Whether a living process is at work in a run folder; only looks, so that it can be asked of any folder."""
    return is_locked(folder / _FILE)


def is_locked(path: Path) -> bool:
    """Whether a living process holds a lock; only looks.

    Args:
        path: Of the lock's file; one that is not there, or not for us to read, is not held.
    """
    if os.name != "posix":
        return _held_by_trying(path)
    import fcntl  # of POSIX only

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError):  # there is none, or it is not for us to read
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back as the file is closed
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _held_by_trying(path: Path) -> bool:
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
