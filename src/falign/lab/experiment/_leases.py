"""Leases: how processes that share a store divide its missing runs, so that none is computed twice.

Each process keeps two files in ``OUT/leases``: a lock that it holds as long as it lives, and a list of the runs that it
has leased. The system itself frees the lock of a killed process, so no clock and no process number decides who is
alive; what the dead have leased is free for the others.
"""

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
"""Seconds to wait for one's own new lock, which another process may just be trying."""
FOLDER = "leases"
_PAGES = "report"
"""Folder of the papers' pages."""
_RUN = re.compile(r"\.[0-9a-f]{32}\.parquet\.partial-")
"""Beginning of the name of a run's half-written file."""
_ABANDONED = 600.0
"""Seconds after which nobody is writing a half-written report any more: writing one takes no lock."""


class RunLeases:
    """Leases of this process on runs of a store; a context manager, which gives them back.

    The list ``OUT/leases/<id>.json`` stands under a checksum. Lists and locks are read and changed only within
    :meth:`Store.exclusive`. Machines may share a store on a network's file system if its locks (``flock``) reach from
    one machine to the other.

    A damaged list counts as empty. Its runs may then be computed twice, which costs time and nothing else: a run's file
    is written whole, and both have the same numbers. Waiting for the process that wrote the list could take days, and
    with its next block it writes the list anew.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._name = f"{os.getpid()}-{uuid4().hex[:12]}"
        self._lock = FileLock(self._file("lock"))
        self._keys: set[str] = set()

    def __enter__(self) -> "RunLeases":
        folder = self._file("lock").parent
        with self._store.exclusive():
            try:
                folder.mkdir(exist_ok=True)
                self._lock.acquire(
                    timeout=_PATIENCE
                )  # before the list: a list without a held lock is of a dead process
            except OSError as error:
                raise unwritable(folder, error) from None
            try:
                self._write()
                if not _living_leases(self._store, besides=self._name):
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
        """Give all runs back. If the folder is gone, the command has failed by that already."""
        try:
            with self._store.exclusive():
                self._leave()
        except RunError:
            self._leave()

    def _sweep(self) -> None:
        """Delete what killed processes left half-written; no other process has leases on the store.

        Other folders below the store's may be those of a training that is just writing there: in them only half-written
        runs are deleted. A page may be being written, in the store's own folder or in that of the pages.
        """
        root = self._store.folder
        pages = (root, root / _PAGES)
        whole = (*pages, root / FOLDER, root / _index.FOLDER)
        for path in [path for folder in (root, *root.iterdir()) for path in leftovers(folder)]:
            with suppress(FileNotFoundError):
                abandoned = path.parent not in pages or time() - path.lstat().st_mtime > _ABANDONED
                if abandoned and (path.parent in whole or _RUN.match(path.name)):
                    _remove(path)

    def _leave(self) -> None:
        _remove(self._file("json"))
        self._lock.release()
        _remove(self._file("lock"))

    def acquire(self, keys: Iterable[str]) -> set[str]:
        """Lease runs.

        Args:
            keys: Keys of the wanted runs.

        Returns:
            Keys of the runs that are leased now: those that no other living process has leased.
        """
        with self._store.exclusive():
            granted = set(keys).difference(*_living_leases(self._store, besides=self._name))
            self._keys |= granted
            self._write()
        return granted

    def release(self, keys: Iterable[str]) -> None:
        """Give runs back, finished or not."""
        with self._store.exclusive():
            self._keys -= set(keys)
            self._write()

    def _write(self) -> None:
        atomic_write(self._file("json"), to_json({"runs": sorted(self._keys)}))

    def _file(self, kind: str) -> Path:
        return self._store.folder / FOLDER / f"{self._name}.{kind}"


def leased_runs(store: Store) -> set[str]:
    """Keys of the runs that living processes have leased; files of dead ones are deleted."""
    with store.exclusive():
        return set().union(*_living_leases(store, besides=None))


def leases_read_only(store: Store) -> tuple[set[str], set[str]]:
    """Keys of runs that living processes have leased, and that killed ones had; nothing is made, changed or deleted.

    What a killed process had is known until the next one works on the store.
    """
    if os.name != "posix":
        return leased_runs(store), set()
    living, killed = set(), set()
    for path in _locks(store):
        (living if is_locked(path) else killed).update(_read(path.with_suffix(".json")))
    return living, killed - living


def _locks(store: Store) -> list[Path]:
    """Lock files of living and dead processes; whatever else has such a name is passed over."""
    with suppress(OSError):
        return [path for path in (store.folder / FOLDER).glob("*.lock") if stat.S_ISREG(path.lstat().st_mode)]
    return []


def _living_leases(store: Store, besides: str | None) -> list[set[str]]:
    """Keys that each living process has leased; files of dead ones are deleted.

    Args:
        store: The store.
        besides: Name of a process that is passed over, this one.
    """
    living: list[set[str]] = []
    for path in _locks(store):
        if path.stem == besides:
            continue
        lock, listed = FileLock(path), path.with_suffix(".json")
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # a lock that must not be opened may be held by another user's process
            living.append(_read(listed))
            continue
        # The list first: should this process be killed in between, a lock without a list is deleted next time, while a
        # list without a lock would stay for ever.
        _remove(listed)
        lock.release()
        _remove(path)
    return living


def _read(path: Path) -> set[str]:
    """Keys on a list; none if it is not written yet, or damaged."""
    try:
        runs = from_json(read_bounded(path, MARKER_BYTES)).get("runs")
    except (Unreadable, Unsealed):
        return set()
    return {key for key in runs if isinstance(key, str)} if isinstance(runs, list) else set()


def _remove(path: Path) -> None:
    """Delete a file; one that cannot be deleted stays, which harms nothing."""
    with suppress(OSError):
        path.unlink()
