"""When components are learned, and in which order: read off the shares ``θ_L…θ_1/λ`` along time."""

from collections.abc import Sequence
from itertools import combinations
from math import inf

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

TOLERANCE = 0.1
"""A component is learned once its error is at most so much of it: at 90 %."""


def crossing(times: ArrayLike, shares: ArrayLike, left: float = TOLERANCE) -> float | None:
    """The first time at which a share is within ``left`` of 1, between two records by a straight line.

    Args:
        times: Of the records, rising.
        shares: At these times.
        left: What may be missing, as a share: 0.1 is learned, 0.9 has begun.

    Returns:
        The time; None if there is none.
    """
    t, missing = np.asarray(times, float), np.abs(1 - np.asarray(shares, float)) - left
    done = np.flatnonzero(missing <= 0)
    if not done.size:
        return None
    at = int(done[0])
    if at == 0:
        return float(t[0])
    before, after = missing[at - 1], missing[at]
    return float(t[at - 1] + (t[at] - t[at - 1]) * before / (before - after))


def in_order(sizes: Sequence[float], times: Sequence[float | None]) -> float:
    """Share of the pairs of components of which the larger is learned first; what is never learned is last of all.

    1 is implicit regularisation without exception, 0 the reverse, implicit anti-regularisation. Pairs that are learned
    at the same time, or never, count for neither: a half.

    Args:
        sizes: λ of the components.
        times: When they are learned, None for never.
    """
    known = [(size, inf if time is None else time) for size, time in zip(sizes, times, strict=True)]
    pairs = [((a, b) if a[0] > b[0] else (b, a)) for a, b in combinations(known, 2) if a[0] != b[0]]
    return sum(0.5 if large[1] == small[1] else float(large[1] < small[1]) for large, small in pairs) / len(pairs)


def orders(table: pl.DataFrame, *, by: Sequence[str], size: str = "target", time: str = "learned") -> pl.DataFrame:
    """``in_order`` of every group.

    Args:
        table: One row a component.
        by: Columns that tell groups apart.
        size: Column of λ.
        time: Column of the times.

    Returns:
        One row a group, sorted: columns ``by``, "in_order", "components".
    """
    rows = [
        {**dict(zip(by, values, strict=True)), "in_order": in_order(own[size].to_list(), own[time].to_list())}
        | {"components": own.height}
        for values, own in table.sort(by).group_by(list(by), maintain_order=True)
    ]
    return pl.DataFrame(rows)
