"""Evidence in the forms that most claims need: the largest value, means above zero, exponents and other constants.

Each takes what was measured as pairs of a label and a value, one a check. Where several estimates are judged together,
all of their intervals hold at 99 % (Bonferroni).
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import polars as pl

from falign.lab.experiment._specification import Check, Evidence
from falign.lab.experiment.statistics import Estimate, least_share

__all__ = ["above_zero", "around", "below_zero", "largest", "share_at_least"]

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
