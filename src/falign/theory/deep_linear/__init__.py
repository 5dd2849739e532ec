"""Deep linear networks under feedback alignment, direct feedback alignment and gradient descent.

A network that is diagonal in fixed bases is many scalar chains, its ``modes``. ``descend`` and ``flow`` run them;
``limit``, ``learning_time``, ``stable_rate`` and the closed forms of two layers say what happens without running them;
``scheme`` names starts by the order in which they let components be learned, and ``chart`` maps it. ``spectral`` makes
such networks, ``descend_matrices`` and ``flow_matrices`` run any linear network, ``predict`` foretells its loss curves,
and the convergence statements give a ``TheoremCheck``.
"""

from falign.theory.deep_linear.chart import Branch, Chart, chart
from falign.theory.deep_linear.courses import ModeCourse, descend, flow
from falign.theory.deep_linear.covariances import Compressed, compressed, covariances, points_of, whitened
from falign.theory.deep_linear.from_zero import zero_start, zero_start_time
from falign.theory.deep_linear.gains import gains, linearised
from falign.theory.deep_linear.learning import depth_slope, learning_slope, learning_time, learning_time_and_slope
from falign.theory.deep_linear.limits import asymptotic_rate, guaranteed_rate, limit, settled
from falign.theory.deep_linear.modes import Modes, Rule, modes
from falign.theory.deep_linear.network import linear, local_rate, network
from falign.theory.deep_linear.predict import Prediction, predict
from falign.theory.deep_linear.schemes import SCHEMES, Order, Scheme, scheme
from falign.theory.deep_linear.shallow import (
    FixedPoints,
    critical_invariant,
    critical_target,
    degenerate_error,
    fixed_points,
)
from falign.theory.deep_linear.spectral import Spectral, common_bases, deviation, reduced, spectral, task
from falign.theory.deep_linear.stability import stable_rate, sufficient_rate
from falign.theory.deep_linear.theorems import (
    conserved_invariants,
    error_recursion,
    exponential_convergence,
    step_rates,
)
from falign.theory.deep_linear.theorems_limits import asymptotic_decay, learning_time_law, zero_loss
from falign.theory.deep_linear.theorems_matrices import matrix_conservation, matrix_invariants
from falign.theory.deep_linear.theorems_two_layer import two_layer_convergence
from falign.theory.deep_linear.training import descend_matrices, flow_matrices

__all__ = [
    "SCHEMES",
    "Branch",
    "Chart",
    "Compressed",
    "FixedPoints",
    "ModeCourse",
    "Modes",
    "Order",
    "Prediction",
    "Rule",
    "Scheme",
    "Spectral",
    "asymptotic_decay",
    "asymptotic_rate",
    "chart",
    "common_bases",
    "compressed",
    "conserved_invariants",
    "covariances",
    "critical_invariant",
    "critical_target",
    "degenerate_error",
    "depth_slope",
    "descend",
    "descend_matrices",
    "deviation",
    "error_recursion",
    "exponential_convergence",
    "fixed_points",
    "flow",
    "flow_matrices",
    "gains",
    "guaranteed_rate",
    "learning_slope",
    "learning_time",
    "learning_time_and_slope",
    "learning_time_law",
    "limit",
    "linear",
    "linearised",
    "local_rate",
    "matrix_conservation",
    "matrix_invariants",
    "modes",
    "network",
    "points_of",
    "predict",
    "reduced",
    "scheme",
    "settled",
    "spectral",
    "stable_rate",
    "step_rates",
    "sufficient_rate",
    "task",
    "two_layer_convergence",
    "whitened",
    "zero_loss",
    "zero_start",
    "zero_start_time",
]
