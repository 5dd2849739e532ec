"""Where scalar modes end, how fast at last, and how long it takes from zero weights: statements tried on courses."""

import torch
from torch import Tensor

from falign.theory.deep_linear.courses import ModeCourse
from falign.theory.deep_linear.learning import depth_slope, learning_time
from falign.theory.deep_linear.limits import asymptotic_rate
from falign.theory.deep_linear.modes import Rule, modes
from falign.theory.deep_linear.stability import sufficient_rate
from falign.theory.deep_linear.theorems import SOURCE, rows, scale_of
from falign.theory.door import recording
from falign.theory.inputs import Numbers, positive, squarable
from falign.theory.statement import Assumption, TheoremCheck

_ZERO = 1e-300
"""In the place of zero where something is divided by it."""


@recording
def zero_loss(course: ModeCourse, tolerance: float = 1e-6) -> TheoremCheck:
    """Check that a mode ends without error: ``|e| ≤ tolerance λ`` at the end of a flow, or of steps, long enough.

    Under fa and dfa, at any depth and from any start: ``θ_1' = c_1 e`` with c_1 constant, so all fixed points have no
    error; e keeps its sign, so θ_1 is monotone; and e, a polynomial in θ_1 of odd degree whose sign at infinity drives
    θ_1 back, keeps it bounded. Gradient descent has saddles instead.

    Steps follow if ``η ≤ 1/ρ_max``, the ``sufficient_rate``, from any start: also of zero, negative and anti-aligned
    weights, where ``exponential_convergence`` says nothing. That this suffices is an observation (no exception in
    random draws), not a theorem; so is what is long enough, twice the time that flow would need from the middle record.

    Args:
        course: Of gradient flow or of steps.
        tolerance: Share of λ.

    Raises:
        ValueError: the tolerance is not between 0 and 1.

    Source: derived, after Girotti, Mitliagkas and Gidel 2021.
    """
    rule, needed = course.modes.rule, learning_time(course.modes, tolerance).flatten()
    if course.rate:  # its invariants drift: the flow that it is near is that of the middle
        middle = len(course.times) // 2
        known = course.weights[middle].isfinite().all(0)
        left = learning_time(course.modes.at(course.weights[middle].where(known, 0.0)), tolerance)
        needed = (course.times[middle] + 2 * left.where(known, torch.inf)).flatten()
    rates = torch.stack([course.at(place).decay_rate for place in range(len(course.times))])
    later = rows(rates)[course.times >= needed[:, None]]
    least = float(later.min()) if len(later) else 0.0
    error, λ = rows(course.error).abs()[:, -1:], course.modes.target.flatten()
    share = float((course.rate / sufficient_rate(course.modes)).max()) if course.rate else 0.0
    end, longest = float(course.times[-1]), float(needed.max())
    return TheoremCheck(
        name="Zero loss",
        source=SOURCE,
        reading=f"{rule}, depth {course.modes.depth}; the last record",
        assumptions=(
            Assumption(
                name="fixed carrier",
                statement="fa or dfa",
                measured=float(rule != "bp"),
                needed=1.0,
                holds=rule != "bp",
            ),
            Assumption(
                name="step size", statement="η ρ_max ≤ 1, 0 in flow", measured=share, needed=1.0, holds=share <= 1
            ),
            Assumption(
                name="long enough",
                statement="time to |e| ≤ tolerance λ in flow; of steps twice that from the middle record",
                measured=longest,
                needed=end,
                holds=longest <= end,
            ),
            Assumption(
                name="falling", statement="ρ ≥ 0 from then on", measured=least, needed=0.0, holds=bool(least >= 0)
            ),
        ),
        bound=tolerance * λ[:, None],
        measured=error,
        scale=scale_of(course),
    )


@recording
def asymptotic_decay(course: ModeCourse, tolerance: float = 0.01) -> TheoremCheck:
    """Check ``-ln|e(t₂)/e(t₁)|/(t₂ - t₁) = ρ* (1 ± tolerance)`` between the last two records.

    ``e' = -ρe`` and ρ → ρ*; in steps ``e⁺/e → 1 - ηρ*``, so that the rate is ``-ln(1 - ηρ*)/η``.

    Args:
        course: Its last two records where ρ is within the tolerance of ρ*, ``|e|`` above 1e-9 of
            ``max(λ, |e(0)|)``.
        tolerance: Relative.

    Raises:
        ValueError: fewer than two times were recorded, or the tolerance is not positive.

    Source: derived.
    """
    positive("tolerance", tolerance)
    if len(course.times) < 2:
        raise ValueError(f"{len(course.times)} time was recorded: a rate is seen between two")
    final = asymptotic_rate(course.modes).flatten()
    expected = _seen(final, course.rate)
    error = rows(course.error).abs()[:, -2:].clamp_min(_ZERO)
    seen = -error.log().diff(dim=1) / (course.times[-1] - course.times[-2])
    relative = error / scale_of(course)[:, None]
    rates = torch.stack([course.at(place).decay_rate.flatten() for place in (-2, -1)])
    near = float((_seen(rates, course.rate) / expected.clamp_min(_ZERO) - 1).abs().max())
    resolved = float(relative[:, 1].min())
    return TheoremCheck(
        name="Asymptotic rate",
        source=SOURCE,
        reading="relative difference between the last two records",
        assumptions=(
            Assumption(
                name="hyperbolic",
                statement="ρ* > 0: not where two fixed points meet",
                measured=float(final.min()),
                needed=0.0,
                holds=float(final.min()) > 0,
            ),
            Assumption(
                name="near the end",
                statement="ρ of the last two records gives the rate of ρ*, to the tolerance",
                measured=near,
                needed=tolerance,
                holds=near <= tolerance,
            ),
            Assumption(
                name="resolved",
                statement="|e| ≥ 1e-9 max(λ, |e(0)|)",
                measured=resolved,
                needed=1e-9,
                holds=resolved >= 1e-9,
            ),
        ),
        bound=torch.full_like(seen, tolerance),
        measured=(seen / expected.clamp_min(_ZERO)[:, None] - 1).abs(),
        scale=torch.ones_like(final),
    )


def _seen(ρ: Tensor, rate: float) -> Tensor:
    """At what rate the error falls: ρ in flow, ``-ln(1 - ηρ)/η`` in steps."""
    return ρ if rate == 0 else -torch.log1p(-(rate * ρ).clamp(max=1 - 1e-12)) / rate


@recording
def learning_time_law(
    depth: int, targets: Numbers, *, rule: Rule = "fa", feedback: float = 1.0, tolerance: float = 1e-6
) -> TheoremCheck:
    """Check ``t(λ) = t(1) λ^(-(2^L - 2)/(2^L - 1))`` for the learning time from zero weights, to a relative tolerance.

    ``θ_l ∝ θ_1^(2^(l-1))``, the product ``p = a θ_1^(2^L - 1)``: with ``θ_1 = λ^(1/(2^L - 1)) u`` the equation
    ``θ_1' = c_1 (λ - p)`` has λ only in its time.

    Args:
        depth: L.
        targets: λ > 0 of each mode.
        rule: fa or dfa; from zero weights gradient descent never starts.
        feedback: m of all layers.
        tolerance: Relative.

    Raises:
        ValueError: a λ is out of range, or there are fewer than two layers.

    Source: derived, after Girotti, Mitliagkas and Gidel 2021.
    """
    slope = depth_slope(depth)
    chains = modes(targets, [0.0] * depth, feedback=feedback, rule=rule)
    λ = chains.target.flatten()
    if not len(λ):
        raise ValueError("targets are empty, expected a λ at least")
    if not (λ > 0).all():
        raise ValueError(f"λ is {float(λ.min()):g}, expected above 0: a mode without target is never learned")
    squarable("λ", λ)
    one = learning_time(modes(1.0, [0.0] * depth, feedback=feedback, rule=rule))
    found = learning_time(chains).flatten() / (one * λ**slope)
    finite = bool(one.isfinite().all() and found.isfinite().all())
    return TheoremCheck(
        name="Learning-time law",
        source=SOURCE,
        reading=f"{rule}, depth {depth}, from zero weights",
        assumptions=(Assumption(name="it learns", statement="t(1) finite", measured=float(one), holds=finite),),
        bound=torch.full_like(λ, positive("tolerance", tolerance))[:, None],
        measured=(found - 1).abs()[:, None],
        scale=torch.ones_like(λ),
        constants={"slope": slope},
    )
