"""The split of the descent, the decay it predicts, and descent with one output."""

from math import exp

import pytest
import torch
from conservation_cases import data, made, start

from falign.theory.conservation import anti, dominant, gradient_descent, gradient_flow, loss_of, velocity
from falign.theory.dominance import (
    convergence,
    largest_kappa,
    lasting_descent,
    least_product,
    lojasiewicz_constant,
    lojasiewicz_exponent,
    neuron_descent,
    predicted_loss,
    rising_example,
    split,
    squared_loss_rate,
)

pytestmark = pytest.mark.unchecked  # many steps: checking annotations would take most of the time

SPLIT = ["loss", "descent", "gradient_norm", "taken_norm", "dominance"]
TIMES = torch.linspace(0, 4, 41, dtype=torch.float64)


def _slope(state, dynamics, X, y, h=1e-6):
    """dL/dt by a central difference along the velocity."""
    motion = velocity(state, dynamics, X, y)
    ahead, behind = (state.map(lambda value, change, s=s: value + s * h * change, motion) for s in (1, -1))
    return (loss_of(ahead, dynamics, X, y) - loss_of(behind, dynamics, X, y)) / (2 * h)


@pytest.mark.parametrize("rule_name", ["fa", "bp", "usf", "dfa"])
def test_the_split_is_the_descent_of_the_loss(rule_name):
    dynamics, (X, y) = made("linear", rule_name), data()
    state = start(dynamics)
    trajectory = gradient_descent(state, dynamics, X, y, rate=0.1, steps=20, names=SPLIT, at=[0, 20])
    parts = split(trajectory["descent"], trajectory["gradient_norm"], trajectory["taken_norm"])
    torch.testing.assert_close(-_slope(state, dynamics, X, y), parts.total[:, 0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(-_slope(trajectory.end, dynamics, X, y), parts.total[:, 1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(parts.alignment * parts.gradient * parts.update, parts.descent)
    torch.testing.assert_close(parts.dominance, trajectory["dominance"])
    torch.testing.assert_close(parts.alignment[..., -1], torch.ones(2, 2, dtype=torch.float64))
    if rule_name == "bp":
        torch.testing.assert_close(parts.alignment, torch.ones(2, 2, 3, dtype=torch.float64))


def test_the_split_of_a_gradient_that_is_zero_has_no_angle():
    zero = torch.zeros(1, 2)
    assert split(zero, zero, torch.ones(1, 2)).alignment.tolist() == [[0, 0]]


def test_kappa_is_the_largest_that_holds():
    dominance = torch.tensor([[0.5, -0.25, 2.0], [-3.0, 1.0, 1.0]])
    assert largest_kappa(dominance).tolist() == [0.75, -2.0]


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0, 3.0])
def test_the_prediction_solves_its_differential_equation(exponent):
    initial, kappa, mu = (torch.tensor([number], dtype=torch.float64) for number in (2.0, 0.7, 0.3))
    times, h = torch.linspace(0, 20, 9, dtype=torch.float64), 1e-5

    def predicted(at):
        return predicted_loss(initial, at, kappa=kappa, mu=mu, exponent=exponent)

    slope = (predicted(times + h) - predicted(times - h)) / (2 * h)
    torch.testing.assert_close(slope, -0.21 * predicted(times) ** exponent, rtol=1e-6, atol=1e-10)
    assert float(predicted(times)[0, 0]) == 2.0
    if exponent == 1:
        assert float(predicted(times)[0, -1]) == pytest.approx(2 * exp(-0.21 * 20))
    if exponent == 2:
        assert float(predicted(times)[0, -1]) == pytest.approx(1 / (1 / 2 + 0.21 * 20))


def test_constant_and_exponent_are_recovered_from_a_power():
    loss = torch.logspace(0, -4, 30, dtype=torch.float64)
    gradient = (0.3 * loss**1.7).sqrt()
    assert lojasiewicz_exponent(loss, gradient)[0] == pytest.approx(1.7, abs=1e-9)
    assert float(lojasiewicz_constant(loss, gradient, 1.7)) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="three different positive losses"):
        lojasiewicz_exponent(loss[:2], gradient[:2])


@pytest.mark.parametrize(
    ("loss_name", "exponent", "outputs"), [("squared", 1.0, 1), ("softmax", 2.0, 3), ("logistic", 2.0, 1)]
)
def test_from_a_dominant_start_the_loss_falls_as_predicted(loss_name, exponent, outputs):
    dynamics, (X, y) = made("linear", "fa", loss_name), data(n=5, d=8, k=outputs, kind=loss_name)
    state = dominant(start(dynamics, widths=(8, 20, outputs)), dynamics)
    check = convergence(gradient_flow(state, dynamics, X, y, times=TIMES, names=SPLIT), exponent=exponent)
    assert check.verdict == "holds", check.sentence
    assert check.constants["kappa"] > 0
    assert float((check.measured[:, -1] / check.measured[:, 0]).max()) < 0.6


def test_without_dominance_the_theorem_says_nothing():
    dynamics, (X, y) = made("linear", "fa", "squared"), data(n=5, d=8, k=1, kind="squared")
    state = anti(start(dynamics, widths=(8, 20, 1)), dynamics)
    state = state._replace(W=(0.05 * state.W[0], state.W[1]))
    trajectory = gradient_flow(state, dynamics, X, y, times=TIMES, names=SPLIT)
    assert trajectory["loss"][:, 1].gt(trajectory["loss"][:, 0]).any()
    check = convergence(trajectory)
    assert [assumption.name for assumption in check.failing] == ["alignment dominance"]


def test_what_was_claimed_too_large_is_named():
    dynamics, (X, y) = made("linear", "fa", "squared"), data(n=5, d=8, k=1, kind="squared")
    state = dominant(start(dynamics, widths=(8, 20, 1)), dynamics)
    trajectory = gradient_flow(state, dynamics, X, y, times=TIMES, names=SPLIT)
    assert convergence(trajectory, mu=1e6).failing[0].name == "gradient inequality"
    assert convergence(trajectory, kappa=1e6).failing[0].name == "alignment dominance"
    with pytest.raises(ValueError, match="expected a ≥ 1"):
        convergence(trajectory, exponent=0.5)


@pytest.mark.parametrize("loss_name", ["squared", "logistic"])
@pytest.mark.parametrize("activation_name", ["relu", "linear"])
def test_neurons_add_what_the_formula_says(activation_name, loss_name):
    dynamics, (X, y) = made(activation_name, "fa", loss_name), data(k=1, kind=loss_name)
    state = start(dynamics, widths=(6, 8, 1))
    trajectory = gradient_descent(state, dynamics, X, y, rate=0.1, steps=1, names=SPLIT, at=[0])
    parts = neuron_descent(state, dynamics, X, y)
    torch.testing.assert_close(parts.sum(-1), trajectory["descent"][:, 0, 0])
    torch.testing.assert_close(
        -_slope(state, dynamics, X, y), parts.sum(-1) + trajectory["gradient_norm"][:, 0, 1] ** 2, rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("loss_name", ["squared", "logistic"])
def test_with_one_output_a_dominant_start_never_rises(loss_name):
    dynamics, (X, y) = made("relu", "fa", loss_name), data(k=1, kind=loss_name)
    state = dominant(start(dynamics, widths=(6, 30, 1)), dynamics, share=0.9)
    trajectory = gradient_descent(state, dynamics, X, y, rate=0.02, steps=500, names=["loss"])
    assert lasting_descent(trajectory).verdict == "holds"
    assert [one.name for one in lasting_descent(trajectory).assumptions if one.holds is None] == ["small steps"]
    generic = gradient_descent(start(dynamics, widths=(6, 30, 1)), dynamics, X, y, rate=0.02, steps=5, names=["loss"])
    assert lasting_descent(generic).verdict == "assumption fails"


@pytest.mark.parametrize("bias", [True, False])
def test_squared_loss_falls_at_least_at_its_rate(bias):
    dynamics, (X, y) = made("relu", "fa", "squared"), data(n=4, d=8, k=1, kind="squared")
    state = dominant(start(dynamics, widths=(8, 40, 1), bias=bias), dynamics)
    rate = squared_loss_rate(state, dynamics, X)
    assert (rate > 0).all()
    assert (_slope(state, dynamics, X, y) <= -rate * loss_of(state, dynamics, X, y) * (1 - 1e-6)).all()
    with pytest.raises(ValueError, match="squared loss"):
        squared_loss_rate(state, made("relu", "fa", "logistic"), X)


def test_several_outputs_can_rise_from_an_aligned_start():
    state, dynamics, X, y = rising_example()
    times = torch.tensor([0.0, 0.05], dtype=torch.float64)
    trajectory = gradient_flow(state, dynamics, X, y, times=times, names=[*SPLIT, "invariant"])
    assert float(trajectory["invariant"][0, 0, 0]) == pytest.approx(-0.98)
    assert float(trajectory["descent"][0, 0].sum()) == pytest.approx(-0.92)
    assert trajectory["loss"][0, 1] > trajectory["loss"][0, 0] + 0.03
    with pytest.raises(ValueError, match="two layers and one output"):
        neuron_descent(state, dynamics, X, y)


def test_the_least_product_is_attained_over_errors():
    B, W = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    angles = torch.linspace(0, 3.2, 20001, dtype=torch.float64)
    errors = torch.stack([angles.cos(), angles.sin()], 1)
    products = (errors @ B) * (errors @ W)
    torch.testing.assert_close(products.amin(0), least_product(B, W), rtol=1e-6, atol=1e-7)
    assert (least_product(B, 3 * B).abs() < 1e-14).all()
