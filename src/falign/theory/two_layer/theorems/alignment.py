"""Theorem 4.6: under a ridge that is cut off, β aligns with b, to a degree that does not depend on the width."""

from math import floor, inf, log, sqrt

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public
from falign.theory.statement import Assumption, TheoremCheck
from falign.theory.two_layer.gram import Gram
from falign.theory.two_layer.schedules import Penalty
from falign.theory.two_layer.theorems import conditions
from falign.theory.two_layer.theorems.linear import on_subspace, penalty_limit
from falign.theory.two_layer.trajectory import simulate, spaced
from falign.theory.two_layer.width_free import WidthFree

_RECORDED = 40
"""About as many times are recorded after the ridge ends."""


@public
def theorem_4_6(
    gram: Gram,
    *,
    d: int,
    rate: float,
    strength: float,
    sum_constant: float,
    schedule: str = "cutoff",
    delta: float = 0.1,
    longest: int = 1_000_000,
) -> TheoremCheck:
    """Run a linear network under ``λ = Lγ`` for ``T = ⌊S_λ/λ⌋`` steps, then without, and follow cos∠(b, β).

    ``S_λ = c_S γ√(γp)/(η√n M)`` with γ = λ_min(XXᵀ) and M = λ_max(XXᵀ), the extremes over the block of runs. After the
    ridge the runs go on until ``|e| ≤ 10⁻¹⁰ |y|`` by theorem 4.3's rate. The claim tried is that the cosine is, from
    then to the end, at least three times the 1/√p by which that of a random β differs from 0; the constant itself is
    ``constants["least cosine"]``. It is the same at every width, but grows with |y|²/n: the paper's c must depend on
    the constants in ``|y| = Θ(√n)``.

    With ``inverse-square`` or ``exponential`` the ridge starts at the same λ and its infinite sum is the same S_λ;
    ``constant`` never ends, has no finite sum, and is followed for as many steps as the cutoff would be.

    Args:
        gram: Initial draw and data, of ``gram.from_start`` or ``gram.sample``; n ≤ d, or n > d on the column space.
        d: Input dimension.
        rate: η.
        strength: L, in units of γ.
        sum_constant: c_S.
        schedule: A name of ``SCHEDULES``.
        delta: δ, the share of runs that may fail.
        longest: Most steps to run.

    Returns:
        The check; the series are over the recorded times after T. ``constants``: gamma, M, epsilon, lambda, T, S,
        steps, least/mean/spread of the final cosine, error after the run relative to |y|.

    Raises:
        ValueError: L, c_S or d is not positive, δ not in (0, 1), X is zero, the runs differ in width, S_λ is less than
            one step's λ, or the schedule would take more than ``longest`` steps.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), theorem 4.6. λ is put on for exactly T steps: the printed t ≤ T is
    T + 1, whose sum can exceed S_λ.
    """
    conditions.check_levels(delta=delta, strength=strength, sum_constant=sum_constant, d=d, rate=rate)
    if gram.p.amin() < gram.p.amax():
        raise ValueError(
            f"T depends on the width, and this block has widths from {float(gram.p.min()):.10g} to "
            f"{float(gram.p.max()):.10g}: one width a block"
        )
    own = gram.K.amin(-1)
    gram, n, nonzero, top = on_subspace(gram)
    gamma, M, p = float(nonzero.min()), float(top.max()), float(gram.p[0])
    ridge = strength * gamma
    total = sum_constant * penalty_limit(gamma, M, p=p, n=n, rate=rate)
    penalty = penalty_of_sum(ridge, total, schedule)
    if not total / ridge < longest:
        raise ValueError(f"{total / ridge:.4g} steps of λ are needed, above longest={longest}: choose a smaller c_S")
    last = floor(total / ridge)
    after = last if schedule in ("cutoff", "constant") else _until_small(penalty, gamma)
    onward = log(1e10) / (rate * gamma / 2) if rate * gamma > 0 else inf
    steps = after + floor(onward) + 1 if onward < longest else longest + 1
    if steps > longest:
        raise ValueError(
            f"{after + onward:.10g} steps are needed, above longest={longest}: choose a smaller p, c_S or L"
        )
    engine = WidthFree(gram, rate=rate, penalties=(penalty,))
    times = [after + t for t in spaced(steps - after, _RECORDED)]
    cosine = simulate(engine, times).values["cosine"][:, 0]
    norm = gram.y.norm(dim=-1)
    left = float((engine.error()[:, 0].norm(dim=-1) / norm).max())
    final = cosine[:, -1]
    return TheoremCheck(
        name="Theorem 4.6",
        source="Song, Xu and Lafferty 2021 (NeurIPS), theorem 4.6",
        reading=f"{schedule} schedule, λ = {strength:g}γ for exactly T steps or of the same sum, β ← (1 - ηλ(t))β + …",
        assumptions=(
            conditions.positive("full rank", "λ_min(XXᵀ) ≥ γ > 0", own, top, None),
            Assumption(name="size of the targets", statement="|y|/√n = Θ(1)", measured=float(norm.max()) / sqrt(n)),
            Assumption(name="isometry", statement="ε = λ_max/λ_min - 1 is small", measured=M / gamma - 1),
            Assumption(name="strength", statement="L is large", measured=strength),
            Assumption(name="width", statement="C ≤ p/(d log(d/δ))", measured=p / (d * log(max(d / delta, 2.0)))),
            conditions.step_size(rate, top, own, 0.5, ridge),
            conditions.penalty_sum("Σλ(t) ≤ S_λ", penalty.total(), total / sum_constant, sum_constant),
        ),
        bound=torch.full_like(cosine, 3 / sqrt(p)),
        measured=cosine,
        relation="at least",
        scale=torch.ones_like(final),
        share_needed=1 - delta,
        constants={"gamma": gamma, "M": M, "epsilon": M / gamma - 1, "lambda": ridge, "T": float(last), "S": total}
        | {"steps": float(steps), "error left": left, **_summary(cosine)},
        series={"time": torch.tensor(times, dtype=torch.float64).expand(len(final), -1)},
    )


def _summary(cosine: Float[Tensor, "runs times"]) -> dict[str, float]:
    """Least cosine of all, mean and standard deviation of the final ones."""
    final = cosine[:, -1]
    spread = float(final.std()) if len(final) > 1 else 0.0
    return {"least cosine": float(cosine.min()), "mean cosine": float(final.mean()), "spread of the cosine": spread}


@public
def penalty_of_sum(strength: float, total: float, schedule: str) -> Penalty:
    """The ridge of that schedule which starts at λ(0) = ``strength`` and sums to at most ``total``.

    The cutoff schedule has λ for ⌊total/λ⌋ steps. The constant one has no sum and ignores ``total``.

    Raises:
        ValueError: ``total`` is less than ``strength``: the first step alone would exceed it.
    """
    if schedule == "constant":
        return Penalty(strength)
    if not (strength > 0 and total / strength < 1e15):
        raise ValueError(f"strength is {strength} and total {total}, expected positive ones, of at most 1e15 steps")
    if total < strength:
        raise ValueError(
            f"Σλ may be {total:.4g}, less than the first step's λ = {strength:.4g}: "
            "choose a larger c_S or p, or a smaller L"
        )
    if schedule == "cutoff":
        return Penalty(strength, schedule, floor(total / strength) - 0.5)
    if schedule == "exponential":
        ratio = strength / total
        return Penalty(strength, schedule, -1 / log(1 - ratio) if ratio < 1 else 1e-3)

    def excess(steps: float) -> float:
        return Penalty(strength, schedule, steps).total() - total

    if excess(1e-6) >= 0:
        return Penalty(strength, schedule, 1e-6)
    steps = scipy.optimize.root_scalar(excess, bracket=(1e-6, 10 * total / strength + 10), rtol=1e-12).root
    return Penalty(strength, schedule, float(steps) * (1 - 1e-11))


def _until_small(penalty: Penalty, gamma: float) -> int:
    """Steps after which a schedule without an end is below a thousandth of γ."""
    assert penalty.steps is not None
    ratio = max(1.0, penalty.strength / (1e-3 * gamma))
    return floor(penalty.steps * (log(ratio) if penalty.schedule == "exponential" else sqrt(ratio))) + 1


@public
def width_independent(checks: list[TheoremCheck]) -> Tensor:
    """Mean final cosine and its standard error for each of some checks of theorem 4.6, [checks 2]."""
    if not checks:
        raise ValueError("checks are empty, expected those of theorem 4.6, one a width")
    rows = [(check.measured[:, -1].mean(), check.measured[:, -1].std() / sqrt(len(check.measured))) for check in checks]
    return torch.tensor([[float(mean), float(error)] for mean, error in rows], dtype=torch.float64)
