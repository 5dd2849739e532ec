"""Where a network stopped being finite, or ran away, and in which order its parts run."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor, nn

FAR, LONG = 10.0, 200
"""A run is stopped as diverged once its running loss was above ``FAR`` times where it began for ``LONG`` steps, and has
not halved in them ..."""
ABOVE = 2.0
"""... and has diverged if it ends with one above ``ABOVE`` times that."""
_MEMORY = 20
"""Steps over which the running loss is a mean."""
_FLOOR = 0.1
"""A loss below counts as this: else one batch without any would outweigh all others in a mean of logarithms."""


class Diverged(Exception):  # noqa: N818  # it is an outcome of a run, not a fault of the program
    """A run has left the finite numbers, or its loss what it began with.

    Args:
        step: The step, counted from 1, whose loss or whose update is not finite, or at which it was found out.
        layer: The first layer that was not finite, or the one that grew most.
        what: "weights", "output", "buffers" or "loss".
        how: What happened, in a clause; None: it stopped being finite.
    """

    def __init__(self, *, step: int, layer: str, what: str, how: str | None = None) -> None:
        how = how or f"the {what} of layer {layer!r} stopped being finite"
        super().__init__(f"the run diverged at step {step}: {how}")
        self.step = step
        self.layer = layer
        self.what = what


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """Where a run began, so that it can be told that it ran away.

    The loss that counts is the larger of the test loss before the first step and ln(classes), the cross-entropy of
    guessing: a network that stays above twice that does worse than none, whatever the noise in its labels. It is
    compared with a running geometric mean, because trainings that end well pass through single losses of thousands of
    times the start, by momentum, high rates and hard batches; in that mean a batch of a thousand times counts like
    ten of twice. What is on its way back is let go on to its end, and so is what is bad but not far off. Of 37
    trainings of a perceptron on the digits, by five rules at rates up to 3, those that ended well or at chance passed
    through running losses of up to 33 times the start, and ended with one of 1.02 times at most; those that had run
    away ended with 8 times to 15 million times.

    Attributes:
        classes: Number of classes.
        norms: {layer: norm of its weight before the first step}.
    """

    classes: int
    norms: dict[str, float]

    def loss(self, tested: float | None) -> float:
        """What losses are compared with, from the test loss before the first step."""
        return max(tested or 0.0, log(self.classes), log(2))

    def level(self, before: float, loss: float, tested: float | None) -> float:
        """The running mean of log(loss / start) after a step.

        Args:
            before: The same before it, 0 at first.
            loss: Of the step's batch.
            tested: The test loss before the first step.
        """
        return before + (log(max(loss / self.loss(tested), _FLOOR)) - before) / _MEMORY

    def grown(self, model: nn.Module) -> tuple[str, float]:
        """The layer whose weights grew most, and by which factor; a layer of zeros at the start does not count."""
        now = norms(model, self.norms)
        factors = {name: now[name] / norm for name, norm in self.norms.items() if norm > 0} or {next(iter(now)): 1.0}
        return max(factors.items(), key=lambda item: item[1])


def norms(model: nn.Module, layers: Iterable[str]) -> dict[str, float]:
    """{layer: norm of its weight}, in float64: squares of large weights exceed the range of float32."""
    return {name: float(model.get_submodule(name).weight.detach().double().norm()) for name in layers}  # pyright: ignore


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
