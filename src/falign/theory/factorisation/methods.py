"""Feedback alignment, its variant with an optimal output layer, and gradient descent on ``½|ZW - Y|²``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.factorisation.problem import State

Move = Callable[[Tensor, Tensor, State, Tensor, State], None]


def best_output(Y: Float[Tensor, "... n m"], W: Float[Tensor, "*runs r m"]) -> Float[Tensor, "*runs n r"]:
    """``Z = YWᵀ(WWᵀ)⁻¹``: the output layer of least error for W; nan where WWᵀ is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(W @ W.mT)
    found = torch.cholesky_solve(W @ Y.mT, factor).mT
    return torch.where((failed == 0)[..., None, None], found, torch.nan)


def _feedback_alignment(Y: Tensor, B: Tensor, here: State, R: Tensor, out: State) -> None:
    torch.baddbmm(Y, here.Z, here.W, alpha=-1, out=R)
    torch.bmm(R, here.W.mT, out=out.Z)
    torch.bmm(B, R, out=out.W)


def _with_best_output(Y: Tensor, B: Tensor, here: State, R: Tensor, out: State) -> None:
    BY = torch.bmm(B, Y)
    torch.baddbmm(BY, best_output(BY, here.W), here.W, alpha=-1, out=out.W)  # BZ is the best output layer for BY


def _gradient_descent(Y: Tensor, B: Tensor, here: State, R: Tensor, out: State) -> None:
    torch.baddbmm(Y, here.Z, here.W, alpha=-1, out=R)
    torch.bmm(R, here.W.mT, out=out.Z)
    torch.bmm(here.Z.mT, R, out=out.W)


@dataclass(frozen=True, kw_only=True)
class Method:
    """How the factors move; ``R = Y - ZW``.

    Attributes:
        name: Of ``METHODS``.
        statement: The flow, as a formula; a step is ``+ η`` of it, both factors from the same R.
        law: What the flow conserves, as a formula.
        move: Writes Ż and Ẇ in place from (Y, B, state, buffer of R, where to); fa*, whose Z follows from W, only Ẇ.
        invariant: The conserved [runs r r] of (Z, W, B).
        gain: What a step of size 1 from (Ż, Ẇ) adds to it, exactly; a step of size η adds η² of it.
        free_output: Whether Z has a motion of its own.
        follows_feedback: Whether W moves by BR, so that its rows stay in the span of those of W(0) and BY.
    """

    name: str
    statement: str
    law: str
    move: Move
    invariant: Callable[[Tensor, Tensor, Tensor], Tensor]
    gain: Callable[[Tensor, Tensor], Tensor]
    free_output: bool = True
    follows_feedback: bool = True


def conserved(
    Z: Float[Tensor, "*runs n r"], W: Float[Tensor, "*runs r m"], B: Float[Tensor, "*runs r n"]
) -> Float[Tensor, "*runs r r"]:
    """``C = WWᵀ - BZ - (BZ)ᵀ``, constant in fa's flow; a step adds ``η² BR(BR)ᵀ`` exactly.

    From a zero start ``BZ + (BZ)ᵀ = WWᵀ ⪰ 0``: forward and feedback weights are aligned at all times.

    Source: derived; of the alignment that Garg and Vempala 2022 describe.
    """
    BZ = B @ Z
    return W @ W.mT - BZ - BZ.mT


def _square(dZ: Tensor, dW: Tensor) -> Tensor:
    return dW @ dW.mT


METHODS = {
    method.name: method
    for method in (
        Method(
            name="fa",
            statement="Ż = RWᵀ, Ẇ = BR",
            law="WWᵀ - BZ - (BZ)ᵀ",
            move=_feedback_alignment,
            invariant=conserved,
            gain=_square,
        ),
        Method(
            name="fa*",
            statement="Z = YWᵀ(WWᵀ)⁻¹, Ẇ = BR",
            law="WWᵀ",
            move=_with_best_output,
            invariant=lambda Z, W, B: W @ W.mT,
            gain=_square,
            free_output=False,
        ),
        Method(
            name="gd",
            statement="Ż = RWᵀ, Ẇ = ZᵀR",
            law="WWᵀ - ZᵀZ",
            move=_gradient_descent,
            invariant=lambda Z, W, B: W @ W.mT - Z.mT @ Z,
            gain=lambda dZ, dW: dW @ dW.mT - dZ.mT @ dZ,
            follows_feedback=False,
        ),
    )
}
"""name -> method. That fa* is the variant with the optimal output layer is a reading of "a closely related variant"."""


def method_of(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def settled(method: Method, Y: Float[Tensor, "... n m"], state: State) -> State:
    """The state with the Z that the method prescribes for its W: fa*'s; else as it is."""
    return state if method.free_output else State(best_output(Y, state.W), state.W)


@torch.no_grad()
def velocity(method: str, Y: Float[Tensor, "... n m"], B: Float[Tensor, "runs r n"], state: State) -> State:
    """Ż and Ẇ of a state; of fa*, ``Ż = RRᵀBᵀ(WWᵀ)⁻¹`` follows from Ẇ.

    Raises:
        ValueError: the method is unknown.
    """
    how = method_of(method)
    Y = Y.expand(len(B), *Y.shape[-2:])
    R, out = torch.empty_like(Y), State(torch.zeros_like(state.Z), torch.zeros_like(state.W))
    how.move(Y, B, state, R, out)
    if how.free_output:
        return out
    W = state.W
    R = Y - best_output(Y, W) @ W
    return out._replace(Z=torch.linalg.solve(W @ W.mT, out.W @ R.mT).mT)
