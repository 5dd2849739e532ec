"""Proposition 3.3: for Gaussian inputs λ_min(Ḡ) stays away from 0, so that assumption 3.1 is met."""

from collections.abc import Sequence
from math import log, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public
from falign.theory.inputs import room
from falign.theory.statement import Assumption, TheoremCheck
from falign.theory.two_layer.activations import activation as activation_named
from falign.theory.two_layer.kernels import hermite_coefficients, limiting_kernel
from falign.theory.two_layer.start import inputs_of
from falign.theory.two_layer.theorems.conditions import bounded_activation

_WIDEST = 1e9


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
    room("inputs", len(seeds), max(ns), round(ratio * max(ns)))
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
