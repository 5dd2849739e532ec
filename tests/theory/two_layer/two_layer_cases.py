"""Rates, penalties and comparisons that the tests of the engines share."""

import torch

from falign.theory.two_layer import Penalty, Trajectory

RATES = {"identity": 2e-3, "relu": 2e-3, "tanh": 1e-2, "sigmoid": 1e-2, "erf": 1e-2}
"""activation -> a rate at which small problems converge."""

PENALTIES = [
    Penalty(),
    Penalty(2.0),
    Penalty(5.0, "cutoff", 30.0),
    Penalty(5.0, "inverse-square", 20.0),
    Penalty(5.0, "exponential", 20.0),
]


def agree(one: Trajectory, other: Trajectory, tolerance: float, without: tuple[str, ...] = ()) -> None:
    """Every number of both, relative to its largest or to 1."""
    assert set(one.values) == set(other.values) - set(without)
    assert torch.equal(one.diverged, other.diverged)
    for name, values in one.values.items():
        expected = other.values[name].double()
        error = (values.double() - expected).abs().max() / expected.abs().max().clamp_min(1)
        assert error <= tolerance, f"{name}: {error:.1e}"
