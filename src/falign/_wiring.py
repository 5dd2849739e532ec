"""The wiring of a converted model: what all its layers share, beside a ``Feedback`` in every layer."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from falign._attached import PASS_MARKS, Feedback, FeedbackOfParameters
from falign._delivery import Cut, Way, deliver_direct, in_backward, joined, matched, transformed
from falign._guard import AveragedGradients
from falign._memory import keep_change, memories_of
from falign._outputs import NESTED, Output, as_output, fits, pick, substitute
from falign._preserve import preserve_generators
from falign._projector import Projection
from falign._saved import FirstPass, SavedHooks
from falign._scratch import Scratch
from falign.layers import Layer, layer_types
from falign.rules import Rule
from falign.transforms import Transform


@dataclass(kw_only=True)
class Run:
    """One running forward of a model under a direct rule: what it has cut so far."""

    watched: bool  # whether versions and hooks of tensors can be looked at
    cuts: list[Cut] = field(default_factory=list)
    fired: list[Feedback] = field(default_factory=list)
    parts: dict[str, Feedback] = field(default_factory=dict)  # of the cuts, by their names
    calls: dict[str, int] = field(default_factory=dict)  # how often each layer has run
    last: Tensor | None = None  # output of the layer that ran last, where no example showed what follows it


class ThreadState(threading.local):
    """State of the forward passes of one thread: threads may share a model.

    Attributes:
        on: whether the rule is in force (``falign.backprop``).
        followed: whether it was in the latest forward: a recomputation by activation checkpointing follows that.
        target: the targets (``falign.targets``).
        calibrates: whether the running pass is backpropagated because ``falign.calibrate`` has counted to it.
        measured: whether the running pass is a measurement, and no part of the training.
        tangents: what makes of a cut input one with a tangent, while the Jacobian is measured, else None.
        way: how errors return while both gradients are taken from one forward, else None.
        runs: the forwards at work under a direct rule, the innermost last.
        fired: names of the layers that the latest of them cut.
        saved: the modules at work in which parameters are multiplied by hand, with what they do to saved tensors.
        first_pass: what looks at the first forward of a model that no example has shown.
    """

    def __init__(self) -> None:
        self.on = True
        self.followed: bool | None = None
        self.target: Tensor | None = None
        self.calibrates = False
        self.measured = False
        self.tangents: Callable[[Feedback, Tensor], Tensor] | None = None
        self.way: Way | None = None
        self.runs: list[Run] = []
        self.fired: set[str] | None = None
        self.saved: list[tuple[SavedHooks, Any]] = []
        self.first_pass: FirstPass | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ThreadState, ()  # a copy or a pickle of a model takes nothing of a forward along


@dataclass(frozen=True, kw_only=True)
class End:
    """Place where an error begins under a direct rule.

    Attributes:
        output: which tensor of what the model returns.
        layer: name of the module at whose output the error is taken: a layer behind which only operations without
            parameters of the same shape follow (softmax), or what ``error_at`` names. None: at the model's.
        reached: names of the layers that it is delivered to; None: all.
        picked: whether an output of the model is what the error belongs to; else it is that of the module ``layer``.
        seen: whether an example has shown what follows behind the last layer.
    """

    output: Output = None
    layer: str | None = None
    reached: frozenset[str] | None = None
    picked: bool = True
    seen: bool = True


class Start:
    """Delivery of an error at the output of a module that has no feedback of its own: a forward hook of it."""

    def __init__(self, wiring: "Wiring", number: int) -> None:
        self.wiring, self.number = wiring, number

    def deliver(self, module: nn.Module, args: tuple, y: Any) -> Any:
        """Give the module's output, whose backward delivers its error.

        Raises:
            RuntimeError: the output is no tensor, or the module runs a second time.
        """
        wiring = self.wiring
        runs, name = wiring.state.runs, wiring.ends[self.number].layer
        if not (runs and torch.is_grad_enabled() and wiring.state.on):
            return None
        if not torch.compiler.is_compiling() and in_backward():
            return None  # a recomputation by activation checkpointing
        if not isinstance(y, Tensor):
            raise RuntimeError(
                f"the error is to be taken at {name!r}, which returned a {type(y).__name__}, expected a tensor"
            )
        calls = runs[-1].calls
        calls[f"error at {name}"] = calls.get(f"error at {name}", 0) + 1
        if calls[f"error at {name}"] > 1:
            raise RuntimeError(
                f"the error is to be taken at {name!r}, which runs several times in one forward, each with an error of "
                "its own: name a module that runs once"
            )
        return wiring.deliver(self.number, y, runs[-1])


class Wiring:
    """State that all layers of a converted model share: the rule, where errors begin, and which modules were seen.

    It is plain Python and no submodule of the root: a root that is ``nn.Sequential`` would run it as a layer.

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
        self.free: frozenset[str] = frozenset()  # parameters through which errors pass by the rule's definition
        self.changes: tuple[Transform, ...] = ()  # of errors, in front of their way back
        self.projection: Projection | None = None  # what carries errors in place of matrices
        self.untrained: tuple[str, ...] = ()  # parameters that want no gradient by the rule
        self.newcomers = newcomers
        self.state = ThreadState()
        self.scratch = Scratch()
        # As in ``ThreadState``, of the latest forward of any thread: on a GPU activation checkpointing recomputes in a
        # thread of autograd's, which has seen no forward and so has no state of its own.
        self.fired: set[str] = set()
        self.followed = True
        self.passes = 0  # forwards of the model so far
        self.measuring = 0  # measurements at work, whose gradients train nothing
        self.explained: tuple[str, ...] = ()  # parameters of which an example has shown what they do
        self.owners: list[tuple[nn.Module, str]] = []  # of parameters that are multiplied by hand, with their names
        self.unseen: frozenset[str] = frozenset()  # weights of which no example has shown that layers alone use them
        self.lenient = False  # whether a gradient that came by a weight alone is listed (transport), not refused
        self.modules: list[nn.Module] = []  # seen by the latest forward; not their ids, which Python gives again
        self.layers: list[tuple[Layer, Feedback, Any]] = []  # layer, its feedback, the weight that is guarded
        self.averaged: AveragedGradients | None = None  # of the latest backward, where processes train together

    def check_modules(self, model: nn.Module, args: tuple) -> None:
        """Count the pass, and check modules that are new: forward pre-hook of the root, before all others.

        Raises:
            RuntimeError: a layer came after ``convert`` and does not take the rule.
        """
        if torch.compiler.is_compiling():
            # Compiled code runs without this hook: what is checked once, while it is made, must be enough.
            for module in model.modules():
                if type(module) in layer_types() and not ("feedback" in module._modules or SPARED in module.__dict__):
                    raise RuntimeError(_CHANGED)
            return
        if not (torch.is_grad_enabled() and self.state.on) or transformed():
            return
        self.passes += 1
        modules = modules_of(model)
        if self.unseen and self.state.first_pass is None:
            self.state.first_pass = FirstPass(dict(model.named_parameters()), self.unseen, lambda: self.lenient)
            self.state.first_pass.hooks.__enter__()
        if modules != self.modules:
            problems = self.newcomers(model, (*self.skip, *self.explained))
            here = {id(module) for module in modules}
            problems += [f"parameter {name!r} was replaced" for owner, name in self.owners if id(owner) not in here]
            if problems:
                raise RuntimeError(_CHANGED + ":\n" + "\n".join(f"- {line}" for line in problems))
            self.modules = modules
            self.layers = [(module, part, None) for module in modules for part in parts_of(module)]
        for index, (layer, part, weight) in enumerate(self.layers):
            weight_now = layer._parameters.get(part.parameter or "weight", layer)
            if weight_now is not weight:  # the first time, or replaced since (load_state_dict(assign=True))
                part.guard(layer)
                self.layers[index] = layer, part, weight_now

    def end_first_pass(self, model: nn.Module, args: tuple, result: Any) -> None:
        """Stop looking for weights that are multiplied outside their layer: forward hook of the root."""
        first, self.state.first_pass = self.state.first_pass, None
        if first is not None:
            first.hooks.__exit__(None, None, None)
            if result is not None:
                self.unseen = frozenset()

    def start(self, model: nn.Module, args: tuple) -> None:
        """Begin a run: forward pre-hook of the root under a direct rule.

        Raises:
            RuntimeError: the model calls itself: errors of the outer call would be lost.
        """
        state, compiling = self.state, torch.compiler.is_compiling()
        if state.runs and torch.is_grad_enabled() and not compiling:
            del state.runs[:]  # or the run that was broken off would stand in the way of the next call as well
            raise RuntimeError(
                "a direct rule needs a model that does not call itself: use a layerwise rule (if an earlier "
                "forward was broken off, call again)"
            )
        state.runs.append(Run(watched=not (compiling or transformed())))

    def finish(self, model: nn.Module, args: tuple, result: Any) -> Any:
        """Deliver at the model's output what was not delivered at a layer's: forward hook of the root."""
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
        """Give the output, of the same shape, whose backward delivers its error to the cuts."""
        end, rule = self.ends[number], self.rule
        cuts = [cut._replace(calls=run.calls.get(cut.layer, 1)) for cut in run.cuts if number in cut.feedback]
        if not cuts:
            return output
        cuts = [run.parts[cut.layer].completed(cut, number) for cut in cuts]
        if output.is_nested:
            raise RuntimeError(NESTED)
        for cut in cuts:
            if run.watched and cut.x._version != cut.version:
                raise RuntimeError(
                    f"the input of layer {cut.layer!r} was changed in place after the layer ran, which would change "
                    "the error delivered to it: write x = x + … in place of x += …"
                )
            if not fits(cut, number, output):
                rows, columns = cut.shape
                times = f" in each of its {cut.calls} calls" if cut.calls > 1 else ""
                raise RuntimeError(
                    f"direct feedback of layer {cut.layer!r} is {rows} x {columns}, but the model's output is "
                    f"{tuple(output.shape)} and the layer's input {tuple(cut.x.shape)}{times}: convert the model with "
                    "an example of the shape that it is trained on"
                )
        if type(rule).observe is not Rule.observe:
            cuts = self._observe(run, number, output.detach(), cuts)
        if type(rule).observe_error is not Rule.observe_error:
            cuts = [self._observe_error(run.parts[cut.layer], number, cut) for cut in cuts]
        target, axis = None, -1
        if rule.targeted:
            if output.dim() == 1 and any(cut.x.dim() > 1 for cut in cuts):
                raise RuntimeError(
                    f"rule {rule.name!r} needs outputs (batch, classes), the model returns {tuple(output.shape)}: keep "
                    "the axis of its one output, and take it off in the loss"
                )
            target, axis = as_output(rule.name, self.state.target, output)
        reached: list[int] = []  # the delivery appends the number of each backward, the hook below looks for it
        changes, (memories, tensors) = self.transforms(), memories_of(self.changes, run.parts.values(), number)
        delivered = deliver_direct(
            output, target, axis, rule, changes, number, cuts, memories, tensors, self.projection, reached, run.fired
        )
        if run.watched and output.requires_grad and end.layer is None:
            output.register_hook(partial(_refuse_another_way, reached))
        return delivered

    def _observe(self, run: Run, number: int, output: Tensor, cuts: list[Cut]) -> list[Cut]:
        """Let the rule move the feedback of cuts in training; the pass keeps the B that it had, whatever comes later.

        Raises:
            RuntimeError: a transform of ``torch.func`` shows single samples.
        """
        moved = observed(self.rule, number, output, [cut for cut in cuts if self._moves(run.parts[cut.layer])])
        for layer, matrix in moved.items():
            part = run.parts[layer]
            part.remember("B" if number == part.first_end else part.others[number][0], matrix)
        return [
            cut._replace(feedback={**cut.feedback, number: moved[cut.layer]}) if cut.layer in moved else cut
            for cut in cuts
        ]

    def _observe_error(self, part: Feedback, number: int, cut: Cut) -> Cut:
        """Note in a cut, in training, what the backward is to move by the error that it delivers there."""
        if not self._moves(part):
            return cut
        key = self.rule.moved + ("" if number == part.first_end else str(number))
        return cut._replace(keep=partial(keep_change, part, key))

    def _moves(self, part: Feedback) -> bool:
        """Tell whether the rule may move the feedback of a cut in this pass: in training.

        Raises:
            RuntimeError: a transform of ``torch.func`` shows single samples.
        """
        if part.training and transformed():
            raise RuntimeError(
                f"rule {self.rule.name!r} looks at whole batches, of which torch.func (vmap, grad) shows single "
                "samples: take gradients by loss.backward()"
            )
        return part.training

    def transforms(self) -> tuple[Transform, ...]:
        """Give the transforms of errors.

        Raises:
            RuntimeError: there are some, and a transform of ``torch.func`` hides the batch from them.
        """
        if (self.changes or self.projection is not None) and transformed():
            name = "transform=" if self.changes else "projector="
            raise RuntimeError(
                f"{name} looks at the errors of a whole batch, of which torch.func (vmap, grad) shows single "
                "samples: take gradients by loss.backward()"
            )
        return self.changes

    def refuse_unreached(self, layer: nn.Module, args: tuple) -> None:
        """Refuse a layer of which no example has shown the input: forward pre-hook of such a layer.

        Raises:
            RuntimeError: it runs with gradients, and its feedback has no shape.
        """
        if self.state.on and torch.is_grad_enabled():
            raise RuntimeError(
                f"a layer runs that the example did not reach ({type(layer).__name__} with weights "
                f"{tuple(layer.get_parameter('weight').shape)}), so its feedback has no shape: convert with an example "
                "that reaches it, or name it in skip="
            )

    def no_weighted_bag(self, bag: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuse weights of the samples that want gradients: forward pre-hook of an ``nn.EmbeddingBag``.

        Raises:
            RuntimeError: they do, and their gradients would be errors times the looked-up weights.
        """
        weights = kwargs.get("per_sample_weights", args[2] if len(args) > 2 else None)
        if self.state.on and torch.is_grad_enabled() and isinstance(weights, Tensor) and weights.requires_grad:
            raise RuntimeError(
                "an EmbeddingBag got per_sample_weights that want gradients: these are the errors times the "
                "embedding's weights, backpropagation; detach them, or look up with nn.Embedding and add the products"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what forwards have left, and the modules: a copy of one layer would copy the whole model."""
        fresh = {"modules": [], "layers": [], "lenient": False, "measuring": 0, "averaged": None}
        return {**self.__dict__, **fresh}


def modules_of(model: nn.Module) -> list[nn.Module]:
    """List all modules of a model, in a third of the time of ``model.modules()``: this runs before every forward."""
    modules, seen = [model], {id(model)}
    for module in modules:  # it grows meanwhile
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)
    return modules


def observed(rule: Rule, number: int, output: Tensor, cuts: list[Cut]) -> dict[str, Tensor]:
    """Map layers to the B that a rule makes of what a pass shows, all calls of a layer together."""
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for cut in cuts:
        outputs, features = cut.feedback[number].shape
        seen = matched(output, cut.x.detach(), (outputs, features), cut.routes[number], call=cut.call)
        rows.setdefault(cut.layer, []).append(seen)
    with torch.no_grad():
        return {
            cut.layer: rule.observe(cut.feedback[number], *joined(rows[cut.layer]))
            for cut in {cut.layer: cut for cut in cuts}.values()
        }


def parts_of(module: nn.Module) -> list[Feedback]:
    """List the feedback that a module has: as a layer, and of the parameters that are multiplied by hand."""
    feedback = module._modules.get("feedback")
    if not isinstance(feedback, (Feedback, FeedbackOfParameters)):
        return []
    own = [feedback] if isinstance(feedback, Feedback) else []
    return own + [part for part in feedback._modules.values() if isinstance(part, Feedback)]


def _refuse_another_way(reached: list[int], error: Tensor) -> None:
    """Raise in a backward that reaches the output without having passed the delivery."""
    if torch._C._current_graph_task_id() not in reached:
        raise RuntimeError(
            "the loss does not pass through the model's output that carries the error, so no layer below the last "
            "would learn: compute the loss from that output, outside the model (output= picks another)"
        )
    reached.clear()


def wirings(model: nn.Module) -> list[Wiring]:
    """Collect the wirings of all converted models within a model, itself included, and of the one it is a part of.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}, expected a torch.nn.Module")
    collected = [wiring for module in model.modules() if (wiring := module.__dict__.get(WIRING)) is not None]
    for part in model.modules():
        if isinstance(part, Feedback) and part.wiring not in collected:
            collected.append(part.wiring)
    return collected


def converted(model: nn.Module) -> list[Wiring]:
    """Collect the wirings as ``wirings`` does, where there must be one.

    Raises:
        ValueError: the model is not converted.
    """
    collected = wirings(model)
    if not collected:
        raise ValueError(f"the model ({type(model).__name__}) is not converted: call falign.convert(model, rule) first")
    return collected


def feedbacks(model: nn.Module) -> dict[str, Feedback]:
    """Map the names of layers, from this model on, to their feedback; of a part of a converted model as well.

    The feedback of a parameter that is multiplied by hand is under the name of the parameter.

    Raises:
        ValueError: the model is not converted.
    """
    converted(model)
    return {
        full: part
        for name, module in model.named_modules()
        for part in parts_of(module)
        if (full := _full_name(name, part)) is not None
    }


def _full_name(name: str, part: Feedback) -> str | None:
    """Name what a part is the feedback of, beneath the module that keeps it; None if it is outside of this model."""
    names = name.split(".") if name else []
    if part.levels > len(names):
        return None
    names = names[: len(names) - part.levels]
    return ".".join([*names, *([part.parameter] if part.parameter else [])]) + part.slot


def wiring_of(model: nn.Module) -> Wiring | None:
    """Give the wiring of a model that was itself given to ``convert``; None of a part, a wrapper or a plain model."""
    return model.__dict__.get(WIRING)


def untrained(model: nn.Module) -> tuple[str, ...]:
    """Name the parameters that want no gradient by the rule of a model."""
    wiring = wiring_of(model)
    return () if wiring is None else wiring.untrained


def is_measured(model: nn.Module) -> bool:
    """Tell whether the running pass is a measurement, and no part of the training."""
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
    """Put back buffers, random generators and modes afterwards, whatever the passes within have done to them.

    The generators are PyTorch's (of the CPU and of the CUDA devices that the model is on), Python's and NumPy's global
    ones. Buffers are put back in place, and in their module's slot if the pass replaced them. A backward that is still
    to come may recompute a part of its forward (activation checkpointing): it does so by the rule of that forward.
    """
    parts = [part for part in model.modules() if isinstance(part, Feedback)]
    # Feedback that no pass moves is not copied: it is as large as the weights.
    fixed = {id(part.sequence.values if part.B is None else part.B) for part in parts if not part.wiring.rule.adapts}
    buffers = [
        (module, name, buffer, buffer if buffer is None or id(buffer) in fixed else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    marks = [(part, {key: getattr(part, key) for key in PASS_MARKS}) for part in parts]
    before = [(wiring, dict(vars(wiring.state)), wiring.followed, wiring.fired) for wiring in wirings(model)]
    for wiring, *_ in before:
        wiring.state.measured = True
        wiring.measuring += 1
    with preserve_generators(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer
                    if buffer is not None and value is not None and value is not buffer:
                        buffer.data.copy_(value)  # its version stays: a backward still to come may have saved it
            for module, training in modes:
                module.training = training
            for part, values in marks:
                vars(part).update(values)
            for wiring, state, followed, fired in before:
                vars(wiring.state).update(state)
                wiring.measuring -= 1
                wiring.followed, wiring.fired = followed, fired


def unwrapped(model: nn.Module) -> nn.Module:
    """Give the module within ``torch.compile``'s and the data-parallel wrappers."""
    while type(model).__name__ in ("OptimizedModule", "DistributedDataParallel", "DataParallel"):
        model = model.get_submodule("_orig_mod" if type(model).__name__ == "OptimizedModule" else "module")
    return model


def unwrapped_optimizer(optimizer: Any) -> Any:
    """Give the optimizer within Accelerate's and Lightning's wrappers: the one whose steps are real ones."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


#: Attribute of a model that was given to ``convert``: its wiring. No module: the root may run its modules one by one.
WIRING = "_falign"

#: Attribute of a layer that keeps backpropagation because ``skip`` names it.
SPARED = "_falign_spared"

#: Where DDP looks for the names of what it need not send to the other ranks.
DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"

_STANDARD = frozenset({*vars(nn.Module()), WIRING, SPARED, DDP_IGNORED})


def is_standard_attribute(name: str) -> bool:
    """Tell whether every module has an attribute, or a converted one by its conversion; all others are the user's."""
    return name in _STANDARD or name.startswith(f"{WIRING}_")


_CHANGED = (
    "the model was changed after falign.convert, and parts of it would be trained by backpropagation: call "
    "falign.revert(model), and convert it again as it is now"
)
