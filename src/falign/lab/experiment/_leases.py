"""Sharing a store: which process has taken which runs, and which of these processes still live."""

import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from time import time
from types import TracebackType
from uuid import uuid4

from filelock import FileLock, Timeout

from falign.lab._files import (
    RunError,
    Unreadable,
    Unsealed,
    atomic_write,
    from_json,
    is_locked,
    leftovers,
    read_bounded,
    to_json,
    unwritable,
)
from falign.lab.experiment import _index
from falign.lab.experiment._store import MARKER_BYTES, Store

_PATIENCE = 5.0
"""Seconds to wait for one's own new lock, which another process may just be looking at."""
_FOLDER = "owners"
_RUN = re.compile(r"\.[0-9a-f]{32}\.parquet\.partial-")
"""How the name of a run's half-written file begins."""
_PAGE = 600.0
"""Seconds after which a page that is half written is nobody's: writing one takes no lock."""


class Owner:
    """A process that takes runs of a store; a context manager.

    ``OUT/owners/<id>.lock`` is locked as long as the process lives: the system itself frees the lock of a killed
    one, so no clock and no process number decides who is alive. ``OUT/owners/<id>.json`` lists the runs that the
    process has taken, under a checksum. Both are read and changed only while :meth:`Store.alone` is held. Machines may
    share a store on a network's file system if its locks (``flock``) reach from one machine to the other.

    A list that is damaged counts as empty. Its runs may then be computed twice, which costs time and nothing else: a
    run's file is written whole, and both have the same numbers. To wait for its owner could last for days, and the
    owner writes the list anew with its next block.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._name = f"{os.getpid()}-{uuid4().hex[:12]}"
        self._lock = FileLock(self._file("lock"))
        self._taken: set[str] = set()

    def __enter__(self) -> "Owner":
        folder = self._file("lock").parent
        with self._store.alone():
            try:
                folder.mkdir(exist_ok=True)
                self._lock.acquire(timeout=_PATIENCE)
            except OSError as error:
                raise unwritable(folder, error) from None
            try:
                self._write()
                if not _living(self._store, besides=self._name):
                    self._sweep()
            except OSError as error:
                self._leave()
                raise unwritable(self._store.folder, error) from None
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give all runs back. That the folder has gone meanwhile is said by whatever wanted to write in it."""
        try:
            with self._store.alone():
                self._leave()
        except RunError:
            self._leave()

    def _sweep(self) -> None:
        """Take away what killed processes left half-written: nobody else is at work, or only on a page just now.

        In other folders than the store's own only runs are ours: a training may be at work in one.
        """
        root = self._store.folder
        whole = (root, root / _FOLDER, root / _index.FOLDER)
        for path in [path for folder in (root, *root.iterdir()) for path in leftovers(folder)]:
            with suppress(FileNotFoundError):
                old = path.parent != root or time() - path.lstat().st_mtime > _PAGE
                if old and (path.parent in whole or _RUN.match(path.name)):
                    _remove(path)

    def _leave(self) -> None:
        _remove(self._file("json"))
        self._lock.release()
        _remove(self._file("lock"))

    def take(self, keys: Iterable[str]) -> set[str]:
        """Take runs.

        Args:
            keys: Those that are wanted.

        Returns:
            Those that are now this owner's: the ones that no other living process has taken.
        """
        with self._store.alone():
            granted = set(keys).difference(*_living(self._store, besides=self._name))
            self._taken |= granted
            self._write()
        return granted

    def release(self, keys: Iterable[str]) -> None:
        """Give runs back, be they finished or not."""
        with self._store.alone():
            self._taken -= set(keys)
            self._write()

    def _write(self) -> None:
        atomic_write(self._file("json"), to_json({"runs": sorted(self._taken)}))

    def _file(self, kind: str) -> Path:
        return self._store.folder / _FOLDER / f"{self._name}.{kind}"


def taken(store: Store) -> set[str]:
    """Keys of the runs that living processes have taken."""
    with store.alone():
        return set().union(*_living(store, besides=None))


def running(store: Store) -> set[str]:
    """The same as :func:`taken`, found out by reading alone: nothing in the store is made, changed or deleted."""
    if os.name != "posix":
        return taken(store)
    return set().union(*(_read(path.with_suffix(".json")) for path in _locks(store) if is_locked(path)))


def _locks(store: Store) -> list[Path]:
    """The locks that processes have left in a store: files, whatever else is there."""
    with suppress(OSError):
        return [path for path in (store.folder / _FOLDER).glob("*.lock") if stat.S_ISREG(path.lstat().st_mode)]
    return []


def _living(store: Store, besides: str | None) -> list[set[str]]:
    """The keys that each living owner has taken; what is left of dead ones is deleted."""
    claims: list[set[str]] = []
    for path in _locks(store):
        if path.stem == besides:
            continue
        lock, listed = FileLock(path), path.with_suffix(".json")
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # one that is not for us to open may be of another user's process
            claims.append(_read(listed))
            continue
        _remove(listed)
        lock.release()
        _remove(path)
    return claims


def _read(path: Path) -> set[str]:
    """The keys that an owner lists; none if it has not yet said so, or if its list is damaged."""
    try:
        runs = from_json(read_bounded(path, MARKER_BYTES)).get("runs")
    except (Unreadable, Unsealed):
        return set()
    return {key for key in runs if isinstance(key, str)} if isinstance(runs, list) else set()


def _remove(path: Path) -> None:
    """Delete a file; what cannot be deleted stays, and disturbs nothing."""
    with suppress(OSError):
        path.unlink()
