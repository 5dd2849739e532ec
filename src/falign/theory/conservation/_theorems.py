"""What follows from the law, tried on a course: conservation, lasting alignment, the equilibrium of decay."""

from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import positive
from falign.theory._coerce import recording
from falign.theory.conservation._law import rate_ratio
from falign.theory.conservation._simulate import Trajectory
from falign.theory.statement import Assumption, TheoremCheck

_SOURCE = "derived; after Robertson and Koyejo 2024 (ICML)"


@recording
def conservation(course: Trajectory, tolerance: float | None = None) -> TheoremCheck:
    """Check ``max_k |C_k(t) - C_k(0) - expected_k(t)| ≤ tolerance · max_k,t (|P_k| + |V_k|)`` at every recorded time.

    The expected change is that of the exact identity: ``½ Σ η² |ĝ_k|²`` in steps, 0 in flow, and what decay and
    moving feedback add. ``series["drift"]`` is the largest |C(t) - C(0)| itself.

    Args:
        course: With ``incoming``, ``alignment_term``, ``invariant`` and ``expected_change`` recorded.
        tolerance: None for 1e-10 in steps and 1e-6 in flow, whose integration has an error of its own.

    Raises:
        ValueError: the tolerance is not positive.

    Source: derived; the law of Robertson and Koyejo 2024 (ICML) in continuous time.
    """
    tolerance = (1e-10 if course.rate else 1e-6) if tolerance is None else positive("tolerance", tolerance)
    drift = course["invariant"] - course["invariant"][:, :1]
    scale = (course["incoming"].abs() + course["alignment_term"].abs()).flatten(1).amax(1)
    residual = (drift - course["expected_change"]).abs().amax(-1)
    return TheoremCheck(
        name="Conservation law",
        source=_SOURCE,
        reading=f"{course.dynamics.rule.name}; C = ½|w|² + ½b² - V less its expected change; in units of the tolerance",
        assumptions=(homogeneous_activation(course),),
        bound=torch.ones_like(residual),
        measured=residual / (tolerance * scale)[:, None],
        scale=torch.ones_like(scale),
        constants={"relative residual": float((residual / scale[:, None]).max())},
        series={"drift": drift.abs().amax(-1)},
    )


@recording
def alignment_bound(course: Trajectory) -> TheoremCheck:
    """Check ``V_k(t) ≥ (r_{l+1}/r_l) (-C_k(0) - expected_k(t))`` for every neuron: alignment from initial values alone.

    For fa in flow without decay, ``⟨B, w_out⟩ ≥ -C_k(0)``; in steps ``-C_k(0) - ½ Σ η² |ĝ_k|²``. It is what is left
    of the law when the growth of ``½ |w_in|²`` is not known. The series are of the neuron with the least margin.

    Args:
        course: With ``alignment_term``, ``invariant`` and ``expected_change`` recorded.

    Source: derived from the law.
    """
    ratio = rate_ratio(course.start, course.dynamics)
    bound = -(course["invariant"][:, :1] + course["expected_change"]) / ratio
    return _worst_neuron(
        "Alignment lower bound",
        course,
        bound,
        course["alignment_term"],
        "V_k ≥ -(C_k(0) + expected change), the worst neuron",
    )


@recording
def lasting_alignment(course: Trajectory) -> TheoremCheck:
    """Check that neurons with C_k(0) ≤ 0 stay aligned: ``V_k(t) ≥ (r_{l+1}/r_l) (½ |w_k|² + ½ b_k² - expected_k(t))``.

    In gradient flow without decay the expected change is 0. With decay λ, the same everywhere, it is negative: C_k
    stays below 0 all the more. In steps it is ``½ Σ η² |ĝ_k|²``, so neurons with a margin ``-C_k(0)`` above that
    keep the bound without it; their share is ``constants["share with a margin"]``.

    Args:
        course: With ``incoming``, ``alignment_term``, ``invariant`` and ``expected_change`` recorded.

    Raises:
        ValueError: no neuron of a run is aligned for ever.

    Source: derived from the law.
    """
    initial = course["invariant"][:, 0]
    aligned = initial <= 0
    if not aligned.any(-1).all():
        raise ValueError("a run has no neuron with C(0) ≤ 0, so nothing lasts: start from dominant(state, dynamics)")
    gained = course["expected_change"].clamp(min=0)
    bound = (course["incoming"] - gained) / rate_ratio(course.start, course.dynamics)
    margin = torch.where(aligned[:, None], course["alignment_term"] - bound, inf)
    kept = (course["expected_change"].amax(1) <= -initial)[aligned]
    return _worst_neuron(
        "Lasting alignment",
        course,
        bound,
        bound + margin,
        "neurons with C_k(0) ≤ 0: V_k ≥ ½|w|² + ½b² less what steps gain, the worst neuron",
        {"share aligned for ever": float(aligned.double().mean()), "share with a margin": float(kept.double().mean())},
    )


@recording
def decay_equilibrium(course: Trajectory, tolerance: float = 1e-3, still: float = 1e-3) -> TheoremCheck:
    """Check ``⟨B, w_out⟩ = |w_in|² + b²`` per neuron at the end of a run with the same decay λ everywhere.

    ``Ċ = -λ (|w|² + b² - ⟨B, w_out⟩)`` vanishes where C rests, so every neuron ends with non-negative alignment. Steps
    add ½ η |velocity|² to Ċ: nothing at a fixed point, but relus that are pushed back to their kink from both sides
    keep a velocity, and the difference is then O(η).

    Args:
        course: Of fa, C at rest between the last two recorded times, with ``incoming``, ``invariant`` and
            ``alignment`` recorded.
        tolerance: What the difference may be of the largest ``|w_in|² + b²`` of the run.
        still: What |ΔC| between those two times may be of λΔt times the same.

    Raises:
        ValueError: one time was recorded only, or a tolerance is not positive.

    Source: derived from the law.
    """
    if len(course.times) < 2:
        raise ValueError(f"{len(course.times)} time was recorded: rest is seen between the last two")
    tolerance, still = positive("tolerance", tolerance), positive("still", still)
    rates, decays = course.dynamics.of_layers(course.start)
    square, aligned = 2 * course["incoming"][:, -1], course["alignment"][:, -1]
    scale = square.amax(-1)
    change = (course["invariant"][:, -1] - course["invariant"][:, -2]).abs().amax(-1) / scale
    decay, span = min(decays), float(course.times[-1] - course.times[-2])
    moved = float(change.max()) / max(decay * span, 1e-300)
    fixed = course.dynamics.rule.name in ("fa", "dfa")
    return TheoremCheck(
        name="Equilibrium of decay",
        source=_SOURCE,
        reading="largest difference over the neurons, in units of the largest |w_in|² + b²",
        assumptions=(
            homogeneous_activation(course),
            Assumption(
                name="one decay",
                statement="λ_l = λ > 0 and the same rate for all layers; measured the smallest λ",
                measured=decay,
                holds=decay > 0 and len(set(decays)) == 1 and len(set(rates)) == 1,
            ),
            Assumption(
                name="fixed feedback", statement="M = B, at rest", measured=float(fixed), needed=1.0, holds=fixed
            ),
            Assumption(
                name="at rest",
                statement="|ΔC| ≤ still · λΔt (|w_in|² + b²)",
                measured=moved,
                needed=still,
                holds=moved <= still,
            ),
        ),
        bound=torch.full_like(scale, tolerance)[:, None],
        measured=((aligned - square).abs().amax(-1) / scale)[:, None],
        scale=torch.ones_like(scale),
        constants={
            "least alignment": float(aligned.min()),
            "alive": float((square > 1e-6 * scale.amax()).double().mean()),
        },
    )


def _worst_neuron(
    name: str,
    course: Trajectory,
    bound: Float[Tensor, "runs times neurons"],
    measured: Float[Tensor, "runs times neurons"],
    reading: str,
    constants: dict[str, float] | None = None,
) -> TheoremCheck:
    """A bound on every neuron, of which the check shows, at each time, the one nearest to it."""
    worst = (measured - bound).argmin(-1, keepdim=True)
    return TheoremCheck(
        name=name,
        source=_SOURCE,
        reading=f"{course.dynamics.rule.name}; {reading}",
        assumptions=(homogeneous_activation(course),),
        bound=bound.gather(-1, worst).squeeze(-1),
        measured=measured.gather(-1, worst).squeeze(-1),
        relation="at least",
        scale=_allowance(course) * torch.where(measured.isfinite(), measured.abs(), 0.0).flatten(1).amax(1),
        constants=constants or {},
    )


def _allowance(course: Trajectory) -> float:
    """How much the rounding of many steps, or the error of an integration, is above the rounding of one number."""
    return 1e2 if course.rate else 1e6


def homogeneous_activation(course: Trajectory) -> Assumption:
    """That ``φ(z) = φ'(z) z``, without which there is no law, on a grid around 0."""
    z = torch.linspace(-3, 3, 61, dtype=torch.float64)
    activation = course.dynamics.activation
    error = float((activation.value(z) - activation.slope(z) * z).abs().max())
    return Assumption(
        name="activation",
        statement=f"φ(z) = φ'(z) z for {activation.name}",
        measured=error,
        needed=1e-12,
        holds=error <= 1e-12,
    )
