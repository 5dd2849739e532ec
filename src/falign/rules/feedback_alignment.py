"""Feedback alignment."""

from dataclasses import dataclass
from typing import ClassVar

from falign.rules.rule import Rule

__all__ = ["FeedbackAlignment"]


@dataclass(frozen=True, kw_only=True)
class FeedbackAlignment(Rule):
    """The error returns layer by layer through fixed random weights.

    ``δ_{l-1} = φ' ⊙ B_lᵀ δ_l``, B_l of the shape of W_l, drawn once.

    Needs: nothing. Limits: weakens with depth and on convolutions.

    Source: Lillicrap, Cownden, Tweed and Akerman 2016 (Nature Communications 7, 13276), eq. for Δh_FA.
    """

    name: ClassVar[str] = "fa"
    size: ClassVar[float] = 0.7
