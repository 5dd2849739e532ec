"""The output of a model: which tensor carries the error, what fits to it, and the targets in its shape."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from falign._delivery import Cut, transformed
from falign._validation import describe

Output = Callable[[Any], Tensor] | str | int | None
Outputs = Output | tuple[Output, ...] | list[Output]
"""One output, or several."""

NESTED = (
    "the model's output is a nested tensor, of which a direct rule does not know the positions: pad the sequences, or "
    "use a layerwise rule"
)


def pick(result: Any, output: Output) -> Tensor:
    """Pick the tensor that carries the error out of what the model returned.

    Raises:
        TypeError: it is no floating-point tensor, or the model returns a structure and ``output`` does not say which.
    """
    if output is None:
        chosen, advice = result, "pass output= (a key, an index, or a function of what the model returns)"
    elif callable(output):
        try:
            chosen, advice = output(result), "output= must return one"
        except Exception as error:
            chosen, advice = None, f"output= raised {type(error).__name__}: {error}"
    elif isinstance(result, Tensor):
        chosen, advice = None, f"it is no structure, leave output={describe(output)} out"
    else:
        try:
            chosen = result[output]
        except (KeyError, IndexError, TypeError):
            chosen = getattr(result, output, None) if isinstance(output, str) else None
        advice = f"output={describe(output)} does not pick one"
    if not isinstance(chosen, Tensor) or not chosen.is_floating_point():
        raise TypeError(
            f"a direct rule needs the tensor where the error begins, the model returned {type(result).__name__}: "
            f"{advice}"
        )
    if chosen is not result and substitute(result, chosen, chosen.new_empty(0)) is result:
        raise TypeError(
            f"output= picked a tensor that is no part of what the model returned ({type(result).__name__}), where the "
            "error could not enter: return it from the model, in a dict, a list, a tuple or a dataclass"
        )
    return chosen


def substitute(structure: Any, old: Tensor, new: Tensor) -> Any:
    """Copy a structure with ``new`` wherever it held ``old``; where it does not hold it, give the structure itself.

    It looks into mappings, lists, tuples, named tuples and dataclasses.
    """
    changed = _substituted(structure, old, new)
    return structure if changed is None else changed


def _substituted(structure: Any, old: Tensor, new: Tensor) -> Any:
    if structure is old:
        return new
    if isinstance(structure, Mapping):
        parts = {key: _substituted(value, old, new) for key, value in structure.items()}
    elif isinstance(structure, (list, tuple)):
        parts = dict(enumerate(_substituted(value, old, new) for value in structure))
    elif is_dataclass(structure) and not isinstance(structure, type):
        parts = {f.name: _substituted(getattr(structure, f.name), old, new) for f in fields(structure) if f.init}
    else:
        return None
    parts = {key: value for key, value in parts.items() if value is not None}  # only what has changed is copied
    if not parts:
        return None
    if isinstance(structure, (Mapping, list)):
        changed: Any = copy.copy(structure)
        for key, value in parts.items():
            changed[key] = value
        return changed
    if isinstance(structure, tuple):
        values = [parts.get(index, value) for index, value in enumerate(structure)]
        return type(structure)(*values) if hasattr(structure, "_fields") else type(structure)(values)
    return replace(structure, **{str(key): value for key, value in parts.items()})


def as_output(rule: str, target: Tensor | None, output: Tensor) -> tuple[Tensor, int]:
    """Bring targets into the output's shape, and find the axis of the classes.

    Args:
        rule: name of the rule that needs them, for messages.
        target: class indices, (batch, ...), or floating-point targets in the output's shape.
        output: the output, (batch, ..., classes) or (batch, classes, ...).

    Raises:
        RuntimeError: no targets were given, or they fit neither the output's shape nor its positions.
    """
    if target is None:
        raise RuntimeError(
            f"rule {rule!r} needs the targets: run forward and loss within `with falign.targets(model, y):`"
        )
    if target.shape == output.shape and target.is_floating_point():
        return target.to(output.dtype), -1
    if output.shape[-1:] == (1,) and target.shape in (output.shape, output.shape[:-1]):
        answers = target.reshape(output.shape)  # of one output the class 1 is a yes, and not the class 0
        readable = not (torch.compiler.is_compiling() or transformed())
        if not target.is_floating_point() and readable and bool((target > 1).any()):
            raise RuntimeError(
                f"rule {rule!r} got classes up to {int(target.max())} for a single output: give 0 and 1, or "
                "floating-point targets"
            )
        return answers.to(output.dtype), -1
    fitting = [
        axis
        for axis in ((-1, 1) if output.dim() > 2 else (-1,))
        if target.shape == output.movedim(axis, -1).shape[:-1] and not target.is_floating_point()
    ]
    if len(fitting) == 1:
        (axis,) = fitting
        classes = torch.arange(output.shape[axis], device=output.device)  # one_hot does not pass vmap
        return (target.unsqueeze(-1) == classes).to(output.dtype).movedim(-1, axis), axis
    raise RuntimeError(
        f"rule {rule!r} got targets {tuple(target.shape)} of {target.dtype} for an output {tuple(output.shape)}: give "
        "class indices (the output's shape without its classes, if only one axis can be these) or floating-point "
        "targets in the output's shape"
    )


def fits(cut: Cut, number: int, output: Tensor) -> bool:
    """Tell whether a cut's feedback maps the output to the cut's input, sample by sample or position by position."""
    return cut.routes[number].sizes(tuple(output.shape), tuple(cut.x.shape), cut.shape, cut.calls) is not None
