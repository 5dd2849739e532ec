"""A scalar mode in gradient flow as a function of one of its weights: where it stands and how fast it moves."""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign.theory.deep_linear.modes import Modes

_EPSILON, _TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny

Points: TypeAlias = Float[Tensor, "modes points"]
Bounds: TypeAlias = tuple[Tensor, Tensor]
"""Least and greatest value [modes points]."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Modes along one axis, in float64, each a function of a single weight x that moves one way only.

    Under fa and dfa x is θ_1: ``x' = c_1 e`` and ``θ_{l+1} = (c_{l+1}/c_l)(K_l + θ_l²/2)``. The error is a polynomial
    of x and every root of it a fixed point, so that e keeps its sign, at any depth. Under bp x is the weight of least
    size: ``x' = (product of the others) e`` and ``θ_l² = x² + const``, where the others never change sign.

    ``line`` makes them.

    Attributes:
        modes: At the start.
        driver: The layer whose weight is x, from 0.

    Source: derived.
    """

    modes: Modes
    driver: Int[Tensor, " modes"]

    def take(self, chosen: Tensor) -> "Line":
        """Some of the modes."""
        return Line(modes=self.modes.take(chosen), driver=self.driver[chosen])

    @cached_property
    def start(self) -> Float[Tensor, " modes"]:
        """Where x starts."""
        return self.modes.weights.gather(0, self.driver[None])[0]

    def weights(self, x: Points) -> Float[Tensor, "layers modes points"]:
        """θ_1, …, θ_L at x."""
        if self.modes.rule == "bp":
            return torch.where(self._drives, x, self._signs * (x.square() + self._gaps).sqrt())
        weights = [x]
        for half, here, above in self._climb:
            weights.append(above + half * (weights[-1] - here) * (weights[-1] + here))
        return torch.stack(weights)

    def drive(self, x: Points) -> Points:
        """``x'/e``, which never changes sign."""
        if self.modes.rule != "bp":
            return self._carriers[0].expand_as(x)
        return self.weights(x).masked_fill(self._drives, 1.0).prod(0)

    def error(self, x: Points) -> Points:
        """``e`` at x."""
        return self._target - self._variance * self.weights(x).prod(0)

    def rounding(self, x: Points) -> Points:
        """How far e at x may be off: what is lost where weights are sums of large numbers, to first order."""
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

    def decay_rate(self, a: Points, b: Points) -> Bounds:
        """Bounds of ρ between a and b, by interval arithmetic: exact where a = b, and everywhere for two layers."""
        weights = self._bounds(a, b)
        one = torch.ones_like(a), torch.ones_like(a)
        above = [one]
        for bounds in weights[:0:-1]:
            above.insert(0, _times(bounds, above[0]))
        below, least, greatest = one, torch.zeros_like(a), torch.zeros_like(a)
        for layer, bounds in enumerate(weights):
            carried = _square(above[layer]) if self.modes.rule == "bp" else _scaled(self._carriers[layer], above[layer])
            low, high = _times(carried, _square(below))
            least, greatest = least + low, greatest + high
            below = _times(below, bounds)
        return self._variance * least, self._variance * greatest

    def _bounds(self, a: Points, b: Points) -> list[Bounds]:
        """Bounds of θ_1, …, θ_L between a and b."""
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
    def _carriers(self) -> Tensor:
        return self.modes.carriers[..., None]

    @cached_property
    def _climb(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``c_{l+1}/(2c_l)``, θ_l(0) and θ_{l+1}(0) of each pair of layers, each [modes 1]."""
        first, carriers = self.modes.weights[..., None], self._carriers
        return list(
            zip((carriers[1:] / carriers[:-1] / 2).unbind(), first[:-1].unbind(), first[1:].unbind(), strict=True)
        )

    @cached_property
    def _drives(self) -> Tensor:
        """Which layer's weight is x [layers modes 1]."""
        return (torch.arange(self.modes.depth)[:, None] == self.driver)[..., None]

    @cached_property
    def _signs(self) -> Tensor:
        return torch.where(self.modes.weights < 0, -1.0, 1.0).double()[..., None]

    @cached_property
    def _gaps(self) -> Tensor:
        """``θ_l² - x²``, constant under bp [layers modes 1]."""
        return (self.modes.weights.square() - self.start.square())[..., None]


def line(modes: Modes) -> Line:
    """The line of each mode."""
    flat = modes.flat().double()
    least = flat.weights.abs().argmin(0)
    return Line(modes=flat, driver=least if modes.rule == "bp" else torch.zeros_like(least))


def _without(weights: Tensor, layer: int) -> Tensor:
    return torch.cat([weights[:layer], weights[layer + 1 :]])


def _times(one: Bounds, other: Bounds) -> Bounds:
    ends = torch.stack([one[0] * other[0], one[0] * other[1], one[1] * other[0], one[1] * other[1]])
    return ends.amin(0), ends.amax(0)


def _scaled(factor: Tensor, bounds: Bounds) -> Bounds:
    ends = factor * bounds[0], factor * bounds[1]
    return torch.minimum(*ends), torch.maximum(*ends)


def _square(bounds: Bounds) -> Bounds:
    ends = bounds[0].square(), bounds[1].square()
    inside = (bounds[0] <= 0) & (bounds[1] >= 0)
    return torch.minimum(*ends).masked_fill(inside, 0.0), torch.maximum(*ends)
