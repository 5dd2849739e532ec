"""Divergence of a training: the layer that was first not finite, or a loss that stays far above where it began."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import hypot, log
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from falign._expand import Product

RUNAWAY_FACTOR, RUNAWAY_STEPS = 10.0, 200
"""A run is stopped once its running loss has been above ``RUNAWAY_FACTOR`` times the initial one for ``RUNAWAY_STEPS``
steps without halving."""
FINAL_FACTOR = 2.0
"""A run that ends with a running loss above ``FINAL_FACTOR`` times the initial one has diverged, too."""
_WINDOW = 20
"""Time constant of the running mean of the log loss, in steps."""
_SMALLEST_RATIO = 0.1
"""Smaller ratios of loss to initial loss count as this one: a batch with a loss of almost 0 would otherwise outweigh
all others in a mean of logarithms."""


class Diverged(Exception):  # noqa: N818  # it is an outcome of a run, not a fault of the program
    """A training has diverged: something in it is not finite, or its loss stays far above the initial one.

    Args:
        step: The step, counted from 1, whose loss or update is not finite, or at which a runaway loss was noticed.
        layer: The first layer that is not finite, or the one whose weights grew most.
        what: "weights", "output", "buffers" or "loss".
        how: What happened, in a clause; None says that ``what`` of ``layer`` stopped being finite.
    """

    def __init__(self, *, step: int, layer: str, what: str, how: str | None = None) -> None:
        how = how or f"the {what} of layer {layer!r} stopped being finite"
        super().__init__(f"the run diverged at step {step}: {how}")
        self.step = step
        self.layer = layer
        self.what = what


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """Loss and weights of a network before its first step, by which a runaway training is recognised.

    The initial loss is the larger of the test loss before the first step and ln(classes), the cross-entropy of
    guessing: a network that stays above twice that does worse than guessing, whatever the noise in its labels. It is
    compared with a running geometric mean, because trainings that end well pass through single losses of thousands of
    times the initial one, by momentum, high rates and hard batches; in that mean a batch of a thousand times counts
    like ten of twice. A loss that is falling again may go on, and so may one that is bad but not far off. Of 37
    trainings of a perceptron on the digits, by five rules at rates up to 3, those that ended well or at chance passed
    through running losses of up to 33 times the initial one, and ended with one of 1.02 times at most; those that had
    run away ended with 8 times to 15 million times.

    Attributes:
        classes: Number of classes.
        weight_norms: {layer: norm of its weights before the first step}.
    """

    classes: int
    weight_norms: dict[str, float]

    def loss(self, initial_test_loss: float | None) -> float:
        """Return the initial loss that later ones are compared with."""
        return max(initial_test_loss or 0.0, log(self.classes), log(2))

    def update_level(self, level: float, loss: float, initial_test_loss: float | None) -> float:
        """Return the running mean of log(loss / initial loss) after one more step.

        Args:
            level: The running mean before the step, 0 at first.
            loss: The loss of the step's batch.
            initial_test_loss: The test loss before the first step.
        """
        ratio = max(loss / self.loss(initial_test_loss), _SMALLEST_RATIO)
        return level + (log(ratio) - level) / _WINDOW

    def most_grown(self, model: nn.Module) -> tuple[str, float]:
        """Return the layer whose weights grew most, and by which factor; layers that began at zero do not count."""
        now = weight_norms(model, self.weight_norms)
        factors = {name: now[name] / norm for name, norm in self.weight_norms.items() if norm > 0}
        return max((factors or {next(iter(now), ""): 1.0}).items(), key=lambda item: item[1])


def weighted_layers(model: nn.Module) -> list[str]:
    """Name the modules that have weights of their own, recurrent ones and embeddings included; biases are none."""
    return [
        name
        for name, module in model.named_modules()
        if "feedback" not in name.split(".") and any(each.dim() > 1 for each in module.parameters(recurse=False))
    ]


def weight_norms(model: nn.Module, layers: Iterable[str]) -> dict[str, float]:
    """Return {layer: norm of its weights}, summed in float64: squares of large weights exceed the range of float32."""
    return {
        name: hypot(*(float(each.detach().double().norm()) for each in parameters if each.dim() > 1))
        for name, parameters in ((name, model.get_submodule(name).parameters(recurse=False)) for name in layers)
    }


def running_order(model: nn.Module, forward: Callable[[], object]) -> dict[str, bool]:
    """Run a forward pass without gradients and note the modules in the order in which they ran.

    Args:
        model: The model.
        forward: Runs it once.

    Returns:
        {name of a module without children: whether its output was finite}.
    """
    finite_outputs: dict[str, bool] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple, output: Any) -> None:
            finite = _all_finite(part for part in tree_leaves(output) if isinstance(part, Tensor))
            finite_outputs[name] = finite_outputs.get(name, True) and finite

        return note

    # A converted layer has one child, its feedback, or children for its products, and still counts as a leaf.
    leaves = {
        name: module
        for name, module in model.named_modules()
        if "feedback" not in name.split(".") and not isinstance(module, Product)
        if all(child == "feedback" or isinstance(part, Product) for child, part in module.named_children())
    }
    handles = [module.register_forward_hook(hook_for(name)) for name, module in leaves.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return finite_outputs


def is_finite(model: nn.Module) -> bool:
    """Tell whether all parameters and buffers are finite numbers."""
    return _all_finite(model.parameters()) and _all_finite(model.buffers())


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())


def locate(model: nn.Module, forward: Callable[[], object], *, steps: int) -> Diverged:
    """Find the first layer that is not finite, once something is not.

    Args:
        model: The model as it was found.
        forward: Runs it on the batch at hand.
        steps: Steps done so far.

    Returns:
        The exception to raise.
    """
    weights = {name for name, module in model.named_modules() if not _all_finite(module.parameters())}
    buffers = {name for name, module in model.named_modules() if not _all_finite(module.buffers())}
    finite_outputs = running_order(model, forward)
    # If weights are not finite, the last update made them so; errors travel from the output to the input, so the
    # first layer to break was the last one to run. If all weights are finite, the forward pass itself overflowed.
    if broken := [name for name in finite_outputs if name in weights]:
        return Diverged(step=steps, layer=broken[-1], what="weights")
    if overflown := [name for name, finite in finite_outputs.items() if not finite]:
        return Diverged(step=steps + 1, layer=overflown[0], what="output")
    if broken := [name for name in finite_outputs if name in buffers]:
        return Diverged(step=steps, layer=broken[0], what="buffers")
    return Diverged(step=steps + 1, layer=list(finite_outputs)[-1], what="loss")
