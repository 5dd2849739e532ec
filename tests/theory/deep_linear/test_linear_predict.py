"""Predicted loss curves beside trained PyTorch networks, the exact matrix dynamics and NumPy."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from linear_cases import RULES, digits, drawn, loss, parts, points, velocities
from torch import nn

import falign
from falign.theory.deep_linear import _steps
from falign.theory.deep_linear._network import matrix_gradient_descent, network
from falign.theory.deep_linear._predict import predict, relu_gains, relu_linearisation
from falign.theory.deep_linear._spectral import spectral, task

AT = [0, 5, 10, 20, 50, 100, 200, 300]

untyped = pytest.mark.unchecked


def converted(depth, rule, hidden=32, relu=False, seed=0):
    """A PyTorch network with its initial weights and feedback; W and B as ``predict`` takes them."""
    torch.manual_seed(seed)
    sizes = [64, *[hidden] * (depth - 1), 10]
    layers = [nn.Linear(into, out, bias=False) for into, out in pairwise(sizes)]
    between = [part for layer in layers[:-1] for part in ([layer, nn.ReLU()] if relu else [layer])]
    model = nn.Sequential(*between, layers[-1]).double()
    falign.convert(model, rule, seed=seed)
    W = [layer.weight.detach().clone() for layer in layers]
    return model, W, [] if rule == "bp" else [layer.feedback.B.clone() for layer in layers[1:]]


def trained(model, X, Y, rate, at, batch=None):
    """The losses of all points at the recorded steps of SGD; of full batches, or of batches in order."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=rate), []
    for step in range(at[-1] + 1):
        if step in at:
            with torch.no_grad():
                losses.append(float((model(X) - Y).square().sum(1).mean() / 2))
        chosen = slice(None) if batch is None else torch.arange(step * batch, (step + 1) * batch) % len(X)
        optimizer.zero_grad()
        ((model(X[chosen]) - Y[chosen]).square().sum(1).mean() / 2).backward()
        optimizer.step()
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.unchecked
@pytest.mark.parametrize(("depth", "rule"), [(2, "fa"), (3, "fa"), (3, "dfa"), (2, "bp")])
def test_predicted_beside_a_trained_network(depth, rule):
    """The exact curve is the trained one; that of the modes is within the error that ``predict`` states."""
    pytest.importorskip("sklearn")
    X, Y = digits(centred=True)
    model, W, B = converted(depth, rule)
    found = predict(W, B, X, Y, rule=rule, rate=0.05, steps=AT[-1], at=AT, exact=True)
    losses = trained(model, X, Y, 0.05, AT)
    assert losses[-1] < 0.75 * losses[0]
    torch.testing.assert_close(found.exact.loss, losses, rtol=0, atol=1e-10)
    assert float(found.beside(losses).abs().max()) < 0.05
    missed = (found.mode_losses - found.exact.mode_losses).abs().sum(1) / found.exact.mode_losses[0].sum()
    assert float(missed.max()) < 0.08
    rough = predict(W, B, X, Y, rule=rule, rate=0.05, steps=AT[-1], at=AT, decoupling="chains")
    assert 0.02 < float(rough.beside(losses).abs().max()) < 0.35


@pytest.mark.unchecked
@pytest.mark.parametrize("depth", [2, 3])
def test_small_weights_make_chains_of_modes(depth):
    pytest.importorskip("sklearn")
    X, Y = digits(centred=True)
    _, W, B = converted(depth, "fa")
    W = [0.1 * part for part in W]
    exact = predict(W, B, X, Y, rate=0.05, steps=AT[-1], at=AT, exact=True).exact
    assert float(predict(W, B, X, Y, rate=0.05, steps=AT[-1], at=AT).beside(exact.loss).abs().max()) < 0.05
    rough = predict(W, B, X, Y, rate=0.05, steps=AT[-1], at=AT, decoupling="chains")
    assert float(rough.beside(exact.loss).abs().max()) < 0.12
    early = [place for place, step in enumerate(AT) if step <= 100]
    assert float(rough.beside(exact.loss)[early].abs().max()) < 0.03


@pytest.mark.unchecked
@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("batch", [None, 100])
def test_first_epochs_of_a_relu_network(depth, rule, batch):
    """100 full batches, or 5 epochs of batches of 100, within the error that ``predict`` states."""
    pytest.importorskip("sklearn")
    X, Y = digits()
    model, W, B = converted(depth, rule, relu=True)
    at = [0, 18, 36, 54, 72, 90, 100]
    found = predict(W, B, X, Y, rule=rule, rate=0.05, steps=100, at=at, activation="relu")
    losses = trained(model, X, Y, 0.05, at, batch)
    assert losses[-1] < 0.9 * losses[0]
    error = float(found.beside(losses).abs().max())
    assert error < 0.06
    linear = predict(W, B, X, Y, rule=rule, rate=0.05, steps=100, at=at)
    assert float(linear.beside(losses).abs().max()) > 1.5 * error  # what the gains are for


def test_gains_are_least_squares_slopes():
    X, _ = points()
    W, B = parts((6, 5, 7, 4), "fa", runs=1)
    first, second = relu_gains(network(W, B), X)
    z = X @ W[0][0].mT
    for k in range(5):
        slope = np.linalg.lstsq(z[:, k : k + 1].numpy(), z[:, k].clamp(min=0).numpy(), rcond=None)[0]
        assert float(first[0, k]) == pytest.approx(float(slope[0]))
    z = z.clamp(min=0) @ W[1][0].mT
    assert float(second[0, 3]) == pytest.approx(float((z[:, 3].clamp(min=0) * z[:, 3]).sum() / z[:, 3].square().sum()))


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_linearised_network_is_the_one_with_gains_for_slopes(rule):
    """Against a NumPy loop in which every hidden neuron multiplies by its gain, forward and backward."""
    X, Y = points()
    W, B = parts((6, 5, 7, 4), rule, runs=1)
    X = X.abs()
    W[0][0, 2] = -1.0  # a neuron that is never active
    state = network(W, B, rule=rule)
    slopes = [part[0].numpy() for part in relu_gains(state, X)]
    assert slopes[0][2] == 0
    here, fed = [part[0].numpy().copy() for part in W], [part[0].numpy() for part in B]
    for _ in range(10):
        h1 = X.numpy() @ here[0].T * slopes[0]
        h2 = h1 @ here[1].T * slopes[1]
        top = (h2 @ here[2].T - Y.numpy()) / len(X)
        d2 = top @ fed[1] * slopes[1]
        d1 = (d2 @ fed[0] if rule == "fa" else top @ fed[0]) * slopes[0]
        for part, error, inputs in zip(here, (d1, d2, top), (X.numpy(), h1, h2), strict=True):
            part -= 0.05 * error.T @ inputs
    expected = here[2] @ np.diag(slopes[1]) @ here[1] @ np.diag(slopes[0]) @ here[0]
    trajectory = matrix_gradient_descent(
        relu_linearisation(state, X, rule), X, Y, rule=rule, rate=0.05, steps=10, at=[10]
    )
    np.testing.assert_allclose(trajectory["map"][0, 0].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decoupling", ["outputs", "chains"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", [2, 3])
def test_of_a_spectral_start_the_prediction_is_exact(depth, rule, decoupling):
    X, Y = task([2.0, 1.0, 0.3], [1.0, 0.5, 2.0], inputs=5, outputs=3, seed=1)
    made = spectral(
        X, Y, weights=[[0.3, 0.4, 0.2], [0.5, 0.3, 0.6], [0.7, 0.6, 0.5]][:depth], hidden=[6, 4][: depth - 1], rule=rule
    )
    W, B = ([tensor[0] for tensor in part] for part in (made.state.W, made.state.B))
    found = predict(W, B, X, Y, rule=rule, rate=0.05, steps=60, decoupling=decoupling, exact=True)
    modes = _steps.gradient_descent(made.modes, rate=0.05, steps=60)
    torch.testing.assert_close(found.products, modes.product[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.mode_losses, modes.loss[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.loss, found.exact.loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.share, modes.share[:, 0], rtol=0, atol=1e-12)
    if rule != "bp":
        torch.testing.assert_close(found.chains.weights.abs(), made.modes.weights[:, 0].abs(), rtol=0, atol=1e-12)


def test_exact_curves_are_those_of_a_loop_over_points():
    X, Y = points()
    W, B = ([part[0] for part in group] for group in parts((6, 5, 7, 4), "fa", runs=1))
    found = predict(W, B, X, Y, rate=0.02, steps=20, at=[0, 20], exact=True)
    here = [part.numpy().copy() for part in W]
    for _ in range(20):
        moves = velocities(here, [part.numpy() for part in B], X.numpy(), Y.numpy(), "fa")
        here = [part + 0.02 * move for part, move in zip(here, moves, strict=True)]
    map_, xx, yx = np.linalg.multi_dot(here[::-1]), (X.mT @ X / 30).numpy(), (Y.mT @ X / 30).numpy()
    u, v = found.outputs.numpy(), found.inputs.numpy()
    assert float(found.exact.loss[-1]) == pytest.approx(loss(here, X.numpy(), Y.numpy()), rel=1e-12)
    np.testing.assert_allclose(found.exact.products[-1].numpy(), np.diag(u.T @ map_ @ v), rtol=0, atol=1e-12)
    missed = u.T @ (map_ - yx @ np.linalg.inv(xx))
    np.testing.assert_allclose(found.exact.mode_losses[-1].numpy(), 0.5 * np.diag(missed @ xx @ missed.T), rtol=1e-9)
    np.testing.assert_allclose((u * found.target.numpy()) @ v.T, yx, atol=1e-12)
    np.testing.assert_allclose(found.variance.numpy(), np.diag(v.T @ xx @ v), rtol=1e-12)
    best = np.linalg.lstsq(X.numpy(), Y.numpy(), rcond=None)[0]
    assert found.floor == pytest.approx(0.5 * np.mean(((Y.numpy() - X.numpy() @ best) ** 2).sum(1)), rel=1e-12)
    assert torch.equal(found.beside(found.loss), torch.zeros(2, dtype=torch.float64))


def test_of_one_output_nothing_meets_and_the_start_is_always_exact():
    X, Y = points(k=1)
    W, B = ([part[0] for part in group] for group in parts((6, 5, 1), "fa", runs=1))
    found = predict(W, B, X, Y, rate=0.05, steps=50, exact=True)
    torch.testing.assert_close(found.loss, found.exact.loss, rtol=0, atol=1e-12)
    X, Y = points(k=8)  # more outputs than inputs: two of them are in no mode, but in the loss
    W, B = ([part[0] for part in group] for group in parts((6, 5, 8), "fa", runs=1))
    found = predict(W, B, X, Y, rate=0.01, steps=2, at=[0, 2], exact=True)
    assert found.mode_losses.shape == (2, 6)
    torch.testing.assert_close(found.loss[0], found.exact.loss[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.products[0], found.exact.products[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("decoupling", ["outputs", "chains"])
@pytest.mark.parametrize("depth", [2, 3])
def test_every_decoupling_starts_at_the_initial_loss_and_takes_targets_of_zero(depth, decoupling):
    X, Y = points()
    W, B = ([part[0] for part in group] for group in parts((6, 5, 7, 4)[-depth - 1 :], "fa", runs=1))
    X = X[:, : W[0].shape[1]] if depth == 3 else drawn(30, 5)
    found = predict(W, B, X, Y, rate=0.02, steps=4, at=[0, 4], decoupling=decoupling)
    assert float(found.loss[0]) == pytest.approx(loss([part.numpy() for part in W], X.numpy(), Y.numpy()))
    assert predict(W, B, X, 0 * Y, rate=0.02, steps=4, decoupling=decoupling).mode_losses.shape == (5, 0)


@pytest.mark.parametrize("decoupling", ["outputs", "chains"])
def test_flow_is_the_limit_of_small_steps(decoupling):
    X, Y = points(d=4, k=2)
    W, B = ([part[0] for part in group] for group in parts((4, 3, 2), "fa", runs=1))
    exact = predict(W, B, X, Y, times=[0.0, 1.0], decoupling=decoupling).loss[-1]
    errors = [
        float(
            predict(W, B, X, Y, rate=rate, steps=round(1 / rate), at=[0, round(1 / rate)], decoupling=decoupling).loss[
                -1
            ]
            - exact
        )
        for rate in (0.02, 0.01)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("decoupling", ["outputs", "chains"])
def test_a_rate_beyond_what_is_stable_is_warned_of(decoupling):
    X, Y = points()
    W, B = ([part[0] for part in group] for group in parts((6, 5, 4), "fa", runs=1))
    with pytest.warns(UserWarning, match=r"rate 0\.9 is"):
        predict(W, B, X, 5 * Y, rate=0.9, steps=3, decoupling=decoupling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(W, B, X, Y, rate=0.02, steps=3, decoupling=decoupling)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"W": [drawn(5, 6), drawn(4, 6)]}, "are no network of two layers"),
        ({"W": [drawn(2, 5, 6), drawn(2, 4, 5)], "B": [drawn(2, 4, 5)]}, "weights of 2 networks were given"),
        ({"B": [torch.ones(4, 5)]}, "B_2 of run 0 has rank 1, expected 4"),
        ({"B": []}, "feedback has shapes"),
        ({"X": drawn(30, 5)}, "inputs have shape"),
        ({"Y": drawn(30, 3)}, "targets have shape"),
        ({"Y": drawn(29, 4)}, "30 inputs and 29 targets"),
        ({"X": drawn(30, 6) / 0}, "180 numbers of the inputs are not finite"),
        ({"X": drawn(0, 6), "Y": drawn(0, 4)}, "at least one point"),
        ({"steps": None}, "pass rate and steps, or times alone"),
        ({"times": [0.0, 1.0]}, "pass rate and steps, or times alone"),
        ({"rate": None, "steps": None, "times": [0.0]}, "at least two of them"),
        ({"rate": None, "steps": None, "times": [0.0], "decoupling": "chains"}, "at least two of them"),
        pytest.param({"W": None}, "W is None, expected a sequence", marks=untyped),
        ({"rate": -0.1}, "rate is -0.1, expected a positive number"),
        pytest.param({"rule": "usf"}, "rule is 'usf'", marks=untyped),
        ({"rule": "bp", "B": [], "activation": "relu"}, "under bp has no linear network in its stead"),
        pytest.param({"activation": "tanh"}, "activation is 'tanh', expected one of linear, relu", marks=untyped),
        pytest.param({"decoupling": "modes"}, "decoupling is 'modes', expected one of outputs, chains", marks=untyped),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(changed, named):
    X, Y = points()
    W, B = ([part[0] for part in group] for group in parts((6, 5, 4), "fa", runs=1))
    given = {"W": W, "B": B, "X": X, "Y": Y, "rate": 0.1, "steps": 2, **changed}
    with pytest.raises(ValueError, match=named):
        predict(**given)


def test_losses_beside_must_be_at_the_records():
    X, Y = points()
    W, B = ([part[0] for part in group] for group in parts((6, 5, 4), "fa", runs=1))
    found = predict(W, B, X, Y, rate=0.02, steps=2)
    with pytest.raises(ValueError, match="expected finite ones at the 3 records"):
        found.beside([1.0, 0.5])
    with pytest.raises(ValueError, match="the first loss is 0"):
        found.beside([0.0] * 3)
