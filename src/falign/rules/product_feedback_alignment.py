"""Product feedback alignment: feedback through two matrices in a row, of which one learns."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from falign._scratch import Scratch
from falign.rules.rule import LayerState, Rule

__all__ = ["ProductFeedbackAlignment"]


@dataclass(frozen=True, kw_only=True)
class ProductFeedbackAlignment(Rule):
    """Errors cross a fixed random matrix P and then a learned one, R, which decays together with the weights.

    ``B = P R`` carries the error: ``δ_{l-1} = φ' ⊙ Rᵀ Pᵀ δ_l``. R receives ``Pᵀ ∇W``, the product of x with the error
    behind P, which its synapses see. P has orthonormal columns, so ``W - P R`` shrinks by (1 - ηλ) a step under SGD of
    rate η and weight decay λ, as W - B does under ``kp``, and no two neurons need equal weights in both directions: a
    neuron of the layer above sends its error to ``fan`` intermediate neurons, each of which hears ``fan`` of it.

    P is made of orthogonal blocks (fan, fan) along the outputs, so it costs fan/batch of a product of the layer, and
    R takes ∇W as it is computed anyway.

    Args:
        fan: size of the blocks; a layer of fewer outputs has one block of its size.

    Needs: an optimizer made from ``model.parameters()`` after ``convert``, with ``weight_decay``; for the law above SGD
    (Adam and its like step along coordinates, and P turns them).
    Limits: twice the parameters (R and P are in ``state_dict``).

    Source: Ji-An and Benna 2024 (Deep learning without weight symmetry), the variant with as many intermediate neurons
    as outputs and an orthogonal first matrix, which there is full.
    """

    name: ClassVar[str] = "pfa"
    learned: ClassVar[bool] = True
    reuses_gradient: ClassVar[bool] = True
    fan: int = 32

    def __post_init__(self) -> None:
        if self.fan < 1:
            raise ValueError(f"pfa: fan is {self.fan}, expected a whole number of at least 1")

    def factors(self, shape: tuple[int, ...], random: Generator) -> dict[str, Tensor]:
        """The blocks of P, (outputs // fan, fan, fan), and one for the outputs that are left."""
        blocks, rest = divmod(shape[0], self.fan)
        return {"P": _orthogonal(blocks, self.fan, random), "rest": _orthogonal(1, rest, random)}

    def feedback_inputs(self, layer: LayerState, weight: Tensor | None, *, advance: bool) -> tuple[Tensor, ...]:
        """(R, blocks of P, its last block)."""
        return layer.matrix, layer.get_buffer("P"), layer.get_buffer("rest")

    def feedback_matrix(self, *inputs: Tensor, scratch: Scratch | None = None) -> Tensor:
        """``P R``, of W's shape."""
        matrix, blocks, rest = inputs
        return _blockwise(matrix, blocks, rest)

    def learned_gradient(self, gradient: Tensor, *inputs: Tensor) -> Tensor:
        """``Pᵀ ∇W``."""
        _, blocks, rest = inputs
        return _blockwise(gradient, blocks.mT, rest.mT)


def _orthogonal(count: int, size: int, random: Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(count, size, size, generator=random, device="cpu", dtype=torch.float64))
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # without the signs not uniform over rotations


def _blockwise(matrix: Tensor, blocks: Tensor, rest: Tensor) -> Tensor:
    """Multiply the rows of a matrix (outputs, ...) by a block-diagonal one."""
    rows = matrix.flatten(1)
    covered = blocks.shape[0] * blocks.shape[1]
    product = blocks.to(rows.dtype) @ rows[:covered].unflatten(0, blocks.shape[:2])
    product = torch.cat([product.flatten(0, 1), rest[0].to(rows.dtype) @ rows[covered:]])
    return product.view(matrix.shape)
