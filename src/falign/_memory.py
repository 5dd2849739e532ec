"""Buffers that a backward moves: feedback that follows errors, and what transforms of the error remember of them."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from falign.transforms import Memory, Remembering, Transform


@runtime_checkable
class Place(Protocol):
    """The feedback of a layer, which keeps in its buffers what a backward moves."""

    training: bool
    _buffers: dict[str, Tensor | None]

    def get_buffer(self, target: str, /) -> Tensor:
        """A buffer, by its name."""
        ...


def memory_key(index: int, number: int) -> str:
    """Name the buffer of what a transform, by its place, remembers of an output's error."""
    return f"transform{index}_{number}"


def is_memory(key: str) -> bool:
    """Tell whether a buffer is what a transform remembers."""
    return key.startswith("transform")


def keep_change(part: Place, key: str, saved: Tensor, change: Tensor) -> None:
    """Change a buffer in a backward, of which other graphs may have saved what it was."""
    if torch.compiler.is_compiling():
        saved.add_(change)
    else:  # not what the graph has saved, which may be a copy of it (torch.autograd.graph.save_on_cpu)
        part.get_buffer(key).data.add_(change)


def leave(saved: Tensor, change: Tensor) -> None:
    """Keep nothing of a change."""


def memories_of(
    changes: tuple[Transform, ...], parts: Iterable[Place], number: int, *, keeps: bool = True
) -> tuple[tuple[Memory, ...], tuple[Tensor, ...]]:
    """Collect what transforms remember of an output's error, or of a layer's, and what keeps it in training.

    Args:
        changes: the transforms.
        parts: the feedback in which it may be kept.
        number: of the output.
        keeps: whether what a step adds is kept, and not only used in it.

    Raises:
        RuntimeError: none of the parts has it.
    """
    memories: list[Memory] = []
    tensors: list[Tensor] = []
    for index, change in enumerate(changes):
        if isinstance(change, Remembering):
            key = memory_key(index, number)
            part = next((part for part in parts if key in part._buffers), None)
            if part is None:
                raise RuntimeError(
                    f"the last layer that convert saw, which keeps what transform {change} remembers, has not run in "
                    "this forward: take a transform without memory for a model that leaves layers out"
                )
            tensors.append(part.get_buffer(key))
            moves = partial(keep_change, part, key) if keeps else leave
            memories.append(Memory(index, moves if part.training else None))
    return tuple(memories), tuple(tensors)


def give_memories(
    changes: tuple[Transform, ...],
    places: Mapping[tuple[str, int], int],
    parts: Mapping[str, nn.Module],
    weights: Mapping[str, Tensor],
) -> None:
    """Register what transforms remember, as it is at first.

    Args:
        changes: the transforms.
        places: {(name of the part that keeps it, number of the output): features of the error}.
        parts: the feedback, by name.
        weights: of which the memory takes the device and, if it is not of half precision, the dtype.
    """
    for index, change in enumerate(changes):
        if not isinstance(change, Remembering):
            continue
        for (name, number), features in places.items():
            weight = weights[name]
            memory = change.start(features).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            parts[name].register_buffer(memory_key(index, number), memory)
