"""The simulator against a NumPy loop over points and against finite differences."""

import conservation_oracle as oracle
import numpy as np
import pytest
import torch
from conservation_cases import batches, data, made, one_run, start
from torch import nn

import falign
from falign.theory.conservation import (
    ACTIVATIONS,
    LOSSES,
    MEASUREMENTS,
    RULES,
    Dynamics,
    activation,
    draw,
    gradient_descent,
    gradient_flow,
    gradients,
    loss,
    loss_of,
    rule,
    velocity,
)


@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("activation_name", ACTIVATIONS)
def test_true_gradient_equals_finite_differences(activation_name, loss_name):
    dynamics, (X, y) = made(activation_name, "fa", loss_name), data(n=6, kind=loss_name)
    state = start(dynamics, seeds=[3])
    found = gradients(state, dynamics, X, y, true=True)
    W, b, _ = one_run(state, 0)
    assert float(loss_of(state, dynamics, X, y)) == pytest.approx(
        oracle.loss_of(W, b, X.numpy(), y.numpy(), activation_name, loss_name)
    )
    for parts, gradient in ((W, found.W), (b, found.b)):
        for layer, tensor in enumerate(parts):
            place, step = (0,) * tensor.ndim, 1e-6
            values = []
            for side in (1, -1):
                tensor[place] += side * step
                values.append(oracle.loss_of(W, b, X.numpy(), y.numpy(), activation_name, loss_name))
                tensor[place] -= side * step
            assert float(gradient[layer][0][place]) == pytest.approx((values[0] - values[1]) / 2 / step, abs=1e-8)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rule_name", RULES)
def test_training_equals_the_loop_over_points(rule_name, bias):
    dynamics, (X, y) = made("relu", rule_name, tracking=0.7), data()
    state, chosen = start(dynamics, bias=bias), batches(steps=40)
    trajectory = gradient_descent(
        state, dynamics, X, y, rate=0.2, steps=chosen, names=["loss", "invariant", "expected_change"]
    )
    for run in range(2):
        expected = oracle.train(
            *one_run(state, run), X.numpy(), y.numpy(), chosen.numpy(),
            activation="relu", loss="softmax", rule=rule_name, rate=0.2, alpha=0.14,
        )  # fmt: skip
        for parts, wanted in zip(one_run(trajectory.end, run), expected[:3], strict=True):
            for one, other in zip(parts, wanted, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
        if rule_name == "fa":
            np.testing.assert_allclose(
                trajectory["expected_change"][run, -1].numpy(), np.concatenate(expected[3]), rtol=1e-9, atol=1e-14
            )


@pytest.mark.parametrize("rule_name", ["bp", "fa", "usf", "frsf", "kp", "adafa", "dfa"])
def test_training_equals_that_of_a_converted_model(rule_name):
    """The same weights and feedback in PyTorch, trained by falign."""
    dynamics, (X, y) = made("relu", rule_name, tracking=0.5), data()
    state = start(dynamics, seeds=[2])
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, W, b in zip(layers, state.W, state.b, strict=True):
            layer.weight.copy_(W[0])
            layer.bias.copy_(b[0])
    given = {} if rule_name in ("bp", "usf") else {"2": state.B[0][0], "4": state.B[1][0]}
    rule_given = falign.ALL_RULES["adafa"](rate=0.1) if rule_name == "adafa" else rule_name
    falign.convert(model, rule_given, feedback=given or None, scale=1.0 if rule_name == "usf" else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), y).backward()
        optimizer.step()
    end = gradient_descent(state, dynamics, X, y, rate=0.2, steps=30, names=["loss"]).end
    for layer, W, b in zip(layers, end.W, end.b, strict=True):
        torch.testing.assert_close(layer.weight.detach(), W[0], rtol=0, atol=1e-7 if rule_name == "usf" else 1e-12)
        torch.testing.assert_close(layer.bias.detach(), b[0], rtol=0, atol=1e-7 if rule_name == "usf" else 1e-12)


def test_layers_have_their_own_rates_and_decays():
    dynamics, (X, y) = made(rates=(1.0, 2.0, 0.5), decays=(0.1, 0.0, 0.3)), data()
    state = start(dynamics)
    moves, taken = velocity(state, dynamics, X, y), gradients(state, dynamics, X, y)
    for r, k, dW, g, W in zip((1.0, 2.0, 0.5), (0.1, 0.0, 0.3), moves.W, taken.W, state.W, strict=True):
        torch.testing.assert_close(dW, -r * (g + k * W))
    assert all((change == 0).all() for change in moves.B)


def test_runs_are_independent_and_may_have_their_own_data():
    dynamics = made()
    (X, y), (other_X, other_y) = data(), data(seed=5)
    both = start(dynamics, seeds=[0, 1])
    trajectory = gradient_descent(both, dynamics, torch.stack([X, other_X]), torch.stack([y, other_y]), rate=0.1,
                     steps=20, names=["loss"])  # fmt: skip
    alone = gradient_descent(start(dynamics, seeds=[1]), dynamics, other_X, other_y, rate=0.1, steps=20, names=["loss"])
    torch.testing.assert_close(trajectory["loss"][1], alone["loss"][0], rtol=1e-13, atol=0)


def test_flow_is_the_limit_of_small_steps():
    dynamics, (X, y) = made("linear"), data()
    state = start(dynamics)
    exact = gradient_flow(state, dynamics, X, y, times=torch.tensor([0.0, 1.0], dtype=torch.float64), names=["loss"])
    errors = []
    for rate in (0.02, 0.01):
        trajectory = gradient_descent(
            state, dynamics, X, y, rate=rate, steps=round(1 / rate), names=["loss"], at=[round(1 / rate)]
        )
        errors.append(float((trajectory["loss"][:, -1] - exact["loss"][:, -1]).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_every_measurement_is_recorded_in_its_shape():
    dynamics, (X, y) = made(), data()
    trajectory = gradient_descent(
        start(dynamics), dynamics, X, y, rate=0.1, steps=4, names=[*MEASUREMENTS, "expected_change"], at=[0, 2, 4]
    )
    assert trajectory.times.tolist() == [0, 0.2, 0.4]
    for name in ("loss", "dominance"):
        assert trajectory[name].shape == (2, 3)
    for name in ("incoming", "alignment_term", "invariant", "alignment", "expected_change"):
        assert trajectory[name].shape == (2, 3, 15)
    for name in ("descent", "gradient_norm", "taken_norm"):
        assert trajectory[name].shape == (2, 3, 3)
    with pytest.raises(ValueError, match="'P' was not recorded"):
        trajectory["P"]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: rule("feedback"), "unknown rule 'feedback'"),
        (lambda: activation("tanh"), "unknown activation 'tanh'"),
        (lambda: loss("hinge"), "unknown loss 'hinge'"),
        (lambda: Dynamics(rates=(1.0, 0.0)), "rate is 0.0"),
        (lambda: Dynamics(decays=-1.0), "a decay is -1.0"),
        (lambda: Dynamics(tracking=float("nan")), "tracking is nan"),
        (lambda: draw([6, 3], seeds=[0], dynamics=made()), "widths of inputs, hidden layers and outputs"),
        (lambda: draw([6, 4, 3], seeds=[], dynamics=made()), "and a seed"),
        (lambda: _descend(rates=(1.0, 1.0)), "2 rates for 3 layers"),
        (lambda: _descend(rate=0.0), "rate is 0.0, expected a positive number"),
        (lambda: _descend(names=["C"]), "unknown measurement 'C'"),
        (lambda: _descend(at=[2, 1]), "recording steps must increase"),
        (lambda: _flow(times=[0.5, 1.0]), "times must increase from 0"),
        (lambda: _flow(longest=3), "allow more"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, named):
    with pytest.raises((ValueError, RuntimeError), match=named):
        make()


def _descend(rates=1.0, rate=0.1, names=("loss",), at=None):
    dynamics, (X, y) = made(rates=rates), data()
    return gradient_descent(start(dynamics), dynamics, X, y, rate=rate, steps=4, names=names, at=at)


def _flow(times=(0.0, 1.0), longest=1000):
    dynamics, (X, y) = made("linear"), data()
    times = torch.tensor(times, dtype=torch.float64)
    return gradient_flow(start(dynamics), dynamics, X, y, times=times, names=["loss"], longest=longest)
