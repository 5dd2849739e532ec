"""Find the parameters that carried the error in a backward pass: weight transport, seen where it happens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from falign._attached import Feedback
from falign._convert import targets
from falign._labels import ERROR, ErrorWatch
from falign._preserve import force_eager, preserve_generators
from falign._show import Sheet, Shown
from falign._survey import call, gradients_aside, plain_copy
from falign._wiring import feedbacks, wirings


class Transported(Shown, dict[str, str]):
    """{parameter: the operation in which it carried the error}; empty where no weight did. Prints as a table."""

    def _sheet(self) -> Sheet:
        if not self:
            return Sheet(head="no parameter carried the error")
        return Sheet(table=[("parameter", "carried the error in"), *self.items()], left=(0, 1))


def transport(
    model: nn.Module, x: Any, loss_fn: Callable[[Any], Tensor], *, target: Tensor | None = None
) -> Transported:
    """Run a batch forward and back, and list the parameters that carried the error: true weight transport.

    Every operation of the backward pass is looked at as it runs. A parameter, or whatever is made of parameters alone
    (views, casts, scaled, normalised and merged weights), carried the error where it is an operand together with an
    error, and the operation is no elementwise scaling: products of all kinds, convolutions, distances, fused recurrent
    and attention kernels, a broadcast product with a matrix that is then summed, and any kernel that is not known. The
    gradient of a converted layer's own weight is no transport, nor is what leads from there to the parameters that it
    is made of. Feedback is not counted, whatever it was made from: c · sign(W) is one bit of the weight, which its rule
    says.

    A copy of the model is used; the model, its gradients, its buffers and the random generators stay as they are.
    Compiled parts run uncompiled.

    Args:
        model: any model, converted or not.
        x: the batch (a tuple: positional arguments, a dict: keyword arguments).
        loss_fn: what the model returns -> scalar loss.
        target: the targets, for a rule that needs them: class indices (batch, …), or of the output's shape.

    Returns:
        {parameter: operation}, empty where no error passed through a weight. Under backpropagation all weights but
        those of the first layer are in it.

    Raises:
        TypeError: the model is no module, or loss_fn no function.
        ValueError: the model does not run on x, or the loss is not a finite scalar that depends on the parameters.
        RuntimeError: a layer came into the model after ``convert``.
    """
    wirings(model)
    with gradients_aside(model):
        twin = plain_copy(model)
        with uncompiled_passes(twin, target):
            return run_backward(twin, x, loss_fn)


@contextmanager
def uncompiled_passes(twin: nn.Module, target: Tensor | None) -> Iterator[None]:
    """Run passes of a copy uncompiled and with gradients, and put the generators back afterwards."""
    for wiring in wirings(twin):
        wiring.lenient = True  # what carries the error is to be listed, and not refused
    known = targets(twin, target) if target is not None and wirings(twin) else nullcontext()
    with force_eager(), preserve_generators(twin), torch.enable_grad(), known:
        yield


def run_backward(twin: nn.Module, x: Any, loss_fn: Callable[[Any], Tensor]) -> Transported:
    """Run a copy of a model forward and back, leaving gradients in its parameters; list what carried the error."""
    parts = [part for part in twin.modules() if isinstance(part, Feedback)]
    watch = ErrorWatch(
        twin,
        [layer for layer in twin.modules() if isinstance(layer._modules.get("feedback"), Feedback)],
        x,
        [p for part in parts for p in (*part.parameters(), *part.buffers(), part.matrix)],
        {id(p) for part in parts for p in part.parameters()},
        multiplied=[name for name, part in feedbacks(twin).items() if part.parameter is not None] if parts else (),
    )
    try:
        with watch:
            loss = check_loss(compute_loss(twin, x, loss_fn))
            seed = torch.ones_like(loss)  # given by hand, so that the error has a label from its first operation on
            watch.label(seed, frozenset((ERROR,)))
            torch.autograd.backward(loss, seed)
    finally:
        watch.remove()
    uses = watch.uses(parameter.grad for parameter in twin.parameters())
    return Transported({name: use.operation for name, use in uses.items()})


def compute_loss(model: nn.Module, x: Any, loss_fn: Callable[[Any], Any]) -> Any:
    """Compute the loss of a batch.

    Raises:
        TypeError: the function is none.
        ValueError: the model does not run on the batch.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is a {type(loss_fn).__name__}, expected a function of what the model returns")
    return loss_fn(run_model(model, x))


def run_model(model: nn.Module, x: Any) -> Any:
    """Run a model on a batch.

    Raises:
        ValueError: it does not run on it; what this package refuses on the way is passed on as it is.
    """
    try:
        return call(model, x)
    except (TypeError, AttributeError, IndexError, KeyError, ValueError, RuntimeError, NotImplementedError) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "falign":
            raise
        came = f"a tensor {tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"the model does not run on x, {came}: {why}") from error


def check_loss(loss: Any) -> Tensor:
    """Give the loss, if it is one finite number that has a gradient.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not torch.isfinite(loss):
        what = f"{float(loss.detach())}" if isinstance(loss, Tensor) and loss.numel() == 1 else f"{loss!r:.60}"
        raise ValueError(f"loss_fn returned {what}, expected one finite number")
    if not loss.requires_grad:
        raise ValueError("the loss depends on no trainable parameter of the model: there is no gradient to verify")
    return loss
