"""What measuring costs in depth: calls are counted, for times are noise."""

import cProfile
import pstats
from collections.abc import Callable

import pytest
import torch
from torch import nn

import falign
from falign.measure import ConservationLaw, alignment

pytestmark = pytest.mark.unchecked  # the checks of annotations would be counted too


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def straight(depth: int) -> nn.Module:
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 3))


def residual(depth: int) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(depth)), nn.Linear(4, 3))


def calls(what: Callable[[], object]) -> int:
    profile = cProfile.Profile()
    profile.runcall(what)
    return int(pstats.Stats(profile).total_calls)  # pyright: ignore[reportAttributeAccessIssue]


def costs(model: nn.Module, rule: str) -> dict[str, int]:
    x, y = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    falign.convert(model, rule, seed=0, example=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = nn.functional.cross_entropy
    alignment(model, loss, x, y, optimizer=optimizer)  # what the first time alone costs
    found = {"alignment": calls(lambda: alignment(model, loss, x, y, optimizer=optimizer))}
    laws = []
    found["law"] = calls(lambda: laws.append(ConservationLaw(model, optimizer, example=x)))

    def step():
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    step()
    found["step"] = calls(step)
    found["report"] = calls(laws[0].report)
    assert laws[0].report()
    return found


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_measuring_is_linear_in_depth(rule):
    short, long = costs(straight(20), rule), costs(straight(80), rule)
    grown = {name: long[name] / short[name] for name in long}
    assert max(grown.values()) < 4.4, grown


def test_of_a_residual_network_each_layer_is_summed_once():
    """Every layer feeds all later ones: pairs are quadratic in number, but sums over weights are not."""
    from falign.measure.law import _weights

    def sums(depth: int) -> int:
        model, seen = residual(depth), []
        original = _weights._pieces
        _weights._pieces = lambda *args: (seen.append(args[0]), original(*args))[1]
        try:
            costs(model, "fa")
        finally:
            _weights._pieces = original
        return len(seen)

    assert sums(32) < 4.4 * sums(8)
