"""The file of one run: its records as Parquet, and everything else about it as one JSON text in its metadata.

The JSON text ends with the checksum of the whole file. It is looked for in the bytes, which is five times as fast as
asking a reader of Parquet for it, and the records are decoded only where they are wanted.
"""

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
from falign.lab.experiment._specification import Outcome, Point, Task
from falign.lab.experiment._validation import RESERVED, misnamed

# What a run leaves, as a table with columns of one type each; it may be anything, as experiments may be anybody's.

_DTYPES = {bool: pl.Boolean, int: pl.Int64, float: pl.Float64, str: pl.String}
MAX_VALUES, _MAX_COLUMNS, _MAX_LETTERS = 10**7, 1000, 10**8
"""Values, columns and characters that a run may leave: it keeps what it measures, not its weights."""
_ROUNDING = 1e-6
"""Columns whose numbers are all smaller hold differences that should be 0, left by rounding."""
_TEXTS = (str, bytes, bytearray, memoryview)
"""Sequences of Python that are not meant as columns."""


class InvalidOutcome(ValueError):  # noqa: N818  # a verdict on the outcome, which is recorded
    """An outcome that cannot be stored: which column, and why."""


def records_frame(task: Task, outcome: Outcome) -> pl.DataFrame:
    """Check the records of a run and make a table of them.

    Args:
        task: The run.
        outcome: What it left. Of one that diverged, the records end before the first one that is not finite.

    Returns:
        One row a record; the columns of the records only.

    Raises:
        InvalidOutcome: ``diverged`` is no text, or the records are no mapping of columns; columns differ in length; a
            column has a reserved name, mixes types, holds something other than scalars or, in a run that did not
            diverge, a number that is not finite; or there are too many.
    """
    if outcome.diverged is not None and not (isinstance(outcome.diverged, str) and outcome.diverged.strip()):
        raise InvalidOutcome(f"diverged is {_repr(outcome.diverged)}, expected None, or a text of when and how")
    if not isinstance(outcome.records, Mapping):
        raise InvalidOutcome(
            f"the records are a {_type_name(outcome.records)}, expected a mapping from names to columns"
        )
    if len(outcome.records) > _MAX_COLUMNS:
        raise InvalidOutcome(f"the records have {len(outcome.records)} columns, expected at most {_MAX_COLUMNS}")
    columns: dict[str, list] = {}
    for name, values in outcome.records.items():
        _check_name(name, task)
        columns[name] = _column(name, values, len(outcome.records))
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InvalidOutcome(f"columns of the records differ in length: {listed}")
    ends = {name: row for name, values in columns.items() if (row := _first_not_finite(values)) is not None}
    if ends and outcome.diverged is None:
        name = min(ends, key=ends.__getitem__)
        value = columns[name][ends[name]]
        raise InvalidOutcome(f"column {name!r} holds {value} in record {ends[name]}, expected finite numbers")
    end = min(ends.values(), default=None)
    return pl.DataFrame([series(name, values[:end]) for name, values in columns.items()])


def relative_difference(one: pl.DataFrame, other: pl.DataFrame) -> float:
    """Difference between the records of a run and those of the same run computed once more.

    Args:
        one: Records of a run, without columns of its point.
        other: Records of the same run, computed elsewhere.

    Returns:
        Largest difference of two numbers, relative to the largest number of their column, or to 1e-6 if that is
        smaller: such columns hold what rounding left. 0 if all records are equal to the bit; infinite if they differ in
        their columns, in their number, or in something that is no number.
    """
    if one.schema != other.schema or one.height != other.height:
        return math.inf
    largest_difference = 0.0
    for left, right in zip(one.get_columns(), other.get_columns(), strict=True):
        if left.equals(right, check_dtypes=True, null_equal=True):
            continue
        if not left.dtype.is_numeric() or not left.is_null().equals(right.is_null()):
            return math.inf
        scale = max(_largest(left), _largest(right), _ROUNDING)
        # They are not equal, though the quotient of the smallest numbers may be rounded to 0.
        largest_difference = max(largest_difference, _largest_difference(left, right) / scale, math.ulp(0.0))
    return largest_difference


def _largest(column: pl.Series) -> float:
    return float(column.cast(pl.Float64).abs().max())  # pyright: ignore[reportArgumentType]


def _largest_difference(left: pl.Series, right: pl.Series) -> float:
    """Largest absolute difference of two numbers in the same row."""
    if left.dtype != pl.Int64:
        return float((left - right).abs().max())  # pyright: ignore[reportArgumentType]
    one, other = left.drop_nulls().to_numpy(), right.drop_nulls().to_numpy()
    larger, smaller = np.maximum(one, other), np.minimum(one, other)
    return float((larger.view(np.uint64) - smaller.view(np.uint64)).max())  # in which every difference fits


def series(name: str, values: Sequence[Any]) -> pl.Series:
    """Make a column of plain scalars and None, of the narrowest type that holds them all.

    Args:
        name: Its name.
        values: bool, int, float, str or None; int and float together become float.

    Returns:
        The column; of type null if all values are None.

    Raises:
        InvalidOutcome: The values have different types, or a whole number is too large.
    """
    kinds = {type(value) for value in values if value is not None}
    if int in kinds and not all(-(2**63) <= value < 2**63 for value in values if type(value) is int):
        raise InvalidOutcome(f"column {name!r} holds a whole number beyond 64 bits")
    if kinds == {int, float}:
        if not all(int(float(value)) == value for value in values if type(value) is int):
            raise InvalidOutcome(f"column {name!r} holds, beside fractions, a whole number that no float is equal to")
        kinds, values = {float}, [None if value is None else float(value) for value in values]
    if len(kinds) > 1:
        listed = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InvalidOutcome(f"column {name!r} mixes {listed}, expected one kind")
    try:
        return pl.Series(name, values, dtype=_DTYPES[kinds.pop()] if kinds else pl.Null)
    except UnicodeEncodeError:
        raise InvalidOutcome(f"column {name!r} holds a text that is no Unicode: half of a pair of surrogates") from None


def _check_name(name: object, task: Task) -> None:
    if (wrong := misnamed(name)) is not None:
        raise InvalidOutcome(f"the records have a column {_repr(name)}: {wrong}")
    if name in task.point or name in RESERVED:
        raise InvalidOutcome(f"the records have a column {name!r}, which is the name of an axis or of the store's own")


def _column(name: str, values: object, columns: int) -> list:
    """Make a list of plain scalars of Python of one of several columns; what is no sequence of such is refused."""
    max_values, max_letters = MAX_VALUES // columns, _MAX_LETTERS // columns
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    axes = getattr(values, "ndim", 1) if isinstance(values, (np.ndarray, Tensor)) else 1
    if axes != 1:
        raise InvalidOutcome(f"column {name!r} is an array of {axes} axes, expected one")
    if not isinstance(values, (Sequence, np.ndarray, Tensor, pl.Series)) or isinstance(values, _TEXTS):
        raise InvalidOutcome(f"column {name!r} is a {_type_name(values)}, expected a list of values, one a record")
    if isinstance(values, np.ndarray) and values.dtype.kind in "mMV":  # whose items may be whole numbers
        raise InvalidOutcome(f"column {name!r} holds {values.dtype}, expected str, int, float, bool or None")
    listed = values[: max_values + 1].tolist() if isinstance(values, (np.ndarray, Tensor)) else values
    scalars = [_plain(name, value) for value in islice(listed, max_values + 1)]
    if len(scalars) > max_values:
        raise InvalidOutcome(f"column {name!r} has more than {max_values} values: keep fewer records")
    if sum(len(value) for value in scalars if isinstance(value, str)) > max_letters:
        raise InvalidOutcome(f"column {name!r} holds more than {max_letters} letters, expected measurements")
    return scalars


def _plain(name: str, value: object) -> object:
    """Convert a scalar of NumPy to one of Python; what is no scalar is refused."""
    scalar = value.item() if isinstance(value, np.generic) and value.dtype.kind in "biufU" else value
    if scalar is not None and type(scalar) not in _DTYPES:
        raise InvalidOutcome(f"column {name!r} holds a {_type_name(scalar)}, expected str, int, float, bool or None")
    return scalar


def _first_not_finite(values: Sequence[Any]) -> int | None:
    """Index of the first number that is not finite; None if all are."""
    return next((i for i, value in enumerate(values) if isinstance(value, float) and not math.isfinite(value)), None)


def _type_name(value: object) -> str:
    return type(value).__name__


def _repr(value: object) -> str:
    """Show a value in a message: a text or number itself, shortened, of others the type."""
    return repr(value)[:80] if isinstance(value, (str, int, float)) else f"a {_type_name(value)}"


# The file: encoded, and decoded without trusting anything that it says.

FORMAT = 3
"""Version of a store and of its files; raised when older files are to be computed again."""
Status = Literal["done", "diverged", "failed", "no data"]
RETRIED = ("failed", "no data")
"""Statuses that are tried once more when an experiment is reproduced again: the cause may be gone."""
COLUMN_TYPES: Mapping[str, Any] = {
    str(kind): kind for kind in (pl.Boolean(), pl.Int64(), pl.Float64(), pl.String(), pl.Null())
}
"""{name: type} of the columns that records may have."""
PARQUET_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError)
"""Errors of decoding bytes that are no Parquet; some make the reader panic."""
MAX_BYTES = 2**30
"""Bytes of a run's file: the numbers and characters that a run may leave, and some more for its metadata."""
_STATUSES = get_args(Status)
_METADATA = "falign"
_OPENING = b'{"falign-run": '
"""Beginning of the JSON text."""
_MAX_TRIES = 16
"""Beginnings that are tried: the text itself may contain some, and a hostile file a million."""
NONBLOCKING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""Flags by which files are opened: opening a pipe that has the name of a run would wait for a writer."""


class CorruptRun(ValueError):  # noqa: N818  # a verdict on the file, which the store sets aside
    """A file that holds no run, or another one than its name says: why."""


class OlderFormat(ValueError):  # noqa: N818  # a verdict on the file, whose run counts as missing
    """A file of an older format."""


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """Everything about a run but its records.

    Args:
        key: The run's key.
        experiment: Full name of its experiment.
        revision: The experiment's revision.
        point: The run's point.
        seed: Its seed.
        status: How it ended.
        message: Why and when it diverged or failed; None if done.
        seconds: Its share of the time that its block took.
        provenance: Machine and versions, see :func:`falign.lab._provenance.block_provenance`, and ``started``.
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
    def of(cls, task: Task, status: Status, **details: Any) -> "StoredRun":
        """Make the stored run of a task.

        Args:
            task: The run.
            status: How it ended.
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
class RecordsShape:
    """Shape of a run's records.

    Args:
        columns: Names and types of the columns, the types as in ``COLUMN_TYPES``.
        rows: Number of records.
    """

    columns: tuple[tuple[str, str], ...]
    rows: int


_FIELDS = tuple(StoredRun.__dataclass_fields__)


def encode(run: StoredRun, records: pl.DataFrame) -> bytes:
    """Encode a run and its records as the content of its file."""
    values = {
        "falign-run": FORMAT,
        **{name: getattr(run, name) for name in _FIELDS},
        "columns": {name: str(kind) for name, kind in records.schema.items()},
        "rows": records.height,
        "checksum": BLANK,  # at the end, where the reader looks for it: what comes before may contain anything
    }
    stream = io.BytesIO()
    records.write_parquet(stream, metadata={_METADATA: json.dumps(values)})
    seal(stream, last_seal(stream.getvalue()))
    return stream.getvalue()


def read_run(path: Path) -> tuple[StoredRun, RecordsShape]:
    """Read the file of a run and verify its checksum; its records are not decoded.

    Args:
        path: The file.

    Returns:
        The run, and the shape of its records.

    Raises:
        CorruptRun: The file is damaged, or was not written by a store.
        OlderFormat: It is of an older format.
        FileNotFoundError: There is none.
        RunError: It cannot be read, which tells nothing about its content.
    """
    return decode(read_regular_file(path)[0])


def read_regular_file(path: Path | str) -> tuple[bytes, os.stat_result]:
    """Read a regular file, and what the system knew of it before it was read.

    Raises:
        CorruptRun: It is a folder, a pipe, a device or a circle of links, or too large; nothing is read of it.
        FileNotFoundError: There is none.
        RunError: It cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | NONBLOCKING)
        with open(descriptor, "rb", buffering=0) as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CorruptRun("it is not a regular file")
            if status.st_size > MAX_BYTES:
                raise CorruptRun(f"it has {status.st_size:,} bytes, expected at most {MAX_BYTES:,}")
            return stream.read(), status
    except OSError as error:
        if not os.path.lexists(path):
            raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
        if not _regular(path):
            raise CorruptRun("it is not a regular file") from None
        raise RunError(f"cannot read {path}: {error.strerror or error}; nothing was done to it") from None


def _regular(path: Path | str) -> bool:
    """Test for the name of a regular file; True where the system does not tell."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except PermissionError:
        return True
    except OSError:
        return False


def decode(content: bytes) -> tuple[StoredRun, RecordsShape]:
    """Decode a run from the content of its file; see :func:`read_run`."""
    at = last_seal(content)
    if at < 0:
        raise CorruptRun("it has no checksum")
    try:
        verify_seal(content, at)
    except Unsealed as error:
        raise CorruptRun(str(error)) from None
    values = _values(content, content.find(b"}", at) + 1)
    try:
        _check(values)
        key = Task(values["experiment"], values["revision"], values["point"], values["seed"]).key
    except KeyError as error:
        raise CorruptRun(f"its metadata has no {error.args[0]}") from None
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise CorruptRun(f"its metadata is no entry: {error}") from None
    if values["status"] not in _STATUSES:
        raise CorruptRun(f"its status is {values['status']!r}")
    if key != values["key"]:
        raise CorruptRun(f"its key is {values['key']}, but its experiment, revision, point and seed have {key}")
    changed = {"message": _text(values["message"]), "seconds": float(values["seconds"])}
    run = StoredRun(**{name: values[name] for name in _FIELDS} | changed)
    return run, RecordsShape(tuple(values["columns"].items()), values["rows"])


def _text(value: str | None) -> str | None:
    r"""Escape what UTF-8 cannot hold, such as bytes of file names, as in ``\udcfc``."""
    return None if value is None else value.encode(errors="backslashreplace").decode()


def _values(content: bytes, end: int) -> dict[str, Any]:
    """Find the JSON object that ends at a position.

    Raises:
        OlderFormat: Its format is an older one.
        CorruptRun: There is none.
    """
    start = end
    for _ in range(_MAX_TRIES):
        start = content.rfind(_OPENING, 0, start)
        if start < 0:
            break
        try:
            values = json.loads(content[start:end])
        except (ValueError, RecursionError):
            continue
        version = values.get("falign-run")
        if version == FORMAT:
            return values
        if type(version) is int and 0 < version < FORMAT:
            raise OlderFormat
    raise CorruptRun("its metadata is no entry")


def _check(values: dict[str, Any]) -> None:
    """Raise ``KeyError`` if a field is missing, ``TypeError`` or ``ValueError`` if one has a value that no run has."""
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
        if not isinstance(kind, str) or kind not in COLUMN_TYPES:
            raise TypeError(
                f"column {name!r} of the records is of type {kind!r:.40}, expected {', '.join(COLUMN_TYPES)}"
            )
        name.encode()  # raises for what UTF-8 cannot hold, which is the name of no column
    rows, columns = values["rows"], len(values["columns"])
    if rows and not columns:
        raise ValueError(f"it has {rows} records without columns")
    if rows * columns > MAX_VALUES:
        raise ValueError(f"it has {rows} records of {columns} columns, expected at most {MAX_VALUES} values")
