"""Learning rates, decays and gradients of an optimizer's next step, and how far it departs from gradient descent."""

from collections.abc import Iterable
from inspect import unwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


class GroupSettings(NamedTuple):
    """Settings of a parameter p: without momentum it moves by ``-rate (sign · ∇p + decay · p)``."""

    rate: float
    decay: float
    sign: float
    momentum: float


class Rates:
    """Rates and gradients of an optimizer at this moment, as schedulers and users have changed them.

    Args:
        optimizer: The optimizer, its ``param_groups`` and its parameters' ``grad`` as its next step will find them.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._settings: dict[int, GroupSettings] = {}
        for group in optimizer.param_groups:
            sign = -1.0 if group.get("maximize", False) else 1.0
            momentum = float(group.get("momentum", 0.0))
            settings = GroupSettings(float(group["lr"]), float(group.get("weight_decay", 0.0)), sign, momentum)
            self._settings.update({id(parameter): settings for parameter in group["params"]})
        self._scale: Tensor | None = getattr(optimizer, "grad_scale", None)  # a fused step unscales by itself

    def __getitem__(self, parameter: Tensor) -> GroupSettings:
        """Settings of a parameter; rate and decay are 0 for one that the optimizer does not have."""
        return self._settings.get(id(parameter), GroupSettings(0.0, 0.0, 1.0, 0.0))

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._settings

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Gradient that the step descends along, without decay; None for a parameter that the step does not move."""
        gradient = parameter.grad
        if gradient is None or parameter not in self:
            return None
        gradient = gradient.detach()
        if self._scale is not None:
            gradient = gradient.double() / self._scale.double()
        return gradient if self[parameter].sign > 0 else -gradient

    def ratio(self, one: Tensor, other: Tensor) -> float:
        """Rate of one parameter over that of another; 1 if one of them is 0."""
        first, second = self[one].rate, self[other].rate
        return first / second if first > 0 and second > 0 else 1.0


def skips_step(optimizer: Optimizer) -> bool:
    """Test for a next step that does nothing, as a gradient scaler has found that gradients overflowed."""
    overflow = getattr(optimizer, "found_inf", None)
    return overflow is not None and bool(overflow)


def departure(rates: Rates, parameters: Iterable[Tensor]) -> tuple[str, str] | None:
    """Departure of an optimizer from gradient descent on some parameters, (in words, order of the drift), or None.

    Heavy-ball momentum moves w along m, a sum of gradients at weights 1/(1-μ) steps old, for which the balance is off
    by ``Σ_j μ^j η|m|²``. At a fixed training time ηT/(1-μ) the drift is (1 + μ)/(1 - μ)² times that of gradient descent
    at the same η, and vanishes with η. Optimizers that scale every weight's gradient by its own factor break the
    balance at any η.
    """
    optimizer = rates.optimizer
    if not (isinstance(optimizer, SGD) and unwrap(type(optimizer).step) is unwrap(SGD.step)):
        return f"{type(optimizer).__name__} is not plain gradient descent", "O(1)"
    groups = [rates[parameter] for parameter in parameters]
    momentum = max(group.momentum for group in groups)
    if momentum == 0:
        return None
    if any(group.decay for group in groups):
        return f"momentum {momentum:g} with weight decay", "O(1)"
    return f"momentum {momentum:g}", "O(η/(1-μ)²)"


def descent_direction(parameter: Tensor, gradient: Tensor, group: GroupSettings) -> Tensor:
    """``gradient + decay · p``, in float64 where there is decay: a step moves p by -rate times it."""
    return gradient.double() + group.decay * parameter.detach().double() if group.decay else gradient


def differ(one: float, other: float) -> bool:
    """Test whether two rates differ by more than a scheduler's rounding."""
    return abs(one - other) > 1e-10 * max(abs(one), abs(other))


def run_after_closure(args: tuple, kwargs: dict[str, Any], after: Any) -> tuple[tuple, dict[str, Any]] | None:
    """Arguments of ``step`` with a closure that calls ``after`` last; None where there is no closure."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return None

    def closed() -> Any:
        with torch.enable_grad():
            loss = closure()
        after()
        return loss

    return ((args[0], closed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closed})
