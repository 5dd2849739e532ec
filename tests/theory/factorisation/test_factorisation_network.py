"""A two-layer linear network trained by this package is the factorisation."""

import pytest
import torch
from factorisation_cases import matrix

import falign
from falign.theory.factorisation import (
    best_error,
    from_network,
    gradient_descent,
    isotropic,
    optimum,
    rate_in_factorisation,
    stationary_error,
)

N, M, R = 7, 9, 3


def _model(rule="fa"):
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(M, R, bias=False), torch.nn.Linear(R, N, bias=False)).double()
    return falign.convert(model, rule) if rule else model


def _seen(model):
    return from_network(model[0].weight, model[1].weight, model[1].feedback.B)


def _trained(model, X, labels, rate, steps):
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(model(X), labels).backward()
        optimiser.step()


@pytest.mark.parametrize("variance", [1.0, 0.5])
def test_a_trained_network_is_the_recursion(variance):
    Y, X = matrix(N, M), isotropic(40, M, seed=1) * variance**0.5
    model = _model()
    B, start = _seen(model)
    assert torch.equal(B[0], falign.feedback_state(model)["1"].mT)
    rate = rate_in_factorisation(0.3, N, variance=variance)
    trajectory = gradient_descent("fa", Y, B, start, rate=rate, steps=300, names=["loss", "error"])
    first = torch.nn.functional.mse_loss(model(X), X @ Y.mT).item()
    assert first == pytest.approx(float(trajectory["loss"][0, 0]) * variance * 2 / N, rel=1e-12)
    _trained(model, X, X @ Y.mT, 0.3, 300)
    torch.testing.assert_close(model[0].weight[None], trajectory.end.W, rtol=0, atol=1e-10)
    torch.testing.assert_close(model[1].weight[None], trajectory.end.Z, rtol=0, atol=1e-10)


def test_gradient_descent_on_the_network_is_that_of_the_factorisation():
    Y, X = matrix(N, M), isotropic(40, M, seed=1)
    B, start = _seen(_model())
    model = _model(rule=None)
    start = start._replace(W=model[0].weight.detach()[None], Z=model[1].weight.detach()[None])
    trajectory = gradient_descent("gd", Y, B, start, rate=rate_in_factorisation(0.1, N), steps=200, names=[])
    _trained(model, X, X @ Y.mT, 0.1, 200)
    torch.testing.assert_close(model[0].weight[None], trajectory.end.W, rtol=0, atol=1e-10)


@pytest.mark.unchecked
@pytest.mark.parametrize("rank", [2, N])
def test_where_the_network_ends(rank):
    Y, X = matrix(N, M, rank), isotropic(M, M, seed=1)
    model = _model()
    with torch.no_grad():
        model[1].weight.zero_()
    _trained(model, X, X @ Y.mT, 0.6, 2000)
    error = (model[1].weight @ model[0].weight - Y).norm().item()
    assert error == pytest.approx(float(stationary_error(Y, _seen(model)[0])), abs=1e-8)
    if rank < R:
        assert error < 1e-8
        assert float((Y - optimum(Y, R)).norm()) < 1e-12
    else:
        assert error > 1.01 * float(best_error(Y, R))


def test_fresh_gaussian_inputs_are_isotropic_in_the_mean():
    Y, random = matrix(N, M, 2), torch.Generator().manual_seed(0)
    model = _model()
    with torch.no_grad():
        model[1].weight.zero_()
    B, start = _seen(model)
    trajectory = gradient_descent(
        "fa", Y, B, start, rate=rate_in_factorisation(0.1, N), steps=1500, names=["error"], at=[0, 100, 1500]
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1000):
        X = torch.randn(64, M, generator=random, dtype=torch.float64)
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(model(X), X @ Y.mT).backward()
        optimiser.step()
        if step == 99:
            early = (model[1].weight @ model[0].weight - Y).norm().item()
    assert early == pytest.approx(float(trajectory["error"][0, 1]), rel=0.1)
    assert (model[1].weight @ model[0].weight - Y).norm().item() < 1e-4 * float(Y.norm())


def test_rates_by_loss():
    assert rate_in_factorisation(0.3, 4, reduction="half") == 0.3
    assert rate_in_factorisation(0.3, 4, variance=2.0) == pytest.approx(0.3)
    assert rate_in_factorisation(0.3, 4, reduction="sum") == 0.6
    X = isotropic(20, 6, seed=0)
    torch.testing.assert_close(X.mT @ X / 20, torch.eye(6).double())
