"""The conservation law of learning without weight transport, in deep fully connected networks, many at once.

``draw`` a start, train it by ``descend`` (steps, for which the law is an exact identity) or ``flow``, and try what
follows from the law: ``conservation``, ``alignment_bound``, ``lasting_alignment``, ``decay_equilibrium``.
"""

from falign.theory.conservation.courses import descend, flow
from falign.theory.conservation.gates import GATES, Gate, gate
from falign.theory.conservation.law import (
    aligned_forever,
    alignment,
    decay_of_invariant,
    incoming,
    invariant,
    potential,
)
from falign.theory.conservation.losses import LOSSES, Loss, loss
from falign.theory.conservation.measurements import MEASUREMENTS, Course
from falign.theory.conservation.network import Dynamics, State, gradients, loss_of, output, velocity
from falign.theory.conservation.rules import RULES, FeedbackRule, entrywise, rule
from falign.theory.conservation.start import anti, dominant, draw, small
from falign.theory.conservation.theorems import alignment_bound, conservation, decay_equilibrium, lasting_alignment

__all__ = [
    "GATES",
    "LOSSES",
    "MEASUREMENTS",
    "RULES",
    "Course",
    "Dynamics",
    "FeedbackRule",
    "Gate",
    "Loss",
    "State",
    "aligned_forever",
    "alignment",
    "alignment_bound",
    "anti",
    "conservation",
    "decay_equilibrium",
    "decay_of_invariant",
    "descend",
    "dominant",
    "draw",
    "entrywise",
    "flow",
    "gate",
    "gradients",
    "incoming",
    "invariant",
    "lasting_alignment",
    "loss",
    "loss_of",
    "output",
    "potential",
    "rule",
    "small",
    "velocity",
]
