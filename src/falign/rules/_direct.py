"""Options that the direct rules have in common."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

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
