"""The feedback that is attached to one layer: B, and the hooks that cut the layer's input and deliver its error."""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from falign._cuts import map_arguments
from falign._delivery import Cut, EitherWay, Route, deliver_layerwise, in_backward, transformed, wants_error
from falign._guard import Follower, Guard, followers_of, guards_of, matrices_of
from falign._memory import memories_of
from falign._preserve import exporting, look_at_hooks, refuse_forward_mode
from falign.layers import KINDS, Layer

if TYPE_CHECKING:
    from falign._wiring import Run, Wiring


#: Attributes of a ``Feedback`` that every pass changes; a pass that only measures puts them back.
PASS_MARKS = ("has_run", "last_pass", "untraceable", "passes_since_backward", "last_backward")


class SharedSequence(nn.Module):
    """The one random sequence that all layers of a model read under the shared family."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)


class FeedbackOfParameters(nn.Module):
    """The feedback of parameters that a module multiplies by hand: a ``Feedback`` each, under the parameter's name."""

    is_feedback = True


class Feedback(nn.Module):
    """The feedback of one layer or parameter: a submodule, so that B follows it everywhere, with the layer's hooks.

    ``B`` is a buffer outside ``state_dict`` (for learned or adaptive feedback: in it) with the layer's device and
    dtype. Under the shared family it is None, and the layer reads ``gain`` times a stretch of the one ``sequence``.
    Where several outputs of a model deliver errors, ``others`` names a further B for every other one.
    """

    is_feedback = True  # for ``_survey``, which stands below this module and cannot ask isinstance
    B: Tensor | None
    sequence: SharedSequence
    start: int
    shape: tuple[int, ...]

    def __init__(
        self,
        wiring: "Wiring",
        name: str,
        kind: str,
        route: Route,
        matrix: Tensor,
        factors: dict[str, Tensor],
        end: int,
        size: tuple[int, ...],
    ) -> None:
        super().__init__()
        rule = wiring.rule
        self.wiring = wiring
        self.name = name
        self.kind = kind
        self.route = route
        self.silent = False  # it cuts, and no error is delivered there
        # Of a module that is cut as a whole: the argument that this feedback is for ("[0]", "[memory]"), what is put
        # behind the module's name for it, and how far above the module that keeps it the cut one stands.
        self.path, self.slot, self.levels = "", "", 0
        self.further: list[Feedback] = []  # that of the module's other arguments
        self.gain, self.first_end = 1.0, end
        self.parameter: str | None = None  # name in its module of what is multiplied by hand; None: a layer's weight
        self.running_pass: Callable[[], Any] | None = None  # of the latest forward, for products of the same parameter
        self.nodes: frozenset[str] = frozenset()  # of autograd, in which that parameter carries the error
        self.follows = False  # whether a learned B takes the gradient of W itself, whatever uses W has
        self.kept: tuple[str, ...] = ()  # names of the buffers beside B that the rule keeps here
        # Standard deviations of B's entries, one an output: all else of B is a function of seed, name and family, so
        # with these numbers in the state_dict a model that is built anew gets the same B.
        self.deviations: list[float] = []
        self.others: dict[int, tuple[str, Route]] = {}  # number of the end -> name of the tensor, route
        # What passes leave here, for ``Guard``, which asks whether a gradient came by the layer itself, and for rules
        # that draw anew in every pass, which must know a recomputation by activation checkpointing from a pass.
        self.has_run = False  # outside of a backward
        self.passes_since_backward, self.last_backward = 0, -1
        self.untraceable = False  # it runs where no backward can be told apart: compiled, within vmap
        self.last_pass = -1  # number of the model's forward in which it ran last
        # Numbers of the backward passes that met the layer's output or took B for the parameter; and of those that met
        # it where no error was delivered.
        self.backwards: deque[int] = deque(maxlen=16)
        self.true_backwards: deque[int] = deque(maxlen=16)
        self.learning_backwards: deque[int] = deque(maxlen=16)  # that gave B a gradient of its own making
        self.sharers: list[Feedback] = [self]  # all feedback with the same B: that of tied weights
        if rule.learned:
            self.B = matrix if isinstance(matrix, nn.Parameter) else nn.Parameter(matrix)
        else:
            self.register_buffer("B", matrix, persistent=rule.adapts)
        for key, value in rule.state().items():
            self.register_buffer(key, value.to(matrix.device), persistent=rule.adapts or rule.advances)
        self.kept = tuple(rule.state())
        self.factors: dict[int, tuple[str, ...]] = {}  # number of the end -> names of those of its B
        self.sizes: dict[int, tuple[int, ...]] = {}  # number of the end -> shape of B as it carries its error
        self.keep_factors(end, factors, matrix, size)
        look_at_hooks()

    @property
    def matrix(self) -> Tensor:
        """B as the rule keeps it: |B₀| for random signs, the number c for uniform ones."""
        matrix = self.B
        return self.stretch() if matrix is None else matrix

    def keep_factors(self, end: int, factors: dict[str, Tensor], matrix: Tensor, size: tuple[int, ...]) -> None:
        """Keep matrices beside the B of an output, with its device and dtype, as buffers, and its size."""
        rule, suffix = self.wiring.rule, "" if end == self.first_end else str(end)
        for key, value in factors.items():
            self.register_buffer(key + suffix, value.to(matrix), persistent=rule.learned or rule.adapts)
        self.sizes[end] = size
        self.factors[end] = tuple(key + suffix for key in factors)
        self.kept = (*self.kept, *self.factors[end])

    def completed(self, cut: Cut, end: int) -> Cut:
        """Give a cut with what the error of an output needs: what B is made of, and its shape."""
        factors = tuple(self.get_buffer(name) for name in self.factors[end]) if self.wiring.rule.factored else ()
        return cut._replace(factors=factors, shape=self.sizes[end], start=0 if self.B is not None else self.start)

    def kept_matrices(self) -> dict[int, Tensor]:
        """Map the number of each output that delivers here to B as the rule keeps it."""
        return {self.first_end: self.matrix, **{end: getattr(self, name) for end, (name, _) in self.others.items()}}

    def matrices(self) -> dict[int, Tensor]:
        """Map the number of each output that delivers here to the feedback of its error, for a direct rule."""
        own = self.kept_matrices()
        if self.wiring.rule.factored:
            factors = {end: [self.get_buffer(name) for name in names] for end, names in self.factors.items()}
            return {end: self.wiring.rule.feedback_matrix(matrix, *factors[end]) for end, matrix in own.items()}
        return own

    def inputs_of_pass(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Collect the tensors that determine the feedback of a parameter in this pass, which may move with it."""
        rule = self.wiring.rule
        reads = rule.reads_weight or rule.wiring == "direct"
        return rule.feedback_inputs(self, weight if reads else None, advance=rule.advances and self._advances())

    def met(self, backward: int) -> bool:
        """Tell whether a backward pass, by its number, was carried by B."""
        return any(backward in part.backwards for part in self.sharers)

    def note_pass(self) -> None:
        """Note that a module runs that may multiply by the parameter."""
        self.last_pass = self.wiring.passes

    def feedback_matrix(self, weight: Tensor) -> Tensor:
        """Make the matrix that carries this layer's error now, signs included; to be read only, it may be B itself."""
        rule = self.wiring.rule
        with torch.no_grad():
            matrix = rule.feedback_matrix(*rule.feedback_inputs(self, weight, advance=False))
            return matrix if self.gain == 1 else matrix * self.gain

    def share(self, sequence: "SharedSequence", start: int, shape: tuple[int, ...], gain: float) -> None:
        """Read B from a sequence that all layers hold, in place of a B of its own."""
        self.B, self.sequence, self.start, self.shape, self.gain = None, sequence, start, shape, gain

    def unshare(self, matrix: Tensor) -> None:
        """Hold a B of its own again."""
        self.B, self.gain = matrix, 1.0
        del self.sequence

    def stretch(self) -> Tensor:
        """View the part of the shared sequence that is this layer's B."""
        values = self.sequence.get_buffer("values")
        if values.dim() == 2:  # of a projector
            return values[:, self.start : self.start + self.shape[1]]
        return values[self.start : self.start + torch.Size(self.shape).numel()].view(self.shape)

    def cut_layerwise(self, layer: Layer, args: tuple) -> tuple | None:
        """Detach the layer's input: forward pre-hook of the layer, layerwise wiring."""
        if not (torch.is_grad_enabled() and self.is_on()):
            return None
        x = self._first(layer, args)
        keeps = wants_error(x) or self._learns(layer) or self._reuses(layer)
        return (_cut(x, x if keeps else None), *args[1:])

    def deliver_layerwise(self, layer: Layer, args: tuple, y: Tensor) -> Tensor | None:
        """Deliver the error at the layer's output to its input: forward hook of the layer, layerwise wiring.

        Raises:
            RuntimeError: a hook of somebody else's replaced the input between the cut and the layer.
        """
        if not torch.is_grad_enabled():
            return None
        if not self.is_on():
            self._note_backwards(y)
            return None
        x = self._uncut(args[0])
        if x is None:
            self._note_backwards(y)
            return None
        matrix, weight = self.B, layer._parameters.get("weight")
        if matrix is not None and matrix.dim() > 1 and weight is not None and matrix.shape != weight.shape:
            raise RuntimeError(
                f"the weight of layer {self.name!r} is {tuple(weight.shape)}, but its feedback {tuple(matrix.shape)}: "
                "call falign.revert before neurons are taken out or put in, and convert again"
            )
        wiring = self.wiring
        rule, way = wiring.rule, wiring.state.way
        weight = layer.weight if rule.reads_weight or way is not None else None
        inputs = rule.feedback_inputs(self, weight, advance=rule.advances and self._advances())
        backwards = self.backwards
        if rule.learned and not self._learns(layer):
            inputs = (inputs[0].detach(), *inputs[1:])  # where W stands still, so does B; or it takes W's gradient
        elif rule.reuses_gradient:
            backwards = self.learning_backwards
        if way is not None:
            assert weight is not None
            whole = weight.detach() if self.gain == 1 else weight.detach() / self.gain
            rule, inputs = EitherWay(rule=rule, way=way), (*inputs, whole)
        if torch.compiler.is_compiling():
            self.untraceable = True
        spec = KINDS[self.kind].spec(layer)
        changes, (memories, tensors) = wiring.transforms(), memories_of(wiring.changes, [self], self.first_end)
        inputs, scratch = (*inputs, *tensors), wiring.scratch
        return deliver_layerwise(y, x, self.gain, rule, self.kind, spec, scratch, backwards, changes, memories, inputs)

    def cut_direct(self, layer: Layer, args: tuple) -> tuple | None:
        """Detach the layer's input and note it in the running forward: forward pre-hook of the layer, direct wiring."""
        self._count_call()
        if (tangents := self.wiring.state.tangents) is not None:
            return (tangents(self, args[0]), *args[1:])
        if not (torch.is_grad_enabled() and self.is_on()):
            return None
        x = self._first(layer, args)
        if (run := self._run()) is not None and self._takes(x):
            self.note(x, run)
        return (_cut(x, None), *args[1:])

    def cut_module(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Detach all that a module is given and note it: forward pre-hook of a module cut as a whole, direct wiring.

        Raises:
            RuntimeError: an error wants to reach an argument for which there is no feedback.
        """
        parts = {part.path: part for part in (self, *self.further)}
        for part in parts.values():
            part._count_call()
        if (tangents := self.wiring.state.tangents) is not None:
            return map_arguments(args, kwargs, lambda path, x: tangents(parts[path], x) if path in parts else x)
        if not (torch.is_grad_enabled() and self.is_on()):
            return None
        self.refuse_graphs()
        if not torch.compiler.is_compiling():
            self.note_pass()
            refuse_forward_mode()
        run = self._run()
        cuts: list[tuple[Tensor, Tensor]] = []  # one argument given twice is the same tensor behind the cut as well

        def cut(path: str, x: Tensor) -> Tensor:
            if path in parts:
                if run is not None and parts[path]._takes(x):
                    parts[path].note(x, run)
            elif wants_error(x):
                raise RuntimeError(
                    f"module {self.name!r} got a tensor {tuple(x.shape)} at {path} that it did not get on the example, "
                    "so there is no feedback for its error: convert the model with an example that gives it"
                )
            for before, after in cuts:
                if before is x:
                    return after
            cuts.append((x, x.detach()))
            return cuts[-1][1]

        return map_arguments(args, kwargs, cut)

    def note(self, x: Tensor, run: "Run") -> None:
        """Note a cut input in the running forward, so that the output's error is delivered to it."""
        if not self.silent:
            version = x._version if run.watched else -1
            call = max(run.calls.get(self.name, 1) - 1, 0)
            run.parts[self.name] = self
            run.cuts.append(Cut(self.name, x, version, self.kept_matrices(), self.gain, self.routes(), call))

    def note_later(self, x: Tensor) -> None:
        """Note the input of a layer that has run on its values, and whose graph came into being after it."""
        runs = self.wiring.state.runs
        if runs and self._takes(x):
            self.note(x, runs[-1])

    def _takes(self, x: Tensor) -> bool:
        """Tell whether a delivery concerns a cut input: it wants an error, or B learns from it."""
        return wants_error(x) or self.wiring.rule.learned

    def _count_call(self) -> None:
        runs = self.wiring.state.runs
        if runs and (torch.compiler.is_compiling() or not in_backward()):
            calls = runs[-1].calls
            calls[self.name] = calls.get(self.name, 0) + 1

    def _run(self) -> "Run | None":
        """Give the running forward of the converted model; None in a recomputation by activation checkpointing.

        Raises:
            RuntimeError: the layer runs outside of both.
        """
        wiring = self.wiring
        runs = wiring.state.runs
        if not runs:
            fired = wiring.fired if wiring.state.fired is None else wiring.state.fired
            if self.name not in fired or not in_backward():
                raise RuntimeError(
                    f"layer {self.name!r} ran with gradients outside the forward of the converted model, where no "
                    "error can be delivered to it: call the model that was given to falign.convert, and use "
                    "torch.utils.checkpoint with use_reentrant=False"
                )
            return None
        run = runs[-1]
        if not torch.compiler.is_compiling():
            run.fired.append(self)
        if not run.watched:
            self.untraceable = True
        return run

    def deliver_direct(self, layer: Layer, args: tuple, y: Tensor) -> Tensor | None:
        """Deliver the error where it begins at this layer's output: forward hook of the layer, direct wiring."""
        if not torch.is_grad_enabled():
            return None
        if not self.is_on():
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
        """Write a buffer: in place, so that ``functional_call`` sees it; under ``torch.compile`` by replacement."""
        # A compiled backward may recompute what it needs from the buffer, which in-place writing would have changed
        # under it (seen in torch 2.13).
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
        """Load what the state has; the state of a plain model lacks what a rule that only counts its passes keeps.

        Feedback that was drawn takes the size that it had in the model that was saved, which the weights of that
        model determined when it was converted.
        """
        saved = local_metadata.get("deviations", self.deviations)
        has_feedback = self.wiring.rule.learned or self.wiring.rule.adapts  # B itself is in the state
        if saved != self.deviations and len(saved) == len(self.deviations) and not has_feedback:
            if self.B is None:
                self.gain *= saved[0] / self.deviations[0]
            else:
                with torch.no_grad():
                    for matrix, then, now in zip(self.matrices().values(), saved, self.deviations, strict=True):
                        matrix.mul_(then / now)
            self.deviations = saved
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += missing if has_feedback else []

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["deviations"] = list(self.deviations)

    def weights(self, layer: Layer) -> list[nn.Parameter]:
        """List what the error would return through without feedback: a layer's matrices, or the one parameter."""
        if self.parameter is None:
            return matrices_of(layer)
        weight = layer._parameters.get(self.parameter)
        return [weight] if isinstance(weight, nn.Parameter) else []

    def learned_gradient(self, gradient: Tensor) -> Tensor:
        """Make the gradient of learned B from that of W."""
        rule = self.wiring.rule
        learned = rule.learned_gradient(gradient.detach(), *rule.feedback_inputs(self, None, advance=False))
        return learned.detach().to(self.matrix.dtype, copy=True)

    def is_followed(self, layer: Layer) -> bool:
        """Tell whether learned B takes the gradients of the weight: a copy of a model has no hooks on its weights."""
        hooks = [hook for weight in self.weights(layer) for hook in followers_of(weight)]
        return any((part := hook.part()) is not None and part.B is self.B for hook in hooks)

    def guard(self, layer: Layer) -> None:
        """Check every gradient that arrives at the layer's weights: it must have come by the layer itself.

        Learned feedback of a parameter, which no delivery sees, receives that gradient as well. Within a module that is
        cut as a whole backpropagation does as it always does.
        """
        for weight in [] if self.path else self.weights(layer):
            follows = self.follows or (self.wiring.rule.reuses_gradient and weight is layer._parameters.get("weight"))
            if follows and weight.requires_grad and not self.is_followed(layer):
                weight.register_hook(Follower(self, weight))
            if weight.requires_grad and not any(guard.part() is self for guard in guards_of(weight)):
                weight.register_post_accumulate_grad_hook(Guard(self))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what passes have left: the numbers of backwards mean nothing to a copy or a pickle."""
        fresh = {"last_pass": -1, "passes_since_backward": 0, "last_backward": -1, "running_pass": None}
        backwards = ("backwards", "true_backwards", "learning_backwards")
        return {**self.__dict__, **fresh, **{key: deque(maxlen=16) for key in backwards}}

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
        """Note the backward passes that meet the layer's output, where no delivery of its own does so."""
        if torch.compiler.is_compiling() or transformed() or not isinstance(y, Tensor) or y.grad_fn is None:
            self.untraceable = True
            return
        backwards = self.true_backwards
        y.grad_fn.register_prehook(lambda errors: backwards.append(torch._C._current_graph_task_id()))

    def _uncut(self, cut: Any) -> Tensor | None:
        """Take off the cut of this layer what it carries along: the input in front of it, if that wants an error.

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

    def routes(self) -> dict[int, Route]:
        """Map the number of each output to which of its positions are the input's."""
        return {self.first_end: self.route, **{end: route for end, (_, route) in self.others.items()}}

    def _learns(self, layer: Layer) -> bool:
        """Tell whether B receives a gradient: a learned B of a weight that receives one."""
        if not self.wiring.rule.learned or self.follows or self.wiring.state.way is not None or self._reuses(layer):
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

    def _reuses(self, layer: Layer) -> bool:
        """Tell whether B takes the gradient that W itself receives in this pass, which a hook on W hands over."""
        if not self.wiring.rule.reuses_gradient or torch.compiler.is_compiling() or transformed():
            return False
        if distributed.is_available() and distributed.is_initialized():
            return False  # the gradient of W is averaged after the hook on it, that of B as any other's
        weight = layer._parameters.get("weight")
        followers = [] if weight is None else followers_of(weight)
        return any((part := follower.part()) is not None and part.B is self.B for follower in followers)

    def is_on(self) -> bool:
        """Tell whether the rule is in force; a recomputation by activation checkpointing follows its own forward."""
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
        if not isinstance(args[0], Tensor):
            raise TypeError(f"layer {self.name!r} was called with a {type(args[0]).__name__}, expected a tensor")
        if "forward" in layer.__dict__:
            raise RuntimeError(
                f"the forward of layer {self.name!r} was replaced after convert, so its map is not known: call "
                "falign.revert, and convert the model again as it is now"
            )
        self.refuse_graphs()
        if not torch.compiler.is_compiling():
            self.note_pass()
            self._fits(layer)  # not before: under tracing, sizes are tensors
            refuse_forward_mode()
        return args[0]

    def refuse_graphs(self) -> None:
        """Raise where a graph is made that outlives the rule.

        Raises:
            RuntimeError: the model is exported or traced.
        """
        if torch.compiler.is_compiling():
            if exporting():
                self.wiring.state.runs.clear()
                raise RuntimeError(_NO_GRAPH)
        elif torch._C._get_tracing_state() is not None:
            raise RuntimeError(_NO_GRAPH)

    def _fits(self, layer: Layer) -> None:
        """Refuse weights that are of another shape than they were: neurons were removed or added.

        Raises:
            RuntimeError: they are, and the error could not pass B.
        """
        weight = layer._parameters.get("weight")
        if weight is None or self.wiring.rule.wiring != "layerwise" or self.matrix.dim() != weight.dim():
            return
        if self.matrix.shape != weight.shape:
            raise RuntimeError(
                f"layer {self.name!r} has weights {tuple(weight.shape)}, feedback {tuple(self.matrix.shape)}: neurons "
                "were removed or added after convert; call falign.revert, and convert the model again as it is now"
            )

    def _advances(self) -> bool:
        """Tell whether the state of the rule may move: in training, and not in a recomputation by checkpointing."""
        if torch.compiler.is_compiling():
            return self.training
        backward = self.backwards[-1] if self.backwards else -1
        if not in_backward():
            self.has_run = True
            self.passes_since_backward = self.passes_since_backward + 1 if backward == self.last_backward else 1
            self.last_backward = backward
            return self.training
        if self.wiring.rule.fresh and self.training and self.has_run and self.passes_since_backward > 1:
            self.passes_since_backward = 0
            raise RuntimeError(
                f"layer {self.name!r} ran more than once before this backward pass, and activation checkpointing does "
                f"not say which pass it recomputes: rule {self.wiring.rule.name!r} has other feedback in each; do "
                "without checkpointing"
            )
        # Under re-entrant checkpointing the pass itself has no gradients, and the recomputation is all there is.
        return self.training and not self.has_run

    def __prepare_scriptable__(self) -> None:
        """Refuse ``torch.jit.script``, which asks every module in this way."""
        raise RuntimeError(_NO_GRAPH)

    def extra_repr(self) -> str:
        """Say rule and shape in ``print(model)``."""
        shape = "x".join(map(str, self.matrix.shape)) or "one number a layer"
        return f"{self.wiring.rule.name}, {shape}"


def _cut(x: Tensor, undetached: Tensor | None) -> Tensor:
    """Detach an input."""
    cut = x.detach()
    # What the hook behind the layer needs travels on the tensor and not in the module, which threads share.
    cut._falign_input = undetached  # type: ignore[attr-defined]
    return cut


_NO_GRAPH = (
    "a converted model cannot be exported, traced or scripted, the graph would lose its rule: take the plain network, "
    "falign.revert(copy.deepcopy(model)); torch.export and torch.jit.trace also take this one within torch.no_grad()"
)
