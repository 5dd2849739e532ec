"""The convergence statements on many draws, and that each says which assumption fails where it does not apply."""

import numpy as np
import pytest
import torch
from linear_cases import RULES, drawn, parts, points

from falign.theory.deep_linear import _steps
from falign.theory.deep_linear._learning import learning_time
from falign.theory.deep_linear._modes import modes
from falign.theory.deep_linear._network import network
from falign.theory.deep_linear._spectral import spectral, task
from falign.theory.deep_linear._steps import sufficient_rate
from falign.theory.deep_linear._theorems_matrices import matrix_conservation, matrix_invariants, two_layer_convergence
from falign.theory.deep_linear._theorems_modes import (
    asymptotic_decay,
    conserved_invariants,
    error_recursion,
    exponential_convergence,
    learning_time_law,
    step_rates,
    zero_loss,
)
from falign.theory.deep_linear._two_layer import critical_target

pytestmark = pytest.mark.unchecked  # many steps: checking annotations would take most of the time

RUNS = 100


def uniform(low, high, seed, runs=RUNS):
    random = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(runs, generator=random, dtype=torch.float64)


def aligned(depth, rule, seed=0):
    """Modes of which all K_l are positive; of bp the first weight is the least."""
    weights = [uniform(0.1, 0.6, seed)]
    m = [uniform(0.5, 1.5, seed + 10 + layer) for layer in range(depth - 1)]
    for layer in range(depth - 1):
        extra = uniform(0.2, 0.7, seed + 20 + layer)
        if rule == "bp":
            weights.append(weights[0] + extra)
        else:
            ratio = m[layer] / m[layer + 1] if rule == "dfa" and layer < depth - 2 else m[layer]
            weights.append((weights[-1].square() / 2 + extra) / ratio)
    λ, s = uniform(0.2, 3.0, seed + 40), uniform(0.5, 1.5, seed + 41)
    return modes(λ, weights, feedback=m, variance=s, rule=rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_aligned_modes_converge_exponentially_in_flow(depth, rule):
    trajectory = _steps.gradient_flow(aligned(depth, rule), times=np.linspace(0, 10, 21))
    found = exponential_convergence(trajectory)
    assert found.verdict == "holds"
    assert found.constants["rate"] > 0.003
    assert conserved_invariants(trajectory).verdict == "holds"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_aligned_modes_converge_linearly_in_steps(depth, rule):
    start = aligned(depth, rule)
    trajectory = _steps.gradient_descent(start, rate=0.01, steps=200, at=range(201))
    found = exponential_convergence(trajectory)
    assert found.verdict == "holds", found.sentence
    assert (found.bound[:, -1] < 0.9 * found.bound[:, 0]).any()
    for identity in (error_recursion, conserved_invariants):
        assert identity(trajectory).verdict == "holds"
    if depth == 2 and rule == "fa":  # the form of two layers: 1 - ηρ - η² s m θ_1 e
        here, after = trajectory.at(0), trajectory.at(1)
        correction = 0.01**2 * here.variance * here.feedback[0] * here.weights[0] * here.error
        torch.testing.assert_close(after.error, here.error * (1 - 0.01 * here.decay_rate - correction))


@pytest.mark.parametrize("rule", RULES)
def test_identities_of_steps_hold_at_any_rate_and_start(rule):
    start = modes(uniform(0, 2, 3), list(drawn(3, RUNS, seed=4)), feedback=list(drawn(2, RUNS, seed=5)), rule=rule)
    trajectory = _steps.gradient_descent(start, rate=1e-3, steps=300, at=range(301))
    assert error_recursion(trajectory).verdict == "holds"
    assert conserved_invariants(trajectory).verdict == "holds"
    assert exponential_convergence(trajectory).verdict == "assumption fails"


def test_drift_of_the_invariants_is_that_of_a_loop():
    """K falls by ``½ η² m² e²`` a step: of ``K = θ_2 - θ_1²/(2m)``, ``½ η² m e²``."""
    θ1, θ2, m, λ, total = 0.3, -0.4, 0.7, 1.3, 0.0
    trajectory = _steps.gradient_descent(modes(λ, [θ1, θ2], feedback=m), rate=0.1, steps=50, at=range(51))
    for _ in range(50):
        e = λ - θ1 * θ2
        θ1, θ2, total = θ1 + 0.1 * m * e, θ2 + 0.1 * θ1 * e, total + 0.005 * m * e * e
    assert float(trajectory.invariants[-1] - trajectory.invariants[0]) / m == pytest.approx(-total, abs=1e-14)
    assert conserved_invariants(trajectory).verdict == "holds"


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_every_trajectory_ends_without_loss(depth, rule):
    signs = drawn(depth - 1, 30, seed=6).sign()
    feedback = [sign * uniform(0.6, 1.4, 7 + place, 30) for place, sign in enumerate(signs)]
    start = modes(uniform(0.3, 1.3, 3, 30), list(0.7 * drawn(depth, 30, seed=8)), feedback=feedback, rule=rule)
    end = 1.01 * float(learning_time(start, 1e-6).max())
    found = zero_loss(_steps.gradient_flow(start, times=end * torch.linspace(0, 1, 60, dtype=torch.float64) ** 3))
    assert found.verdict == "holds", found.sentence


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("start", [[0.0, 0.0, 0.0], [-0.4, -0.8, -0.3], [1.2, -0.5, 0.9], [-1.5, 0.0, 0.0]])
def test_steps_at_the_sufficient_rate_end_without_loss_from_any_start(rule, start):
    chain = modes(0.7, start, feedback=[0.8, 1.2], rule=rule)
    rate = 0.999 * float(sufficient_rate(chain))
    steps = int(3 * float(learning_time(chain, 1e-6)) / rate) + 10
    trajectory = _steps.gradient_descent(chain, rate=rate, steps=steps)
    assert exponential_convergence(_steps.gradient_descent(chain, rate=rate, steps=9, at=range(10))).failing
    assert zero_loss(trajectory).verdict == "holds", zero_loss(trajectory).sentence
    short = _steps.gradient_descent(chain, rate=rate, steps=2)
    assert [part.name for part in zero_loss(short).failing] == ["long enough"]
    large = _steps.gradient_descent(chain, rate=1.2 * rate, steps=steps)
    assert "step size" in [part.name for part in zero_loss(large).failing]


def test_error_falls_at_its_asymptotic_rate():
    start = modes(uniform(0.8, 1.2, 1), [0.3 * drawn(RUNS, seed=2), uniform(0.9, 1.1, 3)])
    assert asymptotic_decay(_steps.gradient_flow(start, times=[0.0, 6.0, 6.5])).verdict == "holds"
    steps = _steps.gradient_descent(start, rate=0.05, steps=130, at=[0, 120, 130])
    assert asymptotic_decay(steps).verdict == "holds"
    near_fold = modes([0.99 * float(critical_target(-0.5))], [[-1.0], [0.0]])
    for tolerance, verdict in ((9e-4, "assumption fails"), (1e-6, "holds")):
        time = float(learning_time(near_fold, tolerance))
        assert asymptotic_decay(_steps.gradient_flow(near_fold, times=[0.0, time, time + 0.5])).verdict == verdict
    early = asymptotic_decay(_steps.gradient_flow(start, times=[0.0, 0.1]))
    assert [part.name for part in early.failing] == ["near the end"]


@pytest.mark.parametrize(("depth", "slope"), [(2, -2 / 3), (3, -6 / 7), (4, -14 / 15)])
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_learning_time_is_a_power_of_the_target(depth, slope, rule):
    found = learning_time_law(depth, [1e-3, 0.01, 0.3, 30.0, 1e3], rule=rule, feedback=0.7)
    assert found.verdict == "holds"
    assert found.constants["slope"] == pytest.approx(slope)


def test_what_the_statements_need_is_named_where_it_fails():
    against = modes([0.1, 0.1], [-1.0, 0.0])
    flowed = _steps.gradient_flow(against, times=[0.0, 1.0, 2.0])
    assert [part.name for part in exponential_convergence(flowed).failing] == ["positive rate"]
    assert "long enough" in [part.name for part in zero_loss(flowed).failing]
    saddle = modes(1.0, [-0.5, 0.5], rule="bp")
    found = zero_loss(_steps.gradient_flow(saddle, times=[0.0, 30.0]))
    assert found.verdict == "assumption fails"
    assert "fixed carrier" in [part.name for part in found.failing]
    assert learning_time_law(2, [0.1], rule="bp").verdict == "assumption fails"
    large = _steps.gradient_descent(modes(1.0, [0.1, 1.0]), rate=0.7, steps=20, at=range(21))
    assert [part.name for part in exponential_convergence(large).failing][-1] == "step size"
    sparse = _steps.gradient_descent(modes(1.0, [0.1, 1.0]), rate=0.1, steps=20, at=[0, 20])
    with pytest.raises(ValueError, match=r"descend with at=range\(steps \+ 1\)"):
        step_rates(sparse)
    with pytest.raises(ValueError, match="1 time was recorded"):
        asymptotic_decay(_steps.gradient_flow(against, times=[1.0]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [(6, 7, 4), (6, 7, 5, 4), (6, 5, 6, 7, 8, 4)])
def test_whole_matrices_are_conserved(sizes, rule):
    X, Y = points()
    state = network(*parts(sizes, rule), rule=rule)
    steps = matrix_conservation(state, X, Y, rule=rule, rate=0.01, steps=50)
    assert steps.verdict == "holds", steps.sentence
    assert matrix_conservation(state, X, Y, rule=rule, times=[0.0, 0.5]).verdict == "holds"
    assert len(matrix_invariants(state, rule)) == (1 if rule == "dfa" else len(sizes) - 2)


def test_invariant_matrix_is_the_formula():
    (W1, W2), (B,) = parts((6, 5, 4), "fa")
    C = W1[1] @ W1[1].T - B[1].T @ W2[1] - W2[1].T @ B[1]
    torch.testing.assert_close(matrix_invariants(network([W1, W2], [B]))[0][1], C)


def test_two_layers_aligned_with_their_feedback_converge_on_any_data():
    X, Y = points()
    B = drawn(5, 4, 9, seed=1, scale=0.5)
    W = [drawn(5, 9, 6, seed=2, scale=0.05), 1.5 * B + drawn(5, 4, 9, seed=3, scale=0.05)]
    state = network(W, [B])
    flowed = two_layer_convergence(state, X, Y, times=np.linspace(0, 5, 11))
    assert flowed.verdict == "holds", flowed.sentence
    assert flowed.bound[:, -1].max() < 0.8 * flowed.bound[:, 0].max()
    stepped = two_layer_convergence(state, X, Y, rate=0.05, steps=100)
    assert stepped.verdict == "holds", stepped.sentence
    best = np.linalg.lstsq(X.numpy(), Y.numpy(), rcond=None)[0]
    missed = X.numpy() @ (best - (W[1][0] @ W[0][0]).T.numpy()) @ B[0].numpy()
    assert float(flowed.measured[0, 0]) == pytest.approx(0.5 * np.mean((missed**2).sum(1)))
    with pytest.warns(UserWarning, match=r"rate 0\.6 is"):
        coarse = two_layer_convergence(state, X, Y, rate=0.6, steps=5)
    assert "step size" in [part.name for part in coarse.failing]
    random = two_layer_convergence(network([drawn(5, 9, 6), drawn(5, 4, 9)], [B]), X, Y, times=[0.0, 0.1])
    assert [part.name for part in random.failing] == ["aligned"]


@pytest.mark.parametrize("check", [matrix_conservation, two_layer_convergence])
def test_a_diverged_run_is_said_to_have_diverged_and_its_rate_warned_of(check):
    X, Y = points()
    state = network(*parts((6, 5, 4), "fa"))
    with pytest.warns(UserWarning, match="rate 50 is too large: the weights diverge; a run at"):
        found = check(state, X, Y, rate=50.0, steps=500)
    assert "finite" in [part.name for part in found.failing]
    assert "the run diverged" in found.sentence


def test_two_layers_that_are_aligned_with_nothing_or_have_nothing_to_learn():
    X, Y = task([2.0, 1.0, 0.3], inputs=5, outputs=4)
    for seed in range(6):  # κ = 0 but for rounding
        state = spectral(X, Y, weights=[0.1, 0.2], hidden=[7], seeds=[seed]).state
        found = two_layer_convergence(state, X, Y, times=[0.0, 1.0])
        assert [part.name for part in found.failing] == ["aligned"]
        assert found.constants["rate"] == 0
    B = torch.eye(3, 6, dtype=torch.float64)
    state = network([torch.zeros(6, 5, dtype=torch.float64), B], [B])
    assert two_layer_convergence(state, X, 0 * Y[:, :3], rate=0.1, steps=3).verdict == "holds"
    single = state.map(lambda part: part.float())
    assert two_layer_convergence(single, X.float(), Y[:, :3].float(), rate=0.05, steps=50).verdict == "holds"
    assert matrix_conservation(single, X.float(), Y[:, :3].float(), rate=0.05, steps=50).verdict == "holds"


def test_conservation_is_judged_by_the_weights_on_the_way():
    X, Y = task([2e3, 1e3, 3e2], inputs=5, outputs=4)
    state = spectral(X, Y, weights=[0.1, 0.2], hidden=[6]).state
    assert matrix_conservation(state, X, Y, rate=2e-4, steps=400).verdict == "holds"


def test_modes_in_float32_are_judged_by_their_rounding():
    start = aligned(2, "fa")
    single = modes(
        start.target.float(), list(start.weights.float()), feedback=[start.feedback[0]], variance=start.variance
    )
    trajectory = _steps.gradient_descent(single, rate=0.01, steps=100, at=range(101))
    assert trajectory.weights.dtype == torch.float32
    for check in (error_recursion, conserved_invariants, exponential_convergence):
        assert check(trajectory).verdict == "holds", check(trajectory).sentence


def test_of_one_mode_the_matrix_statement_is_the_scalar_one():
    (K,) = modes(1.0, [0.4, 0.9], feedback=0.8).invariants
    (C,) = matrix_invariants(network([[[0.4]], [[0.9]]], [[[0.8]]]))
    assert float(C) == pytest.approx(-2 * float(K))
    found = two_layer_convergence(network([[[0.4]], [[0.9]]], [[[0.8]]]), [[1.0]], [[1.0]], times=[0.0, 1.0])
    assert found.constants["rate"] == pytest.approx(float(K))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda state, data: matrix_conservation(state, *data), "pass a rate and steps, or times alone"),
        (lambda state, data: two_layer_convergence(state, *data), "pass a rate and steps, or times alone"),
        (lambda state, data: matrix_conservation(state, *data, rate=-1.0), "rate is -1.0"),
        (
            lambda state, data: two_layer_convergence(network(*parts((6, 5, 5, 4), "fa")), *data, rate=0.1),
            "have 3 layers: the statement is of two",
        ),
        (lambda state, data: matrix_conservation(state, *data, rate=0.1, steps=-3), "steps is -3, expected a whole"),
        (lambda state, data: two_layer_convergence(state, *data, rate=0.1, steps=-2), "steps is -2, expected a whole"),
        (lambda state, data: two_layer_convergence(state, data[0], data[1][:, :2], rate=0.1), "targets have shape"),
        (lambda state, data: two_layer_convergence(network(state.W, rule="bp"), *data, rate=0.1), "have no feedback B"),
        (lambda state, data: learning_time_law(1, [1.0]), "depth is 1"),
        (lambda state, data: learning_time_law(2, [0.0, 1.0]), "λ is 0, expected above 0"),
        (lambda state, data: learning_time_law(2, [1.0, 1e300]), r"λ holds 1e\+300, expected sizes up to 1e\+100"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, named):
    with pytest.raises(ValueError, match=named):
        make(network(*parts((6, 5, 4), "fa")), points())
