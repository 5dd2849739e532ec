"""How a rule hangs on a model: a ``Feedback`` in every layer that takes it, one ``Wiring`` for the whole."""

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from falign.delivery import Cut, deliver_direct, deliver_layerwise, transformed
from falign.layers import KINDS, Layer
from falign.outputs import Output, as_output, fits, pick, substitute
from falign.scratch import Scratch

if TYPE_CHECKING:
    from falign.rules import Rule


class Wiring:
    """What all layers of one converted model share: the rule, whether it is on, and the cuts of the running forward.

    It is plain Python and hangs nothing on the root module: a root that is ``nn.Sequential`` would run it as a layer.
    """

    def __init__(self, rule: "Rule", seed: int, output: Output) -> None:
        self.rule = rule
        self.seed = seed
        self.output = output
        self.on = True
        self.target: Tensor | None = None
        self.scratch = Scratch()
        self.running = False
        self.monitor: ReferenceType | None = None  # the falign.measure.Monitor at work
        self.measured = False  # whether the running pass is a measurement, and no part of the training
        self.watched = False  # whether versions and hooks of tensors can be looked at in this forward
        self.cuts: list[Cut] = []
        self.fired: set[str] = set()

    def start(self, model: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the root: forget what an earlier pass, or a recomputation, left behind.

        Raises:
            RuntimeError: the model calls itself: errors of the outer call would be lost.
        """
        if self.running and not torch.compiler.is_compiling():
            raise RuntimeError("a direct rule needs a model that does not call itself: use a layerwise rule")
        self.cuts, self.fired, self.running = [], set(), True
        self.watched = not (torch.compiler.is_compiling() or transformed())

    def deliver(self, model: nn.Module, args: tuple, result: Any) -> Any:
        """Forward hook of the root: hang the delivery to all cuts on the output."""
        cuts, self.cuts, self.running = self.cuts, [], False
        if not cuts or result is None:  # None: the forward raised, and only the state had to be put right
            return None
        output = pick(result, self.output)
        for cut in cuts:
            if self.watched and cut.x._version != cut.version:
                raise RuntimeError(
                    f"the input of layer {cut.layer!r} was changed in place after the layer ran, which would change "
                    "the error delivered to it: write x = x + … in place of x += …"
                )
            if not fits(cut, output):
                rows, columns = cut.feedback.shape
                raise RuntimeError(
                    f"direct feedback of layer {cut.layer!r} is {rows} x {columns}, but the model's output is "
                    f"{tuple(output.shape)} and the layer's input {tuple(cut.x.shape)}: convert the model with an "
                    "example of the shape that it is trained on"
                )
        target, axis = None, -1
        if self.rule.targeted:
            target, axis = as_output(self.target, output)
        reached: list[int] = []
        delivered = deliver_direct(output, target, axis, self.rule, cuts, reached)
        if self.watched and output.requires_grad:
            output.register_hook(partial(_refuse_another_way, reached))
        return delivered if output is result else substitute(result, output, delivered)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle takes no tensors of a forward along."""
        return {**self.__dict__, "cuts": [], "target": None, "running": False, "monitor": None, "measured": False}


class SharedSequence(nn.Module):
    """The one random sequence that all layers of a model read under the shared family."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)


class Feedback(nn.Module):
    """The feedback of one layer: a submodule of it, so that B follows it everywhere, with the two hooks of the layer.

    ``B`` is a buffer outside ``state_dict`` (for learned or adaptive feedback: in it) with the layer's device and
    dtype. Under the shared family it is None, and the layer reads ``gain`` times a stretch of the one ``sequence``.
    """

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
        self._input: list[Tensor | None] = [None]
        self._on = [True]
        self._ran = [False]
        if rule.learned:
            self.B = nn.Parameter(matrix)
        else:
            self.register_buffer("B", matrix, persistent=rule.adapts)
        for key, value in rule.state().items():
            self.register_buffer(key, value.to(matrix.device), persistent=rule.adapts)

    @property
    def matrix(self) -> Tensor:
        """B as it is stored: with |B₀| for random signs, the number c for uniform ones."""
        matrix = self.B
        return self.stretch() if matrix is None else matrix

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

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle takes no tensors of a forward along."""
        return {**self.__dict__, "_input": [None]}

    def cut_layerwise(self, layer: Layer, args: tuple) -> tuple | None:
        """Forward pre-hook of the layer, layerwise wiring."""
        self._input[0] = None
        if not (self._is_on() and torch.is_grad_enabled()):
            return None
        x = self._first(args)
        if not (wants_error(x) or self.wiring.rule.learned):
            return None
        self._input[0] = x
        return (x.detach(), *args[1:])

    def deliver_layerwise(self, layer: Layer, args: tuple, y: Tensor) -> Tensor | None:
        """Forward hook of the layer, layerwise wiring."""
        x = self._input[0]
        if x is None:
            return None
        self._input[0] = None
        wiring = self.wiring
        weight = layer.weight if wiring.rule.reads_weight else None
        sources = wiring.rule.sources(self, weight, advance=wiring.rule.advances and self._advances())
        spec = KINDS[self.kind].spec(layer)
        return deliver_layerwise(y, x, self.gain, wiring.rule, self.kind, spec, wiring.scratch, sources)

    def cut_direct(self, layer: Layer, args: tuple) -> tuple | None:
        """Forward pre-hook of the layer, direct wiring."""
        wiring = self.wiring
        if not (self._is_on() and torch.is_grad_enabled()):
            return None
        x = self._first(args)
        if wiring.running:
            wiring.fired.add(self.name)
        elif self.name not in wiring.fired or not in_backward():
            raise RuntimeError(
                f"layer {self.name!r} ran with gradients outside the forward of the converted model, where no error "
                f"can be delivered to it: call the model that was given to falign.convert, and use "
                "torch.utils.checkpoint with use_reentrant=False"
            )
        if not wants_error(x):
            return None
        version = x._version if wiring.watched else -1
        wiring.cuts.append(Cut(self.name, x, version, self.matrix, self.gain, self.channels))
        return (x.detach(), *args[1:])

    def remember(self, key: str, value: Tensor) -> None:
        """Write a buffer: in place, so that ``functional_call`` sees it; under ``torch.compile`` by replacement.

        A compiled backward may recompute what it needs from the buffer, which in-place writing would have changed
        under it (seen in torch 2.13).
        """
        if torch.compiler.is_compiling():
            setattr(self, key, value)
        else:
            getattr(self, key).copy_(value)

    def _is_on(self) -> bool:
        """Whether the rule is in force; a recomputation by activation checkpointing follows its own forward."""
        if torch.compiler.is_compiling():
            return self.wiring.on
        if not in_backward():
            self._on[0] = self.wiring.on
        return self._on[0]

    def _first(self, args: tuple) -> Tensor:
        if not args:
            raise TypeError(
                f"layer {self.name!r} was called with keyword arguments only: pass its input as the first argument, "
                "falign cuts it there"
            )
        return args[0]

    def _advances(self) -> bool:
        """A pass of training, and not its recomputation by activation checkpointing.

        Under re-entrant checkpointing the pass itself has no gradients, and the recomputation is all there is.
        """
        if torch.compiler.is_compiling() or not in_backward():
            self._ran[0] = True
            return self.training
        return self.training and not self._ran[0]

    def extra_repr(self) -> str:
        """What ``print(model)`` says."""
        shape = "x".join(map(str, self.matrix.shape)) or "one number a layer"
        return f"{self.wiring.rule.name}, {shape}"


def _refuse_another_way(reached: list[int], error: Tensor) -> None:
    """Raise in a backward that reaches the output without having passed the delivery hung on it."""
    if torch._C._current_graph_task_id() not in reached:
        raise RuntimeError(
            "the loss does not pass through the model's output that carries the error, so no layer below the last "
            "would learn: compute the loss from that output, outside the model (output= picks another)"
        )
    reached.clear()


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
