"""What a measurement asks of a batch and its loss."""

from typing import Any

import torch
from torch import Tensor, nn


def check_batch(x: Any) -> None:
    """Raise ``ValueError`` where a batch, or where it is measured, allows no angles."""
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() records no gradients at all: measure outside of it (no_grad is fine)")
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, tuple) else (x,)
    first = next((part for part in parts if isinstance(part, Tensor)), None)
    if first is None:
        return
    if first.dim() == 0 or len(first) < 2:
        came = "a number" if first.dim() == 0 else f"a batch of {len(first)}"
        raise ValueError(f"x is {came}, expected two samples or more: angles are given with their spread over samples")


def checked(loss: Any, model: nn.Module) -> Tensor:
    """The loss, if it is a finite real scalar that depends on the weights; else ``ValueError``."""
    if not isinstance(loss, Tensor):
        raise ValueError(f"loss_fn returned a {type(loss).__name__}, expected a scalar tensor: loss_fn(output, y)")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn returned {tuple(loss.shape)}, expected a scalar: reduce it by its mean or sum")
    if loss.is_complex():
        raise ValueError(f"loss_fn returned a {loss.dtype}, expected a real number")
    if not torch.isfinite(loss):
        broken = next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)
        why = "the batch or the targets are not finite, or it overflowed" if broken is None else f"{broken} is not"
        raise ValueError(f"the loss is {float(loss.detach())}, expected a finite number: {why}")
    if not loss.requires_grad:
        raise ValueError("the loss depends on no trainable parameter of the model: there is no gradient to compare")
    return loss
