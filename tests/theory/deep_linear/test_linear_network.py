"""The matrix dynamics on few points against a NumPy loop over all of them, and what the doors refuse and warn of."""

import warnings

import numpy as np
import pytest
import torch
from linear_cases import RULES, drawn, loss, parts, points, velocities
from scipy.integrate import solve_ivp

from falign.theory.deep_linear._network import (
    compressed,
    covariances,
    linear,
    local_rate,
    matrix_gradient_descent,
    matrix_gradient_flow,
    network,
    points_of,
    whitened,
)
from falign.theory.deep_linear._spectral import spectral, task

SIZES = {2: (6, 5, 4), 3: (6, 7, 5, 4), 4: (6, 5, 7, 6, 4), 6: (6, 5, 5, 7, 6, 5, 4)}

untyped = pytest.mark.unchecked


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", SIZES)
def test_steps_equal_the_loop_over_points(depth, rule):
    X, Y = points()
    W, B = parts(SIZES[depth], rule)
    trajectory = matrix_gradient_descent(network(W, B, rule=rule), X, Y, rule=rule, rate=0.02, steps=20, at=[0, 20])
    for run in range(2):
        here, fed = [part[run].numpy().copy() for part in W], [part[run].numpy() for part in B]
        losses = [loss(here, X.numpy(), Y.numpy())]
        for _ in range(20):
            moves = velocities(here, fed, X.numpy(), Y.numpy(), rule)
            here = [part + 0.02 * move for part, move in zip(here, moves, strict=True)]
        losses.append(loss(here, X.numpy(), Y.numpy()))
        np.testing.assert_allclose(trajectory["loss"][run].numpy(), losses, rtol=1e-12)
        np.testing.assert_allclose(trajectory["map"][run, -1].numpy(), np.linalg.multi_dot(here[::-1]), atol=1e-12)
        for found, expected in zip(trajectory.end.W, here, strict=True):
            np.testing.assert_allclose(found[run].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_flow_equals_the_integrated_loop_over_points(rule):
    X, Y = points(n=8, d=3, k=2)
    W, B = parts((3, 4, 3, 2), rule, runs=1)
    trajectory = matrix_gradient_flow(network(W, B, rule=rule), X, Y, rule=rule, times=[0.0, 0.7, 1.5], tolerance=1e-11)
    shapes = [part[0].shape for part in W]
    cuts = np.cumsum([part[0].numel() for part in W])[:-1]

    def slope(time, numbers):
        here = [piece.reshape(shape) for piece, shape in zip(np.split(numbers, cuts), shapes, strict=True)]
        moves = velocities(here, [part[0].numpy() for part in B], X.numpy(), Y.numpy(), rule)
        return np.concatenate([move.ravel() for move in moves])

    start = np.concatenate([part[0].numpy().ravel() for part in W])
    solved = solve_ivp(slope, (0, 1.5), start, rtol=1e-10, atol=1e-12, t_eval=[0.7, 1.5])
    for place, column in enumerate(solved.y.T, 1):
        here = [piece.reshape(shape) for piece, shape in zip(np.split(column, cuts), shapes, strict=True)]
        assert float(trajectory["loss"][0, place]) == pytest.approx(loss(here, X.numpy(), Y.numpy()), rel=1e-8)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (4, 6), (1, 3)])
def test_few_points_have_the_same_covariances_and_the_rest_of_the_loss(n, d):
    X, Y = points(n=n, d=d)
    few = compressed(X, Y)
    assert len(few.X) == min(n, d)
    for found, expected in zip(covariances(few.X, few.Y), (X.mT @ X / n, Y.mT @ X / n), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    best = np.linalg.lstsq(X.numpy(), Y.numpy(), rcond=None)[0]
    assert few.left == pytest.approx(0.5 * np.mean(((Y.numpy() - X.numpy() @ best) ** 2).sum(1)), abs=1e-14)
    map_ = drawn(4, d, seed=7)
    whole = 0.5 * (X @ map_.mT - Y).square().sum(1).mean()
    assert float(0.5 * (few.X @ map_.mT - few.Y).square().sum(1).mean() + few.left) == pytest.approx(float(whole))


def test_inputs_of_low_rank_need_as_many_points_as_their_rank():
    X, Y = points()
    X = X[:, :2] @ drawn(2, 6, seed=3)
    few = compressed(X, Y)
    assert few.X.shape == (2, 6)
    torch.testing.assert_close(covariances(few.X, few.Y)[1], Y.mT @ X / 30, rtol=0, atol=1e-13)
    xx, yx = covariances(X, Y)
    for found, expected in zip(covariances(*points_of(xx, yx)), (xx, yx), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    white = whitened(X)
    assert white.shape == (30, 2)
    torch.testing.assert_close(white.mT @ white / 30, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_local_rate_is_that_of_the_linearised_error(rule):
    """Against the eigenvalues of ``dE/dt`` by finite differences in E, the weights held."""
    X, _ = points(n=12, d=3, k=2)
    W, B = parts((3, 5, 4, 2), rule, runs=1)
    weights, fed = [part[0].numpy() for part in W], [part[0].numpy() for part in B]
    covariance, columns = (X.mT @ X / 12).numpy(), []
    chain = np.linalg.multi_dot(weights[::-1])
    for place in range(6):
        E = np.zeros(6)
        E[place] = 1.0
        E = E.reshape(2, 3)
        targets = X.numpy() @ (chain + E @ np.linalg.inv(covariance)).T  # data with that E
        moves, small = velocities(weights, fed, X.numpy(), targets, rule), 1e-6
        ends = [
            np.linalg.multi_dot([part + sign * small * move for part, move in zip(weights, moves, strict=True)][::-1])
            for sign in (1, -1)
        ]
        columns.append(((ends[0] - ends[1]) / (2 * small) @ covariance).ravel())
    eigenvalues = np.linalg.eigvals(np.stack(columns, 1))
    decaying = eigenvalues[eigenvalues.real > 1e-6 * np.abs(eigenvalues).max()]
    least = (2 * decaying.real / np.abs(decaying) ** 2).min()
    state = network(W, B, rule=rule)
    assert float(local_rate(state, X, rule)) == pytest.approx(least, rel=1e-5)
    quick = decaying[decaying.real >= 0.5 * decaying.real.max()]
    quickest = (2 * quick.real / np.abs(quick) ** 2).min()
    assert float(local_rate(state, X, rule, share=0.5)) == pytest.approx(quickest, rel=1e-5)


def test_local_rate_of_complex_eigenvalues_and_of_many_numbers():
    """``A(E) = BᵀW_2… E`` of a rotation by φ has the eigenvalues exp(±iφ): the limit is 2 cos φ, not 2."""
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]]).double()
    state = network([torch.zeros(2, 3).double(), turn], [torch.eye(2).double()])
    X = np.sqrt(3) * torch.eye(3).double()
    assert float(local_rate(state, X)) == pytest.approx(2 * 0.6)
    X = drawn(40, 40)
    state = network(*parts((40, 9, 8), "bp", scale=0.2), rule="bp")
    left = [state.W[1] @ state.W[1].mT, torch.eye(8).double().expand(2, 8, 8)]
    xx = X.mT @ X / 40
    right = [xx.expand(2, 40, 40), state.W[0].mT @ state.W[0] @ xx]
    for run in range(2):
        whole = sum(np.kron(S[run].numpy(), T[run].numpy().T) for S, T in zip(left, right, strict=True))
        assert float(local_rate(state, X, "bp")[run]) == pytest.approx(2 / np.linalg.eigvals(whole).real.max(), rel=0.1)


def test_a_rate_beyond_what_is_stable_is_warned_of_with_the_value():
    X, Y = points()
    state = network(*parts((6, 5, 4), "fa", scale=1.0))
    largest = float(local_rate(state, X, share=0.5).min())
    with pytest.warns(UserWarning, match=f"is beyond {largest:.4g}, stable at the start"):
        matrix_gradient_descent(state, X, Y, rate=1.05 * largest, steps=1)
    zero = state._replace(W=tuple(torch.zeros_like(part) for part in state.W))
    assert torch.isinf(local_rate(zero, X)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix_gradient_descent(state, X, Y, rate=0.05 * largest, steps=10)


@pytest.mark.parametrize(("θ", "rate"), [(0.0, 0.42), (0.1, 5.0), (0.1, 50.0)])
def test_the_rate_named_where_weights_diverge_is_below_and_stable(θ, rate):
    X, Y = task([2.0, 1.0, 0.3], inputs=5, outputs=4)
    state = spectral(X, Y, weights=[θ, 2 * θ], hidden=[7]).state
    with pytest.warns(UserWarning, match="the weights diverge; a run at") as caught:
        matrix_gradient_descent(state, X, Y, rate=rate, steps=400)
    named = float(str(caught[0].message).split()[-4])
    assert named < rate
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(matrix_gradient_descent(state, X, Y, rate=named, steps=400)["loss"][0, -1]) < 1e-9


def test_type_follows_the_weights():
    X, Y = (part.float() for part in points())
    W, B = parts((6, 5, 4), "fa")
    trajectory = matrix_gradient_descent(network([part.float() for part in W], B), X, Y, rate=0.01, steps=3)
    assert trajectory["map"].dtype == torch.float32
    single = network([part[0] for part in W], [part[0] for part in B])
    assert [tuple(part.shape) for part in single.W] == [(1, 5, 6), (1, 4, 5)]


LOW = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 6)).double()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        pytest.param(lambda: linear("drtp"), "rule is 'drtp', expected one of fa, dfa, bp", marks=untyped),
        (lambda: _network(sizes=(6, 5, 4), W=[drawn(5, 6), drawn(4, 6)]), "are no network of two layers"),
        (lambda: _network(W=[drawn(5, 6)]), "are no network of two layers"),
        (lambda: _network(B=[drawn(5, 4)]), r"feedback has shapes \[\(1, 5, 4\)\], fa wants \[\(1, 4, 5\)\]"),
        (lambda: _network(B=[]), r"feedback has shapes \[\], fa wants"),
        (lambda: _network(B=[LOW]), "B_2 of run 0 has rank 1, expected 4, the full rank of a 4 by 5 matrix"),
        (lambda: _network(W=[drawn(5, 6), drawn(4, 5) / 0]), "20 numbers of W_2 are not finite"),
        (lambda: _network(W=[drawn(5), drawn(4, 5)]), r"W_1 has shape \(5,\), expected \[out in\]"),
        (lambda: compressed(drawn(4, 3), drawn(5, 2)), "4 inputs and 5 targets"),
        (lambda: compressed(torch.zeros(4, 3), drawn(4, 2)), "all 4 inputs are zero"),
        (lambda: compressed(drawn(4, 3) / 0, drawn(4, 2)), "12 numbers of the inputs are not finite"),
        (lambda: compressed(drawn(0, 3), drawn(0, 2)), "at least one point"),
        (lambda: whitened(torch.zeros(4, 3)), "all 4 inputs are zero"),
        (lambda: points_of(drawn(3, 3), drawn(2, 4)), r"Σ_xx is \(3, 3\) and Σ_yx \(2, 4\)"),
        (lambda: points_of(-torch.eye(3), drawn(2, 3)), "eigenvalues from 0 up"),
        (lambda: points_of(torch.diag(torch.tensor([1.0, 0.0])), torch.ones(1, 2)), "along inputs without variance"),
        pytest.param(lambda: network(None, [LOW]), "W is None, expected a sequence", marks=untyped),
        pytest.param(lambda: network([LOW], None), "B is None, expected a sequence", marks=untyped),
        pytest.param(
            lambda: matrix_gradient_descent([LOW], LOW, LOW, rate=0.1, steps=1), "expected a State", marks=untyped
        ),
        (
            lambda: matrix_gradient_flow(_network(), *points(), times=1.0),
            "times must increase from 0, at least two of them",
        ),
        (lambda: local_rate(_network(), drawn(30, 2)), "inputs have shape"),
        (lambda: _descend(d=5), "inputs have shape"),
        (lambda: _descend(rate=0.0), "rate is 0.0, expected a positive number"),
        (lambda: _descend(names=["maps"]), "unknown measurement 'maps'"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def _network(sizes=(6, 5, 4), W=None, B=None):
    weights, feedback = parts(sizes, "fa", runs=1)
    return network(weights if W is None else W, feedback if B is None else B)


def _descend(d=6, rate=0.1, names=("loss",)):
    return matrix_gradient_descent(_network(), *points(d=d), rate=rate, steps=2, names=names)
