"""Theorems 3.2 and 4.2: the error falls geometrically, without and with a summable ridge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import check_steps
from falign.theory._coerce import typed
from falign.theory._simulate import judged, record, warn_of_divergence
from falign.theory.statement import Assumption, TheoremCheck
from falign.theory.two_layer._activations import activation as activation_named
from falign.theory.two_layer._dual import Dual
from falign.theory.two_layer._schedules import Penalty
from falign.theory.two_layer._start import Start
from falign.theory.two_layer._trajectory import Engine
from falign.theory.two_layer._width_free import Gram, WidthFree
from falign.theory.two_layer.kernels import limiting_kernel
from falign.theory.two_layer.theorems import _conditions

# Runs followed step by step: the norms that the theorems bound.

_FARTHEST = {"weight_change", "beta_change", "cosine"}


@dataclass(frozen=True, kw_only=True)
class _ErrorTrajectory:
    """The errors of a block of runs at every step; a run is a seed with a penalty, those of one seed side by side.

    Attributes:
        error: |e(0)|, …, |e(steps)| [runs times].
        y: |y| [runs].
        strengths: λ(0), …, λ(steps - 1) [runs steps].
        farthest: name -> its largest value [runs] at the steps measured: of |cosine|, and of ``weight_change`` and
            ``beta_change`` where the engine knows them.
    """

    error: Float[Tensor, "runs times"]
    y: Float[Tensor, " runs"]
    strengths: Float[Tensor, "runs steps"]
    farthest: Mapping[str, Float[Tensor, " runs"]]


def follow(
    engine: Engine, *, penalties: Sequence[Penalty], y: Float[Tensor, " seeds"], steps: int, measurements: int = 20
) -> _ErrorTrajectory:
    """Run ``steps`` steps, with |e| at each and what else there is at about ``measurements`` of them.

    Args:
        engine: At its start.
        penalties: Those that it was made with.
        y: |y| of each seed.
        steps: How many.
        measurements: How often the changes of the weights are looked at.

    Raises:
        ValueError: fewer than one step, or an engine that does not run in float64, whose rounding the bounds allow for.
    """
    check_steps(steps)
    if steps < 1:
        raise ValueError(f"a bound on a step needs at least one step, got {steps}")
    if engine.error().dtype != torch.float64:
        raise ValueError(f"theorems are checked in float64, got {engine.error().dtype}: draw the start in float64")
    every = max(1, steps // measurements)
    farthest: dict[str, Tensor] = {}

    def measure() -> dict[str, Tensor]:
        if engine.t and (engine.t % every == 0 or engine.t == steps):
            measured = engine.measure()
            for name in _FARTHEST & measured.keys():
                now = measured[name].abs()
                farthest[name] = torch.maximum(farthest.get(name, now), now)
        return {"error": engine.error().norm(dim=-1)}

    error = record(range(steps + 1), engine.advance, measure, axis=-1)["error"]
    found = judged({"error": error}, range(steps + 1), axes=2)
    warn_of_divergence(found["diverged"], found["lost"])
    strengths = torch.stack([penalty.values(steps) for penalty in penalties]).to(error)
    return _ErrorTrajectory(
        error=found["values"]["error"].flatten(0, 1),
        y=y.repeat_interleave(len(penalties)),
        strengths=strengths.repeat(len(y), 1),
        farthest={name: value.flatten() for name, value in farthest.items()},
    )


def _step_bound(
    trajectory: _ErrorTrajectory, gamma: Float[Tensor, " runs"], *, rate: float, share: float, pull: float
) -> Float[Tensor, "runs steps"]:
    """``(1 - η·share·γ - ηλ(t)) |e(t)| + pull·λ(t) |y|``: what theorems 3.2, 4.2 and 4.3 allow |e(t+1)| to be."""
    keep = 1 - rate * share * gamma[:, None] - rate * trajectory.strengths
    return keep * trajectory.error[:, :-1] + pull * trajectory.strengths * trajectory.y[:, None]


_PAPER = "Song, Xu and Lafferty 2021 (NeurIPS)"


@typed
def theorem_3_2(
    start: Start, *, activation: str, rate: float, steps: int, gamma: float | None = None, delta: float = 0.1
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
    _conditions.check_levels(delta=delta, gamma=gamma, sum_constant=sum_constant)
    seeds, p, _ = start.W.shape
    n = start.X.shape[-2]
    kernel = limiting_kernel(start.X, activation_named(activation)).expand(seeds, n, n)
    smallest, largest = (value.repeat_interleave(len(penalties)) for value in _conditions.spectrum(kernel))
    used = smallest.clamp(min=0) if gamma is None else torch.full_like(smallest, gamma)
    engine = Dual(start, activation=activation, rate=rate, penalties=penalties)
    trajectory = follow(engine, penalties=penalties, y=start.y.norm(dim=-1).expand(seeds), steps=steps)
    least = float(used.min())
    assumptions: list[Assumption] = [
        _conditions.positive_smallest("assumption 3.1", "λ_min(Ḡ) ≥ γ > 0", smallest, largest, gamma),
        _conditions.bounded_activation(activation_named(activation)),
        *_conditions.bounded_data(start),
        _conditions.gaussian_start(start),
        *_conditions.wide_enough(p, n, least, delta),
        _conditions.step_size(rate, largest, used, 0.25, float(trajectory.strengths.max())),
    ]
    ridge = name == "Theorem 4.2"
    if ridge:
        statement = "Σλ(t) ≤ c̃_S γ²√p/(ηn²√(log p))"
        at_one = least**2 * sqrt(p) / (rate * n**2 * sqrt(log(max(p, 2))))
        total = max(penalty.total() for penalty in penalties)
        assumptions.append(_conditions.penalty_sum(statement, total, at_one, sum_constant))
    bound = _step_bound(trajectory, used, rate=rate, share=0.25, pull=1.0)
    sharper = {"bound of a gradient step": _step_bound(trajectory, used, rate=rate, share=0.25, pull=rate)}
    return TheoremCheck(
        name=name,
        source=f"{_PAPER}, {name[0].lower()}{name[1:]}",
        reading="β ← (1 - ηλ(t))β + …; γ = λ_min(Ḡ) of the run" if gamma is None else f"γ = {gamma:g} as given",
        assumptions=tuple(assumptions),
        bound=bound,
        measured=trajectory.error[:, 1:],
        scale=trajectory.y,
        share_needed=1 - delta,
        constants=_constants(trajectory, used, smallest, largest, rate=rate, p=p, n=n),
        series=sharper if ridge else {},
    )


def _constants(
    trajectory: _ErrorTrajectory,
    gamma: torch.Tensor,
    smallest: torch.Tensor,
    largest: torch.Tensor,
    *,
    rate: float,
    p: int,
    n: int,
) -> dict[str, float]:
    """The numbers that the theorem speaks of, the worst of the runs where it bounds them."""
    before, after = trajectory.error[:, :-1], trajectory.error[:, 1:]
    seen = before > 1e-9 * trajectory.y[:, None]
    shares = torch.where(seen, (1 - after / before) / (rate * gamma[:, None]), torch.inf)
    unit = gamma * sqrt(p) / n
    return {
        "lambda_min": float(smallest.min()),
        "lambda_max": float(largest.max()),
        **({} if trajectory.strengths.any() else {"share of gamma": float(shares.min())}),
        "rate": float(((trajectory.error[:, -1] / trajectory.error[:, 0]) ** (1 / after.shape[1])).max()),
        "rate allowed": float((1 - rate * gamma / 4).max()),
        "c1": float((trajectory.farthest["weight_change"] * unit).max()) / sqrt(log(max(p, 2))),
        "c2": float((trajectory.farthest["beta_change"] * unit).max()),
        "cosine": float(trajectory.farthest["cosine"].max()),
    }


# Theorem 4.3: the error of a linear network with a summable ridge.


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
        gram: Initial draw and data, as ``gram`` of ``WidthFree.from_start(…)`` or of ``WidthFree.sample(…)``.
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
    _conditions.check_levels(delta=delta, gamma=gamma, largest=largest, sum_constant=sum_constant, d=d)
    gram, n, smallest, top = on_subspace(gram) if on_column_space else _whole(gram)
    runs = len(penalties)
    used = smallest if gamma is None else torch.full_like(smallest, gamma)
    M = float(top.max()) if largest is None else largest
    p, least = float(gram.p.min()), float(used.min())
    norm = (gram.y.square().sum(-1) + gram.rest.square().sum(-1)).sqrt()
    engine = WidthFree(gram, rate=rate, penalties=penalties)
    trajectory = follow(engine, penalties=penalties, y=norm, steps=steps)
    gammas = used.repeat_interleave(runs)
    statement = "Σλ(t) ≤ S_λ = c_S γ√(γp)/(η√n M)"
    total = max(penalty.total() for penalty in penalties)
    assumptions: tuple[Assumption, ...] = (
        _conditions.positive_smallest("full rank", "λ_min(XXᵀ) ≥ γ > 0", smallest, top, gamma),
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
        _conditions.step_size(rate, top.repeat_interleave(runs), gammas, 0.5, float(trajectory.strengths.max())),
        _conditions.penalty_sum(statement, total, penalty_limit(least, M, p=p, n=n, rate=rate), sum_constant),
    )
    return TheoremCheck(
        name="Theorem 4.3",
        source="Song, Xu and Lafferty 2021 (NeurIPS), theorem 4.3",
        reading="β ← (1 - ηλ(t))β + …" + ("; y projected, the non-zero eigenvalues" if on_column_space else ""),
        assumptions=assumptions,
        bound=_step_bound(trajectory, gammas, rate=rate, share=0.5, pull=1.0),
        measured=trajectory.error[:, 1:],
        scale=trajectory.y,
        share_needed=1 - delta,
        constants={"gamma": least, "M": M, "cosine": float(trajectory.farthest["cosine"].max())},
        series={"bound of a gradient step": _step_bound(trajectory, gammas, rate=rate, share=0.5, pull=rate)},
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
