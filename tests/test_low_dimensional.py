"""Direct feedback of low rank, of which both factors learn."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import falign
from cases import batch, build, gradients, loss_of, relative, step
from falign.rules import LowDimensionalFeedback
from oracles import oja, softmax


def matrices(model):
    """B of every layer, P's and Q's product."""
    return {
        name: part.feedback.matrices()[part.feedback.first_end].detach()
        for name, part in model.named_modules()
        if "feedback" in part._modules
    }


def test_one_step_is_that_of_the_definition():
    x, y = batch("mlp")
    model = build("mlp", LowDimensionalFeedback(rank=3, rate=0.2))
    before = {name: value.numpy() for name, value in falign.feedback_state(model).items()}
    with torch.no_grad():
        inputs, output = model[:6](x).numpy(), model(x).numpy()
    step(model, x, y)
    error = (softmax(output) - np.eye(7)[y]) / 16
    q, p = before["6"], before["6.P"]
    assert q.shape == (3, 25)
    np.testing.assert_allclose(p @ p.T, np.eye(3), atol=1e-14)
    p = oja(p, error, 0.2)  # it moves before it delivers
    heard = (p @ error.T @ inputs, (error @ p.T @ q) * (1 - inputs**2))
    np.testing.assert_allclose(model[6].feedback.B.grad.numpy(), heard[0], rtol=1e-12, atol=1e-15)
    with torch.no_grad():
        below = model[:4](x).numpy()
    np.testing.assert_allclose(model[4].weight.grad.numpy(), heard[1].T @ below, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(falign.feedback_state(model)["6.P"].numpy(), p, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_of_full_rank_it_is_direct_kolen_pollack(rate):
    """B = Pᵀ Q takes B's own steps as long as P is orthogonal, and Oja's rule leaves that where it is."""
    x, y = batch("conv")
    model, other = build("conv", LowDimensionalFeedback(rank=9, rate=rate)), build("conv", "dkp")
    for one in (model, other):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            step(one, x, y)
            optimizer.step()
    assert relative(matrices(model), matrices(other)) <= 1e-12
    weights = [{n: p for n, p in one.named_parameters() if "feedback" not in n} for one in (model, other)]
    assert relative(*weights) <= 1e-12


def test_the_error_is_heard_where_it_is_largest():
    random = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=random, dtype=torch.float64))[0]
    errors = torch.randn(400, 40, 6, generator=random, dtype=torch.float64)
    errors = errors * torch.tensor([3.0, 2.0, 0.3, 0.2, 0.1, 0.1], dtype=torch.float64) @ basis.T
    rule = LowDimensionalFeedback(rank=2, rate=0.1)
    p = rule.factors((6, 10), random)["P"]
    for e in errors:
        p = rule.observe_error(p, e, e)
    assert torch.allclose(p @ p.mT, torch.eye(2, dtype=torch.float64), atol=1e-3)
    assert float((p @ basis[:, 2:]).norm()) < 0.05


@pytest.mark.parametrize("factor", [2.0**16, float("inf"), 0.0])
def test_only_training_moves_it_and_no_scale_of_the_loss_does(factor):
    model, (x, y) = build("mlp", LowDimensionalFeedback(rank=2, rate=0.3)), batch("mlp")
    still, moved = copy.deepcopy(model), copy.deepcopy(model)
    (factor * loss_of(model(x), y)).backward()
    if factor == 2.0**16:
        step(moved, x, y)
    assert relative(falign.feedback_state(model), falign.feedback_state(moved)) <= 1e-15
    step(still.eval(), x, y)
    falign.measure.alignment(still.train(), loss_of, x, y)
    still(x)
    assert torch.equal(still[2].feedback.P, build("mlp", LowDimensionalFeedback(rank=2))[2].feedback.P)


def test_it_is_in_the_state_and_goes_on_from_there():
    x, y = batch("mlp")
    model = build("mlp", LowDimensionalFeedback(rank=2, rate=0.3))
    step(model, x, y)
    resumed = build("mlp", LowDimensionalFeedback(rank=2, rate=0.3), seed=5)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    assert relative(gradients(resumed, x, y), gradients(model, x, y)) == 0
    assert relative(falign.feedback_state(resumed), falign.feedback_state(model)) == 0


def test_feedback_that_is_given_keeps_what_a_rank_can_hold():
    x, _ = batch("mlp")
    given = {"4": torch.randn(7, 30, dtype=torch.float64), "6": torch.randn(7, 25, dtype=torch.float64)}
    model = falign.convert(build("mlp"), LowDimensionalFeedback(rank=3), example=x, feedback=given)
    p = model[6].feedback.P
    assert torch.allclose(matrices(model)["6"], p.mT @ p @ given["6"], atol=1e-14)
    whole = falign.convert(build("mlp"), "ldfa", example=x, feedback=given)
    assert torch.allclose(matrices(whole)["4"], given["4"], atol=1e-14)


class Heads(nn.Module):
    """Two outputs of different sizes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh())
        self.a, self.b = nn.Linear(9, 4), nn.Linear(9, 3)

    def forward(self, x):
        z = self.body(x)
        return self.a(z), self.b(z)


@pytest.mark.parametrize("rule", [LowDimensionalFeedback(rank=2, rate=0.3), "ebd"])
def test_several_outputs_have_factors_each(rule):
    x = torch.randn(7, 6, dtype=torch.float64)
    model = falign.convert(Heads().double(), rule, example=x, output=(0, 1))
    assert falign.verify(model, x, lambda out: out[0].square().mean() + out[1].exp().mean())
    before = falign.feedback_state(model)
    out = model(x)
    (out[0].square().mean() + out[1].exp().mean()).backward()
    moved = {key for key, value in falign.feedback_state(model).items() if not torch.equal(value, before[key])}
    expected = {"body.2.P", "body.2.P1"} if rule != "ebd" else {"body.2", "body.2.B1"}
    assert expected <= moved


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "ldfa: rank is 0, expected a whole number of at least 1"),
        ({"rate": -0.1}, "ldfa: rate is -0.1, expected a number from 0 to 1"),
    ],
)
def test_options_out_of_range_are_said(options, said):
    with pytest.raises(ValueError, match=said):
        LowDimensionalFeedback(**options)
