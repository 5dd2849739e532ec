"""Survey of a model before a rule: the layers that take it, and everything that stands in its way."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves, tree_map

from falign._labels import ERROR, ErrorWatch, Use, Watch
from falign._preserve import preserve_generators
from falign._saved import PRODUCT_NODES
from falign.layers import LOOKUPS, Kind, Layer, kind_of, layer_types, replaced_method

#: Layers whose parameters scale and shift what passes: no weight transport, so autograd carries the error exactly.
_NORMALISATIONS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU,
)  # fmt: skip

#: PyTorch's own modules that multiply by parameters of their own, which of these, and which of them meet the input.
_BY_HAND: dict[type[nn.Module], tuple[re.Pattern[str], re.Pattern[str]]] = {
    nn.MultiheadAttention: (
        re.compile(r"in_proj_weight|[qkv]_proj_weight|out_proj\.weight"),
        re.compile(r"in_proj_weight"),
    ),
    nn.RNNBase: (re.compile(r"weight_(ih|hh|hr)_l\d+(_reverse)?"), re.compile(r"weight_ih_l0(_reverse)?")),
    nn.RNNCellBase: (re.compile(r"weight_(ih|hh)"), re.compile("")),
    nn.Bilinear: (re.compile(r"weight"), re.compile("")),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ByHand:
    """A parameter that is multiplied outside a layer of a known kind.

    Attributes:
        owner: the module that has it.
        key: its name there.
        fan_in: number of the inputs to which one element of the error is carried.
        nodes: names of autograd's nodes in which it carries the error.
        modules: names of the modules in whose forward it is multiplied.
        within: names of those, or of modules around them, that are not given it as an argument.
        expected: those of them in which autograd must save it wherever the module's input wants an error.
        always: those in which it must be saved whatever the input wants.
    """

    owner: nn.Module
    key: str
    fan_in: float
    nodes: frozenset[str]
    modules: frozenset[str]
    within: frozenset[str]
    expected: frozenset[str]
    always: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A parameter that is changed before its product.

    Attributes:
        operation: by which.
        within: names of the modules in whose forward that happens.
        sentence: says so, and what to do.
    """

    operation: str
    within: frozenset[str]
    sentence: str


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
        unreached: one sentence for each layer that did not run on the example.
        derived: name -> parameter that is changed before its product.
        explained: parameters of which an example has shown what they do.
        by_hand: name -> parameter that is multiplied outside a layer.
        unclear: one sentence for each module with matrices of its own, of which only an example can show what they do.
        places: name -> further modules to watch in the run on the example.
        starts: names of those behind which errors begin, so that backpropagation may work there.
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
        self.explained: tuple[str, ...] = ()
        self.derived: dict[str, Derived] = {}
        self.unreached: list[str] = []
        self.by_hand: dict[str, ByHand] = {}
        self.unclear: list[str] = []
        self.places: dict[str, nn.Module] = {}
        self.starts: frozenset[str] = frozenset()
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
            self.spared += [part for part in module.modules() if isinstance(part, layer_types())]
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
        elif isinstance(module, layer_types()) and any(parameter.dim() > 1 for parameter in parameters.values()):
            self.unclear.append(
                f"layer {name or '(root)'!r} ({type(module).__name__}) has a {replaced_method(module)} of its own, so "
                "its map is known only on an example: pass example=x with a batch x, use the plain layer, or name it "
                "in skip= (backpropagation)"
            )
        elif isinstance(module, LOOKUPS):
            if _has_torch_forward(module):
                self._free.append(module)
            self._children(name, module, seen)
        elif isinstance(module, _NORMALISATIONS) and _has_torch_forward(module):
            self._free.append(module)
            self._explained += module.parameters(recurse=False)
            self._children(name, module, seen)
        elif getattr(module, "is_expanded", False):
            self._explained += parameters.values()
            self._children(name, module, seen)
        elif (base := _by_hand(module)) is not None:
            self._explained += module.parameters()
            self._take_by_hand(name, module, base)
        else:
            if any(max(parameter.shape, default=1) < parameter.numel() for parameter in parameters.values()):
                listed = ", ".join(f"{key} {'x'.join(map(str, p.shape))}" for key, p in parameters.items())
                self.unclear.append(
                    f"layer {name or '(root)'!r} ({type(module).__name__}) uses parameters of its own ({listed}) in a "
                    "way that falign sees only on an example: pass example=x with a batch x, or name the parameter in "
                    "skip= (backpropagation)"
                )
            self._children(name, module, seen)

    def _take_by_hand(self, name: str, module: nn.Module, base: type[nn.Module]) -> None:
        """Take the matrices of one of PyTorch's own modules that multiply by hand."""
        _, first = _BY_HAND[base]
        for key, parameter in matrices_by_hand(module):
            if f"{name}.{key}".lstrip(".") in self._skip:
                continue
            *path, last = key.split(".")
            self.by_hand[f"{name}.{key}".lstrip(".")] = ByHand(
                owner=module.get_submodule(".".join(path)),
                key=last,
                fan_in=float(parameter.shape[-1]),
                nodes=PRODUCT_NODES,
                modules=frozenset((name,)),
                within=frozenset((name,)),
                expected=frozenset((name,)) if first.fullmatch(key) else frozenset(),
                always=frozenset(),
            )
            if parameter.is_meta or parameter.is_complex():
                self._refuse(name, module, f"has a parameter {key} without real numbers: load its weights first")

    def _children(self, name: str, module: nn.Module, seen: set[int]) -> None:
        for child_name, child in module.named_children():
            if getattr(child, "is_feedback", False):
                continue
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
                made = is_parametrized(module) and child_name == "parametrizations"
                if made and not isinstance(
                    inner, layer_types()
                ):  # the weight is read as it is, and its gradient returns there
                    continue
                where = "inside a parametrization of" if made else "inside"
                self._refuse(
                    full, inner,
                    f"works {where} layer {name!r}, where no error is delivered: the gradient of that weight would "
                    "return through it by backpropagation; name it in skip= if it may",
                )  # fmt: skip

    def _refuse(self, name: str, module: nn.Module, why: str) -> None:
        self.problems.append(f"layer {name or '(root)'!r} ({type(module).__name__}) {why}")

    def weights(self) -> frozenset[str]:
        """Name the weights of layers and lookups, but for those that keep backpropagation."""
        spared = {id(parameter) for module in self.spared for parameter in module.parameters()}
        ours = [*self.layers.values(), *(module for module in self._free if isinstance(module, LOOKUPS))]
        taken = {id(parameter) for module in ours for parameter in module.parameters()} - spared
        return frozenset(name for name, p in self.model.named_parameters() if id(p) in taken and p.dim() > 1)

    def run(self, example: Any) -> Any:
        """Run the example once, without gradients and leaving no trace; note which layers ran, on which shapes.

        Layers that run only in training (auxiliary heads) are looked for in a second run, in the model's own mode.

        Args:
            example: the model's input; a tuple is its positional arguments, a dict its keyword arguments.

        Returns:
            What the model returned, or None where it failed (then there is a problem that says how).
        """
        handles = [layer.register_forward_pre_hook(self._note(name)) for name, layer in self.layers.items()]
        watch = Watch(self.model, self.layers, self._free, self._explained, example, self.places, self.starts)
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
        self.watch = watch
        if (self.unclear or watch.problems()) and not self._look_at_uses(example):
            self.problems += self.unclear + watch.problems()
        for name in list(self.layers):
            if name not in self.shapes:
                if f"{name}.weight" in self.by_hand:
                    del self.layers[name], self.kinds[name]
                    continue
                self.unreached.append(
                    f"layer {name!r} did not run on the example, so the size of its input is not known: call it in "
                    "forward, give an example that reaches it, or name it in skip="
                )
        return result

    def watch_again(self, example: Any) -> Any:
        """Run the example once more, to watch what has come to ``places`` since; give what the model returned."""
        watch = Watch(self.model, self.layers, self._free, self._explained, example, self.places, self.starts)
        try:
            with without_trace(self.model), watch:
                self.model.eval()
                result = call(self.model, example)
        finally:
            watch.remove()
        self.watch = watch
        return result

    def _look_at_uses(self, example: Any) -> bool:
        """Find out, by a pass forward and back, which parameters carry the error outside all layers; False if it fails.

        A parameter that only adds or scales carries none, and needs no feedback.
        """
        silent = {id(parameter) for parameter in self._explained}
        names = {name: p for name, p in self.model.named_parameters() if id(p) not in silent}
        try:
            uses = self._error_watch(example, inputs=True)
            at_root = any("" in use.modules for use in uses.values())
            alone = self._error_watch(example, inputs=False) if at_root else uses
        except Exception:
            try:  # some models ask for the gradient of their input by themselves, which only a leaf allows
                uses = alone = self._error_watch(example, inputs=False)
            except Exception:
                return False
        self.explained = tuple(names)
        for name, use in uses.items():
            if name not in names:
                continue
            *path, key = name.split(".")
            if use.derived:
                layer = self.model.get_submodule(".".join(path))
                method = replaced_method(layer) if isinstance(layer, layer_types()) else None
                own = f"layer {'.'.join(path)!r} has a {method} of its own: " if method else ""
                self.derived[name] = Derived(
                    operation=use.derived,
                    within=frozenset(use.within),
                    sentence=f"{own}parameter {name!r} is changed by {use.derived} before its product "
                    f"({use.operation}), and the error would return through what is made of it by backpropagation: "
                    "multiply by the parameter itself, or name it in skip=",
                )
                continue
            self.by_hand[name] = ByHand(
                owner=self.model.get_submodule(".".join(path)),
                key=key,
                fan_in=use.fan_in,
                nodes=frozenset(use.nodes),
                modules=frozenset(use.modules),
                within=frozenset(use.within),
                expected=frozenset(use.modules),
                always=frozenset(module for module in use.modules if not module and name in alone),
            )
        return True

    def _error_watch(self, example: Any, *, inputs: bool) -> dict[str, Use]:
        """Run forward and back, the layers' inputs cut, and list the parameters that carried the error.

        Args:
            example: the model's input.
            inputs: whether its floating-point tensors want a gradient as well.
        """
        example = tree_map(lambda leaf: _wanting(leaf, inputs), example)
        handles = []
        layers = [*self.layers.values(), *self.spared]
        watch = ErrorWatch(self.model, layers, example, outputs=True, multiplied=self.by_hand)
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(_stub_cut))
            handles.append(layer.register_forward_hook(_stub_deliver))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        try:
            with without_trace(self.model, gradients=True), watch:
                outputs = [
                    leaf for leaf in tree_leaves(call(self.model, example))
                    if isinstance(leaf, Tensor) and leaf.requires_grad
                ]  # fmt: skip
                errors = [torch.ones_like(output) for output in outputs]
                for error in errors:
                    watch.label(error, frozenset((ERROR,)))
                leaves = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.requires_grad]
                with gradients_aside(self.model):
                    # And not autograd.grad, which re-entrant checkpointing refuses.
                    torch.autograd.backward(outputs, errors)
                    gradients = [tensor.grad for tensor in (*parameters, *leaves)]
        finally:
            for handle in handles:
                handle.remove()
            watch.remove()
        return watch.uses(gradients)

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


def matrices_by_hand(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List (name in the module, matrix) of what one of PyTorch's own modules multiplies by hand; of others nothing."""
    base = _by_hand(module)
    named = () if base is None else module.named_parameters()
    return [(key, parameter) for key, parameter in named if base and _BY_HAND[base][0].fullmatch(key)]


def _by_hand(module: nn.Module) -> type[nn.Module] | None:
    """Give the class of PyTorch's own that multiplies by hand and that a module is of, with its forward."""
    base = next((base for base in _BY_HAND if isinstance(module, base)), None)
    expanded = getattr(module, "is_expanded", False)
    return base if base is not None and _has_torch_forward(module) and not expanded else None


def _wanting(leaf: Any, wanted: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach().clone()
    return leaf.requires_grad_() if wanted and leaf.is_floating_point() else leaf


def _stub_cut(layer: nn.Module, args: tuple) -> tuple | None:
    """Detach the input of a layer, as a delivery will."""
    if not (args and isinstance(args[0], Tensor) and args[0].requires_grad):
        return None
    cut = args[0].detach()
    cut._falign_before = args[0]  # type: ignore[attr-defined]
    return (cut, *args[1:])


def _stub_deliver(layer: nn.Module, args: tuple, y: Any) -> Any:
    """Let errors pass the layer without its weight: what is watched is where they go, and not their values."""
    before = getattr(args[0], "_falign_before", None) if args else None
    if before is None or not isinstance(y, Tensor):
        return None
    return y + before.reshape(-1)[:1].sum().to(y.dtype) * 0


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
                if id(held) not in registered and any(isinstance(part, layer_types()) for part in held.modules()):
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
                if buffer.shape != value.shape:  # observers of quantisation give theirs a shape in the first pass
                    buffer.resize_(value.shape)
                buffer.copy_(value)


def plain_copy(model: nn.Module) -> nn.Module:
    """Copy a model deeply; activations that modules keep as attributes go along detached.

    Raises:
        ValueError: something in the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        kept = {key: value for key, value in module.__dict__.items() if key not in _MODULE}
        for tensor in tree_leaves((kept, dict(module._buffers))):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                memo[id(tensor)] = tensor.detach().clone()  # deepcopy refuses it; the next forward makes it anew
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied, and a copy is what is looked at ({type(error).__name__}: {error}): keep no "
            "graph, file or generator in its attributes"
        ) from error
    for module in twin.modules():
        if isinstance(module, nn.RNNBase):  # on a GPU, now: weights that move later leave their addresses to others
            module.flatten_parameters()
    return twin


#: What every module has; parameters and buffers are leaves.
_MODULE = frozenset(nn.Module().__dict__)


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


def detached(example: Any) -> Any:
    """Copy an example, its tensors detached: what runs may ask for gradients at them."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, example)


def call(model: nn.Module, example: Any) -> Any:
    """Run a model: a tuple is positional arguments, a dict keyword arguments, anything else the input."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)
