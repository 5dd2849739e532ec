"""Row spaces and the angles between them, and the small problem that a run stays in."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public
from falign.theory.factorisation.methods import Method
from falign.theory.factorisation.problem import State


def row_basis(A: Float[Tensor, "*runs r m"]) -> Float[Tensor, "*runs least m"]:
    """Orthonormal rows that span those of A, min(r, m) of them, with rows of zeros for what A lacks in rank."""
    _, sizes, rows = torch.linalg.svd(A, full_matrices=False)
    kept = sizes > max(A.shape[-2:]) * torch.finfo(A.dtype).eps * sizes[..., :1]
    return rows * kept[..., None]


@public
def overlap(W: Float[Tensor, "*runs r m"], other: Float[Tensor, "*runs r m"]) -> Float[Tensor, "*runs"]:
    """``|P_W P_other|²/r``: mean squared cosine of the angles between two representations' row spaces.

    1 for the same one, r/m in the mean for two at random, 0 for orthogonal ones (or for W = 0).

    Raises:
        ValueError: the two have other shapes, or numbers that are not finite.
    """
    _comparable(W, other)
    return (row_basis(W) @ row_basis(other).mT).square().sum((-1, -2)) / W.shape[-2]


@public
def principal_angles(W: Float[Tensor, "*runs r m"], other: Float[Tensor, "*runs r m"]) -> Float[Tensor, "*runs r"]:
    """Angles between the row spaces, in radians from the smallest on.

    By cosines where the angle is above π/4 and by sines below, where a cosine has lost the angle.

    Raises:
        ValueError: the two have other shapes, or numbers that are not finite.

    Source: Björck and Golub 1973, Mathematics of Computation 27.
    """
    _comparable(W, other)
    one, two = row_basis(W), row_basis(other)
    across = one @ two.mT
    cosines = torch.linalg.svdvals(across).clamp(max=1)
    sines = torch.linalg.svdvals(two - across.mT @ one).clamp(max=1).flip(-1)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


def _comparable(W: Tensor, other: Tensor) -> None:
    if W.ndim < 2 or W.shape[-2:] != other.shape[-2:] or not W.numel():
        raise ValueError(
            f"shapes are {tuple(W.shape)} and {tuple(other.shape)}, expected as many rows and columns of both: (r, m)"
        )
    if not (W.isfinite().all() and other.isfinite().all()):
        raise ValueError("a representation has numbers that are not finite: compare before a run diverges")


class Small(NamedTuple):
    """The problem in the coordinates of ``Z = P Z'`` and ``W = W' Q``.

    Under fa and fa* the rows of W stay in the span of those of W(0) and BY, and the columns of Z in the span of those
    of Z(0) and YQᵀ. So the same recursion on ``PᵀYQᵀ``, ``BP``, ``PᵀZ`` and ``WQᵀ`` is exact, at r to 3r rows and
    r to 2r columns in place of n and m; what Y has outside only adds a constant to the squared error.
    """

    Y: Float[Tensor, "runs p q"]
    B: Float[Tensor, "runs r p"]
    start: State
    left: Float[Tensor, "runs n p"] | None
    right: Float[Tensor, "runs q m"] | None

    def of_all(self, here: Float[Tensor, "runs p q"]) -> Float[Tensor, "runs n m"]:
        """A matrix of these coordinates, in all."""
        left = here if self.left is None else self.left @ here
        return left if self.right is None else left @ self.right

    def seen(self, rows: Float[Tensor, "runs r m"]) -> Float[Tensor, "runs r q"]:
        """What these coordinates show of rows of length m."""
        return rows if self.right is None else rows @ self.right.mT

    def lifted(self, state: State) -> State:
        """The state in the coordinates that the problem came in, not sharing memory."""
        return State(
            state.Z.clone() if self.left is None else self.left @ state.Z,
            state.W.clone() if self.right is None else state.W @ self.right,
        )


def reduced(method: Method, Y: Float[Tensor, "runs n m"], B: Float[Tensor, "runs r n"], start: State) -> Small:
    """The smallest problem in which the method's runs from that start stay, each in its own coordinates."""
    n, m = Y.shape[1:]
    if not method.follows_feedback:
        return Small(Y, B, start, None, None)
    Z, W = start
    seen = [part for part in (W, B @ Y) if bool(part.any())]
    right = None
    if sum(part.shape[1] for part in seen) < m:
        right = torch.linalg.qr(torch.cat(seen or [W], 1).mT).Q.mT.contiguous()
        Y, W = Y @ right.mT, W @ right.mT
    reached = [part for part in (Z, Y) if method.free_output and bool(part.any())] or [Y]
    left = None
    if sum(part.shape[2] for part in reached) < n:
        left = torch.linalg.qr(torch.cat(reached, 2)).Q
        Y, B, Z = left.mT @ Y, B @ left, left.mT @ Z
    return Small(Y.contiguous(), B.contiguous(), State(Z, W), left, right)
