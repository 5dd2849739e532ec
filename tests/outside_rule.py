"""A rule of a user's own, outside the package: the suites take it as one rule more (``cases.RULES``)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from falign import Rule


@dataclass(frozen=True, kw_only=True)
class MixedFeedback(Rule):
    """B = (1 - mix) B₀ + mix W, taken anew at every pass.

    Args:
        mix: from 0 (fa) to 1 (bp).
    """

    name: ClassVar[str] = "mixed"
    size: ClassVar[float] = 0.7
    reads_weight: ClassVar[bool] = True
    mix: float = 0.25

    def __post_init__(self):
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mixed: mix is {self.mix}, expected a number from 0 (fa) to 1 (bp)")

    def feedback_inputs(self, layer, weight, *, advance):
        return layer.matrix, weight.detach()

    def feedback_matrix(self, *inputs, scratch=None):
        fixed, weight = inputs
        return torch.lerp(fixed, weight.to(fixed.dtype), self.mix)
