"""Backpropagation."""

from dataclasses import dataclass
from typing import ClassVar

from falign.rules.rule import Rule

__all__ = ["Backpropagation"]


@dataclass(frozen=True, kw_only=True)
class Backpropagation(Rule):
    """Ordinary autograd: nothing is attached to the model, gradients are equal to autograd's to the bit.

    ``δ_{l-1} = φ' ⊙ W_lᵀ δ_l``. It is here so that a comparison of rules has the same code path for its reference.

    Source: Rumelhart, Hinton and Williams 1986.
    """

    name: ClassVar[str] = "bp"
    wiring: ClassVar = "none"
    draws: ClassVar[bool] = False
