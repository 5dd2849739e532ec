"""Two-layer modes under feedback alignment in closed form: their fixed points, and where these meet.

Throughout ``e = λ - s θ_1 θ_2``, ``θ_1' = m e``, ``θ_2' = θ_1 e`` and ``K = θ_2 - θ_1²/(2m)``, constant in gradient
flow, so that ``θ_1' = mλ - s (mK θ_1 + θ_1³/2)``. Of ``Modes``, ``invariants`` holds mK.

Source: derived, after Girotti, Mitliagkas and Gidel 2021.
"""

from dataclasses import dataclass
from math import pi

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from falign._validation import Numbers
from falign.theory._coerce import public, recording
from falign.theory.deep_linear._modes import Modes, finite, modes

_MEETING = 1e-12
"""Slope at which two roots count as one, relative to their scale."""

_TINY = 1e-200
"""Radius³ below which p counts as 0: what is divided by it would overflow."""


@dataclass(frozen=True, kw_only=True)
class FixedPoints:
    """The θ_1 at which a mode with a given K rests; all of them have no error.

    Attributes:
        weights: In falling order, nan where there are fewer than three [3 *modes].
        stable: Which of them attract from both sides [3 *modes].
    """

    weights: Float[Tensor, "3 *modes"]
    stable: Bool[Tensor, "3 *modes"]


@recording
def fixed_points(K: Numbers, target: Numbers, feedback: Numbers = 1.0, *, variance: Numbers = 1.0) -> FixedPoints:
    """Real roots of ``θ_1³ + 2mK θ_1 - 2mλ/s``, stable where ``ρ = s (mK + (3/2) θ_1²) > 0``.

    One where ``mK > mK_c``; else three: with mλ > 0 one positive and two negative, the outer ones stable, the inner one
    not. A double root attracts from one side only; the triple root 0 (λ = 0, K = 0) attracts, with ρ = 0.

    Args:
        K: ``θ_2 - θ_1²/(2m)``.
        target: λ ≥ 0.
        feedback: m ≠ 0.
        variance: s > 0.

    Raises:
        ValueError: a number is out of range or not finite, or shapes do not fit.
    """
    given = modes(target, [0.0, finite("K", K)], feedback=feedback, variance=variance)
    linear, constant = 2 * given.invariants[0], 2 * given.feedback[0] * given.target / given.variance
    size = torch.maximum(linear.abs().sqrt(), _cube_root(constant).abs())
    unit = size.where(size > 0, 1.0)
    weights = unit * _roots(linear / unit**2, constant / unit**3)
    slope = linear + 3 * weights.square()
    stable = (slope > _MEETING * unit**2) | ((size == 0) & ~weights.isnan())
    return FixedPoints(weights=weights, stable=stable)


@public
def critical_invariant(target: Numbers, feedback: Numbers = 1.0, *, variance: Numbers = 1.0) -> Float[Tensor, "*modes"]:
    """``K_c = -(3/2) (λ²/(s² m))^⅓``: where mK is below mK_c there are three fixed points, else one.

    Args:
        target: λ ≥ 0.
        feedback: m ≠ 0.
        variance: s > 0.

    Raises:
        ValueError: a number is out of range or not finite, or shapes do not fit.
    """
    given = modes(target, [0.0, 0.0], feedback=feedback, variance=variance)
    return -1.5 * _cube_root((given.target / given.variance).square() / given.feedback[0])


@public
def critical_target(K: Numbers, feedback: Numbers = 1.0, *, variance: Numbers = 1.0) -> Float[Tensor, "*modes"]:
    """``λ_c = (2/3)^(3/2) s |m|^½ |K|^(3/2)`` where mK < 0, else 0: below it there are three fixed points.

    A mode that starts below the inner one, as with θ_1(0) = -c and θ_2(0) = 0 (``λ_c = s c³/(3√3 m)``), ends at the
    outer negative one while λ < λ_c, at a rate that falls with λ to 0.

    Args:
        K: ``θ_2 - θ_1²/(2m)``.
        feedback: m ≠ 0.
        variance: s > 0.

    Raises:
        ValueError: a number is out of range or not finite, or shapes do not fit.
    """
    given = modes(0.0, [0.0, finite("K", K)], feedback=feedback, variance=variance)
    depth = (-given.invariants[0]).clamp(min=0)
    return given.variance * (2 * depth / 3) ** 1.5 / given.feedback[0].abs()


@public
def degenerate_error(
    target: Numbers, feedback: Numbers = 1.0, *, times: Numbers, variance: Numbers = 1.0
) -> Float[Tensor, "times *modes"]:
    """``e ≈ 2 / (3 m s a t²)`` at late times where ``K = K_c`` and θ_1 comes from below, ``a³ = mλ/s``.

    The outer and the inner fixed point meet at -a, ``ρ* = 0``, and the error has no exponential rate.

    Args:
        target: λ > 0.
        feedback: m ≠ 0.
        times: t > 0 [times].
        variance: s > 0.

    Raises:
        ValueError: a number is out of range or not finite, or shapes do not fit.
    """
    given = modes(target, [0.0, 0.0], feedback=feedback, variance=variance)
    moments = _moments_of(times, given)
    if not ((moments > 0) & (given.target > 0)).all():
        raise ValueError(
            "a time or λ is 0, expected t > 0 and λ > 0: the law is of late times, and λ = 0 has no K_c < 0"
        )
    m, s = given.feedback[0], given.variance
    return 2 / (3 * m * s * _cube_root(m * given.target / s) * moments.square())


def _moments_of(times: Numbers, given: Modes) -> Tensor:
    """Check times and put them on an axis ahead of those of the modes."""
    moments = finite("times", times).to(given.target)
    if moments.ndim != 1 or (moments < 0).any():
        raise ValueError(f"times are {moments.tolist()}, expected a list of numbers from 0 on")
    return moments.view(-1, *[1] * given.target.ndim)


def _cube_root(number: Tensor) -> Tensor:
    """Take the real cube root, also of numbers below 0."""
    return number.sign() * number.abs() ** (1 / 3)


def _roots(p: Tensor, q: Tensor) -> Float[Tensor, "3 *modes"]:
    """Real roots of ``y³ + py = q`` in falling order, nan where there are fewer, with max(|p|, |q|) of order 1."""
    radius = (p.abs() / 3).sqrt()
    # The trigonometric forms rather than Cardano's, whose difference of cube roots loses the small root.
    ratio = q / (2 * radius**3)
    single = torch.where(
        p > 0,
        2 * radius * torch.sinh(torch.asinh(ratio) / 3),
        2 * radius * ratio.sign() * torch.cosh(torch.acosh(ratio.abs().clamp(min=1)) / 3),
    )
    single = torch.where(radius**3 < _TINY, _cube_root(q), single)
    angle = torch.acos(ratio.clamp(-1, 1)) / 3
    three = torch.stack([2 * radius * torch.cos(angle + turn * 2 * pi / 3) for turn in (0, -1, 1)])
    alone = torch.stack([single, torch.full_like(single, torch.nan), torch.full_like(single, torch.nan)])
    root = torch.where((p < 0) & (ratio.abs() <= 1 + _MEETING), three, alone)
    for _ in range(2):  # what the functions rounded away, by Newton's rule
        slope = 3 * root.square() + p
        root = root - torch.where(slope.abs() > _MEETING, (root**3 + p * root - q) / slope, 0.0)
    return root


# Two layers from zero weights under feedback alignment, in closed form.
#
# Source: derived; the integral of ``1/(1 - u³)``.


@public
def zero_init(
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
    moments = _moments_of(times, given)
    share = 1 - torch.exp(-_remainder(moments / _unit_time(given)))
    return given.target / given.variance * share**3


@public
def zero_init_time(
    target: Numbers, feedback: Numbers = 1.0, *, share: Numbers, variance: Numbers = 1.0
) -> Float[Tensor, "*modes"]:
    """Time at which a mode from zero weights has learned a share ``u³ = s θ_1 θ_2/λ``: the inverse of ``zero_init``.

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
    u = _cube_root(learned)
    left = -torch.log((1 - learned) / (1 + u + u.square()))  # -ln(1 - u), exact also where u is close to 1
    return _clock(left) * _unit_time(given)


def _unit_time(given: Modes) -> Float[Tensor, "*modes"]:
    """``2/(s a²)`` with ``a³ = 2mλ/s``."""
    a = _cube_root(2 * given.feedback[0] * given.target / given.variance)
    return 2 / (given.variance * a.square())


def _clock(left: Tensor) -> Tensor:
    """σ at ``u = 1 - exp(-left)``."""
    u = -torch.expm1(-left)
    # The two arcus tangents as one: near u = 0 their difference would have no digits left.
    return left / 3 + torch.log1p(u + u.square()) / 6 + torch.atan(3**0.5 * u / (2 + u)) / 3**0.5


def _remainder(clock: Tensor) -> Tensor:
    """``-ln(1 - u)`` at σ, by Newton's rule: ``dσ/d(-ln(1 - u)) = 1/(1 + u + u²)`` only falls, from 1 to 1/3."""
    # σ is concave in it and this start is below the root: each step comes nearer from below, none can overshoot.
    left = clock.clone()
    for _ in range(60):
        u = -torch.expm1(-left)
        left = left + (clock - _clock(left)) * (1 + u + u.square())
    return left
