"""What an optimizer does to each parameter in its next step, as far as it is gradient descent."""

from collections.abc import Iterable
from inspect import unwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


class Rate(NamedTuple):
    """A parameter p moves by ``-rate (sign · ∇p + decay · p)``, if there is no momentum."""

    rate: float
    decay: float
    sign: float
    momentum: float


class Rates:
    """Rates and gradients as an optimizer has them at this moment.

    Args:
        optimizer: With ``param_groups`` as schedulers and users have changed them.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._rates: dict[int, Rate] = {}
        for group in optimizer.param_groups:
            sign = -1.0 if group.get("maximize", False) else 1.0
            momentum = float(group.get("momentum", 0.0))
            rate = Rate(float(group["lr"]), float(group.get("weight_decay", 0.0)), sign, momentum)
            self._rates.update({id(parameter): rate for parameter in group["params"]})
        self._scale: Tensor | None = getattr(optimizer, "grad_scale", None)  # a fused step unscales by itself

    def __getitem__(self, parameter: Tensor) -> Rate:
        """Zeros for a parameter that the optimizer does not have."""
        return self._rates.get(id(parameter), Rate(0.0, 0.0, 1.0, 0.0))

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._rates

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The direction that the step goes down, decay left out; None where the step leaves it alone."""
        slope = parameter.grad
        if slope is None or parameter not in self:
            return None
        slope = slope.detach()
        if self._scale is not None:
            slope = slope.double() / self._scale.double()
        return slope if self[parameter].sign > 0 else -slope

    def ratio(self, one: Tensor, other: Tensor) -> float:
        """The rate of one over that of another; 1 where one of them stands still."""
        first, second = self[one].rate, self[other].rate
        return first / second if first > 0 and second > 0 else 1.0


def skips_step(optimizer: Optimizer) -> bool:
    """Whether a fused step, told by a gradient scaler that gradients overflowed, will do nothing."""
    overflow = getattr(optimizer, "found_inf", None)
    return overflow is not None and bool(overflow)


def departure(rates: Rates, parameters: Iterable[Tensor]) -> tuple[str, str] | None:
    """How an optimizer departs from gradient descent on some parameters: (in words, the order of the drift).

    Heavy-ball momentum moves w along m, a sum of gradients at weights 1/(1-μ) steps old, for which the balance is off
    by ``Σ_j μ^j η|m|²``. At a fixed training time ηT/(1-μ) the drift is (1 + μ)/(1 - μ)² times that of gradient descent
    at the same η, and vanishes with η. Optimizers that scale every weight's gradient by its own factor break the
    balance at any η.
    """
    optimizer = rates.optimizer
    if not (isinstance(optimizer, SGD) and unwrap(type(optimizer).step) is unwrap(SGD.step)):
        return f"{type(optimizer).__name__} is not plain gradient descent", "O(1)"
    own = [rates[parameter] for parameter in parameters]
    momentum = max(rate.momentum for rate in own)
    if momentum == 0:
        return None
    if any(rate.decay for rate in own):
        return f"momentum {momentum:g} with weight decay", "O(1)"
    return f"momentum {momentum:g}", "O(η/(1-μ)²)"


def descent_direction(parameter: Tensor, slope: Tensor, own: Rate) -> Tensor:
    """The direction that a step goes down: ``slope + decay · p``, in float64 where there is decay."""
    return slope.double() + own.decay * parameter.detach().double() if own.decay else slope


def differ(one: float, other: float) -> bool:
    """Whether two rates differ by more than a scheduler's rounding."""
    return abs(one - other) > 1e-10 * max(abs(one), abs(other))


def run_after_closure(args: tuple, kwargs: dict[str, Any], after: Any) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments of ``step``, with ``after`` called behind its closure; None where it has none."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return None

    def closed() -> Any:
        with torch.enable_grad():
            loss = closure()
        after()
        return loss

    return ((args[0], closed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closed})
