"""Ḡ: the kernel of the output weights in a network of infinite width."""

from collections.abc import Callable
from math import pi

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public
from falign.theory.two_layer.activations import Activation
from falign.theory.two_layer.kernels.expectation import pair_means


@public
def limiting_kernel(
    X: Float[Tensor, "*runs n d"], activation: Activation, *, tolerance: float = 1e-10
) -> Float[Tensor, "*runs n n"]:
    """The mean of G over Gaussian first-layer weights, ``Ḡ_ij = E_{w~N(0,I_d)} ψ(wᵀx_i) ψ(wᵀx_j)``.

    Closed forms for identity, relu and erf; any other activation by ``expectation.pair_means``. The paper prints
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
    if activation.name in CLOSED_FORMS:
        return CLOSED_FORMS[activation.name](X)
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


CLOSED_FORMS: dict[str, Callable[[Float[Tensor, "*runs n d"]], Float[Tensor, "*runs n n"]]] = {
    "identity": _linear,
    "relu": _arc_cosine,
    "erf": _arc_sine,
}
"""Name of an activation -> its Ḡ."""
