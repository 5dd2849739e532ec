"""Adaptive feedback alignment: feedback that tracks the weights."""

import threading
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from falign._scratch import plain_eager
from falign.rules.rule import LayerState, Rule

__all__ = ["AdaptiveFeedbackAlignment"]

_MOVING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class AdaptiveFeedbackAlignment(Rule):
    """B ← (1 - α) B + α W, once for every change of W.

    α = 0 is feedback alignment, α = 1 backpropagation. The move is made by the first forward pass that sees changed
    weights, whatever changed them, so it works with every optimizer, and gradient accumulation, several losses or
    two forwards before one backward do not move B twice. The change is noticed by |W|² (float64, kept in the buffer
    ``seen``, so a resumed run continues exactly). B and ``seen`` are in ``state_dict``.

    Not what "adaptive feedback alignment" is in work on PEPITA: that is ``afa``, forward weights times a random matrix.

    The text that defines the adaFA of Robertson and Koyejo 2024 is not available; this is our reading of it.

    Args:
        rate: α in [0, 1].

    Needs: the weights themselves, slowly. Limits: weight transport at rate α.

    Source: after Robertson and Koyejo 2024.
    """

    advances: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = True
    name: ClassVar[str] = "adafa"
    adapts: ClassVar[bool] = True
    size: ClassVar[float] = 0.3
    rate: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"adafa: rate is {self.rate}, expected a number from 0 (fa) to 1 (bp)")

    def state(self) -> dict[str, Tensor]:
        """|W|² of the weights last followed."""
        return {"seen": torch.tensor(-1.0, dtype=torch.float64, device="cpu")}

    def feedback_inputs(self, layer: LayerState, weight: Tensor | None, *, advance: bool) -> tuple[Tensor, ...]:
        """(B,), moved if the weights are not those that it has followed already."""
        if not advance:
            return (layer.matrix,)
        assert weight is not None
        matrix, weight = layer.matrix, weight.detach()
        with torch.no_grad():
            now = torch.linalg.vector_norm(weight, dtype=torch.float64)
            if matrix.device.type == "cpu" and plain_eager(matrix):
                with _MOVING:  # of several threads that see changed weights one follows them
                    if now != layer.get_buffer("seen"):
                        matrix.lerp_(weight, self.rate)
                        layer.remember("seen", now)
                return (matrix,)
            # Traced, transformed or on a GPU no number can be read without a wait: the move is made by arithmetic.
            moved = now != layer.get_buffer("seen")
            followed = torch.lerp(matrix, weight.to(matrix.dtype), moved.to(matrix.dtype) * self.rate)
            layer.remember("B", followed)
            layer.remember("seen", now)
        return (followed,)  # not the buffer: a later move must not reach into an earlier pass
