"""Deep linear networks under feedback alignment, direct feedback alignment and gradient descent.

A network that is diagonal in fixed bases is a set of independent scalar chains, its ``modes``. ``gradient_descent``
and ``gradient_flow`` simulate them; ``limit``, ``learning_time``, ``stable_rate`` and the closed forms of two layers
predict where they end and how fast without simulating. ``initialisation`` names starts by the order in which they let
components be learned, and ``phase_diagram`` maps that order. ``spectral`` builds networks that are diagonal in this
sense, ``matrix_gradient_descent`` and ``matrix_gradient_flow`` train any linear network, ``predict`` foretells its loss
curves, and each convergence statement returns a ``TheoremCheck``.
"""

from falign.theory.deep_linear._flow import asymptotic_rate, guaranteed_rate, limit, settled
from falign.theory.deep_linear._initialisations import INITIALISATIONS, Initialisation, Order, initialisation
from falign.theory.deep_linear._learning import depth_slope, learning_slope, learning_time, learning_time_and_slope
from falign.theory.deep_linear._modes import Modes, Rule, modes
from falign.theory.deep_linear._network import (
    Compressed,
    compressed,
    covariances,
    linear,
    local_rate,
    matrix_gradient_descent,
    matrix_gradient_flow,
    network,
    points_of,
    whitened,
)
from falign.theory.deep_linear._phase_diagram import Branch, PhaseDiagram, phase_diagram
from falign.theory.deep_linear._predict import Prediction, predict, relu_gains, relu_linearisation
from falign.theory.deep_linear._spectral import Spectral, common_bases, deviation, reduced, spectral, task
from falign.theory.deep_linear._steps import (
    ModeTrajectory,
    gradient_descent,
    gradient_flow,
    stable_rate,
    sufficient_rate,
)
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
    zero_init,
    zero_init_time,
)

__all__ = [
    "INITIALISATIONS",
    "Branch",
    "Compressed",
    "FixedPoints",
    "Initialisation",
    "ModeTrajectory",
    "Modes",
    "Order",
    "PhaseDiagram",
    "Prediction",
    "Rule",
    "Spectral",
    "asymptotic_decay",
    "asymptotic_rate",
    "common_bases",
    "compressed",
    "conserved_invariants",
    "covariances",
    "critical_invariant",
    "critical_target",
    "degenerate_error",
    "depth_slope",
    "deviation",
    "error_recursion",
    "exponential_convergence",
    "fixed_points",
    "gradient_descent",
    "gradient_flow",
    "guaranteed_rate",
    "initialisation",
    "learning_slope",
    "learning_time",
    "learning_time_and_slope",
    "learning_time_law",
    "limit",
    "linear",
    "local_rate",
    "matrix_conservation",
    "matrix_gradient_descent",
    "matrix_gradient_flow",
    "matrix_invariants",
    "modes",
    "network",
    "phase_diagram",
    "points_of",
    "predict",
    "reduced",
    "relu_gains",
    "relu_linearisation",
    "settled",
    "spectral",
    "stable_rate",
    "step_rates",
    "sufficient_rate",
    "task",
    "two_layer_convergence",
    "whitened",
    "zero_init",
    "zero_init_time",
    "zero_loss",
]
