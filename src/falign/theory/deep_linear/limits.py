"""Where modes end in gradient flow, and the exponential rates at which their errors fall on the way and at the end."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.deep_linear.line import line
from falign.theory.deep_linear.modes import Modes
from falign.theory.deep_linear.reach import reach
from falign.theory.door import public


@public
def settled(modes: Modes) -> Modes:
    """The modes at the limit of gradient flow.

    Under fa and dfa the error is 0 there, at any depth and from any start: a mode moves along a line whose only fixed
    points have no error. Gradient descent may end at a saddle instead. At a bifurcation (two fixed points about to
    vanish, K = K_c) the limit is the double root, as far as float64 tells.
    """
    path = line(modes)
    end = reach(path, torch.zeros_like(path.start)).nan_to_num(nan=0.0)  # the saddle is at 0
    weights = path.weights(end[:, None])[..., 0]
    return modes.at(weights.reshape(modes.weights.shape).to(modes.weights))


@public
def limit(modes: Modes) -> Float[Tensor, "*modes"]:
    """``θ_1*``, the first weight at the limit of gradient flow."""
    return settled(modes).weights[0]


@public
def asymptotic_rate(modes: Modes) -> Float[Tensor, "*modes"]:
    """``ρ*``, the rate ``e ~ exp(-ρ* t)`` at which the error finally falls.

    Of two layers with s = 1 ``mK + (3/2) θ_1*² = m λ/θ_1* + θ_1*²``. It is 0 only where two fixed points meet, K = K_c
    from below, and for λ = 0 with ``mK = 0``: the error then falls as a power of time.
    """
    return settled(modes).decay_rate


@public
def guaranteed_rate(modes: Modes) -> Float[Tensor, "*modes"]:
    """The rate r of ``|e(t)| ≤ |e(0)| exp(-r t)`` that the start guarantees; 0 where it guarantees none.

    Of fa and dfa ``r = s Π_l K_l`` where all ``K_l > 0``: the first term of ρ is ``s Π_l (K_l + θ_l²/2)`` and none is
    negative. Of bp ``r = s Π (θ_l² - θ_i²)`` over all layers but i, whose weight is the least: these differences are
    constant, and one term of ρ is the square of the product of all other weights.
    """
    if modes.rule == "bp":
        squares = modes.weights.square().sort(0).values
        return modes.variance * (squares[1:] - squares[0]).prod(0)
    invariants = modes.invariants
    return modes.variance * invariants.prod(0) * (invariants > 0).all(0)
