"""Refusals of layers that do not fit each other, and of data and batches that do not fit a network."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from falign.theory.inputs import floats, told, whole


def fits_layers(W: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Refuse weights [runs out in] that are no chain, and biases of other shapes.

    Raises:
        ValueError: they do not fit.
    """
    shapes, biases = [tuple(part.shape) for part in W], [tuple(part.shape) for part in b]
    chained = bool(shapes) and all(len(shape) == 3 for shape in shapes)
    chained = chained and all(one[:2] == (other[0], other[2]) for one, other in pairwise(shapes))
    if not chained or (biases and biases != [shape[:2] for shape in shapes]):
        raise ValueError(f"weights {shapes} and biases {biases} are no network: expected [runs out in] and [runs out]")


def fits_inputs(W: Tensor, X: Tensor) -> None:
    """Refuse inputs of another shape or type than the first layer's.

    Raises:
        ValueError: they do not fit.
    """
    floats(inputs=X)
    if X.ndim not in (2, 3) or X.shape[-1] != W.shape[-1] or (X.ndim == 3 and len(X) not in (1, len(W))):
        raise ValueError(
            f"inputs have shape {tuple(X.shape)}, the network wants (points, {W.shape[-1]}) for all of its "
            f"{len(W)} runs or for each"
        )
    if X.dtype != W.dtype:
        raise ValueError(f"inputs are {X.dtype}, the weights {W.dtype}: pass X.to(W.dtype)")


def fits_targets(f: Tensor, y: Tensor) -> None:
    """Refuse targets of another shape than the outputs.

    Raises:
        ValueError: they do not fit.
    """
    floats(targets=y)
    if y.ndim not in (2, 3) or y.shape[-2:] != f.shape[-2:] or (y.ndim == 3 and len(y) not in (1, len(f))):
        raise ValueError(f"targets have shape {tuple(y.shape)}, the outputs {tuple(f.shape)}: one row a point")


def count_of(steps: int | Tensor, n: int) -> int:
    """The number of steps; of batches, each names points.

    Raises:
        ValueError: they are no whole numbers, or name points that are not there.
    """
    if not isinstance(steps, Tensor):
        if not whole(steps) or steps < 0:
            raise ValueError(
                f"steps is {told(steps)}, expected a whole number of at least 0, or the points of each batch"
            )
        return steps
    indices = not steps.is_floating_point() and not steps.is_complex() and steps.dtype != torch.bool
    if steps.ndim != 2 or not indices or (steps.numel() and not 0 <= int(steps.min()) <= int(steps.max()) < n):
        raise ValueError(f"batches of shape {tuple(steps.shape)} must be [steps batch] whole numbers below {n}")
    return len(steps)
