"""The conservation law: ``C = ½ |w|² + ½ b² - V`` of every hidden neuron, and its exact change in a step."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from falign.theory._coerce import public
from falign.theory.conservation._network import Dynamics, State, feedback_matrices, stored_feedback

Neurons = Float[Tensor, "runs neurons"]
"""One number for every neuron of the hidden layers under the law, layer by layer."""


def lawful(state: State, dynamics: Dynamics) -> range:
    """Return the indices of the hidden layers under the law: all, or of a direct rule the last one.

    A direct rule sends the output's error to every layer; only for the last hidden layer is that the error of the
    layer above, as the proof needs it.

    Raises:
        ValueError: there is no hidden layer.
    """
    last = state.depth - 1
    if last < 1:
        raise ValueError(f"the network has {state.depth} layers: the law is of hidden neurons, which want two")
    return range(max(0, last - 1), last) if dynamics.rule.direct else range(last)


@public
def incoming(state: State, dynamics: Dynamics) -> Neurons:
    """Return ``P_k = ½ |w_k|² + ½ b_k²``, w_k the weights into neuron k."""
    return _joined(_half_square(state, k) for k in lawful(state, dynamics))


@public
def alignment_term(state: State, dynamics: Dynamics) -> Neurons:
    """Return V_k: ``⟨B[:, k], W[:, k]⟩`` for fa; ``RULES`` has that of each rule."""
    B = stored_feedback(state, dynamics)
    return _joined(
        dynamics.rule.alignment_term(B[layer], state.W[layer + 1]).sum(-2) for layer in lawful(state, dynamics)
    )


@public
def alignment(state: State, dynamics: Dynamics) -> Neurons:
    """Return ``⟨M[:, k], W[:, k]⟩`` with the feedback matrix M that the error is multiplied with."""
    matrices = feedback_matrices(state, dynamics)
    return _joined((matrices[layer] * state.W[layer + 1]).sum(-2) for layer in lawful(state, dynamics))


@public
def invariant(state: State, dynamics: Dynamics) -> Neurons:
    """Return ``C_k = ½ |w_k|² + ½ b_k² - (r_l/r_{l+1}) V_k``: constant in gradient flow without decay, B at rest.

    For any loss and any batches, and activations with φ(z) = φ'(z) z. Proof: ``⟨w_k, ĝ_k⟩ + b_k ĝ_{b,k} = Σ δ_k z_k =
    Σ h_k (Mᵀδ)_k = ⟨M[:, k], Ĝ[:, k]⟩``, and the two sides are the rates at which P_k and V_k fall.

    Source: Robertson and Koyejo 2024 (ICML); derived here, variants included.
    """
    return incoming(state, dynamics) - rate_ratio(state, dynamics) * alignment_term(state, dynamics)


@public
def aligned_forever(state: State, dynamics: Dynamics) -> Bool[Tensor, "runs neurons"]:
    """Return whether C_k ≤ 0: then ``V_k(t) ≥ (r_{l+1}/r_l) (½ |w_k|² + ½ b_k²) ≥ 0`` at all times of gradient flow.

    From the initial values alone. For fa that is ``⟨B, w_out⟩ ≥ ½ |w_in|² + ½ b²``; neurons with C_k > 0 are only
    bounded, ``V_k ≥ -(r_{l+1}/r_l) C_k(0)``. Decay λ, the same everywhere, only helps: ``C_k(t) ≤ C_k(0) exp(-λt)``.
    In steps the bound is less by ½ Σ η² |ĝ_k|², see ``expected_change``.

    Source: derived.
    """
    return invariant(state, dynamics) <= 0


@public
def decay_of_invariant(C: Neurons, P: Neurons, decay: float) -> Neurons:
    """Return ``Ċ = -λ C - (λ/2)(|w|² + b²) = -λ (C + P)``, under fa with the same decay λ and rate everywhere.

    It is zero only where ``⟨B, w_out⟩ = P - C = |w|² + b²``: decay drives every neuron to non-negative alignment.

    Source: derived.
    """
    return -decay * (C + P)


def expected_change(before: State, after: State, dynamics: Dynamics, rate: float, moved: State) -> Neurons:
    """Return the change of C in one step, by an identity that is exact for any rule and any batch.

    ``ΔC = ½ |u|² - 2 η_l λ_l P + η_l λ_{l+1} ⟨M, W⟩ - (η_l/η_{l+1}) (ΔV - ⟨M, U⟩)``, u and U the displacements of the
    weights in and out. Without decay and with B at rest only ``½ η_l² |ĝ_k|²`` is left for fa.

    Args:
        before: At the start of the step.
        after: At its end.
        dynamics: Rule, rates and decays.
        rate: η.
        moved: As ``before``, with the feedback of the pass: adafa moves it first.
    """
    rates, decays = dynamics.of_layers(before)
    matrices = feedback_matrices(moved, dynamics)
    dV = alignment_term(after, dynamics) - alignment_term(before, dynamics)
    terms, first_order = [], []
    for k in lawful(before, dynamics):
        M, W, U = matrices[k], before.W[k + 1], after.W[k + 1] - before.W[k + 1]
        weighed = decays[k + 1] * (M * W).sum(-2) - 2 * decays[k] * _half_square(before, k)
        terms.append(_half_square(after, k, before) + rate * rates[k] * weighed)
        first_order.append((M * U).sum(-2))
    return _joined(terms) - rate_ratio(before, dynamics) * (dV - _joined(first_order))


def expected_rate(state: State, motion: State, dynamics: Dynamics) -> Neurons:
    """Return Ċ in gradient flow: ``-2 r_l λ_l P + r_l λ_{l+1} ⟨M, W⟩ - (r_l/r_{l+1}) (V̇ - ⟨M, Ẇ⟩)``."""
    rates, decays = dynamics.of_layers(state)
    matrices, terms = feedback_matrices(state, dynamics), []
    for k in lawful(state, dynamics):
        W = state.W[k + 1]
        term = decays[k + 1] * (matrices[k] * W).sum(-2) - 2 * decays[k] * _half_square(state, k)
        if state.B:
            term = term - dynamics.rule.remainder(state.B[k], W, motion.B[k], motion.W[k + 1]).sum(-2) / rates[k + 1]
        terms.append(rates[k] * term)
    return _joined(terms)


def rate_ratio(state: State, dynamics: Dynamics) -> Float[Tensor, " neurons"]:
    """Return ``r_l/r_{l+1}`` for every neuron of layer l."""
    rates, _ = dynamics.of_layers(state)
    return _joined(
        state.W[k].new_full((state.W[k].shape[1],), rates[k] / rates[k + 1]) for k in lawful(state, dynamics)
    )


def _half_square(state: State, k: int, origin: State | None = None) -> Float[Tensor, "runs neurons"]:
    """Return ``½ |w|² + ½ b²`` of layer k, or of its displacement from an origin."""
    W, b = state.W[k], state.b[k] if state.b else None
    if origin is not None:
        W, b = W - origin.W[k], None if b is None else b - origin.b[k]
    square = W.square().sum(-1)
    return (square if b is None else square + b.square()) / 2


def _joined(layers: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(layers), -1)
