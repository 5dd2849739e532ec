"""What must be so before the law of a model can be looked at."""

import torch
from torch import nn
from torch.optim import Optimizer

from falign.wiring import converted


def check(model: nn.Module, optimizer: Optimizer) -> None:
    """The model must be converted and finite, and the optimizer must train it.

    Raises:
        ValueError: One of these is not so.
    """
    converted(model)
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"the {type(optimizer).__name__} has none of the parameters of this {type(model).__name__}: give the "
            "optimizer that trains it"
        )
    check_finite(model)


def check_finite(model: nn.Module) -> None:
    """All parameters must be finite.

    Raises:
        ValueError: One is not; it is named.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"parameter {name!r} holds numbers that are not finite, so the law cannot be looked at: the training "
                "has diverged, lower its rate"
            )
