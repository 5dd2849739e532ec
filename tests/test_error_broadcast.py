"""Direct feedback that is the running correlation of activity and error: how it moves, and what does not move it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import falign
from cases import batch, build, gradients, loss_of, relative, step
from falign.rules import ErrorBroadcast
from oracles import broadcast, softmax


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def batches(count=6):
    random = torch.Generator().manual_seed(2)
    x = torch.randn(count, 10, 12, generator=random, dtype=torch.float64)
    return [(one, torch.randint(4, (10,), generator=random)) for one in x]


def changes(model, before):
    return {name: matrix - before[name] for name, matrix in falign.feedback_state(model).items() if name != "0"}


@pytest.mark.parametrize("sign", [1, -1])
def test_several_steps_are_those_of_the_algorithm(sign):
    model = falign.convert(perceptron(), ErrorBroadcast(forgetting=0.9, sign=sign), example=batches()[0][0])
    expected = {name: b.numpy().copy() for name, b in falign.feedback_state(model).items()}
    weights = [(model[i].weight.detach().numpy(), model[i].bias.detach().numpy()) for i in (0, 2, 4)]
    for x, y in batches():
        z = [x.numpy()]
        for w, b in weights:
            z.append(np.tanh(z[-1] @ w.T + b))
        output = z[-2] @ weights[-1][0].T + weights[-1][1]
        error = (softmax(output) - np.eye(4)[y]) / 10
        for name, inputs in (("2", z[1]), ("4", z[2])):
            expected[name] = broadcast(expected[name], error, inputs, 0.9, sign)
        model.zero_grad()
        loss_of(model(x), y).backward()
        delta = (error @ expected["4"]) * (1 - z[2] ** 2)  # carried by the B that this very batch has moved
        np.testing.assert_allclose(model[2].weight.grad.numpy(), delta.T @ z[1], rtol=1e-12, atol=1e-15)
    for name in ("2", "4"):
        np.testing.assert_allclose(falign.feedback_state(model)[name].numpy(), expected[name], rtol=1e-12, atol=1e-15)


def test_that_never_forgets_is_direct_feedback_alignment():
    x, y = batch("conv")
    taken, expected = build("conv", ErrorBroadcast(forgetting=1.0)), build("conv", "dfa")
    assert relative(gradients(taken, x, y), gradients(expected, x, y)) == 0


def test_a_step_along_it_lowers_the_correlation():
    """½|R|² of a batch falls if activity moves along -e R, with sign 1; that is what the paper minimises."""
    rows = torch.Generator().manual_seed(0)
    x, e = (torch.randn(50, n, generator=rows, dtype=torch.float64) for n in (7, 3))
    start = torch.zeros(3, 7, dtype=torch.float64)
    rule = ErrorBroadcast(forgetting=0.0)
    correlation = rule.observe_error(start, e, x)
    after = rule.observe_error(start, e, x - 0.1 * e @ correlation)
    assert float(after.norm()) < float(correlation.norm())
    contrary = ErrorBroadcast(forgetting=0.0, sign=-1).observe_error(start, e, x)
    assert torch.equal(contrary, -correlation)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-20])
def test_the_scale_of_the_loss_changes_nothing(scale):
    model, scaled = (build("mlp", ErrorBroadcast(forgetting=0.5)) for _ in range(2))
    x, y = batch("mlp")
    loss_of(model(x), y).backward()
    (scale * loss_of(scaled(x), y)).backward()
    assert relative(falign.feedback_state(scaled), falign.feedback_state(model)) <= 1e-15


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 0.0])
def test_an_overflow_or_no_error_at_all_moves_nothing(factor):
    model = build("mlp", ErrorBroadcast(forgetting=0.5))
    before = falign.feedback_state(model)
    (factor * loss_of(model(batch("mlp")[0]), batch("mlp")[1])).backward()
    assert relative(falign.feedback_state(model), before) == 0


def test_samples_without_an_error_do_not_count():
    model, apart = (build("mlp", ErrorBroadcast(forgetting=0.5)) for _ in range(2))
    x, y = batch("mlp")
    padded = torch.where(torch.arange(16) < 10, y, -100)
    loss_of(model(x), padded).backward()
    loss_of(apart(x[:10]), y[:10]).backward()
    assert relative(falign.feedback_state(model), falign.feedback_state(apart)) <= 1e-14


def test_two_forwards_before_one_backward_move_it_twice():
    x, y = batch("mlp")
    model, apart = (build("mlp", ErrorBroadcast(forgetting=0.9)) for _ in range(2))
    before = falign.feedback_state(model)
    (loss_of(model(x), y) + loss_of(model(x), y)).backward()
    step(apart, x, y)
    step(apart, x, y)
    assert relative(changes(model, before), changes(apart, before)) <= 1e-12


def test_only_training_moves_it():
    model, (x, y) = build("mlp", ErrorBroadcast(forgetting=0.5)), batch("mlp")
    step(model, x, y)
    before = falign.feedback_state(model)
    model.eval()
    step(model, x, y)
    model.train()(x)  # without a backward
    with falign.backprop(model):
        step(model, x, y)
    falign.measure.alignment(model, loss_of, x, y)
    assert falign.verify(model, x, lambda output: loss_of(output, y))
    falign.transport(model, x, lambda output: loss_of(output, y))
    assert relative(falign.feedback_state(model), before) == 0


@pytest.mark.parametrize("way", ["inside", "grad", "offload"])
def test_every_backward_moves_it_once(way):
    """With activation checkpointing, by torch.autograd.grad, and where saved tensors are copies."""
    model, plain = (falign.convert(perceptron(), ErrorBroadcast(forgetting=0.5)) for _ in range(2))
    ((x, y),) = batches(1)
    loss_of(plain(x), y).backward()
    if way == "inside":
        model[1].forward = lambda z: checkpoint(torch.tanh, z, use_reentrant=False)
        loss_of(model(x), y).backward()
    elif way == "grad":
        torch.autograd.grad(loss_of(model(x), y), list(model.parameters()))
    else:
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(model(x), y)
        loss.backward()
    assert relative(falign.feedback_state(model), falign.feedback_state(plain)) == 0


def test_it_is_in_the_state_and_goes_on_from_there():
    x, y = batch("mlp")
    model = build("mlp", ErrorBroadcast(forgetting=0.5))
    step(model, x, y)
    resumed = build("mlp", ErrorBroadcast(forgetting=0.5), seed=5)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    assert relative(gradients(resumed, x, y), gradients(model, x, y)) == 0
    assert relative(falign.feedback_state(resumed), falign.feedback_state(model)) == 0


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"forgetting": 1.5}, "ebd: forgetting is 1.5, expected a number from 0 to 1"),
        ({"sign": 0}, "ebd: sign is 0, expected 1 .the paper. or -1"),
        ({"positions": "some"}, "ebd: positions is 'some', expected each or all"),
    ],
)
def test_options_out_of_range_are_said(options, said):
    with pytest.raises(ValueError, match=said):
        ErrorBroadcast(**options)
