"""The one mechanism: cut a layer's input, and deliver the error to the cut through other weights.

A *cut* detaches a layer's input, so that autograd does no work for it. A *delivery* is an identity on some tensor
whose backward hands that tensor its own error and every cut the error carried to it through the feedback ``B``.
Layerwise, the tensor is the layer's output; direct, it is the network's output. ``loss.backward()`` stays ordinary.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from falign._scratch import Scratch, plain_eager
from falign.layers import KINDS
from falign.rules.rule import Rule


class Way:
    """The way on which the errors of one forward return: by the rule or, once ``true`` is set, through the weights."""

    true = False


@dataclass(frozen=True, kw_only=True)
class EitherWay(Rule):
    """A layerwise rule whose forward can be walked back truly as well: B's own gradient is then not asked for.

    Args:
        rule: the rule; what it saves for the backward is followed by the layer's weight.
        way: which of the two carries the errors.
    """

    name: ClassVar[str] = "either way"
    rule: Rule
    way: Way

    def feedback_matrix(self, *inputs: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Make the rule's B, or give W."""
        *inputs_of_rule, weight = inputs
        return weight if self.way.true else self.rule.feedback_matrix(*inputs_of_rule, scratch=scratch)


@runtime_checkable
class PassRecorder(Protocol):
    """A layer, as a delivery sees it: it is told the number of every backward pass that met its output."""

    backwards: deque[int]


def transformed() -> bool:
    """Tell whether a torch.func transform (vmap, grad, …) is at work.

    Raises:
        RuntimeError: within ``torch.compile``, which there drops the backward of an autograd function without a word.
    """
    if not torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "torch.compile loses the delivery of errors within torch.func transforms (as of torch 2.13): compile the "
            "model without vmap, or use vmap without compile"
        )
    return True


def _apply(function: type[Function], *args: Any) -> Any:
    """Call ``function.apply``."""
    if transformed() or torch.compiler.is_compiling():
        return function.apply(*args)
    # What Function.apply itself ends in, without its inspection of the signature: a third of a small layer's pass.
    return super(Function, function).apply(*args)  # type: ignore[misc]


class _Layerwise(Function):
    """Identity on y; backward: (e, B carries e to x)."""

    # vmap then runs these very methods on its wrapped tensors. A jvp of its own would make Dynamo refuse fullgraph.
    generate_vmap_rule = True

    @staticmethod
    def forward(
        y: Tensor, x: Tensor, gain: float, rule: Rule, kind: str, spec: Any, scratch: Scratch,
        backwards: deque, *inputs: Tensor,
    ):  # fmt: skip
        return y.clone()  # not y or a view of it: an in-place operation may follow

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, x, ctx.gain, ctx.rule, ctx.kind, ctx.spec, ctx.scratch, ctx.backwards, *feedback_inputs = inputs
        ctx.transformed = transformed()
        ctx.keeps_x = KINDS[ctx.kind].needs_input or ctx.rule.learned
        ctx.save_for_backward(*feedback_inputs, *((x.detach(),) if ctx.keeps_x else ()))

    @staticmethod
    def backward(ctx: Any, e: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if not torch.compiler.is_compiling():  # compiled, the number of a backward would become a constant
            ctx.backwards.append(torch._C._current_graph_task_id())
        kind, inputs, x = KINDS[ctx.kind], ctx.saved_tensors, e
        if ctx.keeps_x:
            *inputs, x = inputs
        propagated = None
        if ctx.needs_input_grad[1]:
            feedback = ctx.rule.feedback_matrix(*inputs, scratch=ctx.scratch if plain_eager(*inputs) else None)
            if feedback.dtype != e.dtype:
                feedback = feedback.to(e.dtype)
            propagated = kind.error(_scaled(e, ctx.gain), feedback, x, ctx.spec)
        learned = (None,) * len(inputs)
        # Within a torch.func transform B does not say that it wants a gradient.
        if ctx.rule.learned and (ctx.transformed or ctx.needs_input_grad[-len(inputs)]):
            learned = (kind.gradient(e, inputs[0].to(e.dtype), x, ctx.spec), *learned[1:])
        return e, propagated, None, None, None, None, None, None, *learned


class _Direct(Function):
    """Identity on the output; backward: (e, e @ B_l reshaped to every cut x_l)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor,
        target: Tensor | None,
        axis: int,
        rule: Rule,
        routes: tuple[tuple[int, float, int], ...],
        reached: list[int],
        fired: list[PassRecorder],
        *cuts: Tensor,
    ):
        return output.clone()  # not the output or a view of it: an in-place operation may follow

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        out, target, ctx.axis, ctx.rule, ctx.routes, ctx.reached, ctx.fired, *cuts = inputs
        count = len(cuts) - len(ctx.routes)
        ctx.shapes = [x.shape for x in cuts[:count]]
        ctx.targeted = target is not None
        ctx.reads_output = ctx.targeted or overrides_error(ctx.rule)
        ctx.save_for_backward(
            *cuts[count:], *((out.detach(),) if ctx.reads_output else ()), *((target,) if ctx.targeted else ())
        )

    @staticmethod
    def backward(ctx: Any, e: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if not torch.compiler.is_compiling():
            task = torch._C._current_graph_task_id()
            ctx.reached.append(task)
            for part in ctx.fired:
                part.backwards.append(task)
        count = len(ctx.routes)
        feedback_matrices, projected = ctx.saved_tensors[:count], e
        if ctx.reads_output:
            target = ctx.saved_tensors[count + 1] if ctx.targeted else None
            projected = ctx.rule.error(e, ctx.saved_tensors[count], target, ctx.axis)
        wanted = ctx.needs_input_grad[-count - len(ctx.shapes) :]
        errors: list[Tensor | None] = [None] * len(ctx.shapes)
        for feedback, (index, gain, channels) in zip(feedback_matrices, ctx.routes, strict=True):
            if wanted[index]:
                error = project(_scaled(projected, gain), feedback, ctx.shapes[index], channels)
                so_far = errors[index]  # of another layer with the same input
                errors[index] = error if so_far is None else so_far + error
        return e, None, None, None, None, None, None, *errors, *((None,) * count)


def overrides_error(rule: Rule) -> bool:
    """Tell whether a direct rule projects something else than the error itself."""
    return type(rule).error is not Rule.error


def _scaled(error: Tensor, gain: float) -> Tensor:
    return error if gain == 1 else error * gain


def project(
    error: Float[Tensor, "*output"], feedback: Float[Tensor, "rows columns"], shape: tuple[int, ...], channels: int
) -> Float[Tensor, "*input"]:
    """``(e @ B).reshape(shape of x)``, whole samples or position by position.

    Args:
        error: the gradient at the network's output; its size is a multiple of B's rows.
        feedback: B, (outputs, elements of one sample of x), or (outputs, features) where output and x share
            position axes.
        shape: shape of the cut x.
        channels: 1 where the features of output and x are axis 1 and they share the position axes behind it
            (convolutions over positions), else 0: features are last, or the whole sample is one vector.
    """
    if feedback.dtype != error.dtype:
        feedback = feedback.to(error.dtype)
    if channels:
        return (error.movedim(1, -1) @ feedback).movedim(-1, 1)
    return (error.reshape(-1, feedback.shape[0]) @ feedback).reshape(shape)


class Cut(NamedTuple):
    """One cut of a direct rule: the layer's input and, for each output that delivers to it, feedback and axis."""

    layer: str
    x: Tensor
    version: int  # of x when it was cut, -1 where that is not known
    feedback: dict[int, Tensor]
    gain: float
    channels: dict[int, int]


def deliver_layerwise(
    y: Tensor,
    x: Tensor,
    gain: float,
    rule: Rule,
    kind: str,
    spec: Any,
    scratch: Scratch,
    backwards: deque,  # of int; said so, a type checker at run time would look into it while another thread adds to it
    inputs: tuple[Tensor, ...],
) -> Tensor:
    """Give y; in backward x receives y's error carried through gain · B by the layer's own transposed map."""
    return _apply(_Layerwise, y, x, gain, rule, kind, spec, scratch, backwards, *inputs)


def deliver_direct(
    output: Tensor,
    target: Tensor | None,
    axis: int,
    rule: Rule,
    number: int,
    cuts: list[Cut],
    reached: list[int],
    fired: list[Any],
) -> Tensor:
    """Give the output; in backward every cut receives the output's error projected by its gain · B.

    Args:
        output: the network's output, (batch, ...).
        target: for a targeted rule, the targets in the output's shape; their classes lie along ``axis``.
        axis: the axis of the classes.
        rule: the direct rule.
        number: of the output, among those that deliver errors.
        cuts: where to.
        reached: gets the number of every backward that delivers.
        fired: the layers that ran; each gets that number too.
    """
    xs: list[Tensor] = []  # each once: layers may share their input (query and key), and Dynamo refuses a repeated one
    routes = []
    for cut in cuts:
        index = next((place for place, x in enumerate(xs) if x is cut.x), len(xs))
        if index == len(xs):
            xs.append(cut.x)
        routes.append((index, cut.gain, cut.channels[number]))
    feedback_matrices = [cut.feedback[number] for cut in cuts]
    return _apply(_Direct, output, target, axis, rule, tuple(routes), reached, fired, *xs, *feedback_matrices)
