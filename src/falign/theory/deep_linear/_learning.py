"""Learning times of modes in gradient flow by quadrature, and how they depend on a mode's size."""

import torch
from jaxtyping import Float
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from falign._validation import describe, positive, whole_between
from falign.theory._coerce import public, recording
from falign.theory.deep_linear._flow import ReducedOde, first_passage, reduced_ode
from falign.theory.deep_linear._modes import DEEPEST, Modes

_ACCURACY = 1e-11
"""Relative difference at which an integral and the sum of its halves are taken to be equal."""

_NODES, _WEIGHTS = (torch.from_numpy(part) for part in leggauss(12))


@recording
def learning_time(modes: Modes, tolerance: float = 0.1) -> Float[Tensor, "*modes"]:
    """First time at which ``|e| ≤ tolerance · λ``, by quadrature of ``t = ∫ dx / x'`` over the weight that drives it.

    Any depth, under fa, dfa and bp. It is 0 where that holds at the start and inf where it never does: where λ = 0, as
    |e| then only tends to 0, and where gradient descent is held by a saddle (two weights of equal size, the product on
    the wrong side of 0). Accurate to about 1e-10, or to
    what rounding leaves of an error that nearly vanishes on the way, close to a bifurcation, or at the end, where λ is
    small to the weights: of two layers up to ``2e-16 s (|mK| + θ_1²) |θ_1/m| / (tolerance · λ)``, relative, at the
    start; of λ = 1e-8 and θ = (3, 0) 6e-7.

    Args:
        modes: Start.
        tolerance: Share of λ, above 0 and below 1.

    Raises:
        ValueError: the tolerance is another.

    Source: derived.
    """
    return learning_time_and_slope(modes, tolerance)[0]


@recording
def learning_slope(modes: Modes, tolerance: float = 0.1) -> Float[Tensor, "*modes"]:
    """``d ln t / d ln λ`` of the learning time, the start held: below 0 larger modes are learned first.

    ``dt/dλ = (1 ∓ tolerance) / (ρe) - ∫ dx / (x' e)``, the first term at the end. nan where the time is 0 or inf, and
    where it jumps.

    Args:
        modes: Start.
        tolerance: As in ``learning_time``.

    Raises:
        ValueError: the tolerance is out of range.

    Source: derived.
    """
    return learning_time_and_slope(modes, tolerance)[1]


@recording
def learning_time_and_slope(modes: Modes, tolerance: float = 0.1) -> tuple[Tensor, Tensor]:
    """``learning_time`` and ``learning_slope``, nan where that is, from one quadrature.

    Returns:
        Both [modes].

    Raises:
        ValueError: As ``learning_time``.
    """
    if positive("tolerance", tolerance) >= 1:
        raise ValueError(f"tolerance is {describe(tolerance)}, expected a share of λ, below 1")
    path = reduced_ode(modes)
    level = tolerance * path.modes.target
    end = first_passage(path, level)
    time = torch.where(end == path.start, 0.0, torch.inf).double()
    slope = torch.full_like(time, torch.nan)
    rows = ((end != path.start) & end.isfinite() & (level > 0)).nonzero()[:, 0]
    path, end = path.take(rows), end[rows]
    time[rows], within = _passage(path, end)
    error = path.error(end[:, None])[:, 0]
    rate = path.decay_rate(end[:, None], end[:, None])[0][:, 0]
    change = (1 - tolerance * error.sign()) / (rate * error) - within
    slope[rows] = path.modes.target * change / time[rows]
    shape = modes.target.shape
    return time.reshape(shape).to(modes.target), slope.reshape(shape).to(modes.target)


@public
def depth_slope(depth: int) -> float:
    """Slope of the learning time in λ, log-log, from zero weights: ``-(2^L - 2)/(2^L - 1)``; -2/3, -6/7, -14/15.

    Of the fa and dfa chains: ``θ_l ∝ θ_1^(2^(l-1))``, so that the product goes with the power ``2^L - 1`` of θ_1.

    Raises:
        ValueError: there are fewer than two layers.

    Source: derived.
    """
    whole_between("depth", depth, 2, DEEPEST)
    return -(2**depth - 2) / (2**depth - 1)


def _passage(path: ReducedOde, end: Tensor) -> tuple[Tensor, Tensor]:
    """``∫ dx / x'`` and ``∫ dx / (x' e)`` from the start to ``end`` [modes], by Gauss' rule on halved intervals."""
    totals = torch.zeros(2, len(end), dtype=torch.float64)
    rows, a, b = torch.arange(len(end)), path.start, end
    # 1/x' peaks wherever the error nearly vanishes on the way: only intervals that halving still changes are halved.
    whole = _integrals(path, a, b)
    while len(rows):
        part, middle = path.take(rows), (a + b) / 2
        left, right = _integrals(part, a, middle), _integrals(part, middle, b)
        halves = left + right
        off = ((whole - halves) / halves).abs().amax(0)
        done = ~(off > _ACCURACY)
        # Close to such a peak rounding of e, not the rule, sets the difference: halving on would never end.
        done[~done] = off[~done] <= _noise(part.take(~done), a[~done], b[~done])
        totals.index_add_(1, rows[done], halves[:, done])
        rows, a, middle, b = (part[~done] for part in (rows, a, middle, b))
        whole = torch.cat([left[:, ~done], right[:, ~done]], 1)
        rows, a, b = rows.repeat(2), torch.cat([a, middle]), torch.cat([middle, b])
    return totals[0], totals[1]


def _integrals(path: ReducedOde, a: Tensor, b: Tensor) -> Float[Tensor, "2 modes"]:
    half = (b - a)[:, None] / 2
    x = a[:, None] + half * (1 + _NODES)
    error = path.error(x)
    slowness = half / (path.drive(x) * error)
    return torch.stack([slowness, slowness / error]) @ _WEIGHTS


def _noise(path: ReducedOde, a: Tensor, b: Tensor) -> Float[Tensor, " modes"]:
    """Bound the relative error that the rounding of e leaves in an integral from a to b."""
    x = torch.stack([a, (a + b) / 2, b], 1)
    return 4 * (path.rounding(x) / path.error(x).abs()).amax(1)
