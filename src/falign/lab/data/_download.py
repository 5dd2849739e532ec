"""Published files: opened without waiting, bounded in size, verified by checksum, and downloaded from mirrors in turn.

pooch downloads; around it stands what it does not bound: the bytes that a mirror may send, the time that it may take,
the content of a gzip file, and the mirrors that are asked after one that fails.
"""

import errno
import gzip
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from time import monotonic
from typing import Any

import pooch
from filelock import FileLock, Timeout

from falign.lab import _files
from falign.lab._files import leftovers
from falign.lab._memory import GIB, available
from falign.lab._progress import download_bar
from falign.lab._text import echo
from falign.lab.data._dataset import DataError

GZIP_FAULTS = (gzip.BadGzipFile, EOFError, zlib.error)
"""Errors of reading a truncated or altered gzip file."""

DEFLATED = 1032
"""Largest ratio of unpacked to packed size of a deflate stream, so of a gzip or zip file."""

_GZIP = b"\x1f\x8b"
_READ_CHUNK = 1 << 20
_PARTIAL = ".partial-"
_PATIENCE = 2.0
"""Seconds to wait for another process in silence."""


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading, as it is.

    Args:
        path: The file. A pipe, which would be waited for, a device, a socket and a folder are refused.

    Yields:
        The stream of its bytes.

    Raises:
        DataError: If it cannot be opened, or is no regular file.
    """
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(_files.open_regular(path))
        except _files.Unreadable as error:
            raise DataError(
                f"{path} is a pipe, a device or a socket, expected a regular file: replace or remove it"
            ) from error
        except (OSError, ValueError) as error:  # ValueError: a path with NUL
            raise DataError(
                f"{path} cannot be opened ({system_reason(error)}), expected a readable file: check that it "
                "is there and yours to read"
            ) from error
        yield stream


@contextmanager
def open_unpacked(path: Path) -> Iterator[BufferedIOBase]:
    """Open a file for reading; a lone gzip file (no ``.tar.gz``) is unpacked on the way, whatever its name.

    Args:
        path: The file.

    Yields:
        The stream of its content. Reading a gzip file to its end verifies its CRC.

    Raises:
        DataError: If it cannot be opened, or is no regular file.
    """
    with open_regular(path) as stream:
        if is_gzip(stream) and not path.name.endswith((".tar.gz", ".tgz")):
            with gzip.GzipFile(fileobj=stream) as unpacked:
                yield unpacked
        else:
            yield stream


def is_gzip(stream: BufferedReader) -> bool:
    """Tell whether a stream that is at its beginning holds a gzip file."""
    return stream.peek(len(_GZIP)).startswith(_GZIP)


def content_sha256(path: Path, *, at_most: int | None = None) -> str | None:
    """Compute the SHA-256 of a file's content, in hexadecimal.

    Of a lone gzip file it is that of the unpacked content: compressing the same data again gives other bytes, and
    intact copies differ in them.

    Args:
        path: The file.
        at_most: Bytes of content after which to give up; None to read on to the end.

    Returns:
        64 hexadecimal digits; None if there is more content.
    """
    checksum, size = sha256(), 0
    with open_unpacked(path) as stream:
        while block := stream.read(_READ_CHUNK):
            size += len(block)
            if at_most is not None and size > at_most:
                return None
            checksum.update(block)
    return checksum.hexdigest()


def check_memory(size: int, what: str) -> None:
    """Refuse a data set that does not fit into this machine's memory, before any of it is allocated.

    Args:
        size: Bytes of the decoded images and labels; reading takes up to twice as much, and 256 MiB.
        what: The data set or file, for the message.

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
def exclusive(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder; half-written files of killed processes are removed first.

    Args:
        folder: The folder, created if needed. Every writer of it uses this context.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        echo(f"waiting for another process that writes to {folder}", error=True)
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


def system_reason(error: BaseException) -> str:
    """Return the reason of a system error without the path, which the sentence around it names."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


_TIMEOUT = 30.0
"""Seconds without a byte after which a mirror is given up."""
_STALLED = 60.0
"""Seconds without a whole chunk after which it is given up too: a byte every ten seconds never times out."""
_CHUNK = 1 << 16
_TICK = 0.02
_UNPACKED = 64
"""Bound on the ratio of unpacked to packed size of a published lone gzip file."""
_FOLDER_ERRORS = frozenset(
    getattr(errno, name, None)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST", "EIO", "ENAMETOOLONG")
) - {None}
"""Errors of the folder: another mirror would not help."""


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """One file of a data set as its authors publish it.

    Attributes:
        name: Its name.
        unpacked: Name of the file or folder that it unpacks to, accepted in its place.
        sha256: Checksum of its content as :func:`falign.lab.data._download.content_sha256` gives it; None if nobody
            published the file, and then it is not verified.
        mirrors: Addresses that ``name`` is appended to, tried in turn; none if the file is never downloaded.
        size: Its bytes as published: no mirror may send much more.
        spellings: Other names under which it, or what it unpacks to, is known.
    """

    name: str
    unpacked: str
    sha256: str | None = None
    mirrors: tuple[str, ...] = ()
    size: int = 1 << 30
    spellings: tuple[str, ...] = ()

    @property
    def makes_folder(self) -> bool:
        """Tell whether it unpacks to a folder, not to a file."""
        return self.name.endswith((".zip", ".tar.gz"))

    def find(self, folder: Path) -> Path | None:
        """The file in a folder, or what it unpacks to; None if there is neither.

        Args:
            folder: The folder. It may be what the file unpacks to.
        """
        if self.makes_folder and folder.name == self.unpacked and folder.is_dir():
            return folder
        for name in (self.name, self.unpacked, *self.spellings):
            path = folder / name
            if path.exists() and path.is_dir() == (self.makes_folder and name == self.unpacked):
                return path
        return None

    def fault(self, path: Path) -> str | None:
        """Describe what is wrong with a copy; None if it is the published content, or cannot be verified.

        A folder, and a file without checksum, cannot be verified.
        """
        if self.sha256 is None or path.is_dir():
            return None
        try:
            checksum = content_sha256(path, at_most=_UNPACKED * self.size)
        except GZIP_FAULTS as error:
            return f"is no intact gzip file ({error})"
        if checksum is None:
            return f"unpacks to more than {_UNPACKED * self.size:,} bytes, expected fewer"
        return None if checksum == self.sha256 else f"has SHA-256 {checksum}, expected {self.sha256} for its content"

    def check(self, path: Path) -> None:
        """Refuse a copy that is not the published content.

        Args:
            path: A path that :meth:`find` gave.

        Raises:
            DataError: If it has a fault.
        """
        if fault := self.fault(path):
            raise DataError(
                f"{path} {fault}: it is damaged or of another data set, so get it anew, or load its folder "
                "by path if the data are your own"
            )


def fetch(file: PublishedFile, folder: Path, *, progress: bool) -> Path:
    """Download a file from the first mirror that serves it intact; one already there is only verified.

    Args:
        file: The file.
        folder: Where it is put, created if needed.
        progress: Whether to show a bar on standard error.

    Returns:
        Its path.

    Raises:
        DataError: If no mirror served it intact, with the reason for each, or if the one there is not intact.
    """
    target = folder / file.name
    try:
        with exclusive(folder):  # another process, for which this one waited here, may have put the file there
            if target.exists():
                file.check(target)
            else:
                _from_mirrors(file, target, progress=progress)
    except OSError as error:
        raise DataError(
            f"{file.name} cannot be put into {folder} ({system_reason(error)}), expected a folder to write in, with "
            f"{file.size / 1e6:.0f} MB of room: make room, or name another cache with XDG_CACHE_HOME"
        ) from error
    return target


def _from_mirrors(file: PublishedFile, target: Path, *, progress: bool) -> None:
    refusals = []
    for mirror in file.mirrors:
        url = mirror + file.name
        try:
            with atomic(target) as partial, download_bar(file.name, shown=progress) as show:
                _Download(url, partial, file.size, show).run()
                if fault := file.fault(partial):
                    raise DataError(f"what it served {fault}")
            return
        except (OSError, ValueError) as error:  # every error of the network is an OSError
            if isinstance(error, OSError) and error.errno in _FOLDER_ERRORS:
                raise
            refusals.append(f"{url}: {_reason(error)}")
    raise DataError(
        f"{file.name} could not be downloaded to {target.parent} ({'; '.join(refusals)}), expected one mirror to "
        "serve it intact: connect to the network and try again, or put the file there by hand"
    )


class _Download:
    """One download to one path, in a thread of its own that the calling thread watches.

    pooch has no bound on size or on total time, and its own timeout is that of a single byte: a server that sends one
    now and then would hold the process for years. But pooch tells a progress bar of every chunk, so this object is
    the bar: it counts the bytes, and raises in the downloading thread once the download is given up.
    """

    def __init__(self, url: str, target: Path, size: int, show: Callable[[int, int], None]) -> None:
        self._url = url
        self._target = target
        self._limit = size + size // 10 + 1024  # mirrors that pack anew come to a little more
        self._show = show
        self._total = 0
        self._last = monotonic()
        self._given_up = False
        self._error: Exception | None = None
        self._responses: list[Any] = []

    def run(self) -> None:
        """Download.

        Raises:
            DataError: It is too large or too slow.
            OSError: The network or the file system refuses.
        """
        thread = threading.Thread(target=self._fetch, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(_TICK)
                if monotonic() - self._last > _STALLED:
                    raise DataError(f"it sent less than {_CHUNK // 1024} KiB in {_STALLED:g} s")
        finally:
            self._given_up = True
        error, self._error = self._error, None  # else error and frame would keep each other alive
        if error is not None:
            raise error

    def _fetch(self) -> None:
        fetch = pooch.HTTPDownloader(
            progressbar=self,  # pyright: ignore[reportArgumentType]  (a bar object is documented)
            chunk_size=_CHUNK,
            timeout=_TIMEOUT,
            hooks={"response": self._answered},
        )
        try:
            fetch(self._url, str(self._target), None)
        except Exception as error:  # raised again in the thread that watches
            self._error = error
        finally:
            for response in self._responses:
                response.close()

    def _answered(self, response: Any, *_: object, **__: object) -> None:
        """Keep a response, also of a redirection, to close it: pooch leaves them open."""
        self._responses.append(response)

    @property
    def total(self) -> int:
        """Number of bytes that the server announces; 0 if it announces none."""
        return self._total

    @total.setter
    def total(self, size: int) -> None:
        if size > self._limit:
            raise DataError(f"it announces {size:,} bytes, expected at most {self._limit:,}")
        self._total = size

    def update(self, _: int) -> None:
        """Check the download after a chunk, which is written by now."""
        if self._given_up:
            raise DataError("it was given up")
        self._last = monotonic()
        there = self._target.stat().st_size
        if there > self._limit:
            raise DataError(f"it sends more than {self._limit:,} bytes, expected at most so many")
        self._show(there, self._total)

    def reset(self) -> None:
        """Do nothing: pooch fills its bar at the end, and this one is full."""

    def close(self) -> None:
        """Do nothing: the bar ends with its context, also when a download fails and pooch does not call this."""


def _reason(error: Exception) -> str:
    """Return the reason of an error; the texts of requests repeat the address and the whole chain of causes."""
    response = getattr(error, "response", error)  # only errors of requests have one, or None
    if isinstance(error, DataError) or response is error:
        return str(error)
    status = getattr(response, "status_code", None)
    return f"HTTP status {status}" if status else type(error).__name__
