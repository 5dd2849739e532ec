"""The assumptions that several theorems share, measured."""

from math import isfinite, log, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import fraction, positive
from falign.theory.statement import Assumption
from falign.theory.two_layer._activations import Activation
from falign.theory.two_layer._start import Start


def check_levels(*, delta: float | int, gamma: float | int | None = None, **others: float | int | None) -> None:
    """Refuse δ outside (0, 1), and a γ or another constant that is not positive.

    Raises:
        ValueError: one of them is out of range.
    """
    fraction("delta", delta)
    for name, value in {"gamma": gamma, **others}.items():
        if value is not None:
            positive(name, value)


def positive_smallest(
    name: str, statement: str, smallest: Float[Tensor, " runs"], largest: Float[Tensor, " runs"], needed: float | None
) -> Assumption:
    """Assume a smallest eigenvalue of at least ``needed``, or, without it, above 10⁻¹² of the largest, its rounding."""
    limit = needed if needed is not None else float(1e-12 * largest.max())
    measured = float(smallest.min())
    return Assumption(
        name=name,
        statement=statement,
        measured=measured,
        needed=limit,
        holds=measured >= limit * (1 - 1e-12) and measured > 0,
    )


def gaussian_start(start: Start) -> Assumption:
    """W(0), β(0) and b are standard normal: their mean squares differ from 1 by few standard errors."""
    errors = [
        float((entries.double().square().mean() - 1).abs()) * sqrt(entries.numel() / 2)
        for entries in (start.W, start.beta, start.b)
    ]
    return Assumption(
        name="Gaussian start",
        statement="the entries of W(0), β(0) and b are N(0, 1); largest deviation of their mean squares in "
        "standard errors",
        measured=max(errors),
        needed=5.0,
        holds=max(errors) <= 5,
    )


def bounded_activation(activation: Activation) -> Assumption:
    """ψ is smooth and ψ, ψ', ψ'' are bounded."""
    largest = max(activation.bounds)
    smooth = "" if activation.smooth else f" ({activation.name} is not smooth)"
    return Assumption(
        name="bounded smooth activation",
        statement=f"sup of |ψ|, |ψ'|, |ψ''| is finite and ψ is smooth{smooth}",
        measured=largest,
        holds=activation.smooth and activation.bounded,
    )


def bounded_data(start: Start) -> tuple[Assumption, ...]:
    """|y_i| and |x_i| are bounded: by a constant that the paper does not name."""
    return (
        Assumption(name="bounded targets", statement="|y_i| = O(1)", measured=float(start.y.abs().max())),
        Assumption(name="bounded inputs", statement="|x_i| = O(1)", measured=float(start.X.norm(dim=-1).max())),
    )


def wide_enough(p: int, n: int, gamma: float, delta: float) -> tuple[Assumption, ...]:
    """``p ≥ max(C1 n²/(δγ²), C2 n⁴ log p/γ⁴)`` with the largest C1 and C2 that this width allows."""
    return (
        Assumption(name="width, C1", statement="C1 ≤ pδγ²/n²", measured=p * delta * gamma**2 / n**2),
        Assumption(name="width, C2", statement="C2 ≤ pγ⁴/(n⁴ log p)", measured=p * gamma**4 / (n**4 * log(max(p, 2)))),
    )


def step_size(
    rate: float, largest: Float[Tensor, " runs"], gamma: Float[Tensor, " runs"], share: float, strength: float
) -> Assumption:
    """``η (λ_max + share·γ + 2 max λ) ≤ 2``: not printed, but no bound on a step holds without it.

    The step's matrix is ``(1 - ηλ)I - ηḠ``; its norm is within ``1 - η·share·γ - ηλ`` only if its most negative
    eigenvalue is, ``ηλ_max - (1 - ηλ) ≤ 1 - η·share·γ - ηλ``.
    """
    measured = float((rate * (largest + share * gamma + 2 * strength)).max())
    return Assumption(
        name="step size (not printed)",
        statement=f"η(λ_max + {share:g}γ + 2 max λ) ≤ 2",
        measured=measured,
        needed=2.0,
        holds=measured <= 2,
    )


def penalty_sum(statement: str, total: float, limit_at_one: float, constant: float | None) -> Assumption:
    """``Σλ(t) ≤ c_S · limit_at_one``: against c_S where one is given, else the c_S that the sum implies."""
    implied = total / max(limit_at_one, 1e-300)
    if constant is None:
        holds = None if isfinite(total) else False
        return Assumption(name="penalty sum", statement=f"{statement}; c implied", measured=implied, holds=holds)
    return Assumption(
        name="penalty sum",
        statement=statement,
        measured=total,
        needed=constant * limit_at_one,
        holds=implied <= constant * (1 + 1e-9),
    )


def spectrum(kernel: Float[Tensor, "*seeds n n"]) -> tuple[Float[Tensor, "*seeds"], Float[Tensor, "*seeds"]]:
    """Smallest and largest eigenvalue of a symmetric matrix."""
    eigenvalues = torch.linalg.eigvalsh(kernel.double())
    return eigenvalues[..., 0], eigenvalues[..., -1]
