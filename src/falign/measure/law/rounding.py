"""How far rounding alone can move the balance of a neuron within a stretch of steps."""

from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor

STRETCH = 16
"""Steps between two looks at what is left of the balance: a wrong gradient shows beside the rounding of so few steps,
however long the training, and looking costs little beside counting."""
_UPDATES = 2.0 * STRETCH
"""Of roundings of all weights: at most ``STRETCH`` where all steps round alike (constant gradients: 13 were seen), a
random walk of √(STRETCH/3) = 2.3 where they do not (7 were seen, the largest of all neurons and stretches)."""
_PASSES = 8.0
"""Of roundings of the length of a stretch's steps; 2 were seen."""
_SUMS = 16.0
"""Of roundings of the sums themselves, which are float64."""


def roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error of one operation; products of float32 may be of TF32 on a GPU."""
    short = dtype is torch.float32 and device.type == "cuda" and _shortened()
    return 2.0**-11 if short else torch.finfo(dtype).eps / 2


def bound(
    *, updates: float, passes: float, spread: Tensor, length: Tensor, moved: Tensor, size: Tensor
) -> Float[Tensor, " neurons"]:
    """What rounding can add to C in a stretch.

    ``32 u √Σ(∂C/∂p · p)² + 8 v |w| √(2 · 16 · ½Ση²|∇w|²) + 16 · 1e-16 size``. The first term is that of the updates:
    every step rounds every weight p by up to u|p|, independently of the others, which moves C by ∂C/∂p · u|p|. The
    second is that of the passes: both sides of ``⟨w, ∇w⟩ + b∇b = ⟨B, ∇W⟩`` are off by v of what they are sums of, in
    all steps alike; by Cauchy and Schwarz the way Ση|∇w| is at most ``√(steps · Ση²|∇w|²)``. The factors are those of
    the largest neuron of correct trainings, with room.

    Args:
        updates: u, unit roundoff of the weights.
        passes: v, the largest of what took part in the passes.
        spread: √Σ(∂C/∂p · p)² over the weights of each neuron.
        length: |w|² + b² of each neuron.
        moved: What C gained by the steps, ½Ση²|∇w|², since the stretch began.
        size: Of the terms of C.
    """
    way = (length * 2 * STRETCH * moved.abs()).sqrt()
    return _UPDATES * updates * spread + _PASSES * passes * way + _SUMS * torch.finfo(torch.float64).eps / 2 * size


def _shortened() -> bool:
    with suppress(RuntimeError):  # it is set in a newer way, which forbids to ask in this one
        return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    return True
