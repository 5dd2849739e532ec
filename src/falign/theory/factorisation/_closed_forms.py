"""Closed forms: where feedback alignment ends, the optimum, what falls on the way; hard instances; the range finder."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, pi, sqrt, tan
from typing import TypeAlias

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import (
    as_list,
    check_floating,
    check_memory,
    describe,
    fraction,
    is_number,
    is_whole,
    non_negative,
    whole_between,
)
from falign.theory._coerce import public
from falign.theory.factorisation._methods import conserved, row_basis
from falign.theory.factorisation._problem import State, fitting, frobenius, sized


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
    return frobenius(Y - stationary(Y, B))


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


def _ranked(Y: Tensor, r: int) -> None:
    check_floating(Y=Y)
    if Y.ndim < 2 or not Y.numel() or not Y.isfinite().all():
        raise ValueError(f"Y has shape {tuple(Y.shape)}, expected a matrix of finite numbers")
    if not is_whole(r) or not 1 <= r <= min(Y.shape[-2:]):
        raise ValueError(f"r is {describe(r)}, expected a whole number from 1 to min(n, m) = {min(Y.shape[-2:])}")


# Instances on which feedback alignment is far from optimal, and the law of how far.

_LEAST_EPSILON = 1e-12
"""Below it the rounding of an error of order 1 shows in its ratio to ε."""

Values: TypeAlias = float | Sequence[float] | np.ndarray


@public
def last_direction(r: int, epsilon: float) -> Float[Tensor, "n n"]:
    """``diag(1, …, 1, ε)`` of size r + 1, of which rank r must leave one direction out.

    The optimum leaves out ε; feedback alignment leaves out what B does not see, which need not be the cheap one.

    Raises:
        ValueError: r is below 1, or ε not in [1e-12, 1].
    """
    _sized(r)
    _epsilon(epsilon, below="at most 1", holds=is_number(epsilon) and epsilon <= 1)
    return torch.diag(torch.tensor([1.0] * r + [epsilon], dtype=torch.float64))


@public
def flat_tail(r: int, tail: int, share: float) -> Float[Tensor, "n n"]:
    """A diagonal of r ones and ``tail`` equal values that hold a share of ``|Y|²``: what the optimum leaves.

    Raises:
        ValueError: r or tail is below 1, or the share not in (0, 1).
    """
    _sized(r)
    _sized(tail)
    fraction("share", share)
    value = sqrt(r * share / (1 - share) / tail)
    return torch.diag(torch.tensor([1.0] * r + [value] * tail, dtype=torch.float64))


@public
def flat_spectrum(m: int, r: int, top: float = 1.1) -> Float[Tensor, "m m"]:
    """``diag(top × r, 1 × (m - r))``: almost equal singular values, so that errors say little about representations.

    Raises:
        ValueError: r is not between 1 and m - 1, or top is below 1.
    """
    _sized(r)
    if not is_whole(m) or m <= r or not is_number(top) or top < 1:
        raise ValueError(f"m is {describe(m)} and top {describe(top)}, expected m above r = {r}, and top of at least 1")
    check_memory("a matrix", m, m)
    return torch.diag(torch.tensor([top] * r + [1.0] * (m - r), dtype=torch.float64))


@public
def flat_tail_error(top: Float[Tensor, "runs r r"], tail_energy: float) -> Float[Tensor, " runs"]:
    """``√(τ + Σ_i τ/(s_i² + τ))``: stationary error on r ones and a long flat tail of energy τ, nearly.

    s_i are the singular values of the r x r part of B that meets the ones, its entries of variance 1. What B makes of
    the tail, ``√(τ/N) B_2``, is taken as √τ times orthonormal rows: exact for ever more values in the tail. For large
    r the s_i near 0 have density 2√r/π, so that the share of |Y|² that is missed goes as the root of the least one,
    ``√(τ/r)``, as long as that is far above 1/r.

    Raises:
        ValueError: the energy is negative.

    Source: derived.
    """
    non_negative("tail_energy", tail_energy)
    sizes = torch.linalg.svdvals(top).square()
    return (tail_energy + (tail_energy / (sizes + tail_energy)).sum(-1)).sqrt()


@dataclass(frozen=True, kw_only=True)
class RatioLaw:
    """Law of (error of fa / optimum)² on ``last_direction(r, ε)`` for Gaussian B.

    The rows of BY leave out one direction, ``Y⁻¹c`` with c the unit null vector of B, uniform on the sphere:
    error² = 1/Σ c_i²/σ_i², so ``ratio² = 1/(c_n² + ε²(1 - c_n²))`` with ``c_n² ~ Beta(½, r/2)``. Its typical size is
    Θ(r); its mean is √(πr/2)/ε for small ε and large r, without bound.

    Attributes:
        r: Inner dimension.
        epsilon: ε.

    Source: derived; for "FA can be far from optimal when r < rank(Y)" in the abstract of Garg and Vempala 2022.
    """

    r: int
    epsilon: float

    def __post_init__(self) -> None:
        """Refuse what is no instance.

        Raises:
            ValueError: r is below 1, or ε not in [1e-12, 1).
        """
        _sized(self.r)
        _epsilon(self.epsilon, below="below 1", holds=is_number(self.epsilon) and self.epsilon < 1)

    def cdf(self, ratio_squared: Values) -> np.ndarray:
        """``P(ratio² ≤ x)``."""
        least = self.epsilon**2
        x = np.clip(np.asarray(ratio_squared, dtype=float), 1.0, 1 / least)
        return np.asarray(scipy.stats.beta.sf((1 / x - least) / (1 - least), 0.5, self.r / 2))

    def quantile(self, probability: Values) -> np.ndarray:
        """The value of ratio² below which it lies with that probability.

        Raises:
            ValueError: a probability is not between 0 and 1.
        """
        asked = np.asarray(probability, dtype=float)
        if not ((asked >= 0) & (asked <= 1)).all():
            raise ValueError(f"probability is {describe(probability)}, expected numbers from 0 to 1")
        square = scipy.stats.beta.isf(asked, 0.5, self.r / 2)
        return np.asarray(1 / (square + self.epsilon**2 * (1 - square)))

    @property
    def mean(self) -> float:
        """``E ratio² = (2Γ((r+1)/2)/(√π Γ(r/2) ε)) ∫_0^{π/2} (1 + ε² tan² ψ)^{-(r-1)/2} dψ``: of the few c_n ≈ 0.

        ψ is from ``c_n = sin φ`` and ``tan φ = ε tan ψ``.
        """
        area, _ = scipy.integrate.quad(
            lambda psi: (1 + (self.epsilon * tan(psi)) ** 2) ** (-(self.r - 1) / 2), 0, pi / 2
        )
        density = 2 * exp(scipy.special.gammaln((self.r + 1) / 2) - scipy.special.gammaln(self.r / 2)) / sqrt(pi)
        return density * area / self.epsilon


def _sized(size: int) -> None:
    whole_between("size", size, 1)
    check_memory("a matrix", size, size)


def _epsilon(value: float, *, below: str, holds: bool) -> None:
    if not holds or value < _LEAST_EPSILON:
        raise ValueError(f"epsilon is {describe(value)}, expected a number of at least {_LEAST_EPSILON:g} and {below}")


# The range finder that feedback alignment is, and what oversampling and power iteration would add.

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
    if not is_whole(rank) or not 1 <= rank <= B.shape[1] or not is_whole(power) or not 0 <= power <= _MOST:
        raise ValueError(
            f"rank is {describe(rank)} and power {describe(power)}, expected 1 to the {B.shape[1]} rows of B, and 0 to "
            f"{_MOST}"
        )
    rows = row_basis(B @ Y)
    for _ in range(power):
        # Orthonormal after every pass: powers of the singular values would lose the small ones to rounding.
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
    wide, often = as_list("oversampling", oversampling), as_list("power", power)
    if not wide or not often:
        raise ValueError(f"oversampling is {wide} and power {often}, expected at least one of each")
    if not is_whole(rank):
        raise ValueError(f"rank is {describe(rank)}, expected a whole number from 1 to the {B.shape[1]} rows of B")
    if not all(is_whole(p) and 0 <= p <= B.shape[1] - rank for p in wide):
        raise ValueError(f"oversampling is {wide}, expected 0 to {B.shape[1] - rank}, as B has {B.shape[1]} rows")
    Y = fitting(Y, B)
    least = best_error(Y, rank)
    if bool((least <= 1e-12 * frobenius(Y)).any()):
        raise ValueError(f"Y has rank {rank} or less: the least error is 0, and there is no ratio to it")
    errors = [[frobenius(Y - range_finder(Y, B[:, : rank + p], rank=rank, power=q)) for q in often] for p in wide]
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
    check_floating(singular_values=singular_values)
    if singular_values.ndim != 1 or not singular_values.isfinite().all():
        raise ValueError(f"singular values have shape {tuple(singular_values.shape)}, expected (values,), all finite")
    squares = singular_values.double().square()
    if not is_whole(r) or not 2 <= r <= len(squares) or bool((squares.diff() > 0).any()):
        raise ValueError(f"r is {describe(r)}, expected 2 to {len(squares)}, and singular values that fall")
    tails = [float(squares[k:].sum()) for k in range(r - 1)]
    return min((1 + k / (r - k - 1)) * tail for k, tail in enumerate(tails)) ** 0.5
