"""The file of one run: its records as Parquet, and everything else about it as one JSON text in its metadata."""

import io
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from torch import Tensor

from falign.lab._files import BLANK, RunError, Unsealed, last_seal, seal, verify_seal
from falign.lab.experiment._specification import RESERVED, Outcome, Point, Task, misnamed

# The records of a run as columns of one kind each, and the check that they are fit to be kept.

_KINDS = {bool: pl.Boolean, int: pl.Int64, float: pl.Float64, str: pl.String}
MOST, _WIDEST, _LETTERS = 10**7, 1000, 10**8
"""Values, columns and letters that a run may leave: what it measures is kept, not its weights."""
_RESIDUE = 1e-6
"""Numbers of a column that has only smaller ones are differences that should be 0, left by rounding."""
_TEXTS = (str, bytes, bytearray, memoryview)
"""Sequences of Python that are no columns."""


class Unfit(ValueError):  # noqa: N818  # it is a verdict on an outcome, and what it says is recorded
    """An outcome that cannot be kept as a result: which column, and why."""


def frame(task: Task, outcome: Outcome) -> pl.DataFrame:
    """The records of a run as a table.

    Args:
        task: The run.
        outcome: What it left. If it diverged, its records end before the first one that is not finite.

    Returns:
        One row a record; the columns of the records only.

    Raises:
        Unfit: It is no outcome: ``diverged`` is no text, or the records no mapping of columns; columns differ in
            length, a column has a name of an axis or of the store's own, mixes kinds, holds what is no scalar, or, in
            a run that did not diverge, a number that is not finite; or there are too many.
    """
    if outcome.diverged is not None and not (isinstance(outcome.diverged, str) and outcome.diverged.strip()):
        raise Unfit(f"diverged is {_shown(outcome.diverged)}, expected None, or a text of when and how")
    if not isinstance(outcome.records, Mapping):
        raise Unfit(f"the records are a {_kind(outcome.records)}, expected a mapping from names to columns")
    if len(outcome.records) > _WIDEST:
        raise Unfit(f"the records have {len(outcome.records)} columns, expected at most {_WIDEST}")
    columns: dict[str, list] = {}
    for name, values in outcome.records.items():
        _check_name(name, task)
        columns[name] = _column(name, values, len(outcome.records))
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise Unfit(f"columns of the records differ in length: {listed}")
    ends = {name: place for name, values in columns.items() if (place := _first_not_finite(values)) is not None}
    if ends and outcome.diverged is None:
        name = min(ends, key=ends.__getitem__)
        value = columns[name][ends[name]]
        raise Unfit(f"column {name!r} holds {value} in record {ends[name]}, expected finite numbers")
    end = min(ends.values(), default=None)
    return pl.DataFrame([series(name, values[:end]) for name, values in columns.items()])


def difference(one: pl.DataFrame, other: pl.DataFrame) -> float:
    """How far the records of a run are from those of the same run computed once more.

    Args:
        one: The records of a run, without columns of its point.
        other: The same of the other.

    Returns:
        The largest difference of two numbers, relative to the largest number of their column, or to a millionth if
        that is smaller: then all of it is what rounding left. 0 if they are equal to the bit; infinite if they differ
        in their columns, in how many records there are, or in what is no number.
    """
    if one.schema != other.schema or one.height != other.height:
        return math.inf
    found = 0.0
    for left, right in zip(one.get_columns(), other.get_columns(), strict=True):
        if left.equals(right, check_dtypes=True, null_equal=True):
            continue
        if not left.dtype.is_numeric() or not left.is_null().equals(right.is_null()):
            return math.inf
        largest = max(_largest(left), _largest(right), _RESIDUE)
        found = max(found, _farthest(left, right) / largest, math.ulp(0.0))  # a quotient of the least may be 0
    return found


def _largest(column: pl.Series) -> float:
    return float(column.cast(pl.Float64).abs().max())  # pyright: ignore[reportArgumentType]


def _farthest(left: pl.Series, right: pl.Series) -> float:
    """The largest difference of two numbers in the same place."""
    if left.dtype != pl.Int64:
        return float((left - right).abs().max())  # pyright: ignore[reportArgumentType]
    one, other = left.drop_nulls().to_numpy(), right.drop_nulls().to_numpy()
    larger, smaller = np.maximum(one, other), np.minimum(one, other)
    return float((larger.view(np.uint64) - smaller.view(np.uint64)).max())  # which has room for every difference


def series(name: str, values: Sequence[Any]) -> pl.Series:
    """A column of plain scalars and None, of the narrowest type that holds them all.

    Args:
        name: Its name.
        values: bool, int, float, str or None; int and float together become float.

    Returns:
        The column; of type null if all values are None.

    Raises:
        Unfit: The kinds cannot be together in a column, or a whole number is too large.
    """
    kinds = {type(value) for value in values if value is not None}
    if int in kinds and not all(-(2**63) <= value < 2**63 for value in values if type(value) is int):
        raise Unfit(f"column {name!r} holds a whole number beyond 64 bits")
    if kinds == {int, float}:
        if not all(int(float(value)) == value for value in values if type(value) is int):
            raise Unfit(f"column {name!r} holds, beside fractions, a whole number that no float is equal to")
        kinds, values = {float}, [None if value is None else float(value) for value in values]
    if len(kinds) > 1:
        listed = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise Unfit(f"column {name!r} mixes {listed}, expected one kind")
    try:
        return pl.Series(name, values, dtype=_KINDS[kinds.pop()] if kinds else pl.Null)
    except UnicodeEncodeError:
        raise Unfit(f"column {name!r} holds a text that is no Unicode: half of a pair of surrogates") from None


def _check_name(name: object, task: Task) -> None:
    if (wrong := misnamed(name)) is not None:
        raise Unfit(f"the records have a column {_shown(name)}: {wrong}")
    if name in task.point or name in RESERVED:
        raise Unfit(f"the records have a column {name!r}, which is the name of an axis or of the store's own")


def _column(name: str, values: object, columns: int) -> list:
    """One of some columns as a list of plain scalars of Python; what is no sequence of such is refused."""
    most, letters = MOST // columns, _LETTERS // columns
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    axes = getattr(values, "ndim", 1) if isinstance(values, (np.ndarray, Tensor)) else 1
    if axes != 1:
        raise Unfit(f"column {name!r} is an array of {axes} axes, expected one")
    if not isinstance(values, (Sequence, np.ndarray, Tensor, pl.Series)) or isinstance(values, _TEXTS):
        raise Unfit(f"column {name!r} is a {_kind(values)}, expected a list of values, one a record")
    if isinstance(values, np.ndarray) and values.dtype.kind in "mMV":  # whose items may be whole numbers
        raise Unfit(f"column {name!r} holds {values.dtype}, expected str, int, float, bool or None")
    listed = values[: most + 1].tolist() if isinstance(values, (np.ndarray, Tensor)) else values
    found = [_plain(name, value) for value in islice(listed, most + 1)]
    if len(found) > most:
        raise Unfit(f"column {name!r} has more than {most} values: keep fewer records")
    if sum(len(value) for value in found if isinstance(value, str)) > letters:
        raise Unfit(f"column {name!r} holds more than {letters} letters, expected measurements")
    return found


def _plain(name: str, value: object) -> object:
    """A scalar of Python for one of NumPy; others are refused."""
    kept = value.item() if isinstance(value, np.generic) and value.dtype.kind in "biufU" else value
    if kept is not None and type(kept) not in _KINDS:
        raise Unfit(f"column {name!r} holds a {_kind(kept)}, expected str, int, float, bool or None")
    return kept


def _first_not_finite(values: Sequence[Any]) -> int | None:
    """The index of the first number that is not finite; None if all are."""
    return next((i for i, value in enumerate(values) if isinstance(value, float) and not math.isfinite(value)), None)


def _kind(value: object) -> str:
    return type(value).__name__


def _shown(value: object) -> str:
    """A value in a message: a short text or number itself, of others the kind."""
    return repr(value)[:80] if isinstance(value, (str, int, float)) else f"a {_kind(value)}"


FORMAT = 3
"""Version of a store and of its files; raised when older files count no more."""
Status = Literal["done", "diverged", "failed", "no data"]
_OLDER = ("1", "2")
RETRIED = ("failed", "no data")
"""What is tried once more when an experiment is reproduced again: the cause may be gone."""
TYPES: Mapping[str, Any] = {
    str(kind): kind for kind in (pl.Boolean(), pl.Int64(), pl.Float64(), pl.String(), pl.Null())
}
"""{name: type} of what a column of records may hold."""
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError)
"""What decoding bytes that are no Parquet raises; some make the reader panic."""
LARGEST = 2**30
"""Bytes of a run's file: the numbers and letters that a run may leave, and room for what is said of them."""
_STATUSES = get_args(Status)
_METADATA = "falign"
_OPENING = b'{"falign-run": '
"""How the JSON text begins. It is looked for, and not asked of a reader of Parquet, which takes five times as long."""
_TRIED = 16
"""So many openings are tried: what the text holds may contain one, and a hostile file a million."""
WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""How files are opened: a pipe under the name of one would be waited for."""


class Corrupt(ValueError):  # noqa: N818  # an answer of the reader; the store sets the file aside
    """A file that is no run, or not the one that its name says: why."""


class Older(ValueError):  # noqa: N818  # an answer of the reader; the run counts as missing
    """A file of an older format."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Everything about a run but its records.

    Args:
        key: The run's key.
        experiment: Full name of its experiment.
        revision: The experiment's revision.
        point: The run's point.
        seed: Its seed.
        status: What became of it.
        message: How it diverged or failed; None if done.
        seconds: Its share of the time that its block took.
        provenance: Where it was computed: see :func:`falign.lab._provenance.place`; and ``started``.
    """

    key: str
    experiment: str
    revision: int
    point: Point
    seed: int
    status: Status
    message: str | None = None
    seconds: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task, status: Status, **details: Any) -> "Entry":
        """The entry of a run.

        Args:
            task: The run.
            status: What became of it.
            **details: ``message``, ``seconds``, ``provenance``.
        """
        return cls(
            key=task.key,
            experiment=task.experiment,
            revision=task.revision,
            point=dict(task.point),
            seed=task.seed,
            status=status,
            **details,
        )


@dataclass(frozen=True)
class Shape:
    """What the records of a run look like.

    Args:
        columns: Names and types of the columns, the types as in ``TYPES``.
        rows: Their number.
    """

    columns: tuple[tuple[str, str], ...]
    rows: int


_FIELDS = tuple(Entry.__dataclass_fields__)


def encode(entry: Entry, records: pl.DataFrame) -> bytes:
    """The content of a run's file."""
    values = {
        "falign-run": FORMAT,
        **{name: getattr(entry, name) for name in _FIELDS},
        "columns": {name: str(kind) for name, kind in records.schema.items()},
        "rows": records.height,
        "checksum": BLANK,  # the last, so that nothing else can be taken for it
    }
    stream = io.BytesIO()
    records.write_parquet(stream, metadata={_METADATA: json.dumps(values)})
    seal(stream, last_seal(stream.getvalue()))
    return stream.getvalue()


def read_run(path: Path) -> tuple[Entry, Shape]:
    """Read a run's entry, and make sure that not a bit of its file has changed; its records are not decoded.

    Args:
        path: The file.

    Returns:
        The entry, and what its records look like.

    Raises:
        Corrupt: The file is damaged, or was not written by a store.
        Older: It is of an older format.
        FileNotFoundError: There is none.
        RunError: It cannot be read, which says nothing about what it holds.
    """
    return decode(content_of(path)[0])


def content_of(path: Path | str) -> tuple[bytes, os.stat_result]:
    """The content of a file, and what the system knew of it before it was read.

    Raises:
        Corrupt: It is a folder, a pipe, a device or a circle of links, or too large: nothing is read from such, or
            waited for.
        FileNotFoundError: There is none.
        RunError: It cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | WITHOUT_WAITING)
        with open(descriptor, "rb", buffering=0) as stream:
            known = os.fstat(descriptor)
            if not stat.S_ISREG(known.st_mode):
                raise Corrupt("it is not a regular file")
            if known.st_size > LARGEST:
                raise Corrupt(f"it has {known.st_size:,} bytes, expected at most {LARGEST:,}")
            return stream.read(), known
    except OSError as error:
        if not os.path.lexists(path):
            raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
        if not _regular(path):
            raise Corrupt("it is not a regular file") from None
        raise RunError(f"cannot read {path}: {error.strerror or error}; nothing was done to it") from None


def _regular(path: Path | str) -> bool:
    """Whether a name is that of a regular file, or may be."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except PermissionError:
        return True
    except OSError:
        return False


def decode(content: bytes) -> tuple[Entry, Shape]:
    """The entry of a run, from the content of its file; see :func:`read`."""
    at = last_seal(content)
    if at < 0:
        raise Older if _is_older(content) else Corrupt("it has no checksum")
    try:
        verify_seal(content, at)
    except Unsealed as error:
        raise Corrupt(str(error)) from None
    values = _values(content, content.find(b"}", at) + 1)
    try:
        _check(values)
        key = Task(values["experiment"], values["revision"], values["point"], values["seed"]).key
    except KeyError as error:
        raise Corrupt(f"its metadata has no {error.args[0]}") from None
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise Corrupt(f"its metadata is no entry: {error}") from None
    if values["status"] not in _STATUSES:
        raise Corrupt(f"its status is {values['status']!r}")
    if key != values["key"]:
        raise Corrupt(f"its key is {values['key']}, but its experiment, revision, point and seed have {key}")
    changed = {"message": _text(values["message"]), "seconds": float(values["seconds"])}
    entry = Entry(**{name: values[name] for name in _FIELDS} | changed)
    return entry, Shape(tuple(values["columns"].items()), values["rows"])


def _text(value: str | None) -> str | None:
    r"""A text that UTF-8 can hold: what it cannot, such as bytes of file names, is written out, as in ``\udcfc``."""
    return None if value is None else value.encode(errors="backslashreplace").decode()


def _values(content: bytes, end: int) -> dict[str, Any]:
    """The JSON object that ends somewhere."""
    start = end
    for _ in range(_TRIED):
        start = content.rfind(_OPENING, 0, start)
        if start < 0:
            break
        try:
            values = json.loads(content[start:end])
        except (ValueError, RecursionError):
            continue
        if values.get("falign-run") == FORMAT:
            return values
    raise Older if _is_older(content) else Corrupt("its metadata is no entry")


def _check(values: dict[str, Any]) -> None:
    """Raise ``TypeError`` if what JSON held is of other types than an entry's, ``KeyError`` if something lacks."""
    for name in ("revision", "seed", "rows"):
        if type(value := values[name]) is not int or not 0 <= value < 2**63:
            raise TypeError(f"{name} is {value!r:.40}, expected a whole number, at least 0")
    for name in ("key", "experiment", "status", "message"):
        if not isinstance(value := values[name], str) and not (name == "message" and value is None):
            raise TypeError(f"{name} is {value!r:.40}, expected a text")
    for name in ("point", "provenance", "columns"):
        if not isinstance(value := values[name], dict):
            raise TypeError(f"{name} is {value!r:.40}, expected an object")
    if type(value := values["seconds"]) not in (int, float) or not (math.isfinite(value) and value >= 0):
        raise TypeError(f"seconds is {value!r:.40}, expected a number, at least 0")
    for axis, value in values["point"].items():
        if type(value) not in (str, int, float, bool):
            raise TypeError(f"{axis!r:.40} of its point is {value!r:.40}, expected a number, a text or a truth value")
    for name, kind in values["columns"].items():
        if name in RESERVED or name in values["point"]:
            raise TypeError(f"the records have a column {name!r}, which is the name of an axis or of the store's own")
        if not isinstance(kind, str) or kind not in TYPES:
            raise TypeError(f"column {name!r} of the records is of type {kind!r:.40}, expected {', '.join(TYPES)}")
        name.encode()  # what UTF-8 cannot hold is the name of no column
    rows, columns = values["rows"], len(values["columns"])
    if rows and not columns:
        raise ValueError(f"it has {rows} records without columns")
    if rows * columns > MOST:
        raise ValueError(f"it has {rows} records of {columns} columns, expected at most {MOST} values")


def _is_older(content: bytes) -> bool:
    """Whether a file is a Parquet file that says that it is a run of an older format."""
    if not content[:4] == content[-4:] == b"PAR1":
        return False
    try:
        return pl.read_parquet_metadata(io.BytesIO(content)).get("format") in _OLDER
    except UNREADABLE:
        return False
