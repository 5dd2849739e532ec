"""Follow what every tensor of a pass is made of: parameters, activity of layers, errors, feedback."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Marks beside the names of parameters and layers; no name of a module holds a blank.
ACTIVITY, ERROR, FEEDBACK = "an activity", "an error", "a feedback"
_MARKS = frozenset((ACTIVITY, ERROR, FEEDBACK))

Made = frozenset[str]
"""Names of the parameters that a tensor is made of, with the marks of whatever else it is made of."""


def is_weight(made: Made) -> bool:
    """Whether a tensor is made of parameters, and of nothing else but constants."""
    return bool(made) and not made & _MARKS


class Labels(TorchDispatchMode):
    """Labels every tensor with what it is made of, by its memory: views, casts and scalings keep the label.

    Labels are those of whole storages. What an operation writes takes the labels of its operands; feedback swallows
    the weights that it is mixed with (c · sign(W) is feedback), unless an activity or an error is among them.

    Args:
        named: {name: parameter}.
        feedback: tensors that are feedback.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], feedback: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._made: dict[int, Made] = {}
        self._spans: dict[int, list[tuple[int, int, str]]] = {}  # several parameters may lie in one storage
        for name, parameter in named:
            if not isinstance(parameter, UninitializedParameter) and (place := _place(parameter)) is not None:
                self._made[place] = self._made.get(place, frozenset()) | {name}
                self._spans.setdefault(place, []).append((*_span(parameter), name))
        for matrix in feedback:
            self.label(matrix, frozenset((FEEDBACK,)))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else entering the mode imports the compiler, for a second

    def label(self, tensor: Any, made: Made) -> None:
        """Say what a tensor is made of."""
        if isinstance(tensor, Tensor) and (place := _place(tensor)) is not None:
            self._made[place] = made

    def made_of(self, tensor: Any) -> Made:
        """What a tensor is made of; nothing, if of constants."""
        place = _place(tensor) if isinstance(tensor, Tensor) else None
        if place is None:
            return frozenset()
        made = self._made.get(place, frozenset())
        spans = self._spans.get(place, ())
        if len(spans) > 1:
            low, high = _span(tensor)
            others = {name for start, stop, name in spans if stop <= low or start >= high}
            made = made - others
        return made

    def met(self, func: Any, args: tuple, operands: list[tuple[Tensor, Made]], result: Any) -> None:
        """Look at an operation that has run; for the classes below."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        operands = [(tensor, self.made_of(tensor)) for tensor in inputs]
        result = func(*args, **kwargs)
        out = kwargs.get("out")  # what was in it is overwritten
        made: Made = frozenset().union(*(label for tensor, label in operands if tensor is not out))
        if FEEDBACK in made:
            made = made & _MARKS if made & {ACTIVITY, ERROR} else frozenset((FEEDBACK,))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (place := _place(tensor)) is not None and place not in self._spans:
                if made and (tensor.is_floating_point() or tensor.is_complex()):  # an index carries nothing
                    self._made[place] = made
                else:
                    self._made.pop(place, None)
        self.met(func, args, operands, result)
        return result


def _place(tensor: Tensor) -> int | None:
    """The address of a tensor's memory, of a subclass that of the first tensor in it; None where it has none."""
    while hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        tensor = getattr(tensor, names[0])
    if tensor.layout is not torch.strided:
        return None
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and the one behind the last, of a tensor within its storage."""
    if hasattr(tensor, "__tensor_flatten__"):
        return 0, 1 << 62
    start = int(tensor.storage_offset()) * tensor.element_size()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + int(extent) * tensor.element_size()


_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "convolution", "_convolution", "_trilinear",
        "matmul", "addbmm", "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_grouped_mm",
        "_scaled_mm", "_scaled_grouped_mm", "_cdist_forward", "outer", "ger", "mkldnn_rnn_layer", "lstm", "gru",
        "rnn_tanh", "rnn_relu", "_cudnn_rnn", "bilinear",
    )
    if hasattr(torch.ops.aten, name)
)  # fmt: skip


class Watch(Labels):
    """Finds products with a parameter outside the layer that owns it: they would be plain backpropagation.

    It also finds which layers an output is made of.

    Args:
        model: the model that runs while this mode is entered.
        layers: {name: layer} within which products are the layer's own business, and whose outputs are activity.
        spared: modules within which products are their own business too.
        explained: parameters about which there is nothing to say, or something was said already.
        inputs: what the model is run on.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        spared: list[nn.Module],
        explained: list[nn.Parameter],
        inputs: Any,
    ) -> None:
        super().__init__(model.named_parameters())
        self._depth = 0
        self._silent = {name for name, parameter in model.named_parameters() if any(parameter is p for p in explained)}
        self._found: dict[str, str] = {}
        self._reaching: dict[str, Made] = {}
        self.order: list[str] = []
        self.outputs: dict[str, Tensor] = {}
        for leaf in tree_leaves(inputs):
            self.label(leaf, frozenset((ACTIVITY,)))
        self._handles = [
            handle
            for name, module in (*layers.items(), *(("", module) for module in spared))
            for handle in (
                module.register_forward_pre_hook(self._enter(name)),
                module.register_forward_hook(self._leave(name), always_call=True),
            )
        ]

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple) -> None:
            self._depth += 1
            if name and args:
                self._reaching[name] = self._reaching.get(name, frozenset()) | self.upstream(args[0])

        return enter

    def _leave(self, name: str) -> Any:
        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            self._depth -= 1
            if name and isinstance(output, Tensor):
                self.order.append(name)
                self.outputs[name] = output
                self.label(output, frozenset((ACTIVITY, f"layer {name}")))

        return leave

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def sources(self, tensor: Any) -> Made:
        """The layers and parameters that a tensor is directly made of."""
        return self.made_of(tensor) - _MARKS

    def upstream(self, tensor: Any) -> Made:
        """The names of all layers that a tensor is made of, directly or by way of others."""
        direct = {name.removeprefix("layer ") for name in self.made_of(tensor) if name.startswith("layer ")}
        return frozenset(direct).union(*(self._reaching.get(name, ()) for name in direct))

    def problems(self) -> list[str]:
        """A sentence for every parameter that was found."""
        return [
            f"parameter {name!r} is multiplied by {operation} outside its layer: the error would return through it by "
            "backpropagation; call the layer itself, or name the layer in skip="
            for name, operation in self._found.items()
        ]

    def met(self, func: Any, args: tuple, operands: list[tuple[Tensor, Made]], result: Any) -> None:
        """Note the parameters of a product outside all layers."""
        if self._depth == 0 and func.overloadpacket in _PRODUCTS:
            for _, made in operands:
                if is_weight(made) and not made <= self._silent:
                    for name in made:
                        self._found.setdefault(name, func.overloadpacket.__name__)
