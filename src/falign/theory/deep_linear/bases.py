"""The bases in which Σ_xx and Σ_yx of data are both diagonal, where there are any."""

from collections.abc import Iterator

import torch
from torch import Tensor

from falign.theory.deep_linear.covariances import covariances
from falign.theory.door import public
from falign.theory.inputs import Numbers


@public
def common_bases(X: Numbers, Y: Numbers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``U, λ, s, V`` with ``Σ_yx = U diag(λ) Vᵀ`` and ``Σ_xx = V diag(s) Vᵀ``; modes without either left out.

    Singular values that are equal leave their vectors free; they are turned so that Σ_xx is diagonal too. Equal, or
    off the diagonal, is what differs from 0 by the root of the rounding of the data's type.

    Returns:
        U [outputs outputs] and V [d d], orthogonal, the modes first; λ and s [modes], λ falling.

    Raises:
        ValueError: all inputs are zero, or no bases make both diagonal; the message has what stands off the diagonal.
    """
    xx, yx = covariances(X, Y)
    eps, tiny = torch.finfo(xx.dtype).eps, torch.finfo(xx.dtype).tiny
    limit, size = eps**0.5, float(xx.abs().max())
    if not size:
        raise ValueError(f"all {len(xx)} features of the inputs are zero: nothing can be learned of them")
    V, largest = _turned(xx, yx, limit)
    off = xx.new_tensor(0.0) + (V.mT @ xx @ V - (V.mT @ xx @ V).diagonal().diag()).abs().max() / size
    if off > limit:
        raise ValueError(
            f"Σ_xx holds {float(off):.3g} of its largest number off the diagonal in the singular vectors of Σ_yx, "
            f"expected at most {limit:.2g}: pass whitened(X), or data from task(...) or points_of(...)"
        )
    noise = 8 * max(yx.shape) * eps * max(largest, tiny)
    λ = (yx @ V).norm(dim=0)
    order = (λ / noise).round().argsort(descending=True, stable=True)  # of equal λ the larger variance stays first
    V, λ = V[:, order], λ[order]
    learned, rank = int((λ > noise).sum()), min(yx.shape)
    U, R = torch.linalg.qr((yx @ V)[:, :learned], mode="complete")
    U[:, :learned] *= R.diagonal()[:learned].sign()
    λ = λ.where(λ > noise, 0.0)[:rank]
    s = (V.mT @ xx @ V).diagonal()[:rank]
    kept = (s > limit * float(s.max())) | (λ > 0)
    order = torch.cat([kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]])
    U = torch.cat([U[:, order], U[:, rank:]], 1)
    V = torch.cat([V[:, order], V[:, rank:]], 1)
    return U, λ[kept], s[kept], V


def _turned(xx: Tensor, yx: Tensor, limit: float) -> tuple[Tensor, float]:
    """V, and the largest λ: where λ are near each other by the variances, where these are too by λ again."""
    _, λ, V = torch.linalg.svd(yx, full_matrices=True)
    V, largest = V.mT.clone(), float(λ[0])
    λ = torch.cat([λ, λ.new_zeros(len(V) - len(λ))])
    for equal in _groups(λ, limit * largest):
        block = V[:, equal]
        s, turn = torch.linalg.eigh(block.mT @ xx @ block)
        V[:, equal] = block = block @ turn.flip(-1)  # the largest variance first
        for alike in _groups(s.flip(0), limit * float(xx.abs().max())):
            V[:, equal.start + alike.start : equal.start + alike.stop] = (
                block[:, alike] @ torch.linalg.svd(yx @ block[:, alike], full_matrices=True).Vh.mT
            )
    return V, largest


def _groups(falling: Tensor, near: float) -> Iterator[slice]:
    """Where neighbours differ by no more than ``near``."""
    first = 0
    for last in range(1, len(falling) + 1):
        if last == len(falling) or falling[last - 1] - falling[last] > near:
            yield slice(first, last)
            first = last
