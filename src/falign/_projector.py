"""A device that projects errors, in place of feedback matrices: one call for all layers, of which each reads a part."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from falign.feedback import generator

Projector = Callable[[Tensor], Tensor]
"""(batch, outputs) -> (batch, N)."""

_ROWS = 1024


class Projection:
    """A projector, as it was measured at conversion.

    Attributes:
        outputs: features of the errors that it takes.
        length: N.
        matrix: (outputs, N), what it makes of the unit matrix: B of every layer is columns of it.
        size: root mean square of that matrix.
    """

    def __init__(self, projector: Projector, outputs: int) -> None:
        self.projector, self.outputs, self.length = projector, outputs, 0
        whole = torch.eye(outputs, device="cpu", dtype=torch.float32)
        rows = [self._call(part) for part in whole.split(_ROWS)]
        self.length = rows[0].shape[1]
        self.matrix = torch.cat([part.detach().to("cpu", torch.float32) for part in rows])
        self.size = float(self.matrix.double().square().mean().sqrt())
        if not self.size > 0:
            raise ValueError("the projector returned nothing but zeros for the unit matrix, so it carries no error")

    def start(self, seed: int, name: str, features: int) -> int:
        """Give the column at which a layer begins to read."""
        room = self.length - features + 1
        return int(torch.randint(room, (), generator=generator(seed, name, "projector start"), device="cpu"))

    def __call__(self, error: Tensor) -> Tensor:
        """Project errors (rows, outputs), which the device is given with a root mean square of 1: (rows, N).

        Raises:
            ValueError: the device returned something else, or numbers that are not finite for an error that is.
        """
        exact = error.to(torch.promote_types(error.dtype, torch.float32))
        size = exact.square().mean().sqrt()
        unit = exact / torch.where(size > 0, size, torch.ones_like(size))
        return (self._call(unit).to(exact) * size).to(error.dtype)

    def _call(self, error: Tensor) -> Tensor:
        result: Any = self.projector(error)
        expected = f"({len(error)}, {self.length or 'N'})"
        if not isinstance(result, Tensor) or not result.is_floating_point():
            got = f"a tensor of {result.dtype}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
            raise ValueError(f"the projector returned {got}, expected a floating-point tensor {expected}")
        if result.dim() != 2 or len(result) != len(error) or result.shape[1] != (self.length or result.shape[1]):
            raise ValueError(
                f"the projector returned {tuple(result.shape)} for errors {tuple(error.shape)}, expected {expected}"
            )
        if not torch.compiler.is_compiling() and not result.isfinite().all() and bool(error.isfinite().all()):
            raise ValueError(
                f"the projector returned numbers that are not finite for errors {tuple(error.shape)} that are"
            )
        return result


def multiplied(error: Tensor, feedback: Tensor) -> Tensor:
    """Carry an error by a matrix."""
    return error @ feedback


def sent_part(
    sent: dict[Any, Tensor], key: Any, projection: Projection, start: int, error: Tensor, feedback: Tensor
) -> Tensor:
    """Read a layer's part of what a projector makes of an error, which it is given once."""
    if key not in sent:
        sent[key] = projection(error.reshape(-1, error.shape[-1])).reshape(*error.shape[:-1], projection.length)
    return sent[key][..., start : start + feedback.shape[1]]


def refuse_projector(
    projector: Any, rule: Any, feedback: Any, ends: int, by_hand: list[str], shapes: dict[str, tuple[int, ...]]
) -> str | None:
    """Say why a projector cannot take the place of feedback; None where it can.

    Args:
        projector: what the user gave.
        rule: the rule.
        feedback: the user's choice of it.
        ends: how many outputs deliver errors.
        by_hand: names of parameters that are multiplied outside a layer.
        shapes: of each layer's B.
    """
    if not callable(projector):
        return f"projector is a {type(projector).__name__}, expected a callable (batch, outputs) -> (batch, N)"
    if rule.wiring != "direct" or rule.learned or rule.adapts:
        return f"projector= is for direct rules with fixed feedback (dfa, drtp, eprop), not for {rule.name!r}"
    if feedback is not None and str(feedback) != "shared":
        return "projector= takes the place of the feedback: leave feedback= out, or pass 'shared'"
    if ends > 1:
        return f"projector= carries the error of one output, the model delivers those of {ends}"
    if by_hand:
        return f"projector= cannot carry the errors that autograd itself carries through {by_hand[0]!r}"
    if len(rows := sorted({shape[0] for shape in shapes.values()})) > 1:
        return f"projector= carries errors of one size, the layers take {' and '.join(map(str, rows))} outputs"
    return None


def measure_projector(projector: Projector, shapes: dict[str, tuple[int, ...]]) -> Projection | str:
    """Measure a projector, or say why it does not serve these layers.

    Args:
        projector: a callable.
        shapes: of each layer's B.
    """
    outputs = next(iter(shapes.values()))[0]
    try:
        projection = Projection(projector, outputs)
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"the projector failed on errors ({outputs}, {outputs}): {type(error).__name__}: {error}"
    name, largest = max(((name, shape[1]) for name, shape in shapes.items()), key=lambda one: one[1])
    if largest > projection.length:
        return (
            f"the projector returns {projection.length} numbers for an error, fewer than layer {name!r} has inputs, "
            f"{largest}: take one of at least that many"
        )
    return projection
