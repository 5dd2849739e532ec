"""The theorems of Song, Xu and Lafferty 2021 as code: assumptions, bound, what happened, verdict."""

from falign.theory.statement import Assumption, TheoremCheck
from falign.theory.two_layer.theorems._alignment import (
    ParameterScaling,
    Slope,
    linear_alignment_law,
    log_log_slope,
    parameter_scaling,
    penalty_of_sum,
    theorem_4_6,
    vanishing_alignment,
    width_independent,
)
from falign.theory.two_layer.theorems._convergence import theorem_3_2, theorem_4_2, theorem_4_3
from falign.theory.two_layer.theorems._data import (
    IsometryFrequency,
    is_isometric,
    isometry,
    proposition_3_3,
    proposition_4_5,
    sufficient_dimension,
)

__all__ = [
    "Assumption",
    "IsometryFrequency",
    "ParameterScaling",
    "Slope",
    "TheoremCheck",
    "is_isometric",
    "isometry",
    "linear_alignment_law",
    "log_log_slope",
    "parameter_scaling",
    "penalty_of_sum",
    "proposition_3_3",
    "proposition_4_5",
    "sufficient_dimension",
    "theorem_3_2",
    "theorem_4_2",
    "theorem_4_3",
    "theorem_4_6",
    "vanishing_alignment",
    "width_independent",
]
