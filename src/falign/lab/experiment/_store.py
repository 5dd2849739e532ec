"""Where runs are kept: ``OUT/<experiment>/<key>.parquet``, one file a run, written whole or not at all."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from falign.lab.experiment._catalogue import EMPTY, SUFFIX, Catalogue, keys_of, listed, read_all, together, unchanged
from falign.lab.experiment._results import Results
from falign.lab.experiment._run_file import FORMAT, Corrupt, Entry, Older, Status, encode, read_run, series
from falign.lab.experiment._specification import PRESETS, Experiment, Task

# The marker of a store, ``OUT/falign.json``: what makes a folder one, and of which format it is.

MARKER = "falign.json"
MARKER_BYTES = 2**26
"""Bytes of a marker, or of a list of runs: a file that is larger is something else."""


def store_format(folder: Path) -> int:
    """The format of a store; 0 if there is none yet. Nothing is written.

    Args:
        folder: The store's folder, there or not.

    Raises:
        RunError: The folder is not a store and cannot become one, or is one of a newer falign.
    """
    marker = folder / MARKER
    try:
        if os.path.lexists(marker):
            return _read_marker(marker)
        if folder.exists() and not _empty(folder):
            # Another process may have made the store since: its marker is there before anything else is.
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
    """Make a folder a store of the format that is written now.

    Args:
        folder: Its folder; made if there is none.

    Raises:
        RunError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from None
    atomic_write(folder / MARKER, to_json({"format": FORMAT}))


def is_store(folder: Path) -> bool:
    """Whether a folder has a marker, be it a damaged one: without it a store was deleted, and is no longer ours."""
    return os.path.lexists(folder / MARKER)


def _empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or just the marker that another process is writing."""
    return folder.is_dir() and all(path.name == MARKER or path in leftovers(folder) for path in folder.iterdir())


def _read_marker(marker: Path) -> int:
    try:
        found = from_json(read_bounded(marker, MARKER_BYTES)).get("format")
    except (Unsealed, Unreadable) as error:
        raise _unreadable(marker, str(error)) from None
    if type(found) is not int or found < 1:
        raise _unreadable(marker, "it tells no format")
    if found > FORMAT:
        raise RunError(
            f"{marker.parent} was written by a newer falign (format {found}, this one knows {FORMAT}): "
            "update falign, or give another folder with --out"
        )
    return found


def _unreadable(marker: Path, why: str) -> RunError:
    return RunError(f"{marker} cannot be read ({why}): restore it, or give another folder with --out")


def _unusable(folder: Path, error: OSError) -> RunError:
    return RunError(f"cannot use {folder}: {error.strerror or error}; give another folder with --out")


# From the runs of a store to the tables that figures and claims read.


def results(
    experiment: Experiment,
    preset: str,
    tasks: Sequence[Task],
    found: Catalogue,
    places: np.ndarray,
    others: int = 0,
) -> Results:
    """Put together what is there of an experiment.

    Args:
        experiment: The experiment.
        preset: The preset.
        tasks: All its runs.
        found: Those that are there, in the order of ``tasks``.
        places: Which task each of them is.
        others: Number of runs of other revisions.

    Returns:
        The results, both tables in the order of the tasks.
    """
    points = pl.DataFrame([*_points(tasks), series("seed", [task.seed for task in tasks])])
    there = np.full(len(tasks), found.runs.height)  # of those that are not, a row of nulls
    there[places] = np.arange(len(places))
    told = found.runs.select("status", "message", "seconds")
    kept = pl.concat([told, told.clear(1)])[pl.Series(there, dtype=pl.UInt32)]
    runs = pl.DataFrame(
        [
            pl.Series("key", [task.key for task in tasks], dtype=pl.String),
            *points.get_columns(),
            kept["status"].fill_null("missing"),
            kept["message"],
            kept["seconds"],
        ]
    )
    return Results(
        experiment=experiment,
        preset=preset,
        table=_records(points, found, places.astype(np.uint32)),
        runs=runs,
        provenance=tuple(origin for text in _origins(found) if (origin := json.loads(text))),
        others=others,
    )


def _records(points: pl.DataFrame, found: Catalogue, places: np.ndarray) -> pl.DataFrame:
    """The records of all runs beside their points and seeds.

    Args:
        points: The point and seed of each task.
        found: The runs that are there.
        places: Which task each of them is.
    """
    kinds = found.runs["kind"].drop_nulls().unique(maintain_order=True)
    owners = found.spread(places)
    frames = [found.records[kind] for kind in kinds]
    if not any(frame.height for frame in frames):
        return points.clear()
    owner = np.concatenate([owners[kind] for kind in kinds])
    records = frames[0] if len(frames) == 1 else _united(frames)
    if (owner[1:] < owner[:-1]).any():  # runs of several kinds take turns
        order = np.argsort(owner, kind="stable")
        owner, records = owner[order], records[pl.Series(order, dtype=pl.UInt32)]
    same = [axis for axis in points.columns if points[axis].n_unique() == 1]
    # A table may be large: what is the same in all rows is kept once, and the pieces that the records are in are not
    # copied into one.
    parts, at = [], 0
    for length in records.to_series(0).chunk_lengths():
        beside = points.drop(same)[pl.Series(owner[at : at + length])]
        parts.append(pl.concat([beside, records.slice(at, length)], how="horizontal"))
        at += length
    whole = pl.concat(parts).with_columns(pl.lit(points[axis][0], points[axis].dtype).alias(axis) for axis in same)
    return whole.select(*points.columns, *records.columns)


def _united(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Tables one below the other, each column of a type that holds what all of them have.

    Whole numbers beside others become such if each is equal to one; else, and where numbers are beside texts or truth
    values, all become texts, which no claim takes for numbers.
    """
    kinds: dict[str, set[Any]] = {}
    for frame in frames:
        for name, kind in frame.schema.items():
            kinds.setdefault(name, set()).add(kind)
    for name, found in kinds.items():
        if {pl.Int64(), pl.Float64()} <= found and not all(_survives(frame[name]) for frame in frames if name in frame):
            found.add(pl.String())
    common = {name: _common(found - {pl.Null()}) for name, found in kinds.items()}
    return pl.concat([frame.cast({name: common[name] for name in frame.columns}) for frame in frames], how="diagonal")


def _common(kinds: set[Any]) -> Any:  # of types of polars, which cannot be checked as annotations
    if len(kinds) < 2:
        return next(iter(kinds), pl.Null())
    return pl.Float64() if kinds == {pl.Int64(), pl.Float64()} else pl.String()


def _survives(column: pl.Series) -> bool:
    """Whether each number of a column, if it is one of whole numbers, is equal to a float."""
    if column.dtype != pl.Int64:
        return True
    return column.cast(pl.Float64).cast(pl.Int64, strict=False).equals(column, null_equal=True)


def _points(tasks: Sequence[Task]) -> list[pl.Series]:
    """One column an axis; null where a point lacks the axis."""
    axes = dict.fromkeys(axis for task in tasks for axis in task.point)
    return [series(axis, [task.point.get(axis) for task in tasks]) for axis in axes]


def _origins(found: Catalogue) -> list[str]:
    """The distinct provenances, in the order of the runs."""
    return [found.origins[number] for number in found.runs["origin"].unique(maintain_order=True)]


_FEW = 500
"""Files that are read anew without an index being written, or asked: it takes some hundredths of a second."""
_PART = 50
"""In a large store an index is written when more than this part of the files has changed."""


def _to_standard_error(message: str) -> None:
    echo(f"falign: {message}", error=True)


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
        there = store_format(self.folder)
        if there == 0 and not create:
            raise RunError(f"there are no results in {self.folder}: give another folder with --out, or reproduce")
        if there < FORMAT and create:
            make_store(self.folder)

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
        if not is_store(self.folder):
            raise WriteError(
                f"{self.folder} was deleted, or is no longer a store, it has no {MARKER}: call again to begin anew"
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
        atomic_write(folder / f"{entry.key}{SUFFIX}", encode(entry, records))

    def entry(self, task: Task) -> Entry | None:
        """What is kept of a run; None if nothing is. A damaged file counts as nothing, and so does an older one.

        Raises:
            RunError: A file is there and cannot be read.
        """
        try:
            entry, _ = read_run(self.path(task))
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
        return results(experiment, preset, tasks, found, places, others)

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
        kept = _index.load(self.folder, name) if len(files.rows) > _FEW else EMPTY
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
            _index.save(self.folder, name, found, since)
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
            aside = unused_path(path.with_name(f"{path.name}.corrupt"))
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
