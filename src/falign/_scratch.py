"""Feedback that is derived from the weights in every backward: magnitudes times signs, in memory that is used again."""

import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_SMALL = 1 << 17
_PIECE = 1 << 19


def plain_eager(*tensors: Tensor, recorded: bool = False) -> bool:
    """Tell whether tensors are not traced, transformed or compiled, nor (unless they may be) recorded in a graph."""
    return not (
        (torch.is_grad_enabled() and not recorded)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(type(tensor) not in (Tensor, Parameter) for tensor in tensors)
    )


class Scratch:
    """A buffer a thread, as large as the largest matrix that was asked for.

    On a CPU a fresh 64 MB tensor costs as many page faults as filling it does work; a sign rule needs one a layer
    a step. The content is used up before the next request, so one piece serves all layers of a model.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def like(self, tensor: Tensor) -> Tensor:
        """Give an uninitialised contiguous tensor of the same shape, dtype and device, valid until the next call."""
        memory = getattr(self._local, "memory", None)
        if (
            memory is None
            or memory.numel() < tensor.numel()
            or memory.dtype != tensor.dtype
            or memory.device != tensor.device
        ):
            memory = self._local.memory = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        return memory[: tensor.numel()].view(tensor.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return Scratch, ()  # a copy or a pickle of a model takes no content along


def signed(weight: Tensor, magnitudes: list[Tensor], scratch: Scratch | None) -> Tensor:
    """Compute ``magnitude ⊙ sign(W)``; the flat magnitudes may come in pieces, or as one number.

    Without scratch an ordinary expression; with it, written piece by piece while a piece is in the cache.
    """
    # Pieces serve the cache of a CPU; on a GPU each would be a kernel of its own.
    if scratch is None or weight.device.type != "cpu" or weight.numel() < _SMALL or not weight.is_contiguous():
        whole = magnitudes[0] if len(magnitudes) == 1 else torch.cat(magnitudes)
        return torch.sign(weight) * (whole.view(weight.shape) if whole.dim() == 1 else whole)
    result = scratch.like(weight)
    source, target, begin = weight.detach().view(-1), result.view(-1), 0
    for magnitude in magnitudes:
        size = magnitude.numel() if magnitude.dim() == 1 else weight.numel()
        for start in range(0, size, _PIECE):
            stop = min(start + _PIECE, size)
            piece = target[begin + start : begin + stop]
            torch.sign(source[begin + start : begin + stop], out=piece)
            piece.mul_(magnitude[start:stop] if magnitude.dim() == 1 else magnitude)
        begin += size
    return result
