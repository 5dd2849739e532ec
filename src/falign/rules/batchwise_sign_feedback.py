"""Sign-symmetric feedback with magnitudes that are fresh in every pass."""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor

from falign._scratch import Scratch, plain_eager, signed
from falign.rules.rule import LayerState, Rule

__all__ = ["BatchwiseRandomSignFeedback"]


@dataclass(frozen=True, kw_only=True)
class BatchwiseRandomSignFeedback(Rule):
    """B = |B_t| ⊙ sign(W) with other random magnitudes in every training pass t.

    |B_t| is a pool |B₀| of as many draws as W has entries, N, turned by ``t · stride mod N`` places, the stride near
    the golden section of N and without a common divisor with it. So every weight meets every draw of the pool once
    in N passes: the magnitudes of one weight over time are independent fresh draws, as are those of all weights
    within a pass. Not independent is what one weight has now and another had earlier. It costs no drawing: 17 million
    normals for a 4096 x 4096 layer would take longer than its whole step. The buffer ``passes`` holds t.
    Evaluation draws nothing: a pass with ``model.eval()`` keeps the last magnitudes.

    Needs: the sign of W. Limits: one bit of the weight is transported.

    Source: Liao, Leibo and Poggio 2016 (AAAI), "batchwise random-magnitude sign-concordant feedback".
    """

    advances: ClassVar[bool] = True
    fresh: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = True
    magnitudes: ClassVar[bool] = True
    name: ClassVar[str] = "brsf"

    def init_feedback(self, draw: Callable[[], Tensor], deviation: float) -> Tensor:
        """The pool |B₀|."""
        return draw().abs()

    def state(self) -> dict[str, Tensor]:
        """Count of the training passes so far."""
        return {"passes": torch.zeros((), dtype=torch.int64, device="cpu")}

    def feedback_inputs(self, layer: LayerState, weight: Tensor | None, *, advance: bool) -> tuple[Tensor, ...]:
        """(pool, places to turn it by, W), or the pool's two pieces and W where the number can be read."""
        assert weight is not None
        passes, size = layer.get_buffer("passes"), max(1, weight.numel())
        if advance:
            passes = passes + 1
            layer.remember("passes", passes)
        pool, weight = layer.matrix, weight.detach()
        if pool.device.type == "cpu" and plain_eager(pool, weight, recorded=True):
            turn = int(passes) * _stride(size) % size  # as two slices: no index as large as the pool
            pool = pool.reshape(-1)  # not a view where the model is channels_last
            return pool[turn:], pool[:turn], weight
        return pool, passes * _stride(size) % size, weight

    def feedback_matrix(self, *inputs: Tensor, scratch: Scratch | None = None) -> Tensor:
        """|B_t| ⊙ sign(W)."""
        pool, places, weight = inputs
        if places.dim() == 1:
            return signed(weight, [pool, places], scratch)
        pool = pool.reshape(-1)
        index = (torch.arange(pool.numel(), device=pool.device) + places) % pool.numel()
        return signed(weight, [pool[index]], scratch)


def _stride(size: int) -> int:
    """A number near the golden section of size without a common divisor: its multiples visit every place once."""
    stride = max(1, round(size * 0.6180339887498949))
    while gcd(stride, size) > 1:
        stride += 1
    return stride
