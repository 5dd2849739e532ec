"""Adaptive feedback alignment of PEPITA: feedback that is what modulating the network's input does to a layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from falign.rules._direct import DirectRule

__all__ = ["InputModulation"]


@dataclass(frozen=True, kw_only=True)
class InputModulation(DirectRule):
    """Direct feedback through the forward weights themselves: random F to the input, then forward to the layer.

    PEPITA runs the network a second time, on the input modulated by its error, ``x + e F``, and teaches each layer by
    the difference. To first order in F the difference is ``e F J_lᵀ``, J_l the Jacobian of the layer's activity by the
    input; of the first layer, without its slopes, ``F W₁ᵀ``: feedback that adapts because W₁ does. Here

        error at x_l = e B_l,    B_l ← (1 - rate) B_l + rate · |B_l| F E[J_l]ᵀ / |F E[J_l]ᵀ|, of the size it had,

    with J_l = ∂x_l/∂x_1 meant over the batch, by a forward-mode pass with tangent ``p F``, p ~ N(0, 1), in every
    ``falign.follow(model, x)``. F is B of the layer that runs first, drawn once and fixed. The size of B_l is
    that which was drawn for it; in the paper it is a matter of rates. F is as likely as -F, so signs are of no matter.

    Published as "adaptive feedback alignment"; that is not ``adafa``, whose B follows the transposed weights.

    Args:
        positions: as for ``dfa``.
        rate: of a pass.

    Needs: ``falign.follow`` every so many steps; operations with forward-mode derivatives. Limits: the estimate is
    noisy, as that of ``fdfa``; a layer to which no path leads from the one that runs first keeps the B that was drawn.

    Source: after Srinivasan, Mignacco, Sorbaro, Refinetti, Cooper, Kreiman and Dellaferrera 2024 (ICLR; arXiv
    2302.05440), of which we know abstract and summary; PEPITA: Dellaferrera and Kreiman 2022. There the slopes are
    those of the sample, and the perturbed pass teaches all layers.
    """

    name: ClassVar[str] = "afa"
    size: ClassVar[float] = 0.5
    adapts: ClassVar[bool] = True
    follows_input: ClassVar[bool] = True
    rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate <= 1:
            raise ValueError(f"afa: rate is {self.rate}, expected a number above 0, at most 1")

    def follow(self, matrix: Tensor, jacobian: Tensor) -> Tensor:
        """Move B towards the product, of B's own size, and keep that."""
        size, length = matrix.norm(), jacobian.norm()
        if not bool(size > 0) or not bool(length > 0):
            return matrix
        moved = torch.lerp(matrix, jacobian * (size / length), self.rate)
        return moved * (size / moved.norm().clamp_min(torch.finfo(moved.dtype).tiny))
