"""Where runs are kept: ``OUT/<experiment>/<key>.parquet``, one file a run, written whole or not at all."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import time_ns

import numpy as np
import polars as pl
from filelock import FileLock

from falign.lab.experiment import index, marker, table
from falign.lab.experiment.catalogue import EMPTY, SUFFIX, Catalogue, keys_of, listed, read_all, together, unchanged
from falign.lab.experiment.entries import FORMAT, Corrupt, Entry, Older, Status, encode, read
from falign.lab.experiment.results import Results
from falign.lab.experiment.specification import PRESETS, Experiment, Task
from falign.lab.text import tell
from falign.lab.writing import RunError, WriteError, free, unwritable, write

_FEW = 500
"""Files that are read anew without an index being written, or asked: it takes some hundredths of a second."""
_PART = 50
"""In a large store an index is written when more than this part of the files has changed."""


def _to_standard_error(message: str) -> None:
    tell(f"falign: {message}", error=True)


@dataclass(frozen=True, kw_only=True)
class Store:
    """A folder of runs, which several processes may read and write at once.

    Args:
        folder: The folder.
        repairs: Whether damaged files are set aside under another name; without it reading a store changes nothing in
            it but its index, which is written where many files had to be read.
        say: Told what a person should know, such as a damaged file.
    """

    folder: Path
    repairs: bool = True
    say: Callable[[str], None] = field(default=_to_standard_error, compare=False)

    def open(self, *, create: bool) -> None:
        """Make sure that the folder is a store.

        Args:
            create: Whether to make it one if there is none, or an empty folder.

        Raises:
            RunError: It is not one, or one of a newer falign, or cannot be made.
        """
        there = marker.version(self.folder)
        if there == 0 and not create:
            raise RunError(f"there are no results in {self.folder}: give another folder with --out, or reproduce")
        if there < FORMAT and create:
            marker.make(self.folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within this context no other process is in it; to be held shortly.

        Raises:
            RunError: The folder cannot be written.
        """
        lock = FileLock(self.folder / ".lock")
        try:
            self.check()  # or the lock would make the folder
            lock.acquire()
        except OSError as error:
            raise unwritable(self.folder, error) from None
        try:
            yield
        finally:
            lock.release()

    def check(self) -> None:
        """Make sure that nobody has deleted the store, be it that an empty folder has its name now.

        Raises:
            WriteError: It is gone.
        """
        if not marker.there(self.folder):
            raise WriteError(
                f"{self.folder} was deleted, or is no longer a store, it has no {marker.NAME}: call again to begin anew"
            )

    def path(self, task: Task) -> Path:
        """The file of a run, there or not."""
        return self.folder / task.experiment / f"{task.key}{SUFFIX}"

    def put(self, entry: Entry, records: pl.DataFrame) -> None:
        """Keep a run, in the place of what was kept of it before.

        Raises:
            WriteError: It cannot be written.
        """
        folder = self.folder / entry.experiment
        self.check()
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"cannot make the folder {folder}: {error.strerror or error}") from None
        write(folder / f"{entry.key}{SUFFIX}", encode(entry, records))

    def entry(self, task: Task) -> Entry | None:
        """What is kept of a run; None if nothing is. A damaged file counts as nothing, and so does an older one.

        Raises:
            RunError: A file is there and cannot be read.
        """
        try:
            entry, _ = read(self.path(task))
            if (entry.key, entry.experiment) != (task.key, task.experiment):
                raise Corrupt(f"it holds the run {entry.key} of {entry.experiment}")
        except (FileNotFoundError, Older):
            return None
        except Corrupt as error:
            self._damaged(self.path(task), error)
            return None
        return entry

    def entries(self, tasks: Sequence[Task]) -> dict[str, Entry]:
        """{key: what is kept of the run}; damaged and older files are named and count as nothing.

        Args:
            tasks: Runs of one experiment.

        Raises:
            RunError: A file is there and cannot be read.
        """
        if not tasks:
            return {}
        found, places, _ = self._found(tasks[0].experiment, tasks[0].revision, [task.key for task in tasks])
        return {tasks[place].key: found.entry(row, tasks[place]) for row, place in enumerate(places)}

    def each(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Status, str | None, pl.DataFrame | None]]:
        """Each run that is there, with its status and message, and its records if it is done.

        Args:
            tasks: Runs of one experiment.

        Raises:
            RunError: A file is there and cannot be read.
        """
        if tasks:
            found, places, _ = self._found(tasks[0].experiment, tasks[0].revision, [task.key for task in tasks])
            told = found.runs.select("status", "message").iter_rows()
            for place, (status, message), records in zip(places, told, found.each(), strict=True):
                yield tasks[place], status, message, records

    def counts(self, experiments: Iterable[Experiment]) -> dict[str, int]:
        """{preset: how many of its runs have a file}; no file is opened."""
        counted: dict[str, int] = dict.fromkeys(PRESETS, 0)
        for experiment in experiments:
            there = keys_of(self.folder / experiment.name)
            for preset in PRESETS if there else ():
                counted[preset] += sum(task.key in there for task in experiment.tasks(preset))
        return counted

    def results(self, experiment: Experiment, preset: str) -> Results:
        """All that is there of an experiment.

        Args:
            experiment: The experiment.
            preset: The preset whose runs are read.

        Returns:
            Its runs, and the records of those that are done.

        Raises:
            RunError: A file is there and cannot be read.
        """
        tasks = experiment.tasks(preset)
        keys = [task.key for task in tasks]
        found, places, others = self._found(experiment.name, experiment.revision, keys, of=experiment)
        return table.results(experiment, preset, tasks, found, places, others)

    def _found(
        self, name: str, revision: int, keys: Sequence[str], *, of: Experiment | None = None
    ) -> tuple[Catalogue, np.ndarray, int]:
        """What is there of runs.

        What the index knows of files that have not changed is taken from it; the others are read.

        Args:
            name: Full name of the experiment.
            revision: Its revision.
            keys: Keys of the runs.
            of: The experiment, if runs of other revisions are to be counted.

        Returns:
            The runs that are there; to which of the keys each belongs, in ascending order; and the number of runs of
            other revisions.
        """
        folder, since = self.folder / name, time_ns()
        files = listed(folder)
        kept = index.load(self.folder, name) if len(files.rows) > _FEW else EMPTY
        kept = kept.take(unchanged(kept, files, revision))
        known = kept.rows()
        new = [key for key in keys if key in files.rows and key not in known]
        foreign: set[str] = set()
        if of is not None and len(files.rows) > sum(key in files.rows for key in keys):
            foreign = files.rows.keys() - {task.key for preset in PRESETS for task in of.tasks(preset)}
        elsewhere = [key for key in foreign if key not in known]
        fresh, wrong = read_all(folder, new, revision)
        found = together([kept, fresh, read_all(folder, elsewhere, revision)[0]])
        if len(new) + len(elsewhere) > max(_FEW, len(files.rows) // _PART):
            index.save(self.folder, name, found, since)
        self._tell(name, wrong)
        rows = found.rows() if new or elsewhere else known
        at = np.array([rows.get(key, -1) for key in keys], dtype=int)
        others = [rows[key] for key in foreign if key in rows]
        differing = int((found.runs["revision"].gather(others) != revision).sum()) if others else 0
        return found.take(at[at >= 0]), np.flatnonzero(at >= 0), differing

    def _tell(self, experiment: str, wrong: Mapping[str, Corrupt | Older]) -> None:
        """Say which files were no runs."""
        older = sum(isinstance(error, Older) for error in wrong.values())
        for key, error in wrong.items():
            if isinstance(error, Corrupt):
                self._damaged(self.folder / experiment / f"{key}{SUFFIX}", error)
        if older:
            which = "1 run is" if older == 1 else f"{older} runs are"
            self.say(f"{experiment}: {which} of an older format: such runs count as missing")

    def _damaged(self, path: Path, why: Corrupt) -> None:
        """Name a damaged file, and set it aside unless another process has put a good one there meanwhile."""
        if not self.repairs:
            self.say(f"{path} is damaged ({why}): the run counts as missing, and falign reproduce computes it again")
            return
        with self.alone():
            if not _spoilt(path):
                return
            aside = free(path.with_name(f"{path.name}.corrupt"))
            try:
                os.replace(path, aside)
                if not _spoilt(path, aside):  # runs are put without the lock: one came between the look and the move
                    if os.path.lexists(path):  # and by now yet another
                        aside.unlink()
                    else:
                        os.replace(aside, path)
                    return
            except OSError as error:
                raise unwritable(path.parent, error) from None
        self.say(f"{path} is damaged ({why}): it is set aside as {aside.name}, and the run counts as missing")


def _spoilt(path: Path, now: Path | None = None) -> bool:
    """Whether the file of a run is damaged, be it that it has another name now."""
    key = path.name.removesuffix(SUFFIX)
    _, wrong = read_all(path.parent, [key], None, (now or path).name.removeprefix(key))
    return any(isinstance(error, Corrupt) for error in wrong.values())
