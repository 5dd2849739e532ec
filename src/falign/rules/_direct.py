"""Options that the direct rules have in common."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from falign.rules.rule import Rule


@dataclass(frozen=True, kw_only=True)
class DirectRule(Rule):
    """Base of the direct rules.

    Args:
        positions: "each": positions that a layer's input alone has get the same error each, B (outputs, features),
            times 1/√P, at any length; "all": one full map (all outputs, all elements of x), for the example's lengths.
    """

    wiring: ClassVar = "direct"
    positions: Literal["each", "all"] = "each"

    def __post_init__(self) -> None:
        if self.positions not in ("each", "all"):
            raise ValueError(f"{self.name}: positions is {self.positions!r}, expected each or all")
