"""Sign-symmetric feedback: the error returns through the signs of the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from falign._scratch import Scratch, signed
from falign.rules.rule import LawKind, LayerState, Rule

__all__ = ["FixedRandomSignFeedback", "UniformSignFeedback"]


@dataclass(frozen=True, kw_only=True)
class UniformSignFeedback(Rule):
    """B = c · sign(W), taken anew at every pass.

    ``δ_{l-1} = φ' ⊙ c sign(W_l)ᵀ δ_l`` with one number c = scale / √fan_in a layer. sign(0) = 0.

    Needs: the sign of W. Limits: one bit of the weight is transported.

    Source: Liao, Leibo and Poggio 2016 (AAAI), "uniform sign-concordant feedback"; Moskovitz et al. 2018.
    """

    reads_weight: ClassVar[bool] = True
    magnitudes: ClassVar[bool] = True
    law: ClassVar = LawKind.SIGNS
    name: ClassVar[str] = "usf"
    draws: ClassVar[bool] = False

    def init_feedback(self, draw: Callable[[], Tensor], deviation: float) -> Tensor:
        """The number c."""
        return torch.tensor(deviation, dtype=torch.float32, device="cpu")

    def feedback_inputs(self, layer: LayerState, weight: Tensor | None, *, advance: bool) -> tuple[Tensor, ...]:
        """(c, W)."""
        assert weight is not None
        return layer.matrix, weight.detach()

    def feedback_matrix(self, *inputs: Tensor, scratch: Scratch | None = None) -> Tensor:
        """C · sign(W)."""
        number, weight = inputs
        return signed(weight, [number], scratch)


@dataclass(frozen=True, kw_only=True)
class FixedRandomSignFeedback(Rule):
    """B = |B₀| ⊙ sign(W): random magnitudes drawn once, the signs of the weights now.

    Needs: the sign of W. Limits: one bit of the weight is transported.

    Source: Liao, Leibo and Poggio 2016 (AAAI), "fixed random-magnitude sign-concordant feedback".
    """

    reads_weight: ClassVar[bool] = True
    magnitudes: ClassVar[bool] = True
    law: ClassVar = LawKind.SIGNS
    name: ClassVar[str] = "frsf"

    def init_feedback(self, draw: Callable[[], Tensor], deviation: float) -> Tensor:
        """|B₀|."""
        return draw().abs()

    def feedback_inputs(self, layer: LayerState, weight: Tensor | None, *, advance: bool) -> tuple[Tensor, ...]:
        """(|B₀|, W)."""
        assert weight is not None
        return layer.matrix, weight.detach()

    def feedback_matrix(self, *inputs: Tensor, scratch: Scratch | None = None) -> Tensor:
        """|B₀| ⊙ sign(W)."""
        magnitude, weight = inputs
        return signed(weight, [magnitude.reshape(-1)], scratch)
