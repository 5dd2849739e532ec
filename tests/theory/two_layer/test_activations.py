"""Every activation against SciPy and finite differences, and the facts that the table states of it."""

import numpy as np
import pytest
import torch
from scipy import special

from falign.theory.two_layer import ACTIVATIONS, activation
from falign.theory.two_layer._activations import fastest_form

VALUES = {
    "identity": lambda u: u,
    "relu": lambda u: np.maximum(u, 0),
    "tanh": np.tanh,
    "sigmoid": special.expit,
    "erf": special.erf,
}
U = torch.cat([torch.linspace(-30, 30, 201), torch.linspace(-3, 3, 2001)]).double() + 1e-3


def test_the_table_is_complete():
    assert list(ACTIVATIONS) == list(VALUES)
    assert all(activation(name).name == name for name in VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_value_and_derivative(name):
    psi = activation(name)
    value, slope = psi.both(U)
    assert np.allclose(value, VALUES[name](U.numpy()), rtol=1e-14, atol=1e-15)
    assert torch.equal(slope, psi.derivative(U))
    h = 1e-6
    assert torch.allclose(slope, (psi.value(U + h) - psi.value(U - h)) / (2 * h), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", VALUES)
def test_written_forms_are_the_activation(name, dtype):
    """``scale φ(stretch u) + shift`` and the carried slope, to a rounding of the dtype."""
    u, b = U.to(dtype), torch.linspace(-2, 2, len(U), dtype=dtype)
    psi = fastest_form(activation(name), u)
    value, carried = torch.empty_like(u), torch.empty_like(u)
    psi.inner.write(u * psi.stretch, value)
    psi.inner.write_carried(b, u * psi.stretch, value, carried)
    expected, slope = activation(name).both(u.double())
    tolerance = {"rtol": 1e-6, "atol": 2e-7} if dtype == torch.float32 else {"rtol": 1e-14, "atol": 1e-15}
    assert torch.allclose((psi.scale * value + psi.shift).double(), expected, **tolerance)
    carried = carried.double() * psi.scale * psi.stretch
    assert torch.allclose(carried, slope * b.double(), rtol=tolerance["rtol"], atol=4 * tolerance["atol"])


@pytest.mark.parametrize("name", VALUES)
def test_stated_bounds_are_the_suprema(name):
    psi = activation(name)
    u = torch.linspace(-12, 12, 400_001, dtype=torch.float64) + 1e-7
    value, slope = psi.both(u)
    second = (slope[2:] - slope[:-2]) / (u[2:] - u[:-2])
    if not psi.smooth:
        second = second[(u[1:-1].abs() > 1e-3)]
    for found, bound in zip((value, slope, second), psi.bounds, strict=True):
        largest = found.abs().max().item()
        assert largest >= 11 if bound == np.inf else largest == pytest.approx(bound, rel=1e-5, abs=1e-8)
    assert psi.bounded == (name in ("tanh", "sigmoid", "erf"))
    assert psi.smooth == (name != "relu")


def test_relu_is_flat_at_zero():
    assert activation("relu").derivative(torch.zeros(2)).tolist() == [0, 0]


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown activation 'gelu': choose one of identity, relu, tanh, sigmoid, erf"):
        activation("gelu")
