"""Initial weights and feedback, one run a seed; schemes that make neurons aligned for ever, or start them opposed."""

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor

from falign._validation import as_list, check_memory, fraction, is_whole, positive
from falign.feedback import generator
from falign.theory._coerce import public
from falign.theory.conservation._law import lawful
from falign.theory.conservation._network import Dynamics, State, feedback_matrices, stored_feedback


@public
def draw(
    widths: Sequence[int], *, seeds: Sequence[int], dynamics: Dynamics, bias: bool = True, scale: float = 1.0
) -> State:
    """Draw a start: W_l and B_l with independent normal entries of variance 1/inputs, biases zero, in float64.

    Args:
        widths: Numbers of inputs, of neurons of each hidden layer, and of outputs.
        seeds: One run each.
        dynamics: Its rule makes the feedback from the draw.
        bias: Whether there are biases.
        scale: Factor of all weights.

    Raises:
        ValueError: there is no hidden layer, a width below 1 or not whole, no seed, or a scale that is no number.
    """
    widths, seeds = as_list("widths", widths), as_list("seeds", seeds)
    if len(widths) < 3 or not all(is_whole(width) and width >= 1 for width in widths) or not seeds:
        raise ValueError(f"a network needs widths of inputs, hidden layers and outputs and a seed, got {list(widths)}")

    for into, out in pairwise(widths):
        check_memory("a layer a run", len(seeds), out, into)

    def normal(purpose: str, rows: int, columns: int) -> Tensor:
        drawn = [torch.randn(rows, columns, generator=generator(seed, "conservation", purpose)) for seed in seeds]
        return torch.stack(drawn).double() / sqrt(columns)

    shapes = [(out, into) for into, out in pairwise(widths)]
    feedback = [(widths[-1], into) if dynamics.rule.direct else (out, into) for out, into in shapes[1:]]
    init_feedback = dynamics.rule.init_feedback
    return State(
        W=tuple(scale * normal(f"W{place}", *shape) for place, shape in enumerate(shapes, 1)),
        b=tuple(torch.zeros(len(seeds), out, dtype=torch.float64) for out, _ in shapes) if bias else (),
        B=tuple(init_feedback(normal(f"B{k}", *shape)) for k, shape in enumerate(feedback, 2)) if init_feedback else (),
    )


@public
def dominant(state: State, dynamics: Dynamics, share: float = 1.0) -> State:
    """Make every neuron aligned for ever: ``W_{l+1} = |W_{l+1}| ⊙ sign(M)``, then ``½ |w_k|² + ½ b_k² ≤ share V_k``.

    From the output down, the weights into each neuron are scaled where they exceed the bound, so C_k ≤ 0. Of a
    direct rule only the last hidden layer is under the law.

    Args:
        state: Any start.
        dynamics: Rates must be the same in all layers.
        share: In (0, 1]; below 1 it leaves room for the ``½ Σ η² |ĝ|²`` of steps.

    Raises:
        ValueError: share is out of range.

    Source: derived from the law.
    """
    fraction("share", share, below=False)
    W, b, matrices, B = (
        list(state.W),
        list(state.b),
        feedback_matrices(state, dynamics),
        stored_feedback(state, dynamics),
    )
    for layer in reversed(lawful(state, dynamics)):
        above, entries = W[layer + 1].abs() * matrices[layer].sign(), dynamics.rule.alignment_term
        # kp's V = BW - ½W² is negative where W is beyond 2B, and no scale of the layer below makes C ≤ 0: take W = B.
        W[layer + 1] = above = torch.where(entries(B[layer], above) >= 0, above, matrices[layer])
        size = W[layer].square().sum(-1) + (b[layer].square() if b else 0)
        size = size.clamp_min(torch.finfo(size.dtype).tiny)  # zero weights stay zero
        factor = (2 * share * entries(B[layer], above).sum(-2) / size).clamp(max=1).sqrt()
        W[layer] = W[layer] * factor.unsqueeze(-1)
        if b:
            b[layer] = b[layer] * factor
    return state._replace(W=tuple(W), b=tuple(b))


@public
def small(state: State, size: float) -> State:
    """Scale all weights by ``size`` and set the output's to zero: C is 0 to order ``size``.

    In the last hidden layer ``C_k = ½ size² |w_k|²``. Alignment is then what the incoming weights gained.

    Raises:
        ValueError: size is not positive.

    Source: derived from the law.
    """
    positive("size", size)  # from all zeros nothing would learn
    below = tuple(W * size for W in state.W[:-1])
    return state._replace(W=(*below, torch.zeros_like(state.W[-1])), b=tuple(b * size for b in state.b))


@public
def anti(state: State, dynamics: Dynamics) -> State:
    """Set ``W_{l+1} = -M``: every neuron under the law starts opposed to its feedback; the loss may rise at first."""
    matrices, W = feedback_matrices(state, dynamics), list(state.W)
    for layer in lawful(state, dynamics):
        W[layer + 1] = -matrices[layer]
    return state._replace(W=tuple(W))
