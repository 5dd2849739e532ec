"""Ridge on the output layer's weights: how strong it is at a step, and what it does."""

from collections.abc import Callable

import torch
from torch import Tensor

from falign.theory.two_layer.schedules import SCHEDULES

__all__ = ["SCHEDULES", "Ridge"]


class Ridge:
    """``W(t+1) = (1 - ηλ(t)) W(t) - …``, whatever the optimizer puts in place of the dots.

    The penalty is taken from the weights before the step and apart from the gradient, so no momentum, no
    adaptive rate and no weight decay of the optimizer sees it. With plain SGD it equals adding ``λ(t) W`` to
    the gradient.

    Args:
        weight: The output layer's weights.
        strength: λ.
        schedule: A name of ``SCHEDULES``.
        steps: T, in steps; None for a schedule without one.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), theorem 4.6 and the schedules named with it.
    """

    def __init__(self, weight: Tensor, *, strength: float, schedule: str, steps: float | None) -> None:
        self._weight = weight
        self._strength = strength
        self._schedule = SCHEDULES[schedule]
        self._steps = 1.0 if steps is None else steps

    def around(self, update: Callable[[], object], t: int, *, rate: float) -> None:
        """Make the optimizer's update and the ridge's, both from W(t).

        Args:
            update: What makes the optimizer's step.
            t: Steps done before this one.
            rate: η, the learning rate of this step.
        """
        shrink = rate * self._schedule(self._strength, self._steps, t)
        old = self._weight.detach().clone() if shrink else None
        update()
        if old is not None:
            with torch.no_grad():
                self._weight.sub_(old, alpha=shrink)
