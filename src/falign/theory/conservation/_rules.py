"""What carries the error in a rule, and the potential V whose growth is the alignment that the law speaks of."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from falign._validation import told
from falign.theory._coerce import public, typed

Entries = Callable[[Tensor, Tensor], Tensor]
"""(B as stored, W) -> a tensor of W's shape."""


def _no_motion(B: Tensor, W: Tensor, dW: Tensor, pull: float, rho: float) -> Tensor:
    return torch.zeros_like(B)


def _no_remainder(B: Tensor, W: Tensor, dB: Tensor, dW: Tensor) -> Tensor:
    return torch.zeros_like(W)


@typed
@dataclass(frozen=True, kw_only=True)
class FeedbackRule:
    """A rule: feedback M = effective(B, W), and ``V[k] = Σ_j potential(B, W)[j, k]`` with ``∂V/∂W = M`` where B rests.

    Attributes:
        name: The word that ``falign.convert`` has for it.
        effective: (B, W) -> M, the matrix that carries the error in a pass.
        potential: (B, W) -> the entries whose sum over the next layer's neurons is V.
        motion: (B, W, Ẇ, r λ, ρ) -> Ḃ in gradient flow.
        remainder: (B, W, Ḃ, Ẇ) -> the entries of ``V̇ - ⟨M, Ẇ⟩``: what the motion of B does to V.
        follows: In steps, B moves before the pass, to the weights that the pass sees, and not with them.
        direct: B [outputs, neurons] carries the output's error to every hidden layer; V is the last one's only.
        stored: A normal draw of B's shape and scale -> B; None where the weights are all the feedback there is.
    """

    name: str
    effective: Entries
    potential: Entries
    motion: Callable[[Tensor, Tensor, Tensor, float, float], Tensor] = _no_motion
    remainder: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _no_remainder
    follows: bool = False
    direct: bool = False
    stored: Callable[[Tensor], Tensor] | None = torch.clone


@public
def entrywise(name: str, feedback: Callable[[Tensor], Tensor], potential: Callable[[Tensor], Tensor]) -> FeedbackRule:
    """The rule whose feedback is a function of the weights, entry by entry: ``M = g(W)``, ``V = Σ_j G(W[j, k])``.

    Args:
        name: Of the rule.
        feedback: g.
        potential: G, with G' = g.
    """
    return FeedbackRule(name=name, effective=lambda B, W: feedback(W), potential=lambda B, W: potential(W), stored=None)


def _stay(B: Tensor, W: Tensor) -> Tensor:
    return B


def _product(B: Tensor, W: Tensor) -> Tensor:
    return B * W


def _signed(B: Tensor, W: Tensor) -> Tensor:
    return B * W.sign()


def _magnitude(B: Tensor, W: Tensor) -> Tensor:
    return B * W.abs()


RULES: dict[str, FeedbackRule] = {
    rule.name: rule
    for rule in (
        entrywise("bp", lambda W: W, lambda W: W.square() / 2),
        FeedbackRule(name="fa", effective=_stay, potential=_product),
        FeedbackRule(
            name="usf",
            effective=_signed,
            potential=_magnitude,
            stored=lambda drawn: torch.full_like(drawn, drawn.shape[-1] ** -0.5),
        ),
        FeedbackRule(name="frsf", effective=_signed, potential=_magnitude, stored=torch.abs),
        FeedbackRule(
            name="kp",
            effective=_stay,
            potential=lambda B, W: B * W - W.square() / 2,
            motion=lambda B, W, dW, pull, rho: dW + pull * (W - B),
            remainder=lambda B, W, dB, dW: (dB - dW) * W,
        ),
        FeedbackRule(
            name="adafa",
            effective=_stay,
            potential=_product,
            motion=lambda B, W, dW, pull, rho: rho * (W - B),
            remainder=lambda B, W, dB, dW: dB * W,
            follows=True,
        ),
        FeedbackRule(name="dfa", effective=_stay, potential=_product, direct=True),
    )
}
"""name -> rule.

| rule | M | V of neuron k | B moves |
|---|---|---|---|
| bp | W | ½ Σ_j W[j, k]² | |
| fa | B | Σ_j B[j, k] W[j, k] | |
| usf, frsf | B ⊙ sign W, B ≥ 0 | Σ_j B[j, k] abs W[j, k] | |
| kp | B | Σ_j (B W - ½ W²)[j, k] | as W, with the same decay |
| adafa | B | Σ_j B[j, k] W[j, k] | Ḃ = ρ (W - B): V̇ = ⟨B, Ẇ⟩ + ⟨Ḃ, W⟩ |
| dfa | B of the last hidden layer | Σ_j B[j, k] W[j, k] there, none below | |
"""


def rule(name: str) -> FeedbackRule:
    """The rule of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"unknown rule {told(name)}: choose one of {', '.join(RULES)}")
    return RULES[name]
