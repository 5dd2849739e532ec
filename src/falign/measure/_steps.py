"""Change of the loss by a small step of one layer: what a gradient that was taken is good for, without any other."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import isfinite, sqrt
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from falign._convert import targets
from falign._preserve import force_eager
from falign._transport import compute_loss
from falign._validation import describe
from falign._wiring import preserve_state, wirings
from falign.measure._angles import length
from falign.measure._passes import Loss, in_double

_ROUNDING = 8
"""Units in the last place of a loss by which its rounding errors may move it."""


@runtime_checkable
class Piece(Protocol):
    """A parameter, or rows of it."""

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Give this part of a tensor of the parameter's shape."""
        ...


def check_step_size(step_size: Any) -> None:
    """Raise ``ValueError`` where it is no length of a step."""
    if step_size is None:
        return
    real = isinstance(step_size, (int, float)) and not isinstance(step_size, bool)
    if not real or not 0 < step_size < 1:
        raise ValueError(
            f"step_size is {describe(step_size)}, expected a number between 0 and 1: the length of the step of a "
            "layer over the norm of its parameters"
        )


def loss_changes(
    model: nn.Module,
    loss_fn: Loss,
    x: Any,
    y: Any,
    rows: Mapping[str, Sequence[Piece]],
    gradients: Mapping[str, Tensor],
    step_size: float,
) -> dict[str, tuple[float | None, bool]]:
    """Measure L(θ - s |θ_l| f_l/|f_l|) - L(θ) for each row l, a forward each, from the same random numbers.

    All rows move equally far beside their parameters, so that it is directions that are compared. The parameters have
    the same bits afterwards, also for a backward that is still to come.

    Args:
        model: The model, converted or not.
        loss_fn: (model output, y) -> scalar.
        x: The batch.
        y: Its targets.
        rows: {row: the parameters that it moves}.
        gradients: {parameter: f}.
        step_size: s.

    Returns:
        {row: the change, and whether it is below what rounding does to the loss (then it is None)}; None as well where
        |θ_l| or |f_l| is zero.
    """
    parameters = dict(model.named_parameters())
    at_rest = _loss(model, loss_fn, x, y)
    changes: dict[str, tuple[float | None, bool]] = {}
    for row, parts in rows.items():
        sizes = [sqrt(sum(length(part.of(which)) ** 2 for part in parts)) for which in (parameters, gradients)]
        if not parts or not all(size > 0 and isfinite(size) for size in sizes):
            changes[row] = None, False
            continue
        weights, directions = ([part.of(which) for part in parts] for which in (parameters, gradients))
        with _moved(weights, directions, step_size * sizes[0] / sizes[1]):
            value, eps = _loss(model, loss_fn, x, y)
        change, floor = value - at_rest[0], _ROUNDING * eps * abs(at_rest[0])
        noise = not abs(change) > floor
        changes[row] = (None if noise or not isfinite(change) else change), noise
    return changes


@contextmanager
def _moved(weights: Sequence[Tensor], directions: Sequence[Tensor], rate: float) -> Iterator[None]:
    """Move weights by -rate times directions within this context, and put back their bits afterwards."""
    before = [weight.detach().clone() for weight in weights]
    try:
        for weight, direction in zip(weights, directions, strict=True):
            # By .data the version stays: a backward still to come may have saved the weight.
            weight.data.copy_((weight.detach().double() - rate * direction.detach().double()).to(weight.dtype))
        yield
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.data.copy_(value)


def _loss(model: nn.Module, loss_fn: Loss, x: Any, y: Any) -> tuple[float, float]:
    """Compute the loss, in float64 where it can be, and eps of what the model returned."""
    eps: list[float] = []
    wide = in_double(loss_fn)

    def judged(output: Any) -> Any:
        tree_map_only(Tensor, lambda t: eps.append(torch.finfo(t.dtype).eps) if t.is_floating_point() else None, output)
        return wide(output, y)

    given = targets(model, y) if isinstance(y, Tensor) and wirings(model) else nullcontext()
    with force_eager(), torch.no_grad(), given, preserve_state(model):
        value = float(compute_loss(model, x, judged))
    return value, max(eps, default=torch.finfo(torch.float32).eps)
