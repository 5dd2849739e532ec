"""Kolen-Pollack: feedback weights that learn by the same rule as the forward weights."""

from dataclasses import dataclass
from typing import ClassVar

from falign.rules.rule import Rule

__all__ = ["KolenPollack"]


@dataclass(frozen=True, kw_only=True)
class KolenPollack(Rule):
    """Forward and feedback weights receive the same gradient, so weight decay makes them meet.

    ``δ_{l-1} = φ' ⊙ B_lᵀ δ_l``; B_l is a parameter whose gradient is that of W_l, the product of activities and
    errors that both synapses see. With SGD of rate η and decay λ on both, ``W - B`` shrinks by (1 - ηλ) a step,
    exactly. The decay is the optimizer's own ``weight_decay``, which acts on W and B alike; without it W - B stays
    what it was, and the rule is feedback alignment with B in motion.

    Needs: an optimizer made from ``model.parameters()`` after ``convert``, with ``weight_decay``.
    Limits: one weight gradient more a layer; twice the parameters (B is in ``state_dict``).

    Source: Kolen and Pollack 1994; Akrout et al. 2019 (NeurIPS), eqs. 16-17.
    """

    name: ClassVar[str] = "kp"
    learned: ClassVar[bool] = True
