"""Means of products of an activation under correlated Gaussians, for any activation, to a stated accuracy.

Inputs of norm 12 make ``ψ(12u)`` nearly a step, whose poles lie 0.13 from the real line. Gauss-Hermite nodes are then
spaced too widely in the middle, where they are needed: 8,000 of them still leave 7·10⁻¹⁰, and a pair of inputs takes
the square of their number. 640 evenly spaced nodes leave 4·10⁻¹¹, and 1,280 nothing.
Here a pair costs one short sum:

- The Hermite coefficients ``a_k(s) = E ψ(su) h_k(u)`` turn the mean over a pair into a power series in the
  correlation (Mehler), ``E ψ(su) ψ(s'v) = Σ_k a_k(s) a_k(s') ρᵏ``. What is left out after K terms is at most
  ``|ρ|^K √(R(s) R(s'))`` with ``R(s) = E ψ(su)² - Σ_{k<K} a_k(s)²``: a bound, not a guess.
- Means over one Gaussian are trapezoidal sums, which converge geometrically in the number of nodes for analytic
  integrands. The step is halved until that changes nothing.
- Pairs so parallel that the series would be too long are summed over a grid of both variables, ``v = ρu + √(1-ρ²)z``,
  with the step found for one variable; this includes ρ = ±1.

Source: Mehler's formula, and Trefethen and Weideman 2014 (SIAM Review 56(3)), section 5, for the trapezoidal rule.
"""

from collections.abc import Callable
from math import exp, pi, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public

_REACH = 10.0
"""Nodes lie in [-10, 10]; the Gaussian weight is 10⁻²² there."""

_FEWEST, _MOST = 160, 160 * 2**7
"""Nodes of the first rule tried and of the last."""

_TERMS = 192
"""K: correlations up to 0.88 reach 10⁻¹⁰ whatever the activation."""

_PIECE = 1 << 22
"""Numbers of one piece of the two-dimensional sums: 32 MiB."""


@public
def pair_means(
    value: Callable[[Tensor], Tensor],
    scale: Float[Tensor, " n"],
    correlation: Float[Tensor, "n n"],
    *,
    tolerance: float = 1e-10,
) -> tuple[Float[Tensor, "n n"], float]:
    """The mean ``E ψ(s_i u) ψ(s_j v)`` over standard Gaussians u, v of correlation ρ_ij, and a bound on its error.

    Args:
        value: ψ, elementwise; at most of exponential growth.
        scale: s [n], standard deviations of the arguments, |x_i|.
        correlation: ρ [n n], cosines of the angles between inputs.
        tolerance: Largest error allowed, relative to the largest ``E ψ(su)²``.

    Returns:
        The means [n n] in float64, and the estimated error relative to the largest ``E ψ(su)²``.

    Raises:
        ValueError: the tolerance is not met by 20,480 nodes, as for activations with a kink at 10⁻¹⁰, or the
            integrand has not decayed at ±10 standard deviations.
    """
    scale = scale.double()
    correlation = correlation.double().clamp(-1, 1)
    nodes, coefficients, square, error = _resolved(value, scale, tolerance)
    size = float(square.max())
    terms = coefficients.shape[1]
    left = (square - coefficients.square().sum(1)).clamp(min=0).sqrt()
    remainder = correlation.abs() ** terms * left[:, None] * left
    means = _series(coefficients, correlation)
    steep = (remainder > tolerance / 2 * size).triu()
    if steep.any():
        i, j = steep.nonzero().unbind(1)
        means[i, j] = means[j, i] = _grid(value, nodes, scale[i], scale[j], correlation[i, j])
        remainder = remainder.masked_fill(steep | steep.mT, 0.0)
    return means, error + float(remainder.max()) / max(size, 1e-300)


@public
def hermite_coefficients(
    value: Callable[[Tensor], Tensor], scale: Float[Tensor, " n"], terms: int, *, tolerance: float = 1e-10
) -> Float[Tensor, "n terms"]:
    """``a_k(s) = E ψ(su) h_k(u)`` with the normalised Hermite polynomials, ``E h_j h_k = 1`` for j = k and else 0.

    Args:
        value: ψ, elementwise.
        scale: s [n].
        terms: How many, from k = 0; at most 192.
        tolerance: As in ``pair_means``.
    """
    return _resolved(value, scale.double(), tolerance)[1][:, :terms]


def _resolved(
    value: Callable[[Tensor], Tensor], scale: Float[Tensor, " n"], tolerance: float
) -> tuple[Float[Tensor, " nodes"], Float[Tensor, "n terms"], Float[Tensor, " n"], float]:
    """Nodes fine enough, the coefficients and ``E ψ(su)²`` on them, and how much the last halving changed these."""
    count = _FEWEST
    nodes, coarse = _coefficients(value, scale, count)
    change = float("inf")
    while count < _MOST:
        count *= 2
        nodes, fine = _coefficients(value, scale, count)
        size = float(fine[:, -1].max())
        if not size < float("inf"):
            break
        products = (coarse[:, :-1].square() - fine[:, :-1].square()).abs().max()
        change = float(torch.maximum(products, (coarse[:, -1] - fine[:, -1]).abs().max())) / max(size, 1e-300)
        if change <= tolerance / 4:
            edge = value(scale[:, None] * nodes[[0, -1]]).square().max() * exp(-(_REACH**2) / 2)
            if float(edge) > tolerance / 40 * size:
                break
            return nodes, fine[:, :-1], fine[:, -1], change
        coarse = fine
    raise ValueError(
        f"the mean of this activation's square changes by {change:.1e} of itself at {count} nodes, which is above "
        f"tolerance={tolerance:.1e}, or it does not decay within {_REACH:g} standard deviations at scales up to "
        f"{float(scale.max()):.3g}: allow a larger tolerance or smaller inputs"
    )


def _coefficients(
    value: Callable[[Tensor], Tensor], scale: Float[Tensor, " n"], count: int
) -> tuple[Float[Tensor, " nodes"], Float[Tensor, "n columns"]]:
    """On one set of nodes: the coefficients a_0 … a_{K-1}, and ``E ψ(su)²`` as the last column.

    With Hermite functions ``h_k √φ`` in place of the polynomials nothing overflows.
    """
    nodes = torch.linspace(-_REACH, _REACH, count + 1, dtype=torch.float64, device=scale.device)
    step = 2 * _REACH / count
    root = torch.exp(-nodes.square() / 4) / (2 * pi) ** 0.25
    functions = [root, nodes * root]
    for k in range(1, _TERMS - 1):
        functions.append((nodes * functions[k] - sqrt(k) * functions[k - 1]) / sqrt(k + 1))
    weighted = value(scale[:, None] * nodes) * root
    coefficients = step * weighted @ torch.stack(functions, dim=1)
    return nodes, torch.cat((coefficients, step * weighted.square().sum(1, keepdim=True)), dim=1)


def _series(coefficients: Float[Tensor, "n terms"], correlation: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """``Σ_k a_k(s_i) a_k(s_j) ρ_ijᵏ`` by Horner's rule."""
    total = torch.zeros_like(correlation)
    for column in reversed(coefficients.unbind(1)):
        total = total * correlation + column[:, None] * column
    return total


def _grid(
    value: Callable[[Tensor], Tensor],
    nodes: Float[Tensor, " nodes"],
    first: Float[Tensor, " pairs"],
    second: Float[Tensor, " pairs"],
    correlation: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """``ΣΣ φ(u) φ(z) ψ(su) ψ(s'(ρu + √(1-ρ²)z))`` for each pair; one sum alone where ρ = ±1."""
    weight = torch.exp(-nodes.square() / 2)
    weight = weight / weight.sum()
    means = torch.empty_like(first)
    flat = correlation.abs() == 1
    outer = value(first[flat, None] * nodes) * value((second * correlation)[flat, None] * nodes)
    means[flat] = outer @ weight
    pairs = (~flat).nonzero().squeeze(1)
    for piece in pairs.split(max(1, _PIECE // len(nodes) ** 2)):
        rho = correlation[piece, None, None]
        across = (1 - rho.square()).clamp(min=0).sqrt()
        inner = value(second[piece, None, None] * (rho * nodes[:, None] + across * nodes)) @ weight
        means[piece] = (value(first[piece, None] * nodes) * inner) @ weight
    return means
