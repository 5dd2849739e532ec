"""Definition 4.4 and proposition 4.5: Gaussian inputs are nearly isometric, from how many dimensions on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log, sqrt

import scipy
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from falign._validation import check_memory
from falign.theory._coerce import public
from falign.theory.statement import Assumption, TheoremCheck
from falign.theory.two_layer._activations import activation as activation_named
from falign.theory.two_layer._start import inputs_of
from falign.theory.two_layer.kernels import hermite_coefficients, limiting_kernel
from falign.theory.two_layer.theorems._conditions import bounded_activation

_LEAST = 1e-9


@public
def isometry(X: Float[Tensor, "*runs n d"]) -> tuple[Float[Tensor, "*runs"], Float[Tensor, "*runs"]]:
    """The best (γ, ε) for which X is (γ, ε)-isometric: ``γ = λ_min(XXᵀ)``, ``ε = λ_max/λ_min - 1``.

    For n > d the d non-zero eigenvalues count, as the paper's large sample scenario revises the definition. ε is inf
    where γ is 0.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), definition 4.4.
    """
    squares = torch.linalg.svdvals(X.double()).square()
    largest, smallest = squares[..., 0], squares[..., -1]
    smallest = torch.where(smallest > 1e-24 * largest, smallest, 0.0)
    return smallest, largest / smallest - 1


@public
def is_isometric(X: Float[Tensor, "*runs n d"], gamma: float, epsilon: float) -> Bool[Tensor, "*runs"]:
    """Tell whether ``λ_min(XXᵀ) ≥ γ`` and ``λ_max(XXᵀ) ≤ (1 + ε)γ``; [*runs] bool, rounding of 10⁻¹² forgiven.

    Raises:
        ValueError: γ or ε is not positive.
    """
    if gamma <= 0 or epsilon <= 0:
        raise ValueError(f"isometry is defined for positive γ and ε, got {gamma} and {epsilon}")
    smallest, excess = isometry(X)
    slack = 1e-12
    return (smallest >= gamma * (1 - slack)) & (smallest * (1 + excess) <= (1 + epsilon) * gamma * (1 + slack))


@dataclass(frozen=True, kw_only=True)
class IsometryFrequency:
    """Estimate how often X with entries N(0, 1/d) is (1-ε, 4ε)-isometric, against d.

    Attributes:
        dimensions: d.
        frequency: Share of the draws.
        low: Lower end of the 95 % Clopper-Pearson interval.
        high: Upper end.
        constant: C of each d, ``d = C (log(n/δ)/ε + (n/ε) log(1/ε))``.
        sufficient: Least C tried from which on every frequency is at least 1 - δ; None if none was.
        proven: Least C from which on every lower end is at least 1 - δ; None if none was.
    """

    dimensions: tuple[int, ...]
    frequency: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    constant: tuple[float, ...]
    sufficient: float | None
    proven: float | None


@public
def proposition_4_5(
    dimensions: Sequence[int], *, n: int, epsilon: float, delta: float, seeds: Sequence[int]
) -> IsometryFrequency:
    """Count how often X is (1-ε, 4ε)-isometric, and the constant C with which the proposition's d suffices.

    The paper's ``d = Ω(log(n/δ)/ε + (n/ε) log(1/ε))`` names no constant, and none serves every ε: for n = 1 the
    eigenvalue is χ²_d/d, of variance 2/d, and being at least 1 - ε takes d ∝ 1/ε². In general the lower edge of the
    Marchenko-Pastur law, (1 - √(n/d))² ≥ 1 - ε, takes d ≈ 4n/ε². The C found here therefore grows like
    1/(ε log(1/ε)) as ε falls; ``sufficient_dimension`` is a form that holds.

    Args:
        dimensions: d, increasing.
        n: Points.
        epsilon: ε in (0, 1/2).
        delta: δ in (0, 1).
        seeds: One draw each.

    Raises:
        ValueError: ε or δ out of range, or the dimensions do not increase.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), proposition 4.5.
    """
    _check_levels(epsilon, delta)
    if not dimensions or any(b <= a for a, b in pairwise(dimensions)):
        raise ValueError(f"expected increasing dimensions, got {list(dimensions)}")
    if n < 1 or not seeds:
        raise ValueError(f"expected at least one point and one draw, got n={n} and {len(seeds)} seeds")
    unit = log(n / delta) / epsilon + n / epsilon * log(1 / epsilon)
    hits = [
        sum(bool(is_isometric(inputs_of(seed, n, d, "scaled"), 1 - epsilon, 4 * epsilon)) for seed in seeds)
        if d >= n
        else 0
        for d in dimensions
    ]
    intervals = [clopper_pearson(hit, len(seeds)) for hit in hits]
    constant = tuple(d / unit for d in dimensions)
    frequency = tuple(hit / len(seeds) for hit in hits)
    low = tuple(interval[0] for interval in intervals)
    return IsometryFrequency(
        dimensions=tuple(dimensions),
        frequency=frequency,
        low=low,
        high=tuple(interval[1] for interval in intervals),
        constant=constant,
        sufficient=_from_where(constant, frequency, 1 - delta),
        proven=_from_where(constant, low, 1 - delta),
    )


@public
def sufficient_dimension(n: int, *, epsilon: float, delta: float) -> int:
    """The least d of which X is provably (1-ε, 4ε)-isometric with probability 1 - δ, by Davidson and Szarek's bound.

    With probability 1 - δ the singular values of X lie in 1 ± x, ``x = (√n + √(2 log(2/δ)))/√d``; isometry follows
    from ``(1 - x)² ≥ 1 - ε`` and ``(1 + x)² ≤ (1 + 4ε)(1 - ε)``. So ``d = O((n + log(1/δ))/ε²)``.

    Args:
        n: Points.
        epsilon: ε in (0, 1/2).
        delta: δ in (0, 1).

    Raises:
        ValueError: ε or δ out of range.

    Source: proposition 4.5 of Song, Xu and Lafferty 2021 with 1/ε² for the printed 1/ε; the bound is theorem II.13
    of Davidson and Szarek 2001 (Handbook of the Geometry of Banach Spaces).
    """
    _check_levels(epsilon, delta)
    if n < 1:
        raise ValueError(f"n is {n}, expected at least one point")
    room = min(1 - sqrt(1 - epsilon), sqrt((1 + 4 * epsilon) * (1 - epsilon)) - 1)
    return ceil(((sqrt(n) + sqrt(2 * log(2 / delta))) / room) ** 2)


def _check_levels(epsilon: float, delta: float) -> None:
    if not (0 < epsilon < 0.5 and 0 < delta < 1):
        raise ValueError(f"expected 0 < ε < 1/2 and 0 < δ < 1, got ε={epsilon}, δ={delta}")
    if min(epsilon, delta) < _LEAST:
        raise ValueError(f"ε is {epsilon} and δ {delta}, expected at least {_LEAST:g}: no dimension would do")


def _from_where(constant: Sequence[float], share: Sequence[float], needed: float) -> float | None:
    """The least constant from which on every share reaches what is needed."""
    least = None
    for value, reached in zip(reversed(constant), reversed(share), strict=True):
        if reached < needed:
            break
        least = value
    return least


def clopper_pearson(hits: int, trials: int) -> tuple[float, float]:
    """The exact interval of a proportion: it covers every true value with at least 95 %."""
    tail = (1 - 0.95) / 2
    low = 0.0 if hits == 0 else float(scipy.stats.beta.ppf(tail, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(scipy.stats.beta.ppf(1 - tail, hits + 1, trials - hits))
    return low, high


# Proposition 3.3: for Gaussian inputs λ_min(Ḡ) stays away from 0, so that assumption 3.1 is met.

_WIDEST = 1e9
"""d/n: beyond it inputs would fit into no memory."""


@public
def proposition_3_3(ns: Sequence[int], *, ratio: float, activation: str, seeds: Sequence[int]) -> TheoremCheck:
    """Check that ``λ_min(Ḡ)`` stays away from 0 as n grows, for x_i ~ N(0, I_d/d) with d = ratio · n.

    What it should stay near is known: with the Hermite coefficients a_k of ψ, off the diagonal all powers of the
    correlation above the first fade as d grows, so ``Ḡ ≈ a_1² XXᵀ + (E ψ(u)² - a_0² - a_1²) I`` up to terms of rank
    one, positive, and ``λ_min(Ḡ) → a_1² (1 - √(n/d))² + E ψ(u)² - a_0² - a_1²``. The second part is positive for
    every ψ that is not affine, which is why the proposition holds for every ratio, even below 1, where the first is 0.

    The measured series over ``ns`` has one row a seed. Its bound is half that limit, or half the least of the draws at
    the first n where that is smaller: small samples with d < n lie below the limit and rise to it.

    Args:
        ns: Sample sizes, the axis of the series.
        ratio: d/n, above 0.
        activation: ψ; the paper's proposition is for tanh and sigmoid.
        seeds: One draw of inputs each.

    Returns:
        The check; ``constants`` has the limit, the least of the draws for the largest n, and the slope of its
        logarithm against log n; ``series["limit"]`` the limit.

    Raises:
        ValueError: fewer than two sample sizes, or a ratio that leaves no dimension.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), proposition 3.3; the limit after El Karoui 2010 (Annals of
    Statistics 38(1)), theorem 2.1, derived here for Ḡ.
    """
    if len(ns) < 2 or min(ns) < 1 or not seeds or not 0 < ratio <= _WIDEST or round(ratio * min(ns)) < 1:
        raise ValueError(
            f"expected at least two sample sizes and a dimension of at least 1, got {list(ns)}, {ratio}, "
            f"with {len(seeds)} seeds: one at least"
        )
    check_memory("inputs", len(seeds), max(ns), round(ratio * max(ns)))
    psi = activation_named(activation)
    smallest = torch.stack([_smallest(n, round(ratio * n), activation, seeds) for n in ns], dim=1)
    coefficients = hermite_coefficients(psi.value, torch.ones(1), 192)[0].square()
    beyond = float(coefficients[2:].sum())
    limit = beyond + float(coefficients[1]) * max(0.0, 1 - sqrt(1 / ratio)) ** 2
    floor = min(limit, float(smallest[:, 0].min())) / 2
    least = smallest.amin(0).clamp(min=1e-300).log()
    size = torch.tensor([log(n) for n in ns], dtype=torch.float64)
    slope = float(((size - size.mean()) * least).sum() / (size - size.mean()).square().sum())
    return TheoremCheck(
        name="Proposition 3.3",
        source="Song, Xu and Lafferty 2021 (NeurIPS), proposition 3.3",
        reading=f"d = {ratio:g} n; bounded away from 0 means at least {floor:.4g} at every n",
        assumptions=(
            bounded_activation(psi),
            Assumption(name="dimension", statement="d = Ω(n): d/n", measured=ratio),
            Assumption(
                name="not affine",
                statement="E ψ(u)² - a_0² - a_1² > 0",
                measured=beyond,
                needed=0.0,
                holds=beyond > 1e-12 or ratio > 1,
            ),
        ),
        bound=torch.full_like(smallest, floor),
        measured=smallest,
        relation="at least",
        scale=torch.ones(len(seeds), dtype=torch.float64),
        constants={"limit": limit, "least at the largest n": float(least[-1].exp()), "slope in log n": slope},
        series={"limit": torch.full_like(smallest, limit)},
    )


def _smallest(n: int, d: int, activation: str, seeds: Sequence[int]) -> Float[Tensor, " seeds"]:
    """λ_min(Ḡ) of every draw."""
    X = torch.stack([inputs_of(seed, n, d, "scaled") for seed in seeds])
    return torch.linalg.eigvalsh(limiting_kernel(X, activation_named(activation)))[:, 0]
