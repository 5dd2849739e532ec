"""Theorems 3.2, 4.2 and 4.3: verdicts where they should hold, where an assumption fails, and with a wrong γ."""

from dataclasses import replace
from math import inf, log, sqrt

import numpy as np
import pytest
import torch

from falign.theory.two_layer._schedules import Penalty
from falign.theory.two_layer._start import Start, draw
from falign.theory.two_layer._weight_space import WeightSpace
from falign.theory.two_layer._width_free import from_start, sample
from falign.theory.two_layer.theorems import (
    Assumption,
    TheoremCheck,
    parameter_scaling,
    theorem_3_2,
    theorem_4_2,
    theorem_4_3,
)
from falign.theory.two_layer.theorems._convergence import on_subspace

CUTOFF = (Penalty(), Penalty(0.1, "cutoff", 20.0), Penalty(0.1, "exponential", 10.0))


def _start(p: int = 1000, activation: str = "tanh") -> Start:
    return draw(range(3), n=8, d=32, p=p, activation=activation, inputs="scaled")


def _assumption(check: TheoremCheck, name: str) -> Assumption:
    return next(assumption for assumption in check.assumptions if assumption.name == name)


@pytest.mark.parametrize(("activation", "rate"), [("tanh", 0.5), ("sigmoid", 0.3), ("erf", 0.5)])
def test_theorem_3_2_holds_for_bounded_activations(activation, rate):
    check = theorem_3_2(_start(activation=activation), activation=activation, rate=rate, steps=100)
    assert check.verdict == "holds", check.sentence
    assert check.slack > 0
    assert check.constants["share of gamma"] > 0.85
    assert _assumption(check, "width, C1").holds is None
    assert "holds" in check.sentence


def test_bound_and_constants_equal_a_loop_over_the_engine_in_weight_space():
    start = _start(p=60)
    check = theorem_3_2(start, activation="tanh", rate=0.5, steps=30)
    engine = WeightSpace(start, activation="tanh", rate=0.5)
    gamma = check.constants["lambda_min"]
    norms, weight, beta = [], 0.0, 0.0
    for _ in range(31):
        norms.append(engine.error()[:, 0].norm(dim=-1).numpy())
        weight = max(weight, float((engine.W[:, 0] - start.W).norm(dim=-1).max()))
        beta = max(beta, float((engine.beta[:, 0] - start.beta).abs().max()))
        engine.advance(1)
    norms = np.stack(norms, axis=1)
    np.testing.assert_allclose(check.measured.numpy(), norms[:, 1:], atol=1e-11)
    least = int((check.bound[:, 0] / check.measured.new_tensor(norms[:, 0])).argmax())
    np.testing.assert_allclose(check.bound[least], (1 - 0.5 * gamma / 4) * norms[least, :-1], atol=1e-11)
    single = theorem_3_2(_first(start), activation="tanh", rate=0.5, steps=30)
    own = single.constants["lambda_min"]
    far = (engine.beta[0, 0] - start.beta[0]).abs().max()
    assert single.constants["c2"] == pytest.approx(float(far) * own * sqrt(60) / 8, rel=0.05)
    assert single.constants["c1"] <= weight * own * sqrt(60) / (8 * sqrt(log(60)))
    assert beta > 0


def _first(start: Start) -> Start:
    return Start(X=start.X[:1], y=start.y[:1], W=start.W[:1], beta=start.beta[:1], b=start.b[:1])


def test_data_shared_by_all_seeds_count_for_each():
    start = _start(p=300)
    shared = replace(start, X=start.X[0], y=start.y[0])
    spread = replace(start, X=start.X[:1].expand(3, -1, -1), y=start.y[:1].expand(3, -1))
    checks = [theorem_3_2(each, activation="tanh", rate=0.5, steps=20) for each in (shared, spread)]
    torch.testing.assert_close(checks[0].bound, checks[1].bound, rtol=0, atol=1e-12)
    assert checks[0].held.shape == (3,)


def test_a_wrong_gamma_fails_both_the_assumption_and_the_inequality():
    check = theorem_3_2(_start(), activation="tanh", rate=0.5, steps=60, gamma=3.0)
    assert check.verdict == "assumption fails"
    assert check.share == 0
    assert check.slack < 0
    assert "assumption 3.1" in check.sentence


def test_an_inequality_that_fails_under_fulfilled_assumptions_is_a_failure():
    check = theorem_3_2(_start(), activation="tanh", rate=0.5, steps=60)
    wrong = replace(check, bound=check.bound * 0.5)
    assert wrong.verdict == "fails"
    assert "width, C1" in wrong.sentence


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_unbounded_activations_are_not_covered(activation):
    check = theorem_3_2(_start(activation=activation), activation=activation, rate=0.3, steps=20)
    assert check.verdict == "assumption fails"
    assert [assumption.name for assumption in check.failing] == ["bounded smooth activation"]


def test_equal_inputs_fail_assumption_3_1():
    start = _start()
    X = start.X.clone()
    X[:, 1] = X[:, 0]
    check = theorem_3_2(replace(start, X=X), activation="tanh", rate=0.3, steps=20)
    assert [assumption.name for assumption in check.failing] == ["assumption 3.1"]


def test_weights_of_another_variance_are_noticed():
    start = draw(range(2), n=4, d=16, p=200, activation="tanh", inputs="scaled", weights="scaled")
    check = theorem_3_2(start, activation="tanh", rate=0.3, steps=5)
    assert "Gaussian start" in [assumption.name for assumption in check.failing]


def test_a_rate_that_diverges_fails_the_condition_that_is_not_printed():
    check = theorem_3_2(_start(), activation="tanh", rate=8.0, steps=40)
    assert "step size (not printed)" in [assumption.name for assumption in check.failing]
    assert check.share == 0


def test_theorem_4_2_holds_and_so_does_the_tighter_bound_of_a_gradient_step():
    check = theorem_4_2(_start(), activation="tanh", rate=0.5, steps=100, penalties=CUTOFF)
    assert check.verdict == "holds", check.sentence
    tight = check.series["bound of a gradient step"]
    assert (tight <= check.bound + 1e-12).all()
    assert (check.measured <= tight + 1e-12).all()
    assert check.measured.shape == (9, 100)


def test_the_sum_of_the_ridge_is_held_against_the_constant():
    start = _start()
    free = theorem_4_2(start, activation="tanh", rate=0.5, steps=5, penalties=CUTOFF)
    implied = _assumption(free, "penalty sum").measured
    gamma = free.constants["lambda_min"]
    assert implied == pytest.approx(2.1 * 0.5 * 64 * sqrt(log(1000)) / (gamma**2 * sqrt(1000)))
    for constant, holds in ((implied * 1.01, True), (implied * 0.99, False)):
        check = theorem_4_2(start, activation="tanh", rate=0.5, steps=5, penalties=CUTOFF, sum_constant=constant)
        assert _assumption(check, "penalty sum").holds is holds
        assert check.verdict == ("holds" if holds else "assumption fails")


def test_a_constant_ridge_has_no_finite_sum():
    check = theorem_4_2(_start(), activation="tanh", rate=0.5, steps=5, penalties=(Penalty(0.1),))
    assert _assumption(check, "penalty sum").measured == inf
    assert check.verdict == "assumption fails"


@pytest.mark.parametrize("p", [1000, 10**9])
def test_theorem_4_3_holds_at_any_width(p):
    gram = sample(range(6), n=10, d=100, p=p, inputs="scaled")
    penalties = (Penalty(), Penalty(0.5, "cutoff", 30.0))
    check = theorem_4_3(gram, d=100, rate=0.1, steps=200, penalties=penalties)
    assert check.verdict == "holds", check.sentence
    assert (check.measured <= check.series["bound of a gradient step"] + 1e-12).all()


def test_theorem_4_3_judges_gamma_and_the_largest_eigenvalue():
    gram = sample(range(3), n=5, d=50, p=10**6, inputs="scaled")
    for arguments, name in (({"gamma": 2.0}, "full rank"), ({"largest": 0.9}, "largest eigenvalue")):
        check = theorem_4_3(gram, d=50, rate=0.1, steps=20, **arguments)
        assert [assumption.name for assumption in check.failing] == [name]
    assert theorem_4_3(gram, d=50, rate=0.1, steps=20, gamma=4.0).share == 0


def test_the_printed_ridge_term_is_too_small_for_rates_above_one():
    """A teacher that the network starts at: e(0) = 0, and the first step makes ηλ|y| of it, above λ|y|."""
    start = draw(range(3), n=1, d=4000, p=400, inputs="scaled")
    start = replace(start, y=((start.W @ start.X.mT)[..., 0] * start.beta).sum(-1, keepdim=True) / sqrt(400))
    check = theorem_4_3(from_start(start), d=4000, rate=1.2, steps=3, penalties=(Penalty(0.05, "cutoff", 2.0),))
    assert not check.failing
    assert check.verdict == "fails"
    assert (check.measured <= check.series["bound of a gradient step"] + 1e-12).all()


def test_more_points_than_dimensions_hold_on_the_column_space_only():
    gram = sample(range(3), n=60, d=10, p=10**6)
    gram = replace(gram, rest=gram.rest + 0.1 * torch.randn(3, 60, dtype=torch.float64))
    whole = theorem_4_3(gram, d=10, rate=0.002, steps=150)
    assert [assumption.name for assumption in whole.failing] == ["full rank"]
    check = theorem_4_3(gram, d=10, rate=0.002, steps=150, on_column_space=True)
    assert check.verdict == "holds", check.sentence
    rates = check.measured[:, -1] / check.measured[:, -2]
    assert (rates <= 1 - 0.002 * check.constants["gamma"] / 2).all()


def test_single_weights_move_like_one_over_root_p():
    found = parameter_scaling((5, 10), (250, 1000, 4000), steps=80, seeds=range(4))
    assert len(found.rows) == 24
    for slope, lift in ((found.beta_in_p, 1 / (2 * log(1000))), (found.weight_in_p, 0.0)):
        assert abs(slope.value + 0.5 - lift) < 3 * slope.error, slope
    for slope in (found.beta_in_n, found.weight_in_n):
        assert slope.value - 2 * slope.error <= 1


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="at least one step"):
        theorem_3_2(_start(p=10), activation="tanh", rate=0.1, steps=0)
    with pytest.raises(ValueError, match="float64"):
        theorem_3_2(draw([0], n=2, d=3, p=4, dtype=torch.float32), activation="tanh", rate=0.1, steps=1)
    with pytest.raises(ValueError, match="scalar output"):
        theorem_3_2(draw([0], n=2, d=3, p=4, outputs=2), activation="tanh", rate=0.1, steps=1)
    with pytest.raises(ValueError, match="two sample sizes"):
        parameter_scaling((5,), (10, 20), seeds=[0])


@pytest.mark.parametrize("gamma", [-1.0, 0.0, inf])
def test_gamma_must_be_positive(gamma):
    gram = sample([0], n=3, d=30, p=100, inputs="scaled")
    with pytest.raises(ValueError, match=f"gamma is {gamma}, expected a positive number"):
        theorem_3_2(_start(p=10), activation="tanh", rate=0.1, steps=1, gamma=gamma)
    with pytest.raises(ValueError, match=f"gamma is {gamma}, expected a positive number"):
        theorem_4_3(gram, d=30, rate=0.1, steps=1, gamma=gamma)


@pytest.mark.parametrize("delta", [-0.1, 0.0, 1.0, 2.0, float("nan")])
def test_delta_lies_between_0_and_1(delta):
    gram = sample([0], n=3, d=30, p=100, inputs="scaled")
    with pytest.raises(ValueError, match=f"delta is {delta}, expected a number above 0 and below 1"):
        theorem_3_2(_start(p=10), activation="tanh", rate=0.1, steps=1, delta=delta)
    with pytest.raises(ValueError, match=f"delta is {delta}, expected a number above 0 and below 1"):
        theorem_4_2(_start(p=10), activation="tanh", rate=0.1, steps=1, penalties=CUTOFF, delta=delta)
    with pytest.raises(ValueError, match=f"delta is {delta}, expected a number above 0 and below 1"):
        theorem_4_3(gram, d=30, rate=0.1, steps=1, delta=delta)


def test_other_constants_must_be_positive_and_inputs_not_all_zero():
    gram = sample(range(2), n=3, d=30, p=100, inputs="scaled")
    for wrong in ({"largest": 0.0}, {"sum_constant": -1.0}, {"d": 0}):
        name, value = next(iter(wrong.items()))
        with pytest.raises(ValueError, match=f"{name} is {value}, expected a positive number"):
            theorem_4_3(gram, rate=0.1, steps=1, **{"d": 30, **wrong})
    with pytest.raises(ValueError, match="XXᵀ is zero"):
        theorem_4_3(replace(gram, K=0 * gram.K), d=30, rate=0.1, steps=1)
    start = _start(p=50)
    check = theorem_3_2(replace(start, X=0 * start.X), activation="tanh", rate=0.1, steps=3)
    assert "assumption 3.1" in [assumption.name for assumption in check.failing]


def test_dependent_inputs_hold_on_the_true_column_space():
    """Rank below n ≤ d: of the null direction nothing is left but zeros, and the others run as they would."""
    start = draw(range(3), n=6, d=60, p=4000, inputs="scaled")
    X, y = start.X.clone(), start.y.clone()
    X[:2, 1] = X[:2, 0]
    start = replace(start, X=X, y=y)
    whole = theorem_4_3(from_start(start), d=60, rate=0.1, steps=200)
    assert [assumption.name for assumption in whole.failing] == ["full rank"]
    gram, n, smallest, largest = on_subspace(from_start(start))
    assert (gram.K > 0).sum(-1).tolist() == [5, 5, 6]
    values = torch.linalg.svdvals(X).square()
    torch.testing.assert_close(smallest, torch.stack([values[0, 4], values[1, 4], values[2, 5]]))
    torch.testing.assert_close(largest, values[:, 0])
    check = theorem_4_3(from_start(start), d=60, rate=0.1, steps=200, on_column_space=True)
    assert n == 6
    assert check.verdict == "holds", check.sentence
    Q = torch.linalg.svd(X)[0]
    Q[:2, :, 5] = 0
    projected = replace(start, y=(Q @ (Q.mT @ y.unsqueeze(-1)))[..., 0])
    weight_space = WeightSpace(projected, rate=0.1)
    weight_space.advance(200)
    torch.testing.assert_close(check.measured[:, -1], weight_space.error()[:, 0].norm(dim=-1), rtol=0, atol=1e-11)


def test_the_limit_of_full_rank_is_the_one_that_was_used():
    start = draw([0], n=6, d=60, p=400, inputs="scaled")
    X = start.X.clone()
    X[:, 1] = X[:, 0]
    check = theorem_4_3(from_start(replace(start, X=X)), d=60, rate=0.1, steps=5)
    largest = float(torch.linalg.svdvals(X).square().max())
    assert _assumption(check, "full rank").needed == pytest.approx(1e-12 * largest)
    assert f"where {1e-12 * largest:.4g} is the limit" in check.sentence
