"""The descent of the loss under any rule: alignment × gradient × update, and the hidden layers' part in it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public
from falign.theory.inputs import alike


@dataclass(frozen=True, kw_only=True)
class Split:
    """``-dL/dt = Σ_l ⟨g_l, f_l⟩ = Σ_l cos∠(g_l, f_l) |g_l| |f_l|``, g the true gradient, f what the rule takes.

    Attributes:
        alignment: cos∠(g_l, f_l), 0 where one of them is.
        gradient: |g_l|.
        update: |f_l|.
        descent: Their product, ⟨g_l, f_l⟩.
    """

    alignment: Float[Tensor, "*times layers"]
    gradient: Float[Tensor, "*times layers"]
    update: Float[Tensor, "*times layers"]
    descent: Float[Tensor, "*times layers"]

    @property
    def total(self) -> Float[Tensor, "*times"]:
        """``-dL/dt``."""
        return self.descent.sum(-1)

    @property
    def dominance(self) -> Float[Tensor, "*times"]:
        """``D = Σ_{l<L} ⟨g_l, f_l⟩ / |g_L|²``: the loss falls where D > -1, as f_L = g_L."""
        return self.descent[..., :-1].sum(-1) / self.gradient[..., -1].square()


@public
def split(
    descent: Float[Tensor, "*times layers"],
    gradient_norm: Float[Tensor, "*times layers"],
    taken_norm: Float[Tensor, "*times layers"],
) -> Split:
    """The split of ⟨g_l, f_l⟩, |g_l| and |f_l|, as ``Course`` and ``falign.measure.alignment`` have them.

    Args:
        descent: ⟨g_l, f_l⟩, the output layer last.
        gradient_norm: |g_l|.
        taken_norm: |f_l|.

    Raises:
        ValueError: the three have not the same shape.

    Source: after Robertson and Koyejo 2024 (ICML), whose summary names the three components; the formula is ours.
    """
    alike(descent=descent, gradient_norm=gradient_norm, taken_norm=taken_norm)
    norms = gradient_norm * taken_norm
    cosine = torch.where(norms > 0, descent / torch.where(norms > 0, norms, 1.0), 0.0)
    return Split(alignment=cosine, gradient=gradient_norm, update=taken_norm, descent=descent)


@public
def largest_kappa(dominance: Float[Tensor, "*runs times"]) -> Float[Tensor, "*runs"]:
    """``κ = 1 + min_t D(t)``: the largest with ``Σ_{l<L} ⟨g_l, f_l⟩ ≥ -(1 - κ) |g_L|²`` at every recorded time.

    Then ``dL/dt ≤ -κ |g_L|²``. Alignment dominance holds where κ > 0; above 1 the hidden layers help throughout.

    Raises:
        ValueError: there is no time.

    Source: the definition is our reading of "alignment dominance", Robertson and Koyejo 2024 (ICML), whose own was not
    available; there κ is capped at 1.
    """
    alike(dominance=dominance)
    return 1 + dominance.amin(-1)
