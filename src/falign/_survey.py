"""Survey of a model before a rule: the layers that take it, and everything that stands in its way."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from falign._preserve import preserve_generators
from falign.layers import KINDS, LOOKUPS, Kind, Layer, kind_of, replaced_method

# Labels say of every tensor in a pass what it is made of: parameters, activity of layers, errors, feedback.

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
        if FEEDBACK in made:  # else sign(W) of a sign rule would be taken for the weight itself
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
    """Look for products with a parameter outside the layer that owns it: they would be plain backpropagation.

    It also sees which layers an output is made of.

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
        self._depth = 0  # of calls of layers within layers: a product at depth 0 belongs to no layer
        self._silent = {name for name, parameter in model.named_parameters() if any(parameter is p for p in explained)}
        self._products: dict[str, str] = {}
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
                module.register_forward_hook(self._leave(name), always_call=True),  # or one that raises counts for ever
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
        """Name the layers and parameters that a tensor is directly made of."""
        return self.made_of(tensor) - _MARKS

    def upstream(self, tensor: Any) -> Made:
        """Name all layers that a tensor is made of, directly or by way of others."""
        direct = {name.removeprefix("layer ") for name in self.made_of(tensor) if name.startswith("layer ")}
        return frozenset(direct).union(*(self._reaching.get(name, ()) for name in direct))

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
            for _, made in operands:
                if is_weight(made) and not made <= self._silent:
                    for name in made:
                        self._products.setdefault(name, func.overloadpacket.__name__)


#: Layers whose parameters scale and shift what passes: no weight transport, so autograd carries the error exactly.
_NORMALISATIONS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU,
)  # fmt: skip

_REFUSED: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "write its projections as nn.Linear around scaled_dot_product_attention",
    nn.RNNBase: "unroll it with nn.Linear cells",
    nn.RNNCellBase: "write its two maps as nn.Linear",
    nn.Bilinear: "write it as nn.Linear on the outer product",
}


class Survey:
    """Find the layers of a model that take a rule, by name, and say why the others do not.

    Attributes:
        layers: name -> layer, in the model's order.
        kinds: name -> its kind.
        spared: layers of the known kinds that keep backpropagation, as ``skip`` names them.
        shapes: name -> the shapes of its inputs on the example, one a call.
        problems: one sentence each.
        watch: what the run on the example showed, or None.
        lazy: whether a layer has no shape yet.
    """

    def __init__(self, model: nn.Module, skip: Iterable[str]) -> None:
        self.model = model
        self.layers: dict[str, Layer] = {}
        self.kinds: dict[str, Kind] = {}
        self.spared: list[nn.Module] = []
        self.problems: list[str] = []
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.watch: Watch | None = None
        self.lazy = False
        self._free: list[nn.Module] = []
        self._explained: list[nn.Parameter] = []
        self._skip = set(skip)
        registered = {id(module) for module in model.modules()}
        unregistered = list(_in_containers(model, registered))
        names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
        known = {*names, *(name for name, _ in unregistered)}
        for name in sorted(self._skip.difference(known)):
            near = get_close_matches(name, names, n=3) or [name for name in names if name][:6]
            self.problems.append(f"skip names {name!r}, which the model does not have; near it: {', '.join(near)}")
        self._visit("", model, set())
        for name, module in unregistered:
            if name not in self._skip:
                self.problems.append(
                    f"{name!r} holds a {type(module).__name__} in a plain Python container, where neither "
                    "model.parameters() nor a rule finds it: use nn.ModuleList or nn.ModuleDict, or name "
                    f"{name!r} in skip= if no error passes through it"
                )

    def _visit(self, name: str, module: nn.Module, seen: set[int]) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if name in self._skip:
            self._free.append(module)
            self._explained += module.parameters()
            self.spared += [part for part in module.modules() if isinstance(part, _BASES)]
            return
        parameters = dict(module.named_parameters(recurse=False))
        if kind_of(module) is None:
            named = {key for key in parameters if f"{name}.{key}".lstrip(".") in self._skip}
            self._explained += [parameters.pop(key) for key in named]
        if any(isinstance(parameter, UninitializedParameter) for parameter in parameters.values()):
            self.lazy = True
            self._refuse(name, module, "has no shape yet: run one batch through the model first")
        elif (kind := kind_of(module)) is not None:
            self._take(name, module, kind, seen)
        elif isinstance(module, _BASES):
            self._explained += parameters.values()
            self._refuse(
                name, module,
                f"has a {replaced_method(module)} of its own, so its map is not known: use the plain layer, or name it "
                "in skip= (backpropagation)",
            )  # fmt: skip
        elif isinstance(module, LOOKUPS):
            if _has_torch_forward(module):
                self._free.append(module)
            self._children(name, module, seen)
        elif isinstance(module, _NORMALISATIONS) and _has_torch_forward(module):
            self._free.append(module)
            self._explained += module.parameters(recurse=False)
            self._children(name, module, seen)
        elif refused := next((base for base in _REFUSED if isinstance(module, base)), None):
            self._explained += module.parameters()
            self._refuse(
                name, module, f"cannot take feedback: {_REFUSED[refused]}, or name it in skip= (backpropagation)"
            )
        else:
            if any(max(parameter.shape, default=1) < parameter.numel() for parameter in parameters.values()):
                self._explained += parameters.values()
                listed = ", ".join(f"{key} {'x'.join(map(str, p.shape))}" for key, p in parameters.items())
                self._refuse(
                    name, module,
                    f"uses parameters of its own ({listed}) in a way that falign cannot see: put them into nn.Linear "
                    "or a convolution, or name the parameter in skip= (backpropagation) if it only adds or scales",
                )  # fmt: skip
            self._children(name, module, seen)

    def _children(self, name: str, module: nn.Module, seen: set[int]) -> None:
        for child_name, child in module.named_children():
            self._visit(f"{name}.{child_name}".lstrip("."), child, seen)

    def _take(self, name: str, module: Layer, kind: Kind, seen: set[int]) -> None:
        """Take a layer of a known kind; note a problem where its weight is complex, on meta, or made by products."""
        self.layers[name], self.kinds[name] = module, kind
        attribute = module._modules.get("feedback", module.__dict__.get("feedback"))
        if attribute is not None and not getattr(attribute, "is_feedback", False):
            self._refuse(name, module, "has an attribute feedback of its own, which falign needs: rename it")
        if any(parameter.is_meta for parameter in module.parameters()):
            self._refuse(
                name, module, "is on the meta device, without numbers: load its weights first, and convert then"
            )
        elif any(parameter.is_complex() for parameter in module.parameters()):
            self._refuse(
                name, module, "has complex weights, for which no rule is defined: name it in skip= (backpropagation)"
            )
        for child_name, child in module.named_children():
            if child_name == "feedback":
                continue
            for inner_name, inner in child.named_modules():
                seen.add(id(inner))
                full = f"{name}.{child_name}.{inner_name}".rstrip(".")
                if full in self._skip or not _has_matrices(inner):
                    continue
                where = "inside a parametrization of" if is_parametrized(module) else "inside"
                self._refuse(
                    full, inner,
                    f"works {where} layer {name!r}, where no error is delivered: the gradient of that weight would "
                    "return through it by backpropagation; name it in skip= if it may",
                )  # fmt: skip

    def _refuse(self, name: str, module: nn.Module, why: str) -> None:
        self.problems.append(f"layer {name or '(root)'!r} ({type(module).__name__}) {why}")

    def run(self, example: Any) -> Any:
        """Run the example once, without gradients and leaving no trace; note which layers ran, on which shapes.

        Layers that run only in training (auxiliary heads) are looked for in a second run, in the model's own mode.

        Args:
            example: the model's input; a tuple is its positional arguments, a dict its keyword arguments.

        Returns:
            What the model returned, or None where it failed (then there is a problem that says how).
        """
        handles = [layer.register_forward_pre_hook(self._note(name)) for name, layer in self.layers.items()]
        watch = Watch(self.model, self.layers, self._free, self._explained, example)
        modes = {module: module.training for module in self.model.modules()}
        try:
            with without_trace(self.model), watch:
                self.model.eval()
                result = call(self.model, example)
                if set(self.layers) - set(self.shapes) and any(modes.values()):  # auxiliary heads
                    for module, mode in modes.items():
                        module.training = mode
                    call(self.model, example)
        except Exception as error:
            self.problems.append(f"the model does not run on the example: {type(error).__name__}: {error}")
            return None
        finally:
            for handle in handles:
                handle.remove()
            watch.remove()
        for name in self.layers:
            if name not in self.shapes:
                self.problems.append(
                    f"layer {name!r} did not run on the example, so no error can reach it: call it in forward "
                    "(using its weight by other means passes falign by), or name it in skip="
                )
        self.problems.extend(watch.problems())
        self.watch = watch
        return result

    def run_doubled(self, example: Any) -> Any:
        """Run the model on the example with every sample twice; None where that cannot be tried."""
        leaves = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        if not leaves:
            return None
        ((batch, _),) = Counter(leaf.shape[0] for leaf in leaves).most_common(1)  # a mask may have no batch axis

        def twice(leaf: Any) -> Any:
            return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.shape[:1] == (batch,) else leaf

        try:
            with without_trace(self.model):
                self.model.eval()
                return call(self.model, tree_map(twice, example))
        except Exception:
            return None

    def _note(self, name: str) -> Any:
        def note(layer: nn.Module, args: tuple) -> None:
            if not args:
                raise TypeError(f"layer {name!r} was called with keyword arguments only: pass its input as the first")
            if isinstance(args[0], Tensor):
                self.shapes.setdefault(name, []).append(tuple(args[0].shape))

        return note


_BASES = tuple(base for kind in KINDS.values() for base in kind.types)


def _has_torch_forward(module: nn.Module) -> bool:
    """Tell whether the forward of a module is that of the torch class that it is of."""
    concrete = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn."))
    return type(module).forward is concrete.forward and "forward" not in module.__dict__


def _has_matrices(module: nn.Module) -> bool:
    """Tell whether a part of a layer has matrices beside the parameters that torch itself keeps there."""
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return False
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _in_containers(model: nn.Module, registered: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Find (name, layer) of linear maps that a module keeps in plain lists, tuples, dicts or sets."""
    for name, module in model.named_modules():
        for key, value in list(module.__dict__.items()):
            if key.startswith("_") or not isinstance(value, (list, tuple, dict, set)):
                continue
            for held in _modules_in(value, 0):
                if id(held) not in registered and any(isinstance(part, _BASES) for part in held.modules()):
                    yield f"{name}.{key}".lstrip("."), held
                    break


def _modules_in(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth < 4 and isinstance(value, (list, tuple, set, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _modules_in(part, depth + 1)


@contextmanager
def without_trace(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Run without gradients (or with), and put modes, buffers and random generators back afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}  # running statistics, counts
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.set_grad_enabled(gradients), preserve_generators(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.backends.mha.set_fastpath_enabled(False)  # evaluation's short cut past a transformer's layers
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def detached(example: Any) -> Any:
    """Copy an example, its tensors detached: what runs may ask for gradients at them."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, example)


def call(model: nn.Module, example: Any) -> Any:
    """Run a model: a tuple is positional arguments, a dict keyword arguments, anything else the input."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)
