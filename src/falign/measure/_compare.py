"""Compare any suppliers of gradients, rules or not, with the true gradient of one batch."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from falign._convert import ConversionError, backprop, convert, revert, targets
from falign._preserve import force_eager
from falign._show import Loud, Sheet
from falign._style import Points, dots, height_of, scale_degrees
from falign._transport import compute_loss
from falign._validation import describe
from falign._wiring import preserve_state, unwrapped, wirings
from falign.measure._alignment import Part, parts_of_rows, sum_products
from falign.measure._floor import join, rounded_otherwise, roundoff_here, unreadable
from falign.measure._passes import Loss, check_batch, check_loss, in_double, trainable
from falign.measure._report import RIGHT_ANGLE, OfLayers
from falign.measure._steps import check_step_size, loss_changes
from falign.rules import Rule

_FACTOR = 1.37
"""Of the loss in a second reading: every product on the way back rounds otherwise."""

Supplier = Callable[[nn.Module, Loss, Any, Any], Mapping[str, Tensor]]
"""(model, loss_fn, x, y) -> {parameter name: gradient}."""


@dataclass(frozen=True, kw_only=True)
class SuppliedLayer:
    """Gradient that one supplier gives to one layer, beside the true one g.

    Attributes:
        supplier: Its name.
        layer: The layer, or the parameter that is multiplied by hand; "*" is the whole network.
        cosine: cos∠(f, g), f what the supplier gives.
        angle: ∠(f, g) in degrees.
        norm_ratio: |f| / |g|.
        descent: ⟨f, g⟩, the fall of the loss along -f to first order.
        descends: Whether ⟨f, g⟩ > 0.
        loss_change: L(θ - s |θ_l| f/|f|) - L(θ) of a step of this layer alone; over the whole network of all at once.
        unreadable: Which of "gradient" and "loss" rest on rounding: their numbers are None.
    """

    supplier: str
    layer: str
    cosine: float | None = None
    angle: float | None = None
    norm_ratio: float | None = None
    descent: float | None = None
    descends: bool | None = None
    loss_change: float | None = None
    unreadable: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison(OfLayers):
    """Suppliers of gradients beside the true one; prints as a table.

    Attributes:
        loss: Of the batch.
        step_size: s, the length of the steps relative to the norms of the parameters that they move.
        layers: A row a supplier and layer, and one a supplier of the whole network, its ``layer`` "*".
    """

    loss: float
    step_size: float
    layers: tuple[SuppliedLayer, ...]

    def _sheet(self) -> Sheet:
        head = f"loss {self.loss:.4g}; steps of {self.step_size:g} |θ|, layer by layer"
        table = [["supplier", "layer", "cosine", "angle", "|f|/|g|", "⟨g,f⟩", "loss change"]]
        for row in self.layers:
            lost = (row.unreadable or "").split(", ")
            cosine, angle = (
                Loud("unreadable") if "gradient" in lost else "-" if value is None else f"{value:{form}}"
                for value, form in ((row.cosine, "+.3f"), (row.angle, ".1f"))
            )
            change = row.loss_change
            table.append([
                row.supplier, row.layer, cosine, angle,
                "-" if row.norm_ratio is None else f"{row.norm_ratio:.2g}",
                "-" if row.descent is None else f"{row.descent:.2e}",
                Loud("unreadable") if "loss" in lost else "-" if change is None else f"{change:+.2e}",
            ])  # fmt: skip
        return Sheet(head=head, table=table, left=(0, 1))

    def _size(self) -> tuple[float, float]:
        return 7.0, height_of(len({row.layer for row in self.layers}))

    def _draw(self, axes: Any) -> None:
        names = list(dict.fromkeys(row.layer for row in self.layers))
        series = []
        for supplier in dict.fromkeys(row.supplier for row in self.layers):
            own = {row.layer: row for row in self.layers if row.supplier == supplier}
            lost = {name: "gradient" in (row.unreadable or "").split(", ") for name, row in own.items()}
            values = ["unreadable" if lost[name] else own[name].angle for name in names]
            series.append(Points(label=supplier, values=values))
        shown = ["whole network" if name == "*" else name for name in names]
        dots(axes, shown, series, xlabel="degrees to the true gradient", title="suppliers", marked=RIGHT_ANGLE)
        scale_degrees(axes)


def compare(
    model: nn.Module,
    suppliers: "Mapping[str, str | Rule | Supplier] | Iterable[str]",
    loss_fn: Loss,
    x: Any,
    y: Any,
    *,
    step_size: float = 1e-2,
    seed: int = 0,
) -> Comparison:
    """Put what any suppliers of gradients give for one batch beside its true gradient, layer by layer.

    A method that is no rule (node perturbation, a learned optimizer, the user's own) is a function; it gets the same
    columns as the rules. Weights, gradients, buffers, random generators and modes are left as they were, and every
    supplier sees the same random numbers.

    Args:
        model: A model, converted or not.
        suppliers: {name: supplier}, or names of rules. A supplier is a function (model, loss_fn, x, y) -> {name of
            parameter: gradient} of all trainable parameters, a rule, or the name of one. A rule is carried out by a
            copy of the model with feedback of its own; where the model is converted by that rule already, by the model.
        loss_fn: (model output, y) -> scalar.
        x: Inputs of one batch of at least two samples; a tuple is positional arguments, a dict keyword arguments.
        y: Its targets.
        step_size: s, the length of the steps after which the loss is taken: s |θ_l|, in the direction that a layer is
            given, the same for all suppliers.
        seed: Of the feedback of rules.

    Returns:
        A row a supplier and layer, and one of the whole network.

    Raises:
        TypeError: A supplier is no function, rule or name, or gives something else than tensors by name.
        ValueError: A supplier leaves out a parameter, gives one of another shape, numbers that are not finite or names
            that are none, or changes the weights; a rule does not fit the model; the batch has one sample, or the loss
            is no finite scalar.
    """
    model = unwrapped(model)
    check_step_size(step_size)
    check_batch(x)
    named = dict(suppliers) if isinstance(suppliers, Mapping) else {str(name): name for name in suppliers}
    if not named:
        raise ValueError("no suppliers were given: name rules, or give {name: function}")
    parameters = trainable(model)
    u = roundoff_here(parameters.values())
    loss, true = _read(model, loss_fn, x, y, true=True)
    again = _read_again(model, loss_fn, x, y, u, true=True)
    parts = {name: own for name, own in parts_of_rows(model, true).items() if own}
    parts["*"] = [Part(name) for name in true]
    rows: list[SuppliedLayer] = []
    for name, supplier in named.items():
        given, other = _supply(name, supplier, model, loss_fn, x, y, seed, u)
        changes = loss_changes(model, loss_fn, x, y, parts, given, step_size)
        for layer, own in parts.items():
            change, noise = changes[layer]
            measured = sum_products(own, given, true)
            lost = {"loss"} if noise else set()
            if unreadable(
                sum_products(own, given, other),
                sum_products(own, true, again),
                sum_products(own, given, again),
                sum_products(own, other, true),
                measured,
            ):
                lost.add("gradient")
            shown = "gradient" not in lost
            rows.append(
                SuppliedLayer(
                    supplier=name,
                    layer=layer,
                    cosine=measured.cosine if shown else None,
                    angle=measured.angle if shown else None,
                    norm_ratio=(measured.one / measured.other) ** 0.5 if measured.other > 0 else None,
                    descent=measured.inner if shown else None,
                    descends=measured.inner > 0 if shown else None,
                    loss_change=change,
                    unreadable=join(lost),
                )
            )
    return Comparison(loss=loss, step_size=step_size, layers=tuple(rows))


def _supply(
    name: str, supplier: Any, model: nn.Module, loss_fn: Loss, x: Any, y: Any, seed: int, u: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ask one supplier, and a rule a second time with other rounding errors.

    Raises:
        TypeError, ValueError: See ``compare``.
    """
    if isinstance(supplier, (str, Rule)) or (isinstance(supplier, type) and issubclass(supplier, Rule)):
        own = {wiring.rule.name for wiring in wirings(model)}
        if isinstance(supplier, str) and own == {supplier}:
            worker = model
        else:
            worker = revert(copy.deepcopy(model)) if own else copy.deepcopy(model)
            try:
                worker = convert(worker, supplier, seed=seed, example=x)
            except (ConversionError, ValueError) as error:
                raise ValueError(f"supplier {name!r} cannot be carried out by a copy of the model: {error}") from error
        zeros = {key: torch.zeros_like(parameter) for key, parameter in trainable(model).items()}
        first = _read(worker, loss_fn, x, y, true=False)[1]  # what a reference leaves untrained has no gradient
        second = _read_again(worker, loss_fn, x, y, u, true=False)
        return zeros | first, zeros | second
    if not callable(supplier):
        raise TypeError(
            f"supplier {name!r} is {describe(supplier)}, expected a rule, the name of one, or a function (model, "
            "loss_fn, x, y) -> {parameter name: gradient}"
        )
    given = _ask(name, supplier, model, loss_fn, x, y)  # pyright: ignore[reportArgumentType]
    return given, given


def _ask(name: str, supplier: Supplier, model: nn.Module, loss_fn: Loss, x: Any, y: Any) -> dict[str, Tensor]:
    """Ask a function for gradients, and check what it gives and that it leaves the weights alone."""
    parameters = trainable(model)
    everything = dict(model.named_parameters())
    before = {key: (p.detach().clone(), p.grad, p.requires_grad) for key, p in everything.items()}
    for p in everything.values():
        p.grad = None
    try:
        with preserve_state(model):
            given = supplier(model, loss_fn, x, y)
            if isinstance(given, Mapping):  # a later pass may write into what it gave, such as .grad
                given = {key: g.detach().clone() if isinstance(g, Tensor) else g for key, g in given.items()}
        changed = next((key for key, (value, *_) in before.items() if not _same(everything[key], value)), None)
    finally:
        for key, (value, grad, wanted) in before.items():
            everything[key].data.copy_(value)
            everything[key].grad = grad
            everything[key].requires_grad_(wanted)
    if changed is not None:
        raise ValueError(
            f"supplier {name!r} changed {changed!r}: it has to leave the weights as they are (put back now)"
        )
    if not isinstance(given, Mapping):
        raise TypeError(f"supplier {name!r} gave a {type(given).__name__}, expected {{parameter name: gradient}}")
    if missing := next((key for key in parameters if key not in given), None):
        raise ValueError(f"supplier {name!r} gave no gradient of {missing!r}: give one of every trainable parameter")
    if unknown := next((key for key in given if key not in parameters), None):
        raise ValueError(
            f"supplier {name!r} gave a gradient of {unknown!r}, which is no trainable parameter of the model"
        )
    for key, g in given.items():
        shape = tuple(parameters[key].shape)
        if not isinstance(g, Tensor):
            raise TypeError(f"supplier {name!r} gave a {type(g).__name__} for {key!r}, expected a tensor {shape}")
        if g.shape != shape:
            raise ValueError(f"supplier {name!r} gave a gradient {tuple(g.shape)} of {key!r}, expected {shape}")
        if not bool(torch.isfinite(g).all()):
            raise ValueError(f"the gradient that supplier {name!r} gave of {key!r} is not finite")
    return {key: (g.to_dense() if g.is_sparse else g).to(parameters[key]) for key, g in given.items()}


def _same(parameter: Tensor, value: Tensor) -> bool:
    return torch.equal(parameter.detach(), value) or bool(((parameter == value) | (value != value)).all())


def _read(model: nn.Module, loss_fn: Loss, x: Any, y: Any, *, true: bool) -> tuple[float, dict[str, Tensor]]:
    """Compute the loss and its gradient, by the rule of a converted model or truly."""
    parameters, attached = trainable(model), bool(wirings(model))
    truly = backprop(model) if true and attached else nullcontext()
    given = targets(model, y) if isinstance(y, Tensor) and attached else nullcontext()
    with force_eager(), torch.enable_grad(), preserve_state(model), truly, given:
        loss = check_loss(compute_loss(model, x, lambda output: loss_fn(output, y)), model)
        slopes = torch.autograd.grad(loss, tuple(parameters.values()), materialize_grads=True)
    dense = (g.to_dense() if g.is_sparse else g for g in slopes)
    return float(loss.detach()), dict(zip(parameters, dense, strict=True))


def _read_again(model: nn.Module, loss_fn: Loss, x: Any, y: Any, u: float, *, true: bool) -> dict[str, Tensor]:
    """Compute the gradient with other rounding errors; see ``falign.measure._floor``."""
    wide = in_double(loss_fn)
    with rounded_otherwise(model, u):
        gradient = _read(model, lambda output, y: wide(output, y) * _FACTOR, x, y, true=true)[1]
    return {name: g / _FACTOR for name, g in gradient.items()}
