"""Steps and flow of the factorisation against loops in NumPy, closed forms and SciPy."""

import warnings

import factorisation_oracle as oracle
import numpy as np
import pytest
import torch
from factorisation_cases import matrix, problem
from scipy.integrate import solve_ivp

from falign.theory.factorisation import (
    MEASUREMENTS,
    State,
    best_output,
    conserved,
    feedback,
    gradient_descent,
    gradient_flow,
    normal,
    orthonormal,
    sufficient_rate,
    velocity,
    zero,
)

SEEDS = range(3)
STARTS = {
    "zero": zero,
    "normal": lambda Y, B: normal(Y, B, seeds=SEEDS, scale=0.3),
    "orthonormal": lambda Y, B: orthonormal(Y, B, seeds=SEEDS),
}
CASES = [(method, start) for method in ("fa", "fa*", "gd") for start in STARTS if (method, start) != ("fa*", "zero")]


@pytest.mark.parametrize(("method", "start"), CASES)
@pytest.mark.parametrize(
    ("n", "m", "r", "own"), [(12, 15, 3, False), (8, 11, 3, True), (5, 5, 4, False), (13, 6, 5, True)]
)
def test_steps_are_those_of_a_plain_loop(method, start, n, m, r, own):
    Y = matrix(n, m, runs=3 if own else None)
    B = feedback(n, r, seeds=SEEDS)
    state = STARTS[start](Y, B)
    at, names = [0, 1, 17, 60], list(MEASUREMENTS)
    trajectory = gradient_descent(method, Y, B, state, rate=0.01, steps=60, names=names, at=at)
    for run in SEEDS:
        y = (Y[run] if own else Y).numpy()
        path = oracle.stepped(method, y, B[run].numpy(), state.Z[run].numpy(), state.W[run].numpy(), 0.01, 60)
        np.testing.assert_allclose(trajectory.end.Z[run], path[-1][0], atol=1e-12)
        np.testing.assert_allclose(trajectory.end.W[run], path[-1][1], atol=1e-12)
        for place, step in enumerate(at):
            wanted = oracle.measured(y, B[run].numpy(), *path[step][:2], path[0][:2])
            for name, value in wanted.items():
                assert float(trajectory[name][run, place]) == pytest.approx(value, abs=1e-11, nan_ok=True), (name, step)
            growth = np.trace(path[step][2]) / 0.01
            assert float(trajectory["growth"][run, place]) == pytest.approx(growth, abs=1e-11)
    assert (trajectory["account"] < 1e-12).all()
    assert (trajectory.diverged == -1).all()


@pytest.mark.parametrize("method", ["fa", "gd"])
def test_flow_is_what_another_integrator_finds(method):
    Y, B = problem()
    state = normal(Y, B, seeds=SEEDS, scale=0.3)
    trajectory = gradient_flow(method, Y, B, state, times=[0.0, 0.4, 2.0], names=["error", "drift", "growth"])

    def slope(time, flat):
        Z, W = flat[:24].reshape(8, 3), flat[24:].reshape(3, 10)
        R = Y.numpy() - Z @ W
        return np.concatenate([(R @ W.T).ravel(), ((Z.T if method == "gd" else B[1].numpy()) @ R).ravel()])

    first = np.concatenate([state.Z[1].numpy().ravel(), state.W[1].numpy().ravel()])
    end = solve_ivp(slope, (0, 2), first, "LSODA", rtol=1e-11, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(trajectory.end.Z[1].numpy().ravel(), end[:24], atol=1e-8)
    np.testing.assert_allclose(trajectory.end.W[1].numpy().ravel(), end[24:], atol=1e-8)
    assert (trajectory["drift"] < 1e-8).all()
    assert (trajectory["growth"].diff(dim=1) > 0).all()


@pytest.mark.parametrize("method", ["fa", "fa*", "gd"])
def test_small_steps_approach_the_flow_in_first_order(method):
    Y, B = problem(n=5, m=6, r=2)
    state = orthonormal(Y, B, seeds=SEEDS)
    exact = gradient_flow(method, Y, B, state, times=[0.0, 1.0], names=["error"]).end.W

    def missed(steps):
        return (gradient_descent(method, Y, B, state, rate=1 / steps, steps=steps, names=[]).end.W - exact).norm()

    assert float(missed(200) / missed(400)) == pytest.approx(2, abs=0.1)


def test_one_mode_from_zero_follows_its_closed_form():
    λ, m = 1.7, 0.6
    Y, B = torch.tensor([[λ]], dtype=torch.float64), torch.tensor([[[m]]], dtype=torch.float64)
    u = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    s = torch.log((1 + u + u**2) / (1 - u) ** 2) / 6 + (torch.atan((2 * u + 1) / 3**0.5) - torch.pi / 6) / 3**0.5
    times = torch.cat([torch.zeros(1).double(), 2 * s / (2 * m * λ) ** (2 / 3)])
    trajectory = gradient_flow("fa", Y, B, zero(Y, B), times=times, names=["error"])
    torch.testing.assert_close(trajectory["error"][0, 1:], λ * (1 - u**3), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["fa", "fa*", "gd"])
def test_velocity_is_minus_the_gradient_or_its_feedback(method):
    Y, B = problem()
    state = normal(Y, B, seeds=SEEDS)
    Z = (best_output(Y, state.W) if method == "fa*" else state.Z).requires_grad_()
    W = state.W.clone().requires_grad_()
    dZ, dW = torch.autograd.grad(-(Y - Z @ W).square().sum() / 2, (Z, W))
    found = velocity(method, Y, B, state)
    if method == "gd":
        torch.testing.assert_close(found.W, dW)
    else:
        torch.testing.assert_close(found.W, B @ (Y - Z @ W).detach())
    if method == "fa*":
        ahead, behind = (best_output(Y, state.W + sign * 1e-6 * found.W) for sign in (1, -1))
        torch.testing.assert_close(found.Z, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-6)
        assert dZ.abs().max() < 1e-12
    else:
        torch.testing.assert_close(found.Z, dZ)


def test_a_run_does_not_depend_on_its_block():
    Y, B = problem(n=9, m=9, r=4, runs=5)
    names = ["error", "alignment"]
    whole = gradient_descent("fa", Y, B, normal(Y, B, seeds=range(5)), rate=0.01, steps=200, names=names)
    alone = feedback(9, 4, seeds=[3])
    one = gradient_descent("fa", Y, alone, normal(Y, alone, seeds=[3]), rate=0.01, steps=200, names=names)
    assert torch.equal(alone[0], B[3])
    for name in names:
        torch.testing.assert_close(one[name][0], whole[name][3], rtol=0, atol=1e-12)


def test_scale_of_the_feedback_is_a_unit_of_time_from_zero():
    Y, B = problem()
    c, start = 8.0, zero(*problem())
    one = gradient_flow("fa", Y, B, start, times=[0.0, 2.0], names=["error"])
    other = gradient_flow("fa", Y, c * B, start, times=[0.0, 2.0 / c ** (2 / 3)], names=["error"])
    torch.testing.assert_close(other["error"], one["error"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.end.W, c ** (1 / 3) * one.end.W, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:rate 0.7 is beyond")
def test_runs_that_diverge_are_recorded_by_their_step():
    Y, B = problem(n=4, m=4, r=2, runs=2)
    Y = torch.stack([Y, Y * 1e-3])
    start = zero(Y, B)
    trajectory = gradient_descent("fa", Y, B, start, rate=0.7, steps=400, names=list(MEASUREMENTS), at=range(401))
    step = int(trajectory.diverged[0])
    assert step > 0
    assert int(trajectory.diverged[1]) == -1
    assert step == min(int(steps[0]) for steps in trajectory.lost.values() if steps[0] >= 0)
    lost = int(trajectory.lost["weights"][0])  # a product of them overflows before they do
    assert step <= lost <= step + 1
    assert trajectory["alignment"][0, :step].isfinite().all()
    assert trajectory["alignment"][0, step:].isnan().all()
    assert trajectory["overlap"][0, step:].isnan().all()
    assert trajectory["error"][1].isfinite().all()
    with np.errstate(all="ignore"):
        path = oracle.stepped("fa", Y[0].numpy(), B[0].numpy(), start.Z[0].numpy(), start.W[0].numpy(), 0.7, lost)
        sums = [Z.sum() + W.sum() for Z, W, _ in path]
    assert np.isfinite(sums[lost - 1])
    assert not np.isfinite(sums[lost])


def test_large_steps_are_named_with_the_rate_to_take():
    Y, B = problem()
    limit = float(sufficient_rate("fa", Y, B, zero(Y, B)).min())
    with pytest.warns(UserWarning, match=rf"rate {1.01 * limit:.4g} is beyond {limit:.4g}.* of 3 runs"):
        gradient_descent("fa", Y, B, zero(Y, B), rate=1.01 * limit, steps=1, names=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_descent("fa", Y, B, zero(Y, B), rate=0.99 * limit, steps=1, names=[])


@pytest.mark.parametrize("near", [1e-3, 1e-6])
def test_ill_conditioned_rows_keep_their_optimal_output(near):
    Y, B = problem(n=6, m=7, runs=2)
    W = normal(Y, B, seeds=range(2)).W
    W[:, 2] = W[:, 0] + near * W[:, 2]
    for run in range(2):
        Q, U = np.linalg.qr(W[run].numpy().T)
        expected = np.linalg.solve(U, (Y.numpy() @ Q).T).T
        np.testing.assert_allclose(best_output(Y, W)[run], expected, rtol=1e-14 / near)
    state = State(torch.zeros(2, 6, 3).double(), W)
    rate = float(sufficient_rate("fa*", Y, B, state).min())
    trajectory = gradient_descent("fa*", Y, B, state, rate=rate, steps=50, names=["error", "growth"])
    rows = [np.linalg.qr(W[run].numpy().T)[0] for run in range(2)]
    begun = [np.linalg.norm(Y.numpy() - Y.numpy() @ Q @ Q.T) for Q in rows]
    np.testing.assert_allclose(trajectory["error"][:, 0], begun, rtol=1e-15 / near + 1e-12)
    assert trajectory.end.Z.isfinite().all()
    assert (trajectory.diverged == -1).all()


def test_no_output_layer_is_best_for_rows_that_depend_on_each_other():
    W = matrix(3, 7)
    assert best_output(matrix(6, 7), torch.stack([W, W * 0]))[1].isnan().all()
    assert best_output(matrix(6, 7), matrix(8, 7)).isnan().all()


def test_a_plain_pair_is_a_start():
    Y, B = problem()
    start = normal(Y, B, seeds=SEEDS, scale=0.3)
    pair = gradient_descent("fa", Y, B, tuple(start), rate=0.01, steps=3, names=["error"])
    assert torch.equal(pair["error"], gradient_descent("fa", Y, B, start, rate=0.01, steps=3, names=["error"])["error"])
    torch.testing.assert_close(velocity("gd", Y, B, tuple(start)), velocity("gd", Y, B, start))


def test_parameters_are_taken_as_they_are():
    Y, B = problem()
    state = State(*(torch.nn.Parameter(part) for part in normal(Y, B, seeds=SEEDS)))
    trajectory = gradient_descent("fa", Y, B, state, rate=0.01, steps=3, names=["error"])
    assert not trajectory.end.W.requires_grad
    assert not torch.equal(trajectory.end.W, state.W)


def test_recording():
    Y, B = problem()
    trajectory = gradient_descent("fa", Y, B, zero(Y, B), rate=0.01, steps=250, names=["error"])
    assert trajectory["error"].shape == (3, 101)
    assert float(trajectory.times[-1]) == 2.5
    with pytest.raises(ValueError, match="'loss' was not recorded: add it to names, beside error"):
        trajectory["loss"]


def test_precision_follows_the_input():
    Y, B = problem()
    start = State(*(part.float() for part in normal(Y, B, seeds=SEEDS, scale=0.1)))
    for method in ("fa", "fa*", "gd"):
        trajectory = gradient_descent(
            method, Y.float(), B.float(), start, rate=0.01, steps=20, names=list(MEASUREMENTS)
        )
        assert trajectory.end.W.dtype == torch.float32
        assert all(values.dtype == torch.float32 for values in trajectory.values.values())


def test_starts_and_draws():
    B = feedback(40, 30, seeds=range(20), scale=2.0)
    assert float(B.var() * 40) == pytest.approx(4, rel=0.03)
    assert abs(float(B.mean())) < 0.01
    Y = matrix(40, 50)
    assert all((part == 0).all() for part in zero(Y, B))
    W = orthonormal(Y, B, seeds=range(20)).W
    torch.testing.assert_close(W @ W.mT, torch.eye(30).double().expand(20, 30, 30))
    state = normal(Y, B, seeds=range(20), scale=0.5)
    assert float(state.Z.std()) == pytest.approx(0.5, rel=0.03)
    assert not torch.equal(state.Z[0, :30, :30], state.W[0, :30, :30])
    assert conserved(*zero(Y, B), B).abs().max() == 0


@pytest.mark.unchecked
def test_singular_modes_are_learned_at_times_that_fall_as_their_two_thirds():
    """From zero, with BᵀB ≈ I on the columns of Y: 40 hidden, five modes."""
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    Y = torch.zeros(40, 40, dtype=torch.float64)
    Y[range(5), range(5)] = values
    B = feedback(40, 40, seeds=range(20))
    state, rate = zero(Y, B), 0.01
    learned = torch.full((20, 5), torch.inf).double()
    for step in range(10, 600, 10):
        state = gradient_descent("fa", Y, B, state, rate=rate, steps=10, names=[], at=[10]).end
        share = (state.Z @ state.W).diagonal(dim1=1, dim2=2)[:, :5] / values
        learned = torch.where((share >= 0.9) & learned.isinf(), step * rate, learned)
    slopes = np.polyfit(values.log().numpy(), learned.log().mean(0).numpy(), 1)
    assert slopes[0] == pytest.approx(-2 / 3, abs=0.05)
