"""Theorems 3.2 and 4.2: the error falls geometrically, without and with a summable ridge."""

from collections.abc import Sequence
from math import log, sqrt

import torch

from falign.theory.door import typed
from falign.theory.statement import Assumption, TheoremCheck
from falign.theory.two_layer.activations import activation as activation_named
from falign.theory.two_layer.dual import Dual
from falign.theory.two_layer.kernels import limiting_kernel
from falign.theory.two_layer.schedules import Penalty
from falign.theory.two_layer.start import Start
from falign.theory.two_layer.theorems import conditions
from falign.theory.two_layer.theorems.course import Course, follow, step_bound

_PAPER = "Song, Xu and Lafferty 2021 (NeurIPS)"


@typed
def theorem_3_2(
    start: Start,
    *,
    activation: str,
    rate: float,
    steps: int,
    gamma: float | None = None,
    delta: float = 0.1,
) -> TheoremCheck:
    """Check ``|e(t+1)| ≤ (1 - ηγ/4)|e(t)|`` at every step, and measure the constants of the parameter bounds.

    ``|w_r(t) - w_r(0)| ≤ c1 n√(log p)/(γ√p)`` and ``|β_r(t) - β_r(0)| ≤ c2 n/(γ√p)`` are reported by the c1 and c2
    that the runs imply. ``constants["share of gamma"]`` is the least of ``(1 - |e(t+1)|/|e(t)|)/(ηγ)``, of which
    the theorem needs 1/4; at infinite width it is at least 1.

    Args:
        start: Data and initial weights.
        activation: A name of ``ACTIVATIONS``.
        rate: η.
        steps: Steps to follow.
        gamma: γ; None takes each run's own λ_min(Ḡ), the largest that assumption 3.1 allows.
        delta: δ, the share of runs that may fail.

    Raises:
        ValueError: γ is not positive, δ not in (0, 1), or there is no step.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), theorem 3.2. A condition on η is not printed; the one that the bound
    cannot do without is listed among the assumptions.
    """
    return _check("Theorem 3.2", start, activation, rate, steps, gamma, delta, (Penalty(),), None)


@typed
def theorem_4_2(
    start: Start,
    *,
    activation: str,
    rate: float,
    steps: int,
    penalties: Sequence[Penalty],
    sum_constant: float | None = None,
    gamma: float | None = None,
    delta: float = 0.1,
) -> TheoremCheck:
    """Check ``|e(t+1)| ≤ (1 - ηγ/4 - ηλ(t))|e(t)| + λ(t)|y|`` at every step.

    The schedules must satisfy ``Σλ(t) ≤ S̃ = c̃_S γ²√p/(ηn²√(log p))``. ``series["bound of a gradient step"]`` is the
    same with ``ηλ(t)|y|``, which a plain gradient step obeys: tighter by 1/η for η < 1. For η > 1 the printed bound
    is the smaller of the two.

    Args:
        start: Data and initial weights.
        activation: A name of ``ACTIVATIONS``.
        rate: η.
        steps: Steps to follow.
        penalties: λ(t), one run per seed and penalty.
        sum_constant: c̃_S; None reports the one that the largest sum implies.
        gamma: γ; None takes each run's own λ_min(Ḡ).
        delta: δ, the share of runs that may fail.

    Raises:
        ValueError: γ or c̃_S is not positive, δ not in (0, 1), or there is no step.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), theorem 4.2 and equation 4.2. The update is read as (1 - ηλ(t))β:
    the printed 1 - λ(t) contradicts the bound's ηλ(t).
    """
    return _check("Theorem 4.2", start, activation, rate, steps, gamma, delta, penalties, sum_constant)


def _check(
    name: str,
    start: Start,
    activation: str,
    rate: float,
    steps: int,
    gamma: float | None,
    delta: float,
    penalties: Sequence[Penalty],
    sum_constant: float | None,
) -> TheoremCheck:
    """Both theorems: 3.2 is 4.2 without penalties."""
    conditions.check_levels(delta=delta, gamma=gamma, sum_constant=sum_constant)
    seeds, p, _ = start.W.shape
    n = start.X.shape[-2]
    kernel = limiting_kernel(start.X, activation_named(activation)).expand(seeds, n, n)
    own, largest = (value.repeat_interleave(len(penalties)) for value in conditions.spectrum(kernel))
    used = own.clamp(min=0) if gamma is None else torch.full_like(own, gamma)
    engine = Dual(start, activation=activation, rate=rate, penalties=penalties)
    course = follow(engine, penalties=penalties, y=start.y.norm(dim=-1).expand(seeds), steps=steps)
    least = float(used.min())
    assumptions: list[Assumption] = [
        conditions.positive("assumption 3.1", "λ_min(Ḡ) ≥ γ > 0", own, largest, gamma),
        conditions.bounded_activation(activation_named(activation)),
        *conditions.bounded_data(start),
        conditions.gaussian_start(start),
        *conditions.wide_enough(p, n, least, delta),
        conditions.step_size(rate, largest, used, 0.25, float(course.strengths.max())),
    ]
    ridge = name == "Theorem 4.2"
    if ridge:
        statement = "Σλ(t) ≤ c̃_S γ²√p/(ηn²√(log p))"
        at_one = least**2 * sqrt(p) / (rate * n**2 * sqrt(log(max(p, 2))))
        total = max(penalty.total() for penalty in penalties)
        assumptions.append(conditions.penalty_sum(statement, total, at_one, sum_constant))
    bound = step_bound(course, used, rate=rate, share=0.25, pull=1.0)
    sharper = {"bound of a gradient step": step_bound(course, used, rate=rate, share=0.25, pull=rate)}
    return TheoremCheck(
        name=name,
        source=f"{_PAPER}, {name[0].lower()}{name[1:]}",
        reading="β ← (1 - ηλ(t))β + …; γ = λ_min(Ḡ) of the run" if gamma is None else f"γ = {gamma:g} as given",
        assumptions=tuple(assumptions),
        bound=bound,
        measured=course.error[:, 1:],
        scale=course.y,
        share_needed=1 - delta,
        constants=_constants(course, used, own, largest, rate=rate, p=p, n=n),
        series=sharper if ridge else {},
    )


def _constants(
    course: Course, gamma: torch.Tensor, own: torch.Tensor, largest: torch.Tensor, *, rate: float, p: int, n: int
) -> dict[str, float]:
    """The numbers that the theorem speaks of, the worst of the runs where it bounds them."""
    before, after = course.error[:, :-1], course.error[:, 1:]
    seen = before > 1e-9 * course.y[:, None]
    shares = torch.where(seen, (1 - after / before) / (rate * gamma[:, None]), torch.inf)
    unit = gamma * sqrt(p) / n
    return {
        "lambda_min": float(own.min()),
        "lambda_max": float(largest.max()),
        **({} if course.strengths.any() else {"share of gamma": float(shares.min())}),
        "rate": float(((course.error[:, -1] / course.error[:, 0]) ** (1 / after.shape[1])).max()),
        "rate allowed": float((1 - rate * gamma / 4).max()),
        "c1": float((course.farthest["weight_change"] * unit).max()) / sqrt(log(max(p, 2))),
        "c2": float((course.farthest["beta_change"] * unit).max()),
        "cosine": float(course.farthest["cosine"].max()),
    }
