"""The records of a run as columns of one kind each, and the check that they are fit to be kept."""

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from falign.lab.experiment.specification import RESERVED, Outcome, Task, misnamed

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
