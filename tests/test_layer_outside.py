"""A layer kind that no file of the package knows of does what the package's own kinds do.

Its reference is the dense layer whose weight is block-diagonal, with block-diagonal feedback.
"""

import os

import pytest
import torch
from torch import nn

import falign
from cases import CORE, gradients, loss_of, relative
from outside_layer import GroupedLinear
from test_layers import crosses_as_autograd

GROUPS = 3


def network(rule=None):
    """A perceptron, the middle of which is grouped."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 12), nn.Tanh(), GroupedLinear(12, 9, GROUPS), nn.ReLU(), GroupedLinear(9, 6, GROUPS), nn.Tanh(),
        nn.Linear(6, 4),
    ).double()  # fmt: skip
    return model if rule is None else falign.convert(model, rule, seed=0, example=batch()[0])


def batch():
    torch.manual_seed(1)
    return torch.randn(10, 8, dtype=torch.float64), torch.randint(4, (10,))


def dense(blocks):
    """(out, in / groups) as the block-diagonal (out, in) that it stands for."""
    return torch.block_diag(*blocks.detach().unflatten(0, (GROUPS, -1)))


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_an_error_crosses_it_as_autograd_carries_it(shape):
    crosses_as_autograd(GroupedLinear(6, 9, GROUPS), torch.randn(shape))


def test_feedback_alignment_is_that_of_the_dense_layer():
    x, y = batch()
    model = network("fa")
    feedback = falign.feedback_state(model)
    plain = nn.Sequential(
        *(
            nn.Linear(part.in_features, part.out_features).double() if isinstance(part, GroupedLinear) else part
            for part in falign.revert(network("fa"))
        )
    )
    grouped = [name for name, part in model.named_children() if isinstance(part, GroupedLinear)]
    with torch.no_grad():
        for name in grouped:
            plain[int(name)].weight.copy_(dense(model[int(name)].weight))
            plain[int(name)].bias.copy_(model[int(name)].bias)
    matrices = {name: dense(B) if name in grouped else B for name, B in feedback.items()}
    falign.convert(plain, "fa", feedback=matrices)
    expected = gradients(plain, x, y)
    taken = gradients(model, x, y)
    for name in grouped:  # of the dense weight the blocks alone are there
        mask = dense(torch.ones_like(model[int(name)].weight))
        expected[f"{name}.weight"] = expected[f"{name}.weight"] * mask
        taken[f"{name}.weight"] = dense(taken[f"{name}.weight"])
    assert relative(taken, expected) < 1e-13


@pytest.mark.parametrize("rule", sorted(CORE))
def test_the_public_functions_take_it(rule):
    x, y = batch()
    assert falign.check(network(), rule, example=x) == []
    model = network(rule)
    assert falign.verify(model, x, lambda output: loss_of(output, y))
    assert rule == "bp" or not falign.transport(model, x, lambda output: loss_of(output, y))
    assert len(falign.measure.alignment(model, loss_of, x, y).layers) == 4


def test_the_conservation_law_holds_of_it():
    x, y = batch()
    model = network("fa")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    law = falign.measure.ConservationLaw(model, optimizer, example=x)
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    report = law.report()
    assert report.holds
    assert report.conclusive
    assert len(report.laws) == 3


@pytest.mark.compiled
@pytest.mark.xdist_group("compiled")
@pytest.mark.skipif("FALIGN_TYPECHECK" in os.environ, reason="checked annotations break full graphs")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_it_compiles_whole(rule):
    x, y = batch()
    torch._dynamo.reset()
    eager, model = gradients(network(rule), x, y), network(rule)
    assert relative(gradients(model, x, y, torch.compile(model, fullgraph=True, backend="aot_eager")), eager) < 1e-13
