"""Low-rank matrix factorisation ``min ½|ZW - Y|²`` without weight transport, for many draws of the feedback B at once.

Draw ``feedback`` and a start (``zero``, ``normal``, ``orthonormal``), train by ``descend`` or ``flow``, and compare
with the closed forms: ``stationary`` is where feedback alignment rests, ``optimum`` where gradient descent does.
"""

from falign.theory.factorisation.closed_forms import (
    best_error,
    lyapunov,
    lyapunov_rate,
    optimal_rows,
    optimum,
    stationary,
    stationary_error,
)
from falign.theory.factorisation.courses import descend, flow
from falign.theory.factorisation.instances import RatioLaw, flat_spectrum, flat_tail, flat_tail_error, last_direction
from falign.theory.factorisation.measurements import MEASUREMENTS, Course
from falign.theory.factorisation.methods import METHODS, Method, best_output, conserved, velocity
from falign.theory.factorisation.network import from_network, isotropic, rate_in_factorisation
from falign.theory.factorisation.problem import State, feedback, normal, orthonormal, zero
from falign.theory.factorisation.range_finder import expected_bound, range_finder, range_finder_ratios
from falign.theory.factorisation.stability import local_rate, stable_rate
from falign.theory.factorisation.subspace import overlap, principal_angles
from falign.theory.factorisation.theorems import conservation, descent_of_feedback, optimum_reached, stationary_limit
from falign.theory.factorisation.theorems_optimal_output import (
    alignment_growth,
    gram_drift,
    monotone_alignment,
    optimal_output_bound,
)
from falign.theory.factorisation.theorems_separation import near_orthogonality, sampling_bound, separation

__all__ = [
    "MEASUREMENTS",
    "METHODS",
    "Course",
    "Method",
    "RatioLaw",
    "State",
    "alignment_growth",
    "best_error",
    "best_output",
    "conservation",
    "conserved",
    "descend",
    "descent_of_feedback",
    "expected_bound",
    "feedback",
    "flat_spectrum",
    "flat_tail",
    "flat_tail_error",
    "flow",
    "from_network",
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
    "stable_rate",
    "stationary",
    "stationary_error",
    "stationary_limit",
    "velocity",
    "zero",
]
