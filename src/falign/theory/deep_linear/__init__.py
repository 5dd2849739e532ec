"""Deep linear networks under feedback alignment, direct feedback alignment and gradient descent.

A network that is diagonal in fixed bases is many scalar chains, its ``modes``. ``descend`` and ``flow`` run them;
``limit``, ``learning_time``, ``stable_rate`` and the closed forms of two layers say what happens without running them;
``scheme`` names starts by the order in which they let components be learned, and ``chart`` maps it. ``spectral`` makes
such networks, ``descend_matrices`` and ``flow_matrices`` run any linear network, ``predict`` foretells its loss curves,
and the convergence statements give a ``TheoremCheck``.
"""

from falign.theory.deep_linear._flow import asymptotic_rate, guaranteed_rate, limit, settled
from falign.theory.deep_linear._initialisations import SCHEMES, Order, Scheme, scheme
from falign.theory.deep_linear._learning import depth_slope, learning_slope, learning_time, learning_time_and_slope
from falign.theory.deep_linear._modes import Modes, Rule, modes
from falign.theory.deep_linear._network import (
    Compressed,
    compressed,
    covariances,
    descend_matrices,
    flow_matrices,
    linear,
    local_rate,
    network,
    points_of,
    whitened,
)
from falign.theory.deep_linear._phase_diagram import Branch, Chart, chart
from falign.theory.deep_linear._predict import Prediction, gains, linearised, predict
from falign.theory.deep_linear._spectral import Spectral, common_bases, deviation, reduced, spectral, task
from falign.theory.deep_linear._steps import ModeCourse, descend, flow, stable_rate, sufficient_rate
from falign.theory.deep_linear._theorems_matrices import matrix_conservation, matrix_invariants, two_layer_convergence
from falign.theory.deep_linear._theorems_modes import (
    asymptotic_decay,
    conserved_invariants,
    error_recursion,
    exponential_convergence,
    learning_time_law,
    step_rates,
    zero_loss,
)
from falign.theory.deep_linear._two_layer import (
    FixedPoints,
    critical_invariant,
    critical_target,
    degenerate_error,
    fixed_points,
    zero_start,
    zero_start_time,
)

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
