"""Labels on the tensors of a pass: what each is made of, and which parameters meet an activity or an error.

``Watch`` looks at a forward without gradients: products with a parameter outside the layer that owns it. ``ErrorWatch``
looks at a pass forward and back: parameters that carry the error, which is weight transport.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

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
    """Tell whether a tensor is made of parameters, and of nothing else but constants."""
    return bool(made) and not made & _MARKS


class Labels(TorchDispatchMode):
    """Label every tensor with what it is made of, by its memory: views, casts and scalings keep the label.

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
        self._sizes: dict[str, int] = {}
        for name, parameter in named:
            self._sizes[name] = 0 if isinstance(parameter, UninitializedParameter) else parameter.numel()
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
        """Look up what a tensor is made of: nothing, if of constants."""
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
        """Look at an operation that has run; here nothing, for subclasses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        operands = [(tensor, self.made_of(tensor)) for tensor in inputs]
        result = func(*args, **kwargs)  # first: an operation that raises has made nothing
        out = kwargs.get("out")  # what was in it is overwritten
        made: Made = frozenset().union(*(label for tensor, label in operands if tensor is not out))
        if made and func.overloadpacket.__name__ in _LOOKUPS:
            made |= {ACTIVITY}  # the index is one, or a position, which is as good
        if FEEDBACK in made:  # else sign(W) of a sign rule would be taken for the weight itself
            made = made & _MARKS if made & {ACTIVITY, ERROR} else frozenset((FEEDBACK,))
        if ACTIVITY in made and func.overloadpacket in _SCALINGS:
            made = _scaled_weights(operands) or made
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (place := _place(tensor)) is not None and place not in self._spans:
                if made and (tensor.is_floating_point() or tensor.is_complex()):  # an index carries nothing
                    self._made[place] = made
                else:
                    self._made.pop(place, None)
        self.met(func, args, operands, result)
        return result


_SCALINGS = frozenset((torch.ops.aten.mul, torch.ops.aten.div))


def _scaled_weights(operands: list[tuple[Tensor, Made]]) -> Made:
    """Name the weights that activities scale as a whole (one number a sample): what comes of it is weights still."""
    weights = [(tensor, made) for tensor, made in operands if is_weight(made)]
    activities = [tensor for tensor, made in operands if ACTIVITY in made and ERROR not in made]
    varying = frozenset().union(*(_varying(tensor) for tensor, _ in weights))
    if len(varying) < 2 or len(weights) + len(activities) < len(operands):
        return frozenset()
    if varying & frozenset().union(*map(_varying, activities)):
        return frozenset()
    return frozenset().union(*(made for _, made in weights))


def _varying(tensor: Tensor) -> frozenset[int]:
    """List the axes along which a tensor has different elements, counted from the last."""
    if tensor.layout is not torch.strided:
        return frozenset(range(-tensor.dim(), 0))
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return frozenset(axis - tensor.dim() for axis, (size, step) in enumerate(sizes) if size > 1 and step)


def _place(tensor: Tensor) -> int | None:
    """Give the address of a tensor's memory, of a subclass that of the first tensor in it; None where it has none."""
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
    """Give the first byte, and the one behind the last, of a tensor within its storage."""
    if hasattr(tensor, "__tensor_flatten__"):
        return 0, 1 << 62  # all of it
    start = int(tensor.storage_offset()) * tensor.element_size()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + int(extent) * tensor.element_size()


#: Operations that look rows of a table up.
_LOOKUPS = frozenset(("embedding", "_embedding_bag", "_embedding_bag_forward_only"))

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


_PRODUCT_NAMES = frozenset(operation.__name__ for operation in _PRODUCTS)


class Watch(Labels):
    """Look for products with a parameter outside the layer that owns it: they would be plain backpropagation.

    It also sees which layers an output is made of.

    Args:
        model: the model that runs while this mode is entered.
        layers: {name: layer} within which products are the layer's own business, and whose outputs are activity.
        spared: modules within which products are their own business too.
        explained: parameters about which there is nothing to say, or something was said already.
        inputs: what the model is run on.
        places: {name: module} of further modules that ``upstream`` tells of.
        starts: names of layers and places behind which products are not looked for.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        spared: list[nn.Module],
        explained: list[nn.Parameter],
        inputs: Any,
        places: Mapping[str, nn.Module] | None = None,
        starts: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(model.named_parameters())
        self._depth = 0  # of calls of layers within layers: a product at depth 0 belongs to no layer
        self._silent = {name for name, parameter in model.named_parameters() if any(parameter is p for p in explained)}
        self._products: dict[str, str] = {}
        self._reaching: dict[str, Made] = {}
        self.order: list[str] = []
        self.outputs: dict[str, Tensor] = {}
        self.places: dict[str, list[Any]] = {}  # what each of the further modules returned
        self.behind: dict[str, str] = {}  # parameters that were multiplied behind a start
        self._starts = starts
        for leaf in tree_leaves(inputs):
            self.label(leaf, frozenset((ACTIVITY,)))
        self._handles = [
            handle
            for name, module in (*layers.items(), *(("", module) for module in spared))
            for handle in (
                module.register_forward_pre_hook(self._enter(name)),
                module.register_forward_hook(self._leave(name), always_call=True),  # or one that raises counts for ever
            )
        ]
        for name, module in (places or {}).items():
            self._handles.append(module.register_forward_hook(self._pass(name)))

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

    def _pass(self, name: str) -> Any:
        def passed(module: nn.Module, args: tuple, output: Any) -> None:
            self.places.setdefault(name, []).append(output)
            for leaf in tree_leaves(output):
                self.label(leaf, self.made_of(leaf) | {ACTIVITY, f"place {name}"})

        return passed

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def sources(self, tensor: Any) -> Made:
        """Name the layers and parameters that a tensor is directly made of."""
        return frozenset(name for name in self.made_of(tensor) - _MARKS if not name.startswith("place "))

    def upstream(self, tensor: Any) -> Made:
        """Name all layers and places that a tensor is made of, directly or by way of others."""
        made = self.made_of(tensor)
        direct = {name.partition(" ")[2] for name in made if name.startswith(("layer ", "place "))}
        return frozenset(direct).union(*(self._reaching.get(name, ()) for name in direct))

    def reaching(self, layer: str) -> Made:
        """Name all layers and places that a layer's input was made of, in any of its calls."""
        return self._reaching.get(layer, frozenset())

    def only_behind(self) -> frozenset[str]:
        """Name the parameters that were multiplied behind a start, and nowhere in front of it."""
        return frozenset(self.behind.keys() - self._products.keys())

    def problems(self) -> list[str]:
        """Say, in a sentence each, which parameters were multiplied outside their layer."""
        return [
            f"parameter {name!r} is multiplied by {operation} outside its layer: the error would return through it by "
            "backpropagation; call the layer itself, or name the layer in skip="
            for name, operation in self._products.items()
        ]

    def met(self, func: Any, args: tuple, operands: list[tuple[Tensor, Made]], result: Any) -> None:
        """Note the parameters of a product outside all layers."""
        if self._depth == 0 and func.overloadpacket in _PRODUCTS:
            behind = bool(self._starts) and any(self._starts & self.upstream(tensor) for tensor, _ in operands)
            for _, made in operands:
                if is_weight(made) and not made <= self._silent:
                    for name in made:
                        (self.behind if behind else self._products).setdefault(name, func.overloadpacket.__name__)


@dataclass
class Use:
    """A parameter that carried the error.

    Attributes:
        operation: in which it first did so.
        nodes: names of autograd's nodes in which it did.
        modules: names of the modules in whose forward, and in no child's, it met an activity.
        within: the same, or the next modules around them that were not given it, or what is made of it, as an
            argument.
        fan_in: number of the inputs to which one element of the error was carried.
        derived: operation of arithmetic that made another tensor of it before; "" where it was the parameter itself,
            a view or a copy.
    """

    operation: str
    nodes: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    within: set[str] = field(default_factory=set)
    fan_in: float = 0.0
    derived: str = ""


class _Scaled(NamedTuple):
    """An error that weights have scaled elementwise: which, of what shape it was, where they vary, in which node."""

    made: Made
    shape: tuple[int, ...]
    varying: frozenset[int]
    node: str
    derived: str


class ErrorWatch(Labels):
    """Look at a pass forward and back for operations in which a parameter meets an error.

    Args:
        model: the model that runs while this mode is entered.
        layers: layers whose input is cut: what lies behind their output is the gradient of their own weight.
        feedback: tensors that are feedback.
        inputs: what the model is run on.
        silent: ids of parameters that are feedback too.
        multiplied: names of parameters that are known to be weights: what they are multiplied by is an activity.
        outputs: whether errors begin at the outputs, each element its own. Else they begin at a loss, which may add up
            what a scale has scaled: no product of the network.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        inputs: Any,
        feedback: Iterable[Tensor] = (),
        silent: Collection[int] = (),
        *,
        outputs: bool = False,
        multiplied: Collection[str] = (),
    ) -> None:
        super().__init__(((name, p) for name, p in model.named_parameters() if id(p) not in silent), feedback)
        self._outputs = outputs
        self._multiplied = frozenset(multiplied)
        self._activities: Made = frozenset()  # parameters that such weights are multiplied by: learned queries, states
        self._uses: dict[str, Use] = {}
        self._modules: dict[str, set[str]] = {}
        self._within: dict[str, set[str]] = {}
        self._running: list[tuple[str, Made]] = []  # modules at work, and the weights among their arguments
        self._arithmetic: dict[int, str] = {}  # of tensors made of weights alone: how, if not by views and copies
        self._sums: dict[int, tuple[_Scaled, float]] = {}
        self._settled: list[tuple[_Scaled, float]] = []
        self._scaled: dict[int, _Scaled] = {}
        self._weights: set[Any] = set()  # nodes behind a converted layer: from its output to its weight
        for leaf in tree_leaves(inputs):
            self.label(leaf, frozenset((ACTIVITY,)))
        self._handles = [layer.register_forward_hook(self._layer, prepend=True) for layer in layers]
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave(name), always_call=True))

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = filter(is_weight, map(self.made_of, tree_leaves((args, kwargs))))
            self._running.append((name, frozenset().union(*given)))

        return enter

    def _leave(self, name: str) -> Any:
        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            if self._running and self._running[-1][0] == name:
                self._running.pop()

        return leave

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def uses(self, gradients: Iterable[Tensor | None]) -> dict[str, Use]:
        """Map the parameters that carried the error to how they did.

        Args:
            gradients: those of the parameters: a sum that is the gradient of a parameter carried the error nowhere.
        """
        # Such as the gradient of a bias in front of a scale γ, Σ γ ⊙ e.
        for gradient in gradients:
            if gradient is not None and gradient.layout is torch.strided:
                self._sums.pop(gradient.untyped_storage().data_ptr(), None)
        for scaled, summed in (*self._settled, *self._sums.values()):
            for name in scaled.made:
                use = self._use(name, "a broadcast product, summed", scaled.node)
                use.derived = use.derived or scaled.derived
                use.fan_in = use.fan_in or self._size(name) / max(summed, 1)
        for name in self._activities:
            self._uses.pop(name, None)
        for name, use in self._uses.items():
            use.modules |= self._modules.get(name, set())
            use.within |= self._within.get(name, set())
        return dict(sorted(self._uses.items()))

    def _use(self, name: str, operation: str, node: str) -> Use:
        use = self._uses.setdefault(name, Use(operation))
        use.nodes.add(node)
        return use

    def _size(self, name: str) -> int:
        return self._sizes[name]

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

    def met(self, func: Any, args: tuple, operands: list[tuple[Tensor, Made]], result: Any) -> None:
        """Look for weights that meet an activity or an error."""
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not outputs:
            return
        name = func.overloadpacket.__name__
        self._forget({_place(tensor) for tensor in outputs} - {_place(tensor) for tensor, _ in operands})
        weights = frozenset().union(*(made for _, made in operands if is_weight(made)))
        if not any(ERROR in made for _, made in operands):
            self._forward(name, weights, operands, outputs)
            return
        if name == "convolution_backward" and not args[-1][0]:  # only the weight's own gradient is asked for
            return
        # A weight meets an error by right in two places: behind a converted layer, where the gradient goes to that
        # weight itself, and in a delivery, where what is taken for the weight is B.
        node = torch._C._current_autograd_node()
        if node is not None and (node in self._weights or node.name() in _DELIVERIES):
            return
        if torch.Tag.pointwise in func.tags or name in _ELEMENTWISE:
            self._scale(name, operands, outputs[0], "" if node is None else node.name())
        elif name in ("sum", "mean"):
            self._sum(operands[0][0], args[1] if len(args) > 1 else None, outputs[0])
        elif weights and not _normalises(name):
            for place, (tensor, made) in enumerate(operands):
                if is_weight(made):
                    for weight in made:
                        use = self._use(weight, name, "" if node is None else node.name())
                        use.fan_in = use.fan_in or _fan_in(name, tensor, right=place == len(operands) - 1)
                        use.derived = use.derived or self._arithmetic.get(tensor.untyped_storage().data_ptr(), "")

    def _forget(self, places: set[int | None]) -> None:
        """Forget what was in memory that was freed and is used again: what a sum there carried is settled."""
        for place in places:
            if place is not None:
                self._scaled.pop(place, None)
                if place in self._sums:
                    self._settled.append(self._sums.pop(place))

    def _forward(self, name: str, weights: Made, operands: list[tuple[Tensor, Made]], outputs: list[Tensor]) -> None:
        """Note in which module a weight meets an activity, and which tensors are made of weights by arithmetic."""
        if weights and any(ACTIVITY in made for _, made in operands):
            for weight in weights:
                around = (name for name, given in reversed(self._running) if weight not in given)
                self._modules.setdefault(weight, set()).add(self._running[-1][0] if self._running else "")
                self._within.setdefault(weight, set()).add(next(around, ""))
        if name in _PRODUCT_NAMES and weights & self._multiplied and is_weight(self.made_of(outputs[0])):
            self._activities |= weights - self._multiplied
            for tensor in outputs:
                self.label(tensor, self.made_of(tensor) | {ACTIVITY})
        before = ""
        for tensor, made in operands:
            if is_weight(made) and tensor.layout is torch.strided:
                before = before or self._arithmetic.get(tensor.untyped_storage().data_ptr(), "")
        for tensor in outputs:
            if tensor.layout is torch.strided:
                place = tensor.untyped_storage().data_ptr()
                how = before or ("" if name in MOVEMENTS else name)
                if place not in self._spans and how and is_weight(self.made_of(tensor)):
                    self._arithmetic[place] = how
                elif place not in self._spans:
                    self._arithmetic.pop(place, None)

    def _scale(self, name: str, operands: list[tuple[Tensor, Made]], out: Tensor, node: str) -> None:
        """Remember an error that was scaled elementwise by a weight, until it is summed."""
        place, made, varying, derived = out.untyped_storage().data_ptr(), frozenset(), set(), ""
        if any(ACTIVITY in label and ERROR not in label for _, label in operands):
            self._scaled.pop(place, None)  # the product of two activities' derivatives, no sum over weights alone
            return
        for tensor, label in operands:
            if is_weight(label) and name in ("mul", "mul_", "div"):
                made |= label
                derived = derived or self._arithmetic.get(tensor.untyped_storage().data_ptr(), "")
                shift = out.dim() - tensor.dim()
                varying |= {axis + shift for axis, size in enumerate(tensor.shape) if size > 1}
                spread = {axis for other, its in operands if ERROR in its for axis in self._spread(other, out)}
                if any(varies in spread and out.shape[varies] > 1 for varies in varying):
                    for weight in label:  # one element of the error goes to many inputs, each times a weight
                        use = self._use(weight, "an outer product", node)
                        use.fan_in = use.fan_in or float(tensor.numel())
                        use.derived = use.derived or derived
            elif tensor.layout is torch.strided:
                before = self._scaled.get(tensor.untyped_storage().data_ptr())
                if before is not None:
                    made, node, derived = made | before.made, before.node, before.derived or derived
                    varying |= before.varying if before.shape == tuple(out.shape) else set(range(out.dim()))
        if made:
            self._scaled[place] = _Scaled(made, tuple(out.shape), frozenset(varying), node, derived)
        else:
            self._scaled.pop(place, None)

    def _spread(self, error: Tensor, out: Tensor) -> set[int]:
        """List the axes of a result along which an error is repeated (expanded, if errors begin at the outputs)."""
        shift = out.dim() - error.dim()
        return set(range(shift)) | {
            axis + shift
            for axis, (size, step) in enumerate(zip(error.shape, error.stride(), strict=True))
            if size == 1 or (step == 0 and self._outputs)
        }

    def _sum(self, tensor: Tensor, axes: Any, out: Tensor) -> None:
        """Note a sum of what a weight has scaled over axes along which the weight differs: a product in two steps."""
        before = self._scaled.get(tensor.untyped_storage().data_ptr()) if tensor.layout is torch.strided else None
        if before is None:
            return
        listed = [axes] if isinstance(axes, int) else list(axes or range(tensor.dim()))
        summed = {axis % max(tensor.dim(), 1) for axis in listed}
        if len(before.varying) > 1 and (before.shape != tuple(tensor.shape) or summed & before.varying):
            size = prod(tensor.shape[axis] for axis in summed & before.varying if axis < tensor.dim())
            self._sums[out.untyped_storage().data_ptr()] = before, float(size)


def _fan_in(operation: str, weight: Tensor, *, right: bool) -> float:
    """Count the inputs to which a product carries one element of the error."""
    if weight.dim() < 2:
        return float(weight.numel())
    if operation in ("mm", "addmm", "bmm", "baddbmm", "addbmm", "_grouped_mm", "_scaled_mm", "mv", "addmv"):
        return float(weight.shape[-1] if right else weight.shape[-2])
    return weight.numel() / max(weight.shape[0], 1)


def carries_errors(func: Any) -> bool:
    """Tell whether an operation of an error and a weight hands on their product, summed."""
    name = func.overloadpacket.__name__
    return not (
        torch.Tag.pointwise in func.tags or name in _ELEMENTWISE or name in ("sum", "mean") or _normalises(name)
    )


#: Operations that arrange the entries of a tensor, copy or convert them, and change none.
MOVEMENTS = frozenset(
    (
        "t", "transpose", "permute", "movedim", "view", "_unsafe_view", "reshape", "_reshape_alias", "expand",
        "squeeze", "unsqueeze", "slice", "select", "narrow", "as_strided", "alias", "detach", "clone", "_to_copy",
        "contiguous", "split", "split_with_sizes", "chunk", "unbind", "repeat", "flip", "index_select", "index",
        "gather", "constant_pad_nd", "cat", "stack", "diagonal", "unfold", "copy_", "lift_fresh", "unsafe_chunk",
        "unsafe_split", "unsafe_split_with_sizes",
    )
)  # fmt: skip

#: Nodes in which errors meet feedback, and under learned feedback the layer's input.
_DELIVERIES = frozenset(("_LayerwiseBackward", "_DirectBackward"))

#: Operations that copy, arrange or scale, beside those that PyTorch itself calls pointwise.
_ELEMENTWISE = frozenset(
    (
        "copy_", "clone", "_to_copy", "cat", "stack", "index_put", "index_put_", "scatter", "scatter_add", "index_add",
        "index_copy", "select_scatter", "slice_scatter", "as_strided_scatter", "masked_fill", "masked_scatter",
        "_softmax_backward_data", "_log_softmax_backward_data", "_prelu_kernel_backward", "native_dropout_backward",
        "view_as", "expand_as", "is_same_size", "embedding_dense_backward", "softplus_backward", "elu_backward",
        "leaky_relu_backward", "hardtanh_backward", "hardswish_backward", "hardsigmoid_backward",
        "log_sigmoid_backward", "mish_backward", "glu_backward", "rrelu_with_noise_backward", "softshrink_backward",
        "hardshrink_backward",
    )
)  # fmt: skip


def _normalises(name: str) -> bool:
    """Tell whether an operation is the backward of a normalisation, whose parameters scale and shift."""
    return "norm" in name and "backward" in name
