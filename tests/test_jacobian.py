"""Mean Jacobians by forward-mode passes, and the rules that follow them."""

import numpy as np
import pytest
import torch
from torch import nn

import falign
from cases import batch, build, step
from falign.measure import feedback_cosines, mean_jacobian
from falign.rules import ForwardDirectFeedback, GradientAlignedFeedback


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).double()


X = torch.randn(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def true_jacobians():
    """{cut: E[∂f/∂z]} of the network on X, by the chain rule in NumPy."""
    first, _, second, _, third = (layer for layer in network())
    w2, w3 = second.weight.detach().numpy(), third.weight.detach().numpy()
    with torch.no_grad():
        hidden = torch.tanh(first(X))
        alive = (second(hidden) > 0).numpy()
        slopes = (1 - hidden.square()).numpy()
    samples = [w3 @ np.diag(mask) @ w2 for mask in alive.astype(float)]
    inputs = [j @ np.diag(s) @ first.weight.detach().numpy() for j, s in zip(samples, slopes, strict=True)]
    return {"0": np.mean(inputs, 0), "2": np.mean(samples, 0), "4": w3}


def test_the_mean_over_passes_is_the_mean_jacobian():
    model = falign.convert(network(), "dfa", example=X)
    estimates = [mean_jacobian(model, X) for _ in range(300)]
    for name, expected in true_jacobians().items():
        drawn = np.stack([one[name][0].numpy() for one in estimates])
        errors = (drawn.mean(0) - expected) / (drawn.std(0) / 300**0.5)
        assert np.mean(errors**2) == pytest.approx(1, abs=0.6)
        assert np.linalg.norm(drawn.mean(0) - expected) < 0.3 * np.linalg.norm(expected)


def test_a_seed_gives_the_tangents_and_nothing_else_moves():
    model = falign.convert(network(), "dfa", example=X)
    step(model, X, torch.zeros(40, dtype=torch.int64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.random.get_rng_state()
    one, other = (mean_jacobian(model, X, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name][0], other[name][0]) for name in one)
    assert not torch.equal(mean_jacobian(model, X)["2"][0], mean_jacobian(model, X)["2"][0])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))
    step(model, X, torch.zeros(40, dtype=torch.int64))


def test_forward_direct_feedback_becomes_it():
    model = falign.convert(network(), ForwardDirectFeedback(rate=0.03), example=X)
    assert not any(bool(matrix.any()) for matrix in falign.feedback_state(model).values())
    for _ in range(200):
        falign.follow(model, X)
    for name, expected in true_jacobians().items():
        found = falign.feedback_state(model)[name].numpy()
        assert np.linalg.norm(found - expected) < 0.5 * np.linalg.norm(expected)


def test_a_pass_of_each_rule_is_its_formula():
    matrix, jacobian = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    moved = ForwardDirectFeedback(rate=0.3).follow(matrix, jacobian)
    torch.testing.assert_close(moved, 0.7 * matrix + 0.3 * jacobian)
    wanted = matrix.clone().requires_grad_()
    cosine = (wanted * jacobian).sum() / wanted.norm() / jacobian.norm()
    cosine.backward()
    turned = matrix + 0.4 * matrix.norm() ** 2 * wanted.grad
    expected = turned / turned.norm(dim=0) * matrix.norm() / 6**0.5
    moved = GradientAlignedFeedback(rate=0.4).follow(matrix, jacobian)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-14)
    assert float(moved.norm()) == pytest.approx(float(matrix.norm()))


def test_grape_turns_and_the_cosines_tell():
    model = falign.convert(network(), GradientAlignedFeedback(rate=0.1), example=X)
    before = feedback_cosines(model, X, passes=150)
    for _ in range(120):
        falign.follow(model, X)
    after = feedback_cosines(model, X, passes=150)
    for name, expected in true_jacobians().items():
        found = falign.feedback_state(model)[name].numpy()
        cosine = np.sum(found * expected) / np.linalg.norm(found) / np.linalg.norm(expected)
        assert after[name] == pytest.approx(cosine, abs=0.2)
        assert after[name] > max(0.6, before[name])


@pytest.mark.parametrize("rule", ["dfa", "fdfa", "grape", "probe"])
@pytest.mark.parametrize("case", ["mlp", "conv", "residual", "sequence"])
def test_every_cut_of_every_network_has_one(rule, case):
    model, (x, _) = build(case, rule), batch(case)
    jacobians = mean_jacobian(model, x)
    state = falign.feedback_state(model)
    assert jacobians.keys() == state.keys() or case == "sequence"  # a lookup's output has no tangent in front of it
    assert all(ends[0].shape == state[name].shape for name, ends in jacobians.items())
    assert all(bool(ends[0].isfinite().all()) for ends in jacobians.values())


def test_attention_and_recurrent_modules_have_one():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.TransformerEncoderLayer(8, 2, 9, dropout=0.0, batch_first=True)
            self.rnn, self.head = nn.GRU(8, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.rnn(self.attend(x))[0])

    x = torch.randn(6, 5, 8)
    model = falign.convert(Reader(), "fdfa", example=x)
    names = mean_jacobian(model, x).keys()
    assert {"attend.self_attn.q_proj", "attend.self_attn.out_proj", "rnn.ih_l0", "rnn.hh_l0", "head"} <= names
    assert set(names) == set(falign.feedback_state(falign.follow(model, x)))


class Odd(torch.autograd.Function):
    """An operation without a forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, error):
        return error * 2


class Doubled(nn.Module):
    def forward(self, x):
        return Odd.apply(x)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: network(), ValueError, "is not converted"),
        (lambda: falign.convert(network(), "fa"), ValueError, "rule 'fa' delivers no output's error"),
        (lambda: falign.convert(network(), "dfa", example=X)[:3], ValueError, "a part or a wrapper"),
        (
            lambda: falign.convert(
                nn.Sequential(nn.Linear(5, 4), Doubled(), nn.Linear(4, 3)).double(), "dfa", example=X
            ),
            RuntimeError,
            r"needs forward-mode derivatives of all operations \(return Odd.apply\(x\)\): ",
        ),
    ],
)
def test_what_has_none_is_said(make, error, said):
    with pytest.raises(error, match=said):
        mean_jacobian(make(), X)


def test_rules_that_do_not_follow_are_said():
    with pytest.raises(ValueError, match="follow is for rules fdfa, grape and afa, the model is converted to 'dfa'"):
        falign.follow(falign.convert(network(), "dfa", example=X), X)
    with pytest.raises(ValueError, match="passes is 1, expected 2 or more"):
        feedback_cosines(falign.convert(network(), "dfa", example=X), X, passes=1)
