"""The laws of attention in the simulator: symmetries, exact identities of steps, constants of flow, and what fails."""

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import falign
from falign.theory.attention import (
    Law,
    Scores,
    conservation,
    draw,
    gradient_descent,
    gradient_flow,
    gradients,
    invariants,
)
from falign.theory.conservation import RULES, Activation, Dynamics, activation, loss, rule

pytestmark = pytest.mark.unchecked

LAWS, SCORES = get_args(Law), get_args(Scores)
SIZES = {"seeds": [0, 1], "width": 5, "above": 4, "outputs": 3, "scale": 0.6}


def data():
    random = torch.Generator().manual_seed(0)
    X = torch.randn(6, 4, 3, generator=random, dtype=torch.float64)
    return X, torch.eye(3, dtype=torch.float64)[torch.randint(3, (6,), generator=random)]


def made(rule_name="fa", activation_name="relu"):
    dynamics = Dynamics(activation=activation(activation_name), rule=rule(rule_name), loss=loss("softmax"))
    return draw(dynamics=dynamics, **SIZES), dynamics


def trained(rule_name, scores, rate=0.02, steps=60):
    block, dynamics = made(rule_name)
    return gradient_descent(block, dynamics, *data(), scores=scores, rate=rate, steps=steps, at=[0, steps // 2, steps])


# An oracle that shares no code: the output by NumPy, point by point.

WEIGH = {
    "softmax": lambda s: np.exp(s) / np.exp(s).sum(-1, keepdims=True),
    "relu": lambda s: np.maximum(s, 0),
    "squared": lambda s: np.maximum(s, 0) ** 2,
    "linear": lambda s: s,
    "normalised": lambda s: np.abs(s) / np.abs(s).sum(-1, keepdims=True),
}


def loss_by_hand(weights, scores):
    E, Q, K, V, O, R = weights  # noqa: E741
    X, Y = (part.numpy() for part in data())

    def affine(W, x):
        return x @ W[:, :-1].T + W[:, -1]

    total = 0.0
    for x0, y in zip(X, Y, strict=True):
        x = np.maximum(affine(E, x0), 0)
        heads = []
        for q, k, v in zip(Q, K, V, strict=True):
            s = affine(q, x) @ affine(k, x).T / np.sqrt(len(q))
            heads.append(WEIGH[scores](s) @ affine(v, x))
        f = affine(R, np.maximum(affine(O, np.concatenate(heads, 1)), 0)).mean(0)
        total -= f[y.argmax()] - np.log(np.exp(f).sum())
    return total / len(X)


@pytest.mark.parametrize("scores", SCORES)
def test_gradients_of_backpropagation_are_differences_of_the_loss(scores):
    block, dynamics = made("bp")
    given = gradients(block, dynamics, *data(), scores=scores)
    weights = [W[1].numpy().copy() for W in block.weights]
    for place, W in enumerate(weights):
        for entry in ((0,) * W.ndim, tuple(size - 1 for size in W.shape)):
            kept, ends = W[entry], []
            for way in (1e-5, -1e-5):
                W[entry] = kept + way
                ends.append(loss_by_hand(weights, scores))
            W[entry] = kept
            expected = (ends[0] - ends[1]) / 2e-5
            assert float(given.weights[place][1][entry]) == pytest.approx(expected, rel=1e-5, abs=1e-9)


class Network(nn.Module):
    """The block in PyTorch, converted by the library."""

    def __init__(self, scores):
        super().__init__()
        self.E, self.O, self.R, self.scores = nn.Linear(3, 5), nn.Linear(6, 4), nn.Linear(4, 3), scores
        self.Q, self.K, self.V = (nn.Linear(5, 6) for _ in range(3))

    def forward(self, x):
        x = self.E(x).relu()
        q, k, v = (one(x).unflatten(2, (2, 3)).transpose(1, 2) for one in (self.Q, self.K, self.V))
        s = q @ k.mT / 3**0.5
        A = s.softmax(-1) if self.scores == "softmax" else s.relu()
        return self.R(self.O((A @ v).transpose(1, 2).flatten(2)).relu())


@pytest.mark.parametrize("scores", ["softmax", "relu"])
@pytest.mark.parametrize("rule_name", ["fa", "frsf", "dfa"])
def test_gradients_of_the_rules_are_those_of_a_converted_network(rule_name, scores):
    block, dynamics = made(rule_name)
    X, y = data()
    network = falign.convert(Network(scores).double(), rule_name, example=X)
    for name, W in zip("EQKVOR", block.weights, strict=True):
        layer, flat = network.get_submodule(name), W[0].flatten(0, -2)
        layer.weight.data, layer.bias.data = flat[:, :-1].clone(), flat[:, -1].clone()
    for name, B in zip("QKVOR", block.B, strict=True):
        network.get_submodule(name).feedback.matrix.copy_(B[0].flatten(0, -2))
    F.cross_entropy(network(X).mean(1), y).backward()
    given = gradients(block, dynamics, X, y, scores=scores)
    for name, G in zip("EQKVOR", given.weights, strict=True):
        layer = network.get_submodule(name)
        expected = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        torch.testing.assert_close(G[0].flatten(0, -2), expected, rtol=1e-9, atol=1e-13)


# The laws.


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("rule_name", RULES)
def test_every_law_is_an_exact_identity_of_steps(rule_name, scores):
    trajectory = trained(rule_name, scores)
    absent = {"neurons", "values"} if rule_name == "dfa" else set()
    for law in LAWS:
        if law in absent:
            with pytest.raises(ValueError, match="a direct rule hands the output's error down"):
                conservation(trajectory, law)
            continue
        check = conservation(trajectory, law)
        if law == "scores" and scores == "softmax":
            assert check.verdict == "assumption fails"
            assert "A(2s) = 2^p A(s) for softmax" in check.sentence
            assert check.constants["relative residual"] > 1e-6
            continue
        assert check.verdict == "holds", check.sentence
        assert check.constants["relative residual"] < 1e-14
        assert float(check.series["drift"].max()) > 1e-10  # the raw C moves: the expected change is no decoration


@pytest.mark.parametrize("scores", ["softmax", "linear"])
@pytest.mark.parametrize("rule_name", ["bp", "fa", "kp", "dfa"])
def test_gradient_flow_conserves_whole_matrices(rule_name, scores):
    block, dynamics = made(rule_name, "linear")
    times = torch.tensor([0.0, 0.25], dtype=torch.float64)
    trajectory = gradient_flow(block, dynamics, *data(), scores=scores, times=times)
    for law in LAWS:
        if law not in trajectory.values:
            continue
        check = conservation(trajectory, law, tolerance=1e-9)
        assert (check.verdict == "holds") != (law == "scores" and scores == "softmax"), check.sentence
    assert float((trajectory.end.Q - block.Q).abs().max()) > 1e-5


@pytest.mark.parametrize(
    ("rule_name", "law"), [("fa", "queries"), ("usf", "scores"), ("fa", "values"), ("dfa", "queries")]
)
def test_the_drift_is_of_first_order_in_the_rate_at_a_fixed_time(rule_name, law):
    drifts = [
        float(conservation(trained(rule_name, "relu", rate, round(0.4 / rate)), law).series["drift"][:, -1].max())
        for rate in (0.01, 0.005, 0.0025)
    ]
    slopes = np.diff(np.log(drifts)) / np.log(0.5)
    assert slopes == pytest.approx([1, 1], abs=0.1)


def test_of_sign_feedback_the_diagonal_alone_is_of_first_order():
    """A weight that passes zero turns its sign, which the other neurons of the head see at once."""

    block, dynamics = made("usf")
    block = block._replace(O=0.02 * block.O)

    def drifts(rate):
        steps = round(0.5 / rate)
        trajectory = gradient_descent(block, dynamics, *data(), scores="relu", rate=rate, steps=steps, at=[0, steps])
        moved = trajectory["values"][:, -1] - trajectory["values"][:, 0]
        own = moved.diagonal(dim1=-2, dim2=-1)
        return float(own.abs().max()), float((moved - own.diag_embed()).abs().max())

    (own, others), (own_at_less, others_at_less) = drifts(0.02), drifts(0.005)
    assert own / own_at_less > 2.5
    assert 0.8 < others / others_at_less < 1.25
    assert others_at_less > 1e-3


def test_the_symmetry_that_the_law_of_queries_is_of():
    """Any matrix may be taken from the queries of a head to its keys; only a factor from the scores to the values."""
    block, dynamics = made("bp")
    A = torch.eye(3, dtype=torch.float64) + 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
    X, y = data()
    moved = block._replace(Q=A @ block.Q, K=torch.linalg.inv(A).mT @ block.K)
    scaled = block._replace(Q=2 * block.Q, V=block.V / 2)
    for scores, other, same in (("softmax", moved, True), ("softmax", scaled, False), ("relu", scaled, True)):
        one, two = (gradients(each, dynamics, X, y, scores=scores).R for each in (block, other))
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-12) == same


def test_a_wrong_feedback_is_told_by_the_law_of_values_alone():
    trajectory = trained("fa", "relu")
    shifted = [one._replace(B=tuple(B * (1 + 1e-6) for B in one.B)) for one in (trajectory.start, trajectory.end)]
    laws = [invariants(one, trajectory.dynamics, scores="relu") for one in shifted]
    for law in LAWS:
        wrong = laws[1][law] - laws[0][law] - trajectory[f"{law} expected"][:, -1]
        assert (float(wrong.abs().max()) > 1e-10) == (law not in ("queries", "scores"))


def test_tanh_breaks_the_laws_of_neurons_and_keeps_those_inside():
    tanh = Activation(name="tanh", value=torch.tanh, slope=lambda z: 1 - torch.tanh(z) ** 2, smooth=True)
    dynamics = Dynamics(activation=tanh, loss=loss("softmax"))
    block = draw(dynamics=dynamics, **SIZES)
    trajectory = gradient_descent(block, dynamics, *data(), scores="relu", rate=0.02, steps=30)
    verdicts = {law: conservation(trajectory, law).verdict for law in LAWS}
    assert verdicts == {
        "neurons": "assumption fails", "queries": "holds", "scores": "holds", "values": "holds",
        "outputs": "assumption fails",
    }  # fmt: skip


def test_what_does_not_fit_is_refused_in_a_sentence():
    block, dynamics = made()
    X, y = data()
    with pytest.raises(ValueError, match="the block wants \\(points, positions, 3\\) and \\(points, 3\\)"):
        gradients(block, dynamics, X[..., :2], y, scores="relu")
    with pytest.raises(ValueError, match="feedback has shapes"):
        gradients(block, made("dfa")[1], X, y, scores="relu")
    with pytest.raises(ValueError, match="weights Q, K, V, O and R have shapes"):
        invariants(block._replace(Q=block.Q[..., :-1]), dynamics, scores="relu")
    with pytest.raises(ValueError, match="expected 1 and 0: the laws here are of one rate"):
        invariants(block, Dynamics(rates=2.0), scores="relu")
    usf = made("usf")
    with pytest.raises(ValueError, match="use gradient_descent, which accounts for that"):
        gradient_flow(*usf, X, y, scores="relu", times=torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="scores"):
        gradients(block, dynamics, X, y, scores="sigmoid")
