"""Options that the direct rules have in common."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from falign.rules.rule import Rule


@dataclass(frozen=True, kw_only=True)
class DirectRule(Rule):
    """Base of the direct rules.

    Args:
        positions: "each": positions that a layer's input alone has get the same error each, B (outputs, features),
            times 1/√P, at any length; "all": one full map (all outputs, all elements of x), for the example's lengths.
        limit: Mean square m of a cut input x, over the batch, above which no error drives it further out: the error
            delivered there becomes ``e_x + max(0, 1 - limit/m) (|e_x|/|x|) x``, norms over the batch. 0: none. No layer
            knows how much the others add to the output, so that units without a bound (ReLU) can run away together.
    """

    wiring: ClassVar = "direct"
    positions: Literal["each", "all"] = "each"
    limit: float = 0.0

    def __post_init__(self) -> None:
        if self.positions not in ("each", "all"):
            raise ValueError(f"{self.name}: positions is {self.positions!r}, expected each or all")
        if not 0 <= self.limit < math.inf:
            raise ValueError(f"{self.name}: limit is {self.limit}, expected a mean square from 0 (none)")


def limit_of(rule: Rule) -> float:
    """Give the mean square of a cut input above which a direct rule drives it no further out; 0 for none."""
    return getattr(rule, "limit", 0.0)


def confined(error: Tensor, x: Tensor, limit: float) -> Tensor:
    """Take from the error at x what drives x further out, as far as its mean square is above the limit.

    ``e + max(0, 1 - limit/m) (|e|/|x|) x``: far above the limit a step along -e never has x grow.
    """
    exact = torch.promote_types(x.dtype, torch.float32)  # squares overflow in half precision
    size, norm = torch.linalg.vector_norm(error, dtype=exact), torch.linalg.vector_norm(x, dtype=exact)
    above = (1 - limit * x.numel() / norm.square()).clamp(min=0)  # -inf of a silent layer
    return error + (above * size / norm.clamp(min=torch.finfo(exact).tiny)).to(error.dtype) * x.to(error.dtype)
