"""Weight mirror: feedback that learns the weights from their answers to noise, in a phase of its own."""

from dataclasses import dataclass
from typing import ClassVar

from falign.rules.rule import Rule

__all__ = ["WeightMirror"]


@dataclass(frozen=True, kw_only=True)
class WeightMirror(Rule):
    """Feedback alignment whose B is turned towards W between training steps, by noise.

    In training ``δ_{l-1} = φ' ⊙ B_lᵀ δ_l`` with B_l as it stands. In the mirroring phase, ``falign.mirror``, a layer
    alone is given noise x ~ N(0, 1), answers y = W x, and its feedback synapses see both:

        B ← (1 - rate) B + rate · E[y xᵀ],    E[y xᵀ] = W,

    the mean over a batch (for a convolution over its positions, too). No weight is read: what W does to noise is all
    that B learns from. One pass leaves B a relative error of about √(rate/2 · inputs / batch) behind it.

    Args:
        rate: of a mirroring pass.

    Needs: ``falign.mirror(model)`` now and then, as W moves. Limits: layers alone; a parameter that is multiplied
    outside of one does not answer noise by itself.

    Source: Akrout, Wilson, Humphreys, Lillicrap and Tweed 2019 (NeurIPS), algorithm 1; there with weight decay in place
    of the mean's forgetting.
    """

    name: ClassVar[str] = "wm"
    adapts: ClassVar[bool] = True
    answers_noise: ClassVar[bool] = True
    rate: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"wm: rate is {self.rate}, expected a number above 0, at most 1")
