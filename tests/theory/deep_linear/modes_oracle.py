"""Scalar chains in plain loops: what the recursion, the flow and the learning time are compared with."""

import numpy as np
from scipy.integrate import solve_ivp


def carriers(rule, θ, m):
    """c_l of one mode, by the definition of each rule."""
    depth = len(θ)
    if rule == "fa":
        return [np.prod(m[layer:]) for layer in range(depth)]
    if rule == "dfa":
        return [*m, 1.0]
    return [np.prod(θ[layer + 1 :]) for layer in range(depth)]


def velocity(rule, θ, m, λ, s):
    e = λ - s * np.prod(θ)
    c = carriers(rule, θ, m)
    return np.array([c[layer] * np.prod(θ[:layer]) * e for layer in range(len(θ))])


def steps(rule, θ, m, λ, s, rate, count):
    """Weights of every step [steps+1 layers]."""
    rows = [np.array(θ, dtype=float)]
    for _ in range(count):
        rows.append(rows[-1] + rate * velocity(rule, rows[-1], m, λ, s))
    return np.array(rows)


def flow(rule, θ, m, λ, s, times):
    """Weights at the times [times layers], all layers integrated."""
    solved = solve_ivp(
        lambda t, x: velocity(rule, x, m, λ, s),
        (0, times[-1]),
        np.array(θ, dtype=float),
        "DOP853",
        times,
        rtol=1e-12,
        atol=1e-14,
    )
    return solved.y.T


def learning_time(rule, θ, m, λ, s, tolerance, longest):
    """First time of |e| = tolerance λ, by the event of a solver; inf if none up to ``longest``."""

    def event(t, x):
        return abs(λ - s * np.prod(x)) - tolerance * λ

    event.terminal = True
    if event(0, np.array(θ, dtype=float)) <= 0:
        return 0.0
    solved = solve_ivp(
        lambda t, x: velocity(rule, x, m, λ, s),
        (0, longest),
        np.array(θ, dtype=float),
        "DOP853",
        events=event,
        rtol=1e-10,
        atol=1e-12,
        max_step=0.1,
    )
    return solved.t_events[0][0] if len(solved.t_events[0]) else np.inf
