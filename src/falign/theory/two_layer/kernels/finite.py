"""G and H: the kernels of a network of finite width, at the start and along training."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public
from falign.theory.two_layer.activations import Activation


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
        """Smallest and largest eigenvalue of G, H and G + H: ``G_min``, ``G_max``, ``H_min``, … ``sum_max``."""
        found = {}
        for name, kernel in (("G", self.G), ("H", self.H), ("sum", self.G + self.H)):
            eigenvalues = torch.linalg.eigvalsh(kernel)
            found[f"{name}_min"], found[f"{name}_max"] = eigenvalues[..., 0], eigenvalues[..., -1]
        return found


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
    """G and H from the inputs X [*runs n d] and the first layer's weights W [*runs p d]; see ``kernels``."""
    return kernels(W @ X.mT, X @ X.mT, beta, b, activation)
