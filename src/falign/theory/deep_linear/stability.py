"""Step sizes with which modes converge: one that is safe, and the largest."""

from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from falign.theory.deep_linear.learning import learning_time
from falign.theory.deep_linear.limits import settled
from falign.theory.deep_linear.line import line
from falign.theory.deep_linear.modes import Modes, modes
from falign.theory.deep_linear.reach import reach
from falign.theory.deep_linear.recursion import Recursion
from falign.theory.door import recording

_LOOKED_AT = 64
"""Modes whose stable rate is looked up before a descent: those that the rate is most likely to be too large for."""

_FINENESS, _MOST = 16, 1e4
"""Rates tried at once, and the most that is tried as a multiple of the sufficient rate."""

_BELOW, _APART, _APART_FROM_ZERO = 0.5, 0.001, 0.0001
"""From which share of the rate found all below is looked over once more, and in steps of which share of it."""

_SMALL, _LONGEST = 1e-6, 20_000
"""A share of λ at which an error is judged by the local rate, and the most steps."""


@recording
def sufficient_rate(modes: Modes) -> Float[Tensor, "*modes"]:
    """``1/ρ_max``, a step size with which a mode converges, ρ_max the largest ρ of gradient flow from this start.

    Of two layers ``ρ_max = s (mK + (3/2) max(θ_1(0)², θ_1*²))``; of more an upper bound by interval arithmetic. That it
    suffices is an observation (no exception in random draws), not a theorem: ``e⁺ = e (1 - ηρ - η² s m θ_1 e)`` falls
    where ``0 < ηρ + η² s m θ_1 e ≤ 1``. inf where ρ is nowhere positive.
    """
    path = line(modes)
    end = reach(path, torch.zeros_like(path.start)).nan_to_num(nan=0.0)
    largest = path.decay_rate(path.start[:, None], end[:, None])[1][:, 0].clamp(min=0)
    return largest.reciprocal().reshape(modes.target.shape).to(modes.target)


@recording
def stable_rate(modes: Modes) -> Float[Tensor, "*modes"]:
    """η_max, the supremum of the step sizes below which all converge, by trying them on the recursion itself.

    From zero weights it is ``2/ρ*`` times a number that only the depth sets, .769 for two layers: the recursion has
    one parameter then. Others are tried from well below ``1/ρ_max`` up in steps of 5 % to the first that fails. As
    rates that fail may lie between others that do not, the upper half below it is looked over in steps of .1 %, from
    zero weights of .01 %, and the first failure there is narrowed to 1e-4 or better: what fails in a gap that is
    narrower than that is missed. inf where the mode has no error at the start, nan where gradient flow itself never
    removes it.
    """
    flat = modes.flat().double()
    end, safe = settled(flat), sufficient_rate(flat)
    found = torch.full_like(flat.target, torch.inf)
    moving = flat.error != 0
    held = moving & (end.error.abs() > _SMALL * flat.error.abs())
    found[held] = torch.nan
    blank = moving & ~held & (flat.weights == 0).all(0) & (flat.rule != "bp")
    if blank.any():
        found[blank] = _share_from_zero(flat.depth) * 2 / end.decay_rate[blank]
    rows = (moving & ~held & ~blank & safe.isfinite()).nonzero()[:, 0]
    found[rows] = _tried(flat.take(rows), safe[rows])
    return found.reshape(modes.target.shape).to(modes.target)


def rates_too_large(modes: Modes, rate: float) -> str:
    """A sentence on the modes for which η is beyond the stable rate; empty where it is not.

    At most 64 modes are looked up, those with the largest ratio of η to the sufficient rate; from zero weights all.
    """
    flat = modes.flat().double()
    ratio = rate / sufficient_rate(flat)
    zero = (flat.weights == 0).all(0) & (flat.rule != "bp")
    suspect = (ratio > 1) & ~zero
    chosen = ratio.masked_fill(~suspect, 0.0).topk(min(_LOOKED_AT, int(suspect.sum()))).indices
    chosen = torch.cat([chosen, (zero & (ratio > 1)).nonzero()[:, 0]])
    if not len(chosen):
        return ""
    stable = stable_rate(flat.take(chosen)).nan_to_num(nan=torch.inf)
    beyond = stable < rate
    if not beyond.any():
        return ""
    least = int(stable.argmin())
    return (
        f"the rate {rate:g} is beyond what {int(beyond.sum())} of {len(ratio)} modes converge with: the one with "
        f"λ = {float(flat.target[chosen[least]]):g} needs less than {float(stable[least]):.4g}"
    )


@cache
def _share_from_zero(depth: int) -> float:
    """``η_max ρ*/2`` from zero weights."""
    mode = modes([1.0], [0.0] * depth)
    return float(_tried(mode, sufficient_rate(mode), _APART_FROM_ZERO) * settled(mode).decay_rate / 2)


def _tried(modes: Modes, safe: Tensor, apart: float = _APART) -> Float[Tensor, " modes"]:
    """The largest rates found below which all that were tried converge; inf where none fails."""
    good, bad = safe / 4, torch.full_like(safe, torch.inf)
    times = learning_time(modes, 0.01)
    ratios = 1.05 ** torch.arange(1, _FINENESS + 1, dtype=torch.float64)
    while (open_ := (bad.isinf() & (good < _MOST * safe)).nonzero()[:, 0]).numel():
        tried = ratios * good[open_, None]
        good[open_], bad[open_] = _bracket(modes.take(open_), times[open_], good[open_], tried)
    rows = bad.isfinite().nonzero()[:, 0]
    shares = torch.arange(_BELOW, 1, apart, dtype=torch.float64)
    for parts in (shares, *[torch.linspace(0, 1, _FINENESS + 2, dtype=torch.float64)[1:-1]] * 3):
        low = torch.zeros_like(good[rows]) if parts is shares else good[rows]
        rates = low[:, None] + parts * (bad[rows] - low)[:, None]
        low = torch.maximum(low, _BELOW * bad[rows] * (1 - apart))
        good[rows], above = _bracket(modes.take(rows), times[rows], low, rates)
        bad[rows] = torch.minimum(bad[rows], above)
    return good.where(bad.isfinite(), torch.inf)


def _bracket(modes: Modes, times: Tensor, good: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """The last rate before the first that fails, and that one; inf where none does. ``rates`` grow [modes tried]."""
    tried = rates.shape[1]
    rows = torch.arange(len(rates)).repeat_interleave(tried)
    fails = ~_converges(modes.take(rows), times[rows], rates.flatten()).view_as(rates)
    first = torch.where(fails.any(1), fails.int().argmax(1), tried)
    padded = torch.cat([good[:, None], rates, torch.full_like(good, torch.inf)[:, None]], 1)
    return padded.gather(1, first[:, None])[:, 0], padded.gather(1, first[:, None] + 1)[:, 0]


def _converges(modes: Modes, times: Tensor, rates: Tensor) -> Bool[Tensor, " modes"]:
    """Whether the recursion ends with a small error that still shrinks, each mode at a rate of its own.

    After about four times as many steps as gradient flow needs for 99 % (``times``), what is undecided is taken to
    converge if it fell by a tenth since half of them.
    """
    scale = torch.maximum(modes.target, modes.error.abs())
    needed = (4 * times / rates + 400).nan_to_num(posinf=_LONGEST).clamp(max=_LONGEST)
    converges = torch.zeros_like(rates, dtype=torch.bool)
    rows, reached, before = torch.arange(len(rates)), 0, modes.error.abs()
    recursion = Recursion(modes, rates.numpy())
    while len(rows):
        steps = max(reached, 64)
        recursion.take(steps)
        reached += steps
        now = modes.take(rows).at(torch.from_numpy(recursion.weights))
        error, contraction = now.error.abs(), rates[rows] * now.decay_rate
        small = (error <= _SMALL * scale[rows]) & (contraction > 0) & (contraction < 2) | (error == 0)
        over = reached >= needed[rows]
        converges[rows] = small | (over & (error <= 0.9 * before))
        left = ~small & ~over & error.isfinite()
        rows, before = rows[left], error[left]
        recursion = Recursion(now.take(left), rates[rows].numpy())
    return converges
