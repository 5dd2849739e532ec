"""Sign-symmetric feedback: the error returns through the signs of the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from falign.rules.rule import Rule, signed

if TYPE_CHECKING:
    from falign._attached import Feedback
    from falign._scratch import Scratch


@dataclass(frozen=True, kw_only=True)
class UniformSignFeedback(Rule):
    """B = c · sign(W), taken anew at every pass.

    ``δ_{l-1} = φ' ⊙ c sign(W_l)ᵀ δ_l`` with one number c = scale / √spread a layer. sign(0) = 0.

    Needs: the sign of W. Limits: one bit of the weight is transported.

    Source: Liao, Leibo and Poggio 2016 (AAAI), "uniform sign-concordant feedback"; Moskovitz et al. 2018.
    """

    reads_weight: ClassVar[bool] = True
    magnitudes: ClassVar[bool] = True
    name: ClassVar[str] = "usf"
    draws: ClassVar[bool] = False

    def stored(self, draw: Callable[[], Tensor], deviation: float) -> Tensor:
        """The number c."""
        return torch.tensor(deviation, dtype=torch.float32, device="cpu")

    def sources(self, feedback: "Feedback", weight: Tensor | None, *, advance: bool) -> tuple[Tensor, ...]:
        """(c, W)."""
        assert weight is not None
        return feedback.matrix, weight.detach()

    def effective(self, *sources: Tensor, scratch: "Scratch | None" = None) -> Tensor:
        """C · sign(W)."""
        number, weight = sources
        return signed(weight, [number], scratch)


@dataclass(frozen=True, kw_only=True)
class FixedRandomSignFeedback(Rule):
    """B = |B₀| ⊙ sign(W): random magnitudes drawn once, the signs of the weights now.

    Needs: the sign of W. Limits: one bit of the weight is transported.

    Source: Liao, Leibo and Poggio 2016 (AAAI), "fixed random-magnitude sign-concordant feedback".
    """

    reads_weight: ClassVar[bool] = True
    magnitudes: ClassVar[bool] = True
    name: ClassVar[str] = "frsf"

    def stored(self, draw: Callable[[], Tensor], deviation: float) -> Tensor:
        """|B₀|."""
        return draw().abs()

    def sources(self, feedback: "Feedback", weight: Tensor | None, *, advance: bool) -> tuple[Tensor, ...]:
        """(|B₀|, W)."""
        assert weight is not None
        return feedback.matrix, weight.detach()

    def effective(self, *sources: Tensor, scratch: "Scratch | None" = None) -> Tensor:
        """|B₀| ⊙ sign(W)."""
        magnitude, weight = sources
        return signed(weight, [magnitude.reshape(-1)], scratch)
