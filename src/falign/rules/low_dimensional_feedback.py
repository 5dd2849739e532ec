"""Low-dimensional feedback alignment: direct feedback of low rank, both of whose factors learn."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from falign._scratch import Scratch
from falign.rules._direct import DirectRule
from falign.rules.rule import LawKind, LayerState

__all__ = ["LowDimensionalFeedback"]


@dataclass(frozen=True, kw_only=True)
class LowDimensionalFeedback(DirectRule):
    """Direct feedback in which r numbers of the error reach each layer.

    ``error at x_l = (e Pᵀ) Q``, so ``B_l = Pᵀ Q``: P (r, outputs) says what of the error is heard, Q (r, features of
    x_l) spreads it. Q is a parameter with the gradient ``Σ (e Pᵀ)ᵀ x_l``, as B under ``dkp``; with weight decay that
    is Kolen-Pollack's step. P moves by itself, by Oja's rule, towards the subspace of the largest errors,

        P ← P + rate · mean(y (ê - y P)),    y = ê Pᵀ,  ê = e / √mean|e|²,

    once in every backward of training, before it delivers; means over the samples whose error is not zero, ê so that
    no scale of the loss matters. P begins with orthonormal rows; Q with P times what is drawn (or given) for B, of
    which ``Pᵀ Q`` then is the part of rank r.

    Args:
        positions: as for ``dfa``.
        rank: r; at most the number of outputs, of which a layer with fewer keeps all: there it is ``dkp``.
        rate: of P; 0 keeps it, random low-rank feedback that can settle where the error is not small.

    Needs: an optimizer made from ``model.parameters()`` after ``convert``; bounded or normalised activity.
    Limits: as ``dkp``; under DistributedDataParallel all processes take P of the first.

    Source: after Hanut and Kadmon 2025 (arXiv 2502.20580), of which we know abstract and notes: B = Q P, Q from the
    layer's activity and P e, P by Oja's rule. There B takes the place of each weight's transpose; direct delivery, the
    normalised error and the rates are ours. Oja's rule for subspaces: Oja 1989.
    """

    name: ClassVar[str] = "ldfa"
    learned: ClassVar[bool] = True
    advances: ClassVar[bool] = True
    size: ClassVar[float] = 0.5
    law: ClassVar[LawKind | None] = LawKind.MOVING
    moved: ClassVar[str] = "P"
    rank: int = 8
    rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"ldfa: rank is {self.rank}, expected a whole number of at least 1")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"ldfa: rate is {self.rate}, expected a number from 0 to 1")

    def factors(self, shape: tuple[int, ...], random: Generator) -> dict[str, Tensor]:
        """P, with orthonormal rows."""
        outputs = shape[0]
        square = torch.randn(outputs, outputs, generator=random, device="cpu", dtype=torch.float64)
        q, r = torch.linalg.qr(square)
        return {"P": (q * r.diagonal().sign()).mT[: self.rank].contiguous()}

    def feedback_inputs(self, layer: LayerState, weight: Tensor | None, *, advance: bool) -> tuple[Tensor, ...]:
        """(Q, P)."""
        return layer.matrix, layer.get_buffer("P")

    def feedback_matrix(self, *inputs: Tensor, scratch: Scratch | None = None) -> Tensor:
        """``Pᵀ Q``."""
        matrix, heard = inputs
        return heard.mT @ matrix

    def learned_gradient(self, gradient: Tensor, *inputs: Tensor) -> Tensor:
        """P times the gradient of B."""
        return inputs[1].to(gradient.dtype) @ gradient

    def observe_error(self, matrix: Tensor, error: Tensor, x: Tensor) -> Tensor:
        """One step of Oja's rule."""
        exact = torch.promote_types(matrix.dtype, torch.float32)
        error, kept = error.to(exact), matrix.to(exact)
        power = error.square().sum()
        error = error / power.clamp_min(torch.finfo(exact).tiny).sqrt()  # Σ over samples is now the mean of ê
        heard = error @ kept.mT
        return (kept + self.rate * heard.mT @ (error - heard @ kept)).to(matrix.dtype)
