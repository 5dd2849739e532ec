"""Kernels of two-layer networks: Ḡ at infinite width, G and H at any."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, pi, sqrt
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign._validation import check_recording, positive
from falign.theory._coerce import public, recording
from falign.theory._simulate import Recorded, judged, record, warn_of_divergence
from falign.theory.two_layer._activations import Activation
from falign.theory.two_layer._dual import Dual

__all__ = [
    "KernelTrajectory",
    "Kernels",
    "follow_kernels",
    "hermite_coefficients",
    "kernels",
    "kernels_of_engine",
    "kernels_of_weights",
    "limiting_kernel",
    "limiting_kernel_by_quadrature",
    "pair_means",
    "predicted_error",
]

# Means of products of an activation under correlated Gaussians, for any activation, to a stated accuracy.
#
# Inputs of norm 12 make ``ψ(12u)`` nearly a step, whose poles lie 0.13 from the real line. Gauss-Hermite nodes are then
# spaced too widely in the middle, where they are needed: 8,000 of them still leave 7·10⁻¹⁰, and a pair of inputs takes
# the square of their number. 640 evenly spaced nodes leave 4·10⁻¹¹, and 1,280 nothing.
# Here a pair costs one short sum:
#
# - The Hermite coefficients ``a_k(s) = E ψ(su) h_k(u)`` turn the mean over a pair into a power series in the
#   correlation (Mehler), ``E ψ(su) ψ(s'v) = Σ_k a_k(s) a_k(s') ρᵏ``. What is left out after K terms is at most
#   ``|ρ|^K √(R(s) R(s'))`` with ``R(s) = E ψ(su)² - Σ_{k<K} a_k(s)²``: a bound, not a guess.
# - Means over one Gaussian are trapezoidal sums, which converge geometrically in the number of nodes for analytic
#   integrands. The step is halved until that changes nothing.
# - Pairs so parallel that the series would be too long are summed over a grid of both variables, ``v = ρu + √(1-ρ²)z``,
#   with the step found for one variable; this includes ρ = ±1.
#
# Source: Mehler's formula, and Trefethen and Weideman 2014 (SIAM Review 56(3)), section 5, for the trapezoidal rule.

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


# G and H: the kernels of a network of finite width, at the start and along training.


@public
@dataclass(frozen=True)
class Kernels:
    """The two parts of ``e(t+1) ≈ (I - η(G + H)) e(t)``.

    Attributes:
        G: From the step of β [*runs n n]: symmetric, positive semi-definite.
        H: From the step of W through the feedback [*runs n n]: symmetric, indefinite; of order 1/√p at the start.
    """

    G: Float[Tensor, "*runs n n"]
    H: Float[Tensor, "*runs n n"]

    def extremes(self) -> dict[str, Float[Tensor, "*runs"]]:
        """Smallest and largest eigenvalue of G, H and G + H: ``G_min``, ``G_max``, ``H_min``, … ``sum_max``.

        nan of runs that are not finite, which the decomposition would refuse together with all others.
        """
        values = {}
        for name, kernel in (("G", self.G), ("H", self.H), ("sum", self.G + self.H)):
            finite = kernel.isfinite().all(-1).all(-1)
            eigenvalues = torch.linalg.eigvalsh(kernel.where(finite[..., None, None], 0.0))
            eigenvalues = eigenvalues.where(finite[..., None], torch.nan)
            values[f"{name}_min"], values[f"{name}_max"] = eigenvalues[..., 0], eigenvalues[..., -1]
        return values


@public
def kernels(
    U: Float[Tensor, "*runs p n"],
    gram: Float[Tensor, "*#runs n n"],
    beta: Float[Tensor, "*#runs p"],
    b: Float[Tensor, "*#runs p"],
    activation: Activation,
) -> Kernels:
    """G and H from the pre-activations.

    ``G_ij = (1/p) Σ_r ψ(u_ri) ψ(u_rj)`` and ``H_ij = (1/p) Σ_r β_r b_r ψ'(u_ri) ψ'(u_rj) · x_iᵀx_j``.

    Args:
        U: ``W Xᵀ`` [*runs p n].
        gram: ``XXᵀ`` [*runs n n].
        beta: Output weights β [*runs p].
        b: Feedback weights [*runs p].
        activation: ψ.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), section 3, with the feedback in H_f as printed there.
    """
    value, slope = activation.both(U)
    width = U.shape[-2]
    G = value.mT @ value / width
    H = slope.mT @ ((beta * b)[..., None] * slope) / width * gram
    return Kernels(G=G, H=H)


@public
def kernels_of_weights(
    X: Float[Tensor, "*#runs n d"],
    W: Float[Tensor, "*runs p d"],
    beta: Float[Tensor, "*#runs p"],
    b: Float[Tensor, "*#runs p"],
    activation: Activation,
) -> Kernels:
    """G and H from the first layer's weights; see ``kernels``.

    Args:
        X: Inputs [*runs n d].
        W: Weights of the first layer [*runs p d].
        beta: Output weights [*runs p].
        b: Feedback [*runs p].
        activation: ψ.
    """
    return kernels(W @ X.mT, X @ X.mT, beta, b, activation)


# Ḡ: the kernel of the output weights in a network of infinite width.


@public
def limiting_kernel(
    X: Float[Tensor, "*runs n d"], activation: Activation, *, tolerance: float = 1e-10
) -> Float[Tensor, "*runs n n"]:
    """The mean of G over Gaussian first-layer weights, ``Ḡ_ij = E_{w~N(0,I_d)} ψ(wᵀx_i) ψ(wᵀx_j)``.

    Closed forms for identity, relu and erf; any other activation by ``pair_means``. The paper prints
    N(0, I_p) for w, which has d entries: read as N(0, I_d).

    Args:
        X: Inputs [*runs n d], any scale; equal, parallel and zero rows are allowed.
        activation: ψ.
        tolerance: Largest error allowed where there is no closed form, relative to the largest Ḡ_ii.

    Returns:
        Ḡ [*runs n n], symmetric, float64 on X's device.

    Raises:
        ValueError: the tolerance cannot be met, as for an activation with a kink and no closed form.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), assumption 3.1. Closed forms: Cho and Saul 2009 (relu), Williams
    1997 (erf).
    """
    X = X.double()
    if activation.name in _CLOSED_FORMS:
        return _CLOSED_FORMS[activation.name](X)
    return limiting_kernel_by_quadrature(X, activation.value, tolerance=tolerance)[0]


@public
def limiting_kernel_by_quadrature(
    X: Float[Tensor, "*runs n d"], value: Callable[[Tensor], Tensor], *, tolerance: float = 1e-10
) -> tuple[Float[Tensor, "*runs n n"], float]:
    """``Ḡ`` for any activation, and an estimate of its error relative to the largest Ḡ_ii.

    Args:
        X: Inputs [*runs n d].
        value: ψ, elementwise.
        tolerance: Largest error allowed.

    Raises:
        ValueError: the tolerance cannot be met.
    """
    X = X.double()
    runs = [
        pair_means(value, *_polar(inputs), tolerance=tolerance) for inputs in X.reshape(-1, *X.shape[-2:]).unbind(0)
    ]
    return torch.stack([means for means, _ in runs]).reshape(*X.shape[:-1], X.shape[-2]), max(e for _, e in runs)


def _polar(X: Float[Tensor, "*runs n d"]) -> tuple[Float[Tensor, "*runs n"], Float[Tensor, "*runs n n"]]:
    """Norms of the inputs and the cosines between them: exactly 1 on the diagonal, 0 for a zero input."""
    norm = torch.linalg.vector_norm(X, dim=-1)
    unit = X / torch.where(norm > 0, norm, 1.0)[..., None]
    cosine = (unit @ unit.mT).clamp(-1, 1)
    cosine.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return norm, cosine


def _linear(X: Float[Tensor, "*runs n d"]) -> Float[Tensor, "*runs n n"]:
    """``XXᵀ``."""
    return X @ X.mT


def _arc_cosine(X: Float[Tensor, "*runs n d"]) -> Float[Tensor, "*runs n n"]:
    """``|x_i||x_j| (sin θ + (π - θ) cos θ) / 2π`` with θ the angle between the inputs."""
    norm, cosine = _polar(X)
    angle = torch.arccos(cosine)
    return norm[..., :, None] * norm[..., None, :] * (angle.sin() + (pi - angle) * cosine) / (2 * pi)


def _arc_sine(X: Float[Tensor, "*runs n d"]) -> Float[Tensor, "*runs n n"]:
    """``(2/π) arcsin(2 x_iᵀx_j / √((1 + 2|x_i|²)(1 + 2|x_j|²)))``, for erf(u), not erf(u/√2)."""
    gram = X @ X.mT
    size = (1 + 2 * gram.diagonal(dim1=-2, dim2=-1)).sqrt()
    return 2 / pi * torch.arcsin(2 * gram / (size[..., :, None] * size[..., None, :]))


_CLOSED_FORMS: dict[str, Callable[[Float[Tensor, "*runs n d"]], Float[Tensor, "*runs n n"]]] = {
    "identity": _linear,
    "relu": _arc_cosine,
    "erf": _arc_sine,
}
"""Name of an activation -> its Ḡ."""


# G and H followed along a run: their extreme eigenvalues.


@dataclass(frozen=True, kw_only=True)
class KernelTrajectory(Recorded):
    """Extreme eigenvalues along a block of runs.

    Attributes:
        steps: Steps done at each recording.
        values: ``G_min``, ``G_max``, ``H_min``, ``H_max``, ``sum_min``, ``sum_max`` -> [seeds penalties times]; nan
            from a run's first recording that was not finite onwards.
        diverged: The step of that recording, -1 where there was none.
        lost: name -> the step of its first recording that was not finite, -1 where there was none.
    """

    what: ClassVar[str] = "kernels of two-layer networks"
    axes: ClassVar[tuple[str, ...]] = ("seed", "penalty")
    apart: ClassVar[str] = "penalty"

    steps: Int[Tensor, " times"]
    diverged: Int[Tensor, "seeds penalties"]

    def _clock(self) -> tuple[str, list[float | int]]:
        return "step", self.steps.tolist()


@public
def kernels_of_engine(engine: Dual) -> Kernels:
    """G and H [seeds penalties n n] at the engine's current weights."""
    X = engine.start.X.unsqueeze(1)
    return kernels(engine.U.mT, X @ X.mT, engine.beta, engine.start.b.unsqueeze(1), engine.activation)


@recording
def follow_kernels(engine: Dual, at: Sequence[int]) -> KernelTrajectory:
    """Advance the engine to each step of ``at`` and record the extreme eigenvalues of G, H and G + H.

    ``e(t+1) ≈ (I - η(G + H)) e(t)``: the run contracts where ``sum_min`` is positive. Without ridge H stays O(1/√p);
    as β aligns with b it becomes positive.

    Args:
        engine: Wherever it stands.
        at: Steps to record at, increasing, none before ``engine.t``.

    Raises:
        ValueError: the steps do not increase or lie behind the engine.

    Warns:
        UserWarning: a run is no longer finite, with the step.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), section 3.
    """
    check_recording(engine.t, at)
    recorded = record(at, engine.advance, lambda: kernels_of_engine(engine).extremes(), start=engine.t, axis=-1)
    found = judged(recorded, at, axes=2)
    warn_of_divergence(found["diverged"], found["lost"])
    return KernelTrajectory(steps=torch.tensor(list(at)), **found)


# The error of a two-layer network of infinite width under feedback alignment, with and without ridge.


@public
def predicted_error(
    kernel: Float[Tensor, "*#runs n n"],
    error: Float[Tensor, "*#runs n"],
    y: Float[Tensor, "*#runs n"],
    *,
    rate: float,
    strengths: Float[Tensor, "*#runs steps"],
) -> Float[Tensor, "*runs times n"]:
    """The error at every step as p → ∞, ``e(t+1) = ((1 - ηλ(t)) I - ηḠ) e(t) + ηλ(t) y``.

    Derivation. With k(t) = 1 - ηλ(t) and Π(t) their product so far, the steps of β add up to
    ``β(t) = Π(t) β(0) + (1/√p) Σ_{j<t} η (Π(t)/Π(j+1)) ψ(W(j)Xᵀ) e(j)``. For a fixed t every w_r has moved by
    O(1/√p), so as p → ∞ ``ψ(XW(t)ᵀ) ψ(W(j)Xᵀ)/p → Ḡ``, while what the moves of W add to β(0)ᵀψ(W(t)Xᵀ)/√p are
    averages of β_r(0) b_r (the entries of H), which vanish. Hence ``f(t) = Π(t) f(0) + Ḡ α(t)`` with
    ``α(t+1) = k(t) α(t) + η e(t)``, so ``f(t+1) = k(t) f(t) + ηḠ e(t)``, and ``e = y - f`` gives the recursion. Without
    ridge it is ``e(t) = (I - ηḠ)ᵗ e(0)``: no b in it, which is why wide networks do not align. f(0) stays random
    as p → ∞, of law N(0, Ḡ), so e(0) is an argument.

    Exact in the limit only: at finite p the discrepancy at fixed t is O(1/√p). It does not hold at times that grow
    with √p, where a constant ridge has aligned β with b and H is no longer small.

    Args:
        kernel: Ḡ [*runs n n].
        error: e(0) [*runs n].
        y: Targets [*runs n].
        rate: η.
        strengths: λ(0), …, λ(steps - 1) [*runs steps]; zeros for none.

    Returns:
        e(0), …, e(steps) [*runs steps+1 n].

    Raises:
        ValueError: The rate is not positive, or shapes do not fit.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), section 3; the ridge term read as 1 - ηλ(t).
    """
    positive("rate", rate)
    runs = torch.broadcast_shapes(kernel.shape[:-2], error.shape[:-1], y.shape[:-1], strengths.shape[:-1])
    e = error.expand(*runs, -1)
    trajectory = [e]
    for strength in strengths.unbind(-1):
        shrink = rate * strength[..., None]
        e = (1 - shrink) * e - rate * (kernel @ e[..., None])[..., 0] + shrink * y
        trajectory.append(e)
    return torch.stack(trajectory, dim=-2)
