"""Least norm: feedback alignment of two linear layers from a zero first one ends at the interpolant of least norm."""

from collections.abc import Sequence
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import (
    Numbers,
    as_list,
    check_memory,
    check_squarable,
    describe,
    feature_table,
    is_number,
    is_whole,
    non_negative,
    positive,
    step_count,
)
from falign.feedback import generator
from falign.theory._coerce import public, recording
from falign.theory.statement import Assumption, TheoremCheck

__all__ = ["least_norm", "minimum_norm"]


@public
def least_norm(X: Numbers, Y: Numbers) -> Float[Tensor, "k d"]:
    """Return ``(X⁺Y)ᵀ``: of all maps M with ``X Mᵀ = Y`` the one of least Frobenius norm.

    Its rows lie in the span of the inputs. In float64, on the CPU.

    Args:
        X: Inputs [n d]; Y is met exactly if they are independent (n ≤ d).
        Y: Targets [n k].

    Raises:
        ValueError: X and Y are no tables of finite real numbers with the same number of points.
    """
    X, Y = _tables(X, Y)
    return (torch.linalg.pinv(X) @ Y).mT


@recording
def minimum_norm(
    X: Numbers,
    Y: Numbers,
    *,
    hidden: int,
    sizes: Sequence[float],
    seeds: Sequence[int],
    steps: int = 20_000,
    rate: float | None = None,
    converged: float = 1e-13,
) -> TheoremCheck:
    """Train ``f = W_2 W_1 x`` by feedback alignment from ``W_1(0) = s R`` and compare ``W_2 W_1`` with ``(X⁺Y)ᵀ``.

    The rows of W_1 move in the span of the inputs only, so what W_1(0) has across it, ``W_1(0) P``, stays:
    ``W_2 W_1 - (X⁺Y)ᵀ = W_2 W_1(0) P + (f - Y)ᵀ (X⁺)ᵀ``. The claim checked is the bound
    ``s |W_2| |R P| + |f - Y|/σ_min(X)``: proportional to s at convergence, and zero for a zero first layer.

    Args:
        X: Inputs [n d], independent, n < d: else there is one interpolant and nothing to choose.
        Y: Targets [n k].
        hidden: Width, at least k.
        sizes: s, increasing from 0 or above: the axis of the series.
        seeds: Of R, W_2(0) and the feedback B; one run each. Their entries are normal with variance 1/inputs, those of
            W_2(0) times 0.1.
        steps: Most steps of full-batch descent of the mean ½|f - y|²; it ends earlier when all runs have converged or
            are no longer finite, which the series then show.
        rate: η; None for a tenth of n/|X|², |X| the largest singular value.
        converged: Error |f - Y| at which a run counts as converged, as a share of |Y|.

    Returns:
        The check; ``series``: "relative deviation" from the least-norm map, "size" s. ``constants``: "slope" of the
        logarithm of the deviation against log s over the sizes in (0, 0.1], if there are at least two.

    Raises:
        ValueError: X or Y is no table of finite numbers, or is all zeros; or a size, seed, width, rate or number of
            steps is out of range.

    Source: version 1 of Robertson and Koyejo 2024 (ICML LLW workshop 2023) states it; the bound is derived here.
    """
    X, Y = _tables(X, Y)
    for name, table in (("inputs", X), ("targets", Y)):
        check_squarable(name, table)
        if not table.any():
            raise ValueError(f"the {name} are all 0: there is nothing to learn")
    k, n, d = Y.shape[1], *X.shape
    sizes, seeds = _checked(sizes, seeds, hidden, k)
    step_count(steps, least=1)
    if rate is not None:
        positive("rate", rate)
    non_negative("converged", converged)
    size = torch.tensor(sizes, dtype=torch.float64)
    values = torch.linalg.svdvals(X)
    rate = n / float(values[0]) ** 2 / 10 if rate is None else rate
    R, out, B = (_normal(seeds, purpose, rows, columns) for purpose, rows, columns in _shapes(k, hidden, d))
    first = (size[:, None, None] * R.unsqueeze(1)).clone()
    W_1, W_2, error = _train(X, Y, first, 0.1 * out.unsqueeze(1), B.unsqueeze(1), rate, steps, converged)
    target = least_norm(X, Y)
    across = R - R @ torch.linalg.pinv(X) @ X
    bound = size * _norm(W_2) * across.flatten(1).norm(dim=1)[:, None] + error / values[-1]
    deviation = (W_2 @ W_1 - target).flatten(2).norm(dim=2)
    relative, worst = deviation / target.norm(), float((error / Y.norm()).max())
    return TheoremCheck(
        name="Least norm of linear feedback alignment",
        source="Robertson and Koyejo 2024, version 1 (2023); bound derived",
        reading="|W_2 W_1 - (X⁺Y)ᵀ| at convergence over the sizes s of W_1(0)",
        assumptions=(
            Assumption(
                name="overparameterised",
                statement="rank of X = n < d; measured n/d",
                measured=n / d,
                needed=1.0,
                holds=n < d and float(values[-1]) > n * torch.finfo(torch.float64).eps * float(values[0]),
            ),
            Assumption(
                name="converged",
                statement="|f - Y| ≤ converged · |Y|",
                measured=worst,
                needed=converged,
                holds=worst <= converged,
            ),
        ),
        bound=bound,
        measured=deviation,
        scale=target.norm().expand(len(seeds)) * 10,
        constants=_slope(size, relative),
        series={"relative deviation": relative, "size": size.expand(len(seeds), -1)},
    )


def _tables(X: Numbers, Y: Numbers) -> tuple[Tensor, Tensor]:
    X, Y = feature_table("inputs", X), feature_table("targets", Y)
    if len(X) != len(Y):
        raise ValueError(f"{len(X)} inputs and {len(Y)} targets: one target an input")
    return X, Y


def _checked(sizes: Sequence[float], seeds: Sequence[int], hidden: int, k: int) -> tuple[list[float], list[int]]:
    sizes, seeds = as_list("sizes", sizes), as_list("seeds", seeds)
    fits = all(is_number(size) and size >= 0 for size in sizes) and is_whole(hidden) and hidden >= k
    if not sizes or not seeds or not fits or sorted(set(sizes)) != sizes:
        raise ValueError(
            f"expected increasing sizes of at least 0, a seed and a width of at least {k}, "
            f"got {sizes}, {seeds}, {describe(hidden)}"
        )
    return sizes, seeds


def _norm(W: Float[Tensor, "*runs rows columns"]) -> Float[Tensor, "*runs"]:
    """Return spectral norms; nan where a run diverged."""
    # The SVD refuses what is not finite: one run that diverged would take all others with it.
    finite = W.isfinite().all(-1).all(-1)
    return torch.linalg.matrix_norm(W.where(finite[..., None, None], 0.0), 2).where(finite, torch.nan)


def _shapes(k: int, hidden: int, d: int) -> tuple[tuple[str, int, int], ...]:
    return ("first layer", hidden, d), ("output layer", k, hidden), ("feedback", k, hidden)


def _normal(seeds: Sequence[int], purpose: str, rows: int, columns: int) -> Float[Tensor, "runs rows columns"]:
    check_memory("a matrix a run", len(seeds), rows, columns)
    drawn = [torch.randn(rows, columns, generator=generator(seed, "minimum norm", purpose)) for seed in seeds]
    return torch.stack(drawn).double() / sqrt(columns)


def _train(
    X: Tensor, Y: Tensor, W_1: Tensor, W_2: Tensor, B: Tensor, rate: float, steps: int, converged: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Train, and return W_1, W_2 and |f - Y| [runs sizes] at the end."""
    W_2 = W_2.expand(*W_1.shape[:2], *W_2.shape[2:]).clone()
    enough = converged * Y.norm()
    error = X @ W_1.mT @ W_2.mT - Y
    for step in range(steps):
        # To look at all runs costs about as much as a step.
        if step % 100 == 0 and _ended(error, enough):
            break
        scaled_error = rate / len(X) * error.mT
        W_1, W_2 = W_1 - B.mT @ (scaled_error @ X), W_2 - scaled_error @ (X @ W_1.mT)
        error = X @ W_1.mT @ W_2.mT - Y
    return W_1, W_2, error.flatten(2).norm(dim=2)


def _ended(error: Tensor, enough: Tensor) -> bool:
    """Test whether all runs have converged or diverged."""
    size = error.flatten(2).norm(dim=2)
    return bool(((size <= enough) | ~size.isfinite()).all())


def _slope(size: Tensor, relative: Tensor) -> dict[str, float]:
    """Fit the slope of the logarithm of the mean deviation against that of the size, where the size is small."""
    small = (size > 0) & (size <= 0.1)
    if int(small.sum()) < 2:
        return {}
    x, y = size[small].log(), relative.mean(0)[small].log()
    x = x - x.mean()
    return {"slope": float((x @ y) / (x @ x))}
