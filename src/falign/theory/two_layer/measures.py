"""What the engines measure, from β, b and e."""

import torch
from jaxtyping import Float
from torch import Tensor


def ratio(dot: Float[Tensor, "*runs"], norms: Float[Tensor, "*runs"]) -> Float[Tensor, "*runs"]:
    """A cosine from inner product and product of norms, 0 where a vector is zero."""
    return dot / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def alignment(
    b: Float[Tensor, "seeds #penalties p k"], beta: Float[Tensor, "seeds penalties p k"]
) -> dict[str, Float[Tensor, "seeds penalties"]]:
    """``cos∠(b, β)``, ``|β|`` and ``<b, β>``, over neurons and outputs together."""
    dot = (b * beta).sum((-1, -2))
    norm = beta.square().sum((-1, -2)).sqrt()
    return {
        "cosine": ratio(dot, norm * b.square().sum((-1, -2)).sqrt()),
        "beta_norm": norm,
        "b_dot_beta": dot,
    }


def largest(change: Float[Tensor, "*runs p width"]) -> Float[Tensor, "*runs"]:
    """``max_r |change_r|`` over the rows."""
    return change.square().sum(-1).amax(-1).sqrt()


def error_cosine(
    e: Float[Tensor, "seeds penalties n k"],
    b: Float[Tensor, "seeds #penalties p k"],
    beta: Float[Tensor, "seeds penalties p k"],
) -> Float[Tensor, "seeds penalties"]:
    """Mean over the points of ``cos∠(b e_i, β e_i)``, from the k × k products of b and β."""

    def product(left: Tensor, right: Tensor) -> Tensor:
        return ((e @ (left.mT @ right)) * e).sum(-1)

    norms = (product(b, b).clamp_min(0) * product(beta, beta).clamp_min(0)).sqrt()
    return ratio(product(b, beta), norms).mean(-1)
