"""Ḡ against closed forms, adaptive quadrature and sampling; G and H against loops."""

from math import erf, pi, sqrt, tanh

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad, quad

from falign.theory.two_layer._activations import ACTIVATIONS, Activation
from falign.theory.two_layer._dual import Dual
from falign.theory.two_layer._start import draw
from falign.theory.two_layer._weight_space import WeightSpace
from falign.theory.two_layer.kernels import (
    follow_kernels,
    hermite_coefficients,
    kernels,
    kernels_of_engine,
    kernels_of_weights,
    limiting_kernel,
    limiting_kernel_by_quadrature,
)


def _inputs(n: int, d: int, scale: float) -> torch.Tensor:
    """Inputs with every degenerate pair: equal, opposite, nearly parallel, zero."""
    X = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    X[1], X[2], X[4] = -X[0] / 2, X[0], 0
    X[3] = X[0] + 0.01 * X[5]
    return X


def _density(u: float) -> float:
    return np.exp(-u * u / 2) / sqrt(2 * pi)


def _value(name: str):
    return {"tanh": tanh, "sigmoid": lambda u: 1 / (1 + np.exp(-u)), "erf": erf}[name]


@pytest.mark.parametrize("scale", [150**-0.5, 1.0])
@pytest.mark.parametrize("name", ["erf", "identity"])
def test_quadrature_equals_closed_forms_at_paper_norms_and_degenerate_pairs(name, scale):
    X = _inputs(12, 150, scale)
    found, error = limiting_kernel_by_quadrature(X, ACTIVATIONS[name].value)
    closed = limiting_kernel(X, ACTIVATIONS[name])
    assert error <= 1e-10
    assert (found - closed).abs().max() <= 1e-13 * closed.max()


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
@pytest.mark.parametrize(("first", "second", "cosine"), [(0.7, 1.3, 0.4), (1.0, 1.0, -0.95), (3.0, 2.0, 0.99)])
def test_quadrature_equals_adaptive_integration_in_two_dimensions(name, first, second, cosine):
    value, across = _value(name), sqrt(1 - cosine**2)
    X = torch.tensor([[first, 0.0], [second * cosine, second * across]], dtype=torch.float64)
    expected, _ = dblquad(
        lambda z, u: _density(u) * _density(z) * value(first * u) * value(second * (cosine * u + across * z)),
        -9, 9, -9, 9, epsabs=1e-11, epsrel=1e-11,
    )  # fmt: skip
    assert float(limiting_kernel(X, ACTIVATIONS[name])[0, 1]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_diagonal_at_norm_twelve_equals_adaptive_integration(name):
    value, norm = _value(name), sqrt(150)
    expected, _ = quad(lambda u: _density(u) * value(norm * u) ** 2, -9, 9, points=[0], epsabs=1e-13, limit=400)
    X = torch.full((1, 150), 1.0, dtype=torch.float64)
    assert float(limiting_kernel(X, ACTIVATIONS[name])) == pytest.approx(expected, abs=1e-11)


def test_sharp_tanh_pairs_equal_a_conditional_integral():
    cosine, norm = 0.3, sqrt(150)
    fine = np.linspace(-9, 9, 4001)
    weight = np.exp(-(fine**2) / 2)
    weight /= weight.sum()
    inner = np.tanh(norm * (cosine * fine[:, None] + sqrt(1 - cosine**2) * fine)) @ weight
    expected = float((np.tanh(norm * fine) * inner) @ weight)
    X = norm * torch.tensor([[1.0, 0.0], [cosine, sqrt(1 - cosine**2)]], dtype=torch.float64)
    assert float(limiting_kernel(X, ACTIVATIONS["tanh"])[0, 1]) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_limit_is_the_mean_of_the_finite_kernel(name):
    X = _inputs(7, 20, 0.3)
    W = torch.randn(200_000, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden = ACTIVATIONS[name].value(W @ X.mT)
    products = hidden[:, :, None] * hidden[:, None, :]
    error = products.std(0) / sqrt(len(W))
    assert ((products.mean(0) - limiting_kernel(X, ACTIVATIONS[name])).abs() <= 5 * error + 1e-12).all()


def test_limit_is_batched_and_positive():
    X = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    for psi in ACTIVATIONS.values():
        batched = limiting_kernel(X, psi)
        assert batched.shape == (2, 3, 6, 6)
        torch.testing.assert_close(batched[1, 2], limiting_kernel(X[1, 2], psi), rtol=0, atol=1e-14)
        assert torch.linalg.eigvalsh(batched).min() > 0


def test_a_kink_is_refused_at_the_tolerance_and_met_at_a_looser_one():
    X = _inputs(6, 10, 1.0)
    with pytest.raises(ValueError, match="larger tolerance"):
        limiting_kernel_by_quadrature(X, torch.relu)
    found, error = limiting_kernel_by_quadrature(X, torch.relu, tolerance=1e-5)
    closed = limiting_kernel(X, ACTIVATIONS["relu"])
    assert (found - closed).abs().max() <= 1e-5 * closed.max()
    assert error <= 1e-5


def test_an_integrand_that_does_not_decay_is_refused():
    with pytest.raises(ValueError, match="decay"):
        limiting_kernel_by_quadrature(torch.full((1, 1), 12.0), torch.exp)


def test_an_activation_of_ones_own_needs_no_closed_form():
    sine = Activation(
        name="sine", value=torch.sin, slope=lambda u, _: torch.cos(u), smooth=True, bounds=(1.0, 1.0, 1.0)
    )
    X = _inputs(6, 10, 0.5)
    gram, square = X @ X.mT, X.square().sum(1)
    decay = torch.exp(-(square[:, None] + square) / 2)
    torch.testing.assert_close(limiting_kernel(X, sine), decay * torch.sinh(gram), rtol=0, atol=1e-13)


def test_hermite_coefficients_of_a_square():
    found = hermite_coefficients(torch.square, torch.tensor([2.0]), 5)
    expected = torch.tensor([[4.0, 0.0, 4 * sqrt(2), 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_kernels_equal_loops_over_neurons(name):
    start = draw([3], n=4, d=5, p=6, activation=name)
    X, W, beta, b = (tensor[0].numpy() for tensor in (start.X, start.W, start.beta, start.b))
    psi = ACTIVATIONS[name]
    G, H = np.zeros((4, 4)), np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            for r in range(6):
                u, v = torch.tensor(W[r] @ X[i]), torch.tensor(W[r] @ X[j])
                G[i, j] += float(psi.value(u) * psi.value(v)) / 6
                slopes = float(psi.derivative(u) * psi.derivative(v))
                H[i, j] += beta[r] * b[r] * slopes * (X[i] @ X[j]) / 6
    found = kernels_of_weights(start.X, start.W, start.beta, start.b, psi)
    np.testing.assert_allclose(found.G[0].numpy(), G, atol=1e-12)
    np.testing.assert_allclose(found.H[0].numpy(), H, atol=1e-12)
    reduced = kernels(start.W @ start.X.mT, start.X @ start.X.mT, start.beta, start.b, psi)
    torch.testing.assert_close(reduced.H, found.H)


def test_kernels_predict_a_small_step_to_first_order():
    start = draw([0, 1], n=5, d=7, p=40, activation="tanh")
    found = kernels_of_weights(start.X, start.W, start.beta, start.b, ACTIVATIONS["tanh"])
    rests = []
    for rate in (1e-3, 1e-4):
        engine = WeightSpace(start, activation="tanh", rate=rate)
        before = engine.error()[:, 0, :, None]
        engine.advance(1)
        predicted = before - rate * (found.G + found.H) @ before
        rests.append(float((engine.error()[:, 0, :, None] - predicted).norm()))
    assert rests[0] / rests[1] == pytest.approx(100, rel=0.1)


def test_extremes_along_training_are_those_of_the_weights():
    start = draw([0, 1], n=5, d=7, p=300, activation="tanh", inputs="scaled")
    trajectory = follow_kernels(Dual(start, activation="tanh", rate=0.3), [0, 5, 60])
    assert trajectory.values["G_min"].shape == (2, 1, 3)
    assert (trajectory.values["G_min"] > 0).all()
    assert (trajectory.values["H_min"] < 0).any()
    weight_space = WeightSpace(start, activation="tanh", rate=0.3)
    weight_space.advance(60)
    direct = kernels_of_weights(
        start.X[:, None], weight_space.W, weight_space.beta, start.b[:, None], ACTIVATIONS["tanh"]
    ).extremes()
    for name, values in trajectory.values.items():
        torch.testing.assert_close(values[..., -1], direct[name], rtol=0, atol=1e-12)


def test_steps_behind_the_engine_are_refused():
    engine = Dual(draw([0], n=2, d=3, p=4, activation="tanh"), activation="tanh", rate=0.1)
    engine.advance(3)
    with pytest.raises(ValueError, match="must increase"):
        follow_kernels(engine, [1])
    assert kernels_of_engine(engine).G.shape == (1, 1, 2, 2)
