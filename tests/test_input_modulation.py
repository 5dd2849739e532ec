"""Feedback through the forward weights: what a perturbed input does to the layers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import falign
from cases import batch, build, loss_of, relative, step
from falign.rules import InputModulation


def perceptron(activation=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), activation(), nn.Linear(20, 16), activation(), nn.Linear(16, 4)).double()


def test_a_pass_is_that_of_the_definition():
    x = torch.randn(30, 12, dtype=torch.float64)
    model = falign.convert(perceptron(), InputModulation(rate=0.3), example=x)
    before = {name: matrix.numpy() for name, matrix in falign.feedback_state(model).items()}
    falign.follow(model, x, generator=torch.Generator().manual_seed(7))
    after = falign.feedback_state(model)
    p = torch.randn(30, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64).numpy()
    t, z = p @ before["0"], x.numpy()
    assert np.array_equal(after["0"].numpy(), before["0"]), "F is fixed"
    for name, layer in (("2", model[0]), ("4", model[2])):
        z = np.tanh(z @ layer.weight.detach().numpy().T + layer.bias.detach().numpy())
        t = t @ layer.weight.detach().numpy().T * (1 - z**2)
        product, size = p.T @ t / 30, np.linalg.norm(before[name])
        moved = 0.7 * before[name] + 0.3 * size * product / np.linalg.norm(product)
        np.testing.assert_allclose(after[name].numpy(), size * moved / np.linalg.norm(moved), rtol=1e-10, atol=1e-15)


def test_of_linear_layers_it_becomes_f_times_the_weights():
    """PEPITA's W₁F, of the first hidden layer; W₂W₁F of the second."""
    x = torch.randn(2000, 12, dtype=torch.float64)
    model = falign.convert(perceptron(nn.Identity), InputModulation(rate=1.0), example=x[:8])
    falign.follow(model, x, passes=20, generator=torch.Generator().manual_seed(0))
    state = falign.feedback_state(model)
    for name, expected in (
        ("2", state["0"] @ model[0].weight.detach().mT),
        ("4", state["0"] @ model[0].weight.detach().mT @ model[2].weight.detach().mT),
    ):
        assert float(nn.functional.cosine_similarity(state[name].flatten(), expected.flatten(), dim=0)) > 0.995


@pytest.mark.parametrize("case", ["mlp", "conv", "residual", "sequence"])
def test_every_network_keeps_the_sizes_and_the_definition(case):
    x, y = batch(case)
    model = falign.convert(build(case), "afa", example=x)
    before = falign.feedback_state(model)
    falign.follow(model, x)
    after = falign.feedback_state(model)
    assert all(float(after[name].norm() / before[name].norm()) == pytest.approx(1) for name in after)
    assert sum(not torch.equal(after[name], before[name]) for name in after) == len(after) - 1
    assert falign.verify(model, x, lambda output: loss_of(output, y))
    step(model, x, y)
    assert relative(falign.feedback_state(model), after) == 0, "between passes it stands still"
    resumed = falign.convert(build(case), "afa", example=x, seed=3)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    assert relative(falign.feedback_state(resumed), after) == 0


@pytest.mark.unchecked
def test_a_rate_out_of_range_is_said():
    with pytest.raises(ValueError, match="afa: rate is 0, expected a number above 0, at most 1"):
        InputModulation(rate=0)
