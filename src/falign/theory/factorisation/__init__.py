"""Low-rank matrix factorisation ``min ½|ZW - Y|²`` without weight transport, for many draws of the feedback B at once.

Draw ``feedback`` and a start (``zero``, ``normal``, ``orthonormal``), train by ``gradient_descent`` or
``gradient_flow``, and compare with the closed forms: ``stationary`` is where feedback alignment ends, ``optimum`` where
gradient descent does.
"""

from falign.theory.factorisation._closed_forms import (
    RatioLaw,
    best_error,
    expected_bound,
    flat_spectrum,
    flat_tail,
    flat_tail_error,
    last_direction,
    lyapunov,
    lyapunov_rate,
    optimal_rows,
    optimum,
    range_finder,
    range_finder_ratios,
    stationary,
    stationary_error,
)
from falign.theory.factorisation._methods import (
    METHODS,
    Method,
    best_output,
    conserved,
    local_rate,
    overlap,
    principal_angles,
    sufficient_rate,
    velocity,
)
from falign.theory.factorisation._network import from_network, isotropic, rate_in_factorisation
from falign.theory.factorisation._problem import State, feedback, normal, orthonormal, zero
from falign.theory.factorisation._simulate import MEASUREMENTS, Trajectory, gradient_descent, gradient_flow
from falign.theory.factorisation._theorems import (
    alignment_growth,
    conservation,
    descent_of_feedback,
    gram_drift,
    monotone_alignment,
    optimal_output_bound,
    optimum_reached,
    stationary_limit,
)
from falign.theory.factorisation._theorems_separation import near_orthogonality, sampling_bound, separation

__all__ = [
    "MEASUREMENTS",
    "METHODS",
    "Method",
    "RatioLaw",
    "State",
    "Trajectory",
    "alignment_growth",
    "best_error",
    "best_output",
    "conservation",
    "conserved",
    "descent_of_feedback",
    "expected_bound",
    "feedback",
    "flat_spectrum",
    "flat_tail",
    "flat_tail_error",
    "from_network",
    "gradient_descent",
    "gradient_flow",
    "gram_drift",
    "isotropic",
    "last_direction",
    "local_rate",
    "lyapunov",
    "lyapunov_rate",
    "monotone_alignment",
    "near_orthogonality",
    "normal",
    "optimal_output_bound",
    "optimal_rows",
    "optimum",
    "optimum_reached",
    "orthonormal",
    "overlap",
    "principal_angles",
    "range_finder",
    "range_finder_ratios",
    "rate_in_factorisation",
    "sampling_bound",
    "separation",
    "stationary",
    "stationary_error",
    "stationary_limit",
    "sufficient_rate",
    "velocity",
    "zero",
]
