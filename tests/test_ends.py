"""Where a direct rule's error begins: at the last layer, at one output or several, with the batch first."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import falign
from cases import DIRECT, gradients, loss_of, relative


def body(end=None):
    torch.manual_seed(2)
    layers = [nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 11), nn.ReLU(), nn.Linear(11, 5)]
    return nn.Sequential(*layers, *([end] if end is not None else [])).double()


def data(count=7, classes=5):
    random = torch.Generator().manual_seed(3)
    x = torch.randn(count, 9, generator=random, dtype=torch.float64)
    return x, torch.randint(classes, (count,), generator=random)


ENDS = {
    "log softmax": (nn.LogSoftmax(-1), F.nll_loss),
    "softmax": (nn.Softmax(1), lambda p, y: F.nll_loss(p.log(), y)),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("rule", DIRECT)
def test_a_softmax_behind_the_last_layer_changes_nothing(rule, end, given):
    last, loss = ENDS[end]
    x, y = data()
    example = {"example": x} if given else {}
    logits, probabilities = body(), body(last)
    for model in (logits, probabilities):
        falign.convert(model, rule, **example)
    expected = gradients(logits, x, y)
    with falign.targets(probabilities, y):
        loss(probabilities(x), y).backward()
    assert relative({name: p.grad for name, p in probabilities.named_parameters()}, expected) <= 1e-12
    assert falign.verify(probabilities, x, lambda output: loss(output, y), target=y)


class Normalised(nn.Module):
    """Parameters behind the last layer: the error begins at the output, as it always did."""

    def __init__(self):
        super().__init__()
        self.body, self.temperature = body(), nn.Parameter(torch.tensor(2.0).double())

    def forward(self, x):
        return self.body(x) * self.temperature


def test_parameters_behind_the_last_layer_keep_the_error_at_the_output():
    x, y = data()
    model = falign.convert(Normalised(), "dfa", example=x, scale=0.3)
    assert model._falign.ends[0].layer is None
    assert falign.verify(model, x, lambda output: loss_of(output, y))


def test_without_an_example_that_runs_what_follows_the_last_layer_is_refused():
    class Words(nn.Module):
        def __init__(self, end):
            super().__init__()
            self.words, self.inner, self.out, self.end = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 4), end

        def forward(self, x):
            return self.end(self.out(torch.tanh(self.inner(self.words(x).mean(1)))))

    x = torch.randint(7, (3, 5))
    falign.convert(Words(nn.Identity()), "dfa")(x).sum().backward()
    with pytest.raises(RuntimeError, match="Pass example=x"):
        falign.convert(Words(nn.Softmax(1)), "dfa")(x)
    falign.convert(Words(nn.Softmax(1)), "dfa", example=x)(x).sum().backward()


@dataclass(frozen=True, kw_only=True)
class SignOfError(falign.Rule):
    """Delivers only the signs of the error."""

    name: ClassVar[str] = "sign-dfa"
    wiring: ClassVar = "direct"

    def error(self, error, output, target, axis):
        return error.sign() * output.shape[-1]


def test_a_direct_rules_own_error_is_what_is_delivered():
    x, y = data()
    model = falign.convert(body(), SignOfError(), example=x)
    matrix = falign.feedback_state(model)["4"]
    h = torch.tanh(F.linear(x, model[0].weight, model[0].bias)).detach()
    h = torch.relu(F.linear(h, model[2].weight, model[2].bias)).detach()
    output = F.linear(h, model[4].weight, model[4].bias).detach().requires_grad_()
    (error,) = torch.autograd.grad(loss_of(output, y), output)
    loss_of(model(x), y).backward()
    carried = (error.sign() * 5 @ matrix) * (h > 0)
    expected = carried.T @ torch.tanh(F.linear(x, model[0].weight, model[0].bias)).detach()
    assert relative({"w": model[2].weight.grad}, {"w": expected}) <= 1e-12
    assert falign.verify(model, x, lambda output: loss_of(output, y))


class Autoencoder(nn.Module):
    """Variational: a reconstruction, a mean and a log variance."""

    def __init__(self):
        super().__init__()
        self.inner, self.mean, self.spread = nn.Linear(9, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.outer, self.last = nn.Linear(3, 8), nn.Linear(8, 9)

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        mean, spread = self.mean(h), self.spread(h)
        z = mean + torch.exp(spread / 2) * 0.3
        return {"x": self.last(torch.tanh(self.outer(z))), "mean": mean, "spread": spread}


def elbo(result, x, weight=1.0):
    divergence = (result["mean"].square() + result["spread"].exp() - 1 - result["spread"]).sum()
    return ((result["x"] - x) ** 2).sum() + weight * divergence


def test_several_outputs_deliver_each_its_own_error():
    x, _ = data()
    model = falign.convert(Autoencoder().double(), "dfa", example=x, output=("x", "mean", "spread"))
    assert falign.verify(model, x, lambda result: elbo(result, x))
    state = falign.feedback_state(model)
    mean = {name: tuple(b.shape) for name, b in state.items() if name.startswith("mean")}
    assert mean == {"mean": (9, 8), "mean.B1": (3, 8)}
    assert tuple(state["inner.B1"].shape) == tuple(state["inner.B2"].shape) == (3, 9)
    assert set(state) == {*mean, "inner", "inner.B1", "inner.B2", "spread", "spread.B2", "outer", "last"}
    falign.load_feedback_state(model, {name: 2 * b for name, b in state.items()})
    taken = {}
    for weight in (0.0, 1.0):
        model.zero_grad()
        x.requires_grad_()
        elbo(model(x), x.detach(), weight).backward()
        taken[weight], x.grad = x.grad, None
    assert float((taken[1.0] - taken[0.0]).norm()) > 0, "the divergence reaches the bottom"


def test_the_other_outputs_errors_stay_at_their_layers_where_they_are_not_named():
    x, _ = data()
    model = falign.convert(Autoencoder().double(), "dfa", example=x, output="x")
    assert falign.verify(model, x, lambda result: elbo(result, x))


class Turned(nn.Module):
    """Time first at the output, whatever comes in."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))).transpose(0, 1)


class Contrast(nn.Module):
    """Every sample against every sample."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(9, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.b(torch.tanh(self.a(x)))
        return h @ h.T


@pytest.mark.parametrize(
    ("model", "example"),
    [(Turned(), torch.randn(5, 5, 4)), (Contrast(), torch.randn(4, 9)), (Contrast(), torch.randn(9, 9))],
)
@pytest.mark.parametrize("rule", DIRECT)
def test_outputs_without_the_batch_first_are_refused(model, example, rule):
    (problem,) = falign.check(model, rule, example=example)
    assert "with twice the samples: a direct rule needs the batch as the first axis" in problem
    assert falign.check(model, "fa", example=example) == []


class Steps(nn.Module):
    """A recurrent net unrolled: its layers run once a step."""

    def __init__(self):
        super().__init__()
        self.state, self.inner, self.out = nn.Linear(6, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h, outputs = x.new_zeros(len(x), 6), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.inner(x[:, t]) + self.state(h))
            outputs.append(self.out(h))
        return torch.stack(outputs, 1)


def test_a_layer_that_runs_once_a_position_gets_that_positions_error():
    """The k-th call gets e_k B, whatever the length; written out with every input cut."""
    model, x = Steps().double(), torch.randn(5, 7, 4).double()
    falign.convert(model, "dfa", example=x)
    feedback = falign.feedback_state(model)
    assert {name: tuple(b.shape) for name, b in feedback.items()} == {"state": (3, 6), "inner": (3, 4), "out": (3, 6)}
    for length in (7, 3):
        x = torch.randn(5, length, 4).double()
        h, cuts, outputs = x.new_zeros(5, 6), [], []
        for t in range(length):
            cuts.append(("state", t, h))
            h = torch.tanh(model.inner.forward(x[:, t]) + model.state.forward(h.detach()))
            cuts.append(("out", t, h))
            outputs.append(model.out.forward(h.detach()))
        output = torch.stack(outputs, 1)
        (e,) = torch.autograd.grad(output.square().sum(), output, retain_graph=True)
        total = output.square().sum()
        for name, t, cut in cuts:
            total = total + (e[:, t] @ feedback[name] * cut).sum()
        with falign.backprop(model):
            expected = torch.autograd.grad(total, list(model.parameters()))
        model.zero_grad()
        model(x).square().sum().backward()
        assert (
            relative(
                {str(n): p.grad for n, p in enumerate(model.parameters())}, {str(n): g for n, g in enumerate(expected)}
            )
            <= 1e-13
        )
    assert falign.verify(model, x, lambda o: o.square().sum())
    falign.revert(model)
    assert falign.verify(falign.convert(model, "fa"), x, lambda o: o.square().sum())


def rule_of(output):
    return falign.ALL_RULES["drtp"](output=output)


@pytest.mark.parametrize("shape", [(8,), (8, 1)])
@pytest.mark.parametrize("whole", [True, False])
def test_the_targets_of_a_single_output_are_what_is_delivered(shape, whole):
    """−s·y·B for a yes or no: class 1 is a yes, and not the absence of class 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, _ = data(8)
    y = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1]).reshape(shape)
    y = y if whole else y.double()
    falign.convert(model, rule_of("sigmoid"), example=x)
    with falign.targets(model, y):
        F.binary_cross_entropy_with_logits(model(x), y.reshape(8, 1).double()).backward()
    h = torch.tanh(F.linear(x, model[0].weight, model[0].bias)).detach()
    carried = -(y.reshape(8, 1).double() / 8) @ falign.feedback_state(model)["2"] * (1 - h**2)
    assert relative({"w": model[0].weight.grad}, {"w": carried.T @ x}) <= 1e-12


def test_targets_that_cannot_be_meant_are_refused():
    x, _ = data(8)
    one = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    falign.convert(one, "drtp", example=x)
    with falign.targets(one, torch.ones(8, dtype=torch.long)):
        loss = one(x).square().sum()
        with pytest.raises(RuntimeError, match="softmax of a single output is always 1"):
            loss.backward()
    with falign.targets(one, torch.full((8,), 3)), pytest.raises(RuntimeError, match="classes up to 3 for a single"):
        one(x)
    flat = nn.Sequential(one, nn.Flatten(0))
    falign.revert(one)
    falign.convert(flat, rule_of("sigmoid"), example=x)
    with falign.targets(flat, torch.ones(8).double()), pytest.raises(RuntimeError, match="keep the axis of its one"):
        flat(x)


@pytest.mark.parametrize("ignored", [0, 3, -100])
def test_ignored_positions_teach_nothing(ignored):
    """Whatever class stands for padding: its positions have no error, and their targets are not delivered."""
    x, y = data(9)
    y = y.clamp_min(1)
    y[5:] = ignored
    y[:5][y[:5] == 3] = 2

    def hidden(inputs, targets):
        model = falign.convert(body(), "drtp", example=x)
        with falign.targets(model, targets):
            F.cross_entropy(model(inputs), targets, ignore_index=ignored).backward()
        return {"w": model[0].weight.grad}

    assert relative(hidden(x, y), hidden(x[:5], y[:5])) <= 1e-12
