"""Feedback alignment, its variant with an optimal output layer, and gradient descent on ``½|ZW - Y|²``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public, recording
from falign.theory.factorisation.problem import Start, State, fitting, independent, sized
from falign.theory.inputs import told

Move = Callable[[Tensor, Tensor, State, Tensor, State], None]


@recording
def best_output(Y: Float[Tensor, "... n m"], W: Float[Tensor, "*runs r m"]) -> Float[Tensor, "*runs n r"]:
    """``Z = YWᵀ(WWᵀ)⁻¹``: the output layer of least error for W; nan where W has not full row rank.

    By ``Wᵀ = QU``, ``Z = YQ U⁻ᵀ``: WWᵀ would square the condition number of W.
    """
    if W.shape[-2] > W.shape[-1]:
        return (Y @ W.mT) * torch.nan
    Q, U = torch.linalg.qr(W.mT)
    found = torch.linalg.solve_triangular(U.mT, Y @ Q, upper=False, left=False)
    sizes = U.diagonal(dim1=-2, dim2=-1).abs()
    full = sizes.amin(-1) > torch.finfo(W.dtype).eps * sizes.amax(-1)
    return torch.where(full[..., None, None], found, torch.nan)


def _feedback_alignment(Y: Tensor, B: Tensor, here: State, R: Tensor, out: State) -> None:
    torch.baddbmm(Y, here.Z, here.W, alpha=-1, out=R)
    torch.bmm(R, here.W.mT, out=out.Z)
    torch.bmm(B, R, out=out.W)


def _with_best_output(Y: Tensor, B: Tensor, here: State, R: Tensor, out: State) -> None:
    BY = torch.bmm(B, Y)
    Q = torch.linalg.qr(here.W.mT).Q  # BZ is the best output layer for BY, so BZW is BY on the rows of W
    torch.baddbmm(BY, torch.bmm(BY, Q), Q.mT, alpha=-1, out=out.W)


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


@public
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
        raise ValueError(f"unknown method {told(name)}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def settled(method: Method, Y: Float[Tensor, "... n m"], state: State) -> State:
    """The state with the Z that the method prescribes for its W: fa*'s; else as it is."""
    return state if method.free_output else State(best_output(Y, state.W), state.W)


def begun(
    method: str, Y: Float[Tensor, "... n m"], B: Float[Tensor, "runs r n"], start: Start
) -> tuple[Method, Float[Tensor, "runs n m"], State]:
    """The method, Y of every run, and the start with the method's Z.

    Raises:
        ValueError: the method is unknown, what was given does not fit, or rows of W(0) nearly depend on each other
            under fa*.
    """
    how, start = method_of(method), State(*start)
    Y = fitting(Y, B, start)
    if not how.free_output:
        independent(start.W)
    return how, Y, settled(how, Y, start)


@public
@torch.no_grad()
def velocity(method: str, Y: Float[Tensor, "... n m"], B: Float[Tensor, "runs r n"], state: Start) -> State:
    """Ż and Ẇ of a state; of fa*, ``Ż = RRᵀBᵀ(WWᵀ)⁻¹`` follows from Ẇ.

    Raises:
        ValueError: the method is unknown, shapes or types do not fit, or rows of W nearly depend on each other under
            fa*.
    """
    how, state = method_of(method), State(*state)
    Y = sized(Y, B, state)
    if not how.free_output:
        independent(state.W)
    R, out = torch.empty_like(Y), State(torch.zeros_like(state.Z), torch.zeros_like(state.W))
    how.move(Y, B, state, R, out)
    if how.free_output:
        return out
    W = state.W
    R = Y - best_output(Y, W) @ W
    return out._replace(Z=torch.cholesky_solve(out.W @ R.mT, torch.linalg.qr(W.mT).R, upper=True).mT)
