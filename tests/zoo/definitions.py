"""Every rule's gradients on any network by autograd, without what the package does: the definition, to compare with.

Layerwise. A layer of a known kind is replaced by its map of the detached input plus its map, by B in place of W, of the
input. Everything else runs as it is, backpropagated; in the backward pass alone every operand that is a parameter with
feedback, or a view or a rearranged copy of it, is replaced by the same view of B. The gradients of the weights
themselves are products of activities and errors, so they come out right. That ties neither to names of operations nor
to what autograd saves. ``unrolled`` has attention and recurrent networks by hand, to check this mode itself.

Direct. Every input is detached, and the gradient is that of loss + Σ_l ⟨e B_l, x_l⟩ with e and B_l constant; between
the cuts, parameters that are multiplied by hand carry the error by B as under a layerwise rule.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from entries import call
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from unrolled import unroll

from oracles import effective

aten = torch.ops.aten
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KNOWN = (nn.Linear, *_CONV, *_TRANSPOSED)
FUSED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
Gradients = dict[str, Tensor | None]


def operations(*names: str) -> frozenset:
    return frozenset(getattr(aten, name) for name in names if hasattr(aten, name))


#: Operations that arrange, copy or scale by a number: done to W, they are done to B.
_REARRANGED = operations(
    "clone", "contiguous", "_to_copy", "cat", "stack", "neg", "repeat", "index", "index_select", "gather", "flip",
    "roll", "permute_copy", "t_copy", "transpose_copy", "view_copy", "_reshape_copy", "expand_copy", "slice_copy",
    "constant_pad_nd", "as_strided_copy", "_unsafe_view", "im2col", "unfold",
)  # fmt: skip
_SCALED = operations("mul", "div")
#: Operations that sum products of their operands.
PRODUCTS = operations(
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "matmul", "convolution", "outer", "ger",
    "convolution_backward", "_trilinear", "linear_backward", "_conv_depthwise2d", "_grouped_mm", "_scaled_mm",
    "mkldnn_rnn_layer", "mkldnn_rnn_layer_backward", "_cdist_backward", "_slow_conv2d_backward", "einsum",
)  # fmt: skip


class ByFeedback(TorchDispatchMode):
    """While ``backward`` is set, whatever stands for a parameter in an operation is the same view of its B.

    Args:
        model: a plain model.
        pairs: {name of a parameter: B of its shape}.
    """

    def __init__(self, model: nn.Module, pairs: dict[str, Tensor]) -> None:
        super().__init__()
        self.backward = False
        self.used: set[str] = set()
        self.carried: dict[str, str] = {}  # parameters without feedback that met an error in a product
        self._stand_ins: dict[int, list[tuple[int, int, Tensor, str, Tensor]]] = {}
        self._plain: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in pairs:
                matrix = torch.empty_strided(parameter.size(), parameter.stride(), dtype=parameter.dtype)
                self._note(parameter.detach(), matrix.copy_(pairs[name]), name)
        for name, parameter in model.named_parameters():
            if parameter.untyped_storage().data_ptr() not in self._stand_ins:
                self._plain[parameter.untyped_storage().data_ptr()] = name

    def _note(self, tensor: Tensor, matrix: Tensor, name: str) -> None:
        start = tensor.storage_offset()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
        self._stand_ins.setdefault(tensor.untyped_storage().data_ptr(), []).append(
            (start, start + extent, matrix, name, tensor)
        )

    def _stand_in(self, tensor: Any) -> tuple[Tensor, str] | None:
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.numel() == 0:
            return None
        for start, stop, matrix, name, held in self._stand_ins.get(tensor.untyped_storage().data_ptr(), ()):
            if start <= tensor.storage_offset() < stop and tensor.dtype == held.dtype:
                shift = matrix.storage_offset() - start
                return matrix.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset() + shift), name
        return None

    def _replaced(self, leaf: Any) -> Any:
        found = self._stand_in(leaf)
        if found is None:
            return leaf
        self.used.add(found[1])
        return found[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operation = func.overloadpacket
        if self.backward and not torch.is_grad_enabled():  # a recomputation by checkpointing has gradients
            if operation in PRODUCTS:
                self._watch(func, args)
            return func(*tree_map(self._replaced, args), **tree_map(self._replaced, kwargs))
        result = func(*args, **kwargs)
        tensors = [
            leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        alike = operation in _REARRANGED or (operation in _SCALED and len(tensors) == 1)
        if alike and tensors and isinstance(result, Tensor):
            stand_ins = [self._stand_in(tensor) for tensor in tensors]
            aliased = any(result.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in tensors)
            if all(found is not None for found in stand_ins) and not aliased:
                shadow = func(*tree_map(self._shadow, args), **kwargs)
                if shadow.stride() == result.stride():
                    self._note(result.detach(), shadow, stand_ins[0][1])
        return result

    def _shadow(self, leaf: Any) -> Any:
        found = self._stand_in(leaf)
        return leaf if found is None else found[0]

    def _watch(self, func: Any, args: tuple) -> None:
        operands = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if func.overloadpacket is aten.convolution_backward and not args[-1][0]:
            return
        for tensor in operands:
            if tensor.layout is torch.strided and (name := self._plain.get(tensor.untyped_storage().data_ptr())):
                self.carried.setdefault(name, func.overloadpacket.__name__)


class Products(TorchDispatchMode):
    """Note the parameters that are operands of a product while ``backward`` is set: weight transport.

    Args:
        parameters: (name, parameter); of a converted model those that are no feedback.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.backward = False
        self.found: dict[str, str] = {}
        self._names = {p.untyped_storage().data_ptr(): name for name, p in parameters}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        operation = func.overloadpacket
        own = operation is aten.convolution_backward and not args[-1][0]  # the weight's own gradient
        if self.backward and not torch.is_grad_enabled() and operation in PRODUCTS and not own:
            for leaf in tree_leaves(args):
                if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                    name = self._names.get(leaf.untyped_storage().data_ptr())
                    if name is not None:
                        self.found.setdefault(name, operation.__name__)
        return func(*args, **(kwargs or {}))


def mapped(layer: nn.Module, x: Tensor, weight: Tensor, args: tuple = ()) -> Tensor:
    """The layer's map without its bias, of another weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    if isinstance(layer, _CONV):
        return layer._conv_forward(x, weight, None)
    assert not args
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
    return convolve(x, weight, None, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)


def through(y: Tensor, carrier: Tensor) -> Tensor:
    """y, with the gradient of the carrier besides."""
    return y + (carrier - carrier.detach())


def weight_of(net: nn.Module, name: str) -> Tensor:
    """What feedback of this name stands for: the weight of a layer, or a parameter."""
    return net.get_parameter(name) if is_parameter(net, name) else net.get_submodule(name).weight


def is_parameter(net: nn.Module, name: str) -> bool:
    owner, _, key = name.rpartition(".")
    try:
        return key in net.get_submodule(owner)._parameters
    except AttributeError:
        return False


def matrices(rule: str, net: nn.Module, feedback: dict[str, Tensor]) -> dict[str, Tensor]:
    """What carries the error in this pass, by layer or parameter."""
    made = {}
    for name, stored in feedback.items():
        if name.rpartition(".")[2] in ("passes", "seen") and name.rpartition(".")[0] in feedback:
            continue
        weight = weight_of(net, name).detach()
        still = rule == "adafa" and not (
            net.training and weight.double().norm() != feedback.get(f"{name}.seen", torch.tensor(-1.0))
        )
        if still:
            made[name] = stored
        else:
            made[name] = torch.as_tensor(effective(rule, weight.numpy(), stored.numpy(), 0)).reshape(weight.shape)
    return made


def by_layers(net: nn.Module, carriers: dict[str, Tensor], learned: dict[str, Tensor]) -> list[str]:
    """Give layers of known kinds forwards by their definition; the names of those that have feedback."""
    taken = []
    for name, matrix in carriers.items():
        if is_parameter(net, name):
            continue
        layer = net.get_submodule(name)
        assert isinstance(layer, KNOWN), type(layer)
        layer.forward = _by_layer(layer, layer.forward, matrix, learned.get(name))
        taken.append(name)
    return taken


def _by_layer(layer: nn.Module, plain: Callable, matrix: Tensor, learned: Tensor | None) -> Callable:
    def forward(x: Tensor, *args: Any) -> Tensor:
        y = through(plain(x.detach(), *args), mapped(layer, x, matrix, args))
        return y if learned is None else through(y, mapped(layer, x.detach(), learned, args))

    return forward


def layerwise(
    net: nn.Module,
    run: Callable[[nn.Module], Tensor],
    carriers: dict[str, Tensor],
    learned: dict[str, Tensor] | None = None,
) -> tuple[Gradients, Tensor, ByFeedback]:
    """({parameter: gradient}, loss, the mode) of a plain network, errors carried by ``carriers``.

    Args:
        net: a plain network; its forwards are changed.
        run: the network -> the loss.
        carriers: {layer or parameter: what carries the error}.
        learned: {layer: what receives the gradient that the weight which it computes would}.
    """
    pairs = {name: matrix for name, matrix in carriers.items() if is_parameter(net, name)}
    for name in by_layers(
        net, carriers, learned or {}
    ):  # its weight may be used by hand as well, and then has that B unless another
        key = f"{name}.weight".lstrip(".")
        if is_parameter(net, key):
            pairs.setdefault(key, carriers[name])
    mode = ByFeedback(net, pairs)
    with mode:
        loss = run(net)
        mode.backward = True
        loss.backward()
    return {name: p.grad for name, p in net.named_parameters()}, loss.detach(), mode


def by_direct(net: nn.Module, entry: Any, feedback: dict[str, Tensor], x: Any) -> tuple[Gradients, Tensor]:
    """({parameter: gradient}, loss) of a plain network under a direct rule.

    Args:
        net: a plain network; its modules get hooks, and those with fused products are unrolled.
        entry: how it is run and where its error begins.
        feedback: {what is cut: B}: a layer, a product within a module that is unrolled, or an argument of a module.
        x: the input.
    """
    cuts: list[Cut] = []
    calls: Counter[str] = Counter()
    ends: list[Tensor] = []

    def cut(name: str, x: Tensor) -> Tensor:
        calls[name] += 1
        if x.requires_grad and name in feedback:
            cuts.append(Cut(name, x, calls[name] - 1))
        return x.detach()

    def product(name: str, part: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dotted = f"{name}." if name else ""
        known = [each for each in (f"{dotted}{part}", f"{dotted}{part}_proj") if each in feedback]
        return F.linear(cut(known[0], x) if known else x, weight, bias)

    parts = {name: module for name, module in net.named_modules() if isinstance(module, FUSED)}
    unroll(net, product, [name for name in parts if any(is_product(name, parts[name], each) for each in feedback)])
    for name, module in net.named_modules():
        if name in feedback and isinstance(module, KNOWN):
            module.register_forward_pre_hook(lambda m, args, name=name: (cut(name, args[0]), *args[1:]))
        elif name in feedback or any(each.startswith(f"{name}[") for each in feedback):
            module.register_forward_pre_hook(partial(_cut_arguments, name, cut, feedback), with_kwargs=True)
    if entry.end is not None:
        net.get_submodule(entry.end).register_forward_hook(lambda m, args, y: ends.append(y))
    mode = ByFeedback(net, {name: matrix for name, matrix in feedback.items() if is_parameter(net, name)})
    torch.manual_seed(3)
    with mode:
        result = call(net, x)
        loss = total = entry.loss(result)
        mode.backward = True
        e = torch.autograd.grad(loss, ends[0], retain_graph=True)[0] if ends else entry.error(result)
    for name, at, number in cuts:
        count = calls[name]
        if count % entry.steps == 0:  # a recurrent module that is called again
            number, count = number % entry.steps, entry.steps
        place = count - 1 - number if name.endswith("_reverse") else number
        error = delivered(e, feedback[name], at, place, count, steps=entry.steps, channels=entry.channels)
        total = total + (error * at).sum()
    with mode:
        total.backward()
    return {name: p.grad for name, p in net.named_parameters()}, loss.detach()


class Cut(NamedTuple):
    """An input that a direct rule cuts: by what name, and in which call."""

    name: str
    x: Tensor
    number: int


def is_product(name: str, module: nn.Module, cut: str) -> bool:
    """Whether a cut is one of the products within a fused module."""
    owner, _, key = cut.rpartition(".")
    return owner == name and key not in dict(module.named_children())


def is_whole(net: nn.Module, cut: str) -> bool:
    """Whether a cut is a module that is no layer, within which errors are backpropagated."""
    module = dict(net.named_modules()).get(cut)
    kind = next((kind for kind in (*KNOWN, *FUSED) if isinstance(module, kind)), None)
    return module is not None and (kind is None or (kind in KNOWN and type(module).forward is not kind.forward))


def _cut_arguments(name: str, cut: Callable, feedback: dict[str, Tensor], module: nn.Module, args: tuple,
                   kwargs: dict[str, Any]) -> tuple[tuple, dict]:  # fmt: skip
    first = True
    seen: dict[int, Tensor] = {}

    def through(value: Any, path: str) -> Any:
        nonlocal first
        if isinstance(value, Tensor) and value.is_floating_point():
            known = name if first else f"{name}{path}"
            first = False
            replaced = cut(known, value)
            return seen.setdefault(id(value), replaced)
        if isinstance(value, (tuple, list)):
            return type(value)(through(each, f"{path}[{at}]") for at, each in enumerate(value))
        return value

    args = through(args, "")
    return args, {key: through(value, f"[{key}]") for key, value in kwargs.items()}


def delivered(e: Tensor, matrix: Tensor, x: Tensor, number: int, calls: int, *, steps: int, channels: bool) -> Tensor:
    """The error that a cut receives, by the sizes of the axes: those of samples and positions all differ in the zoo.

    At the positions that output and x share it is e B, summed over the positions of e alone, and the same at those of x
    alone, over the root of their number. The calls of a layer are positions.

    Args:
        e: the error (samples, positions, features), or with ``channels`` (samples, features, positions).
        matrix: B, of features, or of whole samples.
        x: the input.
        number: of its call.
        calls: in this forward.
        steps: how many of them there are if they are positions.
        channels: whether features are axis 1 in e.
    """
    rows, columns = matrix.shape
    samples, spread = e.shape[0], 1
    if calls == steps and calls in e.shape[:-1]:
        e = e.select(e.shape[:-1].index(calls), number)
    elif calls == steps:
        spread = calls
    if x.shape[0] == samples and (e[0].numel(), x[0].numel()) == (rows, columns):
        return (e.flatten(1) @ matrix).reshape(x.shape) / spread**0.5
    if channels:
        e = e.movedim(1, -1)
    e = next(flat for axis in reversed(range(e.dim())) if (flat := e.flatten(axis)).shape[-1] == rows)
    kept = x.shape
    x = x.flatten(1) if x[0].numel() == columns else x
    features_first = x.dim() > 2 and x.shape[1] == columns != x.shape[-1]
    x = x.movedim(1, -1) if features_first else x
    target, places = list(x.shape[:-1]), list(e.shape[:-1])
    if target and samples not in target and target[0] % samples == 0:  # samples and positions in one axis
        target = [samples, target[0] // samples, *target[1:]]
    shared = {}  # axis of x -> axis of e, each once, the first of that size
    for axis, size in enumerate(target):
        free = [place for place, other in enumerate(places) if other == size and place not in shared.values()]
        if free:
            shared[axis] = free[0]
    alone = [place for place in range(len(places)) if place not in shared.values()]
    carried = (e.sum(alone) if alone else e) @ matrix
    left = sorted(shared.values())
    carried = carried.permute(*(left.index(place) for place in shared.values()), -1)
    for axis, size in enumerate(target):
        if axis not in shared:
            carried = carried.unsqueeze(axis)
            spread *= size
    carried = carried.expand(*target, columns) / spread**0.5
    return (carried.movedim(-1, 1) if features_first else carried).reshape(kept)
