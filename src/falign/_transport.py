"""Find the parameters that carried the error in a backward pass: weight transport, seen where it happens."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from falign._attached import Feedback
from falign._convert import targets
from falign._preserve import force_eager, preserve_generators
from falign._survey import ACTIVITY, ERROR, Labels, Made, call, is_weight
from falign._wiring import wirings


class Transported(dict[str, str]):
    """{parameter: the operation in which it carried the error}; empty where no weight did. Prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no parameter carried the error"
        width = max(map(len, self))
        return "\n".join(
            [f"{'parameter':{width}}  carried the error in"] + [f"{n:{width}}  {o}" for n, o in self.items()]
        )


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
    watch = _Backward(twin, x)
    try:
        with watch:
            loss = check_loss(compute_loss(twin, x, loss_fn))
            seed = torch.ones_like(loss)  # given by hand, so that the error has a label from its first operation on
            watch.label(seed, frozenset((ERROR,)))
            torch.autograd.backward(loss, seed)
    finally:
        watch.remove()
    return watch.transported(parameter.grad for parameter in twin.parameters())


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


def plain_copy(model: nn.Module) -> nn.Module:
    """Copy a model deeply; activations that modules keep as attributes go along detached.

    Raises:
        ValueError: something in the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in tree_leaves({key: value for key, value in module.__dict__.items() if key not in _MODULE}):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                memo[id(tensor)] = tensor.detach().clone()  # deepcopy refuses it; the next forward makes it anew
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied, and a copy is what is looked at ({type(error).__name__}: {error}): keep no "
            "graph, file or generator in its attributes"
        ) from error


@contextmanager
def gradients_aside(model: nn.Module) -> Iterator[None]:
    """Put the gradients of a model aside, so that a copy has none, and back afterwards."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


#: What every module has; parameters and buffers are leaves.
_MODULE = frozenset(nn.Module().__dict__)


class _Backward(Labels):
    """Look at a pass forward and back for operations in which a weight meets an error."""

    def __init__(self, twin: nn.Module, x: Any) -> None:
        parts = [part for part in twin.modules() if isinstance(part, Feedback)]
        learned = {id(p) for part in parts for p in part.parameters()}
        super().__init__(
            ((name, p) for name, p in twin.named_parameters() if id(p) not in learned),
            [p for part in parts for p in (*part.parameters(), *part.buffers(), part.matrix)],
        )
        self._events: dict[str, str] = {}
        self._sums: dict[int, tuple[Made, str]] = {}
        self._scaled: dict[int, tuple[Made, tuple[int, ...], frozenset[int]]] = {}
        self._weights: set[Any] = set()  # nodes behind a converted layer: from its output to its weight
        for leaf in tree_leaves(x):
            self.label(leaf, frozenset((ACTIVITY,)))
        self._handles = [
            layer.register_forward_hook(self._layer, prepend=True)
            for layer in twin.modules()
            if isinstance(layer._modules.get("feedback"), Feedback)
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def transported(self, gradients: Iterator[Tensor | None]) -> Transported:
        """Say what carried the error; a sum that is the gradient of a parameter carried it nowhere."""
        # Such as the gradient of a bias in front of a scale γ, Σ γ ⊙ e.
        for gradient in gradients:
            if gradient is not None and gradient.layout is torch.strided:
                self._sums.pop(gradient.untyped_storage().data_ptr(), None)
        for made, operation in self._sums.values():
            self._note(made, operation)
        return Transported(sorted(self._events.items()))

    def _layer(self, layer: nn.Module, args: tuple, y: Any) -> None:
        """Forward hook of a converted layer: its input is cut, so what lies behind its output is its weight alone."""
        if not isinstance(y, Tensor):
            return
        self.label(y, frozenset((ACTIVITY,)))
        if y.grad_fn is None or (isinstance(args[0], Tensor) and args[0].requires_grad):
            return
        nodes = [y.grad_fn]
        while nodes:
            node = nodes.pop()
            if node not in self._weights:
                self._weights.add(node)
                nodes += [child for child, _ in node.next_functions if child is not None]

    def _note(self, made: Made, operation: str) -> None:
        for name in made:
            self._events.setdefault(name, operation)

    def met(self, func: Any, args: tuple, operands: list[tuple[Tensor, Made]], result: Any) -> None:
        """Look for weights that meet an error."""
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not outputs or not any(ERROR in made for _, made in operands):
            return
        name = func.overloadpacket.__name__
        if name == "convolution_backward" and not args[-1][0]:  # only the weight's own gradient is asked for
            return
        weights = frozenset().union(*(made for _, made in operands if is_weight(made)))
        # A weight meets an error by right in two places: behind a converted layer, where the gradient goes to that
        # weight itself, and in a delivery, where what is taken for the weight is B.
        node = torch._C._current_autograd_node()
        if node is not None and (node in self._weights or node.name() in _DELIVERIES):
            return
        if torch.Tag.pointwise in func.tags or name in _ELEMENTWISE:
            self._scale(name, operands, outputs[0])
        elif name in ("sum", "mean"):
            self._sum(operands[0][0], args[1] if len(args) > 1 else None, outputs[0])
        elif weights and not _normalises(name):
            self._note(weights, name)

    def _scale(self, name: str, operands: list[tuple[Tensor, Made]], out: Tensor) -> None:
        """Remember an error that was scaled elementwise by a weight, until it is summed."""
        place, made, varying = out.untyped_storage().data_ptr(), frozenset(), set()
        if any(ACTIVITY in label and ERROR not in label for _, label in operands):
            self._scaled.pop(place, None)  # the product of two activities' derivatives, no sum over weights alone
            return
        for tensor, label in operands:
            if is_weight(label) and name in ("mul", "mul_", "div"):
                made |= label
                shift = out.dim() - tensor.dim()
                varying |= {axis + shift for axis, size in enumerate(tensor.shape) if size > 1}
            elif tensor.layout is torch.strided:
                before = self._scaled.get(tensor.untyped_storage().data_ptr())
                if before is not None:
                    made |= before[0]
                    varying |= before[2] if before[1] == tuple(out.shape) else set(range(out.dim()))
        if made:
            self._scaled[place] = made, tuple(out.shape), frozenset(varying)
        else:
            self._scaled.pop(place, None)

    def _sum(self, tensor: Tensor, axes: Any, out: Tensor) -> None:
        """Note a sum of what a weight has scaled over axes along which the weight differs: a product in two steps."""
        before = self._scaled.get(tensor.untyped_storage().data_ptr()) if tensor.layout is torch.strided else None
        if before is None:
            return
        made, shape, varying = before
        listed = [axes] if isinstance(axes, int) else list(axes or range(tensor.dim()))
        summed = {axis % max(tensor.dim(), 1) for axis in listed}
        if len(varying) > 1 and (shape != tuple(tensor.shape) or summed & varying):
            self._sums[out.untyped_storage().data_ptr()] = made, "a broadcast product, summed"


#: Nodes in which errors meet feedback, and under learned feedback the layer's input.
_DELIVERIES = frozenset(("_LayerwiseBackward", "_DirectBackward"))

#: Operations that copy, arrange or scale, beside those that PyTorch itself calls pointwise.
_ELEMENTWISE = frozenset(
    (
        "copy_", "clone", "_to_copy", "cat", "stack", "index_put", "index_put_", "scatter", "scatter_add", "index_add",
        "index_copy", "select_scatter", "slice_scatter", "as_strided_scatter", "masked_fill", "masked_scatter",
        "_softmax_backward_data", "_log_softmax_backward_data", "_prelu_kernel_backward", "native_dropout_backward",
        "view_as", "expand_as", "is_same_size", "embedding_dense_backward",
    )
)  # fmt: skip


def _normalises(name: str) -> bool:
    """Tell whether an operation is the backward of a normalisation, whose parameters scale and shift."""
    return "norm" in name and "backward" in name
