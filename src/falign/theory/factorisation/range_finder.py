"""Feedback alignment read as a randomised range finder, and what oversampling and power iteration would buy."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public
from falign.theory.factorisation.closed_forms import best_error
from falign.theory.factorisation.problem import fitting
from falign.theory.factorisation.subspace import row_basis
from falign.theory.inputs import floats, listed, told, whole

_MOST = 1000
"""Passes over YYᵀ; after some tens nothing changes."""


@public
def range_finder(
    Y: Float[Tensor, "... n m"], B: Float[Tensor, "runs rows n"], *, rank: int | None = None, power: int = 0
) -> Float[Tensor, "runs n m"]:
    """Approximation of Y by random sampling: rows of ``B (YYᵀ)^q Y``, Y projected on them, truncated to the rank.

    With as many rows as the rank and q = 0 it is ``Y (BY)⁺ BY``: what feedback alignment finds is one pass of a
    randomised range finder, without oversampling and without power iteration.

    Args:
        Y: What is to be approximated.
        B: Random test matrix; rank + p rows are an oversampling of p.
        rank: Of the result; None for as many as B has rows.
        power: q, the further passes over YYᵀ; the rows are made orthonormal after each.

    Raises:
        ValueError: Y and B do not fit, the rank is above the rows of B, or the power is negative.

    Source: Halko, Martinsson and Tropp 2011, SIAM Review 53, algorithms 4.1, 4.4 and 5.1.
    """
    Y = fitting(Y, B)
    rank = B.shape[1] if rank is None else rank
    if not whole(rank) or not 1 <= rank <= B.shape[1] or not whole(power) or not 0 <= power <= _MOST:
        raise ValueError(
            f"rank is {told(rank)} and power {told(power)}, expected 1 to the {B.shape[1]} rows of B, and 0 to {_MOST}"
        )
    rows = row_basis(B @ Y)
    for _ in range(power):
        rows = row_basis(rows @ Y.mT @ Y)
    sketch = Y @ rows.mT
    if rank < B.shape[1]:
        left, sizes, right = torch.linalg.svd(sketch, full_matrices=False)
        sketch = left[..., :rank] * sizes[..., None, :rank] @ right[..., :rank, :]
    return sketch @ rows


@public
def range_finder_ratios(
    Y: Float[Tensor, "... n m"],
    B: Float[Tensor, "runs rows n"],
    *,
    rank: int,
    oversampling: Sequence[int],
    power: Sequence[int],
) -> Float[Tensor, "runs oversamplings powers"]:
    """``|Y - Ŷ|/optimum`` for every oversampling and power, each from the first rank + p rows of the same B.

    Args:
        Y: What is to be approximated, of rank above ``rank``.
        B: Random rows, at least rank + the largest oversampling.
        rank: Of every approximation.
        oversampling: p.
        power: q.

    Raises:
        ValueError: B has too few rows, Y is of that rank, or as ``range_finder``.
    """
    wide, often = listed("oversampling", oversampling), listed("power", power)
    if not wide or not often:
        raise ValueError(f"oversampling is {wide} and power {often}, expected at least one of each")
    if not whole(rank):
        raise ValueError(f"rank is {told(rank)}, expected a whole number from 1 to the {B.shape[1]} rows of B")
    if not all(whole(p) and 0 <= p <= B.shape[1] - rank for p in wide):
        raise ValueError(f"oversampling is {wide}, expected 0 to {B.shape[1] - rank}, as B has {B.shape[1]} rows")
    Y = fitting(Y, B)
    least = best_error(Y, rank)
    if bool((least <= 1e-12 * Y.square().sum((1, 2)).sqrt()).any()):
        raise ValueError(f"Y has rank {rank} or less: the least error is 0, and there is no ratio to it")
    errors = [
        [(Y - range_finder(Y, B[:, : rank + p], rank=rank, power=q)).square().sum((1, 2)).sqrt() for q in often]
        for p in wide
    ]
    return torch.stack([torch.stack(line, -1) for line in errors], 1) / least[:, None, None]


@public
def expected_bound(singular_values: Float[Tensor, " values"], r: int) -> float:
    """Least over k ≤ r - 2 of ``√((1 + k/(r-k-1)) Σ_{j>k} σ_j²)``: bounds the mean stationary error for Gaussian B.

    The r rows of BY serve as the oversampled sample of each lower rank k: against rank k, feedback alignment of
    inner dimension r is as good as a range finder with an oversampling of r - k.

    Raises:
        ValueError: r is below 2 or above the number of singular values, or these do not fall or are not finite.

    Source: Halko, Martinsson and Tropp 2011, SIAM Review 53, theorem 10.5.
    """
    floats(singular_values=singular_values)
    if singular_values.ndim != 1 or not singular_values.isfinite().all():
        raise ValueError(f"singular values have shape {tuple(singular_values.shape)}, expected (values,), all finite")
    squares = singular_values.double().square()
    if not whole(r) or not 2 <= r <= len(squares) or bool((squares.diff() > 0).any()):
        raise ValueError(f"r is {told(r)}, expected 2 to {len(squares)}, and singular values that fall")
    tails = [float(squares[k:].sum()) for k in range(r - 1)]
    return min((1 + k / (r - k - 1)) * tail for k, tail in enumerate(tails)) ** 0.5
