"""How a rule hangs on a model: a ``Feedback`` in every layer that takes it, one ``Wiring`` for the whole."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from falign.compiled import look_at_hooks
from falign.delivery import Cut, deliver_direct, deliver_layerwise, transformed
from falign.guard import Guard, guards_of, matrices_of
from falign.layers import KINDS, Layer
from falign.outputs import Output, as_output, fits, pick, substitute
from falign.scratch import Scratch

if TYPE_CHECKING:
    from falign.rules import Rule


@dataclass(kw_only=True)
class Run:
    """One running forward of a model under a direct rule: what it has cut so far."""

    watched: bool  # whether versions and hooks of tensors can be looked at
    cuts: list[Cut] = field(default_factory=list)
    fired: list["Feedback"] = field(default_factory=list)
    last: Tensor | None = None  # output of the layer that ran last, where no example showed what follows it


class State(threading.local):
    """What holds for the forward passes of one thread, so that threads can share a model.

    Attributes:
        on: whether the rule is in force (``falign.backprop``).
        followed: whether it was in the latest forward: a recomputation by activation checkpointing follows that.
        target: the targets (``falign.targets``).
        measured: whether the running pass is a measurement, and no part of the training.
        rule: what stands for the rule while both gradients are taken from one forward, or None.
        runs: the forwards at work under a direct rule, the innermost last.
        fired: names of the layers that the latest of them cut.
    """

    def __init__(self) -> None:
        self.on = True
        self.followed: bool | None = None
        self.target: Tensor | None = None
        self.measured = False
        self.rule: Any = None
        self.runs: list[Run] = []
        self.fired: set[str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return State, ()  # a copy or a pickle of a model takes nothing of a forward along


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
        rule: "Rule",
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
        self.state = State()
        self.scratch = Scratch()
        self.monitor: ReferenceType | None = None  # the falign.measure.Monitor at work
        self.fired: set[str] = set()  # by the latest forward of any thread: recomputations run in threads of autograd
        self.followed = True
        self.passes = 0  # forwards of the model so far
        self.lenient = (
            False  # whether a gradient that came by other ways is only listed (falign.transport), not refused
        )
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
            raise RuntimeError(
                "the model's output is a nested tensor, of which a direct rule does not know the positions: pad the "
                "sequences, or use a layerwise rule"
            )
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
            target, axis = as_output(self.state.target, output)
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
        return {**self.__dict__, "monitor": None, "modules": [], "layers": [], "lenient": False}


class SharedSequence(nn.Module):
    """The one random sequence that all layers of a model read under the shared family."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)


class Feedback(nn.Module):
    """The feedback of one layer: a submodule of it, so that B follows it everywhere, with the hooks of the layer.

    ``B`` is a buffer outside ``state_dict`` (for learned or adaptive feedback: in it) with the layer's device and
    dtype. Under the shared family it is None, and the layer reads ``gain`` times a stretch of the one ``sequence``.
    Where several outputs of a model deliver errors, ``others`` names a buffer for every further one.
    """

    is_feedback = True  # by which those who may not import this class know it
    B: Tensor | None
    sequence: SharedSequence
    start: int
    shape: tuple[int, ...]

    def __init__(self, wiring: Wiring, name: str, kind: str, channels: int, matrix: Tensor) -> None:
        super().__init__()
        rule = wiring.rule
        self.wiring = wiring
        self.name = name
        self.kind = kind
        self.channels = channels
        self.gain = 1.0
        self.deviation = (
            1.0  # of the entries of B as drawn: the one number that is no function of seed, name and family
        )
        self.first_end = 0
        # Of B's entries as drawn: the numbers that are no function of seed, name and family.
        self.deviations: list[float] = []
        self.others: dict[int, tuple[str, int]] = {}  # number of the end -> name of the buffer, channels
        self.ran = False  # whether the layer has run outside of a backward
        self.since, self.met = 0, -1  # its passes since a backward met it, and which that was
        self.opaque = False  # whether it runs where no backward can be told apart: compiled, within vmap
        self.latest = -1  # number of the model's forward in which it ran last
        self.backwards: deque[int] = deque(maxlen=16)  # numbers of the backward passes that met the layer's output
        if rule.learned:
            self.B = matrix if isinstance(matrix, nn.Parameter) else nn.Parameter(matrix)
        else:
            self.register_buffer("B", matrix, persistent=rule.adapts)
        for key, value in rule.state().items():
            self.register_buffer(key, value.to(matrix.device), persistent=rule.adapts or rule.advances)
        look_at_hooks()

    @property
    def matrix(self) -> Tensor:
        """B as it is stored: with |B₀| for random signs, the number c for uniform ones."""
        matrix = self.B
        return self.stretch() if matrix is None else matrix

    def matrices(self) -> dict[int, Tensor]:
        """{number of the end: the feedback that carries its error here}, for a direct rule."""
        return {self.first_end: self.matrix, **{end: self.get_buffer(name) for end, (name, _) in self.others.items()}}

    def effective(self, weight: Tensor) -> Tensor:
        """The matrix that carries this layer's error now, signs included; to be read only, it may be B itself."""
        rule = self.wiring.rule
        with torch.no_grad():
            matrix = rule.effective(*rule.sources(self, weight, advance=False))
            return matrix if self.gain == 1 else matrix * self.gain

    def share(self, sequence: "SharedSequence", start: int, shape: tuple[int, ...], gain: float) -> None:
        """Read B from a sequence that all layers hold, in place of a B of its own."""
        self.B, self.sequence, self.start, self.shape, self.gain = None, sequence, start, shape, gain

    def own(self, matrix: Tensor) -> None:
        """Hold a B of its own again."""
        self.B, self.gain = matrix, 1.0
        del self.sequence

    def stretch(self) -> Tensor:
        """This layer's view of the shared sequence."""
        stop = self.start + torch.Size(self.shape).numel()
        return self.sequence.get_buffer("values")[self.start : stop].view(self.shape)

    def cut_layerwise(self, layer: Layer, args: tuple) -> tuple | None:
        """Forward pre-hook of the layer, layerwise wiring: the layer gets its input detached."""
        if not (torch.is_grad_enabled() and self._is_on()):
            return None
        x = self._first(layer, args)
        return (_cut(x, x if wants_error(x) or self._learns(layer) else None), *args[1:])

    def deliver_layerwise(self, layer: Layer, args: tuple, y: Tensor) -> Tensor | None:
        """Forward hook of the layer, layerwise wiring.

        Raises:
            RuntimeError: a hook of somebody else's replaced the input between the cut and the layer.
        """
        if not torch.is_grad_enabled():
            return None
        if not self._is_on():
            self._note_backwards(y)
            return None
        x = self._uncut(args[0])
        if x is None:
            self._note_backwards(y)
            return None
        fixed, trained = self.B, layer._parameters.get("weight")
        if fixed is not None and fixed.dim() > 1 and trained is not None and fixed.shape != trained.shape:
            raise RuntimeError(
                f"the weight of layer {self.name!r} is {tuple(trained.shape)}, but its feedback {tuple(fixed.shape)}: "
                "call falign.revert before neurons are taken out or put in, and convert again"
            )
        wiring = self.wiring
        rule = wiring.state.rule or wiring.rule
        weight = layer.weight if rule.reads_weight else None
        sources = rule.sources(self, weight, advance=rule.advances and self._advances())
        if rule.learned and not self._learns(layer):
            sources = (sources[0].detach(), *sources[1:])  # where W stands still, so does B
        if torch.compiler.is_compiling():
            self.opaque = True
        spec = KINDS[self.kind].spec(layer)
        return deliver_layerwise(y, x, self.gain, rule, self.kind, spec, wiring.scratch, self.backwards, sources)

    def cut_direct(self, layer: Layer, args: tuple) -> tuple | None:
        """Forward pre-hook of the layer, direct wiring."""
        if not (torch.is_grad_enabled() and self._is_on()):
            return None
        wiring, x = self.wiring, self._first(layer, args)
        runs = wiring.state.runs
        if not runs:
            fired = wiring.fired if wiring.state.fired is None else wiring.state.fired
            if self.name not in fired or not in_backward():
                raise RuntimeError(
                    f"layer {self.name!r} ran with gradients outside the forward of the converted model, where no "
                    "error can be delivered to it: call the model that was given to falign.convert, and use "
                    "torch.utils.checkpoint with use_reentrant=False"
                )
            return (_cut(x, None), *args[1:])
        run = runs[-1]
        if not torch.compiler.is_compiling():
            run.fired.append(self)
        if not run.watched:
            self.opaque = True
        if wants_error(x):
            version = x._version if run.watched else -1
            run.cuts.append(Cut(self.name, x, version, self.matrices(), self.gain, self.axes()))
        return (_cut(x, None), *args[1:])

    def deliver_direct(self, layer: Layer, args: tuple, y: Tensor) -> Tensor | None:
        """Forward hook of the layer, direct wiring: where the error begins at this layer's output, deliver it."""
        if not torch.is_grad_enabled():
            return None
        if not self._is_on():
            self._note_backwards(y)
            return None
        self._uncut(args[0])
        wiring = self.wiring
        delivered = None
        for number, end in enumerate(wiring.ends if wiring.state.runs else ()):
            if not end.seen:
                wiring.state.runs[-1].last = y
            elif end.layer == self.name:
                delivered = y = wiring.deliver(number, y, wiring.state.runs[-1])
        return delivered

    def remember(self, key: str, value: Tensor) -> None:
        """Write a buffer: in place, so that ``functional_call`` sees it; under ``torch.compile`` by replacement.

        A compiled backward may recompute what it needs from the buffer, which in-place writing would have changed
        under it (seen in torch 2.13).
        """
        if torch.compiler.is_compiling():
            setattr(self, key, value)
        else:
            getattr(self, key).copy_(value)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load what is there; the state of a plain model lacks what a rule that only counts its passes keeps.

        Feedback that was drawn takes the size that it had in the model that was saved, which the weights of that
        model determined when it was converted.
        """
        saved = local_metadata.get("deviations", self.deviations)
        kept = self.wiring.rule.learned or self.wiring.rule.adapts  # the state has B itself
        if saved != self.deviations and len(saved) == len(self.deviations) and not kept:
            if self.B is None:
                self.gain *= saved[0] / self.deviations[0]
            else:
                with torch.no_grad():
                    for matrix, then, now in zip(self.matrices().values(), saved, self.deviations, strict=True):
                        matrix.mul_(then / now)
            self.deviations = saved
        own: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, own, unexpected_keys, error_msgs)
        missing_keys += own if self.wiring.rule.learned or self.wiring.rule.adapts else []

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["deviations"] = list(self.deviations)

    def guard(self, layer: Layer) -> None:
        """Have every gradient that arrives at the layer's weights looked at: did the layer itself run?"""
        for weight in matrices_of(layer):
            if weight.requires_grad and not any(guard.part() is self for guard in guards_of(weight)):
                weight.register_post_accumulate_grad_hook(Guard(self))

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle takes nothing of a pass along."""
        return {**self.__dict__, "backwards": deque(maxlen=16), "latest": -1, "since": 0, "met": -1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        look_at_hooks()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Feedback":
        """Move to another device or dtype; numbers that came from nowhere (``to_empty``) are put back.

        Raises:
            RuntimeError: B was on the meta device, where its numbers are lost.
        """
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for key, old in before.items():
            new = self._buffers[key]
            if old is None or new is None or new.is_meta:
                continue
            if old.is_meta:
                raise RuntimeError(
                    f"the feedback of layer {self.name!r} was on the meta device, where its numbers are lost: call "
                    "falign.revert before the model goes there, and convert it again when its weights are loaded"
                )
            if new is not old and new.data_ptr() != old.data_ptr():
                with torch.no_grad():
                    new.copy_(old)
        return self

    def _note_backwards(self, y: Tensor) -> None:
        """Have the backward passes that meet the layer's output noted, where no delivery of its own does so."""
        if torch.compiler.is_compiling() or transformed() or not isinstance(y, Tensor) or y.grad_fn is None:
            self.opaque = True
            return
        backwards = self.backwards
        y.grad_fn.register_prehook(lambda errors: backwards.append(torch._C._current_graph_task_id()))

    def _uncut(self, cut: Any) -> Tensor | None:
        """What the cut of this layer carries along: the input in front of it, where an error is delivered to that.

        Raises:
            RuntimeError: a hook of somebody else's replaced the input between the cut and the layer.
        """
        if not hasattr(cut, "_falign_input"):
            raise RuntimeError(
                f"the input of layer {self.name!r} was replaced between falign's hook and the layer, by a forward "
                "pre-hook that came after convert: put it there before, and convert then"
            )
        x = cut._falign_input
        if not torch.compiler.is_compiling():
            del cut._falign_input  # the layer's graph keeps the cut, which would keep the graph in front of it
        return x

    def axes(self) -> dict[int, int]:
        """{number of the end: axis of the channels that output and input share, or 0}, for a direct rule."""
        return {self.first_end: self.channels, **{end: axis for end, (_, axis) in self.others.items()}}

    def _learns(self, layer: Layer) -> bool:
        """Whether B receives a gradient: a learned B of a weight that receives one."""
        if not (self.wiring.state.rule or self.wiring.rule).learned:
            return False
        weight = layer._parameters.get("weight")
        # Within a transform of torch.func a weight does not say that it wants a gradient, but that it is wrapped.
        return (
            weight is None
            or weight.requires_grad
            or torch._C._functorch.is_functorch_wrapped_tensor(  # pyright: ignore[reportAttributeAccessIssue]
                weight
            )
        )

    def _is_on(self) -> bool:
        """Whether the rule is in force; a recomputation by activation checkpointing follows its own forward."""
        wiring = self.wiring
        state = wiring.state
        if torch.compiler.is_compiling():
            return state.on
        if not in_backward():
            wiring.followed = state.followed = state.on
            return state.on
        # On a GPU the recomputation runs in a thread of autograd's, which has seen no forward.
        return wiring.followed if state.followed is None else state.followed

    def _first(self, layer: Layer, args: tuple) -> Tensor:
        if not args:
            raise TypeError(
                f"layer {self.name!r} was called with keyword arguments only: pass its input as the first argument, "
                "falign cuts it there"
            )
        if "forward" in layer.__dict__:
            raise RuntimeError(
                f"the forward of layer {self.name!r} was replaced after convert, so its map is not known: revert, and "
                "replace it before convert says what it thinks of it"
            )
        if torch.compiler.is_compiling():
            if _exporting():
                self.wiring.state.runs.clear()
                raise RuntimeError(_NO_GRAPH)
        else:
            self.latest = self.wiring.passes
            if torch._C._get_tracing_state() is not None:
                raise RuntimeError(_NO_GRAPH)
            if forward_ad._current_level >= 0:
                raise RuntimeError(
                    "forward-mode derivatives (jvp, jacfwd, hessian) pass no delivery of errors: take them within "
                    "`with falign.backprop(model):`, where they are exact"
                )
        return args[0]

    def _advances(self) -> bool:
        """A pass of training, and not its recomputation by activation checkpointing.

        Under re-entrant checkpointing the pass itself has no gradients, and the recomputation is all there is.
        """
        if torch.compiler.is_compiling():
            return self.training
        met = self.backwards[-1] if self.backwards else -1
        if not in_backward():
            self.ran, self.since = True, self.since + 1 if met == self.met else 1
            self.met = met
            return self.training
        if self.wiring.rule.fresh and self.training and self.ran and self.since > 1:
            self.since = 0
            raise RuntimeError(
                f"layer {self.name!r} ran more than once before this backward pass, and activation checkpointing does "
                f"not say which pass it recomputes: rule {self.wiring.rule.name!r} has other feedback in each; do "
                "without checkpointing"
            )
        return self.training and not self.ran

    def __prepare_scriptable__(self) -> None:
        """Refuse ``torch.jit.script``, which asks every module in this way."""
        raise RuntimeError(_NO_GRAPH)

    def extra_repr(self) -> str:
        """What ``print(model)`` says."""
        shape = "x".join(map(str, self.matrix.shape)) or "one number a layer"
        return f"{self.wiring.rule.name}, {shape}"


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


def _cut(x: Tensor, carried: Tensor | None) -> Tensor:
    """The input detached; what the hook behind the layer needs travels on it, as threads share the module."""
    cut = x.detach()
    cut._falign_input = carried  # type: ignore[attr-defined]
    return cut


def _exporting() -> bool:
    # Not is_exporting(), which Dynamo of torch 2.11 takes for true whenever it compiles.
    return getattr(torch.compiler, "_is_exporting_flag", False)


def wants_error(x: Tensor) -> bool:
    """Whether a backward may ask for the error at x.

    Within ``torch.vmap`` a tensor does not say that a graph outside records it, so there the answer is yes.
    """
    return x.requires_grad or transformed()


def in_backward() -> bool:
    """Whether this thread is inside an autograd backward, where activation checkpointing recomputes a forward."""
    return torch._C._current_graph_task_id() != -1


def wirings(model: nn.Module) -> list[Wiring]:
    """The wirings of all converted models within a model, itself included, and of the one that it is a part of."""
    found = [wiring for module in model.modules() if (wiring := module.__dict__.get("_falign")) is not None]
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


#: The classes of layers that a rule takes.
LAYERS = frozenset(base for kind in KINDS.values() for base in kind.types)

#: Attribute of a layer that keeps backpropagation because ``skip`` names it.
SPARED = "_falign_spared"

_CHANGED = (
    "the model was changed after falign.convert, and parts of it would be trained by backpropagation: call "
    "falign.revert(model), and convert it again as it is now"
)
_NO_GRAPH = (
    "a converted model cannot be exported, traced or scripted, the graph would lose its rule: take the plain network, "
    "falign.revert(copy.deepcopy(model)); torch.export and torch.jit.trace also take this one within torch.no_grad()"
)
