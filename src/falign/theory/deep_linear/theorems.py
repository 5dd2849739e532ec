"""Convergence of scalar modes at a rate that their invariants give, and the identities behind it, tried on courses."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.deep_linear.courses import ModeCourse
from falign.theory.deep_linear.limits import guaranteed_rate
from falign.theory.deep_linear.modes import Rule
from falign.theory.door import recording
from falign.theory.inputs import positive
from falign.theory.statement import Assumption, TheoremCheck

SOURCE = "derived, after Girotti, Mitliagkas and Gidel 2021"


@recording
def exponential_convergence(course: ModeCourse) -> TheoremCheck:
    """Check ``|e(t)| ≤ |e(0)| exp(-r t)``, r the ``guaranteed_rate`` of the start; in steps ``|e(0)| (1 - ηr)^t``.

    Flow: ``e' = -ρe``, and ``ρ = s Σ_l c_l Π_{j>l} θ_j Π_{j<l} θ_j²``. Of fa and dfa ``c_l Π_{j>l} θ_j`` is the product
    of ``(c_j/c_{j+1}) θ_{j+1} = K_j + θ_j²/2`` from j = l up: no term is negative, the first at least ``s Π K_l``.

    Steps: ``e⁺ = e (1 - η ρ̂)`` with ``ρ̂ = s Σ_l c_l Π_{j>l} θ_j⁺ Π_{j<l} θ_j²`` exactly (the product's change, one
    layer after the other). K_l only falls, so r = ``s Π K_l`` of the last step is below every ρ̂; ``η ρ̂ ≤ 1`` is
    looked at along the path. Of bp r is, over the path, ``s Π (least θ_j² - θ_i²)``, i the layer of the least weight
    at the start, and no weight may change its sign in a step: then ``θ_j θ_j⁺`` is at least the smaller square.

    Args:
        course: Of steps, every one of them recorded.

    Raises:
        ValueError: it is a course of steps of which some were not recorded.

    Source: derived, after Girotti, Mitliagkas and Gidel 2021.
    """
    error = rows(course.error).abs()
    if course.rate == 0:
        rate = guaranteed_rate(course.modes).flatten()
        bound = error[:, :1] * torch.exp(-rate[:, None] * course.times)
        conditions = (_positive_rate(course.modes.rule, rate),)
    else:
        rate, of_steps = _rate_of_path(course).flatten(), rows(step_rates(course))
        steps = torch.arange(len(course.times), device=error.device)
        bound = error[:, :1] * (1 - course.rate * rate[:, None]).clamp(min=0) ** steps
        largest = float(course.rate * of_steps.max())
        conditions = (
            _positive_rate(course.modes.rule, rate),
            Assumption(name="step size", statement="η ρ̂ ≤ 1", measured=largest, needed=1.0, holds=largest <= 1 + 1e-12),
        )
        if course.modes.rule == "bp":
            least = float((course.weights[1:] * course.weights[:-1]).min())
            conditions += (
                Assumption(name="signs", statement="θ θ⁺ ≥ 0", measured=least, needed=0.0, holds=least >= 0),
            )
    return TheoremCheck(
        name="Exponential convergence",
        source=SOURCE,
        reading=f"{course.modes.rule}, depth {course.modes.depth}, " + ("steps" if course.rate else "flow"),
        assumptions=conditions,
        bound=bound,
        measured=error,
        scale=allowance(course) * scale_of(course),
        constants={"rate": float(rate.min())},
    )


@recording
def error_recursion(course: ModeCourse) -> TheoremCheck:
    """Check ``e⁺ = e (1 - η ρ̂)`` at every step, to 1e-12 of ``max(λ, |e(0)|)``; exact at any rate, depth and rule.

    Of two layers ``ρ̂ = ρ + η s c_1 θ_1 e``.

    Args:
        course: Of steps, every one of them recorded.

    Raises:
        ValueError: it is not.

    Source: derived.
    """
    error, rates = rows(course.error), rows(step_rates(course))
    residual = (error[:, 1:] - error[:, :-1] * (1 - course.rate * rates)).abs()
    tolerance = 1e-12 * coarseness(residual)
    return identity("Error recursion", course, residual, tolerance * scale_of(course)[:, None].expand_as(residual))


@recording
def conserved_invariants(course: ModeCourse, tolerance: float | None = None) -> TheoremCheck:
    """Check ``K_l(t) = K_l(0) + account_l(t)``: constant in flow; in steps the account is exact, ``-½ Σ (Δθ_l)²``.

    Flow: ``(c_l/c_{l+1}) θ_{l+1}' = c_l Π_{j≤l} θ_j e = θ_l θ_l'``. Steps: the same, and ``-½ (Δθ_l)²`` of the square.

    Args:
        course: Any.
        tolerance: Of the residual, as a share of the largest ``|K_l| + θ²`` on the way; None for 1e-12 in steps (of
            float64) and 1e-8 in flow, whose integration has an error of its own.

    Raises:
        ValueError: the tolerance is not positive.

    Source: derived.
    """
    found = course.invariants
    usual = (1e-12 if course.rate else 1e-8) * coarseness(found)
    tolerance = usual if tolerance is None else positive("tolerance", tolerance)
    residual = rows((found - found[:1] - course.account).abs().amax(1))
    size = rows(found.abs().amax(1) + course.weights.square().amax(1)).amax(1, keepdim=True)
    return identity("Conserved invariants", course, residual, tolerance * size.expand_as(residual))


@recording
def step_rates(course: ModeCourse) -> Float[Tensor, "steps *modes"]:
    """``ρ̂ = s Σ_l c_l Π_{j>l} θ_j⁺ Π_{j<l} θ_j²`` of every step: ``e⁺ = e (1 - η ρ̂)`` exactly.

    Raises:
        ValueError: it is a flow, or a course of which steps were left out.
    """
    every = course.rate * torch.arange(len(course.times), dtype=torch.float64)
    if course.rate == 0 or len(course.times) < 2 or not torch.allclose(course.times.cpu(), every, rtol=1e-9):
        raise ValueError("a step's rate is read off both its ends: descend with at=range(steps + 1)")
    before = [course.at(place) for place in range(len(course.times) - 1)]
    after = [course.at(place).above for place in range(1, len(course.times))]
    terms = [here.carriers * here.below.square() * top for here, top in zip(before, after, strict=True)]
    return course.modes.variance * torch.stack(terms).sum(1)


def _rate_of_path(course: ModeCourse) -> Float[Tensor, "*modes"]:
    """What no ρ̂ of the steps is below."""
    s = course.modes.variance
    if course.modes.rule != "bp":
        last = course.invariants[-1]
        return s * last.prod(0) * (last > 0).all(0)
    squares = course.weights.square()
    least = squares[0].argmin(0, keepdim=True).expand(len(squares), -1, *squares.shape[2:])
    gaps = (squares - squares.gather(1, least)).amin(0).scatter(0, least[0], 1.0)
    return s * gaps.prod(0) * (gaps > 0).all(0)


def _positive_rate(rule: Rule, rate: Tensor) -> Assumption:
    statement = "θ_j² > θ_i² for one layer i and all others" if rule == "bp" else "K_l > 0 for all l"
    least = float(rate.min()) + 0.0  # no -0
    return Assumption(
        name="positive rate", statement=f"r > 0, that is {statement}", measured=least, needed=0.0, holds=least > 0
    )


def identity(name: str, course: ModeCourse, residual: Tensor, bound: Tensor) -> TheoremCheck:
    """The check that what should be zero is no more than its bound [runs times]."""
    return TheoremCheck(
        name=name,
        source=SOURCE,
        reading=f"{course.modes.rule}, depth {course.modes.depth}; the residual of an identity",
        assumptions=(),
        bound=bound,
        measured=residual,
        scale=torch.zeros_like(residual[:, 0]),
    )


def rows(values: Float[Tensor, "times *modes"]) -> Float[Tensor, "runs times"]:
    """A row a mode."""
    return values.flatten(1).mT if values.ndim > 1 else values[None]


def scale_of(course: ModeCourse) -> Float[Tensor, " runs"]:
    """``max(λ, |e(0)|)``."""
    return torch.maximum(course.modes.target, course.modes.error.abs()).flatten()


def allowance(course: ModeCourse) -> float:
    """How much the rounding of many steps, or the error of an integration, is above the rounding of one number."""
    return max(1e2 if course.rate else 1e5, coarseness(course.weights))


def coarseness(numbers: Tensor) -> float:
    """Rounding of their type, that of float64 being 1."""
    return torch.finfo(numbers.dtype).eps / torch.finfo(torch.float64).eps
