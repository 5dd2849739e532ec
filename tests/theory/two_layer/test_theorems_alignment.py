"""Theorem 4.6, the vanishing of the cosine without ridge, and its mean."""

from dataclasses import replace
from math import sqrt

import pytest
import torch

from falign.theory.two_layer._schedules import Penalty
from falign.theory.two_layer._start import draw
from falign.theory.two_layer._weight_space import WeightSpace
from falign.theory.two_layer._width_free import Gram, from_start, sample
from falign.theory.two_layer.theorems import (
    linear_alignment_law,
    log_log_slope,
    penalty_of_sum,
    theorem_4_6,
    vanishing_alignment,
    width_independent,
)

pytestmark = pytest.mark.unchecked  # many steps: checking annotations would take most of the time

SIZE = 1.18
"""|y|/√n of the data set whose cosines shared/papers.md A.7 lists; it does not say so, but the three values do."""


def _gram(seed: int, p: int, size: float = SIZE) -> Gram:
    gram = sample([seed], n=10, d=1000, p=p, inputs="scaled")
    return replace(gram, y=gram.y * (size * sqrt(10) / gram.y.norm()))


def _mean_cosine(p: int, strength: float, constant: float, size: float = SIZE) -> float:
    checks = [
        theorem_4_6(_gram(seed, p, size), d=1000, rate=0.1, strength=strength, sum_constant=constant)
        for seed in range(8)
    ]
    assert all(check.verdict == "holds" for check in checks)
    assert max(check.constants["error left"] for check in checks) < 1e-9
    return sum(check.constants["mean cosine"] for check in checks) / len(checks)


@pytest.mark.parametrize("p", [1000, 4000, 16000])
@pytest.mark.parametrize(("strength", "constant", "expected"), [(2.0, 3.0, 0.61), (5.0, 3.0, 0.39), (5.0, 10.0, 0.79)])
def test_alignment_is_the_same_at_every_width(strength, constant, expected, p):
    assert _mean_cosine(p, strength, constant) == pytest.approx(expected, abs=0.03)


def test_the_constant_depends_on_the_size_of_the_targets():
    small, large = (_mean_cosine(4000, 2.0, 3.0, size) for size in (0.7, 1.4))
    assert large > small + 0.15


def test_the_run_equals_the_engine_in_weight_space():
    start = draw([0], n=4, d=60, p=300, inputs="scaled")
    check = theorem_4_6(from_start(start), d=60, rate=0.3, strength=2.0, sum_constant=3.0)
    steps = int(check.constants["steps"])
    engine = WeightSpace(
        start, rate=0.3, penalties=(Penalty(check.constants["lambda"], "cutoff", check.constants["T"] - 1),)
    )
    engine.advance(steps)
    assert float(engine.measure()["cosine"]) == pytest.approx(float(check.measured[0, -1]), abs=1e-10)
    assert float(check.series["time"][0, -1]) == steps


def test_other_summable_schedules_align_as_well_and_no_cutoff_is_not_covered():
    cosines = {}
    for schedule in ("cutoff", "exponential", "inverse-square", "constant"):
        check = theorem_4_6(_gram(0, 1000), d=1000, rate=0.1, strength=2.0, sum_constant=3.0, schedule=schedule)
        cosines[schedule] = check.constants["mean cosine"]
        assert check.verdict == ("assumption fails" if schedule == "constant" else "holds")
    assert cosines["cutoff"] < cosines["exponential"] < cosines["inverse-square"] < cosines["constant"]


def test_dependent_inputs_fail_full_rank_and_are_named():
    start = draw([0], n=4, d=60, p=300, inputs="scaled")
    X, y = start.X.clone(), start.y.clone()
    X[:, 1], y[:, 1] = X[:, 0], y[:, 0]
    check = theorem_4_6(from_start(replace(start, X=X, y=y)), d=60, rate=0.2, strength=2.0, sum_constant=3.0)
    assert [assumption.name for assumption in check.failing] == ["full rank"]
    assert "full rank" in check.sentence


def test_mean_and_error_over_runs():
    gram = sample(range(6), n=10, d=1000, p=4000, inputs="scaled")
    check = theorem_4_6(gram, d=1000, rate=0.1, strength=2.0, sum_constant=3.0)
    table = width_independent([check, check])
    assert table.shape == (2, 2)
    assert float(table[0, 0]) == pytest.approx(check.constants["mean cosine"])


@pytest.mark.parametrize("schedule", ["cutoff", "exponential", "inverse-square"])
@pytest.mark.parametrize("total", [1.0, 1.3, 7.5, 2000.0])
def test_schedules_are_fitted_to_their_sum(schedule, total):
    penalty = penalty_of_sum(1.0, total, schedule)
    assert penalty.at(0) == pytest.approx(1.0)
    expected = float(int(total)) if schedule == "cutoff" else total
    assert penalty.total() <= total * (1 + 1e-9)
    assert penalty.total() == pytest.approx(expected, rel=1e-5)


def test_a_sum_below_one_step_is_refused():
    with pytest.raises(ValueError, match="larger c_S"):
        penalty_of_sum(1.0, 0.5, "cutoff")
    with pytest.raises(ValueError, match="longest"):
        theorem_4_6(_gram(0, 1000), d=1000, rate=0.1, strength=2.0, sum_constant=3.0, longest=10)


def test_without_ridge_the_cosine_falls_with_the_width():
    widths, cosines, scaled = (100, 400, 1600, 6400), [], []
    for p in widths:
        start = draw(range(8), n=8, d=32, p=p, activation="tanh", inputs="scaled")
        check = vanishing_alignment(start, activation="tanh", rate=0.5, steps=150)
        assert check.verdict == "holds", check.sentence
        cosines.append(check.constants["mean cosine"])
        scaled.append(check.constants["cosine √p/n"])
    assert max(scaled) < 1
    slope = log_log_slope(widths, cosines)
    assert abs(slope.value + 0.5) < 3 * slope.error + 0.1


def test_mean_cosine_of_linear_networks_is_the_derived_one_and_n_over_p_for_small_rates():
    widths = (200, 800, 3200)
    check = linear_alignment_law(widths, n=50, d=150, rate=1e-3, steps=500, seeds=range(60))
    assert check.verdict == "holds", check.sentence
    assert (check.series["law"] < check.series["n/p"]).all()
    assert (check.series["law"] > 0.85 * check.series["n/p"]).all()


def test_large_steps_align_less_than_n_over_p():
    """At ηk ≈ 0.7 the law is less than half of n/p: n/p itself is ruled out by many standard errors."""
    check = linear_alignment_law((160,), n=10, d=30, rate=0.015, steps=300, seeds=range(1500))
    assert check.verdict == "holds", check.sentence
    mean, error, law, naive = (float(check.series[name]) for name in ("mean", "standard error", "law", "n/p"))
    assert law < 0.7 * naive
    assert mean + 3 * error < naive


def test_a_run_that_has_not_converged_does_not_judge_the_law():
    check = linear_alignment_law((200,), n=10, d=30, rate=1e-4, steps=5, seeds=range(3))
    assert check.verdict == "assumption fails"
    with pytest.raises(ValueError, match="two seeds"):
        linear_alignment_law((200,), n=10, d=30, rate=1e-4, steps=5, seeds=[0])
    assert torch.isfinite(check.measured).all()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"strength": 0.0}, "strength is 0.0, expected a positive number"),
        ({"strength": -1.0}, "strength is -1.0, expected a positive number"),
        ({"sum_constant": 0.0}, "sum_constant is 0.0, expected a positive number"),
        ({"d": 0}, "d is 0, expected a positive number"),
        ({"delta": 1.0}, "delta is 1.0, expected a number above 0 and below 1"),
    ],
)
def test_what_leaves_no_ridge_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        theorem_4_6(_gram(0, 1000), **{"d": 1000, "rate": 0.1, "strength": 2.0, "sum_constant": 3.0, **wrong})


def test_inputs_that_are_zero_are_refused():
    start = draw([0], n=4, d=60, p=300, inputs="scaled")
    gram = from_start(replace(start, X=0 * start.X))
    with pytest.raises(ValueError, match="XXᵀ is zero"):
        theorem_4_6(gram, d=60, rate=0.2, strength=2.0, sum_constant=3.0)


def test_a_block_has_one_width():
    gram = sample(range(2), n=10, d=1000, p=[500, 50000], inputs="scaled")
    with pytest.raises(ValueError, match="widths from 500 to 50000: one width a block"):
        theorem_4_6(gram, d=1000, rate=0.1, strength=2.0, sum_constant=3.0)
