"""Batches of modes, one mode a run, the times at which they are recorded, and the order in which they are learned."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from math import inf

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from falign.lab.experiment.statistics import sorted_groups
from falign.theory.deep_linear import Modes, critical_target, initialisation, modes

CRITICAL = float(critical_target(-0.5, 1.0))
"""λ_c of the anti-aligned start of two layers, θ_1 = -1, θ_2 = 0, for which K = -½; m = 1. It is 1/(3√3)."""
TINY = float(np.finfo(float).tiny)
"""Lower end of a check on what is above 0: the ends of a check belong to it."""


def batches(
    rule: Sequence[str], depth: Sequence[int], scheme: Sequence[str], size: Sequence[float], target: Sequence[float]
) -> Iterator[tuple[list[int], Modes]]:
    """Group the runs of a block by rule and depth, each from its named start, with unit feedback.

    Args:
        rule: Of every run.
        depth: Of every run.
        scheme: Names of the starts.
        size: Of the starts.
        target: λ of the components.

    Yields:
        Places of the runs in the block, and their modes [runs].
    """
    kinds = list(zip(rule, depth, strict=True))
    for kind in dict.fromkeys(kinds):
        # One integration takes modes of one rule and depth only; starts, sizes and targets may differ.
        places = [place for place, each in enumerate(kinds) if each == kind]
        starts = [initialisation(scheme[place]).start(size[place], depth[place]) for place in places]
        weights = torch.tensor([[float(weight) for weight in start] for start in starts], dtype=torch.float64).mT
        targets = torch.tensor([target[place] for place in places], dtype=torch.float64)
        yield places, modes(targets, list(weights), rule=kind[0])  # pyright: ignore[reportArgumentType]  # it checks


def paced(initial: Modes, pace: Float[Tensor, "*modes"]) -> Modes:
    """The same modes in units in which time runs so many times faster.

    ``θ_l → aθ_l``, ``λ → a^L λ`` and ``c_l → a^(L-l) c_l`` leave the shares as they are and multiply ρ by
    ``a^(2L-2)``: an exact symmetry of every rule. So one list of times, or one step size, fits all modes.

    Args:
        initial: Any modes with s = 1.
        pace: ``a^(2L-2)`` of each.
    """
    depth = initial.depth
    a = pace ** (1 / (2 * depth - 2))
    # fa's c_l is the product of the L - l factors above layer l, so that each of them takes one a; dfa's is a single
    # factor, which takes them all.
    powers = [depth - 1 - place if initial.rule == "dfa" else 1 for place in range(depth - 1)]
    return replace(
        initial,
        weights=initial.weights * a,
        feedback=torch.stack([m * a**power for m, power in zip(initial.feedback, powers, strict=True)]),
        target=initial.target * a**depth,
    )


def logarithmic_times(first: float, last: float, count: int) -> Float[Tensor, " times"]:
    """0, and then so many times evenly on a logarithmic axis."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(*_decades(first, last), count).double()])


def _decades(first: float, last: float) -> tuple[float, float]:
    low, high = torch.tensor([first, last], dtype=torch.float64).log10().tolist()
    return low, high


# When components are learned, and in which order: read off the shares ``θ_L…θ_1/λ`` along time.

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
    if at == 0:  # there is no record before it to draw a line from
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


def exponent(x: pl.Series, y: pl.Series) -> float:
    """Slope of log y on log x by least squares."""
    log_x, log_y = (values.cast(pl.Float64).log().to_numpy() for values in (x, y))
    return float(np.polyfit(log_x, log_y, 1)[0])


def orders(table: pl.DataFrame, *, by: Sequence[str], size: str = "target") -> pl.DataFrame:
    """``in_order`` of every group.

    Args:
        table: One row a component, "learned" its time.
        by: Columns that tell groups apart.
        size: Column of λ.

    Returns:
        One row a group, sorted: columns ``by``, "in_order", "components".
    """
    rows = [
        {**dict(zip(by, values, strict=True)), "in_order": in_order(runs[size].to_list(), runs["learned"].to_list())}
        | {"components": runs.height}
        for values, runs in sorted_groups(table, by)
    ]
    return pl.DataFrame(rows)
