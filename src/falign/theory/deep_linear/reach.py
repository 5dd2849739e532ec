"""Where a mode in gradient flow first comes within a given error."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.deep_linear.line import Line

_NARROW = 3e-9
"""Relative width of an interval in which the error cannot dip and come back by more than rounding."""

_BLURRED = 1e-12
"""Rounding error of e, as a share of the level, from which on it is worth a second look."""

_DOUBLINGS, _HALVINGS = 2200, 200
"""Enough to cross the range of float64, and to find a number in it."""


def reach(line: Line, level: Float[Tensor, " modes"]) -> Float[Tensor, " modes"]:
    """The x where |e| is first at most ``level``; nan where that is never.

    Intervals between the start and a point beyond are halved until each is known to hold no such x (the slope of e is
    bounded, or |e| grows throughout) or just one (|e| falls throughout). So the first one is found, not just any.

    Source: derived; interval bisection.
    """
    gap = _Gap(line, level)
    found = line.start.clone()
    going = gap(found[:, None])[:, 0] > 0
    found[going] = torch.nan
    rows = (going & (gap.way != 0)).nonzero()[:, 0]
    found[rows] = _first(gap.take(rows))
    blurred = line.rounding(found[:, None])[:, 0] > _BLURRED * level
    rows = (going & blurred & (level > 0)).nonzero()[:, 0]
    found[rows] = _sharpened(gap.take(rows), found[rows])
    return found


@dataclass(frozen=True)
class _Gap:
    """``|e| - level`` along the lines: e taken with the sign that it has at the start, and keeps."""

    line: Line
    level: Float[Tensor, " modes"]

    def take(self, chosen: Tensor) -> "_Gap":
        return _Gap(self.line.take(chosen), self.level[chosen])

    @property
    def way(self) -> Tensor:
        """Up or down, as x moves; 0 where a saddle of gradient descent is at the start or ahead [modes]."""
        start, error = self.line.start, self.line.modes.error
        way = (self.line.drive(start[:, None])[:, 0] * error).sign()
        if self.line.modes.rule != "bp":
            return way
        tied = (self.line.modes.weights.abs() == start.abs()).sum(0) > 1
        return way.masked_fill(tied & (error > 0) & (way * start < 0), 0.0)  # the product is below 0 and tends to 0

    def __call__(self, x: Tensor) -> Tensor:
        """At most 0 where it is reached, rounding counting as 0 [modes points]."""
        gap = self.bare(x)
        return gap.masked_fill(gap.abs() <= self.line.rounding(x), 0.0)

    def bare(self, x: Tensor) -> Tensor:
        """The same as it is computed."""
        return self.line.modes.error.sign()[:, None] * self.line.error(x) - self.level[:, None]


def _first(gap: _Gap) -> Float[Tensor, " modes"]:
    way, start = gap.way, gap.line.start
    rows, near, far = torch.arange(len(start)), way * start, way * _beyond(gap, way)  # x times its way: it only grows
    low, best = near.clone(), far.clone()
    while len(rows):
        part, turn, middle = gap.take(rows), way[rows, None], (near + far) / 2
        at_middle, at_far = part(turn * torch.stack([middle, far], 1)).unbind(1)
        least, most = (bound[:, 0] for bound in part.line.decay_rate(turn * near[:, None], turn * far[:, None]))
        steepest = torch.maximum(least.abs(), most.abs()) / part.line.drive(turn * near[:, None])[:, 0].abs()
        narrow = far - near <= _NARROW * torch.maximum(near.abs(), far.abs())
        clear = (most <= 0) | (at_middle > steepest * (far - near) / 2)  # |e| grows, or cannot fall so far
        known = clear | (least >= 0) | (narrow & ((at_far <= 0) | (at_middle > 0)))
        for point, there in ((middle, ~known & (at_middle <= 0)), (far, at_far <= 0)):
            best.scatter_reduce_(0, rows[there], point[there], "amin")
        last = known & (at_far <= 0) & (far == best[rows])
        low[rows[last]] = near[last]
        rows, near, middle, far = (part[~known] for part in (rows, near, middle, far))
        rows, near, far = rows.repeat(2), torch.cat([near, middle]), torch.cat([middle, far])
        before = near < best[rows]
        rows, near, far = rows[before], near[before], far[before]
    return way * _halved(gap, way, low, best)


def _sharpened(gap: _Gap, x: Tensor) -> Float[Tensor, " modes"]:
    """Where ``|e|`` as computed falls below the level, close ahead: what counts as rounding is an upper bound of it."""
    way, near = gap.way, x[:, None]
    steep = gap.line.decay_rate(near, near)[0][:, 0] / gap.line.drive(near)[:, 0].abs()
    ahead = x + 4 * way * gap.bare(near)[:, 0].clamp(min=0) / steep
    rows = ((steep > 0) & (gap.bare(ahead[:, None])[:, 0] <= 0)).nonzero()[:, 0]
    part, side = gap.take(rows), way[rows]
    sharp = x.clone()
    sharp[rows] = side * _halved(part.bare, side, side * x[rows], side * ahead[rows])
    return sharp


def _beyond(gap: _Gap, way: Tensor) -> Float[Tensor, " modes"]:
    """A point that is past the one sought."""
    start, modes = gap.line.start, gap.line.modes
    far = start.abs() + (modes.target / modes.variance) ** (1 / modes.depth)
    far = far.clamp(min=torch.finfo(torch.float64).tiny)
    for _ in range(_DOUBLINGS):
        short = gap((start + way * far)[:, None])[:, 0] > 0
        if not short.any():
            break
        far[short] *= 2
    return start + way * far


def _halved(gap: Callable[[Tensor], Tensor], way: Tensor, low: Tensor, high: Tensor) -> Float[Tensor, " modes"]:
    """Where the gap is first 0, between a point short of it and one that is not."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if ((middle == low) | (middle == high)).all():
            break
        short = gap((way * middle)[:, None])[:, 0] > 0
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return high
