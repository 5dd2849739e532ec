"""Numbers that claims are read off: means with their standard errors, paired differences, slopes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import polars as pl

from falign.lab.experiment.reading import Missing

Values = pl.Series | Sequence[float]


@dataclass(frozen=True)
class Estimate:
    """A mean or a slope, and its standard error."""

    value: float
    error: float

    @property
    def significance(self) -> float:
        """The value in standard errors; 0 where both are 0."""
        return (
            self.value / self.error if self.error else float(np.sign(self.value)) * float("inf") if self.value else 0.0
        )


def final(table: pl.DataFrame, *, over: str = "step", by: Sequence[str]) -> pl.DataFrame:
    """The last record of each run.

    Args:
        table: Records.
        over: The column that grows along a run.
        by: Columns that, with the seed, tell runs apart.

    Returns:
        One row a run.
    """
    return table.sort(over).group_by([*by, "seed"], maintain_order=True).last().sort([*by, "seed"])


def summary(table: pl.DataFrame, value: str, *, by: Sequence[str]) -> pl.DataFrame:
    """Mean, standard deviation, standard error of the mean, and number of runs of each group.

    Returns:
        One row a group, sorted: columns ``by``, "mean", "sd", "error" (null with a single run) and "runs".
    """
    column = pl.col(value)
    return (
        table.group_by(by)
        .agg(
            mean=column.mean(),
            sd=column.std(),
            error=column.std() / column.count().cast(pl.Float64).sqrt(),
            runs=column.count(),
        )
        .sort(by)
    )


def mean(values: Values, *, of: str) -> Estimate:
    """Mean and its standard error.

    Args:
        values: At least two.
        of: What they are, for the message.

    Raises:
        Missing: There are fewer than two values, so that there is no standard error.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.size < 2:
        raise Missing(f"{of}: {found.size} runs are done, expected at least 2 for a standard error")
    return Estimate(float(found.mean()), float(found.std(ddof=1) / sqrt(found.size)))


def paired(table: pl.DataFrame, value: str, *, axis: str, low: object, high: object, by: Sequence[str]) -> Estimate:
    """Mean difference between two points of an axis, run by run, and its standard error.

    Args:
        table: One row a run.
        value: The column that is compared.
        axis: The column along which it is compared.
        low: Its value that is subtracted.
        high: Its value from which is subtracted.
        by: Columns that, with the seed, make a pair.

    Raises:
        Missing: There are fewer than two pairs.
    """
    keys = [*by, "seed"]
    first, second = (table.filter(pl.col(axis) == at).select(*keys, value) for at in (low, high))
    pairs = first.join(second, on=keys, suffix="_high")
    return mean(pairs[f"{value}_high"] - pairs[value], of=f"{value} at {axis} = {low} and {high}")


def slope(
    x: Sequence[float] | pl.Series, y: Sequence[float] | pl.Series, errors: Sequence[float] | pl.Series
) -> Estimate:
    """Slope of the straight line of weighted least squares, and its standard error.

    Args:
        x: At least two abscissas.
        y: Ordinates.
        errors: Standard errors of the ordinates, above 0.

    Raises:
        Missing: There are fewer than two points.
    """
    at, values = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    weights = np.asarray(errors, dtype=np.float64) ** -2.0
    if at.size < 2:
        raise Missing(f"a slope needs at least 2 points, got {at.size}")
    centred = at - np.average(at, weights=weights)
    spread = float((weights * centred**2).sum())
    return Estimate(float((weights * centred * values).sum() / spread), 1 / sqrt(spread))


def needed(table: pl.DataFrame, column: str, values: Sequence[object]) -> None:
    """Check that a table holds the points that a claim is about.

    Raises:
        Missing: Some are lacking; says which.
    """
    there = set(table[column].unique().to_list()) if column in table.columns else set()
    if lacking := [value for value in values if value not in there]:
        raise Missing(f"no run is done with {column} = {', '.join(map(str, lacking))}")
