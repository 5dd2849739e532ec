"""Gradient descent beside feedback alignment: far apart in error, or equal in error with other representations."""

from collections.abc import Sequence
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import fraction
from falign.theory._coerce import public
from falign.theory.factorisation._closed_forms import (
    RatioLaw,
    best_error,
    expected_bound,
    last_direction,
    optimal_rows,
    stationary_error,
)
from falign.theory.factorisation._methods import overlap
from falign.theory.factorisation._problem import feedback, fitting
from falign.theory.factorisation._theorems import SOURCE
from falign.theory.statement import Assumption, TheoremCheck


@public
def separation(r: int, epsilon: float, *, seeds: Sequence[int], delta: float = 0.5) -> TheoremCheck:
    """Check that on ``diag(1, …, 1, ε)`` fa's error is above √q times the optimum in a share 1 - δ of the draws of B.

    q is the δ-quantile of ``RatioLaw``, about ``r/0.455`` for δ = ½: the ratio of the squares is Θ(r) typically, so no
    constant bounds it over r. The share needed allows for three standard errors of the count.

    Args:
        r: Inner dimension.
        epsilon: ε.
        seeds: Of B, one draw each.
        delta: δ.

    Raises:
        ValueError: δ is not in (0, 1), or r, ε or the seeds are out of range.

    Source: derived; the abstract: "can be far from optimal when r < rank(Y)".
    """
    fraction("delta", delta)
    law, Y = RatioLaw(r=r, epsilon=epsilon), last_direction(r, epsilon)
    B = feedback(r + 1, r, seeds=seeds)
    ratio = (stationary_error(Y, B) / best_error(Y, r)).square()[:, None]
    return TheoremCheck(
        name="Separation",
        source=SOURCE,
        reading="(stationary error / least error of rank r)², one draw of B a run",
        assumptions=(),
        bound=torch.full_like(ratio, float(law.quantile(delta))),
        measured=ratio,
        relation="at least",
        scale=torch.ones(len(B), dtype=ratio.dtype),
        # Three standard errors of a share of so many draws.
        share_needed=max(0.0, 1 - delta - 3 * sqrt(delta * (1 - delta) / len(B))),
        constants={"median": float(ratio.median()), "median of the law": float(law.quantile(0.5))},
    )


@public
def near_orthogonality(Y: Float[Tensor, "n m"], B: Float[Tensor, "runs r n"]) -> TheoremCheck:
    """Check ``FA²/opt² ≤ |Y|²/opt²`` and ``E |P_FA P_opt|²/r ≤ (σ_1/σ_m)² r/m``: equal errors, other representations.

    Both say something on a flat spectrum. Proof: rows BY of a Gaussian B are GDVᵀ with D the singular values, and
    ``GD²Gᵀ ⪰ σ_m² GGᵀ``. So the leverage of the r first columns is at most ``(σ_1/σ_m)²`` times the one without D, of
    which the mean is r/m each. With ``diag(1.1 × r, 1 × (m - r))`` the first goes to 1 and the second to 0 as m grows.

    Args:
        Y: Square or tall, of full column rank.
        B: Gaussian draws.

    Returns:
        One run: the mean over draws. First the ratio of the squared errors, then the overlap, whose mean may exceed
        its bound by three standard errors.

    Raises:
        ValueError: Y and B do not fit, there is a single draw, or Y has rank r, so that there is no ratio.

    Source: derived; the abstract: "almost orthogonal even if their errors are approximately equal".
    """
    _drawn(Y, B)
    r, m = B.shape[1], Y.shape[1]
    least = best_error(Y, r)
    if not bool(least > 1e-12 * Y.square().sum().sqrt()):
        raise ValueError(f"Y has rank {r} or less: the least error is 0, and there is no ratio to it")
    sizes = torch.linalg.svdvals(Y)
    ratios = (stationary_error(Y, B) / least).square()
    shared = overlap(B @ Y, optimal_rows(Y, r).expand(len(B), r, m))
    # The bound is on the expectation: the mean of the draws may be three standard errors above it.
    chance = float(shared.std() / sqrt(len(B)))
    flatness = float((sizes[0] / sizes[-1]).square()) if Y.shape[0] >= m else float("inf")
    return TheoremCheck(
        name="Near-orthogonal representations",
        source=SOURCE,
        reading="ratio of squared errors (largest over draws), overlap |P P'|²/r (mean over draws)",
        assumptions=(
            Assumption(
                name="flat spectrum",
                statement="(σ_1/σ_m)² ≤ m/r",
                measured=flatness,
                needed=m / r,
                holds=flatness <= m / r,
            ),
        ),
        bound=torch.stack([Y.square().sum() / least.square(), shared.new_tensor(flatness * r / m + 3 * chance)])[None],
        measured=torch.stack([ratios.max(), shared.mean()])[None],
        scale=torch.ones(1, dtype=Y.dtype),
        constants={"error ratio": float(ratios.sqrt().mean()), "overlap": float(shared.mean()), "r/m": r / m},
    )


@public
def sampling_bound(Y: Float[Tensor, "n m"], B: Float[Tensor, "runs r n"]) -> TheoremCheck:
    """Check that the mean stationary error is below ``√((1 + k/(r-k-1)) Σ_{j>k} σ_j²)``, the best over k ≤ r - 2.

    Feedback alignment of inner dimension r is a range finder of r rows: against a lower rank k it oversamples.

    Args:
        Y: One matrix.
        B: Gaussian draws, r ≥ 2.

    Returns:
        One run: the mean over draws, which may exceed the bound by three standard errors.

    Raises:
        ValueError: Y and B do not fit, there is a single draw, or r is below 2.

    Source: Halko, Martinsson and Tropp 2011, SIAM Review 53, theorem 10.5.
    """
    _drawn(Y, B)
    errors = stationary_error(Y, B)
    bound = expected_bound(torch.linalg.svdvals(Y), B.shape[1])
    chance = float(errors.std() / sqrt(len(B)))
    return TheoremCheck(
        name="Range finder's bound",
        source="Halko, Martinsson and Tropp 2011, SIAM Review 53, theorem 10.5",
        reading="mean over draws of B",
        assumptions=(),
        bound=_single(Y, bound + 3 * chance),
        measured=_single(Y, float(errors.mean())),
        scale=Y.square().sum().sqrt()[None],
        constants={"optimum": float(best_error(Y, B.shape[1])), "bound": bound},
    )


def _drawn(Y: Tensor, B: Tensor) -> None:
    if Y.ndim != 2:
        raise ValueError(f"Y has shape {tuple(Y.shape)}, expected one matrix (n, m) for all draws: pass one at a time")
    fitting(Y, B)
    if len(B) < 2:
        raise ValueError("B is a single draw, the statement is about the mean over draws: take at least 2")


def _single(like: Tensor, value: float) -> Float[Tensor, "1 1"]:
    return like.new_tensor([[value]])
