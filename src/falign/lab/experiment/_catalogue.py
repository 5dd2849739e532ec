"""Many runs at once, as tables: their files are read, concatenated and selected without a loop over the runs."""

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
    COLUMN_TYPES,
    NONBLOCKING,
    PARQUET_ERRORS,
    CorruptRun,
    OlderFormat,
    Status,
    StoredRun,
    decode,
    read_regular_file,
)
from falign.lab.experiment._specification import Task

SUFFIX = ".parquet"
STAMP = ("size", "modified", "changed", "inode")
"""Columns of a file's stamp, what the system knows of it. A file of the same stamp has not changed, unless it was
read within a tick of the file system's clock after it was written: see ``_RACY`` in ``_index.py``."""
_NO_STAMP = (-1,) * len(STAMP)
"""Stamp of what is no regular file."""
_INODE_MASK = 2**63 - 1
"""Some systems number files by all 64 bits; tables hold whole numbers with a sign."""
RUN_COLUMNS = {
    "name": pl.String,
    **dict.fromkeys(STAMP, pl.Int64),
    "revision": pl.Int64,
    "status": pl.String,
    "message": pl.String,
    "seconds": pl.Float64,
    "started": pl.String,
    "origin": pl.UInt32,
    "layout": pl.UInt32,
    "rows": pl.Int64,
}
"""Columns of ``Catalogue.runs``: a file and its stamp, then what the file says of the run."""
_NAME_LENGTH = 32 + len(SUFFIX)
"""Length of the name of a run's file."""
CHUNK_ROWS = 100_000
"""Records that are copied at once: freed memory is used again only if the pieces are small."""
_BATCH = 500
"""Files whose records are decoded together: fewer cost time, more cost memory."""

Columns = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Catalogue:
    """Runs of one experiment, and the records of some.

    Args:
        runs: One row a run, of the columns ``RUN_COLUMNS``: ``origin`` is an index into ``origins``, ``layout`` one
            into ``layouts``, null if the records were not read; ``started`` is JSON.
        origins: Provenances without the time of the start, as JSON.
        layouts: Columns and types of records, as in :class:`~falign.lab.experiment._run_file.RecordsShape`;
            experiments may leave other columns at other points.
        records: One table a layout: its runs' records, in the order of ``runs``.
    """

    runs: pl.DataFrame
    origins: tuple[str, ...] = ()
    layouts: tuple[Columns, ...] = ()
    records: tuple[pl.DataFrame, ...] = ()

    def select(self, indices: np.ndarray) -> "Catalogue":
        """Select runs with their records, in the order of the indices.

        Args:
            indices: Rows of ``runs``.
        """
        if len(indices) == self.runs.height and bool((indices == np.arange(len(indices))).all()):
            return self
        layout, heights = self._layout, self.runs["rows"].to_numpy()
        records = []
        for number, frame in enumerate(self.records):
            has_layout = layout == number
            ends = np.cumsum(np.where(has_layout, heights, 0))
            selected = indices[has_layout[indices]]
            records.append(_gather_ranges(frame, ends[selected] - heights[selected], heights[selected]))
        runs = self.runs[pl.Series(indices, dtype=pl.UInt32)]
        return Catalogue(runs=runs, origins=self.origins, layouts=self.layouts, records=tuple(records))

    def stored_run(self, row: int, task: Task) -> StoredRun:
        """Everything about a run but its records.

        Args:
            row: Its row in ``runs``.
            task: The run.
        """
        run = self.runs.row(row, named=True)
        started = {} if run["started"] is None else {"started": json.loads(run["started"])}
        status: Status = run["status"]
        origin = json.loads(self.origins[run["origin"]])
        details = {"message": run["message"], "seconds": run["seconds"], "provenance": {**origin, **started}}
        return StoredRun.of(task, status, **details)

    def iterate_records(self) -> Iterator[pl.DataFrame | None]:
        """Iterate over the records of each run; None where they were not read."""
        starts = [0] * len(self.layouts)
        for layout, height in self.runs.select("layout", "rows").iter_rows():
            if layout is None:
                yield None
            else:
                yield self.records[layout].slice(starts[layout], height)
                starts[layout] += height

    def repeat(self, values: np.ndarray) -> list[np.ndarray]:
        """Repeat a value of each run for each of its records: one array a layout."""
        layout, heights = self._layout, self.runs["rows"].to_numpy()
        return [np.repeat(values[layout == number], heights[layout == number]) for number in range(len(self.layouts))]

    def rows(self) -> dict[str, int]:
        """Rows of the runs by key."""
        names = self.runs["name"].to_list()
        return dict(zip(names, range(len(names)), strict=True))

    @property
    def _layout(self) -> np.ndarray:
        """Layout of each run's records; the number of layouts where they were not read."""
        return self.runs["layout"].fill_null(len(self.layouts)).to_numpy()


EMPTY = Catalogue(runs=pl.DataFrame(schema=RUN_COLUMNS))


def _gather_ranges(frame: pl.DataFrame, starts: np.ndarray, lengths: np.ndarray) -> pl.DataFrame:
    """Rows of a table, range after range."""
    before = np.cumsum(lengths) - lengths
    rows = np.repeat((starts - before).astype(np.int32), lengths) + np.arange(int(lengths.sum()), dtype=np.int32)
    whole = len(rows) == frame.height and bool((rows == np.arange(frame.height)).all())
    return frame if whole else frame[pl.Series(rows, dtype=pl.UInt32)]


def concat(parts: Sequence[Catalogue]) -> Catalogue:
    """Concatenate catalogues of different runs."""
    parts = [part for part in parts if part.runs.height]
    if len(parts) < 2:
        return parts[0] if parts else EMPTY
    # Each part numbers its origins and layouts by itself; equal ones get one number.
    origins: dict[str, int] = {}
    layouts: dict[Columns, int] = {}
    runs, records = [], {}
    for part in parts:
        origin = [origins.setdefault(each, len(origins)) for each in part.origins]
        layout = [layouts.setdefault(each, len(layouts)) for each in part.layouts]
        renumbered = [_renumber(part.runs["origin"], origin), _renumber(part.runs["layout"], layout)]
        runs.append(part.runs.with_columns(renumbered))
        for number, frame in zip(layout, part.records, strict=True):
            records.setdefault(number, []).append(frame)
    return Catalogue(
        runs=pl.concat(runs),
        origins=tuple(origins),
        layouts=tuple(layouts),
        records=tuple(pl.concat(records[number]) for number in range(len(layouts))),
    )


def _renumber(column: pl.Series, numbers: Sequence[int]) -> pl.Series:
    new = pl.Series(numbers, dtype=pl.UInt32)
    return (new.gather(column) if len(new) else column).alias(column.name)


def stored_keys(folder: Path) -> set[str]:
    """Keys of the runs that have a file; no file is opened."""
    return {key for key, _ in _scan(folder)}


@dataclass(frozen=True, eq=False)
class RunFiles:
    """Files of a folder that have the name of a run.

    Args:
        rows: {key: row of ``stamps``}.
        stamps: One row a file, of the columns ``STAMP``; -1 for what is no regular file: it is always read.
    """

    rows: Mapping[str, int]
    stamps: np.ndarray


def list_run_files(folder: Path) -> RunFiles:
    """List the files of a folder that have the name of a run, with their stamps; no file is opened.

    Args:
        folder: The folder, which need not exist.

    Raises:
        RunError: The folder cannot be read, or is a file.
    """
    rows, stamps = {}, array("q")
    for key, file in _scan(folder):
        rows[key] = len(rows)
        stamps.extend(_stamp(file))
    return RunFiles(rows, np.frombuffer(stamps, dtype=np.int64).reshape(-1, len(STAMP)))


def unchanged(indexed: Catalogue, files: RunFiles, revision: int) -> np.ndarray:
    """Rows of the runs whose files have not changed since they were indexed, in ascending order.

    Args:
        indexed: The index.
        files: The files now.
        revision: The revision of which runs count only if their records are indexed, too.
    """
    runs = indexed.runs
    if runs.is_empty() or not files.rows:
        return np.array([], dtype=int)
    file_rows = np.array([files.rows.get(key, -1) for key in runs["name"].to_list()])
    stamps = runs.select(STAMP).to_numpy()
    without_records = pl.col("layout").is_null() & (pl.col("status") == "done") & (pl.col("revision") == revision)
    same = (stamps == files.stamps[file_rows]).all(axis=1) & (file_rows >= 0) & (stamps[:, 0] >= 0)
    return np.flatnonzero(same & ~runs.select(without_records).to_series().to_numpy())


def _scan(folder: Path) -> Iterator[tuple[str, os.DirEntry]]:
    try:
        with _opened(folder) as opened, os.scandir(opened) as files:
            for file in files:
                name = file.name
                if len(name) == _NAME_LENGTH and name.endswith(SUFFIX) and name.isascii():
                    yield name[: -len(SUFFIX)], file
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise RunError(f"{folder} is a file, expected the folder of the runs of {folder.name}: move it away") from None
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error.strerror or error}") from None


@contextmanager
def _opened(folder: Path) -> Iterator[Path | int]:
    """Open a folder where the system can look files up from there: it need not walk the whole path for each of them."""
    if os.scandir not in os.supports_fd:  # Windows
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | NONBLOCKING)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _stamp(file: os.DirEntry) -> tuple[int, ...]:
    try:
        status = file.stat(follow_symlinks=False)
    except OSError:  # it was deleted meanwhile
        return _NO_STAMP
    return _stamp_of(status) if stat.S_ISREG(status.st_mode) else _NO_STAMP


def _stamp_of(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & _INODE_MASK


def read_runs(
    folder: Path, names: Iterable[str], revision: int | None, ending: str = SUFFIX
) -> tuple[Catalogue, dict[str, CorruptRun | OlderFormat]]:
    """Read files, each with its checksum verified, and decode the records of the runs that are done.

    Args:
        folder: The folder of an experiment.
        names: Keys of the runs.
        revision: The revision of which the records are wanted; None is any.
        ending: End of the names of their files.

    Returns:
        The runs in the order of the names, without files that were deleted meanwhile; and {key: reason} of the files
        that hold no usable run.

    Raises:
        RunError: A file cannot be read, which says nothing about what it holds.
    """
    reader = _Reader(folder, revision, ending)
    for name in names:
        reader.add(name)
    return reader.finish(), reader.unusable


class _Reader:
    """Reads files one by one, and decodes their records batch by batch."""

    def __init__(self, folder: Path, revision: int | None, ending: str) -> None:
        self._folder, self._revision, self._ending = folder, revision, ending
        self._parts: list[Catalogue] = []
        self._begin_batch()
        self.unusable: dict[str, CorruptRun | OlderFormat] = {}

    def _begin_batch(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._origins: dict[str, int] = {}
        self._layouts: dict[Columns, list[tuple[str, int, bytes]]] = {}

    def add(self, name: str) -> None:
        try:
            content, status = read_regular_file(os.path.join(self._folder, name + self._ending))
            run, shape = decode(content)
            if (run.key, run.experiment) != (name, self._folder.name):
                raise CorruptRun(f"it holds the run {run.key} of {run.experiment}")
        except FileNotFoundError:
            return
        except (CorruptRun, OlderFormat) as error:
            self.unusable[name] = error
            return
        provenance = dict(run.provenance)
        started = json.dumps(provenance.pop("started")) if "started" in provenance else None
        origin = self._origins.setdefault(json.dumps(provenance, sort_keys=True), len(self._origins))
        layout = None
        if run.status == "done" and self._revision in (None, run.revision):
            self._layouts.setdefault(shape.columns, []).append((name, shape.rows, content))
            layout = list(self._layouts).index(shape.columns)
        values = (run.revision, run.status, run.message, run.seconds, started, origin, layout, shape.rows)
        self._rows.append((name, *_stamp_of(status), *values))
        if len(self._rows) >= _BATCH:
            self._end_batch()

    def finish(self) -> Catalogue:
        self._end_batch()
        return concat(self._parts)

    def _end_batch(self) -> None:
        """Make a catalogue of the runs that were read since the last one."""
        frames = []
        for columns, files in self._layouts.items():
            frame, unusable = _decode_records(columns, files)
            frames.append(frame)
            self.unusable.update(unusable)
        rows = [row for row in self._rows if row[0] not in self.unusable]
        self._parts.append(
            Catalogue(
                runs=pl.DataFrame(rows, schema=RUN_COLUMNS, orient="row"),
                origins=tuple(self._origins),
                layouts=tuple(self._layouts),
                records=tuple(frames),
            )
        )
        self._begin_batch()


def _decode_records(
    columns: Columns, files: Sequence[tuple[str, int, bytes]]
) -> tuple[pl.DataFrame, dict[str, CorruptRun]]:
    """Decode the records of files of one layout at once; {key: reason} of those that hold others than they say.

    A file whose checksum is right can hold such records only if it was not written by a store.
    """
    schema = pl.Schema({name: COLUMN_TYPES[kind] for name, kind in columns})
    filled = [(name, height, content) for name, height, content in files if height and columns]
    if not filled:
        return pl.DataFrame(schema=schema), {}
    # All at once: decoding one file after the other takes several times as long.
    try:
        frame = pl.scan_parquet([io.BytesIO(content) for *_, content in filled]).collect().rechunk()
        if frame.schema == schema and frame.height == sum(height for _, height, _ in filled):
            return frame, {}
    except PARQUET_ERRORS:
        pass
    frames, unusable = [pl.DataFrame(schema=schema)], {}
    for name, height, content in filled:  # to find out which it is
        try:
            frame = pl.read_parquet(io.BytesIO(content))
        except PARQUET_ERRORS as error:
            unusable[name] = CorruptRun((str(error).splitlines() or [type(error).__name__])[0])
            continue
        if frame.schema == schema and frame.height == height:
            frames.append(frame)
        else:
            unusable[name] = CorruptRun("its records are not those that its metadata describe")
    return pl.concat(frames), unusable
