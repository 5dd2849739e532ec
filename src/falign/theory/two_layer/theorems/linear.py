"""Theorem 4.3: the error of a linear network with a summable ridge."""

from collections.abc import Sequence
from dataclasses import replace
from math import log, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import typed
from falign.theory.statement import Assumption, TheoremCheck
from falign.theory.two_layer.gram import Gram
from falign.theory.two_layer.schedules import Penalty
from falign.theory.two_layer.theorems import conditions
from falign.theory.two_layer.theorems.course import follow, step_bound
from falign.theory.two_layer.width_free import WidthFree


@typed
def theorem_4_3(
    gram: Gram,
    *,
    d: int,
    rate: float,
    steps: int,
    penalties: Sequence[Penalty] = (Penalty(),),
    sum_constant: float | None = None,
    gamma: float | None = None,
    largest: float | None = None,
    delta: float = 0.1,
    on_column_space: bool = False,
) -> TheoremCheck:
    """Check ``|e(t+1)| ≤ (1 - ηγ/2 - ηλ(t))|e(t)| + λ(t)|y|`` at every step of a linear network of any width.

    Conditions: ``γ < λ_min(XXᵀ)``, ``λ_max(XXᵀ) < M``, ``|y| = Θ(√n)``, ``Σλ(t) ≤ S_λ = c_S γ√(γp)/(η√n M)`` and
    ``p = Ω(Md log(d/δ)/γ)``. ``series["bound of a gradient step"]`` is the same with ``ηλ(t)|y|``: what the step
    (1 - ηλ)β obeys for every η. The printed λ(t)|y| is weaker for η < 1 and, for η > 1, stronger than a gradient
    step can keep.

    Args:
        gram: Initial draw and data, of ``gram.from_start`` or ``gram.sample``.
        d: Input dimension.
        rate: η.
        steps: Steps to follow.
        penalties: λ(t), one run per seed and penalty.
        sum_constant: c_S; None reports the one that the largest sum implies.
        gamma: γ; None takes each run's own λ_min(XXᵀ), where the strict inequality of the paper is an equality.
        largest: M; None takes the largest λ_max(XXᵀ).
        delta: δ, the share of runs that may fail.
        on_column_space: For n > d, or dependent inputs: replace y by its projection on X's column space and count
            only the non-zero eigenvalues, those above 10⁻¹² of the largest. Without it such inputs fail the assumption
            on λ_min.

    Raises:
        ValueError: γ, M, c_S or d is not positive, δ not in (0, 1), X is zero, or there is no step.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), theorem 4.3, equation 4.3 and "large sample scenario". The update is
    read as (1 - ηλ(t))β.
    """
    conditions.check_levels(delta=delta, gamma=gamma, largest=largest, sum_constant=sum_constant, d=d)
    gram, n, own, top = on_subspace(gram) if on_column_space else _whole(gram)
    runs = len(penalties)
    used = own if gamma is None else torch.full_like(own, gamma)
    M = float(top.max()) if largest is None else largest
    p, least = float(gram.p.min()), float(used.min())
    norm = (gram.y.square().sum(-1) + gram.rest.square().sum(-1)).sqrt()
    engine = WidthFree(gram, rate=rate, penalties=penalties)
    course = follow(engine, penalties=penalties, y=norm, steps=steps)
    gammas = used.repeat_interleave(runs)
    statement = "Σλ(t) ≤ S_λ = c_S γ√(γp)/(η√n M)"
    total = max(penalty.total() for penalty in penalties)
    assumptions: tuple[Assumption, ...] = (
        conditions.positive("full rank", "λ_min(XXᵀ) ≥ γ > 0", own, top, gamma),
        Assumption(
            name="largest eigenvalue",
            statement="λ_max(XXᵀ) ≤ M",
            measured=float(top.max()),
            needed=M,
            holds=float(top.max()) <= M * (1 + 1e-12),
        ),
        Assumption(name="size of the targets", statement="|y|/√n = Θ(1)", measured=float(norm.max()) / sqrt(n)),
        Assumption(
            name="width", statement="C ≤ pγ/(Md log(d/δ))", measured=p * least / (M * d * log(max(d / delta, 2.0)))
        ),
        conditions.step_size(rate, top.repeat_interleave(runs), gammas, 0.5, float(course.strengths.max())),
        conditions.penalty_sum(statement, total, penalty_limit(least, M, p=p, n=n, rate=rate), sum_constant),
    )
    return TheoremCheck(
        name="Theorem 4.3",
        source="Song, Xu and Lafferty 2021 (NeurIPS), theorem 4.3",
        reading="β ← (1 - ηλ(t))β + …" + ("; y projected, the non-zero eigenvalues" if on_column_space else ""),
        assumptions=assumptions,
        bound=step_bound(course, gammas, rate=rate, share=0.5, pull=1.0),
        measured=course.error[:, 1:],
        scale=course.y,
        share_needed=1 - delta,
        constants={"gamma": least, "M": M, "cosine": float(course.farthest["cosine"].max())},
        series={"bound of a gradient step": step_bound(course, gammas, rate=rate, share=0.5, pull=rate)},
    )


def penalty_limit(gamma: float, largest: float, *, p: float, n: int, rate: float) -> float:
    """``S_λ = γ√(γp)/(η√n M)``: what Σλ(t) may be, for c_S = 1."""
    return gamma * sqrt(gamma * p) / (rate * sqrt(n) * largest)


def on_subspace(gram: Gram) -> tuple[Gram, int, Float[Tensor, " seeds"], Float[Tensor, " seeds"]]:
    """The run with y projected on X's column space; its points n, and smallest and largest non-zero eigenvalue.

    The directions of dependent inputs stay as coordinates in which all is zero: seeds may differ in rank.
    """
    n, top = gram.basis.shape[1], _largest(gram)
    seen = 1e-12 * top.unsqueeze(-1) < gram.K

    def kept(tensor: Tensor) -> Tensor:
        return torch.where(seen, tensor, 0.0)

    projected = replace(
        gram,
        K=kept(gram.K),
        y=kept(gram.y),
        rest=torch.zeros_like(gram.rest),
        Z_Z=torch.where(seen.unsqueeze(-1) & seen.unsqueeze(-2), gram.Z_Z, 0.0),
        Z_beta=kept(gram.Z_beta),
        Z_b=kept(gram.Z_b),
    )
    return projected, n, torch.where(seen, gram.K, torch.inf).amin(-1), top


def _whole(gram: Gram) -> tuple[Gram, int, Float[Tensor, " seeds"], Float[Tensor, " seeds"]]:
    """The run as it is; n, and the extreme eigenvalues of the n × n matrix XXᵀ."""
    n, r = gram.basis.shape[1:]
    smallest = gram.K.amin(-1) if n == r else torch.zeros_like(gram.K[:, 0])
    return gram, n, smallest, _largest(gram)


def _largest(gram: Gram) -> Float[Tensor, " seeds"]:
    """``λ_max(XXᵀ)``.

    Raises:
        ValueError: it is 0.
    """
    largest = gram.K.amax(-1)
    if not (largest > 0).all():
        raise ValueError("XXᵀ is zero for at least one seed: the theorem is about inputs that are not all zero")
    return largest
