"""The output of a model: which tensor carries the error, what fits to it, and the targets in its shape."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from falign.delivery import Cut

Output = Callable[[Any], Tensor] | str | int | None


def pick(result: Any, output: Output) -> Tensor:
    """The tensor that carries the error, out of what the model returned.

    Raises:
        TypeError: it is no floating-point tensor, or the model returns a structure and ``output`` does not say which.
    """
    if output is None:
        chosen, how = result, "pass output= (a key, an index, or a function of what the model returns)"
    elif callable(output):
        chosen, how = output(result), "output= must return one"
    else:
        try:
            chosen = result[output]
        except (KeyError, IndexError, TypeError):
            chosen = getattr(result, output, None) if isinstance(output, str) else None
        how = f"output={output!r} does not pick one"
    if not isinstance(chosen, Tensor) or not chosen.is_floating_point():
        raise TypeError(
            f"a direct rule needs the tensor where the error begins, the model returned {type(result).__name__}: {how}"
        )
    return chosen


def substitute(structure: Any, old: Tensor, new: Tensor) -> Any:
    """The structure with ``new`` wherever it held ``old``: mappings, sequences, named tuples and dataclasses."""
    if structure is old:
        return new
    if isinstance(structure, Mapping):
        changed = {key: substitute(value, old, new) for key, value in structure.items()}
        return changed if type(structure) is dict else type(structure)(**changed)
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(substitute(value, old, new) for value in structure))
    if isinstance(structure, Sequence) and not isinstance(structure, str):
        return type(structure)(substitute(value, old, new) for value in structure)  # pyright: ignore[reportCallIssue]
    if is_dataclass(structure) and not isinstance(structure, type):
        values = {field.name: getattr(structure, field.name) for field in fields(structure) if field.init}
        return replace(structure, **{name: substitute(value, old, new) for name, value in values.items()})
    return structure


def as_output(target: Tensor | None, output: Tensor) -> tuple[Tensor, int]:
    """Targets in the output's shape, and the axis of the classes.

    Raises:
        RuntimeError: no targets were given, or they fit neither the output's shape nor its positions.
    """
    if target is None:
        raise RuntimeError("rule drtp needs the targets: run forward and loss within `with falign.targets(model, y):`")
    if target.shape == output.shape and target.is_floating_point():
        return target.to(output.dtype), -1
    for axis in (-1, 1):
        positions = [*output.shape]
        del positions[axis]
        if list(target.shape) == positions and not target.is_floating_point():
            classes = torch.arange(output.shape[axis], device=output.device)  # one_hot does not pass vmap
            return (target.unsqueeze(-1) == classes).to(output.dtype).movedim(-1, axis), axis
    raise RuntimeError(
        f"rule drtp got targets {tuple(target.shape)} of {target.dtype} for an output {tuple(output.shape)}: give "
        "class indices (the output's shape without its classes) or floating-point targets in the output's shape"
    )


def fits(cut: Cut, output: Tensor) -> bool:
    """Whether a cut's feedback maps the output to the cut's input, sample by sample or position by position."""
    x, (rows, columns) = cut.x, cut.feedback.shape
    if cut.channels:
        return x.shape[0] == output.shape[0] and x.shape[2:] == output.shape[2:]
    if output.dim() == 1 or output.shape[1:].numel() == rows:
        return x.dim() == output.dim() == 1 or (x.shape[0] == output.shape[0] and x.shape[1:].numel() == columns)
    return x.shape[:-1] == output.shape[:-1] and x.shape[-1] == columns and output.shape[-1] == rows
