"""Gradient flow of scalar modes, which invariants reduce to one weight each: passages, limits, rates, integration."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign.theory._coerce import public
from falign.theory._simulate import solve
from falign.theory.deep_linear._modes import Modes

_EPSILON, _TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny

Points: TypeAlias = Float[Tensor, "modes points"]
_Bounds: TypeAlias = tuple[Tensor, Tensor]
"""Least and greatest value [modes points]."""


@dataclass(frozen=True, kw_only=True)
class ReducedOde:
    """Modes along one axis, in float64, each reduced to an equation of one weight x that moves one way only.

    Under fa and dfa x is θ_1: ``x' = c_1 e`` and ``θ_{l+1} = (c_{l+1}/c_l)(K_l + θ_l²/2)``. The error is a polynomial
    of x and every root of it a fixed point, so that e keeps its sign, at any depth. Under bp x is the weight of least
    size: ``x' = (product of the others) e`` and ``θ_l² = x² + const``, where the others never change sign.

    ``reduced_ode`` makes them.

    Attributes:
        modes: At the start.
        driver: The layer whose weight is x, from 0.

    Source: derived.
    """

    modes: Modes
    driver: Int[Tensor, " modes"]

    def take(self, chosen: Tensor) -> "ReducedOde":
        """Select some of the modes."""
        return ReducedOde(modes=self.modes.take(chosen), driver=self.driver[chosen])

    @cached_property
    def start(self) -> Float[Tensor, " modes"]:
        """The value of x at time 0."""
        return self.modes.weights.gather(0, self.driver[None])[0]

    def weights(self, x: Points) -> Float[Tensor, "layers modes points"]:
        """Compute θ_1, …, θ_L at x."""
        if self.modes.rule == "bp":
            return torch.where(self._drives, x, self._signs * (x.square() + self._gaps).sqrt())
        weights = [x]
        for half, here, above in self._climb:
            # Not as K + θ²/2: near the start that would cancel digits which the difference of squares keeps.
            weights.append(above + half * (weights[-1] - here) * (weights[-1] + here))
        return torch.stack(weights)

    def drive(self, x: Points) -> Points:
        """``x'/e``, which never changes sign."""
        if self.modes.rule != "bp":
            return self._feedback_factors[0].expand_as(x)
        return self.weights(x).masked_fill(self._drives, 1.0).prod(0)

    def error(self, x: Points) -> Points:
        """``e`` at x."""
        return self._target - self._variance * self.weights(x).prod(0)

    def rounding(self, x: Points) -> Points:
        """Bound the rounding error of e at x, to first order: large where weights are differences of large numbers."""
        weights, first = self.weights(x), self.modes.weights[..., None]
        if self.modes.rule == "bp":
            lost = weights.abs() + torch.where(self._gaps > 0, first.square() / weights.abs().clamp(min=_TINY), 0.0)
        else:
            parts = [x.abs()]
            for layer, (half, _, above) in enumerate(self._climb):
                moved, steep = weights[layer + 1] - above, 2 * half * weights[layer]
                parts.append(above.abs() + moved.abs() + steep.abs() * parts[-1])
            lost = torch.stack(parts)
        product = sum(lost[layer] * _without(weights, layer).prod(0).abs() for layer in range(len(lost)))
        return 8 * _EPSILON * (self._target + self._variance * product)

    def decay_rate(self, a: Points, b: Points) -> _Bounds:
        """Bound ρ between a and b, by interval arithmetic: exact where a = b, and everywhere for two layers."""
        weights = self._bounds(a, b)
        one = torch.ones_like(a), torch.ones_like(a)
        above = [one]
        for bounds in weights[:0:-1]:
            above.insert(0, _times(bounds, above[0]))
        below, least, greatest = one, torch.zeros_like(a), torch.zeros_like(a)
        for layer, bounds in enumerate(weights):
            carried = (
                _square(above[layer])
                if self.modes.rule == "bp"
                else _scaled(self._feedback_factors[layer], above[layer])
            )
            low, high = _times(carried, _square(below))
            least, greatest = least + low, greatest + high
            below = _times(below, bounds)
        return self._variance * least, self._variance * greatest

    def _bounds(self, a: Points, b: Points) -> list[_Bounds]:
        """Bound θ_1, …, θ_L between a and b."""
        x = torch.minimum(a, b), torch.maximum(a, b)
        if self.modes.rule == "bp":
            low, high = _square(x)
            sizes = [((low + gap).sqrt(), (high + gap).sqrt()) for gap in self._gaps]
            pairs = [_scaled(sign, size) for sign, size in zip(self._signs, sizes, strict=True)]
            return [
                (torch.where(drives, x[0], low), torch.where(drives, x[1], high))
                for drives, (low, high) in zip(self._drives, pairs, strict=True)
            ]
        weights = [x]
        for half, here, above in self._climb:
            low, high = _scaled(half, _square(weights[-1]))
            still = above - half * here.square()
            weights.append((still + low, still + high))
        return weights

    @cached_property
    def _target(self) -> Tensor:
        return self.modes.target[:, None]

    @cached_property
    def _variance(self) -> Tensor:
        return self.modes.variance[:, None]

    @cached_property
    def _feedback_factors(self) -> Tensor:
        return self.modes.feedback_factors[..., None]

    @cached_property
    def _climb(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``c_{l+1}/(2c_l)``, θ_l(0) and θ_{l+1}(0) of each pair of layers, each [modes 1]."""
        first, feedback_factors = self.modes.weights[..., None], self._feedback_factors
        return list(
            zip(
                (feedback_factors[1:] / feedback_factors[:-1] / 2).unbind(),
                first[:-1].unbind(),
                first[1:].unbind(),
                strict=True,
            )
        )

    @cached_property
    def _drives(self) -> Tensor:
        """True at the layer whose weight is x [layers modes 1]."""
        return (torch.arange(self.modes.depth)[:, None] == self.driver)[..., None]

    @cached_property
    def _signs(self) -> Tensor:
        return torch.where(self.modes.weights < 0, -1.0, 1.0).double()[..., None]

    @cached_property
    def _gaps(self) -> Tensor:
        """``θ_l² - x²``, constant under bp [layers modes 1]."""
        return (self.modes.weights.square() - self.start.square())[..., None]


def reduced_ode(modes: Modes) -> ReducedOde:
    """Reduce each mode to the equation of its driving weight."""
    flat = modes.flat().double()
    # Under bp all θ_l² - θ_i² are constant: only from the least weight is every other the root of a sum, never below 0.
    least = flat.weights.abs().argmin(0)
    return ReducedOde(modes=flat, driver=least if modes.rule == "bp" else torch.zeros_like(least))


def _without(weights: Tensor, layer: int) -> Tensor:
    return torch.cat([weights[:layer], weights[layer + 1 :]])


def _times(one: _Bounds, other: _Bounds) -> _Bounds:
    ends = torch.stack([one[0] * other[0], one[0] * other[1], one[1] * other[0], one[1] * other[1]])
    return ends.amin(0), ends.amax(0)


def _scaled(factor: Tensor, bounds: _Bounds) -> _Bounds:
    ends = factor * bounds[0], factor * bounds[1]
    return torch.minimum(*ends), torch.maximum(*ends)


def _square(bounds: _Bounds) -> _Bounds:
    ends = bounds[0].square(), bounds[1].square()
    inside = (bounds[0] <= 0) & (bounds[1] >= 0)
    return torch.minimum(*ends).masked_fill(inside, 0.0), torch.maximum(*ends)


# First passage: the x at which a mode in gradient flow first comes within a given error.

_NARROW = 3e-9
"""Relative width of an interval in which the error cannot dip and come back by more than rounding."""

_BLURRED = 1e-12
"""Rounding error of e, as a share of the level, from which on it is worth a second look."""

_DOUBLINGS, _HALVINGS = 2200, 200
"""Enough to cross the range of float64, and to find a number in it."""


def first_passage(ode: ReducedOde, level: Float[Tensor, " modes"]) -> Float[Tensor, " modes"]:
    """Find the x where |e| is first at most ``level``; nan where that is never.

    Intervals between the start and a point beyond are halved until each is known to hold no such x (the slope of e is
    bounded, or |e| grows throughout) or just one (|e| falls throughout). So the first one is found, not just any.

    Source: derived; interval bisection.
    """
    gap = _Gap(ode, level)
    passage = ode.start.clone()
    going = gap(passage[:, None])[:, 0] > 0
    passage[going] = torch.nan
    rows = (going & (gap.way != 0)).nonzero()[:, 0]
    passage[rows] = _first(gap.take(rows))
    # The search counts as 0 what may be rounding, so that noise cannot hide a passage; where that bound is not small to
    # the level, x is moved on to the passage of e as it is computed.
    blurred = ode.rounding(passage[:, None])[:, 0] > _BLURRED * level
    rows = (going & blurred & (level > 0)).nonzero()[:, 0]
    passage[rows] = _sharpened(gap.take(rows), passage[rows])
    return passage


@dataclass(frozen=True)
class _Gap:
    """``|e| - level`` as a function of x: e keeps the sign that it has at the start."""

    ode: ReducedOde
    level: Float[Tensor, " modes"]

    def take(self, chosen: Tensor) -> "_Gap":
        return _Gap(self.ode.take(chosen), self.level[chosen])

    @property
    def way(self) -> Tensor:
        """The direction of x, 1 or -1; 0 where a saddle of gradient descent is at the start or ahead [modes]."""
        start, error = self.ode.start, self.ode.modes.error
        way = (self.ode.drive(start[:, None])[:, 0] * error).sign()
        if self.ode.modes.rule != "bp":
            return way
        # Two weights of the least size reach 0 together: the product stops there and cannot change its sign.
        tied = (self.ode.modes.weights.abs() == start.abs()).sum(0) > 1
        return way.masked_fill(tied & (error > 0) & (way * start < 0), 0.0)  # the product is below 0 and tends to 0

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate it, counting what may be rounding as 0 [modes points]."""
        gap = self.bare(x)
        return gap.masked_fill(gap.abs() <= self.ode.rounding(x), 0.0)

    def bare(self, x: Tensor) -> Tensor:
        """Evaluate it as computed, rounding included."""
        return self.ode.modes.error.sign()[:, None] * self.ode.error(x) - self.level[:, None]


def _first(gap: _Gap) -> Float[Tensor, " modes"]:
    way, start = gap.way, gap.ode.start
    rows, near, far = torch.arange(len(start)), way * start, way * _beyond(gap, way)  # x times its way: it only grows
    low, best = near.clone(), far.clone()
    # Bisection on the sign alone could miss a dip of |e| below the level and back. An interval is settled only once
    # bounds of the slope show that |e| cannot reach the level in it, or that it does so just once.
    while len(rows):
        part, turn, middle = gap.take(rows), way[rows, None], (near + far) / 2
        at_middle, at_far = part(turn * torch.stack([middle, far], 1)).unbind(1)
        least, most = (bound[:, 0] for bound in part.ode.decay_rate(turn * near[:, None], turn * far[:, None]))
        steepest = torch.maximum(least.abs(), most.abs()) / part.ode.drive(turn * near[:, None])[:, 0].abs()
        # In an interval so narrow the slope's bounds are rounding themselves: its ends decide.
        narrow = far - near <= _NARROW * torch.maximum(near.abs(), far.abs())
        clear = (most <= 0) | (at_middle > steepest * (far - near) / 2)  # |e| grows, or cannot fall so far
        known = clear | (least >= 0) | (narrow & ((at_far <= 0) | (at_middle > 0)))
        for point, there in ((middle, ~known & (at_middle <= 0)), (far, at_far <= 0)):
            best.scatter_reduce_(0, rows[there], point[there], "amin")
        last = known & (at_far <= 0) & (far == best[rows])
        low[rows[last]] = near[last]
        rows, near, middle, far = (part[~known] for part in (rows, near, middle, far))
        rows, near, far = rows.repeat(2), torch.cat([near, middle]), torch.cat([middle, far])
        before = near < best[rows]  # what lies behind a passage already found cannot hold the first one
        rows, near, far = rows[before], near[before], far[before]
    return way * _halved(gap, way, low, best)


def _sharpened(gap: _Gap, x: Tensor) -> Float[Tensor, " modes"]:
    """Move on to where ``|e|`` as computed falls below the level, where that is close ahead.

    The passage found counted a bound of the rounding as 0, which is more than what rounding did.
    """
    way, near = gap.way, x[:, None]
    steep = gap.ode.decay_rate(near, near)[0][:, 0] / gap.ode.drive(near)[:, 0].abs()
    ahead = x + 4 * way * gap.bare(near)[:, 0].clamp(min=0) / steep
    rows = ((steep > 0) & (gap.bare(ahead[:, None])[:, 0] <= 0)).nonzero()[:, 0]
    part, side = gap.take(rows), way[rows]
    sharp = x.clone()
    sharp[rows] = side * _halved(part.bare, side, side * x[rows], side * ahead[rows])
    return sharp


def _beyond(gap: _Gap, way: Tensor) -> Float[Tensor, " modes"]:
    """Find a point past the one sought, by doubling."""
    start, modes = gap.ode.start, gap.ode.modes
    far = start.abs() + (modes.target / modes.variance) ** (1 / modes.depth)
    # Doubling 0 would stay at 0: λ = 0 from zero weights.
    far = far.clamp(min=torch.finfo(torch.float64).tiny)
    for _ in range(_DOUBLINGS):
        short = gap((start + way * far)[:, None])[:, 0] > 0
        if not short.any():
            break
        far[short] *= 2
    return start + way * far


def _halved(gap: Callable[[Tensor], Tensor], way: Tensor, low: Tensor, high: Tensor) -> Float[Tensor, " modes"]:
    """Halve the interval between a point short of the passage and one that is not, down to neighbouring numbers."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if ((middle == low) | (middle == high)).all():
            break
        short = gap((way * middle)[:, None])[:, 0] > 0
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return high


# Limits of gradient flow, and the exponential rates at which errors fall on the way and at the end.


@public
def settled(modes: Modes) -> Modes:
    """Return the modes at the limit of gradient flow.

    Under fa and dfa the error is 0 there, at any depth and from any start: a mode follows an ODE whose only fixed
    points have no error. Gradient descent may end at a saddle instead. At a bifurcation (two fixed points about to
    vanish, K = K_c) the limit is the double root, as far as float64 tells.
    """
    path = reduced_ode(modes)
    end = first_passage(path, torch.zeros_like(path.start)).nan_to_num(nan=0.0)  # the saddle is at 0
    weights = path.weights(end[:, None])[..., 0]
    return modes.at(weights.reshape(modes.weights.shape).to(modes.weights))


@public
def limit(modes: Modes) -> Float[Tensor, "*modes"]:
    """``θ_1*``, the first weight at the limit of gradient flow."""
    return settled(modes).weights[0]


@public
def asymptotic_rate(modes: Modes) -> Float[Tensor, "*modes"]:
    """``ρ*``, the rate ``e ~ exp(-ρ* t)`` at which the error finally falls.

    Of two layers with s = 1 ``mK + (3/2) θ_1*² = m λ/θ_1* + θ_1*²``. It is 0 only where two fixed points meet, K = K_c
    from below, and for λ = 0 with ``mK = 0``: the error then falls as a power of time.
    """
    return settled(modes).decay_rate


@public
def guaranteed_rate(modes: Modes) -> Float[Tensor, "*modes"]:
    """The rate r of ``|e(t)| ≤ |e(0)| exp(-r t)`` that the start guarantees; 0 where it guarantees none.

    Of fa and dfa ``r = s Π_l K_l`` where all ``K_l > 0``: the first term of ρ is ``s Π_l (K_l + θ_l²/2)`` and none is
    negative. Of bp ``r = s Π (θ_l² - θ_i²)`` over all layers but i, whose weight is the least: these differences are
    constant, and one term of ρ is the square of the product of all other weights.
    """
    if modes.rule == "bp":
        squares = modes.weights.square().sort(0).values
        return modes.variance * (squares[1:] - squares[0]).prod(0)
    invariants = modes.invariants
    return modes.variance * invariants.prod(0) * (invariants > 0).all(0)


# Integration over the one weight that drives each mode, up to any time.

_FINEST = 1e-13
"""The least relative error that a step in float64 can be held to."""

_NEAR, _LONGEST = 10, 50_000
"""Distance from its limit, in tolerances, at which a mode arrives, and the most evaluations until one does."""


def integrated(path: ReducedOde, times: Tensor, tolerance: float) -> Float[Tensor, "times layers modes"]:
    """Integrate each mode until it is next to its limit, from where an exponential takes over.

    An explicit solver would go on in steps as short as the quickest mode allows, for as long as the slowest takes.

    Args:
        path: The modes.
        times: Increasing, from 0 on.
        tolerance: Error of a step relative to the weight, or to the lesser of its start and its limit.

    Returns:
        Weights at the times.

    Raises:
        RuntimeError: the integration stopped or took too long.
    """
    start, end = path.start, settled(path.modes).weights.gather(0, path.driver[None])[0]
    sizes = torch.stack([start.abs(), end.abs()])
    least = sizes.masked_fill(sizes == 0, torch.inf).amin(0).nan_to_num(posinf=1.0)
    within, last = max(tolerance, _FINEST), float(times[-1])
    near = _NEAR * within * (least + end.abs())
    # An explicit solver stays at the step that the quickest mode's stability allows, however slow the rest is. So the
    # solution is cut where a mode arrives, that mode goes on by its formula, and the others start a new leg.
    driving = start.expand(len(times), -1).clone()
    rows, x, now = torch.arange(len(start)), start, 0.0
    while True:
        # Twice the margin at which the leg ends, as the solver finds that point to its tolerance only; or carried past
        # the limit.
        arrived = (end[rows] - x).abs() <= 2 * near[rows]
        arrived |= (end[rows] - x) * (end[rows] - start[rows]) <= 0
        _finish(path.take(rows[arrived]), times, driving, rows[arrived], x[arrived], end[rows[arrived]], now)
        rows, x = rows[~arrived], x[~arrived]
        if not len(rows) or now >= last:
            return path.weights(driving.T).permute(2, 0, 1)
        due, part = (times >= now).nonzero()[:, 0], path.take(rows)
        solution = solve(
            lambda _, x, part=part: _velocity(part, torch.from_numpy(x)).numpy(),
            (now, last),
            x.numpy(),
            times[due].numpy(),
            longest=_LONGEST,
            advice="ask for earlier times or a larger tolerance",
            method="DOP853",
            events=_FirstArrival(end[rows], near[rows] * (end[rows] - part.start).sign()),
            rtol=within,
            atol=(within * least[rows]).numpy(),
        )
        if not solution.success:
            raise RuntimeError(
                f"gradient flow stopped after t = {max(solution.t, default=0.0):.4g} ({solution.message})"
            )
        if len(solution.t):
            driving[due[: len(solution.t), None], rows] = torch.from_numpy(solution.y.T.copy())
        if solution.status == 0:
            return path.weights(driving.T).permute(2, 0, 1)
        now, x = float(solution.t_events[0][0]), torch.from_numpy(solution.y_events[0][0].copy())


class _FirstArrival:
    """The event that crosses 0 where the first of some modes is within a margin of its limit; it ends a solution."""

    terminal = True

    def __init__(self, end: Tensor, margin: Tensor):
        self._end, self._margin = end, margin

    def __call__(self, time: float, x: np.ndarray) -> float:
        return float(((self._end - torch.from_numpy(x)) / self._margin).min()) - 1


def _velocity(path: ReducedOde, x: Tensor) -> Float[Tensor, " modes"]:
    here = x[:, None]
    return (path.drive(here) * path.error(here))[:, 0]


def _finish(path: ReducedOde, times: Tensor, driving: Tensor, rows: Tensor, x: Tensor, end: Tensor, now: float) -> None:
    """Write to ``driving``, columns ``rows``, the approach from x to the limit, where x' is linear to the tolerance."""
    gap = x - end
    rate = torch.where(gap != 0, -_velocity(path, x) / gap, 0.0).clamp(min=0)
    late = (times >= now).nonzero()
    driving[late, rows] = end + gap * torch.exp(-rate * (times[late] - now))
