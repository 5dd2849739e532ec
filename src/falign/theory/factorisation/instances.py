"""Matrices on which feedback alignment is far from optimal, and the law of how far."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, pi, sqrt, tan
from typing import TypeAlias

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public
from falign.theory.inputs import number, positive, room, told, whole

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
    _epsilon(epsilon, below="at most 1", holds=number(epsilon) and epsilon <= 1)
    return torch.diag(torch.tensor([1.0] * r + [epsilon], dtype=torch.float64))


@public
def flat_tail(r: int, tail: int, share: float) -> Float[Tensor, "n n"]:
    """A diagonal of r ones and ``tail`` equal values that hold a share of ``|Y|²``: what the optimum leaves.

    Raises:
        ValueError: r or tail is below 1, or the share not in (0, 1).
    """
    _sized(r)
    _sized(tail)
    if not number(share) or not 0 < share < 1:
        raise ValueError(f"share is {told(share)}, expected a number above 0 and below 1")
    value = sqrt(r * share / (1 - share) / tail)
    return torch.diag(torch.tensor([1.0] * r + [value] * tail, dtype=torch.float64))


@public
def flat_spectrum(m: int, r: int, top: float = 1.1) -> Float[Tensor, "m m"]:
    """``diag(top × r, 1 × (m - r))``: almost equal singular values, so that errors say little about representations.

    Raises:
        ValueError: r is not between 1 and m - 1, or top is below 1.
    """
    _sized(r)
    if not whole(m) or m <= r or not number(top) or top < 1:
        raise ValueError(f"m is {told(m)} and top {told(top)}, expected m above r = {r}, and top of at least 1")
    room("a matrix", m, m)
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
    if not number(tail_energy) or tail_energy < 0:
        raise ValueError(f"tail_energy is {told(tail_energy)}, expected a number of at least 0")
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
        _epsilon(self.epsilon, below="below 1", holds=number(self.epsilon) and self.epsilon < 1)

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
            raise ValueError(f"probability is {told(probability)}, expected numbers from 0 to 1")
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
    if not whole(size):
        raise ValueError(f"size is {told(size)}, expected a whole number from 1 on")
    positive("size", size)
    room("a matrix", size, size)


def _epsilon(value: float, *, below: str, holds: bool) -> None:
    if not holds or value < _LEAST_EPSILON:
        raise ValueError(f"epsilon is {told(value)}, expected a number of at least {_LEAST_EPSILON:g} and {below}")
