"""Numbers that claims are read off, with their standard errors, and the evidence that most claims make of them.

Evidence has the forms that most claims need: the largest value, means above zero, exponents and other constants.
Each takes what was measured as pairs of a label and a value, one a check. Where several estimates are judged together,
all of their intervals hold at 99 % (Bonferroni).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np
import polars as pl
import scipy  # which imports scipy.stats, that takes long, when it is first used

from falign.lab.experiment._specification import Check, Evidence, Missing

__all__ = [
    "CONFIDENCE",
    "Estimate",
    "Estimates",
    "Values",
    "above_zero",
    "around",
    "below_zero",
    "final",
    "largest",
    "least_share",
    "mean",
    "paired",
    "share_at_least",
    "slope",
    "sorted_groups",
    "summary",
]

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


def sorted_groups(table: pl.DataFrame, by: Sequence[str]) -> list[tuple[tuple, pl.DataFrame]]:
    """Group the rows that agree in some columns, the groups sorted by these.

    Returns:
        (values of the columns, rows) of each group.
    """
    return list(table.sort(by).group_by(by, maintain_order=True))


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
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        raise Missing(f"{of}: {sample.size} runs are done, expected at least 2 for a standard error")
    return Estimate(float(sample.mean()), float(sample.std(ddof=1) / sqrt(sample.size)), sample.size)


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


# Evidence

Estimates = Sequence[tuple[str, Estimate]]


def largest(
    groups: Iterable[tuple[str, pl.DataFrame]],
    value: str | pl.Expr,
    at_most: float,
    *,
    note: str = "",
    label: str = "{label}: most",
) -> Evidence:
    """The largest value of each group beside a limit.

    Args:
        groups: (label, rows).
        value: Column or expression of the rows.
        at_most: The limit.
        note: See :class:`~falign.lab.experiment.Evidence`.
        label: Of a check, with places for ``label`` and ``rows``, the number of rows.

    Returns:
        One check a group.
    """
    return Evidence(
        checks=tuple(
            Check(
                label=label.format(label=name, rows=rows.height),
                measured=float(rows.select(value=value)["value"].to_numpy().max()),
                high=at_most,
            )
            for name, rows in groups
        ),
        note=note,
    )


def above_zero(estimates: Estimates, *, note: str = "") -> Evidence:
    """Means, such as differences paired by seed, that are above 0 with 99 % confidence together."""
    return Evidence(
        checks=tuple(
            Check(label=label, measured=each.value, low=each.above(len(estimates))) for label, each in estimates
        ),
        note=note,
    )


def below_zero(estimates: Estimates, *, note: str = "") -> Evidence:
    """Means, such as differences paired by seed, that are below 0 with 99 % confidence together."""
    return Evidence(
        checks=tuple(
            Check(label=label, measured=each.value, high=-each.above(len(estimates))) for label, each in estimates
        ),
        note=note,
    )


def around(
    estimates: Estimates,
    expected: float,
    tolerance: float = 0.0,
    *,
    side: Literal["both", "at most"] = "both",
    note: str = "",
) -> Evidence:
    """Estimates, such as exponents, that are what is expected.

    Args:
        estimates: (label, estimate).
        expected: What they should be.
        tolerance: How far they may be off beside the interval of 99 %, for the next order of what is expected.
        side: "at most" has no lower end.
        note: See :class:`~falign.lab.experiment.Evidence`.

    Returns:
        One check an estimate: the expected ± (tolerance + half the interval).
    """
    checks = []
    for label, each in estimates:
        width = tolerance + each.half(len(estimates))
        ends = {"high": expected + width} if side == "at most" else {"low": expected - width, "high": expected + width}
        checks.append(Check(label=label, measured=each.value, **ends))
    return Evidence(checks=tuple(checks), note=note)


def share_at_least(shares: Iterable[tuple[str, float, int]], probability: float, *, note: str = "") -> Evidence:
    """Shares of runs in which something held that is promised with a probability.

    Args:
        shares: (label, share, number of runs).
        probability: What is promised.
        note: See :class:`~falign.lab.experiment.Evidence`.

    Returns:
        One check a share: at least what does not contradict the probability at 99 %, by the binomial law.

    Raises:
        Missing: So few runs contradict nothing.
    """
    return Evidence(
        checks=tuple(
            Check(label=label, measured=share, low=least_share(runs, probability)) for label, share, runs in shares
        ),
        note=note,
    )
