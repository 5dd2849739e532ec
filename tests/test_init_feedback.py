"""Feedback taken once from the weights: angles, Jacobians and the law against NumPy."""

import copy
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import falign
from falign import init
from falign.measure import ConservationLaw, alignment


@cache
def digits(size=120):
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels[:size]).double() / 16, torch.from_numpy(labels[:size])


def network(*widths, activation=nn.ReLU, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    widths = widths or (64, 24, 16, 10)
    layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), activation())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def trained(steps=60, rate=0.3, **options):
    """A network that backpropagation has trained on the digits."""
    model, (x, y) = network(**options), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def law_of(model, x):
    law = ConservationLaw(model, torch.optim.SGD(model.parameters(), lr=1.0), example=x)
    law.detach()
    return law


def cosine(one, other):
    one, other = (each.detach().double().numpy().ravel() for each in (one, other))
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def carried(model, name):
    layer = model.get_submodule(name)
    return layer.feedback.feedback_matrix(layer.weight).detach()


def jacobians(model, x):
    """∂f/∂h of every sample at the input of every linear layer of an MLP with ReLU, by hand: {name: (n, out, in)}."""
    h, passes = x.numpy(), []
    layers = [(name, layer) for name, layer in model.named_children() if isinstance(layer, nn.Linear)]
    for name, layer in layers:
        z = h @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        passes.append((name, layer.weight.detach().numpy(), z > 0))
        h = np.maximum(z, 0)
    found = {}
    above = np.broadcast_to(np.eye(passes[-1][1].shape[0]), (len(x), *[passes[-1][1].shape[0]] * 2))
    for number, (name, weight, active) in enumerate(reversed(passes)):
        above = (above if number == 0 else above * active[:, None, :]) @ weight
        found[name] = above
    return found


# soft


@pytest.mark.parametrize("rule", ["fa", "kp", "adafa", "pfa"])
@pytest.mark.parametrize("angle", [0, 10, 45.0, 90, 135, 180])
def test_the_angle_is_the_one_asked_for_and_the_norm_and_the_weights_stay(rule, angle):
    model = falign.convert(network(), rule, seed=1)
    norms = {name: float(carried(model, name).norm()) for name in ("0", "2", "4")}
    weights = [parameter.detach().clone() for parameter in (model[0].weight, model[2].weight, model[4].weight)]
    assert init.soft(model, angle=angle) is model
    for name, norm in norms.items():
        assert cosine(carried(model, name), model.get_submodule(name).weight) == pytest.approx(
            np.cos(np.radians(angle)), abs=1e-7 if rule == "pfa" else 1e-13
        )
        assert float(carried(model, name).norm()) == pytest.approx(norm, rel=1e-6 if rule == "pfa" else 1e-13)
    assert all(torch.equal(a, b) for a, b in zip(weights, (model[i].weight for i in (0, 2, 4)), strict=True))


def test_errors_return_by_it_from_then_on_and_it_stays():
    x, y = digits()
    model = init.soft(falign.convert(network(64, 24, 10), seed=1), angle=30, seed=4)
    B = carried(model, "2").clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        h = np.maximum(x.numpy() @ model[0].weight.detach().numpy().T + model[0].bias.detach().numpy(), 0)
        f = h @ model[2].weight.detach().numpy().T + model[2].bias.detach().numpy()
        p = np.exp(f - f.max(1, keepdims=True))
        e = (p / p.sum(1, keepdims=True) - np.eye(10)[y.numpy()]) / len(x)
        expected = ((e @ B.numpy()) * (h > 0)).T @ x.numpy()
        np.testing.assert_allclose(model[0].weight.grad.numpy(), expected, rtol=0, atol=1e-14)
        optimizer.step()
    assert torch.equal(carried(model, "2"), B)


def test_without_a_seed_the_random_part_is_that_of_the_feedback_and_with_one_it_is_drawn():
    model = falign.convert(network(), seed=1, feedback="sparse(2)")
    B, W = (each.detach().numpy().ravel() for each in (carried(model, "2"), model[2].weight))
    rest = B - (B @ W) / (W @ W) * W
    state = torch.get_rng_state()
    init.soft(model, angle=70)
    expected = np.cos(np.radians(70)) * W / np.linalg.norm(W) + np.sin(np.radians(70)) * rest / np.linalg.norm(rest)
    np.testing.assert_allclose(carried(model, "2").numpy().ravel(), np.linalg.norm(B) * expected, atol=1e-13)
    drawn = [carried(init.soft(model, angle=70, seed=seed), "2").clone() for seed in (5, 5, 6)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), state)
    init.soft(model, angle=0)
    with pytest.raises(ValueError, match=r"B is parallel to W, so it shows no other direction: give a seed="):
        init.soft(model, angle=20)
    assert cosine(carried(init.soft(model, angle=20, seed=1), "2"), model[2].weight) == pytest.approx(
        np.cos(np.radians(20)), abs=1e-13
    )


def test_convolutions_shared_feedback_and_matrices_multiplied_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv1d(2, 8, 3, padding=1, groups=2), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            h = self.conv(x).relu().mT
            return self.last(self.attention(h, h, h)[0].mean(1))

    torch.manual_seed(0)
    model = falign.convert(Net(), "fa", feedback="shared", example=torch.zeros(2, 2, 5))
    init.soft(model, angle=60)
    x = torch.randn(4, 2, 5)
    rows = {row.layer: row for row in alignment(model, nn.CrossEntropyLoss(), x, torch.arange(4) % 3).layers}
    for name in ("last", "attention.in_proj_weight"):
        assert rows[name].weight_angle == pytest.approx(60, abs=1e-3)
    assert cosine(carried(model, "conv"), model.conv.weight) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("rule", ["dfa", "dkp"])
def test_under_direct_rules_the_mean_jacobian_stands_for_the_weight(rule):
    x, _ = digits()
    model = falign.convert(network(), rule, seed=1)
    norms = {name: float(model.get_submodule(name).feedback.matrix.detach().norm()) for name in ("0", "2", "4")}
    init.soft(model, angle=25, example=x)
    for name, each in jacobians(model, x).items():
        B = model.get_submodule(name).feedback.matrix.detach()
        assert cosine(B, torch.from_numpy(each.mean(0))) == pytest.approx(np.cos(np.radians(25)), abs=1e-12)
        assert float(B.norm()) == pytest.approx(norms[name], rel=1e-12)


@pytest.mark.parametrize("angle", [0, 40, 120])
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_the_law_begins_where_the_angle_says(rule, angle):
    x, _ = digits()
    model = init.soft(falign.convert(network(), rule, seed=1), angle=angle)
    values = law_of(model, x).value()
    for name, above in (("0", "2"), ("2", "4")):
        w, b, W, B = (
            each.detach().numpy()
            for each in (*model.get_submodule(name).parameters(recurse=False), model.get_submodule(above).weight,
                         carried(model, above))
        )  # fmt: skip
        incoming = 0.5 * (w**2).sum() + 0.5 * (b**2).sum()
        alignment_term = np.linalg.norm(B) * np.linalg.norm(W) * np.cos(np.radians(angle))
        half = 0.5 * (W**2).sum() if rule == "kp" else 0.0
        assert float(values[name].sum()) == pytest.approx(incoming - alignment_term + half, abs=1e-12)


@pytest.mark.parametrize(("widths", "guaranteed"), [((64, 40, 40, 40), True), ((64, 40, 40, 4), False)])
def test_along_the_weights_neurons_are_aligned_for_ever_where_enough_outputs_listen(widths, guaranteed):
    x, _ = digits()
    model = init.soft(falign.convert(network(*widths), seed=1, scale=3**-0.5), angle=0)
    told = init.aligned_forever(model, example=x)
    for name, above in (("0", "2"), ("2", "4")):
        w, b = (each.detach().numpy() for each in model.get_submodule(name).parameters(recurse=False))
        W, B = model.get_submodule(above).weight.detach().numpy(), carried(model, above).numpy()
        bound = np.linalg.norm(B) / np.linalg.norm(W) * (W**2).sum(0)
        np.testing.assert_array_equal(told[name].numpy(), 0.5 * (w**2).sum(1) + 0.5 * b**2 <= bound)
    assert float(told["2"].double().mean()) == (1.0 if guaranteed else 0.0)


def test_what_the_incoming_weights_gain_alignment_gains_from_a_soft_start():
    x, y = digits()
    model = init.soft(falign.convert(network(), seed=1), angle=30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    law = ConservationLaw(model, optimizer, example=x)
    start = {name: value.clone() for name, value in law_of(model, x).value().items()}
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert law.report().holds
    for name, above in (("0", "2"), ("2", "4")):
        w, b = (each.detach() for each in model.get_submodule(name).parameters(recurse=False))
        V = (carried(model, above) * model.get_submodule(above).weight.detach()).sum(0)
        expected = 0.5 * w.square().sum(1) + 0.5 * b.square() - start[name] - law.drift()[name]
        torch.testing.assert_close(V, expected, rtol=0, atol=1e-12)
        assert (law.drift()[name] >= 0).all()


@dataclass(frozen=True, kw_only=True)
class Halved(falign.Rule):
    """Half of B carries the error."""

    name: ClassVar[str] = "halved"

    def feedback_matrix(self, *inputs, scratch=None):
        """Half of it."""
        return 0.5 * inputs[0]


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("bp", "has no feedback"),
        ("frozen", "has no feedback"),
        ("usf", "takes the signs of its feedback from the weights"),
        ("frsf", "takes the signs"),
        ("brsf", "takes the signs"),
        ("drtp", "hands back targets"),
        (Halved(), "makes another matrix of the B that layer '0' is given"),
    ],
)
def test_rules_whose_feedback_is_not_free_are_refused(rule, why):
    model = falign.convert(network(), rule, example=digits()[0][:2])
    before = falign.feedback_state(model)
    with pytest.raises(ValueError, match=why):
        init.soft(model, example=digits()[0])
    after = falign.feedback_state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_has_no_angle_is_refused():
    model = falign.convert(network(), "fa")
    for angle in (-1, 181, float("nan"), True):
        with pytest.raises(ValueError, match="expected degrees from 0 to 180"):
            init.soft(model, angle=angle)
    with pytest.raises(ValueError, match="is not converted"):
        init.soft(network())
    with pytest.raises(ValueError, match="pass example=x, a batch"):
        init.soft(falign.convert(network(), "dfa"))
    with pytest.raises(ValueError, match="a part of a converted model"):
        init.soft(model[0])
    with pytest.raises(
        ValueError, match="rule 'probe' finds its feedback in training, from zero: its B cannot be chosen"
    ):
        init.soft(falign.convert(network(), "probe"), example=digits()[0])
    with torch.no_grad():
        model[2].weight.zero_()
    with pytest.raises(ValueError, match="layer '2': what B is to be near is zero"):
        init.soft(model)


# match


def test_where_all_is_linear_the_product_of_the_weights_is_matched_and_gradients_are_true():
    x, y = digits()
    model = falign.convert(trained(activation=nn.Identity), "dfa", seed=1)
    report = init.match(model, example=x, targets=y)
    product = np.eye(10)
    for name, row in zip(("4", "2", "0"), reversed(report.rows), strict=True):
        product = product @ model.get_submodule(name).weight.detach().numpy()
        np.testing.assert_allclose(model.get_submodule(name).feedback.B.numpy(), product, rtol=0, atol=1e-12)
        assert (row.layer, row.rank, row.truncated) == (name, 10, 0.0)
        assert row.missed < 1e-6
    rows = alignment(model, nn.CrossEntropyLoss(), x, y).layers
    assert all(row.gradient_angle < 1e-4 for row in rows)


@pytest.mark.parametrize("rank", [None, 3])
def test_behind_relu_it_is_the_mean_jacobian_and_the_report_says_what_is_lost(rank):
    x, y = digits()
    model = falign.convert(trained(), "dfa", seed=1)
    former = {name: model.get_submodule(name).feedback.B.clone() for name in ("0", "2", "4")}
    report = init.match(model, example=x, targets=y, rank=rank)
    for row in report.rows:
        each = jacobians(model, x)[row.layer]
        J = each.mean(0)
        u, s, v = np.linalg.svd(J, full_matrices=False)
        B = J if rank is None else (u[:, :rank] * s[:rank]) @ v[:rank]
        np.testing.assert_allclose(model.get_submodule(row.layer).feedback.B.numpy(), B, rtol=0, atol=1e-12)
        assert row.rank == (10 if rank is None else 3)
        assert row.truncated == pytest.approx(np.linalg.norm(J - B) / np.linalg.norm(J), abs=1e-12)
        missed = np.sqrt(((each - B) ** 2).sum() / (each**2).sum())
        assert row.missed == pytest.approx(missed, abs=1e-7)
        W = np.linalg.svd(model.get_submodule(row.layer).weight.detach().numpy(), compute_uv=False)
        assert row.weight_truncated == pytest.approx(np.sqrt((W[10:] ** 2).sum() / (W**2).sum()), abs=1e-12)
        expected = np.degrees(np.arccos(cosine(former[row.layer], torch.from_numpy(J))))
        assert row.former_angle == pytest.approx(expected, abs=1e-6)
    assert [row.layer for row in report.rows] == ["0", "2", "4"]
    table = str(report).splitlines()
    assert " ".join(table[0].split()) == "layer rank of B B before to J truncated missed W truncated"
    assert table[1].startswith("0 ")
    assert f"{report.rows[0].missed:.1%}" in table[1]


def test_of_convolutions_it_is_what_autograd_says_of_each_sample():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    ).double()
    with torch.no_grad():
        plain[0].weight.mul_(4)
    x = torch.randn(7, 1, 8, 8, dtype=torch.float64)
    model = falign.convert(copy.deepcopy(plain), "dfa", example=x)
    init.match(model, example=x)
    for start, name in ((0, "0"), (3, "3"), (6, "6")):
        h = plain[:start](x).detach()
        jacobian = torch.stack(
            [torch.autograd.functional.jacobian(lambda one, rest=plain[start:]: rest(one[None])[0], one) for one in h]
        )
        torch.testing.assert_close(
            model.get_submodule(name).feedback.B, jacobian.mean(0).flatten(1), rtol=0, atol=1e-12
        )


def test_positions_share_a_matrix_which_is_that_of_the_same_position():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x):  # (batch, positions, 5)
            h = self.first(x)
            return self.last(h + h.mean(1, keepdim=True))

    torch.manual_seed(0)
    model = Mixed().double()
    with torch.no_grad():
        model.first.weight.mul_(4)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    report = init.match(falign.convert(model, "dfa", example=x), example=x)
    W, V = model.first.weight.detach(), model.last.weight.detach()
    torch.testing.assert_close(model.first.feedback.B, 1.25 * V @ W, rtol=0, atol=1e-13)
    torch.testing.assert_close(model.last.feedback.B, V, rtol=0, atol=1e-13)
    # Of 4 positions' errors, each of the other three brings a quarter of V W.
    assert report.rows[0].missed == pytest.approx((3 / 16 / (1.25**2 + 3 / 16)) ** 0.5, abs=1e-7)


def test_beside_a_skip_connection_it_is_the_way_through_the_layer_alone():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            h = self.first(x)
            return self.last(h + self.inner(h))

    torch.manual_seed(0)
    model = Residual().double()
    with torch.no_grad():
        model.first.weight.mul_(4)
    x = torch.randn(9, 5, dtype=torch.float64)
    init.match(falign.convert(model, "dfa", example=x), example=x)
    A, V, W = (layer.weight.detach() for layer in (model.inner, model.last, model.first))
    torch.testing.assert_close(model.inner.feedback.B, V @ A, rtol=0, atol=1e-13)
    torch.testing.assert_close(model.first.feedback.B, V @ (A + torch.eye(6)) @ W, rtol=0, atol=1e-13)


def test_every_output_has_its_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x):
            h = self.first(x)
            return {"a": self.a(h), "b": self.b(h)}

    torch.manual_seed(0)
    model, x = Two().double(), torch.randn(9, 5, dtype=torch.float64)
    with torch.no_grad():
        model.first.weight.mul_(4)
    falign.convert(model, "dfa", example=x, output=("a", "b"))
    report = init.match(model, example=x)
    W = model.first.weight.detach()
    feedback = model.first.feedback.matrices()
    for number, head in enumerate((model.a, model.b)):
        torch.testing.assert_close(feedback[number], head.weight.detach() @ W, rtol=0, atol=1e-13)
    assert {(row.layer, row.output) for row in report.rows} == {("first", 0), ("first", 1), ("a", 0), ("b", 1)}
    assert "output" in str(report)
    with pytest.raises(ValueError, match="for a model of one output"):
        init.match(model, example=x, targets=torch.zeros(9, dtype=torch.long))


def test_by_the_law_of_backpropagation_what_it_trained_is_aligned_for_ever():
    """C = c - ½|W[:, k]|², c the constant of backpropagation: of a network that began small all neurons are."""
    x, y = digits()
    model = network(64, 24, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.01)
    falign.convert(model, "bp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    began = law_of(model, x).value()["0"]
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    c = law_of(model, x).value()["0"]
    grown = 0.5 * model[2].weight.detach().square().sum(0)
    assert float((c - began).abs().max()) < 0.1 * float(grown.max())
    falign.convert(falign.revert(model), "dfa", seed=1)
    assert not init.aligned_forever(model, example=x)["0"].all()
    init.match(model, example=x, targets=y)
    value = law_of(model, x).value()["0"]
    torch.testing.assert_close(value, c - grown, rtol=0, atol=1e-12)
    assert torch.equal(init.aligned_forever(model, example=x)["0"], value <= 0)
    assert (value <= 0)[grown > 1e-4].all()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    law = ConservationLaw(model, optimizer, example=x)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert law.report().holds
    aligned = (model[2].feedback.B * model[2].weight.detach()).sum(0)
    assert (aligned[value < -1e-3] > 0).all()


def test_matched_feedback_fine_tunes_along_the_true_gradient():
    x, y = digits()
    model = falign.convert(trained(), "dfa", seed=1)
    before = [row.gradient_angle for row in alignment(model, nn.CrossEntropyLoss(), x, y).layers[:-1]]
    init.match(model, example=x, targets=y)
    after = [row.gradient_angle for row in alignment(model, nn.CrossEntropyLoss(), x, y).layers[:-1]]
    assert min(before) > 60
    assert max(after) < 40


def test_nothing_but_the_feedback_is_changed():
    x, _ = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 10)).double()
    with torch.no_grad():
        model[0].weight.mul_(4)
    falign.convert(model, "dfa", seed=1)
    model(x).square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    init.match(model, example=x)
    assert model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert not x.requires_grad


def test_weights_as_they_were_drawn_are_refused_and_those_of_one_step_are_not():
    x, y = digits()
    makes = [
        network,
        lambda: nn.Sequential(nn.Unflatten(1, (1, 64)), nn.Conv1d(1, 8, 5), nn.Flatten(), nn.Linear(480, 10)).double(),
        lambda: nn.Sequential(nn.Unflatten(1, (64, 1)), nn.ConvTranspose1d(64, 10, 3), nn.Flatten()).double(),
    ]
    for make in makes:
        torch.manual_seed(1)
        model = falign.convert(make(), "dfa", example=x)
        before = falign.feedback_state(model)
        with pytest.raises(ValueError, match="all weights of this one are still as PyTorch draws them"):
            init.match(model, example=x)
        assert all(torch.equal(value, before[name]) for name, value in falign.feedback_state(model).items())
    init.match(falign.convert(trained(steps=1), "dfa"), example=x)
    decayed = network()
    with torch.no_grad():
        for parameter in decayed.parameters():
            parameter.mul_(0.5)
    init.match(falign.convert(decayed, "dfa"), example=x)
    with pytest.raises(ValueError, match=r"its cross-entropy is \d.*, and the best constant has 2\.3"):
        init.match(decayed, example=x, targets=(y + 1) % 10)


@pytest.mark.parametrize("kind", ["classes", "one output", "regression"])
def test_with_targets_it_must_be_better_than_a_constant(kind):
    x, y = digits()
    model = network(64, 8, 1 if kind == "one output" else 3)
    with torch.no_grad():
        model[0].weight.mul_(3)
    falign.convert(model, "dfa")
    scores = model(x).detach()
    good = {
        "classes": scores.argmax(1),
        "one output": (scores[:, 0] > scores.median()).long(),
        "regression": scores + 0.1,
    }[kind]
    with torch.no_grad():
        model[2].bias.sub_(scores.median() if kind == "one output" else 0)
        model[2].weight.mul_(1 if kind == "regression" else 20)
        model[2].bias.mul_(1 if kind == "regression" else 20)
    init.match(model, example=x, targets=good)
    bad = 1 - good if kind == "one output" else (good + 1) % 3 if kind == "classes" else -3 * good
    with pytest.raises(ValueError, match="the best constant has"):
        init.match(model, example=x, targets=bad)
    with pytest.raises(ValueError, match=r"targets are .*, expected class indices"):
        init.match(model, example=x, targets=y[:5])


def test_match_is_for_direct_rules():
    x, _ = digits()
    with pytest.raises(ValueError, match=r"match is for direct rules, the model's is 'fa'.*soft\(model, angle=0\)"):
        init.match(falign.convert(trained(), "fa"), example=x)
    with pytest.raises(ValueError, match="rule 'bp' has no feedback"):
        init.match(falign.convert(trained(), "bp"), example=x)
    with pytest.raises(ValueError, match="rank is 0"):
        init.match(falign.convert(trained(), "dfa"), example=x, rank=0)
    with pytest.raises(ValueError, match="does not run on the example"):
        init.match(falign.convert(trained(), "dfa"), example=x[:, :5])
