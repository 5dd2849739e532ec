"""Linear probes of the output as direct feedback: what they converge to, and how they move."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import falign
from cases import batch, build, gradients, loss_of, relative, step
from falign.lab.data import load
from falign.rules import LinearProbe
from oracles import confined, probe


def perceptron(activation=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), activation(), nn.Linear(20, 16), activation(), nn.Linear(16, 4)).double()


def test_of_gaussian_inputs_it_becomes_the_mean_jacobian():
    """Stein's lemma: the regression of f on Gaussian x is E[∂f/∂x]; the network stands still, only B moves."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 4)).double()
    nn.init.eye_(network[0].weight)  # so that the input of the second layer is Gaussian
    model = falign.convert(network, LinearProbe(rate=0.02, ridge=1.0), example=torch.randn(8, 12).double())
    for _ in range(1500):
        model(torch.randn(64, 12, dtype=torch.float64))
    x = torch.randn(4000, 12, dtype=torch.float64)
    with torch.no_grad():
        slopes = 1 - torch.tanh(network[1](x)).square()
    jacobian = (network[3].weight @ torch.diag(slopes.mean(0)) @ network[1].weight).detach()
    found = falign.feedback_state(model)["1"]
    assert float((found - jacobian).norm() / jacobian.norm()) < 0.06


def test_a_linear_network_is_read_exactly():
    model = falign.convert(
        nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 6), nn.Linear(6, 3)).double(),
        LinearProbe(rate=1.0, ridge=1e-9),
        example=torch.randn(4, 5).double(),
    )
    x = torch.randn(40, 5, dtype=torch.float64)
    model(x)
    product = (model[2].weight @ model[1].weight).detach()
    seen = (x @ model[0].weight.T + model[0].bias).detach()
    centred = seen - seen.mean(0)
    found = falign.feedback_state(model)["1"]
    assert torch.allclose(centred @ found.T, centred @ product.T, atol=1e-6), "along all that the layer has seen"
    assert float((found - product).norm()) > 0.1, "nothing is known of directions in which it was silent"


def test_several_steps_are_those_of_the_algorithm():
    model, x = perceptron(), torch.randn(7, 100, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    falign.convert(model, LinearProbe(rate=0.3, ridge=0.2, rows=50), example=x[0])
    expected = np.zeros((4, 16))
    for batch_of in x:
        with torch.no_grad():
            inputs = model[:4](batch_of).numpy()
        expected = probe(expected, model(batch_of).detach().numpy(), inputs, rate=0.3, ridge=0.2, rows=50)
    np.testing.assert_allclose(falign.feedback_state(model)["4"].numpy(), expected, rtol=1e-9, atol=1e-13)


class Thrice(nn.Module):
    """One layer, run three times."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.seen = []

    def forward(self, x):
        self.seen = []
        for _ in range(3):
            self.seen.append(x.detach())
            x = torch.tanh(self.layer(x))
        return self.last(x)


def test_a_layer_that_runs_several_times_is_regressed_on_all_that_receive_an_error():
    torch.manual_seed(0)
    model, x = Thrice().double(), torch.randn(4, 20, 6, dtype=torch.float64)
    falign.convert(model, LinearProbe(rate=0.3, ridge=0.2, rows=60), example=x[0])
    expected = np.zeros((3, 6))
    for batch_of in x:
        output = model(batch_of).detach().numpy()
        inputs = torch.cat(model.seen[1:]).numpy()  # nothing wants an error at the first
        expected = probe(expected, np.tile(output, (2, 1)), inputs, rate=0.3, ridge=0.2, rows=60)
    np.testing.assert_allclose(falign.feedback_state(model)["layer"].numpy(), expected, rtol=1e-9, atol=1e-13)


def test_only_training_moves_it():
    model, (x, y) = build("mlp", "probe"), batch("mlp")
    step(model, x, y)
    before = falign.feedback_state(model)
    assert all(bool(matrix.any()) for name, matrix in before.items() if name != "0")
    model.eval()
    step(model, x, y)
    with torch.no_grad():
        model.train()(x)
    with falign.backprop(model):
        step(model, x, y)
    falign.measure.alignment(model, loss_of, x, y)
    falign.transport(model, x, lambda output: loss_of(output, y))
    model(x[:1])  # of one sample nothing can be regressed
    assert relative(falign.feedback_state(model), before) == 0


def test_of_a_silent_layer_nothing_is_learned():
    model = falign.convert(perceptron(nn.ReLU), "probe", example=torch.randn(4, 12).double())
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    step(model, torch.randn(16, 12).double(), torch.randint(4, (16,)))
    state = falign.feedback_state(model)
    assert not bool(state["2"].any())
    assert all(bool(matrix.isfinite().all()) for matrix in state.values())


def test_two_forwards_before_one_backward_keep_what_each_had():
    x, y = batch("mlp")
    model, apart = build("mlp", "probe"), build("mlp", "probe")
    (loss_of(model(x), y) + loss_of(model(2 * x), y)).backward()
    step(apart, x, y)
    step(apart, 2 * x, y)
    taken, expected = ({n: p.grad for n, p in one.named_parameters()} for one in (model, apart))
    assert relative(taken, expected) <= 1e-13


def test_it_is_in_the_state_and_goes_on_from_there():
    x, y = batch("mlp")
    model = build("mlp", "probe")
    step(model, x, y)
    saved = copy.deepcopy(model.state_dict())
    assert "4.feedback.B" in saved
    resumed = build("mlp", "probe", seed=5)
    resumed.load_state_dict(saved)
    assert relative(gradients(resumed, x, y), gradients(model, x, y)) == 0


def test_nothing_is_drawn():
    x = batch("mlp")[0]
    checked = falign.check(build("mlp"), "probe", example=x)
    assert {row.family for row in checked.rows} == {"zero at first"}
    assert checked.rows[1].shapes == ((7, 30),)
    (line,) = falign.check(build("mlp"), "probe", example=x, feedback="uniform")
    assert line == "rule 'probe' makes its feedback in training, from zero: pass no feedback="
    (line,) = falign.check(build("mlp"), "probe", example=x, scale=2.0)
    assert line == "rule 'probe' finds the size of its feedback in training: pass no scale="


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": 1.5}, "probe: rate is 1.5, expected a number from 0 to 1"),
        ({"ridge": 0.0}, "probe: ridge is 0.0, expected a number above 0"),
        ({"rows": 1}, "probe: rows is 1, expected a whole number of at least 2"),
        ({"positions": "some"}, "probe: positions is 'some', expected each or all"),
    ],
)
def test_options_out_of_range_are_said(options, said):
    with pytest.raises(ValueError, match=said):
        LinearProbe(**options)


def test_relu_networks_do_not_run_away_at_the_rates_of_backpropagation(data_folder):
    """LeNet with ReLU and maximum pooling, and nothing that normalises."""
    data = load("mnist-10k", folder=data_folder, progress=False)
    x, y = (data.train_images[:6400].float() / 255 - 0.13) / 0.31, data.train_labels[:6400]

    def loss_after(rule):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )  # fmt: skip
        falign.convert(model, rule, example=x[:8])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
        losses = []
        for one, classes in zip(x.split(64), y.split(64), strict=True):
            optimizer.zero_grad()
            losses.append(nn.functional.cross_entropy(model(one), classes))
            losses[-1].backward()
            optimizer.step()
        return float(torch.stack(losses[-10:]).detach().mean())

    assert loss_after("probe") < 1
    assert not loss_after(LinearProbe(limit=0.0)) < 2, "without the limit it does"


def test_no_error_drives_activity_out_beyond_the_limit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].weight.mul_(1e3)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
    falign.convert(model, falign.rules.DirectFeedbackAlignment(limit=1e-3), example=x)
    hidden = []
    model[0].register_forward_hook(lambda layer, args, output: hidden.append(output))
    output = model(x)
    hidden[0].retain_grad()
    nn.functional.cross_entropy(output, y).backward()
    error, seen = hidden[0].grad, hidden[0].detach()
    true = (output.softmax(1) - nn.functional.one_hot(y, 3)).detach() / 8
    plain = true @ falign.feedback_state(model)["1"]
    expected = confined(plain.numpy(), seen.numpy(), 1e-3)
    np.testing.assert_allclose(error.numpy(), expected, rtol=1e-12)
    assert float((error * seen).sum()) > -1e-6 * float(error.norm() * seen.norm())


@pytest.mark.parametrize("limit", [-1.0, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(ValueError, match="limit"):
        LinearProbe(limit=limit)
