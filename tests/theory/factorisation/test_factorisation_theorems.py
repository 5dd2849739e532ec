"""Statements about a trajectory: they hold where they must, and say which assumption fails where they need not."""

from contextlib import nullcontext

import pytest
import torch
from factorisation_cases import matrix, problem

from falign.theory.factorisation import (
    MEASUREMENTS,
    State,
    alignment_growth,
    conservation,
    descent_of_feedback,
    feedback,
    gradient_descent,
    gradient_flow,
    gram_drift,
    monotone_alignment,
    normal,
    optimal_output_bound,
    optimum_reached,
    orthonormal,
    stationary_limit,
    sufficient_rate,
    zero,
)

pytestmark = pytest.mark.unchecked  # many steps: checking annotations would take most of the time

SEEDS = range(3)
NAMES = list(MEASUREMENTS)
TIMES = [0.0, 0.5, 1.0, 2.0, 4.0]


def _descend(method="fa", start=zero, steps=1000, factor=1.0, made=None, **others):
    Y, B = made or problem()
    state = start(Y, B)
    rate = factor * float(sufficient_rate(method, Y, B, state).min())
    return gradient_descent(method, Y, B, state, rate=rate, steps=steps, names=NAMES, **others)


def _normal(Y, B):
    return normal(Y, B, seeds=range(len(B)), scale=0.3)


def _orthonormal(Y, B):
    return orthonormal(Y, B, seeds=range(len(B)))


@pytest.mark.parametrize(("method", "start"), [("fa", zero), ("fa", _normal), ("fa*", _orthonormal), ("gd", _normal)])
def test_conservation_is_exact_in_steps_of_any_size_and_in_flow(method, start):
    made = problem(n=20, m=25, r=6)
    trajectory = _descend(method, start, made=made, steps=2000)
    check = conservation(trajectory, tolerance=1e-10)
    assert check.verdict == "holds", check.sentence
    assert check.constants["relative residual"] < 1e-12
    assert check.series["drift"][:, -1].min() > 1e-5
    Y, B = problem()
    in_flow = conservation(
        gradient_flow(method, Y, B, start(Y, B), times=TIMES, names=["invariant", "drift", "account"])
    )
    assert in_flow.verdict == "holds", in_flow.sentence


def test_what_the_law_says_of_the_alignment_from_zero():
    trajectory = _descend()
    Z, W = trajectory.end
    symmetric = trajectory.B @ Z + (trajectory.B @ Z).mT
    assert torch.linalg.eigvalsh(symmetric).min() > -1e-12
    grown = (W.square().sum((1, 2)) - trajectory.rate * trajectory["growth"][:, -1]) / 2
    torch.testing.assert_close(trajectory["alignment"][:, -1], grown)


def test_weights_stay_bounded_by_what_they_have_learned():
    Y, B = problem()
    for time in (0.1, 1.0, 10.0):
        Z, W = gradient_flow("fa", Y, B, zero(Y, B), times=[0.0, time], names=[]).end
        gram, through = (part.square().sum((1, 2)) for part in (W @ W.mT, B @ Z @ W))
        assert (gram <= 2 * (W.square().sum((1, 2)) * through).sqrt() * (1 + 1e-9)).all()


def test_feedback_of_the_error_falls_from_zero():
    for trajectory in (_descend(), _descend(made=problem(n=6, m=6, r=5, runs=10))):
        check = descent_of_feedback(trajectory)
        assert check.verdict == "holds", check.sentence
    Y, B = problem()
    in_flow = gradient_flow("fa", Y, B, zero(Y, B), times=TIMES, names=["lyapunov"])
    assert descent_of_feedback(in_flow).verdict == "holds"
    large = descent_of_feedback(_descend(start=lambda Y, B: normal(Y, B, seeds=SEEDS)))
    assert [assumption.name for assumption in large.failing] == ["negative invariant"]


@pytest.mark.parametrize("method", ["fa", "fa*"])
def test_the_optimum_is_reached_where_r_is_at_least_the_rank(method):
    start = zero if method == "fa" else _orthonormal
    for rank in (2, 3):
        check = optimum_reached(_descend(method, start, made=problem(rank=rank), steps=3000))
        assert check.verdict == "holds", check.sentence
    for scale in (0.01, 1.0):
        Y, B = problem(rank=2)
        state = normal(Y, B, seeds=SEEDS, scale=scale)
        columns = torch.linalg.svd(Y).U[:, :2]
        within = State(columns @ columns.mT @ state.Z, state.W)
        rate = float(sufficient_rate("fa", Y, B, within).min())
        check = optimum_reached(gradient_descent("fa", Y, B, within, rate=rate, steps=6000, names=["error"]))
        assert check.verdict == "holds", check.sentence


def test_what_keeps_from_the_optimum_is_named():
    short = optimum_reached(_descend(made=problem(rank=5)))
    assert [assumption.name for assumption in short.failing] == ["overparameterised", "injective feedback"]
    outside = optimum_reached(_descend(start=_normal, made=problem(rank=2)))
    assert [assumption.name for assumption in outside.failing] == ["start in the columns of Y", "long enough"]
    Y, B = problem(rank=2)
    blind = B - B @ Y @ torch.linalg.pinv(Y) + torch.linalg.pinv(Y)[:3] * 1e-14
    assert "injective feedback" in [a.name for a in optimum_reached(_descend(made=(Y, blind), factor=1e-3)).failing]
    early = optimum_reached(_descend(made=problem(rank=2), steps=5))
    assert [assumption.name for assumption in early.failing] == ["long enough"]


def test_what_the_start_has_outside_the_columns_is_learned_last():
    Y, B = problem(rank=2, r=4)
    start = normal(Y, B, seeds=SEEDS, scale=0.01)
    columns = torch.linalg.svd(Y).U[:, :2]
    within = start._replace(Z=columns @ columns.mT @ start.Z)
    whole, inside = (
        gradient_descent("fa", Y, B, s, rate=0.05, steps=4000, names=["error"]).end for s in (start, within)
    )
    left, less = ((Y - Z @ W).square().sum((1, 2)).sqrt() for Z, W in (whole, inside))
    assert (left > 1e-6).all()
    assert (less < 1e-2 * left).all()


def test_the_stationary_function_is_not_reached_early():
    for method, start in (("fa", zero), ("fa", _normal), ("fa*", _orthonormal)):
        for steps in (0, 3, 10):
            check = stationary_limit(_descend(method, start, steps=steps))
            assert [assumption.name for assumption in check.failing] == ["long enough"]
            left = check.failing[0].measured
            assert (check.measured[:, :1] * 1e-8 <= left).all()  # what may be left is above what is


def test_the_variant_is_judged_where_nothing_is_left_to_learn():
    Y, B = problem(n=8, m=3, r=3)
    check = alignment_growth(gradient_descent("fa*", Y, B, _orthonormal(Y, B), rate=0.01, steps=50, names=NAMES))
    assert check.verdict == "holds", check.sentence
    assert check.slack > 0.99


@pytest.mark.parametrize("sizes", [(9, 4, 3), (5, 3, 2), (6, 9, 4)])
def test_trace_is_monotone_up_to_the_sufficient_rate(sizes):
    n, m, r = sizes
    made = matrix(n, m, seed=1), feedback(n, r, seeds=range(20))
    check = monotone_alignment(_descend("fa*", _orthonormal, made=made, steps=100))
    assert check.verdict == "holds", check.sentence
    with pytest.warns(UserWarning, match="is beyond"):
        large = monotone_alignment(_descend("fa*", _orthonormal, made=made, steps=100, factor=3.0))
    assert [assumption.name for assumption in large.failing] == ["step size"]


def test_runs_that_overflow_are_named_with_their_step():
    with pytest.warns(UserWarning, match="is beyond"):
        trajectory = _descend(start=_normal, factor=50.0, steps=400)
    first = int(trajectory.diverged[trajectory.diverged >= 0].min())
    check = conservation(trajectory)
    assert check.verdict == "assumption fails"
    assert check.failing[0].name == "finite"
    assert 0 < check.failing[0].measured <= first
    assert "no run overflows" in check.sentence


def test_convergence_from_a_start_without_proof_says_so():
    unproven = optimum_reached(_descend(start=_normal, made=problem(rank=2), steps=5))
    assert "not proven from this start" in unproven.sentence
    assert [assumption.name for assumption in unproven.assumptions if assumption.holds is None] == [
        "negative invariant"
    ]
    assert "proven" not in optimum_reached(_descend(made=problem(rank=2), steps=5)).sentence


def test_single_precision_is_not_judged_by_the_rounding_of_double():
    Y, B = (part.float() for part in problem())
    for method, checks in (
        ("fa", (conservation, descent_of_feedback, optimum_reached, stationary_limit)),
        ("fa*", (alignment_growth, monotone_alignment, gram_drift, optimal_output_bound)),
    ):
        trajectory = gradient_descent(method, Y, B, _orthonormal(Y, B), rate=0.01, steps=2, names=NAMES)
        for check in checks:
            with pytest.raises(ValueError, match=r"in torch.float32, judged to float64 rounding: .*\.double"):
                check(trajectory)


def test_alignment_of_the_variant_grows_by_what_is_left():
    for rank, r in ((None, 3), (2, 3)):
        trajectory = _descend("fa*", _orthonormal, made=problem(r=r, rank=rank), steps=300)
        assert alignment_growth(trajectory, tolerance=1e-10).verdict == "holds"
        assert gram_drift(trajectory).verdict == "holds"
        assert optimal_output_bound(trajectory).verdict == "holds"
    Y, B = problem()
    start = _normal(Y, B)
    for wild in (True, False):
        rate = (3.0 if wild else 0.01) * float(sufficient_rate("fa*", Y, B, start).min())
        with pytest.warns(UserWarning, match="is beyond") if wild else nullcontext():
            trajectory = gradient_descent("fa*", Y, B, start, rate=rate, steps=200, names=NAMES)
        assert alignment_growth(trajectory, tolerance=1e-10).verdict == "holds"
        assert gram_drift(trajectory).verdict == "holds"
        assert optimal_output_bound(trajectory).verdict == "holds"
    in_flow = gradient_flow("fa*", Y, B, start, times=TIMES, names=["weighted", "growth"])
    assert alignment_growth(in_flow, tolerance=1e-7).verdict == "holds"
    assert optimal_output_bound(in_flow).verdict == "holds"


def test_trace_is_monotone_from_orthonormal_rows_only():
    made = problem(runs=12)
    slow = _descend("fa*", _orthonormal, made=made, factor=0.05, steps=600, at=range(601))
    check = monotone_alignment(slow, tolerance=1e-8)
    assert check.verdict == "holds", check.sentence
    assert check.constants["gained"] > 0.1
    assert (slow["weighted"].diff(dim=1) > -1e-12).all()
    Y, B = made
    in_flow = gradient_flow("fa*", Y, B, _orthonormal(Y, B), times=TIMES, names=["alignment"])
    assert monotone_alignment(in_flow).verdict == "holds"
    other = monotone_alignment(_descend("fa*", _normal, made=made, factor=0.01))
    assert other.verdict == "assumption fails"


def test_neither_the_loss_nor_the_cosine_need_be_monotone():
    Y = matrix(8, 10, runs=50)
    B = feedback(8, 3, seeds=range(50))
    rate = 0.02 * float(sufficient_rate("fa*", Y, B, _orthonormal(Y, B)).min())
    trajectory = gradient_descent("fa*", Y, B, _orthonormal(Y, B), rate=rate, steps=1500, names=["loss", "cosine"])
    assert (trajectory["loss"].diff(dim=1) > 1e-6).any(1).sum() >= 10
    assert (trajectory["cosine"].diff(dim=1) < -1e-6).any(1).sum() >= 10


def test_drift_of_the_gram_matrix_is_of_the_order_of_the_step():
    Y, B = problem()
    start = _orthonormal(Y, B)
    drifts = []
    for steps in (500, 1000, 2000):
        trajectory = gradient_descent("fa*", Y, B, start, rate=4 / steps, steps=steps, names=["gram drift", "growth"])
        drifts.append(float(trajectory["gram drift"][:, -1].mean()))
    assert drifts[0] / drifts[1] == pytest.approx(2, abs=0.1)
    assert drifts[1] / drifts[2] == pytest.approx(2, abs=0.05)


def test_loss_falls_from_zero_in_all_of_thirty_runs():
    trajectory = _descend(made=problem(n=10, m=10, r=4, runs=30), factor=0.2, steps=2000)
    assert (trajectory["loss"].diff(dim=1) < 1e-12).all()


@pytest.mark.parametrize(
    ("check", "method", "named"),
    [
        (descent_of_feedback, "gd", "the statement is about fa, the trajectory is of gd"),
        (optimum_reached, "gd", "the statement is about fa and fa"),
        (stationary_limit, "gd", r"its limit is optimum\(Y, r\)"),
        (alignment_growth, "fa", r"about fa\*, the trajectory is of fa"),
        (monotone_alignment, "fa", r"about fa\*"),
        (gram_drift, "fa", r"about fa\*"),
        (optimal_output_bound, "gd", r"about fa\*"),
    ],
)
def test_a_course_of_another_method_is_refused(check, method, named):
    with pytest.raises(ValueError, match=named):
        check(_descend(method, steps=1))


def test_flows_have_no_drift_to_bound_and_starts_no_mean():
    Y, B = problem()
    with pytest.raises(ValueError, match="take it in steps"):
        gram_drift(gradient_flow("fa*", Y, B, _orthonormal(Y, B), times=[0.0, 0.1], names=["gram drift", "growth"]))
    with pytest.raises(ValueError, match="after time 0"):
        optimal_output_bound(_descend("fa*", _orthonormal, steps=0))
    for check, trajectory in (
        (monotone_alignment, _descend("fa*", _orthonormal, steps=0)),
        (descent_of_feedback, _descend(steps=0)),
    ):
        with pytest.raises(ValueError, match="after the first time"):
            check(trajectory)
    with pytest.raises(ValueError, match="tolerance is 0"):
        conservation(_descend(steps=1), tolerance=0.0)
