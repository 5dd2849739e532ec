"""Numbers that claims are read off: means with their standard errors, paired differences, slopes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import polars as pl
import scipy  # which imports scipy.stats, that takes long, when it is first used

from falign.lab.experiment._specification import Missing

Values = pl.Series | Sequence[float]
CONFIDENCE = 0.99
"""Of every interval that is said to be one of confidence."""


@dataclass(frozen=True)
class Estimate:
    """A mean over independent runs.

    Attributes:
        value: The mean.
        error: Its standard error.
        runs: How many there are, at least 2.
    """

    value: float
    error: float
    runs: int

    def half(self, comparisons: int = 1) -> float:
        """Half the width of the 99 % confidence interval of the mean, by Student's t.

        Args:
            comparisons: How many such intervals are judged together; all of them hold at 99 % (Bonferroni).
        """
        tail = (1 - CONFIDENCE) / 2 / comparisons
        return float(scipy.stats.t.ppf(1 - tail, self.runs - 1)) * self.error

    def above(self, comparisons: int = 1) -> float:
        """Value that a mean must reach to be above 0 with 99 % confidence."""
        return max(self.half(comparisons), float(np.finfo(np.float64).tiny))


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
    return Estimate(float(found.mean()), float(found.std(ddof=1) / sqrt(found.size)), found.size)


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


def slope(table: pl.DataFrame, x: str, y: str) -> Estimate:
    """Slope of the straight line of least squares, one for each seed: their mean and its standard error.

    The runs of one seed share what the seed draws, so that only the seeds are independent.

    Args:
        table: One row a run.
        x: Column of the abscissa.
        y: Column of the ordinate.

    Raises:
        Missing: There are fewer than two seeds, or fewer than two abscissas.
    """
    if table[x].n_unique() < 2:
        raise Missing(f"a slope needs at least 2 values of {x}, got {table[x].n_unique()}")
    slopes = [float(np.polyfit(runs[x].to_numpy(), runs[y].to_numpy(), 1)[0]) for _, runs in table.group_by("seed")]
    return mean(slopes, of=f"slope of {y}")


def least_share(runs: int, probability: float) -> float:
    """The least share of so many runs that does not contradict a probability at 99 %, by the binomial law.

    Raises:
        Missing: So few runs contradict nothing, whatever they are.
    """
    least = int(scipy.stats.binom.ppf(1 - CONFIDENCE, runs, probability))
    if least == 0:
        raise Missing(f"{runs} runs are too few to contradict a probability of {probability:g}")
    return least / runs
