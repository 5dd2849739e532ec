"""The conservation law of learning without weight transport, simulated in deep fully connected networks.

For a hidden neuron k with weights w_k and bias b_k into it, ``C_k = ½ |w_k|² + ½ b_k² - V_k`` is constant in gradient
flow, whatever the data and the loss; V_k, the alignment term, is ``⟨B[:, k], W[:, k]⟩`` under feedback alignment. So a
neuron whose incoming weights grow becomes aligned with its feedback by as much.

``draw`` a start, train it by ``gradient_descent`` (steps, for which the law is an exact identity) or ``gradient_flow``,
and try what follows from the law: ``conservation``, ``alignment_bound``, ``lasting_alignment``, ``decay_equilibrium``.
"""

from falign.theory.conservation._law import (
    aligned_forever,
    alignment,
    alignment_term,
    decay_of_invariant,
    incoming,
    invariant,
)
from falign.theory.conservation._network import (
    ACTIVATIONS,
    LOSSES,
    Activation,
    Dynamics,
    Loss,
    State,
    activation,
    gradients,
    loss,
    loss_of,
    output,
    velocity,
)
from falign.theory.conservation._rules import RULES, FeedbackRule, entrywise, rule
from falign.theory.conservation._simulate import MEASUREMENTS, Trajectory, gradient_descent, gradient_flow
from falign.theory.conservation._start import anti, dominant, draw, small
from falign.theory.conservation._theorems import alignment_bound, conservation, decay_equilibrium, lasting_alignment

__all__ = [
    "ACTIVATIONS",
    "LOSSES",
    "MEASUREMENTS",
    "RULES",
    "Activation",
    "Dynamics",
    "FeedbackRule",
    "Loss",
    "State",
    "Trajectory",
    "activation",
    "aligned_forever",
    "alignment",
    "alignment_bound",
    "alignment_term",
    "anti",
    "conservation",
    "decay_equilibrium",
    "decay_of_invariant",
    "dominant",
    "draw",
    "entrywise",
    "gradient_descent",
    "gradient_flow",
    "gradients",
    "incoming",
    "invariant",
    "lasting_alignment",
    "loss",
    "loss_of",
    "output",
    "rule",
    "small",
    "velocity",
]
