"""Losses as means over the batch, and the error ``∂L/∂f`` that the output hands back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public, typed
from falign.theory.inputs import told


@typed
@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss of the outputs f [runs n k] and targets y [n k].

    Attributes:
        name: What the table calls it.
        value: (f, y) -> the loss of each point, [runs n].
        slope: (f, y) -> its derivative in f, [runs n k].
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]

    @public
    def mean(self, f: Float[Tensor, "runs n k"], y: Float[Tensor, "*#runs n k"]) -> Float[Tensor, " runs"]:
        """The loss ``L``, a mean over the points."""
        return self.value(f, y).mean(-1)

    @public
    def error(self, f: Float[Tensor, "runs n k"], y: Float[Tensor, "*#runs n k"]) -> Float[Tensor, "runs n k"]:
        """``δ = ∂L/∂f``, the 1/n of the mean included."""
        return self.slope(f, y) / f.shape[-2]


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(name="squared", value=lambda f, y: (f - y).square().sum(-1) / 2, slope=lambda f, y: f - y),
        Loss(
            name="softmax",
            value=lambda f, y: -(y * f.log_softmax(-1)).sum(-1),
            slope=lambda f, y: y.sum(-1, keepdim=True) * f.softmax(-1) - y,
        ),
        Loss(
            name="logistic",
            value=lambda f, y: torch.nn.functional.softplus(-y * f).sum(-1),
            slope=lambda f, y: -y * torch.sigmoid(-y * f),
        ),
    )
}
"""``squared``: ½|f - y|². ``softmax``: cross-entropy, y class probabilities. ``logistic``: y = ±1, outputs summed."""


def loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in LOSSES:
        raise ValueError(f"unknown loss {told(name)}: choose one of {', '.join(LOSSES)}")
    return LOSSES[name]
