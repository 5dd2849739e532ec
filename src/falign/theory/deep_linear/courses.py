"""Scalar modes over time: by steps, exactly as a network takes them, or in gradient flow, all modes at once."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign.theory.deep_linear.integration import integrated
from falign.theory.deep_linear.limits import settled
from falign.theory.deep_linear.line import line
from falign.theory.deep_linear.modes import Modes
from falign.theory.deep_linear.ranges import finite
from falign.theory.deep_linear.recursion import Recursion
from falign.theory.deep_linear.stability import rates_too_large
from falign.theory.door import recording, typed
from falign.theory.inputs import Numbers, positive, recorded, told, whole

_BLOCK = 10_240
"""Modes that are stepped together: with a few numbers each they stay in the processor's cache."""

_GROUP = 32
"""Modes that are integrated together, of like rates, so that the quick do not hold up the slow."""


@dataclass(frozen=True, kw_only=True)
class ModeCourse:
    """What ``descend`` or ``flow`` recorded.

    Attributes:
        modes: The modes at the start.
        rate: η; 0 in gradient flow.
        times: Time of each record, η a step [times].
        weights: θ_1, …, θ_L [times layers *modes]; nan from where a mode diverged.
        diverged: First step at which a mode was not finite, -1 where it always was [*modes].
        account: ``K_l - K_l(0)`` of steps, an exact identity: ``-½ Σ (Δθ_l)²``, of bp
            ``½ Σ (Δθ_{l+1})² - ½ Σ (Δθ_l)²``; 0 in gradient flow [times layers-1 *modes].
    """

    modes: Modes
    rate: float
    times: Float[Tensor, " times"]
    weights: Float[Tensor, "times layers *modes"]
    diverged: Int[Tensor, "*modes"]
    account: Float[Tensor, "times layers-1 *modes"]

    @typed
    def at(self, place: int) -> Modes:
        """The modes at a record."""
        return self.modes.at(self.weights[place])

    @property
    def product(self) -> Float[Tensor, "times *modes"]:
        """``θ_L…θ_1``."""
        return self.weights.prod(1)

    @property
    def error(self) -> Float[Tensor, "times *modes"]:
        """``e = λ - s θ_L…θ_1``."""
        return self.modes.target - self.modes.variance * self.product

    @property
    def loss(self) -> Float[Tensor, "times *modes"]:
        """``e²/(2s)``."""
        return self.error.square() / (2 * self.modes.variance)

    @property
    def share(self) -> Float[Tensor, "times *modes"]:
        """``s θ_L…θ_1 / λ``, how much of the mode is learned; nan where λ = 0."""
        share = self.modes.variance * self.product / self.modes.target
        return share.where(self.modes.target > 0, torch.nan)

    @property
    def invariants(self) -> Float[Tensor, "times links *modes"]:
        """K_l of every record."""
        return torch.stack([self.at(place).invariants for place in range(len(self.times))])


@recording
def descend(modes: Modes, *, rate: float, steps: int, at: Sequence[int] | None = None) -> ModeCourse:
    """Steps ``θ ← θ + η θ'`` of all layers together, as full batches of a network take them.

    A mode that overflows is nan from there; the others go on.

    Args:
        modes: Start.
        rate: η.
        steps: Their number.
        at: Steps to record at, increasing, the last at most ``steps``; None for about 100, evenly.

    Raises:
        ValueError: η is not positive, steps is no whole number, or the recording steps are out of order or range.

    Warns:
        UserWarning: η is beyond the stable rate of a mode, with that rate. From zero weights all modes are looked at,
            else the 64 whose sufficient rate η exceeds most.
    """
    positive("rate", rate)
    if not whole(steps) or steps < 1:
        raise ValueError(f"steps is {told(steps)}, expected a whole number from 1 on")
    at = recorded(steps, at)
    if warning := rates_too_large(modes, rate):
        warnings.warn(warning, stacklevel=2)
    flat = modes.flat()
    firsts = range(0, max(flat.target.numel(), 1), _BLOCK)
    blocks = [_walked(flat.take(slice(first, first + _BLOCK)), rate, at) for first in firsts]
    weights, account, diverged = (np.concatenate(parts, -1) for parts in zip(*blocks, strict=True))
    return _course(modes, rate, rate * torch.tensor(at, dtype=torch.float64), weights, account, diverged)


def _walked(modes: Modes, rate: float, at: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights and account of every record [records layers modes], and the step at which each mode was lost."""
    rates = np.full(modes.target.shape, rate, dtype=modes.weights.numpy().dtype)
    recursion, lost = Recursion(modes, rates), np.full(modes.target.shape, -1)
    weights = np.empty((len(at), *modes.weights.shape), dtype=rates.dtype)
    squares = np.empty_like(weights)
    reached = 0
    for place, step in enumerate(at):
        before = recursion.weights.copy()
        recursion.take(step - reached)
        newly = (lost < 0) & ~np.isfinite(recursion.weights).all(0)
        if newly.any():  # those few once more, looking after every step
            again = modes.at(torch.from_numpy(before)).take(torch.from_numpy(newly))
            lost[newly] = reached + Recursion(again, rates[newly]).take_until_lost(step - reached)
        weights[place] = np.where(lost < 0, recursion.weights, np.nan)
        squares[place] = np.where(lost < 0, recursion.squares, np.nan)
        reached = step
    upper = squares[:, 1:] if modes.rule == "bp" else 0.0
    return weights, (upper - squares[:, :-1]) / 2, lost


def _course(
    modes: Modes, rate: float, times: Tensor, weights: np.ndarray, account: np.ndarray, diverged: np.ndarray
) -> ModeCourse:
    """What was recorded of flat modes, in the shape and on the device of the modes given."""
    shaped = [
        torch.from_numpy(part).reshape((*part.shape[:-1], *modes.target.shape)).to(modes.target.device)
        for part in (weights, account, diverged)
    ]
    return ModeCourse(
        modes=modes, rate=float(rate), times=times, weights=shaped[0], account=shaped[1], diverged=shaped[2]
    )


@recording
def flow(modes: Modes, *, times: Numbers, tolerance: float = 1e-10) -> ModeCourse:
    """Gradient flow, integrated over the one weight of each mode that the invariants leave (SciPy's DOP853).

    Within ten tolerances of its limit a mode is on the exponential that leads there, so that late times cost nothing.

    Args:
        modes: Start.
        times: Where to record, increasing, from 0 on.
        tolerance: Relative error of a step in that weight.

    Raises:
        ValueError: the times are out of order or not finite, or the tolerance is not positive.
        RuntimeError: the integration stopped or took too long.
    """
    positive("tolerance", tolerance)
    moments = finite("times", times).double().cpu()
    if moments.ndim != 1 or not len(moments) or moments[0] < 0 or not (moments.diff() > 0).all():
        raise ValueError(f"times must increase from 0 on, got {moments.tolist()}: pass a list, such as [0.0, 1.0]")
    path, flat = line(modes), modes.flat()
    weights = torch.empty(len(moments), *path.modes.weights.shape, dtype=torch.float64)
    rates = torch.maximum(path.modes.decay_rate, settled(path.modes).decay_rate)
    for rows in rates.argsort().split(_GROUP):
        weights[..., rows] = integrated(path.take(rows), moments, tolerance / _GROUP**0.5)
    weights = weights.to(flat.weights.dtype).numpy()
    never = np.full(weights.shape[-1], -1)
    return _course(modes, 0.0, moments, weights, np.zeros_like(weights[:, :-1]), never)
