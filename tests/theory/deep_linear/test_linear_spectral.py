"""The spectral start: its form is preserved, and each mode moves as the scalar chain says."""

import numpy as np
import pytest
import torch
from linear_cases import RULES, drawn, points

from falign.theory.deep_linear import _steps
from falign.theory.deep_linear._network import (
    covariances,
    matrix_gradient_descent,
    matrix_gradient_flow,
    points_of,
    whitened,
)
from falign.theory.deep_linear._spectral import common_bases, deviation, reduced, spectral, task

TARGETS, VARIANCES = [2.0, 1.0, 1.0, 0.3], [1.0, 0.5, 1.5, 2.0]
HIDDEN = {2: (7,), 3: (7, 5), 4: (7, 5, 6)}

untyped = pytest.mark.unchecked


def start(depth, rule, seeds=(0, 1)):
    X, Y = task(TARGETS, VARIANCES, inputs=6, outputs=5, seed=1)
    weights = [[0.5, 0.3, 0.4, 0.6]] + [[0.7 - 0.1 * mode for mode in range(4)]] * (depth - 1)
    made = spectral(
        X, Y, weights=weights, hidden=HIDDEN[depth], feedback=[1.2, 0.8, 1.1][: depth - 1], rule=rule, seeds=seeds
    )
    return made, X, Y


def chain(made, run, rate, steps):
    """The chains of one run, in a NumPy loop."""
    modes = made.modes
    θ = modes.weights[:, run].numpy().copy()
    λ, s, m = (part.numpy() for part in (modes.target[run], modes.variance[run], modes.feedback[:, run]))
    for _ in range(steps):
        error, moves = λ - s * θ.prod(0), []
        for layer in range(len(θ)):
            carried = {
                "fa": m[layer:].prod(0),
                "dfa": m[layer] if layer < len(m) else 1.0,
                "bp": θ[layer + 1 :].prod(0),
            }
            moves.append(carried[modes.rule] * θ[:layer].prod(0) * error)
        θ = θ + rate * np.stack(moves)
    return θ


@pytest.mark.unchecked
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", HIDDEN)
def test_form_is_preserved_over_3000_steps_and_every_mode_is_its_chain(depth, rule):
    made, X, Y = start(depth, rule)
    assert float(deviation(made.state, made).max()) < 1e-14
    end = matrix_gradient_descent(made.state, X, Y, rule=rule, rate=0.02, steps=3000, names=["loss"]).end
    assert float(deviation(end, made).max()) <= 1e-12
    found = reduced(end, made)
    for run in range(2):
        np.testing.assert_allclose(found.weights[:, run].numpy(), chain(made, run, 0.02, 3000), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", HIDDEN)
def test_modes_are_those_of_the_recursion(depth, rule):
    made, X, Y = start(depth, rule)
    trajectory = matrix_gradient_descent(made.state, X, Y, rule=rule, rate=0.02, steps=60, at=[0, 60])
    modes = _steps.gradient_descent(made.modes, rate=0.02, steps=60, at=[0, 60])
    torch.testing.assert_close(reduced(trajectory.end, made).weights, modes.weights[-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(trajectory["loss"].mT, modes.loss.sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_form_is_preserved_in_flow(rule):
    made, X, Y = start(3, rule, seeds=[3])
    trajectory = matrix_gradient_flow(made.state, X, Y, rule=rule, times=[0.0, 1.0, 3.0], tolerance=1e-11)
    assert float(deviation(trajectory.end, made).max()) <= 1e-10
    modes = _steps.gradient_flow(made.modes, times=[0.0, 1.0, 3.0])
    torch.testing.assert_close(reduced(trajectory.end, made).weights, modes.weights[-1], rtol=0, atol=1e-8)


def test_feedback_is_of_full_rank_and_diagonal_in_the_bases():
    made, *_ = start(4, "fa", seeds=[0])
    for B, above, below, m in zip(
        made.state.B, made.bases[2:], made.bases[1:], made.modes.feedback[:, 0], strict=False
    ):
        inside = (above.mT @ B @ below)[0]
        torch.testing.assert_close(inside.diagonal()[:4], m, rtol=0, atol=1e-14)
        assert float((inside - torch.zeros_like(inside).diagonal_scatter(inside.diagonal())).abs().max()) < 1e-14
        assert torch.linalg.matrix_rank(B[0]) == min(B.shape[-2:])


def test_common_bases_of_equal_targets_turn_to_where_the_inputs_are_uncorrelated():
    X, Y = task([1.0, 1.0, 1.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.7, 0.4], inputs=7, outputs=6, seed=4)
    U, λ, s, V = common_bases(X, Y)
    xx, yx = covariances(X, Y)
    torch.testing.assert_close(λ, torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(s.sort().values, torch.tensor([0.4, 0.7, 1, 2, 3]).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close((U[:, :5] * λ) @ V[:, :5].mT, yx, rtol=0, atol=1e-13)
    torch.testing.assert_close((V[:, :5] * s) @ V[:, :5].mT, xx, rtol=0, atol=1e-13)
    for basis in (U, V):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(len(basis)).double(), rtol=0, atol=1e-13)


def test_whitened_data_and_given_covariances_have_a_spectral_start():
    X, Y = points()
    white = whitened(X)
    made = spectral(white, Y, weights=[0.1, 0.2], hidden=[5], seeds=[0])
    assert float(deviation(made.state, made)) < 1e-14
    torch.testing.assert_close(made.modes.variance, torch.ones(1, 4).double(), rtol=0, atol=1e-12)
    again = spectral(*points_of(*covariances(white, Y)), weights=[0.1, 0.2], hidden=[5])
    torch.testing.assert_close(again.modes.target, made.modes.target, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("targets", "variances"),
    [
        ([1.0, 0.5], [1.0, 1e-9]),
        ([1.0, 1e-9, 5e-10], [1.0, 2.0, 3.0]),
        ([1.0, 1e-9, 5e-10], [1.0, 1.0, 1.0]),
        ([1.0, 1.0 - 1e-10, 0.3], [1.0, 1.0, 1.0]),
        ([1.0, 1.0, 1.0, 0.0], [1.0, 2.0, 2.0, 1.0]),
    ],
)
def test_no_mode_is_lost_however_small_its_target_or_its_variance(targets, variances):
    X, Y = task(targets, variances, inputs=5, outputs=5)
    made = spectral(X, Y, weights=[0.3, 0.4], hidden=[6])
    found = made.modes.target[0]
    torch.testing.assert_close(found[: len(targets)], torch.tensor(targets, dtype=torch.float64), rtol=0, atol=1e-13)
    trajectory = matrix_gradient_descent(made.state, X, Y, rate=0.02, steps=300)
    assert float(deviation(trajectory.end, made)) < 1e-13
    chains = _steps.gradient_descent(made.modes, rate=0.02, steps=300)
    torch.testing.assert_close(reduced(trajectory.end, made).weights, chains.weights[-1], rtol=0, atol=1e-12)


def test_float32_data_have_a_spectral_start_in_float32():
    X, Y = (part.float() for part in task(TARGETS, VARIANCES, inputs=6, outputs=5))
    made = spectral(X, Y, weights=[0.3, 0.4], hidden=[6])
    assert made.state.W[0].dtype == made.modes.weights.dtype == torch.float32
    end = matrix_gradient_descent(made.state, X, Y, rate=0.02, steps=200).end
    assert float(deviation(end, made)) < 1e-5


def test_a_seed_does_not_depend_on_its_block():
    both, alone = start(3, "fa", seeds=[0, 5])[0], start(3, "fa", seeds=[5])[0]
    for one, other in zip(both.state.W, alone.state.W, strict=True):
        assert torch.equal(one[1], other[0])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: spectral(*points(), weights=[0.1, 0.1], hidden=[6]), "off the diagonal in the singular vectors"),
        (lambda: _spectral(hidden=[3]), r"hidden layers of \[3\] neurons, expected at least 4"),
        (lambda: _spectral(hidden=[6, 6]), "2 hidden layers for 2 weights"),
        (
            lambda: spectral(torch.zeros(4, 3), drawn(4, 2), weights=[1, 1], hidden=[4]),
            "features of the inputs are zero",
        ),
        pytest.param(lambda: _spectral(weights=0.1), "weights is 0.1, expected a sequence", marks=untyped),
        (lambda: _spectral(seeds=[]), "no seed was given"),
        (lambda: _spectral(feedback=0.0), "m_2 is 0"),
        (lambda: _spectral(weights=[0.1, float("nan")]), "θ_2 holds nan"),
        (lambda: _spectral(weights=[0.1, [0.1, 0.2]]), "which do not broadcast: pass one number a mode"),
        pytest.param(lambda: _spectral(rule="kp"), "rule is 'kp'", marks=untyped),
        (lambda: task([1.0, -1.0], inputs=3, outputs=3), "λ is -1"),
        (lambda: task([1.0], [0.0], inputs=3, outputs=3), "the variance is 0"),
        (lambda: task([1.0] * 4, inputs=3, outputs=5), "4 modes need as many inputs and outputs, got 3 and 5"),
        (lambda: spectral(drawn(4, 3) / 0, drawn(4, 2), weights=[1, 1], hidden=[4]), "are not finite"),
    ],
)
def test_what_has_no_spectral_start_is_refused_in_a_sentence(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def _spectral(weights=(0.1, 0.1), hidden=(6,), feedback=1.0, seeds=(0,), rule="fa"):
    X, Y = task(TARGETS, VARIANCES, inputs=6, outputs=5)
    return spectral(X, Y, weights=weights, hidden=hidden, feedback=feedback, seeds=seeds, rule=rule)
