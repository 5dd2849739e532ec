"""What an optimizer does to a layer's parameters, beside the true gradient."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from falign.layers import Layer
from falign.measure.angles import Products, products
from falign.measure.passes import trainable
from falign.measure.report import Alignment


def own_parameters(name: str, layer: Layer, known: Mapping[str, Tensor]) -> list[str]:
    """Full names of those of a layer's parameters that are known."""
    return [full for key, _ in layer.named_parameters() if (full := f"{name}.{key}".lstrip(".")) in known]


def summed(names: list[str], taken: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> Products:
    """Products of the named tensors of two dicts, together."""
    total = Products()
    for name in names:
        total = total + products(taken[name], true[name])
    return total


def displaced(
    model: nn.Module, layer: str, steps: Mapping[str, Tensor], true: Mapping[str, Tensor]
) -> dict[str, float | None]:
    """The columns of a layer's row that compare its displacement with its true gradient.

    Args:
        model: The model.
        layer: Name of the layer.
        steps: {parameter: -Δθ}.
        true: {parameter: true gradient}.
    """
    own = own_parameters(layer, model.get_submodule(layer), steps)
    if not own:
        return {}
    found = summed(own, steps, true)
    return {"displacement_angle": found.angle, "displacement_norm": found.one**0.5}


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """{name: parameter} of what the optimizer moves of a model.

    Raises:
        TypeError: It is no optimizer.
        ValueError: That is nothing.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    held = {name: parameter for name, parameter in trainable(model).items() if id(parameter) in ids}
    if not held:
        raise ValueError(
            f"the optimizer ({type(optimizer).__name__}) holds none of the model's trainable parameters: make it from "
            "model.parameters() of the model that is measured"
        )
    return held


def twin_step(
    optimizer: torch.optim.Optimizer, moved: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """{parameter: -Δθ} of the step that the optimizer would make with these gradients."""
    twins: dict[int, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            twins[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    twin = copy.deepcopy(optimizer, dict(twins))  # its state and options, over twins of the parameters
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


class Waiting:
    """A record whose displacement is still to come."""

    def __init__(
        self,
        step: int,
        found: Alignment,
        rows: list[dict[str, Any]],
        true: dict[str, Tensor],
        before: dict[str, Tensor],
    ) -> None:
        self.step, self.found, self._rows, self._true, self.before = step, found, rows, true, before

    def compare(self, model: nn.Module, steps: dict[str, Tensor]) -> None:
        """Put the displacement's columns into the rows."""
        layers = []
        for layer, row in zip(self.found.layers, self._rows, strict=True):
            columns = displaced(model, layer.layer, steps, self._true)
            row.update(columns)
            layers.append(replace(layer, **columns))
        self.found = replace(self.found, layers=tuple(layers))
