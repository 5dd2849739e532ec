"""How far single weights come, against n and p: the exponents of theorem 3.2's second half."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
import torch

from falign.theory.door import public
from falign.theory.two_layer.activations import activation as activation_named
from falign.theory.two_layer.dual import Dual
from falign.theory.two_layer.kernels import limiting_kernel
from falign.theory.two_layer.start import Scale, draw
from falign.theory.two_layer.theorems.conditions import spectrum
from falign.theory.two_layer.trajectory import simulate, spaced


@dataclass(frozen=True, kw_only=True)
class Slope:
    """An exponent fitted on logarithms, with its standard error."""

    value: float
    error: float


@dataclass(frozen=True, kw_only=True)
class ParameterScaling:
    """Exponents of ``γ max_t max_r |β_r(t) - β_r(0)|`` and of the same for w_r over ``√(log p)``.

    Attributes:
        beta_in_p: Bounded by a law of exponent -1/2.
        beta_in_n: Bounded by a law of exponent 1.
        weight_in_p: -1/2.
        weight_in_n: 1.
        rows: (n, p, seed's change of w, change of β, γ) of every run.
    """

    beta_in_p: Slope
    beta_in_n: Slope
    weight_in_p: Slope
    weight_in_n: Slope
    rows: tuple[tuple[int, int, float, float, float], ...]


@public
def parameter_scaling(
    ns: Sequence[int],
    ps: Sequence[int],
    *,
    ratio: float = 2.0,
    activation: str = "tanh",
    rate: float = 0.5,
    steps: int = 200,
    seeds: Sequence[int],
    inputs: Scale = "scaled",
) -> ParameterScaling:
    """Run every (n, p), d = ratio · n, and fit ``log change = a + s_n log n + s_p log p`` over all runs.

    The bounds of theorem 3.2, ``c1 n√(log p)/(γ√p)`` and ``c2 n/(γ√p)``, have s_p = -1/2 and s_n = 1 after γ and
    √(log p) are taken out. The p exponent is what happens, but for one thing: a maximum over p neurons
    grows like √(log p) until ψ saturates, which lifts the exponent of β by some 1/(2 log p), 0.07 at p = 1000. The n
    exponent is an upper bound, since |Σ_t e(t)| is nearer √n than n.

    Args:
        ns: Points, at least two values.
        ps: Widths, at least two values.
        ratio: d/n: fixed, so that γ hardly depends on n.
        activation: A name of ``ACTIVATIONS``.
        rate: η.
        steps: Steps of each run.
        seeds: Draws of each (n, p).
        inputs: Distribution of the inputs.

    Raises:
        ValueError: fewer than two sample sizes or widths, a width below 2, or runs that stand still or diverge.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), theorem 3.2, equation 3.2.
    """
    if len(set(ns)) < 2 or len(set(ps)) < 2:
        raise ValueError(f"exponents need at least two sample sizes and two widths, got {list(ns)} and {list(ps)}")
    if min(ps) < 2 or steps < 1 or not 0 < ratio < 1e9:
        raise ValueError(f"widths are {list(ps)}, steps {steps} and ratio {ratio}: expected 2, 1 and above 0 at least")
    rows = []
    for n in ns:
        for p in ps:
            start = draw(seeds, n=n, d=round(ratio * n), p=p, activation=activation, inputs=inputs)
            gamma = spectrum(limiting_kernel(start.X, activation_named(activation)))[0]
            engine = Dual(start, activation=activation, rate=rate)
            values = simulate(engine, spaced(steps, 12)).values
            weight, beta = (values[name][:, 0].amax(-1) for name in ("weight_change", "beta_change"))
            rows += [(n, p, *numbers) for numbers in torch.stack([weight, beta, gamma], 1).tolist()]
    table = np.array(rows)
    if not (table > 0).all() or not np.isfinite(table).all():
        raise ValueError(f"a run with rate={rate} did not move or diverged: exponents need a rate of another size")
    design = np.column_stack([np.ones(len(rows)), np.log(table[:, 0]), np.log(table[:, 1])])
    weight_n, weight_p = _slopes(design, np.log(table[:, 2] * table[:, 4]) - np.log(np.log(table[:, 1])) / 2)
    beta_n, beta_p = _slopes(design, np.log(table[:, 3] * table[:, 4]))
    return ParameterScaling(
        beta_in_p=beta_p, beta_in_n=beta_n, weight_in_p=weight_p, weight_in_n=weight_n, rows=tuple(rows)
    )


@public
def log_log_slope(x: Sequence[int] | Sequence[float], y: Sequence[float]) -> Slope:
    """The exponent of ``y ∝ xˢ`` by least squares on logarithms.

    Raises:
        ValueError: there are not as many x as y, two different x at least, or a number is not positive.
    """
    if len(x) != len(y) or len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"x has {len(x)} numbers and y {len(y)}, expected as many, positive, and two different x")
    return _slopes(np.column_stack([np.ones(len(x)), [log(value) for value in x]]), np.log(np.array(y)))[0]


def _slopes(design: np.ndarray, target: np.ndarray) -> list[Slope]:
    """Least squares with an intercept first; the other coefficients and their standard errors."""
    solution, *_ = np.linalg.lstsq(design, target, rcond=None)
    rest = target - design @ solution
    freedom = max(1, len(target) - design.shape[1])
    covariance = float(rest @ rest) / freedom * np.linalg.inv(design.T @ design)
    return [Slope(value=float(solution[k]), error=sqrt(float(covariance[k, k]))) for k in range(1, design.shape[1])]
