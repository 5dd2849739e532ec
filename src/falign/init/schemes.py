"""The schemes: each draws the weights anew from a seed, then bends them to what the law asks."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.init.neurons import lawful, signed
from falign.layers import kind_of
from falign.measure.law.balance import Balance
from falign.measure.law.forms import Form
from falign.measure.law.targets import Target
from falign.measure.untouched import unwrapped
from falign.preserve import DrawnOnCPU
from falign.theory.inputs import number, told, whole
from falign.wiring import converted

Model = TypeVar("Model", bound=nn.Module)


def generic(model: Model, *, example: Any = None, seed: int = 0) -> Model:
    """PyTorch's own initial weights, drawn anew: ``reset_parameters`` of every module that has it.

    ⟨B, W⟩ is zero on average, and few neurons have C ≤ 0.

    Args:
        model: A converted model. Parameters outside such modules, and learned feedback, stay as they are.
        example: Not needed; here so that all schemes are called alike.
        seed: Of the weights, which are the same on every device. The random generators are left as they were.

    Raises:
        ValueError: The model is not converted, or the seed is no whole number.
    """
    converted(model)
    if not whole(seed) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {told(seed)}, expected a whole number from -2⁶³ to 2⁶⁴ - 1")
    elsewhere = any(parameter.device.type != "cpu" for parameter in model.parameters())
    with torch.random.fork_rng(devices=[]), DrawnOnCPU() if elsewhere else nullcontext():
        torch.default_generator.manual_seed(int(seed))  # it takes no NumPy integer
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return model


def dominant(model: Model, *, example: Any, seed: int = 0, share: float = 0.5) -> Model:
    """Every neuron under the law aligned for ever: ``W ← |W| ⊙ sign(B)``, then ``½|w_in|² + ½b² ≤ share · V``.

    W is drawn anew from the seed, whatever the model has learned. From the output down, the weights and the bias
    into each neuron are scaled where they exceed the bound. Under sign-symmetric rules neurons are aligned by
    definition and only the scaling remains; of Kolen-Pollack, whose V is ``⟨B, W⟩ - ½|W|²``, magnitudes above |B|
    are cut to it; of direct feedback only the last hidden layer is under the law. Where B is zero W stays. Moving
    feedback (adafa) starts aligned, but is not bound to stay so.

    With one output and two layers the loss then falls under any loss function and small steps; with several it may
    rise, as an aligned neuron can still carry a single error the wrong way.

    Args:
        model: A converted model.
        example: An input of it, as for ``convert``; it shows which neurons feed which layer.
        seed: Of the weights that are signed and scaled, those of ``generic``.
        share: In (0, 1]; below 1 leaves room for the ``½Ση²|∇|²`` by which steps raise C.

    Raises:
        ValueError: The model is not converted or does not run, no neuron is under the law, or share is out of range.

    Source: derived from the law; Robertson and Koyejo 2024 (ICML) state convergence for certain initialisations.
    """
    if not (number(share) and 0 < share <= 1):
        raise ValueError(f"share is {told(share)}, expected a number above 0 and up to 1: the bound is C ≤ 0 at 1")
    balances, _ = lawful(model, example)
    _resolved("share", share, max(_tiny(balance) for balance in balances.values()))
    generic(model, seed=seed)
    with torch.no_grad():
        for name, balance in reversed(balances.items()):
            for target in balance.targets:
                _align(target)
            room = share * balance.outgoing() / balance.incoming().clamp_min(torch.finfo(torch.float64).tiny)
            _scale(unwrapped(model).get_submodule(name), balance, room.clamp(0, 1).sqrt())
    return model


def small(model: Model, *, example: Any, seed: int = 0, size: float = 0.01) -> Model:
    """All layers under the law scaled by ``size``, the output layer zero: C is 0 to order ``size`` for every neuron.

    The weights are drawn anew from the seed, whatever the model has learned. Alignment is then what the incoming
    weights gain: to that order, every neuron that learns ends aligned.

    Args:
        model: A converted model.
        example: An input of it.
        seed: Of the weights that are scaled, those of ``generic``.
        size: The factor, above 0; its square, which C is of the order of, not below what the weights' type holds.

    Raises:
        ValueError: The model is not converted or does not run, no neuron is under the law, the model's output is not
            that of a layer, or size is not positive or too small for the weights' type.

    Source: derived from the law.
    """
    if not (number(size) and size > 0):
        raise ValueError(f"size is {told(size)}, expected a factor above 0: from all zeros nothing would learn")
    balances, followed = lawful(model, example)
    if not followed.outputs:
        raise ValueError("the model's output is not that of a linear layer or convolution: none can be set to zero")
    _resolved("size", size, max(_tiny(balance) for balance in balances.values()) ** 0.5)
    inner = unwrapped(generic(model, seed=seed))
    with torch.no_grad():
        for name, balance in balances.items():
            _scale(inner.get_submodule(name), balance, torch.full_like(balance.incoming(), size))
        for name in followed.outputs:
            for parameter in inner.get_submodule(name).parameters(recurse=False):
                parameter.zero_()
    return model


def anti(model: Model, *, example: Any, seed: int = 0) -> Model:
    """``W = -B`` for every layer whose input is under the law: all neurons start against their feedback.

    The other weights are drawn anew from the seed, whatever the model has learned. With one hidden layer the loss
    rises at first, and recovers as alignment grows with the incoming weights; a very wide one may learn by its
    output layer alone. Across two such layers the signs cancel, so that the gradient is turned around in the layers
    that are an odd number of them from the output.

    Args:
        model: A converted model.
        example: An input of it.
        seed: Of the other weights, those of ``generic``.

    Raises:
        ValueError: The model is not converted or does not run, no neuron is under the law, or the feedback has the
            weights' own signs, so that nothing can be against it.

    Source: derived from the law.
    """
    balances, _ = lawful(model, example)
    targets = {target.name: target for balance in balances.values() for target in balance.targets if not signed(target)}
    if not targets:
        raise ValueError(
            "no feedback is free of the weights' signs (backpropagation, usf, frsf, brsf): use another rule"
        )
    generic(model, seed=seed)
    with torch.no_grad():
        for target in targets.values():
            target.weight.copy_(-target.feedback())
    return model


def _tiny(balance: Balance) -> float:
    return torch.finfo(balance.weight.dtype).tiny


def _resolved(name: str, value: float, least: float) -> None:
    """Refuse a factor that would leave weights of zero."""
    if value < least:
        raise ValueError(
            f"{name} is {told(value)}, expected at least {least:.2g}: below it the weights would round to zero"
        )


def _align(target: Target) -> None:
    """``W ← |W| ⊙ sign(B)``, at most |B| where B learns."""
    if signed(target):
        return
    weight, feedback = target.weight, target.feedback().to(target.weight.dtype)
    size = torch.minimum(weight.abs(), feedback.abs()) if target.form is Form.LEARNED else weight.abs()
    weight.copy_(torch.where(feedback == 0, weight, size * feedback.sign()))


def _scale(layer: nn.Module, balance: Balance, factor: Float[Tensor, " neurons"]) -> None:
    """Multiply the weights and the bias into each neuron by its factor."""
    weight, kind = balance.weight, kind_of(layer)
    if kind is None:
        spread = factor
    else:  # the transpose of the sum over a neuron's incoming weights, for any kind of layer
        place = torch.zeros_like(weight, dtype=factor.dtype).requires_grad_()
        with torch.enable_grad():
            (spread,) = torch.autograd.grad(kind.incoming(place, layer), place, factor)
    weight.mul_(spread.to(weight.dtype))
    if balance.bias is not None:
        balance.bias.mul_(factor.to(balance.bias.dtype))


SCHEMES: dict[str, Callable[..., nn.Module]] = {
    "dominant": dominant,
    "small": small,
    "generic": generic,
    "anti": anti,
}
"""name -> initialiser, all of them called with ``(model, example=…, seed=…)``."""
