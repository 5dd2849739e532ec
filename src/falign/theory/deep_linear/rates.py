"""Steps of linear networks, and what is said of their size where it was too large."""

import warnings
from collections import deque
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.conservation import Dynamics, State, velocity
from falign.theory.conservation.network import Points
from falign.theory.deep_linear.modes import Rule
from falign.theory.deep_linear.network import linear, local_rate
from falign.theory.inputs import positive, told, whole

_QUICK, _HALVINGS = 0.5, 40
"""The share that warnings go by, and how often a rate that was too large is halved."""


def warn_of_rate(
    rate: float, ends: tuple[State, State], X: Float[Tensor, "n d"], Y: Points, rule: Rule, steps: int
) -> None:
    """Warn where steps were too large: weights that are not ``finite``, or a rate above ``local_rate`` at either end.

    Where they are not, the rate that is named was tried: its run ends finite and below ``local_rate`` there.

    Args:
        rate: η.
        ends: The networks at the start and at the end of their run.
        X: Inputs.
        Y: Targets.
        rule: How the error returned.
        steps: The number that were to be taken.
    """
    if not finite(ends[1]):
        told = f"rate {rate:g} is too large: the weights diverge"
        tried = min(rate, float(local_rate(ends[0], X, rule, share=_QUICK).min()))
        for _ in range(_HALVINGS):
            tried /= 2
            ((_, end),) = deque(stepped(ends[0], linear(rule), X, Y, tried, steps), maxlen=1)
            if finite(end) and tried <= float(local_rate(end, X, rule, share=_QUICK).min()):
                told += f"; a run at {tried:.3g} ends stable"
                break
        warnings.warn(told, stacklevel=3)
        return
    for place, state in zip(("start", "end"), ends, strict=True):
        if rate > (largest := float(local_rate(state, X, rule, share=_QUICK).min())):
            warnings.warn(f"rate {rate:g} is beyond {largest:.4g}, stable at the {place} of the run", stacklevel=3)


def stepped(
    state: State, dynamics: Dynamics, X: Tensor, Y: Points, rate: float, steps: int
) -> Iterator[tuple[State, State]]:
    """Each step's networks, before and after, up to the first step that is not ``finite``.

    Raises:
        ValueError: the rate is not positive, or the steps are no whole number from 1 on.
    """
    positive("rate", rate)
    if not whole(steps) or steps < 1:
        raise ValueError(f"steps is {told(steps)}, expected a whole number from 1 on")
    for _ in range(steps):
        after = state.map(lambda value, change: value + rate * change, velocity(state, dynamics, X, Y))
        yield state, after
        state = after
        if not finite(state):
            return


def finite(state: State) -> bool:
    """Whether every weight, and what the product of four of them is, are numbers."""
    return all(bool((W.abs() < torch.finfo(W.dtype).max ** 0.25).all()) for W in state.W)
