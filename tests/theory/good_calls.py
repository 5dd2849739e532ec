"""A good call of every public function and class of the theory: small, and every argument named."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from falign.theory import attention as att
from falign.theory import conservation as law
from falign.theory import deep_linear as deep
from falign.theory import dominance as dom
from falign.theory import factorisation as fac
from falign.theory import minimum_norm, separability
from falign.theory import two_layer as two
from falign.theory.conservation._simulate import gradient_descent as law_descend
from falign.theory.two_layer import _width_free as grams
from falign.theory.two_layer import kernels, theorems


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def start() -> two.Start:
    return two.draw([0, 1], n=3, d=4, p=6)


@cache
def dynamics() -> law.Dynamics:
    return law.Dynamics(activation=law.activation("relu"))


@cache
def state() -> law.State:
    return law.draw([4, 5, 3], seeds=[0, 1], dynamics=dynamics())


@cache
def single() -> law.State:
    return law.draw([4, 5, 1], seeds=[0, 1], dynamics=dynamics())


@cache
def law_trajectory(
    outputs: int = 3, decay: float = 0.0, names: tuple[str, ...] = tuple(law.MEASUREMENTS)
) -> law.Trajectory:
    how = law.Dynamics(activation=law.activation("relu"), decays=decay)
    begun = law.draw([4, 5, outputs], seeds=[0, 1], dynamics=how)
    return law_descend(
        begun, how, numbers(6, 4), numbers(6, outputs), rate=0.01, steps=5, names=(*names, "expected_change")
    )


@cache
def aligned_trajectory() -> law.Trajectory:
    begun = law.dominant(state(), dynamics(), 0.5)
    return law_descend(
        begun,
        dynamics(),
        numbers(6, 4),
        numbers(6, 3),
        rate=0.01,
        steps=5,
        names=[*law.MEASUREMENTS, "expected_change"],
    )


@cache
def chains() -> deep.Modes:
    return deep.modes([1.0, 0.5], [[0.1, 0.2], [0.3, 0.1]])


@cache
def chain_trajectory() -> deep.ModeTrajectory:
    return deep.gradient_descent(chains(), rate=0.05, steps=20)


@cache
def linear_state() -> law.State:
    return deep.network([numbers(5, 4), numbers(3, 5)], [numbers(3, 5, seed=1)])


@cache
def spectral() -> deep.Spectral:
    X, Y = deep.task([1.0, 0.5], inputs=4, outputs=3)
    return deep.spectral(X, Y, weights=[0.1, 0.2], hidden=[5])


def problem() -> dict[str, torch.Tensor]:
    return {"Y": numbers(5, 6), "B": fac.feedback(5, 2, seeds=[0, 1])}


@cache
def fac_trajectory(method: str = "fa") -> fac.Trajectory:
    begun = fac.orthonormal(**problem(), seeds=[0, 1])
    return fac.gradient_descent(method, **problem(), start=begun, rate=1e-3, steps=5, names=list(fac.MEASUREMENTS))


def factors() -> fac.State:
    return fac.normal(**problem(), seeds=[0, 1], scale=0.1)


def engine(kind: Callable[..., Any] = two.WeightSpace, **more: Any) -> Any:
    return kind(start(), rate=0.01, **more)


def width_free() -> two.WidthFree:
    return two.WidthFree.from_start(start(), rate=0.01)


def _xy(outputs: int = 3) -> dict[str, Any]:
    return {"X": numbers(6, 4), "y": numbers(6, outputs)}


def _attended(**others: Any) -> dict[str, Any]:
    block = att.draw(seeds=[0, 1], dynamics=dynamics(), inputs=2, width=3, d=2, above=3)
    data = {"X": numbers(4, 3, 2), "y": numbers(4, 2, seed=1)}
    return {"block": block, "dynamics": dynamics(), **data, "scores": "softmax", **others}


def _law(**more: Any) -> dict[str, Any]:
    return {"state": state(), "dynamics": dynamics(), **more}


_DRAW = {"seeds": [0, 1], "n": 3, "d": 4, "p": 6, "activation": "tanh", "inputs": "scaled", "teacher": "network"}
_PLACE = {"dtype": torch.float64, "device": "cpu"}
_MODES = {"target": [1.0, 0.5], "feedback": 1.0, "variance": 1.0}
_TIMES = [0.0, 0.5, 1.0]
_FLAT = {"X": numbers(6, 8), "labels": [0, 0, 0, 1, 1, 1]}

GOOD: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    # two layers
    "two.activation": (two.activation, lambda: {"name": "tanh"}),
    "two.Start": (two.Start, lambda: {name: getattr(start(), name) for name in ("X", "y", "W", "beta", "b", "seeds")}),
    "two.Reduced": (
        two.Reduced,
        lambda: {name: getattr(two.reduce(start()), name) for name in ("X", "y", "U", "beta", "b")},
    ),
    "two.Penalty": (two.Penalty, lambda: {"strength": 0.1, "schedule": "exponential", "steps": 5}),
    "two.Penalty.at": (two.Penalty(0.1, "exponential", 5).at, lambda: {"t": 3}),
    "two.Penalty.values": (
        two.Penalty(0.1, "exponential", 5).values,
        lambda: {"steps": 3, "dtype": torch.float64, "start": 1},
    ),
    "two.Penalty.total": (two.Penalty(0.1, "exponential", 5).total, lambda: {"steps": 3}),
    "two.WeightSpace": (
        two.WeightSpace,
        lambda: {
            "start": start(),
            "activation": "tanh",
            "rate": 0.1,
            "penalties": [two.Penalty()],
            "loss": "squared",
            "dropout": 0.5,
            "batch": 2,
        },
    ),
    "two.WeightSpace.advance": (lambda steps: engine().advance(steps), lambda: {"steps": 2}),
    "two.WeightSpace.outputs": (engine().outputs, lambda: {"X": numbers(5, 4)}),
    "two.WeightSpace.accuracy": (
        lambda X, labels: engine_of_classes().accuracy(X, labels),
        lambda: {"X": numbers(5, 4), "labels": torch.zeros(5, dtype=torch.int64)},
    ),
    "two.WeightSpace.measure": (engine().measure, lambda: {"names": ["loss", "cosine"]}),
    "two.Dual": (
        two.Dual,
        lambda: {"start": start(), "activation": "tanh", "rate": 0.1, "penalties": [two.Penalty()]},
    ),
    "two.Dual.advance": (lambda steps: engine(two.Dual).advance(steps), lambda: {"steps": 2}),
    "two.Dual.measure": (engine(two.Dual).measure, lambda: {"names": ["loss", "cosine"]}),
    "two.WidthFree": (
        two.WidthFree,
        lambda: {"gram": grams.from_start(start()), "rate": 0.1, "penalties": [two.Penalty()]},
    ),
    "two.WidthFree.from_start": (
        two.WidthFree.from_start,
        lambda: {"start": start(), "rate": 0.1, "penalties": [two.Penalty()]},
    ),
    "two.WidthFree.sample": (
        two.WidthFree.sample,
        lambda: {
            "seeds": [0, 1],
            "n": 3,
            "d": 4,
            "p": 10,
            "rate": 0.1,
            "penalties": [two.Penalty()],
            "inputs": "standard",
            "test": 2,
            **_PLACE,
        },
    ),
    "two.WidthFree.advance": (lambda steps: width_free().advance(steps), lambda: {"steps": 2}),
    "two.WidthFree.measure": (width_free().measure, lambda: {"names": ["loss"]}),
    "gram.from_start": (grams.from_start, lambda: {"start": start()}),
    "gram.sample": (
        grams.sample,
        lambda: {"seeds": [0, 1], "n": 3, "d": 4, "p": [9, 10], "inputs": "scaled", "test": 1},
    ),
    "two.bytes_needed": (
        two.bytes_needed,
        lambda: {
            "engine": "dual",
            "n": 3,
            "d": 4,
            "p": 5,
            "seeds": 1,
            "penalties": 1,
            "outputs": 1,
            "test": 0,
            "batch": 2,
            "dtype": torch.float64,
        },
    ),
    "two.draw": (two.draw, lambda: {**_DRAW, "outputs": 2, "weights": "scaled", "test": 2, **_PLACE}),
    "two.draw_data": (two.draw_data, lambda: {**_DRAW, "outputs": 2, "test": 2}),
    "two.draw_reduced": (two.draw_reduced, lambda: {**_DRAW, "weights": "scaled", "test": 2, **_PLACE}),
    "two.draw_weights": (
        two.draw_weights,
        lambda: {"seeds": [0, 1], "p": 5, "d": 4, "outputs": 2, "weights": "standard", **_PLACE},
    ),
    "two.project": (two.project, lambda: {"X": numbers(6, 3), "y": numbers(6)}),
    "two.reduce": (two.reduce, lambda: {"start": start()}),
    "two.simulate": (two.simulate, lambda: {"engine": engine(), "at": [0, 1, 2], "names": ["loss"]}),
    "two.spaced": (two.spaced, lambda: {"steps": 100, "points": 5}),
    "kernels.Kernels.extremes": (
        lambda G: kernels.Kernels(G=G, H=torch.eye(3, dtype=torch.float64)).extremes(),
        lambda: {"G": torch.eye(3, dtype=torch.float64)},
    ),
    "kernels.kernels": (
        kernels.kernels,
        lambda: {
            "U": numbers(5, 3),
            "gram": numbers(3, 3),
            "beta": numbers(5),
            "b": numbers(5),
            "activation": two.activation("tanh"),
        },
    ),
    "kernels.kernels_of_weights": (
        kernels.kernels_of_weights,
        lambda: {
            "X": numbers(3, 4),
            "W": numbers(5, 4),
            "beta": numbers(5),
            "b": numbers(5),
            "activation": two.activation("tanh"),
        },
    ),
    "kernels.kernels_of_engine": (kernels.kernels_of_engine, lambda: {"engine": engine(two.Dual)}),
    "kernels.follow_kernels": (kernels.follow_kernels, lambda: {"engine": engine(two.Dual), "at": [0, 1]}),
    "kernels.hermite_coefficients": (
        kernels.hermite_coefficients,
        lambda: {"value": torch.tanh, "scale": torch.ones(2).double(), "terms": 5, "tolerance": 1e-6},
    ),
    "kernels.limiting_kernel": (
        kernels.limiting_kernel,
        lambda: {"X": numbers(3, 4), "activation": two.activation("tanh"), "tolerance": 1e-6},
    ),
    "kernels.limiting_kernel_by_quadrature": (
        kernels.limiting_kernel_by_quadrature,
        lambda: {"X": numbers(3, 4), "value": torch.tanh, "tolerance": 1e-6},
    ),
    "kernels.predicted_error": (
        kernels.predicted_error,
        lambda: {
            "kernel": numbers(3, 3),
            "error": numbers(3),
            "y": numbers(3),
            "rate": 0.1,
            "strengths": numbers(4).abs(),
        },
    ),
    "kernels.pair_means": (
        kernels.pair_means,
        lambda: {
            "value": torch.tanh,
            "scale": torch.ones(2).double(),
            "correlation": torch.eye(2).double(),
            "tolerance": 1e-6,
        },
    ),
    "theorems.isometry": (theorems.isometry, lambda: {"X": numbers(3, 4)}),
    "theorems.is_isometric": (theorems.is_isometric, lambda: {"X": numbers(3, 4), "gamma": 0.5, "epsilon": 0.1}),
    "theorems.linear_alignment_law": (
        theorems.linear_alignment_law,
        lambda: {
            "widths": [10, 20],
            "n": 3,
            "d": 4,
            "rate": 0.01,
            "steps": 3,
            "seeds": [0, 1],
            "inputs": "standard",
        },
    ),
    "theorems.log_log_slope": (theorems.log_log_slope, lambda: {"x": [1, 2, 3], "y": [1.0, 2.0, 4.0]}),
    "theorems.parameter_scaling": (
        theorems.parameter_scaling,
        lambda: {
            "ns": [2, 3],
            "ps": [4, 5],
            "ratio": 2.0,
            "activation": "tanh",
            "rate": 0.1,
            "steps": 3,
            "seeds": [0],
            "inputs": "scaled",
        },
    ),
    "theorems.penalty_of_sum": (
        theorems.penalty_of_sum,
        lambda: {"strength": 0.1, "total": 2.0, "schedule": "exponential"},
    ),
    "theorems.proposition_3_3": (
        theorems.proposition_3_3,
        lambda: {"ns": [2, 3], "ratio": 2.0, "activation": "tanh", "seeds": [0]},
    ),
    "theorems.proposition_4_5": (
        theorems.proposition_4_5,
        lambda: {"dimensions": [4, 5], "n": 2, "epsilon": 0.2, "delta": 0.1, "seeds": [0]},
    ),
    "theorems.sufficient_dimension": (
        theorems.sufficient_dimension,
        lambda: {"n": 3, "epsilon": 0.2, "delta": 0.1},
    ),
    "theorems.theorem_3_2": (
        theorems.theorem_3_2,
        lambda: {"start": start(), "activation": "tanh", "rate": 0.01, "steps": 3, "gamma": 0.1, "delta": 0.1},
    ),
    "theorems.theorem_4_2": (
        theorems.theorem_4_2,
        lambda: {
            "start": start(),
            "activation": "tanh",
            "rate": 0.01,
            "steps": 3,
            "penalties": [two.Penalty(0.1, "cutoff", 2)],
            "sum_constant": 1.0,
            "gamma": 0.1,
            "delta": 0.1,
        },
    ),
    "theorems.theorem_4_3": (
        theorems.theorem_4_3,
        lambda: {
            "gram": grams.from_start(start()),
            "d": 4,
            "rate": 0.01,
            "steps": 3,
            "penalties": [two.Penalty(0.1, "cutoff", 2)],
            "sum_constant": 1.0,
            "gamma": 0.1,
            "largest": 10.0,
            "delta": 0.1,
            "on_column_space": True,
        },
    ),
    "theorems.theorem_4_6": (
        theorems.theorem_4_6,
        lambda: {
            "gram": grams.sample([0, 1], n=2, d=8, p=100),
            "d": 8,
            "rate": 0.05,
            "strength": 2.0,
            "sum_constant": 5.0,
            "schedule": "cutoff",
            "delta": 0.1,
            "longest": 100_000,
        },
    ),
    "theorems.vanishing_alignment": (
        theorems.vanishing_alignment,
        lambda: {"start": start(), "activation": "tanh", "rate": 0.01, "steps": 3},
    ),
    "theorems.width_independent": (theorems.width_independent, lambda: {"checks": [some_check(), some_check()]}),
    # deep linear
    "deep.modes": (deep.modes, lambda: {**_MODES, "weights": [[0.1, 0.2], [0.3, 0.1]], "rule": "fa"}),
    "deep.Modes": (
        deep.Modes,
        lambda: {
            "rule": "fa",
            **{name: getattr(chains(), name) for name in ("weights", "feedback", "target", "variance")},
        },
    ),
    "deep.Modes.at": (chains().at, lambda: {"weights": chains().weights}),
    "deep.Initialisation.start": (deep.initialisation("zero").start, lambda: {"size": 1.0, "depth": 3}),
    "deep.initialisation": (deep.initialisation, lambda: {"name": "zero"}),
    "deep.linear": (deep.linear, lambda: {"rule": "fa"}),
    "deep.phase_diagram": (
        deep.phase_diagram,
        lambda: {
            "invariants": [0.5, 1.0],
            "targets": [0.5, 1.0],
            "feedback": 1.0,
            "branch": "output",
            "tolerance": 0.1,
        },
    ),
    "deep.gradient_descent": (
        deep.gradient_descent,
        lambda: {"modes": chains(), "rate": 0.05, "steps": 5, "at": [0, 2, 5]},
    ),
    "deep.gradient_flow": (deep.gradient_flow, lambda: {"modes": chains(), "times": _TIMES, "tolerance": 1e-6}),
    "deep.limit": (deep.limit, lambda: {"modes": chains()}),
    "deep.settled": (deep.settled, lambda: {"modes": chains()}),
    "deep.asymptotic_rate": (deep.asymptotic_rate, lambda: {"modes": chains()}),
    "deep.guaranteed_rate": (deep.guaranteed_rate, lambda: {"modes": chains()}),
    "deep.stable_rate": (deep.stable_rate, lambda: {"modes": chains()}),
    "deep.sufficient_rate": (deep.sufficient_rate, lambda: {"modes": chains()}),
    "deep.learning_time": (deep.learning_time, lambda: {"modes": chains(), "tolerance": 0.1}),
    "deep.learning_slope": (deep.learning_slope, lambda: {"modes": chains(), "tolerance": 0.1}),
    "deep.learning_time_and_slope": (deep.learning_time_and_slope, lambda: {"modes": chains(), "tolerance": 0.1}),
    "deep.depth_slope": (deep.depth_slope, lambda: {"depth": 3}),
    "deep.zero_init": (deep.zero_init, lambda: {**_MODES, "times": _TIMES}),
    "deep.zero_init_time": (deep.zero_init_time, lambda: {**_MODES, "share": 0.5}),
    "deep.critical_invariant": (deep.critical_invariant, lambda: dict(_MODES)),
    "deep.critical_target": (deep.critical_target, lambda: {"K": [-1.0, 0.5], "feedback": 1.0, "variance": 1.0}),
    "deep.degenerate_error": (deep.degenerate_error, lambda: {**_MODES, "times": [0.5, 1.0]}),
    "deep.fixed_points": (deep.fixed_points, lambda: {"K": [-1.0, 0.5], **_MODES}),
    "deep.common_bases": (
        deep.common_bases,
        lambda: dict(zip("XY", deep.task([1.0, 0.5], inputs=4, outputs=3), strict=True)),
    ),
    "deep.compressed": (deep.compressed, lambda: {"X": numbers(6, 4), "Y": numbers(6, 3)}),
    "deep.covariances": (deep.covariances, lambda: {"X": numbers(6, 4), "Y": numbers(6, 3)}),
    "deep.points_of": (
        deep.points_of,
        lambda: dict(zip(("inputs", "cross"), deep.covariances(numbers(6, 4), numbers(6, 3)), strict=True)),
    ),
    "deep.whitened": (deep.whitened, lambda: {"X": numbers(6, 4)}),
    "deep.network": (
        deep.network,
        lambda: {"W": [numbers(5, 4), numbers(3, 5)], "B": [numbers(3, 5, seed=1)], "rule": "fa"},
    ),
    "deep.local_rate": (
        deep.local_rate,
        lambda: {"state": linear_state(), "X": numbers(6, 4), "rule": "fa", "share": 0.5},
    ),
    "deep.relu_gains": (deep.relu_gains, lambda: {"state": linear_state(), "X": numbers(6, 4)}),
    "deep.relu_linearisation": (
        deep.relu_linearisation,
        lambda: {"state": linear_state(), "X": numbers(6, 4), "rule": "fa"},
    ),
    "deep.matrix_gradient_descent": (
        deep.matrix_gradient_descent,
        lambda: {
            "state": linear_state(),
            "X": numbers(6, 4),
            "Y": numbers(6, 3),
            "rule": "fa",
            "rate": 0.01,
            "steps": 3,
            "names": ["loss"],
            "at": [0, 3],
        },
    ),
    "deep.matrix_gradient_flow": (
        deep.matrix_gradient_flow,
        lambda: {
            "state": linear_state(),
            "X": numbers(6, 4),
            "Y": numbers(6, 3),
            "rule": "fa",
            "times": [0.0, 0.1],
            "names": ["loss"],
            "tolerance": 1e-6,
        },
    ),
    "deep.matrix_conservation": (
        deep.matrix_conservation,
        lambda: {
            "state": linear_state(),
            "X": numbers(6, 4),
            "Y": numbers(6, 3),
            "rule": "fa",
            "rate": 0.01,
            "steps": 3,
        },
    ),
    "deep.matrix_invariants": (deep.matrix_invariants, lambda: {"state": linear_state(), "rule": "fa"}),
    "deep.two_layer_convergence": (
        deep.two_layer_convergence,
        lambda: {"state": linear_state(), "X": numbers(6, 4), "Y": numbers(6, 3), "rate": 0.01, "steps": 3},
    ),
    "deep.predict": (
        deep.predict,
        lambda: {
            "W": [numbers(5, 4), numbers(3, 5)],
            "B": [numbers(3, 5, seed=1)],
            "X": numbers(6, 4),
            "Y": numbers(6, 3),
            "rule": "fa",
            "rate": 0.01,
            "steps": 4,
            "at": [0, 4],
            "activation": "linear",
            "decoupling": "outputs",
            "exact": False,
        },
    ),
    "deep.spectral": (
        deep.spectral,
        lambda: {
            **dict(zip("XY", deep.task([1.0, 0.5], inputs=4, outputs=3), strict=True)),
            "weights": [0.1, 0.2],
            "hidden": [5],
            "feedback": 1.0,
            "rule": "fa",
            "seeds": [0, 1],
        },
    ),
    "deep.task": (
        deep.task,
        lambda: {"targets": [1.0, 0.5], "variances": 1.0, "inputs": 4, "outputs": 3, "seed": 0},
    ),
    "deep.reduced": (deep.reduced, lambda: {"state": spectral().state, "start": spectral()}),
    "deep.deviation": (deep.deviation, lambda: {"state": spectral().state, "start": spectral()}),
    "deep.step_rates": (deep.step_rates, lambda: {"trajectory": chain_trajectory()}),
    "deep.error_recursion": (deep.error_recursion, lambda: {"trajectory": every_step()}),
    "deep.exponential_convergence": (deep.exponential_convergence, lambda: {"trajectory": chain_trajectory()}),
    "deep.conserved_invariants": (
        deep.conserved_invariants,
        lambda: {"trajectory": chain_trajectory(), "tolerance": 1e-9},
    ),
    "deep.asymptotic_decay": (deep.asymptotic_decay, lambda: {"trajectory": chain_trajectory(), "tolerance": 0.01}),
    "deep.zero_loss": (deep.zero_loss, lambda: {"trajectory": chain_trajectory()}),
    "deep.learning_time_law": (
        deep.learning_time_law,
        lambda: {"depth": 2, "targets": [0.5, 1.0], "rule": "fa", "feedback": 1.0, "tolerance": 1e-4},
    ),
    # factorisation
    "fac.feedback": (fac.feedback, lambda: {"n": 5, "r": 2, "seeds": [0, 1], "scale": 1.0}),
    "fac.zero": (fac.zero, problem),
    "fac.normal": (fac.normal, lambda: {**problem(), "seeds": [0, 1], "scale": 0.1}),
    "fac.orthonormal": (fac.orthonormal, lambda: {**problem(), "seeds": [0, 1]}),
    "fac.gradient_descent": (
        fac.gradient_descent,
        lambda: {
            "method": "fa",
            **problem(),
            "start": factors(),
            "rate": 1e-3,
            "steps": 3,
            "names": ["loss"],
            "at": [0, 3],
        },
    ),
    "fac.gradient_flow": (
        fac.gradient_flow,
        lambda: {
            "method": "fa",
            **problem(),
            "start": factors(),
            "times": [0.0, 0.1],
            "names": ["loss"],
            "tolerance": 1e-6,
        },
    ),
    "fac.velocity": (fac.velocity, lambda: {"method": "fa", **problem(), "state": factors()}),
    "fac.sufficient_rate": (fac.sufficient_rate, lambda: {"method": "fa", **problem(), "start": factors()}),
    "fac.local_rate": (fac.local_rate, lambda: {"B": problem()["B"], "state": factors()}),
    "fac.best_output": (fac.best_output, lambda: {"Y": numbers(5, 6), "W": numbers(2, 2, 6)}),
    "fac.conserved": (
        fac.conserved,
        lambda: {"Z": numbers(2, 5, 2), "W": numbers(2, 2, 6), "B": problem()["B"]},
    ),
    "fac.lyapunov": (fac.lyapunov, lambda: {**problem(), "Z": numbers(2, 5, 2), "W": numbers(2, 2, 6)}),
    "fac.lyapunov_rate": (fac.lyapunov_rate, lambda: {**problem(), "Z": numbers(2, 5, 2), "W": numbers(2, 2, 6)}),
    "fac.stationary": (fac.stationary, problem),
    "fac.stationary_error": (fac.stationary_error, problem),
    "fac.optimum": (fac.optimum, lambda: {"Y": numbers(5, 6), "r": 2}),
    "fac.optimal_rows": (fac.optimal_rows, lambda: {"Y": numbers(5, 6), "r": 2}),
    "fac.best_error": (fac.best_error, lambda: {"Y": numbers(5, 6), "r": 2}),
    "fac.overlap": (fac.overlap, lambda: {"W": numbers(2, 6), "other": numbers(2, 6, seed=1)}),
    "fac.principal_angles": (fac.principal_angles, lambda: {"W": numbers(2, 6), "other": numbers(2, 6, seed=1)}),
    "fac.range_finder": (fac.range_finder, lambda: {**problem(), "rank": 2, "power": 1}),
    "fac.range_finder_ratios": (
        fac.range_finder_ratios,
        lambda: {
            "Y": numbers(5, 6),
            "B": fac.feedback(5, 4, seeds=[0, 1]),
            "rank": 2,
            "oversampling": [0, 1],
            "power": [0, 1],
        },
    ),
    "fac.expected_bound": (
        fac.expected_bound,
        lambda: {"singular_values": torch.tensor([3.0, 2.0, 1.0]).double(), "r": 2},
    ),
    "fac.last_direction": (fac.last_direction, lambda: {"r": 2, "epsilon": 0.1}),
    "fac.flat_tail": (fac.flat_tail, lambda: {"r": 2, "tail": 3, "share": 0.5}),
    "fac.flat_spectrum": (fac.flat_spectrum, lambda: {"m": 5, "r": 2, "top": 1.1}),
    "fac.flat_tail_error": (fac.flat_tail_error, lambda: {"top": numbers(2, 2, 2), "tail_energy": 1.0}),
    "fac.RatioLaw": (fac.RatioLaw, lambda: {"r": 2, "epsilon": 0.1}),
    "fac.from_network": (
        fac.from_network,
        lambda: {"first": numbers(3, 5), "second": numbers(4, 3), "carried": numbers(4, 3, seed=1)},
    ),
    "fac.isotropic": (fac.isotropic, lambda: {"points": 6, "m": 4, "seed": 0}),
    "fac.rate_in_factorisation": (
        fac.rate_in_factorisation,
        lambda: {"rate": 0.1, "outputs": 3, "variance": 1.0, "reduction": "mean"},
    ),
    "fac.conservation": (fac.conservation, lambda: {"trajectory": fac_trajectory(), "tolerance": 1e-9}),
    "fac.descent_of_feedback": (fac.descent_of_feedback, lambda: {"trajectory": fac_trajectory()}),
    "fac.optimum_reached": (fac.optimum_reached, lambda: {"trajectory": fac_trajectory(), "tolerance": 1e-6}),
    "fac.stationary_limit": (fac.stationary_limit, lambda: {"trajectory": fac_trajectory(), "tolerance": 1e-6}),
    "fac.alignment_growth": (fac.alignment_growth, lambda: {"trajectory": fac_trajectory("fa*"), "tolerance": 1e-6}),
    "fac.monotone_alignment": (
        fac.monotone_alignment,
        lambda: {"trajectory": fac_trajectory("fa*"), "tolerance": 1e-6},
    ),
    "fac.gram_drift": (fac.gram_drift, lambda: {"trajectory": fac_trajectory("fa*")}),
    "fac.optimal_output_bound": (fac.optimal_output_bound, lambda: {"trajectory": fac_trajectory("fa*")}),
    "fac.separation": (fac.separation, lambda: {"r": 2, "epsilon": 0.1, "seeds": [0, 1], "delta": 0.5}),
    "fac.near_orthogonality": (
        fac.near_orthogonality,
        lambda: {"Y": numbers(6, 5), "B": fac.feedback(6, 2, seeds=[0, 1])},
    ),
    "fac.sampling_bound": (fac.sampling_bound, problem),
    # conservation
    "law.activation": (law.activation, lambda: {"name": "relu"}),
    "law.rule": (law.rule, lambda: {"name": "fa"}),
    "law.loss": (law.loss, lambda: {"name": "squared"}),
    "law.Loss.mean": (law.loss("squared").mean, lambda: {"f": numbers(2, 6, 3), "y": numbers(6, 3)}),
    "law.Loss.error": (law.loss("squared").error, lambda: {"f": numbers(2, 6, 3), "y": numbers(6, 3)}),
    "law.entrywise": (
        law.entrywise,
        lambda: {"name": "mine", "feedback": torch.sign, "alignment_term": torch.abs},
    ),
    "law.Dynamics": (
        law.Dynamics,
        lambda: {
            "activation": law.activation("relu"),
            "rule": law.rule("fa"),
            "loss": law.loss("squared"),
            "rates": 1.0,
            "decays": (0.1, 0.1),
            "tracking": 1.0,
        },
    ),
    "law.Dynamics.of_layers": (dynamics().of_layers, lambda: {"state": state()}),
    "law.draw": (
        law.draw,
        lambda: {"widths": [4, 5, 3], "seeds": [0, 1], "dynamics": dynamics(), "bias": True, "scale": 1.0},
    ),
    "law.State.W": (
        lambda W: law.output(law.State(W=W), dynamics(), numbers(6, 4)),
        lambda: {"W": (numbers(2, 5, 4), numbers(2, 3, 5))},
    ),
    "law.aligned_forever": (law.aligned_forever, _law),
    "law.alignment": (law.alignment, _law),
    "law.incoming": (law.incoming, _law),
    "law.invariant": (law.invariant, _law),
    "law.alignment_term": (law.alignment_term, _law),
    "law.anti": (law.anti, _law),
    "law.dominant": (law.dominant, lambda: _law(share=0.5)),
    "law.small": (law.small, lambda: {"state": state(), "size": 0.1}),
    "law.decay_of_invariant": (
        law.decay_of_invariant,
        lambda: {"C": numbers(2, 5), "P": numbers(2, 5), "decay": 0.1},
    ),
    "law.output": (law.output, lambda: _law(X=numbers(6, 4))),
    "law.loss_of": (law.loss_of, lambda: _law(**_xy())),
    "law.gradients": (law.gradients, lambda: _law(**_xy(), true=True)),
    "law.velocity": (law.velocity, lambda: _law(**_xy())),
    "law.gradient_descent": (
        law.gradient_descent,
        lambda: _law(**_xy(), rate=0.01, steps=3, names=["loss", "expected_change"], at=[0, 3]),
    ),
    "law.gradient_descent in batches": (
        law.gradient_descent,
        lambda: _law(**_xy(), rate=0.01, steps=torch.tensor([[0, 1], [2, 3]]), names=["loss"], at=[0, 2]),
    ),
    "law.gradient_flow": (
        law.gradient_flow,
        lambda: _law(**_xy(), times=torch.tensor([0.0, 0.01]).double(), names=["loss"], tolerance=1e-5, longest=2000),
    ),
    "law.conservation": (law.conservation, lambda: {"trajectory": law_trajectory(), "tolerance": 1e-9}),
    "law.alignment_bound": (law.alignment_bound, lambda: {"trajectory": law_trajectory()}),
    "law.lasting_alignment": (law.lasting_alignment, lambda: {"trajectory": aligned_trajectory()}),
    "law.decay_equilibrium": (
        law.decay_equilibrium,
        lambda: {"trajectory": law_trajectory(decay=0.1), "tolerance": 1e-3, "still": 1e-3},
    ),
    # attention
    "att.draw": (
        att.draw,
        lambda: {
            "seeds": [0, 1],
            "dynamics": dynamics(),
            "inputs": 2,
            "width": 3,
            "heads": 2,
            "d": 2,
            "above": 3,
            "outputs": 2,
            "scale": 0.5,
        },
    ),
    "att.gradients": (att.gradients, _attended),
    "att.invariants": (
        att.invariants,
        lambda: {name: value for name, value in _attended().items() if name not in ("X", "y")},
    ),
    "att.gradient_descent": (att.gradient_descent, lambda: _attended(rate=0.01, steps=3, at=[0, 3])),
    "att.gradient_flow": (
        att.gradient_flow,
        lambda: _attended(times=torch.tensor([0.0, 0.01]).double(), tolerance=1e-5, longest=2000),
    ),
    "att.conservation": (
        att.conservation,
        lambda: {
            "trajectory": att.gradient_descent(**_attended(rate=0.01, steps=3)),
            "law": "queries",
            "tolerance": 1e-9,
        },
    ),
    # dominance
    "dom.split": (
        dom.split,
        lambda: {"descent": numbers(4, 2), "gradient_norm": numbers(4, 2).abs(), "taken_norm": numbers(4, 2).abs()},
    ),
    "dom.largest_kappa": (dom.largest_kappa, lambda: {"dominance": numbers(2, 4)}),
    "dom.lojasiewicz_constant": (
        dom.lojasiewicz_constant,
        lambda: {"loss": numbers(2, 4).abs(), "gradient_norm": numbers(2, 4).abs(), "exponent": 1.0},
    ),
    "dom.lojasiewicz_exponent": (
        dom.lojasiewicz_exponent,
        lambda: {"loss": numbers(4).abs(), "gradient_norm": numbers(4, seed=1).abs()},
    ),
    "dom.predicted_loss": (
        dom.predicted_loss,
        lambda: {
            "initial": numbers(2).abs(),
            "times": torch.tensor(_TIMES).double(),
            "kappa": numbers(2).abs(),
            "mu": numbers(2).abs(),
            "exponent": 1.0,
        },
    ),
    "dom.convergence": (
        dom.convergence,
        lambda: {"trajectory": law_trajectory(), "exponent": 1.0, "kappa": 0.1, "mu": 0.1},
    ),
    "dom.least_product": (dom.least_product, lambda: {"B": numbers(3, 4), "W": numbers(3, 4, seed=1)}),
    "dom.neuron_descent": (
        dom.neuron_descent,
        lambda: {"state": single(), "dynamics": dynamics(), **_xy(1)},
    ),
    "dom.lasting_descent": (dom.lasting_descent, lambda: {"trajectory": law_trajectory(1)}),
    "dom.squared_loss_rate": (
        dom.squared_loss_rate,
        lambda: {"state": single(), "dynamics": dynamics(), "X": numbers(6, 4)},
    ),
    # data
    "separability.linear_margin": (separability.linear_margin, lambda: {**_FLAT, "bias": True}),
    "separability.orthogonal_separability": (separability.orthogonal_separability, lambda: dict(_FLAT)),
    "separability.full_rank_gram": (separability.full_rank_gram, lambda: {"X": numbers(6, 8)}),
    "minimum_norm.least_norm": (minimum_norm.least_norm, lambda: {"X": numbers(3, 5), "Y": numbers(3, 2)}),
    "minimum_norm.minimum_norm": (
        minimum_norm.minimum_norm,
        lambda: {
            "X": numbers(3, 5),
            "Y": numbers(3, 2),
            "hidden": 4,
            "sizes": [0.0, 0.1],
            "seeds": [0],
            "steps": 200,
            "rate": 0.01,
            "converged": 1e-6,
        },
    ),
}


@cache
def some_check() -> Any:
    call, arguments = GOOD["theorems.theorem_4_6"]
    return call(**arguments())


@cache
def every_step() -> deep.ModeTrajectory:
    return deep.gradient_descent(chains(), rate=0.05, steps=5, at=range(6))


@cache
def engine_of_classes() -> two.WeightSpace:
    return two.WeightSpace(two.draw([0, 1], n=3, d=4, p=6, outputs=2), rate=0.01)
