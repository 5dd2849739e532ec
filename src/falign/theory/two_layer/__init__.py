"""Feedback alignment in two-layer networks: the theory of Song, Xu and Lafferty 2021, simulated exactly.

Engines, from general to fast: ``WeightSpace`` (any network of the paper, on its weights), ``Dual`` (scalar output and
full batches, in the space of the points), ``WidthFree`` (linear, any width). Each advances a block of runs, one per
seed and penalty; ``simulate`` records them.
"""

from falign.theory.two_layer._activations import ACTIVATIONS, Activation, activation
from falign.theory.two_layer._dual import Dual, bytes_needed
from falign.theory.two_layer._schedules import SCHEDULES, Penalty
from falign.theory.two_layer._start import Reduced, Start, draw, draw_data, draw_reduced, draw_weights, project, reduce
from falign.theory.two_layer._trajectory import Engine, Trajectory, simulate, spaced
from falign.theory.two_layer._weight_space import WeightSpace
from falign.theory.two_layer._width_free import WidthFree

__all__ = [
    "ACTIVATIONS",
    "SCHEDULES",
    "Activation",
    "Dual",
    "Engine",
    "Penalty",
    "Reduced",
    "Start",
    "Trajectory",
    "WeightSpace",
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
