"""Where runs are kept: ``OUT/<experiment>/<key>.parquet``, one file a run, written whole or not at all."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from filelock import FileLock

from falign.lab.experiment import marker, table
from falign.lab.experiment.entries import FORMAT, Corrupt, Entry, Older, encode, read
from falign.lab.experiment.results import Results
from falign.lab.experiment.specification import PRESETS, Experiment, Task
from falign.lab.writing import RunError, WriteError, free, unwritable, write


def _to_standard_error(message: str) -> None:
    print(f"falign: {message}", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class Store:
    """A folder of runs, which several processes may read and write at once.

    Args:
        folder: The folder.
        repairs: Whether damaged files are set aside under another name; without it a store that is read is not
            changed.
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
            lock.acquire()
        except OSError as error:
            raise unwritable(self.folder, error) from None
        try:
            yield
        finally:
            lock.release()

    def path(self, task: Task) -> Path:
        """The file of a run, there or not."""
        return self.folder / task.experiment / f"{task.key}.parquet"

    def put(self, entry: Entry, records: pl.DataFrame) -> None:
        """Keep a run, in the place of what was kept of it before.

        Raises:
            WriteError: It cannot be written.
        """
        folder = self.folder / entry.experiment
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"cannot make the folder {folder}: {error.strerror or error}") from None
        write(folder / f"{entry.key}.parquet", encode(entry, records))

    def entry(self, task: Task) -> Entry | None:
        """What is kept of a run; None if nothing is. A damaged file counts as nothing, and so does an older one.

        Raises:
            RunError: A file is there and cannot be read.
        """
        with suppress(Older):
            found = self._read(task)
            return None if found is None else found[0]
        return None

    def entries(self, tasks: Sequence[Task]) -> dict[str, Entry]:
        """{key: what is kept of the run}; damaged and older files are named and count as nothing.

        Raises:
            RunError: A file is there and cannot be read.
        """
        return {key: entry for key, (entry, _) in self._load(tasks).items()}

    def counts(self, experiments: Iterable[Experiment]) -> dict[str, int]:
        """{preset: how many of its runs have a file}; no file is opened."""
        counted: dict[str, int] = dict.fromkeys(PRESETS, 0)
        for experiment in experiments:
            names = self._names(experiment.name)
            for preset in PRESETS:
                counted[preset] += sum(f"{task.key}.parquet" in names for task in experiment.tasks(preset))
        return counted

    def others(self, experiment: Experiment) -> int:
        """Number of runs of other revisions of an experiment, which are never read and never touched."""
        known = {f"{task.key}.parquet" for preset in PRESETS for task in experiment.tasks(preset)}
        number = 0
        for name in self._names(experiment.name) - known:
            with suppress(Corrupt, Older, FileNotFoundError):
                number += read(self.folder / experiment.name / name)[0].revision != experiment.revision
        return number

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
        found = self._load(tasks)
        entries = {key: entry for key, (entry, _) in found.items()}
        alike: dict[str, dict[Path, int]] = {}
        for index, task in enumerate(tasks):
            entry, kind = found.get(task.key, (None, ""))
            if entry is not None and entry.status == "done":
                alike.setdefault(kind, {})[self.path(task)] = index
        return table.results(experiment, preset, tasks, entries, table.records(alike.values()))

    def _names(self, experiment: str) -> set[str]:
        folder = self.folder / experiment
        try:
            return {name for name in os.listdir(folder) if name.endswith(".parquet")}
        except FileNotFoundError:
            return set()
        except NotADirectoryError:
            raise RunError(
                f"{folder} is a file, expected the folder of the runs of {experiment}: move it away"
            ) from None
        except OSError as error:
            raise RunError(f"cannot read {folder}: {error.strerror or error}") from None

    def _load(self, tasks: Sequence[Task]) -> dict[str, tuple[Entry, str]]:
        """{key: the entry, and the kind of its records}, of the files that are whole."""
        names = {name: self._names(name) for name in {task.experiment for task in tasks}}
        found: dict[str, tuple[Entry, str]] = {}
        older: Counter[str] = Counter()
        for task in tasks:
            if f"{task.key}.parquet" not in names[task.experiment]:
                continue
            try:
                kept = self._read(task)
            except Older:
                older[task.experiment] += 1
                continue
            if kept is not None:
                found[task.key] = kept
        for name, number in older.items():
            which = "1 run is" if number == 1 else f"{number} runs are"
            self.say(f"{name}: {which} of an older format, without a checksum: such runs count as missing")
        return found

    def _read(self, task: Task) -> tuple[Entry, str] | None:
        try:
            return self._kept(task)
        except Corrupt as error:
            self._damaged(task, str(error))
            return None

    def _kept(self, task: Task) -> tuple[Entry, str] | None:
        try:
            entry, kind = read(self.path(task))
        except FileNotFoundError:
            return None
        if (entry.key, entry.experiment) != (task.key, task.experiment):
            raise Corrupt(f"it holds the run {entry.key} of {entry.experiment}")
        return entry, kind

    def _damaged(self, task: Task, why: str) -> None:
        """Name a damaged file, and set it aside unless another process has put a good one there meanwhile."""
        path = self.path(task)
        if not self.repairs:
            self.say(f"{path} is damaged ({why}): the run counts as missing, and falign reproduce computes it again")
            return
        with self.alone():
            try:
                self._kept(task)
            except Corrupt:
                aside = free(path.with_name(f"{path.name}.corrupt"))
                try:
                    os.replace(path, aside)
                except OSError as error:
                    raise unwritable(path.parent, error) from None
                self.say(f"{path} is damaged ({why}): it is set aside as {aside.name}, and the run counts as missing")
