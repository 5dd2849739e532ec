"""One reused piece of memory for feedback that is derived from the weights in every backward."""

import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def plain_eager(*tensors: Tensor, recorded: bool = False) -> bool:
    """Whether these tensors are not traced, transformed or compiled, nor (unless it may be) recorded in a graph."""
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
        """An uninitialised contiguous tensor of the same shape, dtype and device, valid until the next call."""
        held = getattr(self._local, "memory", None)
        if held is None or held.numel() < tensor.numel() or held.dtype != tensor.dtype or held.device != tensor.device:
            held = self._local.memory = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        return held[: tensor.numel()].view(tensor.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return Scratch, ()  # a copy or a pickle of a model takes no content along
