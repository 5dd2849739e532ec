"""Check the gradients of a batch against the written-out definition of the rule, computed another way."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from falign._attached import Feedback, FeedbackOfParameters
from falign._convert import backprop, revert
from falign._cuts import is_below
from falign._delivery import (
    Cut,
    Route,
    change_output_error,
    in_backward,
    joined,
    matched,
    overrides_error,
)
from falign._labels import ACTIVITY, ERROR, MOVEMENTS, Labels, Made, carries_errors, is_weight
from falign._memory import memories_of
from falign._outputs import as_output, pick, substitute
from falign._preserve import without_cudnn
from falign._show import Loud, Sheet, Shown
from falign._style import Points, dots, height_of
from falign._survey import gradients_aside, plain_copy
from falign._transport import (
    Transported,
    check_loss,
    compute_loss,
    run_backward,
    run_model,
    uncompiled_passes,
)
from falign._wiring import Start, Wiring, converted, feedbacks, observed, wiring_of
from falign.layers import KINDS, Layer
from falign.rules import Rule
from falign.rules._direct import confined, limit_of
from falign.transforms import apply_transforms


@dataclass(frozen=True, kw_only=True)
class Row:
    """Comparison of one parameter's gradient with the definition's, and with the true one.

    Attributes:
        parameter: its name.
        error: |taken - defined| / max(|defined|, 0.001 |the whole gradient defined|): a bias in front of a
            normalisation has no gradient but rounding, and no relative error to speak of.
        angle: degrees between the gradient taken and backpropagation's; NaN where one is zero.
    """

    parameter: str
    error: float
    angle: float


@dataclass(frozen=True, kw_only=True)
class Verification(Shown):
    """Result of ``verify``: true where all gradients are as defined and no weight carried an error. Prints as a table.

    Attributes:
        rule: the rule's name.
        tolerance: largest error of a row.
        rows: one a parameter.
        transported: parameters that carried the error where the rule says that they do not (see
            ``falign.transport``); those that ``skip`` left to backpropagation are not in it.
    """

    rule: str
    tolerance: float
    rows: tuple[Row, ...]
    transported: Transported

    @property
    def worst(self) -> Row:
        """The row with the largest error."""
        return max(self.rows, key=lambda row: row.error if row.error == row.error else float("inf"))

    def __bool__(self) -> bool:
        return not self.transported and not any(map(self._is_wrong, self.rows))

    def _sheet(self) -> Sheet:
        head = f"rule {self.rule}: gradients against its definition, tolerance {self.tolerance:.0e}"
        table = [["parameter", "relative error", "angle to backpropagation", ""]]
        for row in self.rows:
            angle = "-" if isnan(row.angle) else f"{row.angle:.2f} deg"
            table.append([row.parameter, f"{row.error:.1e}", angle, Loud("WRONG") if self._is_wrong(row) else ""])
        if not any(line[-1] for line in table):
            table = [line[:-1] for line in table]
        carried = [f"{name}: carried the error itself, in {how}   WRONG" for name, how in self.transported.items()]
        return Sheet(head=head, table=table, left=(0, 3), notes=[Loud(line) for line in carried])

    def _size(self) -> tuple[float, float]:
        return 7.0, height_of(len(self.rows))

    def _draw(self, axes: Any) -> None:
        remarks = [
            "carried the error" if row.parameter in self.transported else "WRONG" if self._is_wrong(row) else ""
            for row in self.rows
        ]
        points = Points(label="error", values=[row.error for row in self.rows])
        names, marked = [row.parameter for row in self.rows], (self.tolerance, "tolerance")
        dots(
            axes, names, [points], xlabel="relative error of the gradient", title=f"rule {self.rule}: as defined?",
            marked=marked, remarks=remarks, logarithmic=True,
        )  # fmt: skip

    def _is_wrong(self, row: Row) -> bool:
        return not row.error <= self.tolerance


def verify(model: nn.Module, x: Any, loss_fn: Callable[[Any], Tensor], *, target: Tensor | None = None) -> Verification:
    """Compare this batch's gradients with the rule's definition, layer by layer.

    The definition is computed without the delivery that ``convert`` attaches to the model. Layerwise rules: every layer
    computes ``W·cut(x) + (B·x - cut(B·x))`` with the layer's own forward, so that autograd itself transposes the
    layer's map with B in its place. Direct rules: the gradient of ``⟨e, f⟩ + Σ_l ⟨e B_l, x_l⟩`` over all cut inputs,
    with e and B_l held fixed. Copies of the model are used; the model, its gradients, its buffers and the random
    generators stay as they are. Takes three steps' time and twice the model's memory.

    Args:
        model: a converted model.
        x: the batch (a tuple: positional arguments, a dict: keyword arguments).
        loss_fn: what the model returns -> scalar loss.
        target: the targets, for a rule that needs them: class indices (batch, …), or of the output's shape.

    Returns:
        A ``Verification``; it is true when every gradient is as defined (relative error ≤ 1e-9 in float64, 1e-4 in
        float32, 5e-2 in shorter types).

    Raises:
        TypeError: the model is no module, or loss_fn no function.
        ValueError: the model is not converted, the loss is not a finite scalar, or a copy cannot be made or run.
    """
    converted(model)
    wiring = wiring_of(model)
    if wiring is None:
        raise ValueError("verify takes the model that was given to falign.convert, not a part or a wrapper of it")
    rule = wiring.rule

    def gradients(make: Callable[[nn.Module], Any]) -> dict[str, Tensor | None]:
        with gradients_aside(model):
            twin = plain_copy(model)
            with uncompiled_passes(twin, target):
                results.append(make(twin))
        return {name: parameter.grad for name, parameter in twin.named_parameters()}

    results: list[Any] = []
    taken = gradients(lambda twin: run_backward(twin, x, loss_fn))
    defined = gradients(lambda twin: _define(twin, x, loss_fn))
    true = gradients(lambda twin: _backprop(twin, x, loss_fn))
    if all(gradient is None for gradient in taken.values()):
        raise ValueError(
            "no gradient reached the copy of the model that is looked at: a forward that was replaced on the model "
            "keeps running the original; replace it in a subclass"
        )
    # A gradient that is rounding alone has no relative error: it is judged by the whole network's.
    whole = sum(float(gradient.double().square().sum()) for gradient in defined.values() if gradient is not None)
    rows = tuple(
        Row(
            parameter=name,
            error=_error(gradient, defined[name], 1e-3 * whole**0.5),
            angle=_angle(gradient, true[name]),
        )
        for name, gradient in taken.items()
        if not (gradient is None and defined[name] is None)
    )
    shortest = min(p.dtype.itemsize for p in model.parameters() if p.is_floating_point())
    tolerance = {8: 1e-9, 4: 1e-4}.get(shortest, 5e-2)
    transported = Transported(
        (name, how)
        for name, how in results[0].items()
        if rule.wiring != "none" and name not in wiring.free and not is_below(name, *wiring.skip)
    )
    return Verification(rule=rule.name, tolerance=tolerance, rows=rows, transported=transported)


def _backprop(twin: nn.Module, x: Any, loss_fn: Callable[[Any], Tensor]) -> None:
    with backprop(twin):
        check_loss(compute_loss(twin, x, loss_fn)).backward()


def _define(twin: nn.Module, x: Any, loss_fn: Callable[[Any], Tensor]) -> None:
    wiring = converted(twin)[0]
    if wiring.rule.wiring == "none":
        check_loss(compute_loss(twin, x, loss_fn)).backward()
    elif wiring.rule.wiring == "layerwise":
        recurrent = any(isinstance(module, nn.RNNBase) for module in twin.modules())
        with without_cudnn() if recurrent else nullcontext():  # in whose buffers no weight can be exchanged
            _define_layerwise(twin, x, loss_fn)
    else:
        _define_direct(twin, wiring, x, loss_fn)


def _like(layer: Layer) -> Any:
    """Make a layer of the same kind and options, without weight, bias, hooks and parametrizations."""
    base = next(base for kind in KINDS.values() for base in kind.types if isinstance(layer, base))
    empty = nn.Module()
    plain = base.__new__(base)
    plain.__dict__.update({**layer.__dict__, **empty.__dict__, "bias": None})
    return plain


def _define_layerwise(twin: nn.Module, x: Any, loss_fn: Callable[[Any], Tensor]) -> None:
    layers = [(name, part) for name, part in feedbacks(twin).items() if part.parameter is None]
    parts: list[tuple[Layer, Any]] = [(twin.get_submodule(name), part) for name, part in layers]
    by_hand = {name: part for name, part in feedbacks(twin).items() if part.parameter is not None}
    learned, changes = converted(twin)[0].rule.learned, converted(twin)[0].changes
    matrices = _matrices_by_hand(twin, by_hand)
    revert(twin)
    kept: list[Tensor | None] = [None]  # the input of the layer that runs, for the hook behind it: layers do not nest
    for layer, part in parts:
        feedback_layer = _like(layer)
        if learned:
            layer.feedback = part  # without its hooks, and a parameter of the model as before

        def before(layer: Layer, args: tuple) -> tuple:
            kept[0] = args[0]
            return (args[0].detach(), *args[1:])

        def after(
            layer: Layer,
            args: tuple,
            kwargs: dict[str, Any],
            y: Tensor,
            part: Any = part,
            feedback_layer: nn.Module = feedback_layer,
        ) -> Tensor:
            part.wiring.rule.feedback_inputs(part, layer.weight, advance=part.training and not in_backward())
            # A copy: on a GPU the feedback of adafa moves in place, which must not reach into an earlier call.
            feedback_layer.__dict__["weight"] = part.feedback_matrix(layer.weight).detach().clone()
            through = feedback_layer(kept[0], *args[1:], **kwargs)
            if changes and through.requires_grad:
                axis = KINDS[part.kind].feature_axis(KINDS[part.kind].spec(layer))
                memory = memories_of(changes, [part], part.first_end, keeps=False)
                through.register_hook(lambda error: apply_transforms(changes, error, axis, *memory))
            y = y + (through - through.detach())  # zero forward; backward it adds the error that B carries
            # And B's own gradient: that of a weight in its place.
            if learned and layer.weight.requires_grad and not part.follows:
                weight = part.feedback_matrix(layer.weight).detach().clone().requires_grad_()
                weight.register_hook(partial(_learn, part))
                feedback_layer.__dict__["weight"] = weight
                through = feedback_layer(args[0], *args[1:], **kwargs)
                y = y + (through - through.detach())
            return y

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after, prepend=True, with_kwargs=True)
    with _Exchange(twin, matrices, {name: part.nodes for name, part in by_hand.items()}, x) as exchange:
        exchange.backward(check_loss(compute_loss(twin, x, loss_fn)))
    _attach_gradients(twin, by_hand, [(layer, part) for layer, part in parts if part.follows])


def _matrices_by_hand(twin: nn.Module, by_hand: dict[str, Feedback]) -> dict[str, Tensor]:
    """Make {parameter: B, as it carries the error in this pass} of what is multiplied by hand."""
    matrices = {}
    for name, part in by_hand.items():
        weight = twin.get_parameter(name)
        part.wiring.rule.feedback_inputs(part, weight, advance=part.training)
        matrices[name] = part.feedback_matrix(weight).detach()
    return matrices


def _attach_gradients(twin: nn.Module, by_hand: dict[str, Feedback], tied: list[tuple[Layer, Feedback]]) -> None:
    """Give the feedback of parameters back to the model; learned feedback has the gradient of its parameter."""
    for layer, part in tied:
        if part.B is not None and layer.weight.grad is not None:
            part.B.grad = part.learned_gradient(layer.weight.grad)
    for name, part in by_hand.items():
        parameter = twin.get_parameter(name)
        assert part.parameter is not None
        owner = twin.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner._modules.get("feedback"), (Feedback, FeedbackOfParameters)):
            owner._modules["feedback"] = FeedbackOfParameters()
        owner._modules["feedback"]._modules[part.parameter] = part  # type: ignore[union-attr]
        if part.wiring.rule.learned and part.B is not None and parameter.grad is not None:
            part.B.grad = part.learned_gradient(parameter.grad)


def _learn(part: Feedback, gradient: Tensor) -> None:
    """Add to the gradient of a learned B what its rule makes of that of W."""
    if part.B is not None:
        gradient = part.learned_gradient(gradient)
        part.B.grad = gradient if part.B.grad is None else part.B.grad + gradient


class _Exchange(Labels):
    """Run a pass of plain autograd, in whose backward every product of an error with a parameter has B for it.

    The exchange is made below autograd, operation by operation, and not where tensors are saved.
    """

    def __init__(self, twin: nn.Module, matrices: dict[str, Tensor], nodes: dict[str, frozenset[str]], x: Any) -> None:
        super().__init__((name, twin.get_parameter(name)) for name in matrices)
        self._nodes = nodes  # where a scaling by the parameter is a product, since the error is spread or summed
        self._twins: dict[int, Tensor] = {}  # by the place of a copy that is made of parameters alone: the same of B
        self._parameters = {name: twin.get_parameter(name) for name in matrices}
        self._matrices = {
            name: torch.empty_like(p, requires_grad=False).copy_(matrices[name]) for name, p in self._parameters.items()
        }
        for leaf in tree_leaves(x):
            self.label(leaf, frozenset((ACTIVITY,)))

    def backward(self, loss: Tensor) -> None:
        """Walk back from a loss."""
        seed = torch.ones_like(loss)
        self.label(seed, frozenset((ERROR,)))
        torch.autograd.backward(loss, seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        made = [self.made_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        weights: Made = frozenset().union(*(one for one in made if is_weight(one)))
        if weights and any(ERROR in one for one in made) and (carries_errors(func) or self._is_product(weights)):
            args = tree_map(self._exchanged, args)
            kwargs = {key: tree_map(self._exchanged, value) for key, value in kwargs.items()}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        moves = name in MOVEMENTS and made and all(is_weight(one) for one in made) and isinstance(result, Tensor)
        if moves and result.untyped_storage().data_ptr() not in self._spans:  # a copy
            self._twins[result.untyped_storage().data_ptr()] = func(*tree_map(self._exchanged, args), **kwargs)
        return result

    def _is_product(self, weights: Made) -> bool:
        node = torch._C._current_autograd_node()
        return node is not None and any(node.name() in self._nodes[name] for name in weights)

    def _exchanged(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not is_weight(self.made_of(leaf)):
            return leaf
        place = leaf.untyped_storage().data_ptr()
        if place in self._twins:
            twin = self._twins[place]
            return twin.as_strided(leaf.size(), leaf.stride(), leaf.storage_offset())
        for name in self.made_of(leaf):
            parameter = self._parameters[name]
            if parameter.untyped_storage().data_ptr() == place:
                offset = leaf.storage_offset() - parameter.storage_offset()
                return self._matrices[name].as_strided(leaf.size(), leaf.stride(), offset)
        return leaf


def _define_direct(twin: nn.Module, wiring: Wiring, x: Any, loss_fn: Callable[[Any], Tensor]) -> None:
    for module in twin.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__func__", None) in (Wiring.finish, Feedback.deliver_direct, Start.deliver):
                del module._forward_hooks[key]
    at_layers: dict[str, Tensor] = {}
    for end in wiring.ends:
        if end.layer is not None:
            layer = twin.get_submodule(end.layer)
            layer.register_forward_hook(
                lambda layer, args, y, name=end.layer: at_layers.update({name: y}), prepend=True
            )
    result = run_model(twin, x)
    run = wiring.state.runs.pop()  # the hook that would have ended it was taken off above
    # The error at what the model returns, and not at what was made of it within: the loss sees it cut off.
    outputs = {number: pick(result, end.output) for number, end in enumerate(wiring.ends) if end.layer is None}
    alone = {number: output.detach().requires_grad_() for number, output in outputs.items()}
    seen = result
    for number, output in outputs.items():
        seen = alone[number] if output is seen else substitute(seen, output, alone[number])
    total = loss = check_loss(loss_fn(seen))
    for number, end in enumerate(wiring.ends):
        output = outputs[number] if end.layer is None else at_layers[end.layer]
        at = output if end.layer else alone[number]
        (error,) = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
        if error is None:
            continue
        if end.layer is None:
            total = total + (error * output).sum()
        projected = error
        if wiring.rule.targeted:
            goal, axis = as_output(wiring.rule.name, wiring.state.target, output)
            projected = wiring.rule.error(error, output.detach(), goal, axis)
        elif overrides_error(wiring.rule):
            projected = wiring.rule.error(error, output.detach(), None, -1)
        cuts = [run.parts[cut.layer].completed(cut, number) for cut in run.cuts if number in cut.feedback]
        if wiring.changes and cuts:
            features = cuts[0].shape[0]
            memory = memories_of(wiring.changes, run.parts.values(), number, keeps=False)
            projected = change_output_error(wiring.changes, projected, cuts[0].routes[number], features, *memory)
        training = [cut for cut in cuts if wiring.rule.observes and run.parts[cut.layer].training]
        matrices = _matrices(wiring.rule, number, cuts, training, output.detach(), projected)
        delivered: dict[int, tuple[Tensor, Tensor]] = {}
        for cut in cuts:
            matrix, route = matrices[cut.layer] * cut.gain, cut.routes[number]
            calls = run.calls.get(cut.layer, 1)
            at_cut = _delivered(projected, matrix, route, tuple(cut.x.shape), cut.call, calls)
            delivered[id(cut.x)] = cut.x, at_cut + delivered[id(cut.x)][1] if id(cut.x) in delivered else at_cut
        limit = limit_of(wiring.rule)
        for x_cut, at_cut in delivered.values():
            total = total + ((confined(at_cut, x_cut.detach(), limit) if limit else at_cut) * x_cut).sum()
    total.backward()


def _matrices(
    rule: Rule, number: int, cuts: list[Cut], training: list[Cut], output: Tensor, error: Tensor
) -> dict[str, Tensor]:
    """Map layers to the B that carries an error: in training the one that this pass moves by what it shows."""
    inputs = {cut.layer: [cut.feedback[number], *cut.factors] for cut in cuts}
    if type(rule).observe is not Rule.observe:
        for layer, matrix in observed(rule, number, output, training).items():
            inputs[layer][0] = matrix
    if type(rule).observe_error is not Rule.observe_error:
        moved = 0 if rule.moved == "B" else 1
        for layer in {cut.layer for cut in training}:
            calls = [cut for cut in training if cut.layer == layer]
            rows = [matched(error, cut.x.detach(), cut.shape, cut.routes[number], call=cut.call) for cut in calls]
            inputs[layer][moved] = rule.observe_error(inputs[layer][moved], *joined(rows)).detach()
    return {layer: rule.feedback_matrix(*each) if rule.factored else each[0] for layer, each in inputs.items()}


def _delivered(error: Tensor, matrix: Tensor, route: Route, shape: tuple[int, ...], call: int, calls: int) -> Tensor:
    """Compute the error at one cut by one einsum over all positions, as the route's letters say."""
    if not route.output:
        return torch.einsum("nk,kc->nc", error.reshape(-1, matrix.shape[0]), matrix).reshape(shape)
    sizes = route.sizes(tuple(error.shape), shape, tuple(matrix.shape), calls)
    assert sizes is not None
    output, x = "".join(route.output), "".join(route.x)
    factors = [error.reshape([sizes[letter] for letter in output]), matrix]
    terms = [output, "kc"]
    if "q" in output:  # the one position that belongs to this call
        factors.append(nn.functional.one_hot(torch.tensor(call), calls).to(error))
        terms.append("q")
    for letter in x:  # what x alone has: the same everywhere, of the same norm altogether
        if letter not in output and letter != "c":
            factors.append(error.new_full((sizes[letter],), sizes[letter] ** -0.5))
            terms.append(letter)
    if route.spread:
        factors.append(error.new_full((1,), calls**-0.5))
        terms.append("z")
    return torch.einsum(f"{','.join(terms)}->{x}", *factors).reshape(shape)


def _error(taken: Tensor | None, defined: Tensor | None, least: float) -> float:
    if taken is None or defined is None:
        return float("inf")
    difference, size = float((taken - defined).double().norm()), max(float(defined.double().norm()), least)
    return difference / size if size > 0 else difference


def _angle(taken: Tensor | None, true: Tensor | None) -> float:
    if taken is None or true is None or not (taken.any() and true.any()):
        return float("nan")
    cosine = nn.functional.cosine_similarity(taken.double().flatten(), true.double().flatten(), dim=0)
    return float(torch.rad2deg(cosine.clamp(-1, 1).acos()))
