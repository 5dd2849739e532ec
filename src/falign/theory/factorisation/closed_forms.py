"""Where feedback alignment rests, the optimum, and what falls on the way: in closed form."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public
from falign.theory.factorisation.methods import conserved
from falign.theory.factorisation.problem import State, fitting, sized
from falign.theory.factorisation.subspace import row_basis
from falign.theory.inputs import floats, told, whole


@public
def stationary(Y: Float[Tensor, "... n m"], B: Float[Tensor, "runs r n"]) -> Float[Tensor, "runs n m"]:
    """``Y (BY)⁺ BY``: the function at which fa and fa* rest, whatever the start and the step size.

    At rest ``BR = 0`` and ``RWᵀ = 0``, so ``ZW = Y P`` with P onto the rows of W, which hold those of BY. Where BY has
    rank r they are the same; where r ≥ rank Y and B is injective on the columns of Y, ``R = 0``, and this is Y.

    Raises:
        ValueError: Y and B do not fit, or B is not of full rank.

    Source: derived; for "converges to the optimum when r ≥ rank(Y)" and "can be far from optimal when r < rank(Y)"
    in the abstract of Garg and Vempala 2022.
    """
    Y = fitting(Y, B)
    rows = row_basis(B @ Y)
    return Y @ rows.mT @ rows


@public
def stationary_error(Y: Float[Tensor, "... n m"], B: Float[Tensor, "runs r n"]) -> Float[Tensor, " runs"]:
    """``|Y (I - P)|``, P onto the rows of BY: the error of fa and fa* at rest."""
    return _norm(Y - stationary(Y, B))


@public
def optimum(Y: Float[Tensor, "*runs n m"], r: int) -> Float[Tensor, "*runs n m"]:
    """The nearest matrix of rank r, which gradient descent finds: the r largest singular values and their vectors.

    Raises:
        ValueError: r is not between 1 and min(n, m), or Y is no matrix of finite numbers.

    Source: Eckart and Young 1936, Psychometrika 1.
    """
    _ranked(Y, r)
    left, sizes, right = torch.linalg.svd(Y, full_matrices=False)
    return left[..., :r] * sizes[..., None, :r] @ right[..., :r, :]


@public
def optimal_rows(Y: Float[Tensor, "*runs n m"], r: int) -> Float[Tensor, "*runs r m"]:
    """Rows of the optimum's representation: the r first right singular vectors.

    Raises:
        ValueError: as ``optimum``.
    """
    _ranked(Y, r)
    return torch.linalg.svd(Y, full_matrices=False).Vh[..., :r, :]


@public
def best_error(Y: Float[Tensor, "*runs n m"], r: int) -> Float[Tensor, "*runs"]:
    """``√(Σ_{i>r} σ_i²)``: the least error of rank r.

    Raises:
        ValueError: as ``optimum``.
    """
    _ranked(Y, r)
    return torch.linalg.svdvals(Y)[..., r:].square().sum(-1).sqrt()


@public
def lyapunov(
    Y: Float[Tensor, "... n m"],
    B: Float[Tensor, "runs r n"],
    Z: Float[Tensor, "runs n r"],
    W: Float[Tensor, "runs r m"],
) -> Float[Tensor, " runs"]:
    """``V = |BR|²``, which falls in fa's flow where ``C ⪯ 0``.

    Raises:
        ValueError: shapes or types do not fit.
    """
    Y = sized(Y, B, State(Z, W))
    return (B @ (Y - Z @ W)).square().sum((-1, -2))


@public
def lyapunov_rate(
    Y: Float[Tensor, "... n m"],
    B: Float[Tensor, "runs r n"],
    Z: Float[Tensor, "runs n r"],
    W: Float[Tensor, "runs r m"],
) -> Float[Tensor, " runs"]:
    """``V̇ = -2|BRWᵀ|² - |WᵀBR|² + tr(C BR(BR)ᵀ)`` of fa's flow.

    From ``BṘ = -BRWᵀW - BZBR``, and the symmetric part of BZ being ``½(WWᵀ - C)``.

    Raises:
        ValueError: shapes or types do not fit.

    Source: derived.
    """
    Y = sized(Y, B, State(Z, W))
    BR = B @ (Y - Z @ W)
    held = (conserved(Z, W, B) @ BR * BR).sum((-1, -2))
    return held - 2 * (BR @ W.mT).square().sum((-1, -2)) - (W.mT @ BR).square().sum((-1, -2))


def _norm(A: Tensor) -> Tensor:
    return A.square().sum((-1, -2)).sqrt()


def _ranked(Y: Tensor, r: int) -> None:
    floats(Y=Y)
    if Y.ndim < 2 or not Y.numel() or not Y.isfinite().all():
        raise ValueError(f"Y has shape {tuple(Y.shape)}, expected a matrix of finite numbers")
    if not whole(r) or not 1 <= r <= min(Y.shape[-2:]):
        raise ValueError(f"r is {told(r)}, expected a whole number from 1 to min(n, m) = {min(Y.shape[-2:])}")
