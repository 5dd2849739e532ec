"""Feedback for parameters that are multiplied by hand: attention, recurrent kernels, einsum, tied heads.

Autograd saves a weight W in the forward to carry the error through the product in the backward. While a module runs in
which such products were seen, a saved-tensor hook recognises W, a view or a copy of it, and hands autograd the same
view of B in the backward. The forward is untouched, nothing is computed twice, and fused kernels stay fused.
"""

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from falign._delivery import Way, transformed
from falign._preserve import run_uncompiled

if TYPE_CHECKING:
    from falign._attached import Feedback
    from falign._wiring import Wiring

#: Nodes in which the weights of PyTorch's own modules carry an error. Elsewhere autograd saves a weight for its own
#: gradient (of a norm, a scale), and W it must be.
PRODUCT_NODES = frozenset(
    (
        "MmBackward0", "AddmmBackward0", "BmmBackward0", "BaddbmmBackward0", "AddbmmBackward0", "MvBackward0",
        "AddmvBackward0", "LinearBackward0", "TrilinearBackward0", "MkldnnRnnLayerBackward0", "CudnnRnnBackward0",
        "MiopenRnnBackward0", "ConvolutionBackward0",
    )
)  # fmt: skip

#: The one node of a compiled region: what it saved a weight for cannot be told, but products alone do (``_plan``).
_COMPILED = "CompiledFunctionBackward"

#: Nodes whose one input is a tensor that they arrange, copy or convert: B goes the same way.
_VIEWS = (
    "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsafeViewBackward0", "SliceBackward0",
    "ReshapeAliasBackward0", "ExpandBackward0", "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2",
    "UnsqueezeBackward0", "SelectBackward0", "AsStridedBackward0", "AliasBackward0", "SplitBackward0",
    "SplitWithSizesBackward0", "UnbindBackward0", "UnsafeSplitBackward0", "DiagonalBackward0", "UnfoldBackward0",
)  # fmt: skip
_COPIES = (
    "ToCopyBackward0", "CloneBackward0", "CatBackward0", "StackBackward0", "RepeatBackward0", "FlipBackward0",
    "IndexSelectBackward0", "IndexBackward0", "GatherBackward0", "ConstantPadNdBackward0", "CopyBackwards",
)  # fmt: skip
_MOVEMENTS = frozenset(_VIEWS + _COPIES)


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """A parameter in whose place autograd is handed B while one module runs.

    Attributes:
        owner: the module that has the parameter.
        key: its name there.
        part: its feedback.
        expected: whether it must be saved wherever the input of the module wants an error.
        always: whether it must be saved whatever the input wants.
    """

    owner: nn.Module
    key: str
    part: "Feedback"
    expected: bool
    always: bool


class _Held(NamedTuple):
    """Stand-in that autograd keeps for a weight: how to make B of the same form, and the weight itself."""

    pass_: "_Pass"
    make: Callable[[], Tensor]
    saved: Tensor
    nodes: frozenset[str]


@dataclass(kw_only=True, eq=False)
class _Pass:
    """One parameter in one forward of the module: the feedback of this pass, made when it is first needed."""

    site: Site
    number: int
    weight: Tensor
    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]
    version: int
    way: Way | None
    matrix: Tensor | None = None

    def fresh(self) -> bool:
        """Tell whether neither the weight, if the feedback is made of it, nor the feedback was changed meanwhile."""
        reads = self.site.part.wiring.rule.reads_weight
        same = tuple(tensor._version for tensor in self.inputs) == self.versions
        return same and not (reads and self.weight._version != self.version)

    def feedback(self) -> Tensor:
        """B in the memory layout of W, gain included.

        Raises:
            RuntimeError: W or B was changed in place between the forward and the backward.
        """
        part, rule = self.site.part, self.site.part.wiring.rule
        if not self.fresh():
            raise RuntimeError(
                f"the weight or the feedback of {part.name!r} was changed in place between a forward and its backward "
                "(an optimizer's step?): run the backward first"
            )
        if self.matrix is not None:
            return self.matrix
        with torch.no_grad():
            matrix = rule.feedback_matrix(*self.inputs)
            matrix = matrix if part.gain == 1 else matrix * part.gain
            if matrix.stride() != self.weight.stride():
                matrix = torch.empty_like(self.weight, dtype=matrix.dtype).copy_(matrix)
        self.matrix = matrix
        return matrix


class SavedHooks:
    """Forward pre-hook and hook of a module in which parameters are multiplied by hand."""

    def __init__(self, wiring: "Wiring", sites: list[Site]) -> None:
        self.wiring = wiring
        self.sites = sites

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Begin to hand out B: forward pre-hook.

        Raises:
            RuntimeError: within a transform of torch.func, forward-mode differentiation or tracing.
        """
        stack = self.wiring.state.saved
        if not torch.is_grad_enabled():
            stack.append((self, None))
            return
        resume = _without_dynamo()
        try:
            running = self._begin(module, args, kwargs) if self.sites[0].part.is_on() else None
        except RuntimeError:
            resume()
            raise
        stack.append((self, running))
        if running is None:
            resume()
        else:
            running.resume = resume
            running.hooks.__enter__()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> "_Running":
        """Prepare the hooks of a forward."""
        if transformed():
            raise RuntimeError(
                f"vmap and the other transforms of torch.func switch off the saved-tensor hooks by which "
                f"{self.sites[0].part.name!r} takes its feedback: loop over the samples, or run within "
                "`with falign.backprop(model):`"
            )
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                "forward-mode derivatives (jvp, jacfwd, hessian) pass no feedback: take them within "
                "`with falign.backprop(model):`, where they are exact"
            )
        self.sites[0].part.refuse_graphs()
        for site in self.sites:
            if site.part.follows and not site.part.is_followed(site.owner):  # a copy of the model has no hooks yet
                site.part.guard(site.owner)
        wanted = any(tensor.requires_grad for tensor in _tensors((args, kwargs)))
        return _Running(self.sites, wanted, _buffer(module))

    def leave(self, module: nn.Module, args: tuple, result: Any) -> None:
        """End it: forward hook, called where the forward raised as well.

        Raises:
            RuntimeError: a parameter that should carry the error was never saved.
        """
        stack = self.wiring.state.saved
        if not stack or stack[-1][0] is not self:  # another hook in front of ``enter`` raised
            return
        _, running = stack.pop()
        if running is None:
            return
        running.hooks.__exit__(None, None, None)
        try:
            self._end(running, result)
        finally:
            running.resume()

    def _end(self, running: "_Running", result: Any) -> None:
        """Note the backwards that will meet the module's output, and look for what was never saved."""
        parts = [site.part for site in self.sites]
        for tensor in _tensors(result):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda errors: _note(parts))
        if result is not None:
            missed = [
                site.part.name
                for site in self.sites
                if id(site) not in running.passes and (site.always or (site.expected and running.wanted))
            ]
            if running.copied:
                raise RuntimeError(
                    f"cuDNN copied {parts[0].name!r} and the other weights of its module into memory of its own, so "
                    "that the error would return by backpropagation: give the module weights that are its own "
                    "parameters, in one piece of memory (flatten_parameters()), or switch cuDNN off"
                )
            if missed:
                raise RuntimeError(
                    f"{missed[0]!r} took part in no product that autograd recorded, so its error would return by "
                    "backpropagation: call activation checkpointing on the module that multiplies, and not within it; "
                    "if the weight is copied by arithmetic or compiled away, name it in skip="
                )


def _without_dynamo() -> Callable[[], None]:
    """Run what follows in this thread uncompiled; gives what puts the compiler back.

    A compiled region saves what its compiler chose, in which no weight may be recognised.
    """
    if "torch._dynamo" not in sys.modules:
        return _nothing
    frames = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
    before = frames.set_eval_frame(None)
    return lambda: frames.set_eval_frame(before)


def _nothing() -> None:
    pass


class FirstPass:
    """Saved-tensor hooks of the first forward of a model that no example has shown.

    They look for weights of layers, and of lookups, that are multiplied outside: the error would return through them.

    Args:
        parameters: {name: parameter} of the model.
        weights: names of those that are looked for.
        lenient: () -> whether what carries the error is listed by somebody else.
    """

    def __init__(self, parameters: dict[str, Tensor], weights: Collection[str], lenient: Callable[[], bool]) -> None:
        self._names = {
            _place(weight): name
            for name, weight in parameters.items()
            if name in weights and weight.layout is torch.strided
        }
        self._leaves = {id(parameter) for parameter in parameters.values()}
        self._lenient = lenient
        self.hooks = saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> tuple[str | None, Tensor]:
        return self._names.get(_place(tensor)) if tensor.layout is torch.strided else None, tensor

    def _unpack(self, kept: tuple[str | None, Tensor]) -> Tensor:
        name, tensor = kept
        node = torch._C._current_autograd_node()
        if name is not None and node is not None and _carries(node, self._leaves) and not self._lenient():
            raise RuntimeError(
                f"parameter {name!r} is multiplied outside its layer (F.linear, @), and the error returns through it "
                "by backpropagation: convert with example=x, which shows such products, or name it in skip="
            )
        return tensor


def _carries(node: Any, parameters: Collection[int]) -> bool:
    """Tell whether a node hands an error on, and not only its gradient to a weight: the inputs of layers are cut."""
    if node.name() not in PRODUCT_NODES:
        return False
    inputs = [child for child, _ in node.next_functions if child is not None]
    return any(not all(id(leaf) in parameters for leaf in _leaves(child) or [None]) for child in inputs)


def _note(parts: list["Feedback"]) -> None:
    """Note that the running backward meets the output of a module that multiplies by hand."""
    task = torch._C._current_graph_task_id()
    for part in parts:
        if task not in part.backwards:
            part.backwards.append(task)


def _tensors(structure: Any) -> list[Tensor]:
    """List the tensors of a structure, those of packed sequences included."""
    leaves = (leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in tree_leaves(structure))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


class _Running:
    """The saved-tensor hooks of one forward."""

    def __init__(self, sites: list[Site], wanted: bool, buffer: Tensor | None) -> None:
        self.wanted = wanted
        self.buffer = buffer  # all weights of a recurrent module of cuDNN's
        self.copied = False  # by cuDNN, nobody knows how
        self.resume: Callable[[], None] = _nothing  # puts the compiler back
        self.passes: dict[int, _Pass] = {}
        self.sites: dict[int, list[tuple[Site, Tensor]]] = {}
        self.by_parameter: dict[int, Site] = {}
        for site in sites:
            weight = site.owner._parameters[site.key]
            if weight is not None:
                self.sites.setdefault(_place(weight), []).append((site, weight))
                self.by_parameter[id(weight)] = site
            site.part.note_pass()
        # Hooks nest, and only the innermost are asked: what is not ours is passed on (checkpointing, offloading).
        self.outer: tuple[Callable[..., Any], Callable[..., Any]] | None = (
            torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
        )
        self.hooks = saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Any:
        """Keep a weight as a promise of B, everything else as it is."""
        make = nodes = None
        first: _Pass | None = None
        original = tensor
        if self.buffer is not None and _is_copy(tensor, self.buffer):
            if tensor.numel() != self.buffer.numel() or not torch.equal(self.buffer.to(tensor.dtype), tensor):
                self.copied = True
            tensor = self.buffer
        if tensor.layout is torch.strided and tensor.is_floating_point():
            here = self.sites.get(_place(tensor))
            if here is not None:
                covered = [(site, weight) for site, weight in here if _overlaps(tensor, weight)]
                if covered:
                    passes = [self._pass(site, weight) for site, weight in covered]
                    first, nodes = passes[0], covered[0][0].part.nodes
                    make = _viewing(passes, tensor)
            elif tensor.grad_fn is not None and tensor.grad_fn.name() in _MOVEMENTS:
                leaves = _leaves(tensor.grad_fn)
                if leaves and all(id(leaf) in self.by_parameter for leaf in leaves):
                    passes = [self._pass(self.by_parameter[id(leaf)], leaf) for leaf in leaves]
                    first, nodes = passes[0], self.by_parameter[id(leaves[0])].part.nodes
                    moved = _moved(tensor, passes)
                    make = lambda: moved  # noqa: E731
        if make is None or first is None or nodes is None:
            return original if self.outer is None else self.outer[0](original)
        return _Held(first, make, original, nodes)

    def unpack(self, kept: Any) -> Tensor:
        """Give B where a product carries the error by a weight, and else what was saved."""
        if not isinstance(kept, _Held):
            return kept if self.outer is None else self.outer[1](kept)
        way, node = kept.pass_.way, torch._C._current_autograd_node()
        by_rule = node is not None and (node.name() in kept.nodes or node.name() == _COMPILED)
        if not by_rule or (way is not None and way.true):
            return kept.saved
        return kept.make().detach().to(kept.saved.dtype)

    def _pass(self, site: Site, weight: Tensor) -> _Pass:
        if id(site) not in self.passes:
            self.passes[id(site)] = _pass_of(site, weight)
        return self.passes[id(site)]


def _pass_of(site: Site, weight: Tensor) -> _Pass:
    """Give the feedback of a parameter in the running forward of the model: the same in all its products."""
    part = site.part
    running, number = part.running_pass() if part.running_pass is not None else None, part.wiring.passes
    fits = running is not None and running.number == number and running.weight is weight and running.fresh()
    if running is None or not fits or running.way is not part.wiring.state.way:
        inputs = part.inputs_of_pass(weight)
        running = _Pass(
            site=site,
            number=number,
            weight=weight,
            inputs=inputs,
            versions=tuple(tensor._version for tensor in inputs),
            version=weight._version,
            way=part.wiring.state.way,
        )
        part.running_pass = ref(running)  # the graph holds it, as long as a backward may come
    return running


def _buffer(module: nn.Module) -> Tensor | None:
    """Give the one piece of memory that has all weights of a recurrent module of cuDNN's; None where it is none.

    Weights that lie apart (of a copied module) are put into one: cuDNN would copy them at each forward, and carry the
    error through the copy.
    """
    if not isinstance(module, nn.RNNBase) or not torch.backends.cudnn.enabled:
        return None
    weights = [weight for weight in module._flat_weights if weight is not None]
    if not all(weight.is_cuda for weight in weights):
        return None
    if len({_place(weight) for weight in weights}) > 1:
        module.flatten_parameters()
        weights = [weight for weight in module._flat_weights if weight is not None]
    storage = weights[0].untyped_storage()
    return weights[0].detach().as_strided((storage.nbytes() // weights[0].element_size(),), (1,), 0)


def _is_copy(tensor: Tensor, buffer: Tensor) -> bool:
    """Tell whether a saved tensor is a copy of all weights that cuDNN made: under autocast, or since they lay apart."""
    same_kind = tensor.layout is torch.strided and tensor.is_floating_point() and tensor.dim() == 1
    return same_kind and _place(tensor) != _place(buffer) and tensor.numel() >= buffer.numel() > 0


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor) -> tuple[int, int]:
    """Give the first entry, and the one behind the last, of a tensor within its storage."""
    start = int(tensor.storage_offset())
    extent = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + 1 + int(extent)


def _overlaps(tensor: Tensor, weight: Tensor) -> bool:
    (low, high), (start, stop) = _span(tensor), _span(weight)
    return tensor.dtype == weight.dtype and low < stop and start < high


def _viewing(passes: list[_Pass], tensor: Tensor) -> Callable[[], Tensor]:
    """Make the view of B that a tensor is of W; where it covers several weights (a flat buffer), a copy of it."""
    size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
    alone = len(passes) == 1 and _within(tensor, passes[0].weight)

    def make() -> Tensor:
        if alone:
            return passes[0].feedback().as_strided(size, stride, offset - passes[0].weight.storage_offset())
        # Several weights, or more than one weight, in one piece of memory, such as that of cuDNN's recurrent kernels.
        whole = tensor.detach().clone(memory_format=torch.preserve_format)
        start, _ = _span(tensor)
        for one in passes:
            weight = one.weight
            target = whole.as_strided(weight.size(), weight.stride(), weight.storage_offset() - start)
            target.copy_(one.feedback())
        return whole

    return make


def _within(tensor: Tensor, weight: Tensor) -> bool:
    (low, high), (start, stop) = _span(tensor), _span(weight)
    return start <= low and high <= stop


def _leaves(node: Any) -> list[Tensor]:
    """List the leaves that a tensor is a view or a copy of; empty where anything else has part in it."""
    leaves: list[Tensor] = []
    nodes = [node]
    while nodes:
        node = nodes.pop()
        if node is None:
            return []
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.append(variable)
        elif node.name() in _MOVEMENTS:
            nodes += [child for child, _ in node.next_functions]
        else:
            return []
    return list({id(leaf): leaf for leaf in leaves}.values())


def _moved(tensor: Tensor, passes: list[_Pass]) -> Tensor:
    """Take B the way that copies and views have taken W: L(B), of the linear map L with L(W) = tensor.

    L(B) is the derivative of ⟨Lᵀv, B⟩ with respect to v.
    """
    with saved_tensors_hooks(_same, _same), torch.enable_grad():
        weights = [one.weight for one in passes]
        v = torch.zeros_like(tensor, requires_grad=True)
        back = torch.autograd.grad(tensor, weights, v, create_graph=True, retain_graph=True)
        matrices = [one.feedback().to(weight.dtype) for one, weight in zip(passes, weights, strict=True)]
        (moved,) = torch.autograd.grad(back, v, matrices)
    return moved


def _same(tensor: Tensor) -> Tensor:
    return tensor


run_uncompiled(SavedHooks.enter, SavedHooks.leave, _without_dynamo)
