"""Theorem 4.6: under a ridge that is cut off, β aligns with b, to a degree that does not depend on the width."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, inf, log, sqrt

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory._coerce import public
from falign.theory.statement import Assumption, TheoremCheck
from falign.theory.two_layer._activations import activation as activation_named
from falign.theory.two_layer._dual import Dual
from falign.theory.two_layer._schedules import Penalty
from falign.theory.two_layer._start import Scale, Start, draw
from falign.theory.two_layer._trajectory import simulate, spaced
from falign.theory.two_layer._width_free import Gram, WidthFree
from falign.theory.two_layer.kernels import limiting_kernel
from falign.theory.two_layer.theorems import _conditions
from falign.theory.two_layer.theorems._conditions import spectrum
from falign.theory.two_layer.theorems._convergence import on_subspace, penalty_limit

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
        gram: Initial draw and data, as ``gram`` of ``WidthFree.from_start(…)`` or of ``WidthFree.sample(…)``;
            n ≤ d, or n > d on the column space.
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
    _conditions.check_levels(delta=delta, strength=strength, sum_constant=sum_constant, d=d, rate=rate)
    if gram.p.amin() < gram.p.amax():
        raise ValueError(
            f"T depends on the width, and this block has widths from {float(gram.p.min()):.10g} to "
            f"{float(gram.p.max()):.10g}: one width a block"
        )
    smallest = gram.K.amin(-1)
    gram, n, nonzero, top = on_subspace(gram)
    gamma, M, p = float(nonzero.min()), float(top.max()), float(gram.p[0])
    ridge = strength * gamma
    total = sum_constant * penalty_limit(gamma, M, p=p, n=n, rate=rate)
    penalty = penalty_of_sum(ridge, total, schedule)
    if not total / ridge < longest:
        raise ValueError(f"{total / ridge:.4g} steps of λ are needed, above longest={longest}: choose a smaller c_S")
    last = floor(total / ridge)
    after = last if schedule in ("cutoff", "constant") else _until_small(penalty, gamma)
    # Theorem 4.3 lets the error shrink by 1 - ηγ/2 a step: so many for a factor of 10¹⁰.
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
            _conditions.positive_smallest("full rank", "λ_min(XXᵀ) ≥ γ > 0", smallest, top, None),
            Assumption(name="size of the targets", statement="|y|/√n = Θ(1)", measured=float(norm.max()) / sqrt(n)),
            Assumption(name="isometry", statement="ε = λ_max/λ_min - 1 is small", measured=M / gamma - 1),
            Assumption(name="strength", statement="L is large", measured=strength),
            Assumption(name="width", statement="C ≤ p/(d log(d/δ))", measured=p / (d * log(max(d / delta, 2.0)))),
            _conditions.step_size(rate, top, smallest, 0.5, ridge),
            _conditions.penalty_sum("Σλ(t) ≤ S_λ", penalty.total(), total / sum_constant, sum_constant),
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
        # Half a step before the end, so that rounding cannot add a step.
        return Penalty(strength, schedule, floor(total / strength) - 0.5)
    if schedule == "exponential":
        # Σ exp(-t/τ) over t = 0, 1, … is 1/(1 - exp(-1/τ)): solved for τ.
        ratio = strength / total
        return Penalty(strength, schedule, -1 / log(1 - ratio) if ratio < 1 else 1e-3)

    def excess(steps: float) -> float:
        return Penalty(strength, schedule, steps).total() - total

    if excess(1e-6) >= 0:
        return Penalty(strength, schedule, 1e-6)
    steps = scipy.optimize.root_scalar(excess, bracket=(1e-6, 10 * total / strength + 10), rtol=1e-12).root
    # A root that rounding puts above the exact one would break Σλ ≤ S_λ.
    return Penalty(strength, schedule, float(steps) * (1 - 1e-11))


def _until_small(penalty: Penalty, gamma: float) -> int:
    """Steps after which a schedule without an end is below a thousandth of γ."""
    assert penalty.steps is not None
    ratio = max(1.0, penalty.strength / (1e-3 * gamma))
    return floor(penalty.steps * (log(ratio) if penalty.schedule == "exponential" else sqrt(ratio))) + 1


@public
def width_independent(checks: list[TheoremCheck]) -> Tensor:
    """Mean final cosine and its standard error for each of some checks of theorem 4.6, [checks 2].

    Raises:
        ValueError: There is no check.
    """
    if not checks:
        raise ValueError("checks are empty, expected those of theorem 4.6, one a width")
    rows = [(check.measured[:, -1].mean(), check.measured[:, -1].std() / sqrt(len(check.measured))) for check in checks]
    return torch.tensor([[float(mean), float(error)] for mean, error in rows], dtype=torch.float64)


# Without ridge wide networks do not align: cos∠(b, β) = O(n/√p), and for linear networks its mean is about n/p.

_SOURCE = "Song, Xu and Lafferty 2021 (NeurIPS), section 4.1"


@public
def vanishing_alignment(start: Start, *, activation: str, rate: float, steps: int) -> TheoremCheck:
    """Check ``|cos∠(b, β)| ≤ (|<b, β(0)>|/|b| + |Δ|) / (|β(0)| - |Δ|)``, ``Δ = β(t) - β(0)``, in runs without ridge.

    The inequality is exact while |Δ| < |β(0)|; what theorem 3.2 adds is that |Δ| = O(n) as |β(0)| ≈ √p, whence
    O(n/√p). ``constants["cosine √p/n"]`` and ``constants["change/n"]`` are the largest ``|cos| √p/n`` and ``|Δ|γ/n``
    of the runs: compare them over widths.

    Args:
        start: Data and initial weights.
        activation: A name of ``ACTIVATIONS``.
        rate: η.
        steps: Steps to follow, looked at about 40 times.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), section 4.1, the display before equation 4.1.
    """
    seeds, p = start.beta.shape
    n = start.X.shape[-2]
    smallest, largest = _conditions.spectrum(limiting_kernel(start.X, activation_named(activation)).expand(seeds, n, n))
    engine = Dual(start, activation=activation, rate=rate)
    length, chance = start.beta.norm(dim=-1), (start.b * start.beta).sum(-1).abs() / start.b.norm(dim=-1)
    changes, cosines = [], []
    for t in spaced(steps, 40):
        engine.advance(t - engine.t)
        changes.append((engine.beta[:, 0] - start.beta).norm(dim=-1))
        cosines.append(engine.measure()["cosine"][:, 0].abs())
    change, cosine = torch.stack(changes, -1), torch.stack(cosines, -1)
    far = float((change / length[:, None]).max())
    bound = (chance[:, None] + change) / (length[:, None] - change)
    return TheoremCheck(
        name="Consequence of theorem 3.2",
        source=_SOURCE,
        reading="the chain of inequalities as printed; O(n/√p) is read off over widths",
        assumptions=(
            _conditions.positive_smallest("assumption 3.1", "λ_min(Ḡ) > 0", smallest, largest, None),
            Assumption(name="small change", statement="|Δ| < |β(0)|", measured=far, needed=1.0, holds=far < 1),
        ),
        bound=bound,
        measured=cosine,
        scale=torch.ones_like(smallest),
        constants={
            "cosine √p/n": float(cosine.max()) * sqrt(p) / n,
            "change/n": float((change.amax(-1) * smallest).max()) / n,
            "mean cosine": float(cosine[:, -1].mean()),
        },
    )


@public
def linear_alignment_law(
    widths: Sequence[int], *, n: int, d: int, rate: float, steps: int, seeds: Sequence[int], inputs: Scale = "standard"
) -> TheoremCheck:
    """Check ``E cos∠(b, β(∞)) = (1/p) Σ_k (1 - ηk)/(1 - ηk/2)``, k the eigenvalues of XXᵀ: n/p for small η.

    For linear networks without ridge, taught by a Gaussian network. To leading order in 1/p, ``e(t) = (1 - ηk)ᵗ e(0)``
    in each eigenvector, E e(0)² = 2k, and β(t) gets ``(η²/p) Σ_{j<i} e(j)ᵀ XXᵀ e(i)`` times b, which sums to
    ``(1/p) Σ_k ½(1/k - η/(2 - ηk)) e_k(0)²``; |b||β| ≈ p. So the continuous-time law n/p, by which <b, β> grows by
    half the growth of |W|², is an upper limit: steps of ηk = 1/2 reach 2/3 of it.

    The measured series is ``|mean - law|`` over widths; it may be three standard errors of the mean, plus the
    relative correction of order n/p that the derivation leaves out.

    Args:
        widths: p, the axis of the series.
        n: Points.
        d: Input dimension.
        rate: η.
        steps: Steps, enough for the error to vanish: ``constants["error left"]`` is what remains of it.
        seeds: One run each, at least two.
        inputs: Distribution of the inputs.

    Raises:
        ValueError: fewer than two seeds, or no width or step.

    Source: derived here; the paper states only O(n/√p), section 4.1.
    """
    if not widths or steps < 1:
        raise ValueError(f"widths are {list(widths)} and steps {steps}, expected at least one of each")
    if len(seeds) < 2:
        raise ValueError(f"a mean needs a standard error, so at least two seeds, got {len(seeds)}")
    columns, left = [], []
    for p in widths:
        engine = WidthFree.sample(seeds, n=n, d=d, p=p, rate=rate, inputs=inputs)
        product = rate * engine.gram.K
        before = engine.error().norm(dim=-1)
        engine.advance(steps)
        left.append((engine.error().norm(dim=-1) / before).max())
        cosine = engine.measure()["cosine"][:, 0]
        law = ((1 - product) / (1 - product / 2)).sum(-1).mean() / p
        columns.append(torch.stack([cosine.mean(), cosine.std() / sqrt(len(seeds)), law]))
    mean, error, law = torch.stack(columns, dim=1).unsqueeze(1)
    rest = float(torch.stack(left).max())
    width = torch.tensor([list(widths)], dtype=torch.float64)
    return TheoremCheck(
        name="Law of the mean cosine",
        source="derived; sharper than " + _SOURCE,
        reading="linear network, Gaussian teacher; within three standard errors and a share n/p of the law",
        assumptions=(
            Assumption(
                name="converged", statement="|e(t)| ≤ 10⁻³ |e(0)|", measured=rest, needed=1e-3, holds=rest <= 1e-3
            ),
        ),
        bound=3 * error + law * n / width,
        measured=(mean - law).abs(),
        scale=torch.ones(1, dtype=torch.float64),
        constants={"error left": rest},
        series={"mean": mean, "standard error": error, "law": law, "n/p": n / width, "width": width},
    )


# How far single weights come, against n and p: the exponents of theorem 3.2's second half.


@dataclass(frozen=True, kw_only=True)
class Slope:
    """An exponent fitted on logarithms, with its standard error."""

    value: float
    error: float


@dataclass(frozen=True, kw_only=True)
class ParameterScaling:
    """Exponents of ``γ max_t max_r |β_r(t) - β_r(0)|`` and of the same for w_r over ``√(log p)``.

    Attributes:
        beta_in_p: Bounded by a law of exponent -1/2.
        beta_in_n: Bounded by a law of exponent 1.
        weight_in_p: -1/2.
        weight_in_n: 1.
        rows: (n, p, seed's change of w, change of β, γ) of every run.
    """

    beta_in_p: Slope
    beta_in_n: Slope
    weight_in_p: Slope
    weight_in_n: Slope
    rows: tuple[tuple[int, int, float, float, float], ...]


@public
def parameter_scaling(
    ns: Sequence[int],
    ps: Sequence[int],
    *,
    ratio: float = 2.0,
    activation: str = "tanh",
    rate: float = 0.5,
    steps: int = 200,
    seeds: Sequence[int],
    inputs: Scale = "scaled",
) -> ParameterScaling:
    """Run every (n, p), d = ratio · n, and fit ``log change = a + s_n log n + s_p log p`` over all runs.

    The bounds of theorem 3.2, ``c1 n√(log p)/(γ√p)`` and ``c2 n/(γ√p)``, have s_p = -1/2 and s_n = 1 after γ and
    √(log p) are taken out. The p exponent is what happens, but for one thing: a maximum over p neurons
    grows like √(log p) until ψ saturates, which lifts the exponent of β by some 1/(2 log p), 0.07 at p = 1000. The n
    exponent is an upper bound, since |Σ_t e(t)| is nearer √n than n.

    Args:
        ns: Points, at least two values.
        ps: Widths, at least two values.
        ratio: d/n: fixed, so that γ hardly depends on n.
        activation: A name of ``ACTIVATIONS``.
        rate: η.
        steps: Steps of each run.
        seeds: Draws of each (n, p).
        inputs: Distribution of the inputs.

    Raises:
        ValueError: fewer than two sample sizes or widths, a width below 2, or runs that stand still or diverge.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), theorem 3.2, equation 3.2.
    """
    if len(set(ns)) < 2 or len(set(ps)) < 2:
        raise ValueError(f"exponents need at least two sample sizes and two widths, got {list(ns)} and {list(ps)}")
    if min(ps) < 2 or steps < 1 or not 0 < ratio < 1e9:
        raise ValueError(f"widths are {list(ps)}, steps {steps} and ratio {ratio}: expected 2, 1 and above 0 at least")
    rows = []
    for n in ns:
        for p in ps:
            start = draw(seeds, n=n, d=round(ratio * n), p=p, activation=activation, inputs=inputs)
            gamma = spectrum(limiting_kernel(start.X, activation_named(activation)))[0]
            engine = Dual(start, activation=activation, rate=rate)
            values = simulate(engine, spaced(steps, 12)).values
            weight, beta = (values[name][:, 0].amax(-1) for name in ("weight_change", "beta_change"))
            rows += [(n, p, *numbers) for numbers in torch.stack([weight, beta, gamma], 1).tolist()]
    table = np.array(rows)
    if not (table > 0).all() or not np.isfinite(table).all():
        raise ValueError(f"a run with rate={rate} did not move or diverged: exponents need a rate of another size")
    design = np.column_stack([np.ones(len(rows)), np.log(table[:, 0]), np.log(table[:, 1])])
    # The bound on w_r has √(log p) beside its power of p: it is divided out.
    weight_n, weight_p = _slopes(design, np.log(table[:, 2] * table[:, 4]) - np.log(np.log(table[:, 1])) / 2)
    beta_n, beta_p = _slopes(design, np.log(table[:, 3] * table[:, 4]))
    return ParameterScaling(
        beta_in_p=beta_p, beta_in_n=beta_n, weight_in_p=weight_p, weight_in_n=weight_n, rows=tuple(rows)
    )


@public
def log_log_slope(x: Sequence[int] | Sequence[float], y: Sequence[float]) -> Slope:
    """The exponent of ``y ∝ xˢ`` by least squares on logarithms.

    Raises:
        ValueError: there are not as many x as y, two different x at least, or a number is not positive.
    """
    if len(x) != len(y) or len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"x has {len(x)} numbers and y {len(y)}, expected as many, positive, and two different x")
    return _slopes(np.column_stack([np.ones(len(x)), [log(value) for value in x]]), np.log(np.array(y)))[0]


def _slopes(design: np.ndarray, target: np.ndarray) -> list[Slope]:
    """Least squares with an intercept first; the other coefficients and their standard errors."""
    solution, *_ = np.linalg.lstsq(design, target, rcond=None)
    rest = target - design @ solution
    freedom = max(1, len(target) - design.shape[1])
    covariance = float(rest @ rest) / freedom * np.linalg.inv(design.T @ design)
    return [Slope(value=float(solution[k]), error=sqrt(float(covariance[k, k]))) for k in range(1, design.shape[1])]
