"""Two-layer modes under feedback alignment that start at zero, in closed form.

Source: derived; the integral of ``1/(1 - u³)``.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.deep_linear.modes import Modes, modes
from falign.theory.deep_linear.ranges import finite
from falign.theory.deep_linear.shallow import cube_root, moments_of
from falign.theory.door import public
from falign.theory.inputs import Numbers


@public
def zero_start(
    target: Numbers, feedback: Numbers = 1.0, *, times: Numbers, variance: Numbers = 1.0
) -> Float[Tensor, "times *modes"]:
    """``θ_1 θ_2`` from zero weights, ``(λ/s) u³`` where ``du/dσ = 1 - u³``, ``σ = a² s t/2`` and ``a³ = 2mλ/s``.

    Args:
        target: λ ≥ 0.
        feedback: m ≠ 0.
        times: t ≥ 0 [times].
        variance: s > 0.

    Raises:
        ValueError: a number is out of range or not finite, or shapes do not fit.
    """
    given = modes(target, [0.0, 0.0], feedback=feedback, variance=variance)
    moments = moments_of(times, given)
    share = 1 - torch.exp(-_remainder(moments / _unit_time(given)))
    return given.target / given.variance * share**3


@public
def zero_start_time(
    target: Numbers, feedback: Numbers = 1.0, *, share: Numbers, variance: Numbers = 1.0
) -> Float[Tensor, "*modes"]:
    """When a mode that starts at zero has learned a share ``u³ = s θ_1 θ_2/λ``, the inverse of ``zero_start``.

    ``σ(u) = (1/6) ln((1 + u + u²)/(1 - u)²) + (1/√3) [arctan((2u + 1)/√3) - π/6]``; of 90 % ``t = 2.0107 (mλ)^(-2/3)``
    with s = 1.

    Args:
        target: λ ≥ 0; 0 is never learned.
        feedback: m ≠ 0.
        share: From 0 to below 1, broadcast against the modes.
        variance: s > 0.

    Raises:
        ValueError: a number is out of range or not finite, or shapes do not fit.
    """
    given = modes(target, [0.0, 0.0], feedback=feedback, variance=variance)
    learned = finite("share", share).to(given.target)
    if not ((learned >= 0) & (learned < 1)).all():
        raise ValueError(f"share is {learned.tolist()}, expected numbers from 0 to below 1")
    try:
        torch.broadcast_shapes(learned.shape, given.target.shape)
    except RuntimeError:
        shapes = f"{tuple(learned.shape)} and the modes {tuple(given.target.shape)}"
        raise ValueError(f"share has shape {shapes}, which do not broadcast: pass one share, or one a mode") from None
    u = cube_root(learned)
    left = -torch.log((1 - learned) / (1 + u + u.square()))  # -ln(1 - u), exact also where u is close to 1
    return _clock(left) * _unit_time(given)


def _unit_time(given: Modes) -> Float[Tensor, "*modes"]:
    """``2/(s a²)`` with ``a³ = 2mλ/s``."""
    a = cube_root(2 * given.feedback[0] * given.target / given.variance)
    return 2 / (given.variance * a.square())


def _clock(left: Tensor) -> Tensor:
    """σ at ``u = 1 - exp(-left)``."""
    u = -torch.expm1(-left)
    return left / 3 + torch.log1p(u + u.square()) / 6 + torch.atan(3**0.5 * u / (2 + u)) / 3**0.5


def _remainder(clock: Tensor) -> Tensor:
    """``-ln(1 - u)`` at σ, by Newton's rule: ``dσ/d(-ln(1 - u)) = 1/(1 + u + u²)`` only falls, from 1 to 1/3."""
    left = clock.clone()
    for _ in range(60):
        u = -torch.expm1(-left)
        left = left + (clock - _clock(left)) * (1 + u + u.square())
    return left
