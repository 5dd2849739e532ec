"""How fast the loss must fall, given how far alignment dominates and how the gradient is bounded below by the loss."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.conservation.measurements import Course
from falign.theory.dominance.split import largest_kappa
from falign.theory.door import public
from falign.theory.inputs import alike, floats, number, told
from falign.theory.statement import Assumption, TheoremCheck

_SOURCE = "derived; after Robertson and Koyejo 2024 (ICML)"


@public
def predicted_loss(
    initial: Float[Tensor, " runs"],
    times: Float[Tensor, " times"],
    *,
    kappa: Float[Tensor, " runs"],
    mu: Float[Tensor, " runs"],
    exponent: float = 1.0,
) -> Float[Tensor, "runs times"]:
    """What the loss is at most under ``dL/dt ≤ -κ |g_L|²`` and ``|g_L|² ≥ μ Lᵃ``.

    a = 1: ``L(t) = L₀ exp(-κμt)``. a > 1: ``L(t) = (L₀^{1-a} + (a - 1) κμt)^{-1/(a-1)}``, which for a = 2 falls as
    1/t. Equality holds where both premises are equalities.

    Args:
        initial: L₀.
        times: t, from 0; for steps of size η, η times their number.
        kappa: κ > 0 of each run.
        mu: μ > 0 of each run.
        exponent: a ≥ 1.

    Raises:
        ValueError: a is below 1, κ, μ or L₀ is negative, or there is not one of each a run.

    Source: derived. Summaries of Robertson and Koyejo 2024 (ICML) speak of "exponential or generalised decay".
    """
    if not (number(exponent) and exponent >= 1):
        raise ValueError(f"exponent is {told(exponent)}, expected a ≥ 1: below it the loss would vanish in finite time")
    alike(initial=initial, kappa=kappa, mu=mu)
    floats(times=times)
    if initial.ndim != 1 or times.ndim != 1:
        raise ValueError(
            f"initial losses {tuple(initial.shape)} and times {tuple(times.shape)} must be lists: one a run"
        )
    for name, given in (("initial", initial), ("kappa", kappa), ("mu", mu)):
        if (given < 0).any():
            raise ValueError(f"{name} is {float(given.min()):g} in a run, expected at least 0")
    rate = (kappa * mu)[:, None] * times
    if exponent == 1:
        return initial[:, None] * torch.exp(-rate)
    power = exponent - 1
    return initial[:, None] * (1 + power * initial[:, None] ** power * rate) ** (-1 / power)


@public
def lojasiewicz_constant(
    loss: Float[Tensor, "*runs times"], gradient_norm: Float[Tensor, "*runs times"], exponent: float = 1.0
) -> Float[Tensor, "*runs"]:
    """``μ = min_t |g_L|²/Lᵃ``: the largest constant of ``|g_L|² ≥ μ Lᵃ`` along a course.

    Args:
        loss: L, less its infimum where that is not 0.
        gradient_norm: |g_L|, of the output layer.
        exponent: a.

    Raises:
        ValueError: the two have not the same shape, or a is no number.
    """
    alike(loss=loss, gradient_norm=gradient_norm)
    if not number(exponent):
        raise ValueError(f"exponent is {told(exponent)}, expected a number")
    ratio = gradient_norm.square() / loss.clamp_min(torch.finfo(loss.dtype).tiny) ** exponent
    return torch.where(loss > 0, ratio, torch.inf).amin(-1)


@public
def lojasiewicz_exponent(loss: Float[Tensor, " times"], gradient_norm: Float[Tensor, " times"]) -> tuple[float, float]:
    """(a, its standard error): the slope of ``log |g_L|²`` against ``log L``, least squares.

    Raises:
        ValueError: fewer than three times with a positive loss and gradient, all at the same loss, or not as many of
            both.
    """
    floats(loss=loss, gradient_norm=gradient_norm)
    if loss.ndim != 1 or loss.shape != gradient_norm.shape:
        raise ValueError(
            f"shapes are {tuple(loss.shape)} and {tuple(gradient_norm.shape)}: expected one a time of both"
        )
    seen = (loss > 0) & (gradient_norm > 0)
    x, y = loss[seen].double().log(), 2 * gradient_norm[seen].double().log()
    if len(x) < 3 or float(x.max() - x.min()) == 0:
        raise ValueError(f"an exponent wants three different positive losses, got {int(seen.sum())} of {len(loss)}")
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    error = ((y - slope * x).square().sum() / (len(x) - 2) / (x @ x)).sqrt()
    return float(slope), float(error)


@public
def convergence(
    course: Course, *, exponent: float = 1.0, kappa: float | None = None, mu: float | None = None
) -> TheoremCheck:
    """Check ``L(t) ≤`` the predicted loss along a run, given κ and μ or with those measured along it.

    Args:
        course: With ``loss``, ``dominance`` and ``gradient_norm`` recorded, without decay. The theorem is of gradient
            flow; steps add ``½ η² |f|²`` times a curvature, so they must be small.
        exponent: a of ``|g_L|² ≥ μ Lᵃ``.
        kappa: κ; None takes each run's largest.
        mu: μ; None takes each run's largest.

    Returns:
        The check. ``constants``: kappa, mu (the least of the runs); ``series["dominance"]``. A given κ or μ that the
        run does not have is an assumption that fails.

    Raises:
        ValueError: a is below 1, or κ or μ no number.

    Source: derived from the definition in ``largest_kappa``.
    """
    for name, given in (("kappa", kappa), ("mu", mu)):
        if given is not None and not number(given):
            raise ValueError(f"{name} is {told(given)}, expected a number, or None")
    rates, _ = course.dynamics.of_layers(course.start)
    loss, dominance, gradient = course["loss"], course["dominance"], course["gradient_norm"][..., -1]
    own_kappa, own_mu = largest_kappa(dominance), lojasiewicz_constant(loss, gradient, exponent)
    used_kappa = own_kappa if kappa is None else torch.full_like(own_kappa, kappa)
    used_mu = own_mu if mu is None else torch.full_like(own_mu, mu)
    bound = predicted_loss(
        loss[:, 0],
        course.times,
        kappa=rates[-1] * used_kappa.clamp(min=0),
        mu=used_mu.clamp(min=0),
        exponent=exponent,
    )
    return TheoremCheck(
        name="Convergence under alignment dominance",
        source=_SOURCE,
        reading=f"D = Σ_(l<L) ⟨g_l, f_l⟩/|g_L|², κ = 1 + min D, |g_L|² ≥ μ L^{exponent:g}, at the recorded times",
        assumptions=(
            _reached("alignment dominance", "Σ_(l<L) ⟨g_l, f_l⟩ ≥ -(1 - κ)|g_L|² with κ > 0", own_kappa, kappa),
            _reached("gradient inequality", f"|g_L|² ≥ μ L^{exponent:g} with μ > 0", own_mu, mu),
            no_decay(course),
            small_steps(course),
        ),
        bound=bound,
        measured=loss,
        scale=loss[:, 0] * (1.0 if course.rate else 1e6),
        constants={"kappa": float(used_kappa.min()), "mu": float(used_mu.min())},
        series={"dominance": dominance},
    )


def no_decay(course: Course) -> Assumption:
    """That λ = 0: decay can raise a loss that does not count it."""
    decay = max(course.dynamics.of_layers(course.start)[1])
    return Assumption(name="no decay", statement="λ = 0", measured=decay, needed=0.0, holds=decay == 0)


def small_steps(course: Course) -> Assumption:
    """That time is continuous; of steps, how small they must be is left open."""
    return Assumption(name="small steps", statement="η → 0", measured=course.rate, holds=None if course.rate else True)


def _reached(name: str, statement: str, own: Float[Tensor, " runs"], needed: float | None) -> Assumption:
    least = float(own.min())
    limit = 0.0 if needed is None else needed
    return Assumption(name=name, statement=statement, measured=least, needed=limit, holds=least >= limit and least > 0)
