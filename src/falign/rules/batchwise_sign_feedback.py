"""Sign-symmetric feedback with magnitudes that are fresh in every pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from falign.rules.rule import Rule, signed
from falign.scratch import plain_eager

if TYPE_CHECKING:
    from falign.scratch import Scratch
    from falign.wiring import Feedback


@dataclass(frozen=True, kw_only=True)
class BatchwiseRandomSignFeedback(Rule):
    """B = |B_t| ⊙ sign(W) with other random magnitudes in every training pass t.

    |B_t| is the layer's pool |B₀| (as many draws as W has entries) turned by a random number of places. So the
    magnitude of each weight is an independent fresh draw from the pool in every pass, and a pass costs no drawing:
    drawing 17 million normals for a 4096 x 4096 layer takes longer than its whole step. What is not independent are
    two weights of the same layer in different passes: where one pass has a run of magnitudes, another has the same
    run elsewhere. The number of places is a function of (how many passes there were), kept in the buffer ``passes``.
    Evaluation draws nothing: a pass with ``model.eval()`` keeps the last magnitudes.

    Needs: the sign of W. Limits: one bit of the weight is transported.

    Source: Liao, Leibo and Poggio 2016 (AAAI), "batchwise random-magnitude sign-concordant feedback".
    """

    name: ClassVar[str] = "brsf"

    def stored(self, draw: Callable[[], Tensor], deviation: float) -> Tensor:
        """The pool |B₀|."""
        return draw().abs()

    def state(self) -> dict[str, Tensor]:
        """How many training passes there were."""
        return {"passes": torch.zeros((), dtype=torch.int64)}

    def sources(self, feedback: "Feedback", weight: Tensor, *, advance: bool) -> tuple[Tensor, ...]:
        """(pool, places to turn it by, W)."""
        if advance:
            feedback.passes.add_(1)
        return feedback.matrix, _places(feedback.passes, weight.numel()), weight.detach()

    def effective(self, *sources: Tensor, scratch: "Scratch | None" = None) -> Tensor:
        """|B_t| ⊙ sign(W)."""
        pool, places, weight = sources
        pool = pool.reshape(-1)
        if pool.device.type == "cpu" and plain_eager(*sources):
            turn = int(places)
            return signed(weight, [pool[turn:], pool[:turn]] if turn else [pool], scratch)
        index = (torch.arange(pool.numel(), device=pool.device) + places) % pool.numel()
        return signed(weight, [pool[index]], scratch)


def _places(passes: Tensor, size: int) -> Tensor:
    """A pseudo-random number in [0, size) for every number of passes (two rounds of a 32-bit mixing function)."""
    mixed = passes * 0x9E3779B1 & 0xFFFFFFFF
    for factor in (0x21F0AAAD, 0x735A2D97):
        mixed = (mixed ^ (mixed >> 15)) * factor & 0xFFFFFFFF
    return (mixed ^ (mixed >> 15)) % size
