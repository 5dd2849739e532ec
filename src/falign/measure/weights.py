"""A layer's feedback beside its weight, neuron by neuron."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from falign.layers import Layer, kind_of
from falign.measure.angles import Products

_PIECE = 1 << 16
"""Elements at a time, in whole rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """B beside W.

    Attributes:
        whole: ⟨B, W⟩, |B|², |W|².
        same: Share of the entries that have the same sign.
        neurons: ⟨B[:, k], W[:, k]⟩ of every neuron (channel) k at the layer's input.
        cosines: The same over |B[:, k]| |W[:, k]|; 0 where one is zero.
    """

    whole: Products
    same: float
    neurons: Float[Tensor, " in"]
    cosines: Float[Tensor, " in"]

    def row(self) -> dict[str, Any]:
        """The columns of a layer's row."""
        return {
            "weight_angle": self.whole.angle,
            "norm_ratio": (self.whole.one / self.whole.other) ** 0.5 if self.whole.other > 0 else None,
            "sign_agreement": self.same,
            "neurons": len(self.neurons),
            "aligned_neurons": float((self.neurons > 0).double().mean()),
        }


def compare(feedback: Tensor, weight: Tensor, layer: Layer) -> Weights:
    """Compare a feedback with the weight of its shape.

    Args:
        feedback: B as it carries the error, signs included.
        weight: W.
        layer: The layer that they are of.
    """
    kind = kind_of(layer)
    assert kind is not None
    same, sums = 0.0, [torch.zeros((), dtype=torch.float64, device=weight.device) for _ in range(3)]
    for b, w in _pieces(feedback, weight, whole=kind.name != "linear"):
        product = b * w
        same += float((product > 0).sum())
        sums = [
            total + kind.outgoing(part, layer).double()
            for total, part in zip(sums, (product, b * b, w * w), strict=True)
        ]
    inner, one, other = sums
    size = one.sqrt() * other.sqrt()
    return Weights(
        whole=Products(*(float(total.sum()) for total in sums)),
        same=same / max(1, weight.numel()),
        neurons=inner,
        cosines=torch.where(size > 0, inner / size, 0.0),
    )


def _pieces(feedback: Tensor, weight: Tensor, *, whole: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Both by rows, so few that a piece stays in the cache and its sums lose nothing; channels belong together."""
    if weight.dtype.itemsize < 4:
        feedback, weight = feedback.float(), weight.float()
    rows = len(weight) if whole else max(1, _PIECE // max(1, weight.shape[1:].numel()))
    yield from zip(feedback.split(rows), weight.split(rows), strict=True)
