"""The one mechanism: cut a layer's input, and deliver the error to the cut through other weights.

A *cut* detaches a layer's input, so that autograd does no work for it. A *delivery* is an identity on some tensor
whose backward hands that tensor its own error and every cut the error carried to it through the feedback ``B``.
Layerwise, the tensor is the layer's output; direct, it is the network's output. ``loss.backward()`` stays ordinary.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from falign._projector import Projection, multiplied, sent_part
from falign._scratch import Scratch, plain_eager
from falign.layers import KINDS
from falign.rules._direct import confined, limit_of
from falign.rules.rule import Rule
from falign.transforms import Keep, Memory, Transform, apply_transforms


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


def wants_error(x: Tensor) -> bool:
    """Tell whether a backward may ask for the error at x.

    Within ``torch.vmap`` a tensor does not say that a graph outside records it, so there the answer is yes.
    """
    return isinstance(x, Tensor) and (x.requires_grad or transformed())


def in_backward() -> bool:
    """Tell whether this thread is inside an autograd backward, where activation checkpointing recomputes a forward."""
    return torch._C._current_graph_task_id() != -1


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
        backwards: deque, changes: tuple[Transform, ...], memories: tuple[Memory, ...], *inputs: Tensor,
    ):  # fmt: skip
        return y.clone()  # not y or a view of it: an in-place operation may follow

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        first, feedback_inputs = inputs[:10], inputs[10:]
        _, x, ctx.gain, ctx.rule, ctx.kind, ctx.spec, ctx.scratch, ctx.backwards, ctx.changes, ctx.memories = first
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
        count = len(inputs) - len(ctx.memories)
        inputs, remembered = inputs[:count], inputs[count:]
        propagated = None
        if ctx.needs_input_grad[1]:
            feedback = ctx.rule.feedback_matrix(*inputs, scratch=ctx.scratch if plain_eager(*inputs) else None)
            if feedback.dtype != e.dtype:
                feedback = feedback.to(e.dtype)
            carried = e
            if ctx.changes:
                carried = apply_transforms(ctx.changes, e, kind.feature_axis(ctx.spec), ctx.memories, remembered)
            propagated = kind.error(_scaled(carried, ctx.gain), feedback, x, ctx.spec)
        learned = (None,) * len(inputs)
        # Within a torch.func transform B does not say that it wants a gradient.
        if ctx.rule.learned and (ctx.transformed or ctx.needs_input_grad[10]):
            gradient = kind.gradient(e, inputs[0].to(e.dtype), x, ctx.spec)
            learned = (ctx.rule.learned_gradient(gradient, *inputs), *learned[1:])
        return e, propagated, *(None for _ in range(8)), *learned, *(None for _ in remembered)


class Held(NamedTuple):
    """One B of a direct delivery.

    Attributes:
        shape: of B as it carries an error.
        factors: places of what else B is made of, among the factors of the delivery.
        moved: which of (B as it is kept, factors) the rule moves by errors in this pass.
        keep: what is called with that and its change; None where nothing moves.
        start: place of its columns in what a projector returns.
    """

    shape: tuple[int, int]
    factors: tuple[int, ...]
    moved: int
    keep: Keep | None
    start: int


_ARGUMENTS = 12  # of ``_Direct`` in front of the cut inputs


class _Direct(Function):
    """Identity on the output; backward: (e, e @ B_l reshaped to every cut x_l)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor,
        target: Tensor | None,
        axis: int,
        rule: Rule,
        changes: tuple[Transform, ...],
        routes: tuple[tuple[int, int, float, "Route", int], ...],
        count: int,
        held: tuple[Held, ...],
        memories: tuple[Memory, ...],
        projection: Projection | None,
        reached: list[int],
        fired: list[PassRecorder],
        *cuts: Tensor,
    ):
        return output.clone()  # not the output or a view of it: an in-place operation may follow

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        first, cuts = inputs[:_ARGUMENTS], inputs[_ARGUMENTS:]
        out, target, ctx.axis, ctx.rule, ctx.changes, ctx.routes, count, ctx.held, ctx.memories, *last = first
        ctx.projection, ctx.reached, ctx.fired = last
        ctx.shapes = [x.shape for x in cuts[:count]]
        limited = limit_of(ctx.rule) > 0
        ctx.keeps_x = ctx.rule.learned or limited or any(one.keep is not None for one in ctx.held)
        ctx.transformed = transformed()
        ctx.targeted = target is not None
        ctx.reads_output = ctx.targeted or overrides_error(ctx.rule)
        ctx.save_for_backward(
            *cuts[count:],
            *((x.detach() for x in cuts[:count]) if ctx.keeps_x else ()),
            *((out.detach(),) if ctx.reads_output else ()),
            *((target,) if ctx.targeted else ()),
        )

    @staticmethod
    def backward(ctx: Any, e: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if not torch.compiler.is_compiling():
            task = torch._C._current_graph_task_id()
            ctx.reached.append(task)
            for part in ctx.fired:
                part.backwards.append(task)
        count, rule = len(ctx.held), ctx.rule
        saved = len(ctx.needs_input_grad) - _ARGUMENTS - len(ctx.shapes)
        with_factors = saved - len(ctx.memories)
        inputs, kept = _inputs(ctx.held, ctx.saved_tensors[:with_factors]), list(ctx.saved_tensors[saved:])
        remembered = ctx.saved_tensors[with_factors:saved]
        target = kept.pop() if ctx.targeted else None
        projected = rule.error(e, kept.pop(), target, ctx.axis) if ctx.reads_output else e
        if ctx.changes:
            _, number, _, route, _ = ctx.routes[0]
            projected = change_output_error(
                ctx.changes, projected, route, ctx.held[number].shape[0], ctx.memories, remembered
            )
        for number, one in enumerate(ctx.held):
            if one.keep is not None:
                before = inputs[number][one.moved]
                change = _change(rule, before, number, projected, kept, one.shape, ctx.routes)
                inputs[number][one.moved] = before + change
                one.keep(before, change)
        feedback_matrices = [rule.feedback_matrix(*tensors) if rule.factored else tensors[0] for tensors in inputs]
        wanted = ctx.needs_input_grad[_ARGUMENTS : _ARGUMENTS + len(ctx.shapes)]
        learning = ctx.needs_input_grad[_ARGUMENTS + len(ctx.shapes) :]
        sent: dict[Any, Tensor] = {}  # what a projector made of the error, by how its positions are lined up
        errors: list[Tensor | None] = [None] * len(ctx.shapes)
        learned: list[Tensor | None] = [None] * count
        for index, number, gain, route, call in ctx.routes:
            matrix = feedback_matrices[number]
            if wanted[index]:
                product = multiplied
                if ctx.projection is not None:
                    key = None if route.is_plain else (route, call)
                    product = partial(sent_part, sent, key, ctx.projection, ctx.held[number].start)
                error = project(projected, matrix, ctx.shapes[index], route, call=call, gain=gain, product=product)
                so_far = errors[index]  # of another layer with the same input
                errors[index] = error if so_far is None else so_far + error
            # Within a torch.func transform B does not say that it wants a gradient.
            if rule.learned and (ctx.transformed or learning[number]):
                gradient = correlate(projected, kept[index], matrix.shape, route, call=call, gain=gain)
                gradient = rule.learned_gradient(gradient, *inputs[number])
                so_far = learned[number]  # of another call of the layer
                learned[number] = gradient if so_far is None else so_far + gradient
        if limit := limit_of(rule):
            pairs = zip(errors, kept, strict=True)
            errors = [None if error is None else confined(error, x, limit) for error, x in pairs]
        return (
            e,
            *(None for _ in range(_ARGUMENTS - 1)),
            *errors,
            *learned,
            *(None for _ in range(saved - count)),
        )


def _inputs(held: tuple[Held, ...], tensors: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """Collect what each B is made of: itself as it is kept, and its factors, which come behind all of these."""
    return [[tensors[number], *(tensors[len(held) + at] for at in one.factors)] for number, one in enumerate(held)]


def _change(
    rule: Rule, matrix: Tensor, number: int, error: Tensor, xs: list[Tensor], shape: tuple[int, int], routes: tuple
) -> Tensor:
    """Compute the change of what a rule moves by errors and cut inputs, of all calls; 0 where it is not finite."""
    rows = [
        matched(error, xs[index], shape, route, call=call) for index, other, _, route, call in routes if other == number
    ]
    change = rule.observe_error(matrix, *joined(rows)) - matrix
    return torch.where(change.isfinite().all(), change, torch.zeros_like(change))


def change_output_error(
    changes: tuple[Transform, ...],
    error: Tensor,
    route: "Route",
    features: int,
    memories: tuple[Memory, ...] = (),
    remembered: tuple[Tensor, ...] = (),
) -> Tensor:
    """Apply transforms to the error of an output, whose features a route of one of its deliveries points out."""
    if route.output:
        axis, shape = route.output.index("k"), error.shape
        flat = error.flatten(axis) if len(route.output) < error.dim() else error
        return apply_transforms(changes, flat, axis, memories, remembered).reshape(shape)
    rows = error if error.shape[-1] == features else error.flatten(1)
    return apply_transforms(changes, rows, -1, memories, remembered).reshape(error.shape)


def overrides_error(rule: Rule) -> bool:
    """Tell whether a direct rule projects something else than the error itself."""
    return type(rule).error is not Rule.error


def _scaled(error: Tensor, gain: float) -> Tensor:
    return error if gain == 1 else error * gain


class Route(NamedTuple):
    """Axes of an output and of a cut input x, and which of them are the same positions.

    Every axis has a letter: "k" the output's features, "c" those of x, "q" the calls of a layer that runs once for each
    position of the output; every other letter stands for positions (or samples), and is the same where these are.
    Features that are last in a tuple shorter than the shape are all axes from there on, flattened. Several letters at
    one axis are axes folded into it, the first the outermost (samples and windows).

    The error at x is ``e B`` at the positions that both have, summed over those of the output alone, and spread over
    those of x alone (P of them): the same everywhere, times 1/√P, so that its norm stays that of ``e B``.

    Attributes:
        output: letters of the output's axes; empty: as many as there are, those in front of the features being x's.
        x: letters of x's axes.
        spread: whether the layer's calls are positions that the output does not have.
    """

    output: tuple[str, ...] = ()
    x: tuple[str, ...] = ()
    spread: bool = False

    @property
    def is_plain(self) -> bool:
        """Tell whether output and x have the same positions in the same order, features last."""
        return not self.output or (self.output[:-1] == self.x[:-1] and (self.output[-1], self.x[-1]) == ("k", "c"))

    def sizes_of(self, error: Tensor, x: tuple[int, ...], feedback: tuple[int, ...]) -> dict[str, int]:
        """Give the size of every letter, of tensors that the forward has found to fit together."""
        calls = next((axis for axis, letters in enumerate(self.output) if "q" in letters), 0)
        sizes = self.sizes(tuple(error.shape), tuple(x), tuple(feedback), error.shape[calls])
        assert sizes is not None
        return sizes

    def sizes(
        self, output: tuple[int, ...], x: tuple[int, ...], feedback: tuple[int, ...], calls: int = 1
    ) -> dict[str, int] | None:
        """Give the size of every letter; None where output, x and feedback do not fit together."""
        known = {"k": feedback[0], "c": feedback[1]}
        if not self.output:
            if len(output) == 1 or torch.Size(output[1:]).numel() == feedback[0]:
                whole = output[:1] == x[:1] and torch.Size(x[1:]).numel() == feedback[1]
                return known if whole or len(x) == len(output) == 1 else None
            lined_up = output[:-1] == x[:-1] and (output[-1:], x[-1:]) == (feedback[:1], feedback[1:])
            return known if lined_up else None
        axes = [*_letters(self.output, output), *_letters(self.x, x), ("q", calls)]
        if len(axes) != len(self.output) + len(self.x) + 1:
            return None
        for _ in range(3):  # an axis of several letters may have to wait for the others
            for letters, size in axes:
                unknown = [letter for letter in letters if letter not in known]
                product = 1
                for letter in letters:
                    product *= known.get(letter, 1)
                if len(unknown) == 1 and product and size % product == 0:
                    known[unknown[0]] = size // product
                elif not unknown and product != size and (letters != "q" or "q" in "".join(self.output)):
                    return None
        letters = "".join(self.output) + "".join(self.x)
        return known if all(letter in known for letter in letters) else None


def _letters(letters: tuple[str, ...], shape: tuple[int, ...]) -> list[tuple[str, int]]:
    """Pair letters and sizes, the axes behind the last letter flattened into it; nothing where there are too few."""
    last = len(letters) - 1
    if len(shape) != len(letters) and (len(shape) < last or letters[last] not in "kc"):
        return []
    rest = 1
    for size in shape[last:]:
        rest *= size
    return list(zip(letters, (*shape[:last], rest), strict=True))


def project(
    error: Float[Tensor, "*output"],
    feedback: Float[Tensor, "rows columns"],
    shape: tuple[int, ...],
    route: Route,
    *,
    call: int = 0,
    gain: float = 1.0,
    product: Callable[[Tensor, Tensor], Tensor] = multiplied,
) -> Float[Tensor, "*input"]:
    """Carry an output's error to a cut input: ``gain · e B``, at the positions that a route says.

    Args:
        error: the gradient at the network's output.
        feedback: B, (features of the output, features of x).
        shape: shape of the cut x.
        route: which positions of the two are the same.
        call: which call of its layer x belongs to.
        gain: what B is times.
        product: makes e B.
    """
    if feedback.dtype != error.dtype:
        feedback = feedback.to(error.dtype)
    if route.is_plain:
        if product is multiplied:
            return (_scaled(error, gain).reshape(-1, feedback.shape[0]) @ feedback).reshape(shape)
        return _scaled(product(error.reshape(-1, feedback.shape[0]), feedback), gain).reshape(shape)
    target, sizes = "".join(route.x), route.sizes_of(error, shape, feedback.shape)
    error, shared = _at_shared(error, route, sizes, call)
    share = gain * _share_of_each(target, shared, sizes)
    error = _scaled(error, share) @ feedback if product is multiplied else _scaled(product(error, feedback), share)
    placed = [letter for letter in target if letter in shared or letter == "c"]
    error = error.movedim(-1, placed.index("c"))
    for axis, letter in enumerate(target):
        if letter not in placed:
            error = error.unsqueeze(axis)
    return error.expand([sizes[letter] for letter in target]).reshape(shape)


def correlate(
    error: Float[Tensor, "*output"],
    x: Float[Tensor, "*input"],
    shape: tuple[int, int],
    route: Route,
    *,
    call: int = 0,
    gain: float = 1.0,
) -> Float[Tensor, "rows columns"]:
    """Correlate an output's error with a cut input: ``gain · Σ eᵀ x``, the gradient of ``⟨project(e, B), x⟩`` by B.

    Args:
        error: the gradient at the network's output.
        x: the cut input.
        shape: of B, (features of the output, features of x).
        route: which positions of the two are the same.
        call: which call of its layer x belongs to.
        gain: what the product is times.
    """
    error, x = matched(error, x, shape, route, call=call)
    return _scaled(error, gain).mT @ x.to(error.dtype)


def matched(
    output: Float[Tensor, "*output"],
    x: Float[Tensor, "*input"],
    shape: tuple[int, int],
    route: Route,
    *,
    call: int = 0,
) -> tuple[Float[Tensor, "rows outputs"], Float[Tensor, "rows features"]]:
    """Line up what belongs to an output (or its error) with a cut input: a row for every position that both have.

    Over positions of the output alone it is summed, over the P of x alone x is, times 1/√P.
    """
    if route.is_plain:
        output = output.reshape(-1, shape[0])
        return output, x.reshape(len(output), shape[1])
    target, sizes = "".join(route.x), route.sizes_of(output, tuple(x.shape), shape)
    output, shared = _at_shared(output, route, sizes, call)
    x = x.reshape([sizes[letter] for letter in target])
    if alone := [axis for axis, letter in enumerate(target) if letter not in shared and letter != "c"]:
        x = x.sum(alone)
    x = x.movedim([letter for letter in target if letter in shared or letter == "c"].index("c"), -1)
    output = output.reshape(-1, shape[0])
    return output, _scaled(x.reshape(len(output), shape[1]), _share_of_each(target, shared, sizes))


def joined(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Put what belongs together in several calls of a layer below each other; that of one call is not copied."""
    if len(rows) == 1:
        return rows[0]
    outputs, inputs = map(torch.cat, zip(*rows, strict=True))
    return outputs, inputs


def _at_shared(error: Tensor, route: Route, sizes: dict[str, int], call: int) -> tuple[Tensor, str]:
    """Sum an error over the positions that x does not have: (shared positions in x's order, k), and their letters."""
    letters, target = "".join(route.output), "".join(route.x)
    error = error.reshape([sizes[letter] for letter in letters])
    if "q" in letters:
        error, letters = error.select(letters.index("q"), call), letters.replace("q", "")
    if summed := [axis for axis, letter in enumerate(letters) if letter != "k" and letter not in target]:
        error, letters = error.sum(summed), "".join(letter for letter in letters if letter in {"k", *target})
    shared = "".join(letter for letter in target if letter in letters)
    return error.permute([letters.index(letter) for letter in (*shared, "k")]), shared


def _share_of_each(target: str, shared: str, sizes: dict[str, int]) -> float:
    """Give 1/√P, P the number of positions that x alone has."""
    spread = 1
    for letter in target:
        spread *= 1 if letter in shared or letter == "c" else sizes[letter]
    return 1 / sqrt(spread)


class Cut(NamedTuple):
    """One cut of a direct rule: the input and, for each output that delivers to it, feedback and route."""

    layer: str
    x: Tensor
    version: int  # of x when it was cut, -1 where that is not known
    feedback: dict[int, Tensor]
    gain: float
    routes: dict[int, Route]
    call: int = 0  # number of the layer's call, in this forward
    calls: int = 1  # how often the layer has run, when the error is delivered
    factors: tuple[Tensor, ...] = ()  # of B, when an error is delivered: what else it is made of
    shape: tuple[int, int] = (0, 0)  # of B as it carries that error
    start: int = 0  # of its columns, in what a projector returns
    keep: Keep | None = None  # what is called with the change of what the rule moves by errors, in training

    def share(self, number: int) -> float:
        """Factor of an output's error: the gain of B, over √calls where these are positions of x alone."""
        return self.gain / sqrt(self.calls) if self.routes[number].spread else self.gain


def deliver_layerwise(
    y: Tensor,
    x: Tensor,
    gain: float,
    rule: Rule,
    kind: str,
    spec: Any,
    scratch: Scratch,
    backwards: deque,  # of int; said so, a type checker at run time would look into it while another thread adds to it
    changes: tuple[Transform, ...],
    memories: tuple[Memory, ...],
    inputs: tuple[Tensor, ...],
) -> Tensor:
    """Give y; in backward x receives y's error carried through gain · B by the layer's own transposed map."""
    return _apply(_Layerwise, y, x, gain, rule, kind, spec, scratch, backwards, changes, memories, *inputs)


def deliver_direct(
    output: Tensor,
    target: Tensor | None,
    axis: int,
    rule: Rule,
    changes: tuple[Transform, ...],
    number: int,
    cuts: list[Cut],
    memories: tuple[Memory, ...],
    remembered: tuple[Tensor, ...],
    projection: Projection | None,
    reached: list[int],
    fired: list[Any],
) -> Tensor:
    """Give the output; in backward every cut receives the output's error projected by its gain · B.

    Args:
        output: the network's output, (batch, ...).
        target: for a targeted rule, the targets in the output's shape; their classes lie along ``axis``.
        axis: the axis of the classes.
        rule: the direct rule.
        changes: transforms of the error that is projected.
        number: of the output, among those that deliver errors.
        cuts: where to.
        memories: of transforms that remember.
        remembered: what they do.
        projection: what carries the error in place of matrices.
        reached: gets the number of every backward that delivers.
        fired: the layers that ran; each gets that number too.
    """
    xs: list[Tensor] = []  # each once: layers may share their input (query and key), and Dynamo refuses a repeated one
    matrices: list[Tensor] = []  # so do the calls of one layer share B
    routes = []
    owners: list[Cut] = []  # of the matrices
    for cut in cuts:
        index, matrix = _place_in(xs, cut.x), _place_in(matrices, cut.feedback[number])
        owners += [cut] if matrix == len(owners) else []
        routes.append((index, matrix, cut.share(number), cut.routes[number], cut.call))
    factors = [factor for cut in owners for factor in cut.factors]
    held = []
    for cut in owners:
        before = sum(len(one.factors) for one in held)
        places = tuple(range(before, before + len(cut.factors)))
        held.append(Held(cut.shape, places, 0 if rule.moved == "B" else 1, cut.keep, cut.start))
    return _apply(
        _Direct, output, target, axis, rule, changes, tuple(routes), len(xs), tuple(held), memories, projection,
        reached, fired, *xs, *matrices, *factors, *remembered,
    )  # fmt: skip


def _place_in(tensors: list[Tensor], tensor: Tensor) -> int:
    """Find a tensor in a list, and append it where it is not."""
    for place, other in enumerate(tensors):
        if other is tensor:
            return place
    tensors.append(tensor)
    return len(tensors) - 1
