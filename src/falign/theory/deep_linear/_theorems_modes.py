"""Statements about scalar modes, checked on trajectories: convergence at a guaranteed rate, and its identities."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import Numbers, check_squarable, positive
from falign.theory._coerce import recording
from falign.theory.deep_linear._flow import asymptotic_rate, guaranteed_rate
from falign.theory.deep_linear._learning import depth_slope, learning_time
from falign.theory.deep_linear._modes import Rule, modes
from falign.theory.deep_linear._steps import ModeTrajectory, sufficient_rate
from falign.theory.statement import Assumption, TheoremCheck

SOURCE = "derived, after Girotti, Mitliagkas and Gidel 2021"


@recording
def exponential_convergence(trajectory: ModeTrajectory) -> TheoremCheck:
    """Check ``|e(t)| ≤ |e(0)| exp(-r t)``, r the ``guaranteed_rate`` of the start; in steps ``|e(0)| (1 - ηr)^t``.

    Flow: ``e' = -ρe``, and ``ρ = s Σ_l c_l Π_{j>l} θ_j Π_{j<l} θ_j²``. Of fa and dfa ``c_l Π_{j>l} θ_j`` is the product
    of ``(c_j/c_{j+1}) θ_{j+1} = K_j + θ_j²/2`` from j = l up: no term is negative, the first at least ``s Π K_l``.

    Steps: ``e⁺ = e (1 - η ρ̂)`` with ``ρ̂ = s Σ_l c_l Π_{j>l} θ_j⁺ Π_{j<l} θ_j²`` exactly (the product's change, one
    layer after the other). K_l only falls, so r = ``s Π K_l`` of the last step is below every ρ̂; ``η ρ̂ ≤ 1`` is
    looked at along the path. Of bp r is, over the path, ``s Π (least θ_j² - θ_i²)``, i the layer of the least weight
    at the start, and no weight may change its sign in a step: then ``θ_j θ_j⁺`` is at least the smaller square.

    Args:
        trajectory: Of steps, every one of them recorded.

    Raises:
        ValueError: it is a trajectory of steps of which some were not recorded.

    Source: derived, after Girotti, Mitliagkas and Gidel 2021.
    """
    error = rows(trajectory.error).abs()
    if trajectory.rate == 0:
        rate = guaranteed_rate(trajectory.modes).flatten()
        bound = error[:, :1] * torch.exp(-rate[:, None] * trajectory.times)
        conditions = (_positive_rate(trajectory.modes.rule, rate),)
    else:
        rate, of_steps = _rate_of_path(trajectory).flatten(), rows(step_rates(trajectory))
        steps = torch.arange(len(trajectory.times), device=error.device)
        bound = error[:, :1] * (1 - trajectory.rate * rate[:, None]).clamp(min=0) ** steps
        largest = float(trajectory.rate * of_steps.max())
        conditions = (
            _positive_rate(trajectory.modes.rule, rate),
            Assumption(name="step size", statement="η ρ̂ ≤ 1", measured=largest, needed=1.0, holds=largest <= 1 + 1e-12),
        )
        if trajectory.modes.rule == "bp":
            least = float((trajectory.weights[1:] * trajectory.weights[:-1]).min())
            conditions += (
                Assumption(name="signs", statement="θ θ⁺ ≥ 0", measured=least, needed=0.0, holds=least >= 0),
            )
    return TheoremCheck(
        name="Exponential convergence",
        source=SOURCE,
        reading=f"{trajectory.modes.rule}, depth {trajectory.modes.depth}, " + ("steps" if trajectory.rate else "flow"),
        assumptions=conditions,
        bound=bound,
        measured=error,
        scale=_allowance(trajectory) * _scale_of(trajectory),
        constants={"rate": float(rate.min())},
    )


@recording
def error_recursion(trajectory: ModeTrajectory) -> TheoremCheck:
    """Check ``e⁺ = e (1 - η ρ̂)`` at every step, to 1e-12 of ``max(λ, |e(0)|)``; exact at any rate, depth and rule.

    Of two layers ``ρ̂ = ρ + η s c_1 θ_1 e``.

    Args:
        trajectory: Of steps, every one of them recorded.

    Raises:
        ValueError: it is not.

    Source: derived.
    """
    error, rates = rows(trajectory.error), rows(step_rates(trajectory))
    residual = (error[:, 1:] - error[:, :-1] * (1 - trajectory.rate * rates)).abs()
    tolerance = 1e-12 * _coarseness(residual)
    return identity(
        "Error recursion", trajectory, residual, tolerance * _scale_of(trajectory)[:, None].expand_as(residual)
    )


@recording
def conserved_invariants(trajectory: ModeTrajectory, tolerance: float | None = None) -> TheoremCheck:
    """Check ``K_l(t) = K_l(0) + expected_l(t)``: constant in flow, in steps exactly changed by ``-½ Σ (Δθ_l)²``.

    Flow: ``(c_l/c_{l+1}) θ_{l+1}' = c_l Π_{j≤l} θ_j e = θ_l θ_l'``. Steps: the same, and ``-½ (Δθ_l)²`` of the square.

    Args:
        trajectory: Any.
        tolerance: Of the residual, as a share of the largest ``|K_l| + θ²`` on the way; None for 1e-12 in steps (of
            float64) and 1e-8 in flow, whose integration has an error of its own.

    Raises:
        ValueError: the tolerance is not positive.

    Source: derived.
    """
    invariants = trajectory.invariants
    usual = (1e-12 if trajectory.rate else 1e-8) * _coarseness(invariants)
    tolerance = usual if tolerance is None else positive("tolerance", tolerance)
    residual = rows((invariants - invariants[:1] - trajectory.expected_change).abs().amax(1))
    size = rows(invariants.abs().amax(1) + trajectory.weights.square().amax(1)).amax(1, keepdim=True)
    return identity("Conserved invariants", trajectory, residual, tolerance * size.expand_as(residual))


@recording
def step_rates(trajectory: ModeTrajectory) -> Float[Tensor, "steps *modes"]:
    """``ρ̂ = s Σ_l c_l Π_{j>l} θ_j⁺ Π_{j<l} θ_j²`` of every step: ``e⁺ = e (1 - η ρ̂)`` exactly.

    Raises:
        ValueError: it is a flow, or a trajectory of which steps were left out.
    """
    every = trajectory.rate * torch.arange(len(trajectory.times), dtype=torch.float64)
    if (
        trajectory.rate == 0
        or len(trajectory.times) < 2
        or not torch.allclose(trajectory.times.cpu(), every, rtol=1e-9)
    ):
        raise ValueError("a step's rate is read off both its ends: descend with at=range(steps + 1)")
    before = [trajectory.at(place) for place in range(len(trajectory.times) - 1)]
    after = [trajectory.at(place).above for place in range(1, len(trajectory.times))]
    terms = [here.feedback_factors * here.below.square() * top for here, top in zip(before, after, strict=True)]
    return trajectory.modes.variance * torch.stack(terms).sum(1)


def _rate_of_path(trajectory: ModeTrajectory) -> Float[Tensor, "*modes"]:
    """A lower bound of ρ̂ over all steps of the path."""
    s = trajectory.modes.variance
    if trajectory.modes.rule != "bp":
        last = trajectory.invariants[-1]
        return s * last.prod(0) * (last > 0).all(0)
    squares = trajectory.weights.square()
    least = squares[0].argmin(0, keepdim=True).expand(len(squares), -1, *squares.shape[2:])
    gaps = (squares - squares.gather(1, least)).amin(0).scatter(0, least[0], 1.0)
    return s * gaps.prod(0) * (gaps > 0).all(0)


def _positive_rate(rule: Rule, rate: Tensor) -> Assumption:
    statement = "θ_j² > θ_i² for one layer i and all others" if rule == "bp" else "K_l > 0 for all l"
    least = float(rate.min()) + 0.0  # no -0
    return Assumption(
        name="positive rate", statement=f"r > 0, that is {statement}", measured=least, needed=0.0, holds=least > 0
    )


def identity(name: str, trajectory: ModeTrajectory, residual: Tensor, bound: Tensor) -> TheoremCheck:
    """The check that what should be zero is no more than its bound [runs times]."""
    return TheoremCheck(
        name=name,
        source=SOURCE,
        reading=f"{trajectory.modes.rule}, depth {trajectory.modes.depth}; the residual of an identity",
        assumptions=(),
        bound=bound,
        measured=residual,
        scale=torch.zeros_like(residual[:, 0]),
    )


def rows(values: Float[Tensor, "times *modes"]) -> Float[Tensor, "runs times"]:
    """Reshape to one row a mode."""
    return values.flatten(1).mT if values.ndim > 1 else values[None]


def _scale_of(trajectory: ModeTrajectory) -> Float[Tensor, " runs"]:
    """``max(λ, |e(0)|)``."""
    return torch.maximum(trajectory.modes.target, trajectory.modes.error.abs()).flatten()


def _allowance(trajectory: ModeTrajectory) -> float:
    """Factor by which the rounding of many steps, or the error of an integration, exceeds that of one number."""
    return max(1e2 if trajectory.rate else 1e5, _coarseness(trajectory.weights))


def _coarseness(numbers: Tensor) -> float:
    """Rounding of their type, that of float64 being 1."""
    return torch.finfo(numbers.dtype).eps / torch.finfo(torch.float64).eps


# Limits: where scalar modes end, at what final rate, and how long it takes from zero weights.

_ZERO = 1e-300
"""In the place of zero where something is divided by it."""


@recording
def zero_loss(trajectory: ModeTrajectory, tolerance: float = 1e-6) -> TheoremCheck:
    """Check that a mode ends without error: ``|e| ≤ tolerance λ`` at the end of a flow, or of steps, long enough.

    Under fa and dfa, at any depth and from any start: ``θ_1' = c_1 e`` with c_1 constant, so all fixed points have no
    error; e keeps its sign, so θ_1 is monotone; and e, a polynomial in θ_1 of odd degree whose sign at infinity drives
    θ_1 back, keeps it bounded. Gradient descent has saddles instead.

    Steps follow if ``η ≤ 1/ρ_max``, the ``sufficient_rate``, from any start: also of zero, negative and anti-aligned
    weights, where ``exponential_convergence`` says nothing. That this suffices is an observation (no exception in
    random draws), not a theorem; so is what is long enough, twice the time that flow would need from the middle record.

    Args:
        trajectory: Of gradient flow or of steps.
        tolerance: Share of λ.

    Raises:
        ValueError: the tolerance is not between 0 and 1.

    Source: derived, after Girotti, Mitliagkas and Gidel 2021.
    """
    rule, needed = trajectory.modes.rule, learning_time(trajectory.modes, tolerance).flatten()
    if trajectory.rate:  # its invariants drift: the flow that it is near is that of the middle
        middle = len(trajectory.times) // 2
        known = trajectory.weights[middle].isfinite().all(0)
        left = learning_time(trajectory.modes.at(trajectory.weights[middle].where(known, 0.0)), tolerance)
        needed = (trajectory.times[middle] + 2 * left.where(known, torch.inf)).flatten()
    rates = torch.stack([trajectory.at(place).decay_rate for place in range(len(trajectory.times))])
    later = rows(rates)[trajectory.times >= needed[:, None]]
    least = float(later.min()) if len(later) else 0.0
    error, λ = rows(trajectory.error).abs()[:, -1:], trajectory.modes.target.flatten()
    share = float((trajectory.rate / sufficient_rate(trajectory.modes)).max()) if trajectory.rate else 0.0
    end, longest = float(trajectory.times[-1]), float(needed.max())
    return TheoremCheck(
        name="Zero loss",
        source=SOURCE,
        reading=f"{rule}, depth {trajectory.modes.depth}; the last record",
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
        scale=_scale_of(trajectory),
    )


@recording
def asymptotic_decay(trajectory: ModeTrajectory, tolerance: float = 0.01) -> TheoremCheck:
    """Check ``-ln|e(t₂)/e(t₁)|/(t₂ - t₁) = ρ* (1 ± tolerance)`` between the last two records.

    ``e' = -ρe`` and ρ → ρ*; in steps ``e⁺/e → 1 - ηρ*``, so that the rate is ``-ln(1 - ηρ*)/η``.

    Args:
        trajectory: Its last two records where ρ is within the tolerance of ρ*, ``|e|`` above 1e-9 of
            ``max(λ, |e(0)|)``.
        tolerance: Relative.

    Raises:
        ValueError: fewer than two times were recorded, or the tolerance is not positive.

    Source: derived.
    """
    positive("tolerance", tolerance)
    if len(trajectory.times) < 2:
        raise ValueError(f"{len(trajectory.times)} time was recorded: a rate is seen between two")
    final = asymptotic_rate(trajectory.modes).flatten()
    expected = _seen(final, trajectory.rate)
    error = rows(trajectory.error).abs()[:, -2:].clamp_min(_ZERO)
    seen = -error.log().diff(dim=1) / (trajectory.times[-1] - trajectory.times[-2])
    relative = error / _scale_of(trajectory)[:, None]
    rates = torch.stack([trajectory.at(place).decay_rate.flatten() for place in (-2, -1)])
    near = float((_seen(rates, trajectory.rate) / expected.clamp_min(_ZERO) - 1).abs().max())
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
    """The rate at which the error falls: ρ in flow, ``-ln(1 - ηρ)/η`` in steps."""
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
    check_squarable("λ", λ)
    one = learning_time(modes(1.0, [0.0] * depth, feedback=feedback, rule=rule))
    relative = learning_time(chains).flatten() / (one * λ**slope)
    finite = bool(one.isfinite().all() and relative.isfinite().all())
    return TheoremCheck(
        name="Learning-time law",
        source=SOURCE,
        reading=f"{rule}, depth {depth}, from zero weights",
        assumptions=(Assumption(name="it learns", statement="t(1) finite", measured=float(one), holds=finite),),
        bound=torch.full_like(λ, positive("tolerance", tolerance))[:, None],
        measured=(relative - 1).abs()[:, None],
        scale=torch.ones_like(λ),
        constants={"slope": slope},
    )
