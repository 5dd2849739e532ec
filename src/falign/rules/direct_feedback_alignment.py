"""Direct feedback alignment."""

from dataclasses import dataclass
from typing import ClassVar

from falign.rules.rule import Rule

__all__ = ["DirectFeedbackAlignment"]


@dataclass(frozen=True, kw_only=True)
class DirectFeedbackAlignment(Rule):
    """Every layer receives the output's error through a fixed random matrix of its own, all at once.

    ``error at x_l = e B_l`` with B_l (outputs, elements of one sample of x_l), ``e`` the gradient at the output. The
    products with Wᵀ are never computed and no layer's backward waits for another's.

    Needs: ``example``, where the shapes cannot be read off the layers. Limits: poor on deep convolutional networks.

    Source: Nøkland 2016 (NeurIPS), eq. 7.
    """

    name: ClassVar[str] = "dfa"
    size: ClassVar[float] = 0.5
    wiring: ClassVar = "direct"
