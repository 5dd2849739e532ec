"""Which neuron each element of an activation belongs to.

A label tensor has an activation's shape; its entry is the index of the neuron whose output that element is, up to
factors that do not depend on the neuron's size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

OTHER, ZERO = -1, -2
"""Labels of an element that is no output of the source, and of one that is zero, so that it may be anybody's."""


class Mark(NamedTuple):
    """What is known about an activation as an output of one source.

    Attributes:
        labels: The neuron of each element.
        bare: Whether it is the source's output itself, element by element in its order.
    """

    labels: Tensor
    bare: bool


def common(labels: Tensor, axes: list[int], keep: bool) -> tuple[Tensor, bool]:
    """The label shared along axes, zeros left out, and whether there is one."""
    highest = labels.amax(axes, keepdim=True)
    lowest = torch.where(labels == ZERO, highest, labels).amin(axes, keepdim=True)
    return highest if keep else labels.amax(axes), bool(torch.equal(lowest, highest))


def columns(labels: Tensor, axis: int) -> Tensor | None:
    """The neuron of every feature along an axis, OTHER where there is none; None where samples or positions differ."""
    features = labels.movedim(axis, 0).flatten(1) if labels.dim() > 1 else labels[:, None]
    found, same = common(features, [1], False)
    return found.masked_fill(found == ZERO, OTHER) if same else None


def fresh(output: Tensor, axis: int) -> Tensor:
    """Labels of a source's own output: its features along an axis, in order."""
    shape = [1] * output.dim()
    shape[axis] = -1
    numbers = torch.arange(output.shape[axis], device=output.device).view(shape)
    return torch.empty_like(output, dtype=torch.int64).copy_(numbers)
