"""Rules of feedback in closed form: the matrix M that returns the error, and the alignment term V of the law."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from falign._validation import named
from falign.theory._coerce import public, typed

MatrixFunction = Callable[[Tensor, Tensor], Tensor]
"""(stored feedback B, weights W) -> a tensor of W's shape."""


def _no_motion(B: Tensor, W: Tensor, dW: Tensor, pull: float, rho: float) -> Tensor:
    return torch.zeros_like(B)


def _no_remainder(B: Tensor, W: Tensor, dB: Tensor, dW: Tensor) -> Tensor:
    return torch.zeros_like(W)


@typed
@dataclass(frozen=True, kw_only=True)
class FeedbackRule:
    """A rule of feedback: ``M = feedback_matrix(B, W)`` and ``V[k] = Σ_j alignment_term(B, W)[j, k]``.

    The conservation law needs ``∂V/∂W = M`` while B is constant: V then grows by ``⟨M, ΔW⟩`` to first order, which is
    what the error returned through M adds to ``½ |w|²`` of the neuron below.

    Attributes:
        name: As ``falign.convert`` takes it.
        feedback_matrix: (B, W) -> M, the matrix that the error is multiplied with in a pass.
        alignment_term: (B, W) -> entries whose sum over the next layer's neurons j is V.
        motion: (B, W, Ẇ, r λ, ρ) -> Ḃ in gradient flow.
        remainder: (B, W, Ḃ, Ẇ) -> entries of ``V̇ - ⟨M, Ẇ⟩``: what the motion of B adds to V.
        follows: In steps, B moves before the pass, towards the weights of that pass, not together with the weights.
        direct: B [outputs, neurons] takes the output's error to every hidden layer; only the last one has a V.
        init_feedback: (a normal draw of B's shape and scale) -> initial B; None if the rule stores no feedback.
    """

    name: str
    feedback_matrix: MatrixFunction
    alignment_term: MatrixFunction
    motion: Callable[[Tensor, Tensor, Tensor, float, float], Tensor] = _no_motion
    remainder: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _no_remainder
    follows: bool = False
    direct: bool = False
    init_feedback: Callable[[Tensor], Tensor] | None = torch.clone


@public
def entrywise(
    name: str, feedback: Callable[[Tensor], Tensor], alignment_term: Callable[[Tensor], Tensor]
) -> FeedbackRule:
    """Make a rule whose feedback is a function of the weights, entry by entry: ``M = g(W)``, ``V = Σ_j G(W[j, k])``.

    Args:
        name: Of the rule.
        feedback: g.
        alignment_term: G, with G' = g.
    """
    return FeedbackRule(
        name=name,
        feedback_matrix=lambda B, W: feedback(W),
        alignment_term=lambda B, W: alignment_term(W),
        init_feedback=None,
    )


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
        FeedbackRule(name="fa", feedback_matrix=_stay, alignment_term=_product),
        FeedbackRule(
            name="usf",
            feedback_matrix=_signed,
            alignment_term=_magnitude,
            init_feedback=lambda drawn: torch.full_like(drawn, drawn.shape[-1] ** -0.5),
        ),
        FeedbackRule(name="frsf", feedback_matrix=_signed, alignment_term=_magnitude, init_feedback=torch.abs),
        FeedbackRule(
            name="kp",
            feedback_matrix=_stay,
            alignment_term=lambda B, W: B * W - W.square() / 2,
            motion=lambda B, W, dW, pull, rho: dW + pull * (W - B),
            remainder=lambda B, W, dB, dW: (dB - dW) * W,
        ),
        FeedbackRule(
            name="adafa",
            feedback_matrix=_stay,
            alignment_term=_product,
            motion=lambda B, W, dW, pull, rho: rho * (W - B),
            remainder=lambda B, W, dB, dW: dB * W,
            follows=True,
        ),
        FeedbackRule(name="dfa", feedback_matrix=_stay, alignment_term=_product, direct=True),
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
    """Look up a rule by its name.

    Raises:
        ValueError: there is none.
    """
    return named("rule", name, RULES)
