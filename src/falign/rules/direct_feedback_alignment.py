"""Direct feedback alignment."""

from dataclasses import dataclass
from typing import ClassVar

from falign.rules._direct import DirectRule

__all__ = ["DirectFeedbackAlignment"]


@dataclass(frozen=True, kw_only=True)
class DirectFeedbackAlignment(DirectRule):
    """Every layer receives the output's error through a fixed random matrix of its own, all at once.

    ``error at x_l = e B_l`` with B_l (outputs, features of x_l), ``e`` the gradient at the output. The products with Wᵀ
    are never computed and no layer's backward waits for another's. Positions that output and x_l share each have their
    own e; the errors of those that only the output has are summed; to those that only x_l has, P of them, each is
    delivered, times 1/√P. A layer that runs once a position gets e_k B_l in its k-th call. What a convolution is given
    is one vector, B_l (outputs, C·H·W), unless the output has its positions, too.

    Args:
        positions: "each" (as above, at any length), or "all": where positions are not shared, one full map
            (all outputs, all elements of x_l), for the lengths of the example.

    Needs: ``example``, where the shapes cannot be read off the layers. Limits: poor on deep convolutional networks.

    Source: Nøkland 2016 (NeurIPS), eq. 7.
    """

    name: ClassVar[str] = "dfa"
    size: ClassVar[float] = 0.5
