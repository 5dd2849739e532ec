"""The output's bias from class frequencies, and pre-training on noise: against NumPy and the conservation law."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import falign
from falign import init
from falign.measure import ConservationLaw, angle


def network(*widths, activation=nn.ReLU, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    widths = widths or (12, 16, 4)
    layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), activation())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def law_of(model, x):
    law = ConservationLaw(model, torch.optim.SGD(model.parameters(), lr=1.0), example=x)
    law.detach()
    return law


# prior_bias


@pytest.mark.parametrize("smoothing", [1.0, 0.5, 0])
@pytest.mark.parametrize("convert", [False, True])
def test_the_bias_is_the_log_of_the_smoothed_frequencies(convert, smoothing):
    labels = torch.tensor([0, 0, 1, 3, 3, 3, 2, -100, 0])
    model = network()
    if convert:
        falign.convert(model, "dfa")
    before = copy.deepcopy(model.state_dict())
    assert init.prior_bias(model, labels, smoothing=smoothing) is model
    counts = np.array([3, 1, 1, 3])
    expected = np.log((counts + smoothing) / (8 + 4 * smoothing))
    np.testing.assert_allclose(model[2].bias.detach().numpy(), expected, rtol=1e-15)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if name != "2.bias")
    init.prior_bias(model, counts=counts.tolist(), smoothing=smoothing)
    np.testing.assert_allclose(model[2].bias.detach().numpy(), expected, rtol=1e-15)


@pytest.mark.parametrize("labels", [[1, 0, 0, 0, 1], [True, False, False, False, True], [[1.0], [0.0], [0], [0], [1]]])
def test_of_one_output_it_is_the_log_odds(labels):
    model = init.prior_bias(network(12, 16, 1), labels)
    assert float(model[2].bias.detach()) == pytest.approx(np.log((2 + 1) / (3 + 1)), rel=1e-14)
    model = init.prior_bias(network(12, 16, 1), counts=(30, 10), smoothing=0)
    assert float(model[2].bias.detach()) == pytest.approx(np.log(0.25 / 0.75), rel=1e-14)


def test_answers_of_their_own_have_log_odds_of_their_own():
    answers = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1]]).bool()
    expected = np.log(np.array([4, 2, 1, 3]) / np.array([1, 3, 4, 2]))
    for labels in (answers, answers.double(), answers.tolist()):
        np.testing.assert_allclose(init.prior_bias(network(), labels)[2].bias.detach().numpy(), expected, rtol=1e-14)


def test_with_output_weights_of_zero_the_output_is_the_prior_and_the_mean_error_zero():
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels[:500]).double() / 16, torch.from_numpy(labels[:500]) // 2
    model = falign.convert(network(64, 32, 5), "dfa")
    init.small(model, example=x)
    init.prior_bias(model, y, smoothing=0)
    shares = np.bincount(y, minlength=5) / 500
    np.testing.assert_allclose(model(x).softmax(1).detach().numpy(), np.tile(shares, (500, 1)), atol=1e-14)
    nn.functional.cross_entropy(model(x), y).backward()
    assert float(model[2].bias.grad.abs().max()) < 1e-15


def test_the_law_does_not_see_it():
    x = torch.zeros(2, 12, dtype=torch.float64)
    model = falign.convert(network(12, 16, 8, 4), "fa")
    before = {name: value.clone() for name, value in law_of(model, x).value().items()}
    init.prior_bias(model, [0, 1, 2, 2])
    assert all(torch.equal(before[name], value) for name, value in law_of(model, x).value().items())
    assert before.keys() == {"0", "2"}


def test_the_output_layer_is_the_one_that_runs_last_or_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Conv1d(6, 3, 1), nn.Linear(5, 6)

        def forward(self, x):
            return self.last(self.first(x).relu().mT)

    labels = torch.tensor([[0, 0, 1], [2, 2, 2]])
    for options in ({"example": torch.zeros(2, 4, 5)}, {"layer": "last"}):
        model = init.prior_bias(Net(), labels, **options)
        np.testing.assert_allclose(model.last.bias.detach().numpy(), np.log(np.array([3, 2, 4]) / 9), rtol=1e-6)
    with pytest.raises(ValueError, match="expected class indices from 0 to 5"):
        init.prior_bias(Net(), [0, 7])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({}, "exactly one of the two"),
        ({"labels": [0], "counts": [1, 1, 1, 1]}, "exactly one of the two"),
        ({"labels": [0, 4]}, "labels are from 0 to 4, expected class indices from 0 to 3"),
        ({"labels": [-1, 2]}, "labels are from -1 to 2"),
        ({"labels": [-100]}, "labels are all -100"),
        ({"labels": [0.5, 1.0, 0.0, 0.0]}, "expected 0 and 1 for 4 outputs each"),
        ({"labels": [0, 1], "smoothing": 0}, "a class has no sample at all"),
        ({"counts": [1, 2, 3]}, "expected 4 numbers of at least 0"),
        ({"counts": [1, -2, 3, 1]}, "expected 4 numbers of at least 0"),
        ({"counts": [0, 0, 0, 0]}, "counts are all 0"),
        ({"labels": [0], "smoothing": -1}, "smoothing is -1"),
        ({"labels": [0], "layer": "5"}, "expected the name of a linear layer"),
    ],
)
def test_what_gives_no_bias_is_refused(arguments, why):
    model = network()
    before = model[2].bias.detach().clone()
    with pytest.raises(ValueError, match=why):
        init.prior_bias(model, **arguments)
    assert torch.equal(model[2].bias, before)


def test_a_layer_without_bias_is_refused():
    with pytest.raises(ValueError, match=r"layer '1' has no bias to set: make it with bias=True"):
        init.prior_bias(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)), [0, 1])
    with pytest.raises(ValueError, match="no linear layer or convolution whose bias"):
        init.prior_bias(nn.ReLU(), [0, 1])
    with pytest.raises(ValueError, match="does not run on the example"):
        init.prior_bias(network(), [0, 1], example=torch.zeros(3))


# noise

X = torch.zeros(2, 12, dtype=torch.float64)


def test_a_seed_means_the_same_weights_and_leaves_no_trace():
    def made():
        torch.manual_seed(3)
        layers = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)
        return falign.convert(nn.Sequential(*layers), "fa", seed=1)

    x = torch.zeros(2, 12)
    models = [made() for _ in range(3)]
    for model in models:
        model[0].weight.grad = torch.ones(16, 12)
    state = torch.get_rng_state()
    reports = [init.noise(m, 0.1, example=x, steps=20, seed=s) for m, s in zip(models, (5, 5, 6), strict=True)]
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[key])
    assert not torch.equal(models[0][0].weight, models[2][0].weight)
    assert not torch.equal(models[0][0].weight, made()[0].weight)
    assert reports[0] == reports[1] != reports[2]
    for model in models:
        assert torch.equal(model[0].weight.grad, torch.ones(16, 12))
        assert model[4].weight.grad is None
        assert torch.equal(model[1].running_mean, torch.zeros(16))
        assert torch.equal(model[1].running_var, torch.ones(16))
        assert int(model[1].num_batches_tracked) == 0
        assert model.training
        assert torch.equal(model[4].feedback.B, made()[4].feedback.B)


def test_the_steps_are_those_of_the_rule_on_normal_inputs_with_even_labels():
    """By hand: one step on the noise that the seed draws, in NumPy."""
    seen = []
    model = falign.convert(network(), "fa", seed=1)
    W, b, V, c = (p.detach().numpy().copy() for p in model.parameters())
    B = model[2].feedback.B.numpy()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]) if torch.is_grad_enabled() else None)
    labels = []
    original = nn.functional.cross_entropy

    def watched(f, y):
        labels.append(y)
        return original(f, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "cross_entropy", watched)
        report = init.noise(model, 0.3, example=X, steps=1, batch=4000)
    x, y = seen[1].numpy(), labels[1].numpy()
    assert abs(x.mean()) < 0.02
    assert abs(x.std() - 1) < 0.02
    assert (np.abs(np.bincount(y) - 1000) < 120).all()
    h = np.maximum(x @ W.T + b, 0)
    f = h @ V.T + c
    p = np.exp(f) / np.exp(f).sum(1, keepdims=True)
    e = (p - np.eye(4)[y]) / 4000
    d = (e @ B) * (h > 0)
    expected = W - 0.3 * d.T @ x, b - 0.3 * d.sum(0), V - 0.3 * e.T @ h, c - 0.3 * e.sum(0)
    for found, each in zip(model.parameters(), expected, strict=True):
        np.testing.assert_allclose(found.detach().numpy(), each, rtol=0, atol=1e-13)
    assert report.losses[0] == pytest.approx(-np.log(p[np.arange(4000), y]).mean(), abs=1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_the_law_holds_in_noise_so_that_alignment_gains_what_incoming_weights_gain(decay):
    model = falign.convert(network(12, 16, 8, 4), "fa", seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=decay)
    law = ConservationLaw(model, optimizer, example=X)
    before, value = init.aligned_forever(model, example=X), law_of(model, X).value()
    report = init.noise(model, optimizer, example=X, steps=100, samples=64)
    assert law.steps == report.steps == 100
    assert law.report().holds
    now, after = law_of(model, X).value(), init.aligned_forever(model, example=X)
    for name, (incoming, alignment_term) in law.changes().items():
        torch.testing.assert_close(incoming - alignment_term, now[name] - value[name], rtol=0, atol=1e-12)
        if decay == 0:
            assert (incoming - alignment_term >= 0).all()  # ½Ση²|∇|²
            assert not (after[name] & ~before[name]).any()
        else:
            assert float((now[name] - value[name]).mean()) < 0


@pytest.mark.parametrize("rule", ["fa", "dfa", "adafa", "pfa", "drtp", "dkp"])
def test_noise_learned_by_heart_turns_the_weights_to_the_feedback(rule):
    model = falign.convert(network(12, 64, 4, dtype=torch.float32), rule, seed=1, example=X.float())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, weight_decay=1e-4)
    report = init.noise(model, optimizer, example=X.float(), steps=300, samples=32, batch=32)
    row = report.rows[-1]
    assert row.weight_after < row.weight_before - 10
    assert row.error_after < row.error_before
    weight = model[2].weight.detach()
    feedback = model[2].feedback.feedback_matrix(weight).detach()
    assert row.weight_after == pytest.approx(angle(feedback, weight), abs=1e-3)
    assert "300 steps on noise" in str(report)
    assert f"{row.weight_after:.1f}°" in str(report)


def test_new_noise_turns_the_output_to_chance():
    model = falign.convert(network(12, 64, 4), "fa", seed=1)
    with torch.no_grad():
        model[2].weight.mul_(4)
    report = init.noise(model, 0.05, example=X, steps=400, batch=256)
    assert np.mean(report.losses[-50:]) == pytest.approx(np.log(4), abs=0.05)
    assert np.mean(report.losses[:5]) > np.log(4) + 0.1


def test_inputs_of_every_kind_and_losses_of_ones_own():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Embedding(7, 6), nn.Linear(6, 3)

        def forward(self, tokens, scale, mask, factor):
            assert set(tokens.unique().tolist()) <= {2, 5}
            assert tokens.shape == mask.shape == (*scale.shape, 4)
            assert mask.any(1).all()
            h = (self.table(tokens) * mask.unsqueeze(-1)).sum(1) * factor
            return {"out": self.last(h + scale.unsqueeze(1))}

    example = {
        "tokens": torch.tensor([[2, 5, 2, 2], [5, 5, 2, 2]]),
        "scale": torch.zeros(2),
        "mask": torch.tensor([[True, False, True, True], [True, True, False, False]]),
        "factor": 2.0,
    }
    torch.manual_seed(0)
    model = falign.convert(Reader(), "fa", example=example)
    with pytest.raises(ValueError, match=r"expected \(batch, classes\): give a loss_fn"):
        init.noise(model, example=example)

    def loss_fn(output, random):
        target = torch.randn(output["out"].shape, generator=random)
        return (output["out"] - target).square().mean()

    report = init.noise(model, 0.01, example=example, steps=200, batch=16, loss_fn=loss_fn)
    assert np.mean(report.losses[-20:]) < 0.7 * np.mean(report.losses[:20])
    with pytest.raises(ValueError, match="draws new targets in every step"):
        init.noise(model, example=example, loss_fn=loss_fn, samples=4)


def test_one_output_has_even_odds():
    model = falign.convert(network(12, 16, 1), "fa")
    report = init.noise(model, 0.2, example=X, steps=150)
    assert np.mean(report.losses[-50:]) == pytest.approx(np.log(2), abs=0.02)


def test_what_cannot_be_trained_on_noise_is_refused():
    for rule in ("bp", "frozen"):
        with pytest.raises(ValueError, match=f"rule '{rule}' has no feedback that the weights could turn to"):
            init.noise(falign.convert(network(), rule, example=X), example=X)
    with pytest.raises(ValueError, match="is not converted"):
        init.noise(network(), example=X)
    model = falign.convert(network(dtype=torch.float32), "fa")
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) after \d+ steps on noise: lower the learning rate"):
        init.noise(model, 1e20, example=X.float(), steps=50)
    model = falign.convert(network(), "fa")
    for arguments, why in (
        ({"steps": 0}, "steps is 0"),
        ({"batch": 1}, "batch is 1"),
        ({"samples": 0}, "samples is 0"),
        ({"optimizer": -1.0}, "optimizer is -1"),
        ({"optimizer": torch.optim.SGD(network().parameters(), lr=0.1)}, "holds none of the model's"),
        ({"example": torch.zeros(2, 3)}, "does not run on the example"),
    ):
        with pytest.raises(ValueError, match=why):
            init.noise(model, **{"example": X, **arguments})


@pytest.mark.unchecked
def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="expected a torch optimizer or a learning rate"):
        init.noise(falign.convert(network(), "fa"), "sgd", example=X)
