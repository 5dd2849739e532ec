"""Checks of the law and of its consequences on a trajectory: alignment that lasts, the equilibrium of weight decay."""

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
def conservation(trajectory: Trajectory, tolerance: float | None = None) -> TheoremCheck:
    """Check ``max_k |C_k(t) - C_k(0) - expected_k(t)| ≤ tolerance · max_k,t (|P_k| + |V_k|)`` at every recorded time.

    The expected change is that of the exact identity: ``½ Σ η² |ĝ_k|²`` in steps, 0 in flow, and what decay and
    moving feedback add. ``series["drift"]`` is the largest |C(t) - C(0)| itself.

    Args:
        trajectory: With ``incoming``, ``alignment_term``, ``invariant`` and ``expected_change`` recorded.
        tolerance: None is 1e-10 for steps, and 1e-6 for flow, whose integration has an error of its own.

    Raises:
        ValueError: the tolerance is not positive.

    Source: derived; the law of Robertson and Koyejo 2024 (ICML) in continuous time.
    """
    tolerance = (1e-10 if trajectory.rate else 1e-6) if tolerance is None else positive("tolerance", tolerance)
    drift = trajectory["invariant"] - trajectory["invariant"][:, :1]
    scale = (trajectory["incoming"].abs() + trajectory["alignment_term"].abs()).flatten(1).amax(1)
    residual = (drift - trajectory["expected_change"]).abs().amax(-1)
    return TheoremCheck(
        name="Conservation law",
        source=_SOURCE,
        reading=f"{trajectory.dynamics.rule.name}; C = ½|w|² + ½b² - V less its expected change, in tolerances",
        assumptions=(homogeneous_activation(trajectory),),
        bound=torch.ones_like(residual),
        measured=residual / (tolerance * scale)[:, None],
        scale=torch.ones_like(scale),
        constants={"relative residual": float((residual / scale[:, None]).max())},
        series={"drift": drift.abs().amax(-1)},
    )


@recording
def alignment_bound(trajectory: Trajectory) -> TheoremCheck:
    """Check ``V_k(t) ≥ (r_{l+1}/r_l) (-C_k(0) - expected_k(t))`` for every neuron: alignment from initial values alone.

    For fa in flow without decay, ``⟨B, w_out⟩ ≥ -C_k(0)``; in steps ``-C_k(0) - ½ Σ η² |ĝ_k|²``. That follows from the
    law as ``½ |w_in|²`` cannot be negative. The series are, at each time, of the neuron with the least margin.

    Args:
        trajectory: With ``alignment_term``, ``invariant`` and ``expected_change`` recorded.

    Source: derived from the law.
    """
    ratio = rate_ratio(trajectory.start, trajectory.dynamics)
    bound = -(trajectory["invariant"][:, :1] + trajectory["expected_change"]) / ratio
    return _worst_neuron(
        "Alignment lower bound",
        trajectory,
        bound,
        trajectory["alignment_term"],
        "V_k ≥ -(C_k(0) + expected change), the worst neuron",
    )


@recording
def lasting_alignment(trajectory: Trajectory) -> TheoremCheck:
    """Check that neurons with C_k(0) ≤ 0 stay aligned: ``V_k(t) ≥ (r_{l+1}/r_l) (½ |w_k|² + ½ b_k² - expected_k(t))``.

    In gradient flow without decay the expected change is 0. With decay λ, the same everywhere, it is negative: C_k
    stays below 0 all the more. In steps it is ``½ Σ η² |ĝ_k|²``, so neurons with a margin ``-C_k(0)`` above that
    keep the bound without it; their share is ``constants["share with a margin"]``.

    Args:
        trajectory: With ``incoming``, ``alignment_term``, ``invariant`` and ``expected_change`` recorded.

    Raises:
        ValueError: no neuron of a run is aligned for ever.

    Source: derived from the law.
    """
    initial = trajectory["invariant"][:, 0]
    aligned = initial <= 0
    if not aligned.any(-1).all():
        raise ValueError("a run has no neuron with C(0) ≤ 0, so nothing lasts: start from dominant(state, dynamics)")
    rise = trajectory["expected_change"].clamp(min=0)
    bound = (trajectory["incoming"] - rise) / rate_ratio(trajectory.start, trajectory.dynamics)
    margin = torch.where(aligned[:, None], trajectory["alignment_term"] - bound, inf)
    kept = (trajectory["expected_change"].amax(1) <= -initial)[aligned]
    return _worst_neuron(
        "Lasting alignment",
        trajectory,
        bound,
        bound + margin,
        "neurons with C_k(0) ≤ 0: V_k ≥ ½|w|² + ½b² less what steps gain, the worst neuron",
        {"share aligned for ever": float(aligned.double().mean()), "share with a margin": float(kept.double().mean())},
    )


@recording
def decay_equilibrium(trajectory: Trajectory, tolerance: float = 1e-3, still: float = 1e-3) -> TheoremCheck:
    """Check ``⟨B, w_out⟩ = |w_in|² + b²`` per neuron at the end of a run with the same decay λ everywhere.

    ``Ċ = -λ (|w|² + b² - ⟨B, w_out⟩)`` is 0 where C is at rest, so every neuron ends with non-negative alignment. Steps
    add ½ η |velocity|² to Ċ: nothing at a fixed point, but relus that are pushed back to their kink from both sides
    keep a velocity, and the difference is then O(η).

    Args:
        trajectory: Of fa, C at rest between the last two recorded times, with ``incoming``, ``invariant`` and
            ``alignment`` recorded.
        tolerance: Largest difference allowed, as a share of the largest ``|w_in|² + b²`` of the run.
        still: Largest |ΔC| between those two times that counts as rest, as a share of λΔt times the same.

    Raises:
        ValueError: only one time was recorded, or a tolerance is not positive.

    Source: derived from the law.
    """
    if len(trajectory.times) < 2:
        raise ValueError(f"{len(trajectory.times)} time was recorded: rest is seen between the last two")
    tolerance, still = positive("tolerance", tolerance), positive("still", still)
    rates, decays = trajectory.dynamics.of_layers(trajectory.start)
    square, aligned = 2 * trajectory["incoming"][:, -1], trajectory["alignment"][:, -1]
    scale = square.amax(-1)
    change = (trajectory["invariant"][:, -1] - trajectory["invariant"][:, -2]).abs().amax(-1) / scale
    decay, span = min(decays), float(trajectory.times[-1] - trajectory.times[-2])
    moved = float(change.max()) / max(decay * span, 1e-300)  # without decay there is no rest: a huge number
    fixed = trajectory.dynamics.rule.name in ("fa", "dfa")
    return TheoremCheck(
        name="Equilibrium of decay",
        source=_SOURCE,
        reading="largest difference over the neurons, in units of the largest |w_in|² + b²",
        assumptions=(
            homogeneous_activation(trajectory),
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
    trajectory: Trajectory,
    bound: Float[Tensor, "runs times neurons"],
    measured: Float[Tensor, "runs times neurons"],
    reading: str,
    constants: dict[str, float] | None = None,
) -> TheoremCheck:
    """Make a check of a bound on every neuron that shows, at each time, the neuron nearest to its bound."""
    worst = (measured - bound).argmin(-1, keepdim=True)
    return TheoremCheck(
        name=name,
        source=_SOURCE,
        reading=f"{trajectory.dynamics.rule.name}; {reading}",
        assumptions=(homogeneous_activation(trajectory),),
        bound=bound.gather(-1, worst).squeeze(-1),
        measured=measured.gather(-1, worst).squeeze(-1),
        relation="at least",
        scale=_allowance(trajectory) * torch.where(measured.isfinite(), measured.abs(), 0.0).flatten(1).amax(1),
        constants=constants or {},
    )


def _allowance(trajectory: Trajectory) -> float:
    """Factor by which rounding over many steps, or the error of integration, exceeds the rounding of one number."""
    return 1e2 if trajectory.rate else 1e6


def homogeneous_activation(trajectory: Trajectory) -> Assumption:
    """Measure on a grid around 0 whether ``φ(z) = φ'(z) z``, without which there is no law."""
    z = torch.linspace(-3, 3, 61, dtype=torch.float64)
    activation = trajectory.dynamics.activation
    error = float((activation.value(z) - activation.slope(z) * z).abs().max())
    return Assumption(
        name="activation",
        statement=f"φ(z) = φ'(z) z for {activation.name}",
        measured=error,
        needed=1e-12,
        holds=error <= 1e-12,
    )
