"""Scalar modes by steps and in gradient flow: against plain loops, and the identities that hold to rounding."""

import modes_oracle
import numpy as np
import pytest
import torch

from falign.theory.deep_linear import (
    _flow,
    asymptotic_rate,
    critical_target,
    gradient_descent,
    gradient_flow,
    limit,
    modes,
    stable_rate,
    sufficient_rate,
    zero_init,
)

RULES = ["fa", "dfa", "bp"]


def _drawn(rule, depth, count=6, seed=0):
    random = np.random.default_rng(seed)
    θ, m = random.normal(size=(depth, count)), random.uniform(0.4, 1.5, size=(depth - 1, count))
    λ, s = random.uniform(0.2, 2, size=count), random.uniform(0.5, 2, size=count)
    return modes(λ, list(θ), feedback=list(m), variance=s, rule=rule), θ, m, λ, s


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_steps_are_those_of_a_plain_loop(rule, depth):
    mode, θ, m, λ, s = _drawn(rule, depth)
    trajectory = gradient_descent(mode, rate=0.02, steps=200, at=[0, 1, 50, 200])
    for one in range(len(λ)):
        expected = modes_oracle.steps(rule, θ[:, one], m[:, one], λ[one], s[one], 0.02, 200)[[0, 1, 50, 200]]
        np.testing.assert_allclose(trajectory.weights[..., one].numpy(), expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(trajectory.times.numpy(), [0, 0.02, 1, 4])
    assert (trajectory.diverged == -1).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", [2, 3])
def test_flow_is_that_of_a_solver_on_all_layers(rule, depth):
    mode, θ, m, λ, s = _drawn(rule, depth, seed=1)
    times = np.array([0.0, 0.3, 2.0, 9.0])
    trajectory = gradient_flow(mode, times=times)
    for one in range(len(λ)):
        expected = modes_oracle.flow(rule, θ[:, one], m[:, one], λ[one], s[one], times)
        np.testing.assert_allclose(trajectory.weights[..., one].numpy(), expected, rtol=1e-8, atol=1e-9)
    assert (trajectory.expected_change == 0).all()
    torch.testing.assert_close(trajectory.invariants, trajectory.invariants[:1].expand_as(trajectory.invariants))


def test_flow_from_zero_is_the_closed_form():
    times = torch.linspace(0, 12, 30)
    trajectory = gradient_flow(modes([0.1, 1.0, 4.0], [0.0, 0.0], feedback=-0.7, variance=3.0), times=times)
    closed = zero_init([0.1, 1.0, 4.0], -0.7, times=times, variance=3.0)
    torch.testing.assert_close(trajectory.product, closed, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_invariants_drift_by_exactly_what_is_expected_of_the_steps(rule, depth):
    mode, *_ = _drawn(rule, depth, count=50)
    trajectory = gradient_descent(mode, rate=0.01, steps=2000)
    torch.testing.assert_close(
        trajectory.invariants - trajectory.invariants[0], trajectory.expected_change, rtol=0, atol=1e-12
    )
    if rule != "bp":
        assert (trajectory.expected_change.diff(dim=0) <= 0).all()


def test_two_layers_k_falls_by_half_the_rate_squared_times_the_squared_errors():
    mode, _, m, _, _ = _drawn("fa", 2, count=20)
    mode = modes(mode.target, list(mode.weights), feedback=m[0])
    rate, steps = 0.05, 2000
    trajectory = gradient_descent(mode, rate=rate, steps=steps, at=range(steps + 1))
    K = trajectory.weights[:, 1] - trajectory.weights[:, 0].square() / (2 * mode.feedback[0])
    drift = -(rate**2) / 2 * mode.feedback[0] * trajectory.error[:-1].square().cumsum(0)
    torch.testing.assert_close(K[1:] - K[0], drift, rtol=0, atol=1e-12)
    e, θ, m = trajectory.error[:-1], trajectory.weights[:-1], mode.feedback[0]
    ρ = m * θ[:, 1] + θ[:, 0].square()
    expected = e * (1 - rate * ρ - rate**2 * m * θ[:, 0] * e)
    torch.testing.assert_close(trajectory.error[1:], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_error_falls_at_the_decay_rate(rule, depth):
    mode, *_ = _drawn(rule, depth, count=30)
    h = 1e-5
    moved = (mode.at(mode.weights + h * mode.velocity).error - mode.at(mode.weights - h * mode.velocity).error) / (
        2 * h
    )
    torch.testing.assert_close(moved, -mode.decay_rate * mode.error, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_error_of_feedback_alignment_keeps_its_sign_and_the_first_weight_its_way(depth):
    mode, *_ = _drawn("fa", depth, count=40, seed=3)
    trajectory = gradient_flow(mode, times=torch.linspace(0, 3, 60))
    assert (trajectory.error * mode.error.sign() > -1e-6).all()
    assert (trajectory.weights[:, 0].diff(dim=0) * mode.error.sign() > -1e-6).all()


@pytest.mark.parametrize("depth", [2, 3])
def test_the_whole_trajectory_lies_on_the_line_to_the_limit(depth):
    mode, *_ = _drawn("fa", depth, count=20, seed=4)
    trajectory = gradient_flow(mode, times=[60.0])
    torch.testing.assert_close(trajectory.weights[-1, 0], limit(mode), rtol=1e-5, atol=1e-5)
    assert float(trajectory.error.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("λ", "longest"), [([1.0], 1e4), ([1.0], 1e10), ([1e-3, 1e3], 1e3), ([1e-8, 1e4], 1e6), ([0.3, 1.0, 40.0], 1e8)]
)
def test_a_flow_long_after_its_modes_arrived_costs_no_more(λ, longest):
    trajectory = gradient_flow(
        modes(λ, [0.0, 0.0]), times=[longest / 2, longest]
    )  # refused if it took too many evaluations
    closed = zero_init(λ, times=[longest / 2, longest])
    torch.testing.assert_close(trajectory.product, closed, rtol=1e-8, atol=0)


@pytest.mark.parametrize("share", [1 - 1e-3, 1 - 1e-8, 1.0, 1 + 1e-8])
def test_a_flow_close_to_a_double_root_ends_where_its_limit_is(share):
    mode = modes(float(critical_target(-0.5)) * share, [-1.0, 0.0])
    trajectory = gradient_flow(mode, times=[1.0, 1e10])
    torch.testing.assert_close(trajectory.weights[-1, 0], limit(mode), rtol=1e-9, atol=0)


def test_a_flow_that_takes_too_long_says_so(monkeypatch):
    monkeypatch.setattr(_flow, "_LONGEST", 3000)
    mode = modes(0.0, [1.0, 0.5])  # θ_1 = (1 + t)^(-½): from 1e9 on rounding alone moves it
    with pytest.raises(
        RuntimeError, match=r"took 3000 evaluations to t = .*: ask for earlier times or a larger tolerance"
    ):
        gradient_flow(mode, times=[1e12])


def test_no_modes_give_empty_trajectories():
    none = modes([], [[], []])
    assert gradient_descent(none, rate=0.1, steps=3).weights.shape == (4, 2, 0)
    assert gradient_flow(none, times=[0.0, 1.0]).weights.shape == (2, 2, 0)


def test_weights_may_be_a_table():
    table = torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]])
    assert torch.equal(modes(torch.ones(3), table).weights, table)
    assert torch.equal(modes(1.0, table.double().numpy()).weights, table.double())


def test_a_component_of_no_size_decays_as_theory_says():
    times = torch.tensor([0.0, 50.0, 2e3])
    exponential, power, still = (
        gradient_flow(modes([0.0, 0.0, 0.0], [[1.0, 1.0, 0.0], [1.5, 0.5, 0.7]]), times=times).weights[:, 0].T
    )
    assert abs(float(exponential[1])) < 1e-12
    torch.testing.assert_close(power[1:], (1 + times[1:].double()) ** -0.5, rtol=1e-7, atol=0)
    assert (still == 0).all()


@pytest.mark.filterwarnings("ignore:the rate")
def test_a_mode_that_diverges_is_nan_from_that_step_on_and_the_others_go_on():
    mode = modes([1.0, 1.0, 50.0], [[0.0, 0.1, 0.0], [0.0, 0.2, 0.0]])
    trajectory = gradient_descent(mode, rate=0.3, steps=60, at=range(61))
    with np.errstate(all="ignore"):
        alone = modes_oracle.steps("fa", [0.0, 0.0], [1.0], 50.0, 1.0, 0.3, 60)
    lost = int(np.flatnonzero(~np.isfinite(alone).all(1))[0])
    assert trajectory.diverged.tolist() == [-1, -1, lost]
    assert trajectory.weights[:lost, :, 2].isfinite().all()
    assert trajectory.weights[lost:, :, 2].isnan().all()
    assert trajectory.weights[..., :2].isfinite().all()
    sparse = gradient_descent(mode, rate=0.3, steps=60, at=[0, 60])
    assert torch.equal(sparse.diverged, trajectory.diverged)
    assert torch.equal(sparse.weights[-1, :, :2], trajectory.weights[-1, :, :2])


def test_a_rate_beyond_the_stable_one_is_warned_of_with_the_value():
    with pytest.warns(UserWarning, match=r"the rate 0.7 is beyond .* 1 of 2 modes .* λ = 1 needs less than 0.646"):
        gradient_descent(modes([0.1, 1.0], [0.0, 0.0]), rate=0.7, steps=2)
    with pytest.warns(UserWarning, match="needs less than"):
        gradient_descent(modes([0.5], [-1.0, 0.3], feedback=0.8), rate=3.0, steps=2)
    gradient_descent(modes([0.1, 1.0], [0.0, 0.0]), rate=0.64, steps=2)


def test_a_rate_below_the_linear_limit_that_makes_a_mode_diverge_is_warned_of_with_one_that_suffices():
    mode = modes([0.3], [2.0, -1.0])
    rate = 0.99 * float(2 / asymptotic_rate(mode))
    assert float(stable_rate(mode)) < rate
    with pytest.warns(UserWarning, match=r"1 of 1 modes .* needs less than .*, and [\d.]+ suffices"):
        trajectory = gradient_descent(mode, rate=rate, steps=500)
    assert trajectory.diverged.item() > 0
    gradient_descent(mode, rate=float(sufficient_rate(mode)), steps=500)


def test_shapes_and_types_are_those_given():
    mode = modes(torch.ones(2, 3, dtype=torch.float32), [torch.zeros(3, dtype=torch.float32)] * 2)
    assert mode.weights.dtype == torch.float32
    trajectory = gradient_descent(mode, rate=0.1, steps=5, at=[0, 5])
    assert trajectory.weights.shape == (2, 2, 2, 3)
    assert (
        trajectory.product.shape
        == trajectory.error.shape
        == trajectory.loss.shape
        == trajectory.share.shape
        == (2, 2, 3)
    )
    assert trajectory.invariants.shape == trajectory.expected_change.shape == (2, 1, 2, 3)
    assert trajectory.diverged.shape == (2, 3)
    assert trajectory.weights.dtype == mode.weights.dtype
    scalar = gradient_descent(modes(1.0, [0.0, 0.0]), rate=0.1, steps=5)
    assert scalar.weights.shape == (6, 2)
    assert scalar.at(-1).error == scalar.error[-1]
    assert gradient_descent(modes(0.0, [0.5, 0.0]), rate=0.1, steps=1).share.isnan().all()


def test_blocks_do_not_change_a_mode():
    λ = torch.linspace(0.01, 1, 12_000)
    whole = gradient_descent(modes(λ, [0.0, 0.5]), rate=0.1, steps=20, at=[20])
    part = gradient_descent(modes(λ[-10:], [0.0, 0.5]), rate=0.1, steps=20, at=[20])
    assert torch.equal(whole.weights[..., -10:], part.weights)


@pytest.mark.unchecked
def test_ten_thousand_modes_take_ten_thousand_steps():
    mode = modes(np.logspace(-2, 0, 10_000), [0.0, 0.0])
    trajectory = gradient_descent(mode, rate=0.3, steps=10_000)
    assert len(trajectory.times) == 101
    rate = sufficient_rate(mode)
    assert (rate >= 0.3).all()
    assert float(trajectory.error[-1].abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rate": 0.0}, "rate is 0.0, expected a positive number"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"steps": 0}, "steps is 0, expected a whole number from 1 on"),
        ({"at": [3, 2]}, "recording steps must increase from 0 to at most 5"),
        ({"at": [6]}, "recording steps must increase"),
        ({"at": []}, "recording steps must increase"),
    ],
)
def test_steps_of_no_use_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        gradient_descent(modes(1.0, [0.0, 0.0]), **{"rate": 0.1, "steps": 5, **wrong})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"times": [1.0, 1.0]}, "times must increase from 0 on"),
        ({"times": [-1.0, 1.0]}, "times must increase from 0 on"),
        ({"times": []}, "times must increase from 0 on"),
        ({"times": 3.0}, r"times must increase from 0 on, got 3.0: pass a list, such as \[0.0, 1.0\]"),
        ({"times": [0.0, float("inf")]}, "times holds inf"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
    ],
)
def test_times_of_no_use_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        gradient_flow(modes(1.0, [0.0, 0.0]), **{"times": [0.0, 1.0], **wrong})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"target": -1.0}, "λ is -1, expected at least 0: flip the sign"),
        ({"target": float("nan")}, "λ holds nan, expected finite numbers"),
        ({"target": [1.0, 2.0], "weights": [[0.0, 0.0, 0.0], 0.0]}, "do not broadcast: pass one number a mode"),
        ({"weights": [1e200, 1e200]}, r"θ_1 holds 1e\+200, expected sizes up to 1e\+100"),
        (
            {"weights": [0.0] * 3, "feedback": [1.0]},
            "1 feedback weights for 3 layers, expected 2, or one number, not in",
        ),
        ({"target": torch.ones(1, dtype=torch.bfloat16)}, "λ is in torch.bfloat16, expected float32 or float64"),
        ({"weights": [0.0]}, "1 weights were given"),
        ({"weights": 0.0}, "weights is 0.0, expected a sequence"),
        ({"weights": [0.0, float("inf")]}, "θ_2 holds inf"),
        ({"feedback": 0.0}, "m_2 is 0, expected other than 0: B must be of full rank"),
        ({"feedback": [1.0, 1.0]}, "2 feedback weights for 2 layers, expected 1, or one"),
        ({"variance": 0.0}, "the variance is 0, expected above 0"),
        ({"rule": "adam"}, "rule is 'adam', expected one of fa, dfa, bp"),
    ],
)
@pytest.mark.unchecked
def test_modes_of_no_use_are_refused(wrong, named):
    given = {"target": 1.0, "weights": [0.0, 0.0], **wrong}
    with pytest.raises(ValueError, match=named):
        modes(given.pop("target"), given.pop("weights"), **given)
