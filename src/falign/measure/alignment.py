"""How well the errors that a rule delivers agree with the true ones, layer by layer."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from falign.attached import Feedback
from falign.layers import Layer, kind_of, weight_of
from falign.measure.angles import Products
from falign.measure.displacement import displaced, held, own_parameters, summed, twin_step
from falign.measure.passes import Loss, Passes, both, linear_maps
from falign.measure.report import Alignment, LayerAlignment
from falign.measure.untouched import unwrapped
from falign.measure.weights import Weights, compare
from falign.wiring import converted, feedbacks


def alignment(
    model: nn.Module, loss_fn: Loss, x: Any, y: Any, *, optimizer: torch.optim.Optimizer | None = None
) -> Alignment:
    """Measure one batch: the errors delivered, the gradients taken and the feedback, beside the true ones.

    The batch is walked back twice, by the rule and by backpropagation, on the same weights and the same random numbers
    (dropout masks match). Weights, gradients, buffers (running statistics, moving feedback), random generators, modes
    and the optimizer are left exactly as they were. Takes about as long as two steps and the memory of two.

    Args:
        model: A converted model, also within ``torch.compile`` (it is run uncompiled) or DDP (each rank measures its
            own batch).
        loss_fn: (model output, y) -> scalar.
        x: Inputs of one batch of at least two samples; a tuple is positional arguments, a dict keyword arguments.
        y: Its targets; a tensor is also what a rule that needs targets is given.
        optimizer: With it, the displacement that it would make with these gradients, in its present state, is compared
            with the true gradient as well; a copy of it makes the step.

    Returns:
        A row a layer and the dominance of the whole; see ``Alignment``.

    Raises:
        TypeError: The model is no module, loss_fn no function, or the optimizer none.
        ValueError: The model is not converted or does not run on the batch, the batch has one sample, the loss is not a
            finite scalar, a weight is not finite, or the optimizer holds none of the model's parameters or cannot step
            without a closure.
    """
    model = unwrapped(model)
    converted(model)
    moved = {} if optimizer is None else held(model, optimizer)
    passes = both(model, loss_fn, x, y)
    found = _summarised(model, passes)
    if optimizer is None:
        return found
    steps = twin_step(optimizer, moved, passes.taken)
    layers = (replace(row, **displaced(model, row.layer, steps, passes.true)) for row in found.layers)
    return replace(found, layers=tuple(layers))


def measured(model: nn.Module, loss_fn: Loss, x: Any, y: Any) -> tuple[Alignment, dict[str, Tensor]]:
    """``alignment`` of a converted, unwrapped model, and {parameter: true gradient}."""
    passes = both(model, loss_fn, x, y)
    return _summarised(model, passes), passes.true


def gradient_angles(model: nn.Module, loss_fn: Loss, x: Any, y: Any) -> dict[str, float]:
    """{layer: degrees between the gradient that it takes and its true gradient}, 90 where one is zero.

    Layers without a trainable parameter are left out. Arguments and errors are those of ``alignment``.
    """
    found = alignment(model, loss_fn, x, y).layers
    return {
        row.layer: 90.0 if row.gradient_angle is None else row.gradient_angle
        for row in found
        if row.gradient_norm is not None
    }


def _summarised(model: nn.Module, passes: Passes) -> Alignment:
    maps = linear_maps(model)
    order = [*passes.order, *(name for name in maps if name not in passes.order)]
    own = {name: own_parameters(name, maps[name], passes.true) for name in order}
    parts = feedbacks(model)
    weights = {
        name: compared
        for name in passes.delivered
        if name in parts and (compared := _weights(parts[name], maps[name])) is not None
    }
    slopes = {name: summed(names, passes.taken, passes.true) for name, names in own.items()}
    rows = tuple(
        LayerAlignment(
            layer=name,
            kind=_kind(maps[name]),
            **_spread("delivered", passes.delivered.get(name)),
            **_spread("received", passes.received.get(name)),
            **_slopes(slopes[name] if own[name] else None),
            **(weights[name].row() if name in weights else {}),
            effective_rank=passes.ranks.get(name),
        )
        for name in order
    )
    inside = {parameter for names in own.values() for parameter in names}
    rest = summed([name for name in passes.true if name not in inside], passes.taken, passes.true)
    descent = sum(found.inner for found in slopes.values()) + rest.inner
    last = slopes[passes.order[-1]] if passes.order else Products()
    return Alignment(
        rule=" + ".join(dict.fromkeys(wiring.rule.name for wiring in converted(model))),
        loss=passes.loss,
        descent=descent,
        other=rest.inner,
        dominance=(descent - last.inner) / last.other if last.other > 0 else None,
        layers=rows,
        neurons={name: found.neurons for name, found in weights.items()},
        neuron_cosines={name: found.cosines for name, found in weights.items()},
    )


def _kind(layer: Layer) -> str:
    kind = kind_of(layer)
    assert kind is not None
    return kind.name


def _weights(part: Feedback, layer: Layer) -> Weights | None:
    weight = weight_of(layer)
    matrix = part.effective(weight).detach()
    return compare(matrix, weight, layer) if matrix.shape == weight.shape else None


def _spread(side: str, angles: Tensor | None) -> dict[str, float | None]:
    if angles is None:
        return {}
    angles = angles[~angles.isnan()]
    return {
        f"{side}_angle": float(angles.mean()) if len(angles) else None,
        f"{side}_angle_sd": float(angles.std()) if len(angles) > 1 else None,
    }


class _Slopes(NamedTuple):
    gradient_angle: float | None
    cosine: float | None
    gradient_norm: float
    taken_norm: float
    descent: float


def _slopes(found: Products | None) -> dict[str, float | None]:
    if found is None:
        return {}
    return _Slopes(found.angle, found.cosine, found.other**0.5, found.one**0.5, found.inner)._asdict()
