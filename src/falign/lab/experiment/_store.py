"""Store of runs: ``OUT/<experiment>/<key>.parquet``, one file a run, written whole or not at all.

The files are the only truth. Any of them may be damaged, by a power cut, a full disk or a bad copy: its checksum tells,
the file is set aside under another name, and the run counts as missing and is computed again. What is kept beside them,
the index (``_index.py``) and the leases (``_leases.py``), can be deleted at any time.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import time_ns
from typing import Any

import numpy as np
import polars as pl
from filelock import FileLock

from falign.lab._files import (
    RunError,
    Unreadable,
    Unsealed,
    WriteError,
    atomic_write,
    from_json,
    leftovers,
    read_bounded,
    to_json,
    unused_path,
    unwritable,
)
from falign.lab._text import echo
from falign.lab.experiment import _index
from falign.lab.experiment._catalogue import (
    EMPTY,
    SUFFIX,
    Catalogue,
    concat,
    list_run_files,
    read_runs,
    stored_keys,
    unchanged,
)
from falign.lab.experiment._results import Results
from falign.lab.experiment._run_file import FORMAT, CorruptRun, OlderFormat, Status, StoredRun, encode, read_run, series
from falign.lab.experiment._specification import PRESETS, Experiment, Task

# The marker ``OUT/falign.json``: it makes a folder a store, and tells the format of its files.

MARKER = "falign.json"
MARKER_BYTES = 2**26
"""Bytes of a marker or of a list of leases; a larger file is something else."""


def store_format(folder: Path) -> int:
    """Read the format of a store; 0 if there is none yet. Nothing is written.

    Args:
        folder: The store's folder; it need not exist.

    Raises:
        RunError: The folder holds something else, or a store of a newer falign.
    """
    marker = folder / MARKER
    try:
        if os.path.lexists(marker):
            return _read_marker(marker)
        if folder.exists() and not _empty(folder):
            # Another process may have made the store since the first look: its marker is there before anything else.
            if os.path.lexists(marker):
                return _read_marker(marker)
            raise RunError(
                f"{folder} is an output folder that is not ours, it has no {MARKER}: "
                "give a new or an empty folder with --out"
            )
    except OSError as error:
        raise _unusable(folder, error) from None
    return 0


def make_store(folder: Path) -> None:
    """Make a folder a store of the current format.

    Args:
        folder: The folder; made if there is none.

    Raises:
        RunError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from None
    atomic_write(folder / MARKER, to_json({"format": FORMAT}))


def is_store(folder: Path) -> bool:
    """Test for a marker, even a damaged one: nothing is written in a store that has lost it."""
    return os.path.lexists(folder / MARKER)


def _empty(folder: Path) -> bool:
    """Test for a folder that holds nothing, or just the marker that another process is writing."""
    return folder.is_dir() and all(path.name == MARKER or path in leftovers(folder) for path in folder.iterdir())


def _read_marker(marker: Path) -> int:
    try:
        version = from_json(read_bounded(marker, MARKER_BYTES)).get("format")
    except (Unsealed, Unreadable) as error:
        raise _unreadable(marker, str(error)) from None
    if type(version) is not int or version < 1:
        raise _unreadable(marker, "it tells no format")
    if version > FORMAT:
        raise RunError(
            f"{marker.parent} was written by a newer falign (format {version}, this one knows {FORMAT}): "
            "update falign, or give another folder with --out"
        )
    return version


def _unreadable(marker: Path, why: str) -> RunError:
    return RunError(f"{marker} cannot be read ({why}): restore it, or give another folder with --out")


def _unusable(folder: Path, error: OSError) -> RunError:
    return RunError(f"cannot use {folder}: {error.strerror or error}; give another folder with --out")


# From the runs of a store to the tables that figures and claims read.


def collect_results(
    experiment: Experiment,
    preset: str,
    tasks: Sequence[Task],
    stored: Catalogue,
    positions: np.ndarray,
    others: int = 0,
) -> Results:
    """Join the stored runs of an experiment with its points to the two tables of its results.

    Args:
        experiment: The experiment.
        preset: The preset.
        tasks: All its runs.
        stored: Those that are stored, in the order of ``tasks``.
        positions: Index in ``tasks`` of each stored run.
        others: Number of stored runs of other revisions.

    Returns:
        The results, both tables in the order of the tasks.
    """
    points = pl.DataFrame([*_points(tasks), series("seed", [task.seed for task in tasks])])
    rows = np.full(len(tasks), stored.runs.height)  # missing runs get the row after the last one, which is of nulls
    rows[positions] = np.arange(len(positions))
    endings = stored.runs.select("status", "message", "seconds")
    endings = pl.concat([endings, endings.clear(1)])[pl.Series(rows, dtype=pl.UInt32)]
    runs = pl.DataFrame(
        [
            pl.Series("key", [task.key for task in tasks], dtype=pl.String),
            *points.get_columns(),
            endings["status"].fill_null("missing"),
            endings["message"],
            endings["seconds"],
        ]
    )
    return Results(
        experiment=experiment,
        preset=preset,
        table=_records_table(points, stored, positions.astype(np.uint32)),
        runs=runs,
        provenance=tuple(origin for text in _origins(stored) if (origin := json.loads(text))),
        others=others,
    )


def _records_table(points: pl.DataFrame, stored: Catalogue, positions: np.ndarray) -> pl.DataFrame:
    """Table of the records of all stored runs, beside their points and seeds.

    Args:
        points: Point and seed of each task.
        stored: The stored runs.
        positions: Index of the task of each.
    """
    layouts = stored.runs["layout"].drop_nulls().unique(maintain_order=True)
    repeated = stored.repeat(positions)
    frames = [stored.records[layout] for layout in layouts]
    if not any(frame.height for frame in frames):
        return points.clear()
    task_of_record = np.concatenate([repeated[layout] for layout in layouts])
    records = frames[0] if len(frames) == 1 else concat_layouts(frames)
    if (task_of_record[1:] < task_of_record[:-1]).any():  # runs of several layouts alternate
        order = np.argsort(task_of_record, kind="stable")
        task_of_record, records = task_of_record[order], records[pl.Series(order, dtype=pl.UInt32)]
    constant = [axis for axis in points.columns if points[axis].n_unique() == 1]
    # The table may have millions of rows: a constant axis is a literal, and the chunks that the records are in are
    # joined one by one instead of being copied into one.
    parts, start = [], 0
    for length in records.to_series(0).chunk_lengths():
        beside = points.drop(constant)[pl.Series(task_of_record[start : start + length])]
        parts.append(pl.concat([beside, records.slice(start, length)], how="horizontal"))
        start += length
    whole = pl.concat(parts).with_columns(pl.lit(points[axis][0], points[axis].dtype).alias(axis) for axis in constant)
    return whole.select(*points.columns, *records.columns)


def concat_layouts(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Concatenate tables of different columns, each column of a type that holds what all of them have.

    polars takes whole numbers beside floats for floats, and truth values beside numbers for numbers. Here columns
    become texts, which no claim takes for numbers, if a whole number would be rounded, or if truth values or texts are
    beside something else.
    """
    types: dict[str, set[Any]] = {}
    for frame in frames:
        for name, dtype in frame.schema.items():
            types.setdefault(name, set()).add(dtype)
    texts = set()
    for name, column_types in types.items():
        column_types.discard(pl.Null())
        numbers = column_types == {pl.Int64(), pl.Float64()}
        exact = numbers and all(_is_exact_as_float(frame[name]) for frame in frames if name in frame)
        if len(column_types) > 1 and not exact:
            texts.add(name)
    frames = [frame.cast({name: pl.String() for name in texts.intersection(frame.columns)}) for frame in frames]
    return pl.concat(frames, how="diagonal_relaxed")


def _is_exact_as_float(column: pl.Series) -> bool:
    """Test whether every whole number of a column is equal to a float; so are numbers of any other type."""
    if column.dtype != pl.Int64:
        return True
    return column.cast(pl.Float64).cast(pl.Int64, strict=False).equals(column, null_equal=True)


def _points(tasks: Sequence[Task]) -> list[pl.Series]:
    """Columns of the points, one an axis; null where a point lacks the axis."""
    axes = dict.fromkeys(axis for task in tasks for axis in task.point)
    return [series(axis, [task.point.get(axis) for task in tasks]) for axis in axes]


def _origins(stored: Catalogue) -> list[str]:
    """Distinct provenances as JSON, in the order of the runs."""
    return [stored.origins[number] for number in stored.runs["origin"].unique(maintain_order=True)]


# The store itself.

_FEW = 500
"""Files that are read anew without an index being read or written: it takes some hundredths of a second."""
_FRACTION = 50
"""The index of a large store is written when more than one in so many of its files was not in it."""


def _to_standard_error(message: str) -> None:
    echo(f"falign: {message}", error=True)


@dataclass(frozen=True, kw_only=True)
class Store:
    """A folder of runs, which several processes may read and write at once.

    Args:
        folder: The folder.
        repairs: Whether damaged files are set aside under another name. If not, reading a store changes nothing in it
            but its index, which is written where many files had to be read.
        log: Called with what a person should know, such as a damaged file.
    """

    folder: Path
    repairs: bool = True
    log: Callable[[str], None] = field(default=_to_standard_error, compare=False)

    def open(self, *, create: bool) -> None:
        """Make sure that the folder is a store.

        Args:
            create: Whether to make it one if it does not exist or is empty.

        Raises:
            RunError: It is not one, or one of a newer falign, or cannot be made.
        """
        there = store_format(self.folder)
        if there == 0 and not create:
            raise RunError(f"there are no results in {self.folder}: give another folder with --out, or reproduce")
        if there < FORMAT and create:
            make_store(self.folder)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes out of this context; to be held for milliseconds.

        Raises:
            RunError: The folder cannot be written.
        """
        lock = FileLock(self.folder / ".lock")
        try:
            self.check()  # taking the lock would make the folder of a deleted store again
            lock.acquire()
        except OSError as error:
            raise unwritable(self.folder, error) from None
        try:
            yield
        finally:
            lock.release()

    def check(self) -> None:
        """Make sure that nobody has deleted the store, even if a new folder has its name now.

        Raises:
            WriteError: It was deleted.
        """
        if not is_store(self.folder):
            raise WriteError(
                f"{self.folder} was deleted, or is no longer a store, it has no {MARKER}: call again to begin anew"
            )

    def path(self, task: Task) -> Path:
        """Path of the file of a run, which need not exist."""
        return self.folder / task.experiment / f"{task.key}{SUFFIX}"

    def put(self, run: StoredRun, records: pl.DataFrame) -> None:
        """Write the file of a run; one that is there is replaced.

        Raises:
            WriteError: It cannot be written.
        """
        folder = self.folder / run.experiment
        self.check()
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"cannot make the folder {folder}: {error.strerror or error}") from None
        atomic_write(folder / f"{run.key}{SUFFIX}", encode(run, records))

    def get(self, task: Task) -> StoredRun | None:
        """Read a run without its records; None if it is missing, damaged or of an older format.

        Raises:
            RunError: The file is there and cannot be read.
        """
        try:
            run, _ = read_run(self.path(task))
            if (run.key, run.experiment) != (task.key, task.experiment):
                raise CorruptRun(f"it holds the run {run.key} of {run.experiment}")
        except (FileNotFoundError, OlderFormat):
            return None
        except CorruptRun as error:
            self._set_aside(self.path(task), error)
            return None
        return run

    def get_all(self, tasks: Sequence[Task]) -> dict[str, StoredRun]:
        """Read runs without their records: {key: run} of those that are there; damaged and older files are named.

        Args:
            tasks: Runs of one experiment.

        Raises:
            RunError: A file is there and cannot be read.
        """
        if not tasks:
            return {}
        stored, positions, _ = self._load(tasks[0].experiment, tasks[0].revision, [task.key for task in tasks])
        return {tasks[i].key: stored.stored_run(row, tasks[i]) for row, i in enumerate(positions)}

    def iterate(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Status, str | None, pl.DataFrame | None]]:
        """Iterate over the runs that are there: task, status, message, and the records of those that are done.

        Args:
            tasks: Runs of one experiment.

        Raises:
            RunError: A file is there and cannot be read.
        """
        if tasks:
            stored, positions, _ = self._load(tasks[0].experiment, tasks[0].revision, [task.key for task in tasks])
            endings = stored.runs.select("status", "message").iter_rows()
            for i, (status, message), records in zip(positions, endings, stored.iterate_records(), strict=True):
                yield tasks[i], status, message, records

    def there(self, experiment: Experiment) -> dict[str, set[str]]:
        """Find the runs of an experiment that have a file: {preset: their keys}; no file is opened."""
        stored = stored_keys(self.folder / experiment.name)
        return {
            preset: {task.key for task in experiment.tasks(preset) if task.key in stored} if stored else set()
            for preset in PRESETS
        }

    def results(self, experiment: Experiment, preset: str) -> Results:
        """Read all that is there of an experiment.

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
        stored, positions, others = self._load(experiment.name, experiment.revision, keys, of=experiment)
        return collect_results(experiment, preset, tasks, stored, positions, others)

    def _load(
        self, name: str, revision: int, keys: Sequence[str], *, of: Experiment | None = None
    ) -> tuple[Catalogue, np.ndarray, int]:
        """Load the runs that are there: unchanged files from the index, the others by reading them.

        Args:
            name: Full name of the experiment.
            revision: Its revision.
            keys: Keys of the runs.
            of: The experiment, if runs of other revisions are to be counted.

        Returns:
            The runs that are there; index in ``keys`` of each, in ascending order; number of runs of other revisions.
        """
        folder, since = self.folder / name, time_ns()
        files = list_run_files(folder)
        indexed = _index.load(self.folder, name) if len(files.rows) > _FEW else EMPTY
        indexed = indexed.select(unchanged(indexed, files, revision))
        indexed_rows = indexed.rows()
        new = [key for key in keys if key in files.rows and key not in indexed_rows]
        # Files that belong to no preset: of other revisions, or left by grids that have changed since.
        foreign: set[str] = set()
        if of is not None and len(files.rows) > sum(key in files.rows for key in keys):
            foreign = files.rows.keys() - {task.key for preset in PRESETS for task in of.tasks(preset)}
        new_foreign = [key for key in foreign if key not in indexed_rows]
        fresh, unusable = read_runs(folder, new, revision)
        stored = concat([indexed, fresh, read_runs(folder, new_foreign, revision)[0]])
        if len(new) + len(new_foreign) > max(_FEW, len(files.rows) // _FRACTION):
            _index.save(self.folder, name, stored, since)
        self._handle_unusable(name, unusable)
        rows = stored.rows() if new or new_foreign else indexed_rows
        row_of_key = np.array([rows.get(key, -1) for key in keys], dtype=int)
        foreign_rows = [rows[key] for key in foreign if key in rows]
        others = int((stored.runs["revision"].gather(foreign_rows) != revision).sum()) if foreign_rows else 0
        return stored.select(row_of_key[row_of_key >= 0]), np.flatnonzero(row_of_key >= 0), others

    def _handle_unusable(self, experiment: str, unusable: Mapping[str, CorruptRun | OlderFormat]) -> None:
        """Set damaged files aside, and say how many are of an older format."""
        older = sum(isinstance(error, OlderFormat) for error in unusable.values())
        for key, error in unusable.items():
            if isinstance(error, CorruptRun):
                self._set_aside(self.folder / experiment / f"{key}{SUFFIX}", error)
        if older:
            which = "1 run is" if older == 1 else f"{older} runs are"
            self.log(f"{experiment}: {which} of an older format: such runs count as missing")

    def _set_aside(self, path: Path, why: CorruptRun) -> None:
        """Name a damaged file, and set it aside unless another process has written a good one there meanwhile.

        Setting aside excludes other processes that set aside, but not those that write runs, which take no lock. So the
        file is looked at again before it is moved, and once more after it was.
        """
        if not self.repairs:
            self.log(f"{path} is damaged ({why}): the run counts as missing, and falign reproduce computes it again")
            return
        with self.exclusive():
            if not _is_corrupt(path):
                return
            aside = unused_path(path.with_name(f"{path.name}.corrupt"))
            try:
                os.replace(path, aside)
                if not _is_corrupt(path, aside):  # a good file was written between the look and the move
                    if os.path.lexists(path):  # and by now yet another one: they are the same
                        aside.unlink()
                    else:
                        os.replace(aside, path)
                    return
            except OSError as error:
                raise unwritable(path.parent, error) from None
        self.log(f"{path} is damaged ({why}): it is set aside as {aside.name}, and the run counts as missing")


def _is_corrupt(path: Path, moved: Path | None = None) -> bool:
    """Test for a damaged file of a run, which may have been moved to another name in its folder."""
    key = path.name.removesuffix(SUFFIX)
    _, unusable = read_runs(path.parent, [key], None, (moved or path).name.removeprefix(key))
    return any(isinstance(error, CorruptRun) for error in unusable.values())
