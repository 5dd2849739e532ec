"""The records of a run as columns of one kind each, and the check that they are fit to be kept."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from falign.lab.experiment.specification import Outcome, Task

RESERVED = ("seed", "key", "status", "message", "seconds")
"""Names of columns that the store itself writes beside the records."""
_KINDS = {bool: pl.Boolean, int: pl.Int64, float: pl.Float64, str: pl.String}


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
        Unfit: Columns differ in length, a column has the name of an axis, mixes kinds, holds what is no scalar,
            or, in a run that did not diverge, a number that is not finite.
    """
    columns = {name: [_plain(name, value) for value in values] for name, values in outcome.records.items()}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise Unfit(f"columns of the records differ in length: {listed}")
    for name in columns:
        if name in task.point or name in RESERVED:
            raise Unfit(f"the records have a column {name!r}, which is the name of an axis or of the store's own")
    ends = {name: place for name, values in columns.items() if (place := _first_not_finite(values)) is not None}
    if ends and outcome.diverged is None:
        name = min(ends, key=ends.__getitem__)
        value = columns[name][ends[name]]
        raise Unfit(f"column {name!r} holds {value} in record {ends[name]}, expected finite numbers")
    end = min(ends.values(), default=None)
    return pl.DataFrame([series(name, values[:end]) for name, values in columns.items()])


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
    if kinds == {int, float}:
        kinds, values = {float}, [None if value is None else float(value) for value in values]
    if len(kinds) > 1:
        listed = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise Unfit(f"column {name!r} mixes {listed}, expected one kind")
    if kinds == {int} and not all(-(2**63) <= value < 2**63 for value in values if value is not None):
        raise Unfit(f"column {name!r} holds a whole number beyond 64 bits")
    return pl.Series(name, values, dtype=_KINDS[kinds.pop()] if kinds else pl.Null)


def _plain(name: str, value: object) -> object:
    """A scalar of Python for one of NumPy; others are refused."""
    kept = value.item() if isinstance(value, np.generic) else value
    if kept is not None and type(kept) not in _KINDS:
        raise Unfit(f"column {name!r} holds a {type(value).__name__}, expected str, int, float, bool or None")
    return kept


def _first_not_finite(values: Sequence[Any]) -> int | None:
    """The index of the first number that is not finite; None if all are."""
    return next((i for i, value in enumerate(values) if isinstance(value, float) and not math.isfinite(value)), None)
