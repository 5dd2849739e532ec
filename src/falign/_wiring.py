"""What all layers of a converted model share: one ``Wiring``, beside a ``Feedback`` in every layer."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from falign._attached import PASS_MARKS, Feedback
from falign._delivery import Cut, Way, deliver_direct, transformed
from falign._outputs import NESTED, Output, as_output, fits, pick, substitute
from falign._preserve import preserve_generators
from falign._scratch import Scratch
from falign.layers import KINDS, Layer
from falign.rules import Rule


@dataclass(kw_only=True)
class Run:
    """One running forward of a model under a direct rule: what it has cut so far."""

    watched: bool  # whether versions and hooks of tensors can be looked at
    cuts: list[Cut] = field(default_factory=list)
    fired: list[Feedback] = field(default_factory=list)
    last: Tensor | None = None  # output of the layer that ran last, where no example showed what follows it


class ThreadState(threading.local):
    """What holds for the forward passes of one thread, so that threads can share a model.

    Attributes:
        on: whether the rule is in force (``falign.backprop``).
        followed: whether it was in the latest forward: a recomputation by activation checkpointing follows that.
        target: the targets (``falign.targets``).
        measured: whether the running pass is a measurement, and no part of the training.
        way: how errors return while both gradients are taken from one forward, else None.
        runs: the forwards at work under a direct rule, the innermost last.
        fired: names of the layers that the latest of them cut.
    """

    def __init__(self) -> None:
        self.on = True
        self.followed: bool | None = None
        self.target: Tensor | None = None
        self.measured = False
        self.way: Way | None = None
        self.runs: list[Run] = []
        self.fired: set[str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ThreadState, ()  # a copy or a pickle of a model takes nothing of a forward along


@dataclass(frozen=True, kw_only=True)
class End:
    """Where an error begins under a direct rule.

    Attributes:
        output: which tensor of what the model returns.
        layer: name of the layer behind which only operations without parameters of the same shape follow (softmax):
            the error is taken at its output. None: at the model's.
        reached: names of the layers that it is delivered to; None: all.
        seen: whether an example has shown what follows behind the last layer.
    """

    output: Output = None
    layer: str | None = None
    reached: frozenset[str] | None = None
    seen: bool = True


class Wiring:
    """What all layers of one converted model share: the rule, where errors begin, and which modules it has looked at.

    It is plain Python and hangs nothing on the root module: a root that is ``nn.Sequential`` would run it as a layer.

    Args:
        rule: the rule.
        seed: of the feedback.
        ends: where errors begin, for a direct rule.
        skip: names that keep backpropagation.
        newcomers: (model, skip) -> a sentence for every layer in it that should take the rule and does not.
    """

    def __init__(
        self,
        rule: Rule,
        seed: int,
        ends: tuple[End, ...],
        skip: tuple[str, ...],
        newcomers: Callable[[nn.Module, tuple[str, ...]], list[str]],
    ) -> None:
        self.rule = rule
        self.seed = seed
        self.ends = ends
        self.skip = skip
        self.newcomers = newcomers
        self.state = ThreadState()
        self.scratch = Scratch()
        self.fired: set[str] = set()  # by the latest forward of any thread: recomputations run in threads of autograd
        self.followed = True
        self.passes = 0  # forwards of the model so far
        self.lenient = False  # whether a gradient that came by a weight alone is listed (transport), not refused
        self.modules: list[nn.Module] = []  # those that were looked at; not their ids, which are given again
        self.layers: list[tuple[Layer, Feedback, Any]] = []  # layer, its feedback, the weight that is guarded

    def look(self, model: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the root, first of all: count the pass, and look at modules that are new.

        Raises:
            RuntimeError: a layer came after ``convert`` and does not take the rule.
        """
        if torch.compiler.is_compiling():
            for module in model.modules():
                if type(module) in LAYERS and not ("feedback" in module._modules or SPARED in module.__dict__):
                    raise RuntimeError(_CHANGED)
            return
        if not (torch.is_grad_enabled() and self.state.on) or transformed():
            return
        self.passes += 1
        modules = modules_of(model)
        if modules != self.modules:
            if problems := self.newcomers(model, self.skip):
                raise RuntimeError(_CHANGED + ":\n" + "\n".join(f"- {line}" for line in problems))
            self.modules = modules
            self.layers = [
                (module, part, None)
                for module in modules
                if isinstance(part := module._modules.get("feedback"), Feedback)
            ]
        for index, (layer, part, weight) in enumerate(self.layers):
            now = layer._parameters.get("weight", layer)
            if now is not weight:  # the first time, or replaced since (load_state_dict(assign=True))
                part.guard(layer)
                self.layers[index] = layer, part, now

    def start(self, model: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the root under a direct rule: begin a run.

        Raises:
            RuntimeError: the model calls itself: errors of the outer call would be lost.
        """
        state, compiling = self.state, torch.compiler.is_compiling()
        if state.runs and torch.is_grad_enabled() and not compiling:
            del state.runs[:]
            raise RuntimeError(
                "a direct rule needs a model that does not call itself: use a layerwise rule (if an earlier "
                "forward was broken off, call again)"
            )
        state.runs.append(Run(watched=not (compiling or transformed())))

    def finish(self, model: nn.Module, args: tuple, result: Any) -> Any:
        """Forward hook of the root: hang the deliveries that were not hung on a layer's output on the model's."""
        state = self.state
        if not state.runs:  # the start was not reached: another hook in front of it raised
            return None
        run = state.runs.pop()
        if not run.cuts or result is None:  # None: the forward raised, and only the state had to be put right
            return None
        if not torch.compiler.is_compiling():
            self.fired = state.fired = {part.name for part in run.fired}
        for number, end in enumerate(self.ends):
            if end.layer is None:
                output = pick(result, end.output)
                if not end.seen and output is not run.last:
                    raise RuntimeError(
                        "something follows behind the last layer, and no example has shown what: behind a softmax the "
                        "error would be another than at the layer itself. Pass example=x to falign.convert"
                    )
                delivered = self.deliver(number, output, run)
                result = delivered if output is result else substitute(result, output, delivered)
        return result

    def deliver(self, number: int, output: Tensor, run: Run) -> Tensor:
        """The output, with the delivery of its error to the cuts hung on it."""
        end, rule = self.ends[number], self.rule
        cuts = [cut for cut in run.cuts if number in cut.feedback]
        if not cuts:
            return output
        if output.is_nested:
            raise RuntimeError(NESTED)
        for cut in cuts:
            if run.watched and cut.x._version != cut.version:
                raise RuntimeError(
                    f"the input of layer {cut.layer!r} was changed in place after the layer ran, which would change "
                    "the error delivered to it: write x = x + … in place of x += …"
                )
            if not fits(cut, number, output):
                rows, columns = cut.feedback[number].shape
                raise RuntimeError(
                    f"direct feedback of layer {cut.layer!r} is {rows} x {columns}, but the model's output is "
                    f"{tuple(output.shape)} and the layer's input {tuple(cut.x.shape)}: convert the model with an "
                    "example of the shape that it is trained on"
                )
        target, axis = None, -1
        if rule.targeted:
            if output.dim() == 1 and any(cut.x.dim() > 1 for cut in cuts):
                raise RuntimeError(
                    f"rule {rule.name!r} needs outputs (batch, classes), the model returns {tuple(output.shape)}: keep "
                    "the axis of its one output, and take it off in the loss"
                )
            target, axis = as_output(rule.name, self.state.target, output)
        reached: list[int] = []
        delivered = deliver_direct(output, target, axis, rule, number, cuts, reached, run.fired)
        if run.watched and output.requires_grad and end.layer is None:
            output.register_hook(partial(_refuse_another_way, reached))
        return delivered

    def no_weighted_bag(self, bag: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of an ``nn.EmbeddingBag``.

        Raises:
            RuntimeError: the weights of its samples want gradients, which would be errors times the looked-up weights.
        """
        weights = kwargs.get("per_sample_weights", args[2] if len(args) > 2 else None)
        if self.state.on and torch.is_grad_enabled() and isinstance(weights, Tensor) and weights.requires_grad:
            raise RuntimeError(
                "an EmbeddingBag got per_sample_weights that want gradients: these are the errors times the "
                "embedding's weights, backpropagation; detach them, or look up with nn.Embedding and add the products"
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle takes nothing of a forward along, nor the whole model by way of one of its layers."""
        return {**self.__dict__, "modules": [], "layers": [], "lenient": False}


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, quickly: this runs before every forward."""
    found, seen = [model], {id(model)}
    for module in found:
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def _refuse_another_way(reached: list[int], error: Tensor) -> None:
    """Raise in a backward that reaches the output without having passed the delivery hung on it."""
    if torch._C._current_graph_task_id() not in reached:
        raise RuntimeError(
            "the loss does not pass through the model's output that carries the error, so no layer below the last "
            "would learn: compute the loss from that output, outside the model (output= picks another)"
        )
    reached.clear()


def wirings(model: nn.Module) -> list[Wiring]:
    """The wirings of all converted models within a model, itself included, and of the one that it is a part of.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}, expected a torch.nn.Module")
    found = [wiring for module in model.modules() if (wiring := module.__dict__.get(WIRING)) is not None]
    for part in model.modules():
        if isinstance(part, Feedback) and part.wiring not in found:
            found.append(part.wiring)
    return found


def converted(model: nn.Module) -> list[Wiring]:
    """The same, where there must be one.

    Raises:
        ValueError: the model is not converted.
    """
    found = wirings(model)
    if not found:
        raise ValueError(f"the model ({type(model).__name__}) is not converted: call falign.convert(model, rule) first")
    return found


def feedbacks(model: nn.Module) -> dict[str, Feedback]:
    """{layer name, from this model on: its feedback} of a converted model, of a part of one, or of several in one."""
    converted(model)
    found = ((name, part) for name, part in model.named_modules() if isinstance(part, Feedback))
    return {name.removesuffix("feedback").removesuffix("."): part for name, part in found}


def wiring_of(model: nn.Module) -> Wiring | None:
    """The wiring of a model that was itself given to ``convert``; None of a part, a wrapper or a plain model."""
    return model.__dict__.get(WIRING)


def is_measured(model: nn.Module) -> bool:
    """Whether the running pass is a measurement, and no part of the training."""
    return any(wiring.state.measured for wiring in wirings(model))


@contextmanager
def true_errors(model: nn.Module) -> Iterator[Way]:
    """Let forwards of a converted model be walked back twice: by the rule and, once ``way.true`` is set, truly.

    For layerwise rules: every layer keeps its weight beside what its rule needs.
    """
    way, states = Way(), [wiring.state for wiring in converted(model)]
    for state in states:
        state.way = way
    try:
        yield way
    finally:
        for state in states:
            state.way = None


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Whatever a pass within does to them, buffers, random generators and modes are afterwards as they were before.

    The generators are PyTorch's (of the CPU and of the CUDA devices that the model is on), Python's and NumPy's global
    ones. Buffers are put back in place, and in their module's slot if the pass replaced them. A backward that is still
    to come may recompute a part of its forward (activation checkpointing): it does so by the rule of that forward.
    """
    parts = [part for part in model.modules() if isinstance(part, Feedback)]
    # Feedback that no pass moves is not copied: it may be as large as the weights.
    fixed = {id(part.sequence.values if part.B is None else part.B) for part in parts if not part.wiring.rule.adapts}
    kept = [
        (module, name, buffer, buffer if buffer is None or id(buffer) in fixed else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    marks = [(part, {key: getattr(part, key) for key in PASS_MARKS}) for part in parts]
    before = [(wiring, dict(vars(wiring.state)), wiring.followed, wiring.fired) for wiring in wirings(model)]
    for wiring, *_ in before:
        wiring.state.measured = True
    with preserve_generators(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in kept:
                    module._buffers[name] = buffer
                    if buffer is not None and value is not None and value is not buffer:
                        buffer.data.copy_(value)  # its version stays: a backward still to come may have saved it
            for module, training in modes:
                module.training = training
            for part, values in marks:
                vars(part).update(values)
            for wiring, state, followed, fired in before:
                vars(wiring.state).update(state)
                wiring.followed, wiring.fired = followed, fired


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within ``torch.compile``'s and the data-parallel wrappers."""
    while type(model).__name__ in ("OptimizedModule", "DistributedDataParallel", "DataParallel"):
        model = model.get_submodule("_orig_mod" if type(model).__name__ == "OptimizedModule" else "module")
    return model


#: The classes of layers that a rule takes.
LAYERS = frozenset(base for kind in KINDS.values() for base in kind.types)

#: Attribute of a model that was given to ``convert``: its wiring. No module: the root may run its modules one by one.
WIRING = "_falign"

#: Attribute of a layer that keeps backpropagation because ``skip`` names it.
SPARED = "_falign_spared"

#: Where DDP looks for the names of what it need not send to the other ranks.
DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"

_STANDARD = frozenset({*vars(nn.Module()), WIRING, SPARED, DDP_IGNORED})


def is_standard_attribute(name: str) -> bool:
    """Tell whether every module has an attribute, or a converted one by its conversion; all others are the user's."""
    return name in _STANDARD


_CHANGED = (
    "the model was changed after falign.convert, and parts of it would be trained by backpropagation: call "
    "falign.revert(model), and convert it again as it is now"
)
