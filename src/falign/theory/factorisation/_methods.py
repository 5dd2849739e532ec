"""Feedback alignment, its variant with an optimal output layer, and gradient descent on ``½|ZW - Y|²``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import named
from falign.theory._coerce import public, recording
from falign.theory.factorisation._problem import Start, State, fitting, independent, sized

Move = Callable[[Tensor, Tensor, State, Tensor, State], None]


@recording
def best_output(Y: Float[Tensor, "... n m"], W: Float[Tensor, "*runs r m"]) -> Float[Tensor, "*runs n r"]:
    """``Z = YWᵀ(WWᵀ)⁻¹``: the output layer of least error for W; nan where W has not full row rank.

    By ``Wᵀ = QU``, ``Z = YQ U⁻ᵀ``: WWᵀ would square the condition number of W.
    """
    if W.shape[-2] > W.shape[-1]:
        # More rows than columns are dependent; the product has the shape and the format of the answer.
        return (Y @ W.mT) * torch.nan
    # By QR, at the condition of W: the inverse of WWᵀ would have its square.
    Q, U = torch.linalg.qr(W.mT)
    Z = torch.linalg.solve_triangular(U.mT, Y @ Q, upper=False, left=False)
    sizes = U.diagonal(dim1=-2, dim2=-1).abs()
    full = sizes.amin(-1) > torch.finfo(W.dtype).eps * sizes.amax(-1)
    return torch.where(full[..., None, None], Z, torch.nan)


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
    """A way to move the factors; ``R = Y - ZW``.

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


def _method_of(name: str) -> Method:
    """Look up a method by its name.

    Raises:
        ValueError: there is none.
    """
    return named("method", name, METHODS)


def settled(method: Method, Y: Float[Tensor, "... n m"], state: State) -> State:
    """The state with the Z that the method prescribes for its W: fa*'s; else as it is."""
    return state if method.free_output else State(best_output(Y, state.W), state.W)


def prepared(
    method: str, Y: Float[Tensor, "... n m"], B: Float[Tensor, "runs r n"], start: Start
) -> tuple[Method, Float[Tensor, "runs n m"], State]:
    """The method, Y of every run, and the start with the method's Z.

    Raises:
        ValueError: the method is unknown, what was given does not fit, or rows of W(0) nearly depend on each other
            under fa*.
    """
    algorithm, start = _method_of(method), State(*start)
    Y = fitting(Y, B, start)
    if not algorithm.free_output:
        independent(start.W)
    return algorithm, Y, settled(algorithm, Y, start)


@public
@torch.no_grad()
def velocity(method: str, Y: Float[Tensor, "... n m"], B: Float[Tensor, "runs r n"], state: Start) -> State:
    """Ż and Ẇ of a state; of fa*, ``Ż = RRᵀBᵀ(WWᵀ)⁻¹`` follows from Ẇ.

    Raises:
        ValueError: the method is unknown, shapes or types do not fit, or rows of W nearly depend on each other under
            fa*.
    """
    algorithm, state = _method_of(method), State(*state)
    Y = sized(Y, B, state)
    if not algorithm.free_output:
        independent(state.W)
    R, out = torch.empty_like(Y), State(torch.zeros_like(state.Z), torch.zeros_like(state.W))
    algorithm.move(Y, B, state, R, out)
    if algorithm.free_output:
        return out
    W = state.W
    R = Y - best_output(Y, W) @ W
    return out._replace(Z=torch.cholesky_solve(out.W @ R.mT, torch.linalg.qr(W.mT).R, upper=True).mT)


# Step sizes: one that suffices near the end of the flow, and the sharp one at a point of rest.


@public
def sufficient_rate(
    method: str, Y: Float[Tensor, "... n m"], B: Float[Tensor, "runs r n"], start: Start
) -> Float[Tensor, " runs"]:
    """Compute ``1/ρ_max``, which suffices near the end: ρ_max is the largest rate at which a deviation dies out there.

    At a point of rest ``δR' = -(δR WᵀW + ZB δR)``, so the rates are ``λ_i(WᵀW) + μ_j(BZ)``. Of the end itself,
    ``BZW = BY`` and what is conserved are known. With s the largest singular value of W and u its left vector,
    ``s² = uᵀCu + 2uᵀBZu`` and ``s uᵀBZu = uᵀBYv`` give ``s³ ≤ λ_max(C) s + 2|BY|``, and

    | method | ρ_max |
    |---|---|
    | fa | (3/2) s² - ½ λ_min(C), for s the root; exact for one mode |
    | fa* | |BY|/σ_min(W(0)): BZ with ``Z = YW⁺``, WWᵀ never shrinking |
    | gd | √(|C|² + 4σ_1(Y)²), from ``s_W² - s_Z² ≤ |C|``, ``s_W s_Z = σ_1`` |

    Near the end no step overshoots if ``η ≤ 1/ρ_max``. Twice that is the linear limit at the end; of one mode from a
    zero start, which overshoots its end, the sharp limit is 1.54/ρ_max, and matrices go by it too: all of the tests'
    runs converge at 1.4/ρ_max, none from zero at 1.7/ρ_max. Random starts take up to 2/ρ_max and more. It is no
    theorem: BZ need not be symmetric, and from a large random start the way may be steeper than its end.

    Raises:
        ValueError: the method is unknown, what was given does not fit, or rows of W(0) nearly depend on each
            other under fa*.

    Source: derived; for one mode it is 1/ρ_max of the scalar theory of Girotti, Mitliagkas and Gidel 2021.
    """
    algorithm, Y, (Z, W) = prepared(method, Y, B, start)
    if method == "fa*":
        return torch.linalg.svdvals(W)[:, -1] / _largest(B @ Y)
    if method == "gd":
        imbalance = torch.linalg.eigvalsh(algorithm.invariant(Z, W, B)).abs().amax(-1)
        largest = _largest(Y[:1]).expand(len(B)) if Y.stride(0) == 0 else _largest(Y)
        return (imbalance.square() + 4 * largest.square()).rsqrt()
    eigenvalues = torch.linalg.eigvalsh(conserved(Z, W, B))
    s = _positive_root(eigenvalues[:, -1], 2 * _largest(B @ Y))
    return 1 / (1.5 * s.square() - eigenvalues[:, 0] / 2)


@public
def local_rate(B: Float[Tensor, "runs r n"], state: State) -> Float[Tensor, " runs"]:
    """The sharp η of fa at a point of rest: the least ``2 Re ρ/|ρ|²`` over its rates of decay ρ.

    The rates are ``λ_i(WWᵀ) + μ_j(BZ)``, and each of the two alone (what Z has across the columns of R, and W across
    its own rows). Rates of 0, of directions in which the point of rest is not alone, are left out. Below it small
    deviations die out, above it some grow; 0 or below where some grow at any η.

    Source: derived.
    """
    of_W = torch.linalg.eigvalsh(state.W @ state.W.mT).to(torch.complex128)
    of_Z = torch.linalg.eigvals(B @ state.Z).to(torch.complex128)
    sums = (of_W[:, :, None] + of_Z[:, None, :]).flatten(1)
    rates = torch.cat([of_W, of_Z, sums], 1)
    moves = rates.abs() > 1e-9 * rates.abs().amax(1, keepdim=True)
    return torch.where(moves, 2 * rates.real / rates.abs().square(), torch.inf).amin(1)


def _largest(A: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(A, ord=2)


def _positive_root(linear: Tensor, constant: Tensor) -> Tensor:
    """The one positive root of ``s³ = linear s + constant``, constant ≥ 0; its other roots have no larger real part."""
    pairs = torch.stack([linear, constant], 1).detach().cpu().numpy()
    roots = [np.roots([1.0, 0.0, -a, -c]) for a, c in pairs]
    return linear.new_tensor([max(float(each.real.max()), 0.0) for each in roots])


# Row spaces and the angles between them, and the small coordinates in which a run stays.


def row_basis(A: Float[Tensor, "*runs r m"]) -> Float[Tensor, "*runs least m"]:
    """Orthonormal rows that span those of A, min(r, m) of them, with rows of zeros for what A lacks in rank."""
    # By SVD, not QR: rows of a lower rank would leave QR with directions of rounding alone.
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
        """Lift a matrix of these coordinates to all."""
        left = here if self.left is None else self.left @ here
        return left if self.right is None else left @ self.right

    def seen(self, rows: Float[Tensor, "runs r m"]) -> Float[Tensor, "runs r q"]:
        """Project rows of length m to these coordinates."""
        return rows if self.right is None else rows @ self.right.mT

    def lifted(self, state: State) -> State:
        """Lift a state to the coordinates of the problem, into memory of its own."""
        return State(
            state.Z.clone() if self.left is None else self.left @ state.Z,
            state.W.clone() if self.right is None else state.W @ self.right,
        )


def reduced(method: Method, Y: Float[Tensor, "runs n m"], B: Float[Tensor, "runs r n"], start: State) -> Small:
    """Reduce to the smallest problem in which the method's runs from that start stay, each in its own coordinates."""
    n, m = Y.shape[1:]
    if not method.follows_feedback:
        return Small(Y, B, start, None, None)
    Z, W = start
    # A factor that is 0 spans nothing: left out, a zero start gives the smallest problem, r by r.
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
