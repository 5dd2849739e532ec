"""What the engines measure, from β, b and e."""

import warnings
from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import outermost

ALWAYS = ("loss", "cosine", "beta_norm", "b_dot_beta", "beta_change", "weight_change", "weight_growth")
"""What every engine measures that knows each neuron's weights."""


def chosen(names: Collection[str] | None, known: Collection[str]) -> frozenset[str]:
    """The measurements asked for; all where none are named.

    Raises:
        ValueError: an engine knows no such measurement here, or none was asked for.
    """
    if names is None:
        return frozenset(known)
    unknown = sorted(set(names) - set(known))
    if unknown or not names:
        what = f"unknown measurement {unknown[0]!r}" if unknown else "no measurement was named"
        raise ValueError(f"{what}: choose from {', '.join(sorted(known))}")
    return frozenset(names)


def warn_of_divergence(measured: Float[Tensor, "runs times"], steps: Sequence[int]) -> None:
    """Say that runs are no longer finite, and from which of the steps on.

    Warns:
        UserWarning: one is not.
    """
    lost = ~measured.isfinite()
    if lost.any():
        first = int(lost.any(0).int().argmax())
        warnings.warn(
            f"{int(lost.any(1).sum())} of {len(lost)} runs are no longer finite, the first at step {steps[first]}: "
            "their numbers are nan from there; choose a smaller rate, or a weaker penalty",
            stacklevel=4,
        )


def told_of_divergence(
    found: dict[str, Float[Tensor, "seeds penalties"]], step: int
) -> dict[str, Float[Tensor, "seeds penalties"]]:
    """What an engine measured, said to be lost where it is; not to a function of ours, which says it itself."""
    if outermost():
        warn_of_divergence(torch.stack([value.flatten() for value in found.values()]).sum(0).unsqueeze(1), [step])
    return found


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


def travelled(
    now: Float[Tensor, "seeds penalties p d"], before: Float[Tensor, "seeds p d"]
) -> dict[str, Float[Tensor, "seeds penalties"]]:
    """``max_r |w_r - w_r(0)|`` and ``½(|W|² - |W(0)|²)``, one seed after the other."""
    far, growth = [], []
    for after, start in zip(now, before, strict=True):
        change = after - start
        far.append(largest(change))
        growth.append((change * (start + change / 2)).sum((-1, -2)))
    return {"weight_change": torch.stack(far), "weight_growth": torch.stack(growth)}


def error_cosine(
    e: Float[Tensor, "seeds penalties n k"],
    b: Float[Tensor, "seeds #penalties p k"],
    beta: Float[Tensor, "seeds penalties p k"],
) -> Float[Tensor, "seeds penalties"]:
    """Mean over the points of ``cos∠(b e_i, β e_i)``, from the k × k products of b and β.

    Points whose error is 0 have no direction and are left out; errors are brought to size 1 first, as the squares of
    small ones would be lost.
    """
    size = e.abs().amax(-1, keepdim=True)
    seen = size[..., 0] > 0
    e = e / torch.where(size > 0, size, 1.0)

    def product(left: Tensor, right: Tensor) -> Tensor:
        return ((e @ (left.mT @ right)) * e).sum(-1)

    norms = (product(b, b).clamp_min(0) * product(beta, beta).clamp_min(0)).sqrt()
    return ratio(product(b, beta), norms).sum(-1) / seen.sum(-1).clamp_min(1)
