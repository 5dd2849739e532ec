"""Where runs are kept: ``OUT/<experiment>/<key>.parquet``, one file a run, written whole or not at all."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from filelock import FileLock

from falign.lab.experiment import table
from falign.lab.experiment.entries import FORMAT, UNREADABLE, Corrupt, Entry, encode, read, read_records
from falign.lab.experiment.results import Results
from falign.lab.experiment.specification import Experiment, Task
from falign.lab.writing import RunError, leftovers, write

MARKER = "falign.json"
_FILE = "__file__"


def _to_standard_error(message: str) -> None:
    print(f"falign: {message}", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class Store:
    """A folder of runs, which several processes may read and write at once.

    Args:
        folder: The folder.
        say: Told what a person should know, such as a damaged file.
    """

    folder: Path
    say: Callable[[str], None] = field(default=_to_standard_error, compare=False)

    def open(self, *, create: bool) -> None:
        """Make sure that the folder is a store.

        Args:
            create: Whether to make it one if there is none, or an empty folder.

        Raises:
            RunError: It is not one, or one of a newer falign, or cannot be made.
        """
        marker = self.folder / MARKER
        try:
            if marker.exists():
                self._check(marker)
                return
            if self.folder.exists() and not self._empty():
                raise RunError(
                    f"{self.folder} is an output folder that is not ours, it has no {MARKER}: "
                    "give a new or an empty folder with --out"
                )
            if not create:
                raise RunError(f"there are no results in {self.folder}: give another folder with --out, or reproduce")
            self.folder.mkdir(parents=True, exist_ok=True)
            write(marker, json.dumps({"format": FORMAT}).encode())
        except OSError as error:
            raise RunError(
                f"cannot use {self.folder}: {error.strerror or error}; give another folder with --out"
            ) from None

    def _empty(self) -> bool:
        """Whether the folder holds nothing, or just the marker that another process is writing."""
        return self.folder.is_dir() and all(
            path.name == MARKER or path in leftovers(self.folder) for path in self.folder.iterdir()
        )

    def _check(self, marker: Path) -> None:
        try:
            version = json.loads(marker.read_text(encoding="utf-8"))["format"]
            newer = version > FORMAT
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{marker} cannot be read: restore it, or give another folder with --out") from None
        if newer:
            raise RunError(
                f"{self.folder} was written by a newer falign (format {version}, this one knows {FORMAT}): "
                "update falign, or give another folder with --out"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within this context no other process is in it; to be held shortly."""
        with FileLock(self.folder / ".lock"):
            yield

    def path(self, task: Task) -> Path:
        """The file of a run, there or not."""
        return self.folder / task.experiment / f"{task.key}.parquet"

    def put(self, entry: Entry, records: pl.DataFrame) -> None:
        """Keep a run, in the place of what was kept of it before.

        Raises:
            WriteError: It cannot be written.
        """
        folder = self.folder / entry.experiment
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{entry.key}.parquet", encode(entry, records))

    def entry(self, task: Task) -> Entry | None:
        """What is kept of a run; None if nothing is. A damaged file is set aside and counts as nothing."""
        found = self._read(task)
        return None if found is None else found[0]

    def entries(self, tasks: Sequence[Task]) -> dict[str, Entry]:
        """{key: what is kept of the run}, all files read whole; damaged ones are set aside and count as nothing."""
        return self._load(tasks)[0]

    def others(self, experiment: Experiment) -> int:
        """Number of runs of other revisions of an experiment, which are never read and never touched."""
        count = 0
        for name in self._names(experiment.name):
            with suppress(Corrupt, FileNotFoundError):
                count += read(self.folder / experiment.name / name)[0].revision != experiment.revision
        return count

    def results(self, experiment: Experiment, preset: str) -> Results:
        """All that is there of an experiment.

        Args:
            experiment: The experiment.
            preset: The preset whose runs are read.

        Returns:
            Its runs, and the records of those that are done.
        """
        tasks = experiment.tasks(preset)
        entries, records = self._load(tasks)
        return table.results(experiment, preset, tasks, entries, records)

    def _names(self, experiment: str) -> set[str]:
        with suppress(FileNotFoundError, NotADirectoryError):
            return {name for name in os.listdir(self.folder / experiment) if name.endswith(".parquet")}
        return set()

    def _load(self, tasks: Sequence[Task]) -> tuple[dict[str, Entry], pl.DataFrame]:
        """Entries by key, and the records of the runs that are done, with their index in ``tasks``."""
        names = {name: self._names(name) for name in {task.experiment for task in tasks}}
        entries: dict[str, Entry] = {}
        alike: dict[str, dict[int, Task]] = {}
        for index, task in enumerate(tasks):
            if f"{task.key}.parquet" in names[task.experiment] and (found := self._read(task)) is not None:
                entries[task.key] = found[0]
                if found[0].status == "done":
                    alike.setdefault(found[1], {})[index] = task
        frames = [self._records(group, entries) for group in alike.values()]
        return entries, pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()

    def _records(self, tasks: Mapping[int, Task], entries: dict[str, Entry]) -> pl.DataFrame:
        """The records of runs whose columns are alike, by one scan; file by file if one of them is damaged."""
        paths = {str(self.path(task)): index for index, task in tasks.items()}
        try:
            records = pl.scan_parquet(list(paths), include_file_paths=_FILE, glob=False).collect()
        except UNREADABLE:
            for task in tasks.values():
                try:
                    read_records(self.path(task))
                except Corrupt as error:
                    self._set_aside(task, str(error))
                    del entries[task.key]
            kept = {index: task for index, task in tasks.items() if task.key in entries}
            if len(kept) == len(tasks):
                raise
            return self._records(kept, entries) if kept else pl.DataFrame()
        order = pl.DataFrame({_FILE: list(paths), table.INDEX: list(paths.values())})
        return records.join(order, on=_FILE, how="left", maintain_order="left").drop(_FILE)

    def _read(self, task: Task) -> tuple[Entry, str] | None:
        path = self.path(task)
        try:
            entry, columns = read(path)
            if (entry.key, entry.experiment) != (task.key, task.experiment):
                raise Corrupt(f"it holds the run {entry.key} of {entry.experiment}")
        except FileNotFoundError:
            return None
        except Corrupt as error:
            return self._set_aside(task, str(error))
        return entry, columns

    def _set_aside(self, task: Task, why: str) -> None:
        """Rename a damaged file, unless another process has put a good one there meanwhile."""
        path = self.path(task)
        with self.alone(), suppress(FileNotFoundError):
            with suppress(Corrupt):
                entry, _ = read(path)
                read_records(path)
                if (entry.key, entry.experiment) == (task.key, task.experiment):
                    return
            aside = path.with_name(f"{path.name}.corrupt")
            os.replace(path, aside)
            self.say(f"{path} is damaged ({why}): it is set aside as {aside.name}, and the run counts as missing")
