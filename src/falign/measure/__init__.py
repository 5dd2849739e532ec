"""How well what a rule does agrees with the true gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import acos, degrees

import torch
from torch import Tensor, nn

from falign.convert import backprop, targets
from falign.layers import kind_of
from falign.wiring import feedbacks


def gradient_angles(
    model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> dict[str, float]:
    """Angle between the gradient that each layer takes and its true gradient, of the same batch.

    ``∠(g, f) = arccos(⟨g, f⟩ / |g||f|)``, g the layer's weight gradient by backpropagation, f by the rule. Both
    passes see the same weights and the same random numbers (dropout masks match). Gradients, buffers (the running
    statistics of batch norm, learned feedback), random generators and modes are left as they were found.

    Args:
        model: a converted model.
        loss_fn: (model output, y) -> scalar.
        x: inputs of one batch.
        y: its targets; they are also what a rule that needs targets is given.

    Returns:
        {layer name: degrees}, 90 where a gradient is zero; layers whose weights are frozen are left out.

    Raises:
        ValueError: the model is not converted.
    """
    weights: dict[str, Tensor] = {
        name: layer.get_parameter("weight")
        for name, layer in model.named_modules()
        if kind_of(layer) is not None and layer.get_parameter("weight").requires_grad
    }

    def gradients() -> tuple[Tensor, ...]:
        with untouched(model), targets(model, y), torch.enable_grad():
            loss = loss_fn(model(x), y)
            return torch.autograd.grad(loss, tuple(weights.values()), materialize_grads=True)

    taken = gradients()
    with backprop(model):
        true = gradients()
    return {name: angle(f, g) for name, f, g in zip(weights, taken, true, strict=True)}


def angle(one: Tensor, other: Tensor) -> float:
    """The angle between two tensors as vectors, in degrees; 90 where one is zero."""
    one, other = one.detach().double().flatten(), other.detach().double().flatten()
    norms = float(one.norm() * other.norm())
    return degrees(acos(max(-1.0, min(1.0, float(torch.dot(one, other)) / norms)))) if norms > 0 else 90.0


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """A pass within leaves the model's buffers and the random generators as they were."""
    fixed = {
        id(part.sequence.values if part.B is None else part.B)
        for part in feedbacks(model).values()
        if not part.wiring.rule.adapts
    }
    kept = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in fixed]
    devices = {buffer.device for buffer in (*model.parameters(), *model.buffers()) if buffer.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)
