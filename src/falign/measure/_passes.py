"""One batch walked back by the rule and by backpropagation, and what every layer saw on both ways."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.parametrize import is_parametrized

from falign._attached import Feedback, FeedbackOfParameters
from falign._convert import backprop, targets
from falign._preserve import force_eager
from falign._survey import matrices_by_hand
from falign._transport import compute_loss
from falign._wiring import converted, feedbacks, preserve_state, true_errors
from falign.layers import Layer, kind_of
from falign.measure._angles import effective_rank, sample_angles


def one_forward_suffices(model: nn.Module) -> bool:
    """Tell whether one forward serves both ways.

    Then all errors are delivered layer by layer, the weight of a layer is what its parameter is, and nobody else's hook
    stands between the layer's input and the layer: the delivery carries errors past it.
    """
    if any(wiring.rule.wiring == "direct" for wiring in converted(model)):
        return False
    layers = [model.get_submodule(name) for name, part in feedbacks(model).items() if part.parameter is None]
    return not any(is_parametrized(layer) for layer in layers) and all(
        isinstance(getattr(hook, "__self__", None), Feedback) for layer in layers for hook in _before(layer)
    )


def _before(layer: nn.Module) -> Iterable[Any]:
    return layer._forward_pre_hooks.values()


def check_batch(x: Any) -> None:
    """Raise ``ValueError`` where a batch, or where it is measured, allows no angles."""
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() records no gradients at all: measure outside of it (no_grad is fine)")
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, tuple) else (x,)
    first = next((part for part in parts if isinstance(part, Tensor)), None)
    if first is None:
        return
    if first.dim() == 0 or len(first) < 2:
        came = "a number" if first.dim() == 0 else f"a batch of {len(first)}"
        raise ValueError(f"x is {came}, expected two samples or more: angles are given with their spread over samples")


def check_loss(loss: Any, model: nn.Module) -> Tensor:
    """Give the loss, if it is a finite real scalar that depends on the weights; else raise ``ValueError``."""
    if not isinstance(loss, Tensor):
        raise ValueError(f"loss_fn returned a {type(loss).__name__}, expected a scalar tensor: loss_fn(output, y)")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn returned {tuple(loss.shape)}, expected a scalar: reduce it by its mean or sum")
    if loss.is_complex():
        raise ValueError(f"loss_fn returned a {loss.dtype}, expected a real number")
    if not torch.isfinite(loss):
        broken = next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)
        why = "the batch or the targets are not finite, or it overflowed" if broken is None else f"{broken} is not"
        raise ValueError(f"the loss is {float(loss.detach())}, expected a finite number: {why}")
    if not loss.requires_grad:
        raise ValueError("the loss depends on no trainable parameter of the model: there is no gradient to compare")
    return loss


Loss = Callable[[Any, Any], Tensor]
Place = tuple[Literal["delivered", "received"], str, int]
"""Place where an error is seen: handed to a layer's input or arriving at its output, the layer, which of its calls."""
See = Callable[[Place, Tensor], None]
Forward = Callable[[], Any]
Walked = tuple[float, tuple[str, ...], dict[str, Tensor], dict[str, Tensor]]
"""Loss, layers in running order, gradients by the rule, true gradients."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Passes:
    """Gradients, and angles of the errors, of a batch that was walked back on both ways.

    Attributes:
        loss: The loss.
        order: Layers that a gradient reaches, in the order in which they ran.
        taken: {parameter: gradient by the rule}.
        true: {parameter: gradient by backpropagation}.
        delivered: {layer: angle between the error that it hands to its input and the true one, a number a sample and
            call}; layers whose input wants no error are not in it.
        received: {layer: the same of the error at its output}.
        ranks: {layer: effective rank of the error that it hands to its input}.
    """

    loss: float
    order: tuple[str, ...]
    taken: dict[str, Tensor]
    true: dict[str, Tensor]
    delivered: dict[str, Tensor]
    received: dict[str, Tensor]
    ranks: dict[str, float]


def linear_maps(model: nn.Module) -> dict[str, Layer]:
    """Map names to the linear maps and convolutions of a model, converted or not, but those multiplied by hand."""
    by_hand = {name.rpartition(".")[0] for name in matrices(model)}
    return {
        name: layer
        for name, layer in model.named_modules()
        if kind_of(layer) is not None
        and name not in by_hand
        and not isinstance(layer._modules.get("feedback"), FeedbackOfParameters)
    }


def matrices(model: nn.Module) -> list[str]:
    """Name the matrices that attention, recurrent modules and their like multiply by hand, converted or not."""
    return [
        f"{name}.{key}".lstrip(".") for name, module in model.named_modules() for key, _ in matrices_by_hand(module)
    ]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Map names to the parameters that a gradient trains, feedback left out."""
    learned = {
        id(parameter) for part in model.modules() if isinstance(part, Feedback) for parameter in part.parameters()
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in learned
    }


def rule_and_true_gradients(model: nn.Module, loss_fn: Loss, x: Any, y: Any) -> Passes:
    """Walk a batch back by the rule and by backpropagation, on the same weights and random numbers, leaving no trace.

    A layerwise rule needs one forward for both, a direct one two.

    Args:
        model: A converted model.
        loss_fn: (model output, y) -> scalar.
        x: The batch; a tuple is positional arguments, a dict keyword arguments.
        y: Its targets; tensors are also what a rule that needs targets is given.

    Raises:
        TypeError: loss_fn is no function.
        ValueError: The model does not run on the batch, the batch has one sample, the loss is not a finite scalar that
            depends on the weights, or a weight is not a finite number.
    """
    check_batch(x)
    errors: dict[Place, Tensor] = {}
    angles: dict[str, dict[str, list[Tensor]]] = {"delivered": defaultdict(list), "received": defaultdict(list)}
    ranks: dict[str, float] = {}

    def compare(place: Place, true: Tensor) -> None:
        side, layer, _ = place
        error = errors.pop(place, None)  # freed at once: those of all layers together are as large as a forward's graph
        if error is None:
            return
        angles[side][layer].append(sample_angles(error, true))
        if side == "delivered" and layer not in ranks and (rank := effective_rank(error)) is not None:
            ranks[layer] = rank

    if not callable(loss_fn):
        raise TypeError(f"loss_fn is a {type(loss_fn).__name__}, expected a function of the model's output and y")

    def judged(output: Any) -> Any:
        return loss_fn(output, y)

    walk = _one_forward if one_forward_suffices(model) else _two_forwards
    with force_eager(), torch.enable_grad(), targets(model, y) if isinstance(y, Tensor) else nullcontext():
        loss, order, taken, true = walk(model, lambda: compute_loss(model, x, judged), errors.__setitem__, compare)
    order = tuple(name for name in order if name in angles["received"])
    delivered, received = (
        {name: torch.cat(of_layer[name]) for name in order if name in of_layer} for of_layer in angles.values()
    )
    return Passes(loss=loss, order=order, taken=taken, true=true, delivered=delivered, received=received, ranks=ranks)


def _one_forward(model: nn.Module, forward: Forward, keep: See, compare: See) -> Walked:
    """Run forward once, and walk back by the rule and then truly."""
    parameters = trainable(model)

    def see(place: Place, error: Tensor) -> None:
        (compare if way.true else keep)(place, error)

    with preserve_state(model), true_errors(model) as way, _seen(model, see) as order:
        loss = check_loss(forward(), model)
        taken = _gradients(loss, parameters, retain_graph=True)
        way.true = True
        true = _gradients(loss, parameters)
    return float(loss.detach()), tuple(order), taken, true


def _two_forwards(model: nn.Module, forward: Forward, keep: See, compare: See) -> Walked:
    """Run forward by the rule and truly, from the same random numbers."""
    parameters = trainable(model)
    with preserve_state(model), _seen(model, keep) as order:
        loss = check_loss(forward(), model)
        taken = _gradients(loss, parameters)
    with preserve_state(model), backprop(model), _seen(model, compare):
        true = _gradients(check_loss(forward(), model), parameters)
    return float(loss.detach()), tuple(order), taken, true


def _gradients(loss: Tensor, parameters: dict[str, nn.Parameter], *, retain_graph: bool = False) -> dict[str, Tensor]:
    slopes = torch.autograd.grad(loss, tuple(parameters.values()), retain_graph=retain_graph, materialize_grads=True)
    return {name: g.to_dense() if g.is_sparse else g for name, g in zip(parameters, slopes, strict=True)}


@contextmanager
def _seen(model: nn.Module, see: See) -> Iterator[dict[str, int]]:
    """Show every error that crosses the border of a layer; gives {layer: its calls}, in their order."""
    calls: dict[str, int] = {}

    def show(side: Literal["delivered", "received"], name: str, tensor: Tensor) -> None:
        place: Place = (side, name, calls[name])
        if tensor.grad_fn is None:
            raise ValueError(
                f"layer {name!r} runs within a re-entrant checkpoint, which shows no gradients to any measurement: use "
                "torch.utils.checkpoint with use_reentrant=False"
            )
        node, output = get_gradient_edge(tensor)[:2]  # and not a hook on the tensor: an in-place operation may follow

        def arrived(errors: tuple[Tensor | None, ...]) -> None:
            error = errors[output]
            if error is not None:
                see(place, error.detach())

        node.register_prehook(arrived)

    def enter(name: str) -> Callable[[nn.Module, tuple], tuple | None]:
        def before(layer: nn.Module, args: tuple) -> tuple | None:
            calls[name] = calls.get(name, 0) + 1
            if not (args and isinstance(args[0], Tensor) and args[0].requires_grad):
                return None
            x = args[0].view_as(args[0])  # through it passes this layer's share of the error, and no other's
            show("delivered", name, x)
            return (x, *args[1:])

        return before

    def leave(name: str) -> Callable[[nn.Module, tuple, Any], None]:
        def after(layer: nn.Module, args: tuple, y: Any) -> None:
            if isinstance(y, Tensor) and y.requires_grad:
                show("received", name, y)

        return after

    with ExitStack() as hooks:
        for name, layer in linear_maps(model).items():
            hooks.callback(layer.register_forward_pre_hook(enter(name), prepend=True).remove)  # before the cut
            hooks.callback(layer.register_forward_hook(leave(name)).remove)
        yield calls
