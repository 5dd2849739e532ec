"""Index of the runs of an experiment, to be deleted at any time: the contents of files that have not changed since.

``OUT/.index/<experiment>``: tables as Parquet, one after the other, then a JSON text that says where each begins, its
length in eight bytes, and a mark. The text ends with the checksum of the whole. The files of the runs stay the truth:
each row holds the stamp of its file, and counts only as long as the file has that stamp. An index that is damaged, of
another version or of another experiment counts as none. Processes may write it at once: the last one wins, and as its
rows are checked against the files, any of them will do.
"""

import io
import json
import os
from contextlib import suppress
from io import BufferedIOBase
from itertools import pairwise
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import polars as pl

import falign
from falign.lab._files import BLANK, Unsealed, last_seal, seal, verify_stream
from falign.lab.experiment._catalogue import CHUNK_ROWS, EMPTY, RUN_COLUMNS, Catalogue
from falign.lab.experiment._run_file import COLUMN_TYPES, FORMAT, NONBLOCKING, PARQUET_ERRORS

FOLDER = ".index"
_BOUND = {"index": 2, "falign": falign.__version__, "store": FORMAT}
"""Versions that an index must agree with: writing it anew costs little."""
_END = b"falign-index"
_LENGTH = 8
_MAX_LAYOUTS = 32
"""Layouts of records that an index holds at most; runs of others are read from their files."""
_RACY = 2_000_000_000
"""Nanoseconds by which a file must be older than the reading of it: one that changes right after it was read, within a
tick of the file system's clock, keeps its stamp."""
_BROKEN = (Unsealed, LookupError, TypeError, AttributeError, RecursionError, *PARQUET_ERRORS)
"""Errors of reading what is no index."""


def load(store: Path, experiment: str) -> Catalogue:
    """Read an index; it is empty if there is none that can be used.

    Args:
        store: The store's folder.
        experiment: Full name of the experiment.
    """
    with suppress(*_BROKEN):  # whatever is wrong with it: the files are read instead, and it is written anew
        descriptor = os.open(store / FOLDER / experiment, os.O_RDONLY | NONBLOCKING)
        with open(descriptor, "rb") as stream:
            return _read(stream, experiment)
    return EMPTY


def save(store: Path, experiment: str, runs: Catalogue, since: int) -> None:
    """Write an index, in the place of one that is there; where that is impossible, nothing is written and nothing said.

    Args:
        store: The store's folder.
        experiment: Full name of the experiment.
        runs: The runs that it shall hold.
        since: Time when the reading of the runs began, in nanoseconds since the epoch.
    """
    # A file that changes within a tick of the clock after it was read keeps its stamp: young files are left out.
    settled = (pl.max_horizontal("modified", "changed") < since - _RACY) & (
        pl.col("layout").fill_null(0) < _MAX_LAYOUTS
    )
    indexed = runs.select(runs.runs.select(settled.arg_true()).to_series().to_numpy())
    partial = store / FOLDER / f".{experiment[:64]}.partial-{token_hex(8)}"
    try:
        partial.parent.mkdir(exist_ok=True)
        with partial.open("xb+") as stream:
            _write(stream, experiment, indexed)
        os.replace(partial, store / FOLDER / experiment)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _bound(experiment: str) -> dict[str, Any]:
    return {**_BOUND, "experiment": experiment}


def _write(stream: BufferedIOBase, experiment: str, indexed: Catalogue) -> None:
    """Write piece by piece, without waiting for the disk: what a power cut leaves has a wrong checksum."""
    parts = []
    for number, frame in enumerate((indexed.runs, *indexed.records[:_MAX_LAYOUTS])):
        for part in frame.iter_slices(CHUNK_ROWS):
            parts.append((number, stream.tell()))
            piece = io.BytesIO()
            part.write_parquet(piece, compression="lz4", statistics=False)
            stream.write(piece.getbuffer())
    values = {
        **_bound(experiment),
        "parts": parts,
        "origins": indexed.origins,
        "layouts": indexed.layouts[:_MAX_LAYOUTS],
        "checksum": BLANK,
    }
    begin, text = stream.tell(), json.dumps(values).encode()
    stream.write(text + len(text).to_bytes(_LENGTH, "little") + _END)
    seal(stream, begin + last_seal(text))


def _read(stream: BufferedIOBase, experiment: str) -> Catalogue:
    """Read an index and verify its checksum."""
    tail = stream.seek(-_LENGTH - len(_END), io.SEEK_END)
    begin = tail - int.from_bytes(stream.read(_LENGTH), "little")
    if stream.read() != _END or begin < 0:
        raise Unsealed("it does not end as an index")
    stream.seek(begin)
    text = stream.read(tail - begin)
    verify_stream(stream, begin + last_seal(text))
    values = json.loads(text)
    if any(values[name] != value for name, value in _bound(experiment).items()):
        raise Unsealed("it is of another experiment or version")
    layouts = tuple(tuple((name, dtype) for name, dtype in columns) for columns in values["layouts"])
    schemas = [RUN_COLUMNS, *({name: COLUMN_TYPES[dtype] for name, dtype in columns} for columns in layouts)]
    frames: list[list[pl.DataFrame]] = [[] for _ in schemas]
    stream.seek(0)
    for (number, start), (_, stop) in pairwise([*values["parts"], (0, begin)]):
        frames[number].append(pl.read_parquet(io.BytesIO(stream.read(stop - start))).rechunk())
    runs, *records = (
        pl.concat(parts) if parts else pl.DataFrame(schema=schema)
        for parts, schema in zip(frames, schemas, strict=True)
    )
    indexed = Catalogue(runs=runs, origins=tuple(values["origins"]), layouts=layouts, records=tuple(records))
    if [len(rows) for rows in indexed.repeat(np.zeros(runs.height))] != [frame.height for frame in records]:
        raise Unsealed("its tables do not fit together")
    return indexed
