"""One batch walked back by the rule and by backpropagation, and what every layer saw on both ways."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_map_only

from falign._attached import Feedback, FeedbackOfParameters
from falign._convert import backprop, targets
from falign._cuts import find_blocks
from falign._delivery import in_backward
from falign._preserve import force_eager
from falign._survey import matrices_by_hand
from falign._transport import compute_loss
from falign._wiring import converted, feedbacks, preserve_state, true_errors
from falign.layers import Layer, kind_of
from falign.measure._angles import effective_rank, length, sample_angles


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


@dataclass(kw_only=True, eq=False)
class Sizes:
    """Squared norms of what a layer, or a block of layers, saw of a batch, summed over samples and calls.

    Attributes:
        samples: How many samples it was given, all calls together.
        elements: How many numbers.
        x: |x|² of its input.
        z: |z|² of its output.
        taken: |error at z|² by the rule.
        true: |error at z|² by backpropagation.
        eps: The largest distance of 1 from the next number, of the types of its outputs.
        wide: Whether x and z are float64.
    """

    samples: int = 0
    elements: int = 0
    x: float = 0.0
    z: float = 0.0
    taken: float = 0.0
    true: float = 0.0
    eps: float = 0.0
    wide: bool = True

    def see(self, x: Tensor, z: Tensor) -> None:
        """Add a call."""
        self.samples += len(x) if x.dim() else 1
        self.elements += x.numel()
        self.x += length(x) ** 2
        self.z += length(z) ** 2
        self.eps = max(self.eps, torch.finfo(z.dtype).eps)
        self.wide &= z.dtype == torch.float64

    @property
    def growth(self) -> float | None:
        """|z|/|x|; None where x is zero."""
        return (self.z / self.x) ** 0.5 if self.x > 0 else None


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
        sizes: {layer: norms of what it saw}.
        blocks: {block: the same of a module of a row of siblings of one class, such as the blocks of a residual
            network}.
    """

    loss: float
    order: tuple[str, ...]
    taken: dict[str, Tensor]
    true: dict[str, Tensor]
    delivered: dict[str, Tensor]
    received: dict[str, Tensor]
    ranks: dict[str, float]
    sizes: dict[str, Sizes]
    blocks: dict[str, Sizes]


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
    norms = Norms()

    def compare(place: Place, true: Tensor) -> None:
        side, layer, _ = place
        error = errors.pop(place, None)  # freed at once: those of all layers together are as large as a forward's graph
        if error is None:
            return
        if side == "received":
            norms.layers[layer].taken += length(error) ** 2
            norms.layers[layer].true += length(true) ** 2
        angles[side][layer].append(sample_angles(error, true))
        if side == "delivered" and layer not in ranks and (rank := effective_rank(error)) is not None:
            ranks[layer] = rank

    if not callable(loss_fn):
        raise TypeError(f"loss_fn is a {type(loss_fn).__name__}, expected a function of the model's output and y")
    loss, order, taken, true = walk_back(model, loss_fn, x, y, errors.__setitem__, compare, norms)
    order = tuple(name for name in order if name in angles["received"])
    delivered, received = (
        {name: torch.cat(of_layer[name]) for name in order if name in of_layer} for of_layer in angles.values()
    )
    return Passes(
        loss=loss, order=order, taken=taken, true=true, delivered=delivered, received=received, ranks=ranks,
        sizes=dict(norms.layers), blocks=dict(norms.blocks),
    )  # fmt: skip


def walk_back(
    model: nn.Module, loss_fn: Loss, x: Any, y: Any, keep: See, compare: See, norms: "Norms | None" = None
) -> Walked:
    """Walk a batch back on both ways, and show the errors: to ``keep`` those of the rule, to ``compare`` the true ones.

    Args:
        model: A converted model.
        loss_fn: (model output, y) -> scalar.
        x: The batch.
        y: Its targets.
        keep: Is shown every error by the rule.
        compare: Is shown every true error, those of a place after the rule's.
        norms: Is shown what goes into layers and blocks and comes out of them.
    """
    walk = _one_forward if one_forward_suffices(model) else _two_forwards
    given = targets(model, y) if isinstance(y, Tensor) else nullcontext()
    with force_eager(), torch.enable_grad(), given, nullcontext() if norms is None else norms.seen(model):
        return walk(model, lambda: compute_loss(model, x, lambda output: loss_fn(output, y)), keep, compare)


def in_double(loss_fn: Loss) -> Loss:
    """Make a loss that takes what the model returns, and y, as float64, where that is possible."""

    def judged(output: Any, y: Any) -> Tensor:
        try:
            return loss_fn(tree_map_only(Tensor, _double, output), tree_map_only(Tensor, _double, y))
        except Exception:  # a loss with weights of its own, or a device without float64
            return loss_fn(output, y)

    return judged


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@dataclass
class Norms:
    """Sizes of what goes into layers and blocks and comes out of them, in the first forward within ``seen``."""

    layers: dict[str, Sizes] = field(default_factory=lambda: defaultdict(Sizes))
    blocks: dict[str, Sizes] = field(default_factory=lambda: defaultdict(Sizes))
    forwards: int = 0

    @contextmanager
    def seen(self, model: nn.Module) -> Iterator[None]:
        """Watch the forwards of a model."""

        def begin(module: nn.Module, args: Any) -> None:
            self.forwards += 1

        def note(sizes: Sizes) -> Callable[..., None]:
            def after(module: nn.Module, args: tuple, y: Any) -> None:
                z: Any = y[0] if isinstance(y, tuple) and y else y
                if self.forwards == 1 and not in_backward() and args and _is_real(args[0]) and _is_real(z):
                    sizes.see(args[0], z)

            return after

        maps, blocks = linear_maps(model), find_blocks(model)
        with ExitStack() as hooks:
            hooks.callback(model.register_forward_pre_hook(begin, prepend=True).remove)
            for name, layer in maps.items():
                hooks.callback(layer.register_forward_hook(note(self.layers[name])).remove)
            for name, block in blocks.items():
                if name not in maps:
                    hooks.callback(block.register_forward_hook(note(self.blocks[name])).remove)
            yield


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_nested


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
