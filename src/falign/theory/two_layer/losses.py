"""Losses of the output f and the error e = -∂loss/∂f that they send back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.inputs import told


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss over points and outputs.

    Attributes:
        name: ``squared`` or ``softmax``.
        error: (f, y) -> e, per point: what the loss of one point sends back, the sign being that of y - f.
        value: (f, y) -> loss, the two last axes (points, outputs) reduced.
        averaged: Whether the loss is a mean over the points, and the step hence divided by their number.
    """

    name: str
    error: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Tensor, Tensor], Tensor]
    averaged: bool


def _squared(f: Float[Tensor, "*runs n k"], y: Float[Tensor, "*#runs n k"]) -> Float[Tensor, "*runs"]:
    return (y - f).square().sum((-1, -2)) / 2


def _cross_entropy(f: Float[Tensor, "*runs n k"], y: Float[Tensor, "*#runs n k"]) -> Float[Tensor, "*runs"]:
    return -(y * f.log_softmax(-1)).sum(-1).mean(-1)


LOSSES: dict[str, Loss] = {
    "squared": Loss(name="squared", error=lambda f, y: y - f, value=_squared, averaged=False),
    "softmax": Loss(name="softmax", error=lambda f, y: y - torch.softmax(f, -1), value=_cross_entropy, averaged=True),
}
"""``squared``: ½ Σ|y - f|², a sum. ``softmax``: cross-entropy of softmax(f) with the class probabilities y, a mean."""


def loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {told(name)}: choose one of {', '.join(LOSSES)}")
    return LOSSES[name]
