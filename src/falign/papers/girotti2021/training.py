"""Linear and ReLU PyTorch networks under a rule, from given weights and feedback."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import falign


def converted(W: Sequence[Tensor], B: Sequence[Tensor], rule: str, activation: str = "linear") -> nn.Sequential:
    """A network without biases of weights W_1, …, W_L, under a rule with feedback B_2, …, B_L."""
    layers = [nn.Linear(part.shape[1], part.shape[0], bias=False, dtype=part.dtype) for part in W]
    with torch.no_grad():
        for layer, part in zip(layers, W, strict=True):
            layer.weight.copy_(part)
    between = nn.ReLU if activation == "relu" else nn.Identity
    parts = [part for layer in layers for part in (layer, between())]
    model = nn.Sequential(*parts[:-1])
    names = [name for name, part in model.named_children() if isinstance(part, nn.Linear)][1:]
    falign.convert(model, rule, feedback=None if rule == "bp" else dict(zip(names, B, strict=True)))
    return model


def descend(
    model: nn.Sequential, X: Tensor, Y: Tensor, rate: float, batches: Sequence[Tensor | slice]
) -> Iterator[nn.Sequential]:
    """Steps of gradient descent on the mean of ½|f - y|²; yields the model before every step and after the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for batch in batches:
        yield model
        x, y = X[batch], Y[batch]
        optimizer.zero_grad()
        ((model(x) - y).square().sum() / (2 * len(x))).backward()
        optimizer.step()
    yield model


@torch.no_grad()
def product(model: nn.Sequential) -> Tensor:
    """``W_L…W_1``."""
    first, *others = [part.weight for part in model if isinstance(part, nn.Linear)]
    whole = first.clone()
    for weight in others:
        whole = weight @ whole
    return whole


@contextmanager
def one_thread() -> Iterator[None]:
    """Within this context torch has one thread, so that sums are added in the same order on any number of cores.

    Where a training rests at a saddle, rounding decides when it leaves.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
