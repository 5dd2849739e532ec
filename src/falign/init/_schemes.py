"""Initial weights by the conservation law: schemes that draw all weights anew, and the neurons that they align."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from falign._preserve import DrawOnCPU
from falign._validation import describe, fraction, is_whole, positive
from falign._wiring import converted, unwrapped
from falign.measure.law._balance import Balance
from falign.measure.law._downstream import Downstream
from falign.measure.law._laws import find_laws
from falign.measure.law._trace import Followed, follow
from falign.rules import LawKind

# Which neurons of a model are under the law of alignment, and which of them stay aligned.


def aligned_forever(model: nn.Module, *, example: Any) -> dict[str, Bool[Tensor, " neurons"]]:
    """Tell of each neuron whether the weights as they are now guarantee ``⟨B, w_out⟩ ≥ 0`` at all times.

    In gradient flow, weights and biases all of one rate: where C ≤ 0, or where the feedback has the weights' signs.
    Steps of size η raise C by ½η²|∇|² each. Where feedback moves by itself (adafa) the weights cannot tell: False.

    Args:
        model: A converted model.
        example: An input of it.

    Returns:
        {layer: a truth value a neuron}, of the layers under the law whose neurons feed another linear layer or
        convolution, in running order.

    Raises:
        ValueError: The model is not converted or does not run, or no neuron is under the law.

    Source: derived from the law.
    """
    return {name: _stays_aligned(balance) for name, balance in _lawful(model, example)[0].items()}


def _stays_aligned(balance: Balance) -> Bool[Tensor, " neurons"]:
    if all(_has_weight_signs(target) for target in balance.targets):
        return torch.ones_like(balance.incoming(), dtype=torch.bool)
    if any(target.kind is LawKind.MOVING for target in balance.targets):
        return torch.zeros_like(balance.incoming(), dtype=torch.bool)
    return balance.incoming() <= balance.outgoing()


def _lawful(model: nn.Module, example: Any) -> tuple[dict[str, Balance], Followed]:
    """Find {layer: the law of its neurons} where one holds and is about alignment, and what the example showed."""
    converted(model)
    inner = unwrapped(model)
    followed = follow(inner, example)
    entries = find_laws(inner, followed, torch.optim.SGD(inner.parameters(), lr=1.0))
    balances = {
        name: entry.balance
        for name, entry in entries.items()
        if entry.balance is not None and entry.law.holds_exactly and _is_about_alignment(entry.balance)
    }
    if not balances:
        reasons = [f"layer {describe(name)}: {entry.law.reason}" for name, entry in entries.items() if entry.law.reason]
        listed = "; ".join(reasons) or "no layer feeds another"
        raise ValueError(
            f"no neuron of the model is under the conservation law ({listed}): nothing can be aligned by it"
        )
    return balances, followed


def _is_about_alignment(balance: Balance) -> bool:
    """Tell whether the law is about the alignment ⟨B, W⟩: not before a batch normalisation, as |w| stays by itself.

    Nor of queries and keys, whose law has no B, nor where B is a function of W of which no integral is known.
    """
    forms = {target.kind for target in balance.targets}
    return bool(forms) and not forms & {LawKind.NORMALISED, LawKind.PATH, LawKind.PARTNER}


def _has_weight_signs(target: Downstream) -> bool:
    """Tell whether the error of a target returns with the signs of its weights."""
    return target.kind is LawKind.WEIGHTS or (target.part is not None and target.part.wiring.rule.magnitudes)


# The schemes: each draws the weights anew from a seed, then bends them to what the law asks.

_Model = TypeVar("_Model", bound=nn.Module)


def generic(model: _Model, *, example: Any = None, seed: int = 0) -> _Model:
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
    if not is_whole(seed) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {describe(seed)}, expected a whole number from -2⁶³ to 2⁶⁴ - 1")
    elsewhere = any(parameter.device.type != "cpu" for parameter in model.parameters())
    with torch.random.fork_rng(devices=[]), DrawOnCPU() if elsewhere else nullcontext():
        torch.default_generator.manual_seed(int(seed))  # it takes no NumPy integer
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return model


def dominant(model: _Model, *, example: Any, seed: int = 0, share: float = 0.5) -> _Model:
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
    fraction("share", share, below=False)
    balances, _ = _lawful(model, example)
    _check_resolution("share", share, max(_smallest_normal(balance) for balance in balances.values()))
    generic(model, seed=seed)
    with torch.no_grad():
        for balance in reversed(balances.values()):
            for target in balance.targets:
                _align(target)
            allowed = share * balance.outgoing() / balance.incoming().clamp_min(torch.finfo(torch.float64).tiny)
            balance.scale(allowed.clamp(0, 1).sqrt())
    return model


def small(model: _Model, *, example: Any, seed: int = 0, size: float = 0.01) -> _Model:
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
    positive("size", size)  # from all zeros nothing would learn
    balances, followed = _lawful(model, example)
    if not followed.outputs:
        raise ValueError("the model's output is not that of a linear layer or convolution: none can be set to zero")
    _check_resolution("size", size, max(_smallest_normal(balance) for balance in balances.values()) ** 0.5)
    inner = unwrapped(generic(model, seed=seed))
    with torch.no_grad():
        for balance in balances.values():
            balance.scale(torch.full_like(balance.incoming(), size))
        for name in followed.outputs:
            for parameter in inner.get_submodule(name).parameters(recurse=False):
                parameter.zero_()
    return model


def anti(model: _Model, *, example: Any, seed: int = 0) -> _Model:
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
    balances, _ = _lawful(model, example)
    targets = {
        target.name: target
        for balance in balances.values()
        for target in balance.targets
        if not _has_weight_signs(target)
    }
    if not targets:
        raise ValueError(
            "no feedback is free of the weights' signs (so it is under backpropagation and sign-symmetric rules): use "
            "another rule"
        )
    generic(model, seed=seed)
    with torch.no_grad():
        for target in targets.values():
            target.weight.copy_(-target.feedback())
    return model


def _smallest_normal(balance: Balance) -> float:
    return torch.finfo(balance.weight.dtype).tiny


def _check_resolution(name: str, value: float, least: float) -> None:
    """Refuse a factor that would leave weights of zero."""
    if value < least:
        raise ValueError(
            f"{name} is {describe(value)}, expected at least {least:.2g}: below it the weights would round to zero"
        )


def _align(target: Downstream) -> None:
    """``W ← |W| ⊙ sign(B)``, at most |B| where B learns."""
    if _has_weight_signs(target):
        return
    weight, feedback = target.weight, target.feedback().to(target.weight.dtype)
    size = torch.minimum(weight.abs(), feedback.abs()) if target.kind is LawKind.LEARNED else weight.abs()
    weight.copy_(torch.where(feedback == 0, weight, size * feedback.sign()))


SCHEMES: dict[str, Callable[..., nn.Module]] = {
    "dominant": dominant,
    "small": small,
    "generic": generic,
    "anti": anti,
}
"""name -> initialiser, all of them called with ``(model, example=…, seed=…)``."""
