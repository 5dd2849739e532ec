"""Stationary function, optimum, Lyapunov function, subspaces and step sizes."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from factorisation_cases import matrix, problem
from scipy.linalg import subspace_angles

from falign.theory.factorisation import (
    State,
    best_error,
    feedback,
    gradient_descent,
    gradient_flow,
    local_rate,
    lyapunov,
    lyapunov_rate,
    normal,
    optimal_rows,
    optimum,
    orthonormal,
    overlap,
    principal_angles,
    stationary,
    stationary_error,
    stationary_limit,
    sufficient_rate,
    zero,
)

SEEDS = range(3)


@pytest.mark.parametrize("rank", [2, 3, 5, None])
def test_stationary_function_and_optimum(rank):
    Y, B = problem(rank=rank)
    found = stationary(Y, B)
    for run in SEEDS:
        BY = B[run].numpy() @ Y.numpy()
        np.testing.assert_allclose(found[run], Y.numpy() @ np.linalg.pinv(BY, rcond=1e-12) @ BY, atol=1e-10)
    sizes = np.linalg.svd(Y.numpy())[1]
    assert float((Y - optimum(Y, 3)).norm()) == pytest.approx(np.sqrt((sizes[3:] ** 2).sum()), abs=1e-12)
    assert float(best_error(Y, 3)) == pytest.approx(np.sqrt((sizes[3:] ** 2).sum()), abs=1e-12)
    assert (stationary_error(Y, B) >= best_error(Y, 3) - 1e-12).all()
    if rank is not None and rank <= 3:
        assert stationary_error(Y, B).max() < 1e-12


@pytest.mark.unchecked
@pytest.mark.parametrize("method", ["fa", "fa*"])
def test_every_start_ends_at_the_same_function(method):
    Y, B = problem(n=9, m=9, r=3)
    starts = [orthonormal(Y, B, seeds=SEEDS), normal(Y, B, seeds=SEEDS, scale=0.3), normal(Y, B, seeds=range(5, 8))]
    if method == "fa":
        starts[0] = zero(Y, B)
    for start in starts:
        rate, steps = float(sufficient_rate(method, Y, B, start).min()), 3000 if method == "fa" else 800
        trajectory = gradient_descent(method, Y, B, start, rate=rate, steps=steps, names=["distance", "error"])
        check = stationary_limit(trajectory, tolerance=1e-8)
        assert check.verdict == "holds", check.sentence
        assert trajectory["distance"][:, -1].max() < 1e-8


def test_gradient_descent_ends_at_the_optimum():
    Y = torch.diag(torch.tensor([5.0, 4.0, 3.0, 1.0, 0.5, 0.2])).double()
    B = feedback(6, 3, seeds=SEEDS)
    trajectory = gradient_descent(
        "gd", Y, B, normal(Y, B, seeds=SEEDS, scale=0.1), rate=0.09, steps=2000, names=["error", "overlap"]
    )
    torch.testing.assert_close(trajectory["error"][:, -1], best_error(Y, 3).expand(3), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(trajectory["overlap"][:, -1], torch.ones(3).double(), rtol=1e-6, atol=1e-6)


def test_lyapunov_function_has_the_derivative_that_the_formula_says():
    Y, B = problem()
    start = normal(Y, B, seeds=SEEDS, scale=0.5)
    dt = 1e-4
    trajectory = gradient_flow("fa", Y, B, start, times=[0.0, dt, 2 * dt], names=["lyapunov"], tolerance=1e-12)
    middle = gradient_flow("fa", Y, B, start, times=[0.0, dt], names=[], tolerance=1e-12).end
    slope = (trajectory["lyapunov"][:, 2] - trajectory["lyapunov"][:, 0]) / (2 * dt)
    torch.testing.assert_close(lyapunov_rate(Y, B, *middle), slope, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lyapunov(Y, B, *start), trajectory["lyapunov"][:, 0])


def test_angles_are_scipys_and_small_ones_are_kept():
    one, other = matrix(4, 9, seed=1), matrix(4, 9, seed=2)
    angles = principal_angles(one, other)
    np.testing.assert_allclose(angles, np.sort(subspace_angles(one.numpy().T, other.numpy().T)), atol=1e-12)
    assert float(overlap(one, other)) == pytest.approx(float(angles.cos().square().mean()), abs=1e-12)
    turned = one + 1e-10 * other
    near = np.sort(subspace_angles(one.numpy().T, turned.numpy().T))
    np.testing.assert_allclose(principal_angles(one, turned), near, rtol=1e-4, atol=1e-15)
    assert float(overlap(one, torch.zeros_like(one))) == 0
    many = overlap(matrix(4, 40, runs=200), matrix(4, 40, runs=200, seed=9))
    assert float(many.mean()) == pytest.approx(4 / 40, abs=0.01)


@pytest.mark.unchecked
@pytest.mark.parametrize(("n", "r", "rank"), [(6, 2, 6), (8, 5, 4), (12, 9, 12)])
def test_rates_up_to_the_stable_one_converge_and_from_zero_twice_it_does_not(n, r, rank):
    Y, B = matrix(n, n, rank, runs=8), feedback(n, r, seeds=range(8))
    limits = sufficient_rate("fa", Y, B, zero(Y, B))
    scaled = Y * (limits / limits.min()).pow(1.5)[:, None, None]  # |BY| sets the limit from zero: now the same for all
    limits = sufficient_rate("fa", scaled, B, zero(Y, B))
    torch.testing.assert_close(limits, limits[:1].expand(8))
    for factor, sound in ((1.0, True), (1.7, False)):
        rate = factor * float(limits[0]) * (1 - 1e-12)
        with pytest.warns(UserWarning, match="is beyond") if factor > 1 else nullcontext():
            trajectory = gradient_descent(
                "fa", scaled, B, zero(Y, B), rate=rate, steps=3000, names=["lyapunov"], at=[0, 3000]
            )
        settled = trajectory["lyapunov"][:, 1] < 1e-4 * trajectory["lyapunov"][:, 0]
        assert settled.all() if sound else not settled.any()


def test_sufficient_rate_of_one_mode_is_that_of_the_scalar_theory():
    λ, m, θ1, θ2 = 1.3, 0.7, 0.4, 0.9
    Y, B = torch.tensor([[λ]], dtype=torch.float64), torch.tensor([[[m]]], dtype=torch.float64)
    K = θ2 - θ1**2 / (2 * m)
    root = max(np.roots([1, 0, 2 * m * K, -2 * m * λ]).real)
    start = State(*(torch.tensor([[[θ]]], dtype=torch.float64) for θ in (θ2, θ1)))
    assert float(sufficient_rate("fa", Y, B, start)) == pytest.approx(1 / (m * K + 1.5 * root**2), rel=1e-12)
    assert float(sufficient_rate("fa", Y, B, zero(Y, B))) == pytest.approx(
        1 / (1.5 * (2 * m * λ) ** (2 / 3)), rel=1e-12
    )


@pytest.mark.unchecked
def test_local_rate_is_where_small_deviations_begin_to_grow():
    Y, B = problem(n=6, m=6, r=3, runs=2)
    end = gradient_descent("fa", Y, B, zero(Y, B), rate=0.05, steps=20_000, names=["lyapunov"], at=[20_000]).end
    limits = local_rate(B, end)
    for run in range(2):
        one, here = B[run : run + 1], State(*(part[run : run + 1] for part in end))
        away = State(*(part + 1e-7 * matrix(*part.shape[1:], seed=4) for part in here))
        for factor, grows in ((0.97, False), (1.03, True)):
            rate = factor * float(limits[run])
            with pytest.warns(UserWarning, match="is beyond"):
                after = gradient_descent("fa", Y, one, away, rate=rate, steps=600, names=["lyapunov"], at=[0, 600])
            shrank = bool(after["lyapunov"][0, 1] < after["lyapunov"][0, 0])
            assert shrank is not grows
    assert (limits > sufficient_rate("fa", Y, B, zero(Y, B))).all()


def test_optimal_rows_are_those_of_the_optimum():
    Y = matrix(7, 9)
    torch.testing.assert_close(
        overlap(optimum(Y, 3), torch.nn.functional.pad(optimal_rows(Y, 3), (0, 0, 0, 4))) * 7 / 3,
        torch.tensor(1.0).double(),
    )
