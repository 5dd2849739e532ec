"""The optimizers of ``--optimizer``."""

from typing import Any

import torch
from torch import nn

from falign.lab.config import TrainConfig


class SGD(torch.optim.SGD):
    """PyTorch's SGD, also where some parameters have their first gradient after the first step.

    Its fused step makes the momenta of all parameters at once or of none, and fails on a mixture. A momentum of zero is
    what the late ones have.
    """

    def _init_group(self, group: Any, params: Any, grads: Any, momentum_buffer_list: Any) -> Any:
        sparse = super()._init_group(group, params, grads, momentum_buffer_list)
        if any(buffer is not None for buffer in momentum_buffer_list):
            for at, buffer in enumerate(momentum_buffer_list):
                if buffer is None:
                    momentum_buffer_list[at] = torch.zeros_like(params[at])
        return sparse


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of a completed configuration, for all parameters of a model, learned feedback included.

    Where PyTorch can, it makes one pass over the parameters in place of several: on a CPU that is a quarter
    of the time of Adam.

    Args:
        model: The model, converted.
        config: A completed configuration.

    Returns:
        The optimizer.
    """
    rate, decay = number(config.learning_rate), number(config.weight_decay)
    fused = True if torch.device(config.device).type in ("cpu", "cuda") else None
    if config.optimizer == "sgd":
        momentum = number(config.momentum)
        return SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay, fused=fused)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(model.parameters(), lr=rate, weight_decay=decay, fused=fused)


def number(value: float | None) -> float:
    """A number that a completed configuration has."""
    assert value is not None, "the configuration is not completed"
    return value
