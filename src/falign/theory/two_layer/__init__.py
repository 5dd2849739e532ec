"""Feedback alignment in two-layer networks: the theory of Song, Xu and Lafferty 2021, simulated exactly.

Engines, from general to fast: ``Literal`` (any network of the paper, on its weights), ``Dual`` (scalar output and
full batches, in the space of the points), ``WidthFree`` (linear, any width). Each advances a block of runs, one per
seed and penalty; ``simulate`` records them.
"""

from falign.theory.two_layer.activations import ACTIVATIONS, Activation, activation
from falign.theory.two_layer.dual import Dual
from falign.theory.two_layer.literal import Literal
from falign.theory.two_layer.memory import bytes_needed
from falign.theory.two_layer.reduced import Reduced, draw_reduced, reduce
from falign.theory.two_layer.schedules import SCHEDULES, Penalty
from falign.theory.two_layer.start import Start, draw, draw_data, draw_weights, project
from falign.theory.two_layer.trajectory import Engine, Trajectory, simulate, spaced
from falign.theory.two_layer.width_free import WidthFree

__all__ = [
    "ACTIVATIONS",
    "SCHEDULES",
    "Activation",
    "Dual",
    "Engine",
    "Literal",
    "Penalty",
    "Reduced",
    "Start",
    "Trajectory",
    "WidthFree",
    "activation",
    "bytes_needed",
    "draw",
    "draw_data",
    "draw_reduced",
    "draw_weights",
    "project",
    "reduce",
    "simulate",
    "spaced",
]
