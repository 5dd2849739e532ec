"""The law: an exact identity of steps for every rule, a constant of gradient flow, and what breaks it."""

import pytest
import torch
from conservation_cases import batches, data, made, start

from falign.theory.conservation import (
    RULES,
    Activation,
    Dynamics,
    aligned_forever,
    conservation,
    decay_of_invariant,
    entrywise,
    gradient_descent,
    gradient_flow,
    incoming,
    invariant,
    loss,
    rule,
)

pytestmark = pytest.mark.unchecked  # many steps: checking annotations would take most of the time

NAMES = ["loss", "incoming", "alignment_term", "invariant", "expected_change"]
UNEQUAL = {"rates": (1.0, 0.5, 2.0), "decays": (0.1, 0.2, 0.05)}


@pytest.mark.parametrize(("settings", "steps"), [({}, 1000), (UNEQUAL, 100)])
@pytest.mark.parametrize("rule_name", RULES)
def test_the_identity_is_exact_over_a_thousand_minibatch_steps(rule_name, settings, steps):
    dynamics, (X, y) = made("relu", rule_name, **settings), data()
    trajectory = gradient_descent(start(dynamics), dynamics, X, y, rate=0.05, steps=batches(steps=steps), names=NAMES)
    check = conservation(trajectory)
    assert check.verdict == "holds", check.sentence
    assert check.constants["relative residual"] < 1e-12
    assert float(check.series["drift"].max()) > 1e-3  # the raw C moves: the expected change is no decoration


@pytest.mark.parametrize("activation_name", ["linear", "leaky", "abs"])
@pytest.mark.parametrize("loss_name", ["squared", "logistic"])
def test_the_identity_holds_for_every_gate_and_loss(activation_name, loss_name):
    dynamics, (X, y) = made(activation_name, "fa", loss_name), data(kind=loss_name)
    trajectory = gradient_descent(start(dynamics), dynamics, X, y, rate=0.02, steps=batches(steps=200), names=NAMES)
    assert conservation(trajectory).verdict == "holds"


@pytest.mark.parametrize("rule_name", ["fa", "bp", "dfa", "kp"])
def test_drift_is_positive_monotone_and_proportional_to_the_rate(rule_name):
    dynamics, (X, y) = made("relu", rule_name), data()
    drifts = []
    for rate in (0.04, 0.02, 0.01):
        trajectory = gradient_descent(
            start(dynamics), dynamics, X, y, rate=rate, steps=round(2 / rate), names=["invariant"]
        )
        drift = trajectory["invariant"] - trajectory["invariant"][:, :1]
        if rule_name in ("fa", "dfa"):
            assert (drift.diff(dim=1) >= -1e-13).all()
        drifts.append(float(drift[:, -1].abs().mean()))
    x, y = torch.tensor([0.04, 0.02, 0.01]).log(), torch.tensor(drifts).log()
    slope = float(((x - x.mean()) * y).sum() / (x - x.mean()).square().sum())
    assert slope == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("settings", [{}, UNEQUAL])
@pytest.mark.parametrize("rule_name", ["fa", "bp", "kp", "adafa", "dfa"])
def test_gradient_flow_conserves_c(rule_name, settings):
    dynamics, (X, y) = made("linear", rule_name, **settings), data()
    times = torch.linspace(0, 3, 7, dtype=torch.float64)
    check = conservation(gradient_flow(start(dynamics), dynamics, X, y, times=times, names=NAMES), tolerance=1e-8)
    assert check.verdict == "holds", check.sentence
    at_rest = rule_name != "adafa" and not settings
    assert (float(check.series["drift"].max()) < 1e-8) == at_rest


@pytest.mark.parametrize("rule_name", ["fa", "usf"])
def test_gradient_flow_conserves_c_through_kinks(rule_name):
    dynamics, (X, y) = made("relu", rule_name), data(n=4)
    state = start(dynamics, widths=(6, 4, 3), seeds=[1])
    times = torch.linspace(0, 1, 4, dtype=torch.float64)
    trajectory = gradient_flow(state, dynamics, X, y, times=times, names=NAMES, tolerance=1e-6)
    assert conservation(trajectory, tolerance=1e-4).verdict == "holds"


def test_feedback_that_is_a_function_of_the_weights_conserves_its_integral():
    cubic = entrywise("cubic", lambda W: W**3, lambda W: W**4 / 4)
    dynamics, (X, y) = Dynamics(rule=cubic, loss=loss("softmax"), activation=made("linear").activation), data()
    times = torch.linspace(0, 2, 5, dtype=torch.float64)
    check = conservation(gradient_flow(start(dynamics), dynamics, X, y, times=times, names=NAMES), tolerance=1e-8)
    assert check.verdict == "holds"
    assert float(check.series["drift"].max()) < 1e-8
    wrong = entrywise("wrong integral", lambda W: W**3, lambda W: W**4 / 3)
    dynamics = Dynamics(rule=wrong, loss=loss("softmax"), activation=made("linear").activation)
    check = conservation(gradient_flow(start(dynamics), dynamics, X, y, times=times, names=NAMES), tolerance=1e-8)
    assert check.verdict == "fails"


def test_tanh_is_not_homogeneous_and_breaks_the_law():
    tanh = Activation(name="tanh", value=torch.tanh, slope=lambda z: 1 - torch.tanh(z) ** 2, smooth=True)
    dynamics, (X, y) = Dynamics(activation=tanh, loss=loss("softmax")), data()
    trajectory = gradient_descent(start(dynamics), dynamics, X, y, rate=0.05, steps=200, names=NAMES)
    check = conservation(trajectory)
    assert check.verdict == "assumption fails"
    assert check.constants["relative residual"] > 1e-3
    assert "φ(z) = φ'(z) z for tanh" in check.sentence


def test_a_wrong_feedback_is_told_by_the_law():
    """The alignment term of another matrix than the one that carries the error."""
    dynamics, (X, y) = made(), data()
    state = start(dynamics)
    trajectory = gradient_descent(state, dynamics, X, y, rate=0.05, steps=100, names=NAMES)
    for change, broken in ((0.0, False), (1e-4, True)):
        told = [one._replace(B=tuple(B * (1 + change) for B in one.B)) for one in (trajectory.start, trajectory.end)]
        drift = invariant(told[1], dynamics) - invariant(told[0], dynamics)
        assert (float((drift - trajectory["expected_change"][:, -1]).abs().max()) > 1e-8) == broken


def test_omitting_the_bias_breaks_the_law():
    dynamics, (X, y) = made(), data()
    trajectory = gradient_descent(start(dynamics), dynamics, X, y, rate=0.05, steps=200, names=NAMES)
    square = torch.cat([b.square() / 2 for b in trajectory.end.b[:-1]], -1)
    drift = (
        trajectory["invariant"][:, -1] - square - trajectory["invariant"][:, 0] - trajectory["expected_change"][:, -1]
    )
    assert float(drift.abs().max()) > 1e-3


def test_decay_drives_c_as_derived():
    dynamics, (X, y) = made("linear", decays=0.3), data()
    state, h = start(dynamics), 1e-4
    times = torch.tensor([0.0, h], dtype=torch.float64)
    trajectory = gradient_flow(state, dynamics, X, y, times=times, names=["invariant"], tolerance=1e-12)
    slope = (trajectory["invariant"][:, 1] - trajectory["invariant"][:, 0]) / h
    expected = decay_of_invariant(invariant(state, dynamics), incoming(state, dynamics), 0.3)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-4)


def test_of_a_direct_rule_the_last_hidden_layer_is_under_the_law():
    dynamics = made("relu", "dfa")
    assert invariant(start(dynamics), dynamics).shape == (2, 7)
    assert aligned_forever(start(dynamics), dynamics).dtype == torch.bool
    assert rule("dfa").direct
