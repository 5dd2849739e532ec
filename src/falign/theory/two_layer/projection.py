"""More points than dimensions: the part of a linear problem that a network can move."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public


@public
def project(
    X: Float[Tensor, "*seeds n d"], y: Float[Tensor, "*seeds n"]
) -> tuple[Float[Tensor, "*seeds m d"], Float[Tensor, "*seeds m"], Float[Tensor, "*seeds"]]:
    """Reduce n > d points to d: ``|XV - y|² = |RV - ȳ|² + |y_perp|²`` for every V.

    The columns of Q are an orthonormal basis of X's column space (its left singular vectors), m = min(n, d) many.
    A linear network's run on (R, ȳ) is its run on (X, y): e = Q ē + y_perp and y_perp never moves.

    Returns:
        R = QᵀX, whose Gram matrix is diagonal; ȳ = Qᵀy; |y_perp|².

    Source: Song, Xu and Lafferty 2021 (NeurIPS), section 4.2, "large sample scenario".
    """
    Q = torch.linalg.svd(X, full_matrices=False)[0]
    reduced = (Q.mT @ y.unsqueeze(-1)).squeeze(-1)
    rest = y - (Q @ reduced.unsqueeze(-1)).squeeze(-1)
    return Q.mT @ X, reduced, rest.square().sum(-1)
