"""A network of the zoo: how it is made, what it runs on, and what is expected of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import falign

RULES = ("fa", "usf", "kp", "adafa", "dfa")
LAYERWISE = ("fa", "usf", "kp", "adafa")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A network, in float64, from a seed.

    Attributes:
        name: unique.
        family: what it is one of, for the table.
        make: gives (network, example); in either everything floating is made double afterwards.
        output: which tensor of what the network returns has the loss; as for ``falign.convert``.
        refused: {rule: words of the refusal}, where the weights that meet errors are computed from parameters.
        cut: what direct rules cut, if not all layers.
        slow: whether it is left to the slow tests.
        perturbed: size of the noise on the weights, which libraries initialise near zero.
        end: the layer behind which only operations without parameters follow: there the error of direct rules begins.
        steps: number of calls of what runs step by step.
        channels: whether axis 1 of the output are its features.
        inputs: whether the inputs may want gradients.
        vectors: parameters of one axis that have feedback.
        activities: parameters that are no weights: they may have no feedback.
    """

    name: str
    family: str
    make: Callable[[], tuple[nn.Module, Any]]
    output: Any = None
    refused: dict[str, str] = field(default_factory=dict)
    cut: tuple[str, ...] = ()
    slow: bool = False
    perturbed: float = 0.0
    end: str | None = None
    steps: int = 4
    channels: bool = False
    inputs: bool = True
    vectors: tuple[str, ...] = ()
    activities: tuple[str, ...] = ()

    def build(self) -> tuple[nn.Module, Any]:
        """The network in training mode, and its example."""
        with seeded(1):
            net, x = self.make()
            net = net.double().train()
            for module in net.modules():
                if type(module).__name__ == "_SpectralNorm":  # in training it moves with every look at the weight
                    module.eval()
            if self.perturbed:
                with torch.no_grad():
                    for parameter in net.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=self.perturbed)
        return net, tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, x)

    def picked(self, result: Any) -> Tensor:
        """The tensor that has the loss."""
        if self.output is None:
            return result
        if callable(self.output):
            return self.output(result)
        return getattr(result, self.output) if hasattr(result, str(self.output)) else result[self.output]

    def difference(self, result: Any) -> Tensor:
        """From numbers of a seed."""
        y = self.picked(result)
        return y - torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def loss(self, result: Any) -> Tensor:
        """Half the mean squared difference."""
        return 0.5 * self.difference(result).square().mean()

    def error(self, result: Any) -> Tensor:
        """The gradient of the loss at the output."""
        difference = self.difference(result).detach()
        return difference / difference.numel()

    def run(self, net: nn.Module, x: Any) -> Tensor:
        """The loss of a forward; what is random in it is the same in every call."""
        torch.manual_seed(3)
        return self.loss(call(net, x))

    def __str__(self) -> str:
        return self.name


def call(net: nn.Module, x: Any) -> Any:
    """Run a network: a tuple is positional arguments, a dict keyword arguments."""
    if isinstance(x, dict):
        return net(**x)
    return net(*x) if isinstance(x, tuple) and not hasattr(x, "_fields") else net(x)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def convert(entry: Entry, net: nn.Module, x: Any, rule: str) -> nn.Module:
    """Convert as a user does."""
    options = {}
    if falign.ALL_RULES[rule].wiring == "direct":
        options = {"output": entry.output, "cut": entry.cut or "layers"}
    return falign.convert(net, rule, seed=2, example=x, **options)


def relative(came: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> tuple[float, str]:
    """(the largest distance of a gradient, by its size or by a thousandth of that of all, whose it is)."""
    whole = sum(float(g.square().sum()) for g in expected.values() if g is not None) ** 0.5
    worst, where = 0.0, ""
    for name, should in expected.items():
        got = came.get(name)
        if got is None or should is None:
            zero = not any(bool(g.any()) for g in (got, should) if g is not None)
            error = 0.0 if zero else float("inf")
        else:
            error = float((got - should).norm()) / max(float(should.norm()), 1e-3 * whole, 1e-300)
        if not error <= worst:
            worst, where = error, name
    return worst, where


def wanting(x: Any, entry: Entry | None = None) -> Any:
    """A copy of an example whose floating tensors want gradients, if the network's may."""
    if entry is not None and not entry.inputs:
        return x
    return tree_map(
        lambda t: t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t, x
    )


def gradients_of(net: nn.Module, x: Any = None) -> dict[str, Tensor | None]:
    """Of the parameters that are no feedback, and of the inputs."""
    named = {n: p.grad for n, p in net.named_parameters() if "feedback" not in n.split(".")}
    inputs = [t for t in tree_leaves(x) if isinstance(t, Tensor) and t.requires_grad]
    return named | {f"input {number}": t.grad for number, t in enumerate(inputs)}
