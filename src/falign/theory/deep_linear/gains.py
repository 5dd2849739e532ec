"""The linear network that stands in for a ReLU network while its neurons keep their gains."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.conservation import State
from falign.theory.conservation.fits import fits_inputs
from falign.theory.conservation.network import Points, stored
from falign.theory.deep_linear.modes import Rule
from falign.theory.deep_linear.network import linear
from falign.theory.door import public


@public
def gains(state: State, X: Points) -> tuple[Float[Tensor, "runs _"], ...]:
    """Of every hidden layer of ReLUs, the slope g_k that fits ``relu(z_k) ≈ g_k z_k`` best over the inputs.

    ``g_k = E[z_k relu(z_k)]/E[z_k²]``: 1 for a neuron that is always active, 0 for one that never is, ½ for one whose
    sums are symmetric about 0. Nearer to ReLU networks on digits than ½ for all, or than the share of active inputs.
    """
    fits_inputs(state.W[0], X)
    found, h = [], X
    for W in state.W[:-1]:
        z = h @ W.mT
        h = z.clamp(min=0)
        found.append((h * z).sum(-2) / z.square().sum(-2).clamp_min(torch.finfo(z.dtype).tiny))
    return tuple(found)


@public
def linearised(state: State, X: Points, rule: Rule = "fa") -> State:
    """The linear network that computes and learns what the ReLU network does if every ReLU has its gain for slope.

    With ``G_l = diag(g)``, ``h_l = G_l W_l h_{l-1}`` and ``δ_l = G_l B_{l+1}ᵀ δ_{l+1}``. Then ``Ŵ_l = G_l W_l``
    follows the equations of a linear network with ``B̂_{l+1} = G_{l+1}⁻¹ B_{l+1} G_l²`` (dfa: ``D̂_l = D_l G_l²``),
    ``G_L = 1``: ``G_l δ_l = B̂_{l+1}ᵀ (G_{l+1} δ_{l+1})`` and ``Ŵ_l' = -G_l δ_l h_{l-1}ᵀ``. A neuron with gain 0 learns
    nothing and passes nothing on, there as here.

    Args:
        state: A ReLU network without biases.
        X: Its inputs.
        rule: fa or dfa.

    Raises:
        ValueError: the rule is bp, whose hidden layers would learn at rates G_l² that no linear network has,
            the inputs do not fit, or the feedback is not that of the rule.

    Source: derived.
    """
    if rule == "bp":
        raise ValueError("a ReLU network under bp has no linear network in its stead: pass rule 'fa' or 'dfa'")
    found = gains(state, X)
    W = [g.unsqueeze(-1) * part for g, part in zip(found, state.W, strict=False)]
    above = [torch.where(g > 0, 1 / g, 0.0).unsqueeze(-1) for g in found[1:]] if rule == "fa" else []
    above += [torch.ones(()).to(found[0])] * (len(found) - len(above))
    B = [
        up * part * g.square().unsqueeze(-2)
        for up, part, g in zip(above, stored(state, linear(rule)), found, strict=True)
    ]
    return State(W=(*W, state.W[-1]), B=tuple(B))
