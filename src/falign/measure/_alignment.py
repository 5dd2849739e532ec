"""Measure how well the errors that a rule delivers agree with the true ones, layer by layer."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import nan
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign._attached import Feedback
from falign._expand import Product
from falign._wiring import converted, feedbacks, unwrapped, unwrapped_optimizer, wirings
from falign.layers import Layer, kind_of, weight_of
from falign.measure._angles import Products, products
from falign.measure._floor import join, overflows, read_twice, suspicious, unit_roundoff, unreadable, unreadable_errors
from falign.measure._passes import Loss, Passes, linear_maps, matrices, rule_and_true_gradients, trainable
from falign.measure._report import Alignment, LayerAlignment
from falign.measure._steps import check_step_size, loss_changes

_PIECE = 1 << 16
"""Elements at a time, in whole rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """A layer's feedback B beside its weight W, neuron by neuron.

    Attributes:
        whole: ⟨B, W⟩, |B|², |W|².
        same: Share of the entries that have the same sign.
        neurons: ⟨B[:, k], W[:, k]⟩ of every neuron (channel) k at the layer's input.
        cosines: The same over |B[:, k]| |W[:, k]|; 0 where one is zero.
    """

    whole: Products
    same: float
    neurons: Float[Tensor, " in"]
    cosines: Float[Tensor, " in"]

    def row(self) -> dict[str, Any]:
        """Give the columns of a layer's row."""
        return {
            "weight_angle": self.whole.angle,
            "norm_ratio": (self.whole.one / self.whole.other) ** 0.5 if self.whole.other > 0 else None,
            "sign_agreement": self.same,
            "neurons": len(self.neurons),
            "aligned_neurons": float((self.neurons > 0).double().mean()),
        }


def compare_weights(feedback: Tensor, weight: Tensor, layer: Layer) -> Weights:
    """Compare a feedback with the weight of its shape.

    Args:
        feedback: B as it carries the error, signs included.
        weight: W.
        layer: The layer that they are of.
    """
    kind = kind_of(layer)
    assert kind is not None
    same, sums = 0.0, [torch.zeros((), dtype=torch.float64, device=weight.device) for _ in range(3)]
    for b, w in _pieces(feedback, weight, whole=kind.name != "linear"):
        product = b * w
        same += float((product > 0).sum())
        sums = [
            total + kind.outgoing(part, layer).double()
            for total, part in zip(sums, (product, b * b, w * w), strict=True)
        ]
    inner, one, other = sums
    size = one.sqrt() * other.sqrt()
    return Weights(
        whole=Products(*(float(total.sum()) for total in sums)),
        same=same / max(1, weight.numel()),
        neurons=inner,
        cosines=torch.where(size > 0, inner / size, 0.0),
    )


def _pieces(feedback: Tensor, weight: Tensor, *, whole: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Split both into pieces of whole rows."""
    # So few that a piece stays in the cache and its sums lose nothing; a convolution's channels belong together.
    if weight.dtype.itemsize < 4:
        feedback, weight = feedback.float(), weight.float()
    rows = len(weight) if whole else max(1, _PIECE // max(1, weight.shape[1:].numel()))
    yield from zip(feedback.split(rows), weight.split(rows), strict=True)


class Part(NamedTuple):
    """A parameter by its full name, or rows of it."""

    parameter: str
    rows: tuple[int, int] | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Give this part of a tensor of the parameter's shape."""
        tensor = tensors[self.parameter]
        return tensor if self.rows is None else tensor[slice(*self.rows)]


def parts_of_rows(model: nn.Module, known: Mapping[str, Tensor]) -> dict[str, list[Part]]:
    """Map the name of every row to those of its parameters that are known.

    A row is a layer, or a matrix that is multiplied by hand.
    """
    names = {id(parameter): name for name, parameter in trainable(model).items()}
    rows: dict[str, list[Part]] = {}
    for name, layer in linear_maps(model).items():
        if isinstance(layer, Product):  # its parameters are those of the attention or recurrent module that it is in
            sources = [(names.get(id(parameter)), rows) for parameter, rows in layer.sources()]
        else:
            sources = [(f"{name}.{key}".lstrip("."), None) for key, _ in layer.named_parameters()]
        rows[name] = [Part(full, some) for full, some in sources if full is not None and full in known]
    attached = feedbacks(model) if wirings(model) else {}
    by_hand = [name for name, part in attached.items() if part.parameter is not None]
    by_hand += [name for name in matrices(model) if name in names.values()]
    return rows | {name: [Part(name)] if name in known else [] for name in by_hand}


def sum_products(parts: list[Part], taken: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> Products:
    """Add up the products of parts of the tensors of two dicts."""
    total = Products()
    for part in parts:
        total = total + products(part.of(taken), part.of(true))
    return total


def displacement_columns(
    parts: list[Part], steps: Mapping[str, Tensor], true: Mapping[str, Tensor], *, lost: bool = False
) -> dict[str, float | None]:
    """Give the columns of a row that compare its displacement with its true gradient.

    Args:
        parts: The parameters of the row that are moved.
        steps: {parameter: -Δθ}.
        true: {parameter: true gradient}.
        lost: Whether the true gradient rests on rounding.
    """
    if not parts:
        return {}
    step_by_gradient = sum_products(parts, steps, true)
    return {
        "displacement_angle": None if lost else step_by_gradient.angle,
        "displacement_norm": step_by_gradient.one**0.5,
    }


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Map names to those parameters of a model that the optimizer moves.

    Raises:
        TypeError: It is no optimizer.
        ValueError: It moves none of them.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    moved = {name: parameter for name, parameter in trainable(model).items() if id(parameter) in ids}
    if not moved:
        raise ValueError(
            f"the optimizer ({type(optimizer).__name__}) holds none of the model's trainable parameters: make it from "
            "model.parameters() of the model that is measured"
        )
    return moved


def twin_step(
    optimizer: torch.optim.Optimizer, moved: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Compute {parameter: -Δθ} of the step that the optimizer would make with these gradients, by a copy of it."""
    twins: dict[int, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            twins[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    # By the memo of deepcopy the copy has the optimizer's state and options over the twins of the parameters.
    twin = copy.deepcopy(optimizer, dict(twins))
    for name, parameter in moved.items():
        twins[id(parameter)].grad = gradients[name]
    try:
        twin.step()
    except Exception as error:
        raise ValueError(
            f"a copy of the optimizer ({type(optimizer).__name__}) cannot make a step by itself ({error}): leave out "
            "optimizer=, or give it to a Monitor, which watches the real steps"
        ) from error
    return {name: (parameter.detach() - twins[id(parameter)].detach()) for name, parameter in moved.items()}


class PendingRecord:
    """A measurement whose displacement is still to come: the optimizer makes its step after it.

    Attributes:
        step: Number of the step.
        report: What was measured; with the displacement once ``compare`` was called.
        before: The parameters that the optimizer moves, as they were before its step.
    """

    def __init__(
        self,
        step: int,
        report: Alignment,
        rows: list[dict[str, Any]],
        true: dict[str, Tensor],
        before: dict[str, Tensor],
    ) -> None:
        self.step, self.report, self._rows, self._true, self.before = step, report, rows, true, before

    def compare(self, model: nn.Module, steps: dict[str, Tensor]) -> None:
        """Put the displacement's columns into the rows and the report."""
        layers, parts = [], parts_of_rows(model, steps)
        for layer, row in zip(self.report.layers, self._rows, strict=True):
            columns = displacement_columns(parts[layer.layer], steps, self._true, lost=layer.lost("gradient"))
            row.update(columns)
            layers.append(replace(layer, **columns))
        self.report = replace(self.report, layers=tuple(layers))


def alignment(
    model: nn.Module,
    loss_fn: Loss,
    x: Any,
    y: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    step_size: float | None = None,
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
        step_size: With it, the change of the loss is measured by a step of each layer alone against the gradient that
            it takes, of this length relative to the norm of the layer's parameters; a forward a layer.

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
    optimizer = unwrapped_optimizer(optimizer)
    moved = {} if optimizer is None else trained_parameters(model, optimizer)
    check_step_size(step_size)
    passes = rule_and_true_gradients(model, loss_fn, x, y)
    report = _read(model, loss_fn, x, y, passes, step_size)
    if optimizer is None:
        return report
    steps = twin_step(optimizer, moved, passes.taken)
    parts = parts_of_rows(model, steps)
    layers = (
        replace(row, **displacement_columns(parts[row.layer], steps, passes.true, lost=row.lost("gradient")))
        for row in report.layers
    )
    return replace(report, layers=tuple(layers))


def measure_alignment(
    model: nn.Module, loss_fn: Loss, x: Any, y: Any, *, step_size: float | None = None
) -> tuple[Alignment, dict[str, Tensor]]:
    """Measure as ``alignment`` does, of a converted, unwrapped model; give {parameter: true gradient} as well."""
    passes = rule_and_true_gradients(model, loss_fn, x, y)
    return _read(model, loss_fn, x, y, passes, step_size), passes.true


def _read(model: nn.Module, loss_fn: Loss, x: Any, y: Any, passes: Passes, step_size: float | None) -> Alignment:
    """Summarise a batch, with the marks of what rests on rounding and the change of the loss by steps of layers."""
    report, slopes = summarise(model, passes)
    lost = lost_rows(model, loss_fn, x, y, passes, slopes)
    changes: dict[str, tuple[float | None, bool]] = {}
    if step_size is not None:
        parts = {name: part for name, part in parts_of_rows(model, passes.true).items() if name in slopes}
        changes = loss_changes(model, loss_fn, x, y, parts, passes.taken, step_size)
    for name, (_, noise) in changes.items():
        if noise:
            lost.setdefault(name, set()).add("loss")
    rows = (_marked(row, lost.get(row.layer, set()), changes.get(row.layer, (None, False))[0]) for row in report.layers)
    return replace(report, layers=tuple(rows), step_size=step_size)


def lost_rows(
    model: nn.Module, loss_fn: Loss, x: Any, y: Any, passes: Passes, slopes: Mapping[str, Products]
) -> dict[str, set[str]]:
    """Give {row: what of it rests on rounding}; see ``falign.measure._floor``."""
    everything = {name: {"delivered", "received", "gradient"} for name in slopes}
    if overflows(passes):
        return everything
    if not suspicious(passes, slopes):
        return {}
    first, second = read_twice(model, loss_fn, x, y, unit_roundoff(passes))
    if not second.true:  # with other rounding errors it comes to no gradient at all
        return everything
    lost = unreadable_errors(first, second)
    for name, parts in parts_of_rows(model, passes.true).items():
        if not parts or name not in slopes:
            continue
        if unreadable(
            sum_products(parts, first.taken, second.taken),
            sum_products(parts, first.true, second.true),
            sum_products(parts, first.taken, second.true),
            sum_products(parts, second.taken, first.true),
            slopes[name],
        ):
            lost.setdefault(name, set()).add("gradient")
    return lost


def _marked(row: LayerAlignment, lost: set[str], change: float | None) -> LayerAlignment:
    """Take out of a row what rests on rounding, and put in the change of the loss."""
    columns = {"delivered": "delivered_angle", "received": "received_angle", "gradient": "taken_norm"}
    lost = {side for side in lost if side == "loss" or getattr(row, columns[side]) is not None}
    empty = {f"{side}_angle{end}": None for side in lost & {"delivered", "received"} for end in ("", "_sd")}
    if "gradient" in lost:
        empty |= {"gradient_angle": None, "cosine": None, "descent": None}
    return replace(row, **empty, loss_change=change, unreadable=join(lost))


def gradient_angles(model: nn.Module, loss_fn: Loss, x: Any, y: Any) -> dict[str, float]:
    """Measure the angle between the gradient that each layer takes and its true gradient.

    Args:
        model: A converted model; this and the others are as for ``alignment``, which raises the same errors.
        loss_fn: (model output, y) -> scalar.
        x: Inputs of one batch of at least two samples.
        y: Its targets.

    Returns:
        {layer: degrees}, 90 where one of the two is zero, nan where it rests on rounding; layers without a trainable
        parameter are left out.
    """
    return {
        row.layer: nan if row.lost("gradient") else 90.0 if row.gradient_angle is None else row.gradient_angle
        for row in alignment(model, loss_fn, x, y).layers
        if row.gradient_norm is not None
    }


def summarise(model: nn.Module, passes: Passes) -> tuple[Alignment, dict[str, Products]]:
    """Make the report, and {row: products of the gradient taken and the true one} of rows with parameters."""
    maps = linear_maps(model)
    order = [*passes.order, *(name for name in maps if name not in passes.order)]
    parts_of_row, parts = parts_of_rows(model, passes.true), feedbacks(model)
    weights = {
        name: compared
        for name in passes.delivered
        if name in parts and (compared := _weights(parts[name], maps[name])) is not None
    }
    slopes = {name: sum_products(parts_of_row[name], passes.taken, passes.true) for name in order}
    inside = {part.parameter for name in order for part in parts_of_row[name]}
    by_hand = [name for name in parts_of_row if name not in maps]
    # A weight that is a layer's as well has its gradient in the row of the layer.
    alone = {name: sum_products([Part(name)], passes.taken, passes.true) for name in by_hand if name in passes.true}
    alone = {name: slope for name, slope in alone.items() if name not in inside}
    rows = tuple(
        LayerAlignment(
            layer=name,
            kind=_kind(maps[name]),
            **_mean_and_deviation("delivered", passes.delivered.get(name)),
            **_mean_and_deviation("received", passes.received.get(name)),
            **_slopes(slopes[name] if parts_of_row[name] else None),
            **(weights[name].row() if name in weights else {}),
            effective_rank=passes.ranks.get(name),
            **_norms(passes, name),
        )
        for name in order
    ) + tuple(
        LayerAlignment(
            layer=name,
            kind="parameter",
            **_slopes(alone.get(name)),
            **(_compare_parameter(parts[name], model.get_parameter(name).detach()) if name in parts else {}),
        )
        for name in by_hand
    )
    inside |= alone.keys()
    slopes |= alone
    rest = sum_products([Part(name) for name in passes.true if name not in inside], passes.taken, passes.true)
    descent = sum(slope.inner for slope in slopes.values()) + rest.inner
    last = slopes[passes.order[-1]] if passes.order else Products()
    report = Alignment(
        rule=" + ".join(dict.fromkeys(wiring.rule.name for wiring in converted(model))),
        loss=passes.loss,
        descent=descent,
        other=rest.inner,
        dominance=(descent - last.inner) / last.other if last.other > 0 else None,
        layers=rows,
        neurons={name: compared.neurons for name, compared in weights.items()},
        neuron_cosines={name: compared.cosines for name, compared in weights.items()},
        growth={name: sizes.growth for name, sizes in passes.blocks.items() if sizes.growth is not None},
    )
    return report, {name: slope for name, slope in slopes.items() if parts_of_row[name]}


def _norms(passes: Passes, name: str) -> dict[str, Any]:
    """Give the columns of a layer's row about the sizes of activations and of the true error."""
    sizes = passes.sizes.get(name)
    if sizes is None or not sizes.samples:
        return {}
    around = [block for block in passes.blocks if name.startswith(f"{block}.")]
    block = passes.blocks[max(around, key=len)] if around else sizes
    return {
        "input_norm": (sizes.x / sizes.samples) ** 0.5,
        "growth": block.growth if block.samples else sizes.growth,
        "error_norm": sizes.true**0.5 if name in passes.order else None,
    }


def _compare_parameter(part: Feedback, weight: Tensor) -> dict[str, Any]:
    """Give the columns of B beside W of a parameter that is multiplied by hand: which axis is a neuron is not known."""
    matrix, wide = part.feedback_matrix(weight).detach().double(), weight.double()
    whole = products(matrix, wide)
    return {
        "weight_angle": whole.angle,
        "norm_ratio": (whole.one / whole.other) ** 0.5 if whole.other > 0 else None,
        "sign_agreement": float((matrix * wide > 0).double().mean()),
    }


def _kind(layer: Layer) -> str:
    kind = kind_of(layer)
    assert kind is not None
    return kind.name


def _weights(part: Feedback, layer: Layer) -> Weights | None:
    weight = weight_of(layer)
    matrix = part.feedback_matrix(weight).detach()
    return compare_weights(matrix, weight, layer) if matrix.shape == weight.shape else None


def _mean_and_deviation(side: str, angles: Tensor | None) -> dict[str, float | None]:
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


def _slopes(slope: Products | None) -> dict[str, float | None]:
    if slope is None:
        return {}
    return _Slopes(slope.angle, slope.cosine, slope.other**0.5, slope.one**0.5, slope.inner)._asdict()
