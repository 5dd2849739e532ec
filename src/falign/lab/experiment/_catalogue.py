"""Many runs at once, as columns: what their files hold, read, put together, selected without a loop over the runs."""

import io
import json
import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from falign.lab._files import RunError
from falign.lab.experiment._run_file import (
    TYPES,
    UNREADABLE,
    WITHOUT_WAITING,
    Corrupt,
    Entry,
    Older,
    Status,
    content_of,
    decode,
)
from falign.lab.experiment._specification import Task

SUFFIX = ".parquet"
STAMP = ("size", "modified", "changed", "inode")
"""What the system knows of a file. If none of it has changed, the file has not; what has just changed is no sign."""
_NONE = (-1,) * len(STAMP)
"""The stamp of what is no regular file."""
_POSITIVE = 2**63 - 1
"""Some systems number files by all 64 bits; tables hold whole numbers with a sign."""
RUNS = {
    "name": pl.String,
    **dict.fromkeys(STAMP, pl.Int64),
    "revision": pl.Int64,
    "status": pl.String,
    "message": pl.String,
    "seconds": pl.Float64,
    "started": pl.String,
    "origin": pl.UInt32,
    "kind": pl.UInt32,
    "rows": pl.Int64,
}
"""Columns of ``Catalogue.runs``: a file and its stamp, then what it holds."""
_LENGTH = 32 + len(SUFFIX)
"""Of the name of a run's file."""
PART = 100_000
"""Records that are copied at once: memory that is given back is used again only if the pieces are small."""
_AT_ONCE = 500
"""Files whose records are decoded together: fewer cost time, more cost memory."""

Columns = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Catalogue:
    """Runs of one experiment, and the records of some.

    Args:
        runs: One row a run, of the columns ``RUNS``: ``origin`` is an index into ``origins``, ``kind`` one into
            ``kinds``, null if the records were not read; ``started`` is JSON.
        origins: Provenances without the time of the start, as JSON.
        kinds: Columns and types of records, as in :class:`~falign.lab.experiment._run_file.Shape`.
        records: One table a kind: its runs' records, in the order of ``runs``.
    """

    runs: pl.DataFrame
    origins: tuple[str, ...] = ()
    kinds: tuple[Columns, ...] = ()
    records: tuple[pl.DataFrame, ...] = ()

    def take(self, places: np.ndarray) -> "Catalogue":
        """Some of the runs in some order, with their records.

        Args:
            places: Indices of rows of ``runs``.
        """
        if len(places) == self.runs.height and bool((places == np.arange(len(places))).all()):
            return self
        kind, rows = self._kind, self.runs["rows"].to_numpy()
        taken = []
        for number, frame in enumerate(self.records):
            ours = kind == number
            ends = np.cumsum(np.where(ours, rows, 0))
            chosen = places[ours[places]]
            taken.append(_ranges(frame, ends[chosen] - rows[chosen], rows[chosen]))
        runs = self.runs[pl.Series(places, dtype=pl.UInt32)]
        return Catalogue(runs=runs, origins=self.origins, kinds=self.kinds, records=tuple(taken))

    def entry(self, place: int, task: Task) -> Entry:
        """The entry of a run.

        Args:
            place: Its row.
            task: The run.
        """
        run = self.runs.row(place, named=True)
        started = {} if run["started"] is None else {"started": json.loads(run["started"])}
        status: Status = run["status"]
        origin = json.loads(self.origins[run["origin"]])
        details = {"message": run["message"], "seconds": run["seconds"], "provenance": {**origin, **started}}
        return Entry.of(task, status, **details)

    def each(self) -> Iterator[pl.DataFrame | None]:
        """The records of one run after the other; None where they were not read."""
        at = [0] * len(self.kinds)
        for kind, rows in self.runs.select("kind", "rows").iter_rows():
            if kind is None:
                yield None
            else:
                yield self.records[kind].slice(at[kind], rows)
                at[kind] += rows

    def spread(self, values: np.ndarray) -> list[np.ndarray]:
        """Values of the runs, repeated for each of their records, kind by kind."""
        kind, rows = self._kind, self.runs["rows"].to_numpy()
        return [np.repeat(values[kind == number], rows[kind == number]) for number in range(len(self.kinds))]

    def rows(self) -> dict[str, int]:
        """{key: row of ``runs``}."""
        names = self.runs["name"].to_list()
        return dict(zip(names, range(len(names)), strict=True))

    @property
    def _kind(self) -> np.ndarray:
        """The kind of each run's records; the number of kinds where they were not read."""
        return self.runs["kind"].fill_null(len(self.kinds)).to_numpy()


EMPTY = Catalogue(runs=pl.DataFrame(schema=RUNS))


def _ranges(frame: pl.DataFrame, starts: np.ndarray, lengths: np.ndarray) -> pl.DataFrame:
    """Rows of a table, range after range."""
    before = np.cumsum(lengths) - lengths
    places = np.repeat((starts - before).astype(np.int32), lengths) + np.arange(int(lengths.sum()), dtype=np.int32)
    whole = len(places) == frame.height and bool((places == np.arange(frame.height)).all())
    return frame if whole else frame[pl.Series(places, dtype=pl.UInt32)]


def together(parts: Sequence[Catalogue]) -> Catalogue:
    """Catalogues of different runs, one after the other."""
    parts = [part for part in parts if part.runs.height]
    if len(parts) < 2:
        return parts[0] if parts else EMPTY
    origins: dict[str, int] = {}
    kinds: dict[Columns, int] = {}
    runs, records = [], {}
    for part in parts:
        origin = [origins.setdefault(each, len(origins)) for each in part.origins]
        kind = [kinds.setdefault(each, len(kinds)) for each in part.kinds]
        renumbered = [_renumbered(part.runs["origin"], origin), _renumbered(part.runs["kind"], kind)]
        runs.append(part.runs.with_columns(renumbered))
        for number, frame in zip(kind, part.records, strict=True):
            records.setdefault(number, []).append(frame)
    return Catalogue(
        runs=pl.concat(runs),
        origins=tuple(origins),
        kinds=tuple(kinds),
        records=tuple(pl.concat(records[number]) for number in range(len(kinds))),
    )


def _renumbered(column: pl.Series, numbers: Sequence[int]) -> pl.Series:
    new = pl.Series(numbers, dtype=pl.UInt32)
    return (new.gather(column) if len(new) else column).alias(column.name)


def keys_of(folder: Path) -> set[str]:
    """Keys of the runs of which there is a file; see :func:`listed`."""
    return {key for key, _ in _scanned(folder)}


@dataclass(frozen=True, eq=False)
class Files:
    """The files of a folder that have the name of a run.

    Args:
        rows: {key: row of ``stamps``}.
        stamps: What ``STAMP`` names, a row each; -1 for what is no regular file: it is never known unchanged.
    """

    rows: Mapping[str, int]
    stamps: np.ndarray


def listed(folder: Path) -> Files:
    """The files of a folder that have the name of a run, with their stamps; no file is opened.

    Args:
        folder: The folder, there or not.

    Raises:
        RunError: The folder cannot be read, or is a file.
    """
    rows, stamps = {}, array("q")
    for key, each in _scanned(folder):
        rows[key] = len(rows)
        stamps.extend(_stamp(each))
    return Files(rows, np.frombuffer(stamps, dtype=np.int64).reshape(-1, len(STAMP)))


def unchanged(kept: Catalogue, files: Files, revision: int) -> np.ndarray:
    """Which runs are known whose files have not changed, in ascending order.

    Args:
        kept: What is known of them.
        files: Their files now.
        revision: The revision of which the records must be known too.
    """
    runs = kept.runs
    if runs.is_empty() or not files.rows:
        return np.array([], dtype=int)
    there = np.array([files.rows.get(key, -1) for key in runs["name"].to_list()])
    known = runs.select(STAMP).to_numpy()
    lacking = pl.col("kind").is_null() & (pl.col("status") == "done") & (pl.col("revision") == revision)
    same = (known == files.stamps[there]).all(axis=1) & (there >= 0) & (known[:, 0] >= 0)
    return np.flatnonzero(same & ~runs.select(lacking).to_series().to_numpy())


def _scanned(folder: Path) -> Iterator[tuple[str, os.DirEntry]]:
    try:
        with _opened(folder) as place, os.scandir(place) as found:
            for each in found:
                name = each.name
                if len(name) == _LENGTH and name.endswith(SUFFIX) and name.isascii():
                    yield name[: -len(SUFFIX)], each
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise RunError(f"{folder} is a file, expected the folder of the runs of {folder.name}: move it away") from None
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error.strerror or error}") from None


@contextmanager
def _opened(folder: Path) -> Iterator[Path | int]:
    """A folder, opened where the system can find files from there: it then need not go the whole path each time."""
    if os.scandir not in os.supports_fd:
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | WITHOUT_WAITING)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _stamp(found: os.DirEntry) -> tuple[int, ...]:
    try:
        known = found.stat(follow_symlinks=False)
    except OSError:  # it has gone meanwhile
        return _NONE
    return _stamp_of(known) if stat.S_ISREG(known.st_mode) else _NONE


def _stamp_of(known: os.stat_result) -> tuple[int, ...]:
    return known.st_size, known.st_mtime_ns, known.st_ctime_ns, known.st_ino & _POSITIVE


def read_all(
    folder: Path, names: Iterable[str], revision: int | None, ending: str = SUFFIX
) -> tuple[Catalogue, dict[str, Corrupt | Older]]:
    """Read files anew, each checked whole; decode the records of those that are done.

    Args:
        folder: The folder of an experiment.
        names: Keys of the runs.
        revision: The revision of which the records are wanted; None is any.
        ending: How the names of their files go on.

    Returns:
        What was read, in the order of the names, without files that are gone meanwhile; and {key: what is wrong}.

    Raises:
        RunError: A file cannot be read, which says nothing about what it holds.
    """
    reader = _Reader(folder, revision, ending)
    for name in names:
        reader.add(name)
    return reader.done(), reader.wrong


class _Reader:
    """Reads files one by one, and decodes their records some thousands at a time."""

    def __init__(self, folder: Path, revision: int | None, ending: str) -> None:
        self._folder, self._revision, self._ending = folder, revision, ending
        self._parts: list[Catalogue] = []
        self._begin()
        self.wrong: dict[str, Corrupt | Older] = {}

    def _begin(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._origins: dict[str, int] = {}
        self._kinds: dict[Columns, list[tuple[str, int, bytes]]] = {}

    def add(self, name: str) -> None:
        try:
            content, known = content_of(os.path.join(self._folder, name + self._ending))
            entry, shape = decode(content)
            if (entry.key, entry.experiment) != (name, self._folder.name):
                raise Corrupt(f"it holds the run {entry.key} of {entry.experiment}")
        except FileNotFoundError:
            return
        except (Corrupt, Older) as error:
            self.wrong[name] = error
            return
        origin = dict(entry.provenance)
        started = json.dumps(origin.pop("started")) if "started" in origin else None
        number = self._origins.setdefault(json.dumps(origin, sort_keys=True), len(self._origins))
        kind = None
        if entry.status == "done" and self._revision in (None, entry.revision):
            alike = self._kinds.setdefault(shape.columns, [])
            alike.append((name, shape.rows, content))
            kind = list(self._kinds).index(shape.columns)
        found = (entry.revision, entry.status, entry.message, entry.seconds, started, number, kind, shape.rows)
        self._rows.append((name, *_stamp_of(known), *found))
        if len(self._rows) >= _AT_ONCE:
            self._end()

    def done(self) -> Catalogue:
        self._end()
        return together(self._parts)

    def _end(self) -> None:
        """Make a catalogue of what was read since the last one."""
        frames = []
        for columns, files in self._kinds.items():
            frame, wrong = _decoded(columns, files)
            frames.append(frame)
            self.wrong.update(wrong)
        rows = [row for row in self._rows if row[0] not in self.wrong]
        self._parts.append(
            Catalogue(
                runs=pl.DataFrame(rows, schema=RUNS, orient="row"),
                origins=tuple(self._origins),
                kinds=tuple(self._kinds),
                records=tuple(frames),
            )
        )
        self._begin()


def _decoded(columns: Columns, files: Sequence[tuple[str, int, bytes]]) -> tuple[pl.DataFrame, dict[str, Corrupt]]:
    """The records of files that should be alike, and {key: why} of those that are not what they say."""
    schema = pl.Schema({name: TYPES[kind] for name, kind in columns})
    filled = [(name, rows, content) for name, rows, content in files if rows and columns]
    if not filled:
        return pl.DataFrame(schema=schema), {}
    try:
        frame = pl.scan_parquet([io.BytesIO(content) for *_, content in filled]).collect().rechunk()
        if frame.schema == schema and frame.height == sum(rows for _, rows, _ in filled):
            return frame, {}
    except UNREADABLE:
        pass
    frames, wrong = [pl.DataFrame(schema=schema)], {}
    for name, rows, content in filled:  # which of them is it?
        try:
            frame = pl.read_parquet(io.BytesIO(content))
        except UNREADABLE as error:
            wrong[name] = Corrupt((str(error).splitlines() or [type(error).__name__])[0])
            continue
        if frame.schema == schema and frame.height == rows:
            frames.append(frame)
        else:
            wrong[name] = Corrupt("its records are not those that its metadata describe")
    return pl.concat(frames), wrong
