"""The lock of a run folder: one process at a time is at work in it, and others can tell whether one is."""

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from falign.lab.writing import RunError, WriteError

_FILE = ".lock"
_PATIENCE, _PAUSE = 0.25, 0.02
"""Seconds to wait for the lock, and between two tries: somebody may just be looking whether it is held."""


class Lost(WriteError):  # noqa: N818  # the folder is
    """A folder that was taken away, or given to another run, while a run was at work in it."""


class Hold:
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

    def __enter__(self) -> "Hold":
        try:
            self._lock.acquire(timeout=_PATIENCE, poll_interval=_PAUSE)
            self._mine = os.stat(self._path)
        except Timeout:
            raise busy(self._folder) from None
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
            raise Lost(
                f"{self._folder} was deleted or replaced while its run was at work: the run has ended, and wrote "
                "nothing more there; begin it again"
            )

    def _is_mine(self) -> bool:
        """The number of an open file is given to no other one, so it tells a folder that was made anew."""
        try:
            return os.path.samestat(os.stat(self._path), self._mine)
        except OSError:
            return False


def busy(folder: Path) -> RunError:
    """What to say of a folder in which another process is at work."""
    return RunError(
        f"another process is at work in {folder}: wait until it has ended, or begin a run in another folder with --out"
    )


def at_work(folder: Path) -> bool:
    """Whether a living process is at work in a run folder; only looks, so that it can be asked of any folder."""
    return held(folder / _FILE)


def held(path: Path) -> bool:
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
