"""Where a network stopped being finite, and in which order its parts run."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Diverged(Exception):  # noqa: N818  # it is an outcome of a run, not a fault of the program
    """A run has left the finite numbers.

    Args:
        step: The step, counted from 1, whose loss or whose update is not finite.
        layer: The first layer that was not finite.
        what: "weights", "output", "buffers" or "loss".
    """

    def __init__(self, *, step: int, layer: str, what: str) -> None:
        super().__init__(f"the run diverged at step {step}: the {what} of layer {layer!r} stopped being finite")
        self.step = step
        self.layer = layer
        self.what = what


def running_order(model: nn.Module, forward: Callable[[], object]) -> dict[str, bool]:
    """Run a forward pass without gradients and note its parts in the order in which they ran.

    Args:
        model: The model.
        forward: Runs it once.

    Returns:
        {name of a module without parts of its own: whether its output was finite}.
    """
    seen: dict[str, bool] = {}
    with _hooks(model, seen), torch.no_grad():
        forward()
    return seen


@contextmanager
def _hooks(model: nn.Module, seen: dict[str, bool]) -> Iterator[None]:
    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple, output: Any) -> None:
            finite = not isinstance(output, Tensor) or bool(torch.isfinite(output).all())
            seen[name] = seen.get(name, True) and finite

        return note

    parts = {
        name: module
        for name, module in model.named_modules()
        if "feedback" not in name.split(".") and all(child == "feedback" for child, _ in module.named_children())
    }
    handles = [module.register_forward_hook(noting(name)) for name, module in parts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def finite(model: nn.Module) -> bool:
    """Whether all parameters and buffers are finite numbers."""
    return _finite(model.parameters()) and _finite(model.buffers())


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())


def locate(model: nn.Module, forward: Callable[[], object], *, done: int) -> Diverged:
    """Find the first layer that is not finite, once something is not.

    If weights are not finite, the last update made them so. Errors come from the output, so the first of
    these layers is the one that runs last. If all weights are finite, the pass itself overflowed, first in
    the layer that ran first.

    Args:
        model: The model as it was found.
        forward: Runs it on the batch at hand.
        done: Updates made so far.

    Returns:
        The exception to raise.
    """
    weights = {name for name, part in model.named_modules() if not _finite(part.parameters())}
    buffers = {name for name, part in model.named_modules() if not _finite(part.buffers())}
    ran = running_order(model, forward)
    if broken := [name for name in ran if name in weights]:
        return Diverged(step=done, layer=broken[-1], what="weights")
    if overflown := [name for name, was_finite in ran.items() if not was_finite]:
        return Diverged(step=done + 1, layer=overflown[0], what="output")
    if broken := [name for name in ran if name in buffers]:
        return Diverged(step=done, layer=broken[0], what="buffers")
    return Diverged(step=done + 1, layer=list(ran)[-1], what="loss")
