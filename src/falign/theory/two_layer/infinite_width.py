"""The error of a two-layer network of infinite width under feedback alignment, with and without ridge."""

import torch
from jaxtyping import Float
from torch import Tensor


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

    Source: Song, Xu and Lafferty 2021 (NeurIPS), section 3; the ridge term read as 1 - ηλ(t).
    """
    runs = torch.broadcast_shapes(kernel.shape[:-2], error.shape[:-1], y.shape[:-1], strengths.shape[:-1])
    e = error.expand(*runs, -1)
    course = [e]
    for strength in strengths.unbind(-1):
        shrink = rate * strength[..., None]
        e = (1 - shrink) * e - rate * (kernel @ e[..., None])[..., 0] + shrink * y
        course.append(e)
    return torch.stack(course, dim=-2)
