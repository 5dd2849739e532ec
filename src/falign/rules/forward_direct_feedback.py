"""Forward direct feedback alignment: direct feedback that follows the mean Jacobian, found without a backward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from falign.rules._direct import DirectRule

__all__ = ["ForwardDirectFeedback", "GradientAlignedFeedback"]


@dataclass(frozen=True, kw_only=True)
class ForwardDirectFeedback(DirectRule):
    """Direct feedback that moves towards the mean Jacobian from its layer's input to the output.

    ``error at x_l = e B_l`` as under ``dfa``. Every so many steps ``falign.follow(model, x)`` makes a forward-mode pass
    with a random tangent p_l ~ N(0, 1) at every cut, whose output's tangent is u, and

        B_l ← (1 - rate) B_l + rate · mean(u p_lᵀ),    E[u p_lᵀ] = E[J_l].

    B begins at zero.

    Args:
        positions: as for ``dfa``.
        rate: of a pass.

    Needs: ``falign.follow`` every so many steps; operations with forward-mode derivatives. Limits: the estimate is
    noisy where a layer has many features: its entries have a variance of about Σ_l |J_l|²/(outputs · samples).

    Source: Bacho and Chu 2024 (Low-variance forward gradients using direct feedback alignment and momentum).
    """

    name: ClassVar[str] = "fdfa"
    draws: ClassVar[bool] = False
    adapts: ClassVar[bool] = True
    rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate <= 1:
            raise ValueError(f"{self.name}: rate is {self.rate}, expected a number above 0, at most 1")

    def init_feedback(self, draw: Callable[[], Tensor], deviation: float) -> Tensor:
        """Zeros, of the shape that would be drawn."""
        return torch.zeros_like(draw())

    def follow(self, matrix: Tensor, jacobian: Tensor) -> Tensor:
        """``(1 - rate) B + rate · Ĵ``."""
        return matrix.lerp(jacobian, self.rate)


@dataclass(frozen=True, kw_only=True)
class GradientAlignedFeedback(ForwardDirectFeedback):
    """Direct feedback that turns towards the mean Jacobian and keeps its size: GrAPE.

    As ``fdfa``, with another step: ``B ← B + rate · |B|² ∇_B cos∠(B, Ĵ)``, a rotation towards the estimate, and every
    column of B then has the norm that all have. Drawn as under ``dfa`` at first, so that there is a size to keep.

    Args:
        positions: as for ``dfa``.
        rate: of a pass.

    Needs: as ``fdfa``; its authors add one true mini-batch an epoch (``falign.calibrate``). Limits: as ``fdfa``.

    Source: Caillon et al. 2026 (GrAPE, ICLR), known to us from notes and reviews alone: the normalisation of columns to
    one norm is our reading.
    """

    name: ClassVar[str] = "grape"
    draws: ClassVar[bool] = True
    size: ClassVar[float] = 0.5
    rate: float = 0.5

    def init_feedback(self, draw: Callable[[], Tensor], deviation: float) -> Tensor:
        """Draw B."""
        return draw()

    def follow(self, matrix: Tensor, jacobian: Tensor) -> Tensor:
        """One step along the gradient of the cosine, then columns of one norm."""
        size, length = matrix.norm(), jacobian.norm()
        if not bool(size > 0) or not bool(length > 0):
            return matrix
        cosine = (matrix * jacobian).sum() / (size * length)
        turned = matrix + self.rate * (jacobian * (size / length) - cosine * matrix)
        columns = turned.norm(dim=0, keepdim=True)
        even = size / turned.shape[1] ** 0.5
        return torch.where(columns > 0, turned * (even / columns), turned)
