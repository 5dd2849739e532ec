"""A pass that leaves no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from falign._attached import Feedback
from falign._preserve import generators
from falign._wiring import wirings


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever a pass within does to them, buffers, random generators and modes are afterwards as they were before.

    The generators are PyTorch's (of the CPU and of the CUDA devices that the model is on), Python's and NumPy's global
    ones. Buffers are put back in place, and in their module's slot if the pass replaced them. A backward that is still
    to come may recompute a part of its forward (activation checkpointing): it does so by the rule of that forward.
    """
    parts = [part for part in model.modules() if isinstance(part, Feedback)]
    fixed = {id(part.sequence.values if part.B is None else part.B) for part in parts if not part.wiring.rule.adapts}
    kept = [
        (module, name, buffer, buffer if buffer is None or id(buffer) in fixed else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    passes = [(part, part.ran, part.latest, part.opaque, part.since, part.met) for part in parts]
    hung = [(wiring, dict(vars(wiring.state)), wiring.followed, wiring.fired) for wiring in wirings(model)]
    for wiring, *_ in hung:
        wiring.state.measured = True
    with generators(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in kept:
                    module._buffers[name] = buffer
                    if value is not buffer:
                        _put(buffer, value)
            for module, training in modes:
                module.training = training
            for part, ran, latest, opaque, since, met in passes:
                part.ran, part.latest, part.opaque, part.since, part.met = ran, latest, opaque, since, met
            for wiring, state, followed, fired in hung:
                vars(wiring.state).update(state)
                wiring.followed, wiring.fired = followed, fired


def _put(buffer: Tensor | None, value: Tensor | None) -> None:
    if buffer is not None and value is not None:
        buffer.data.copy_(value)  # its version stays: a backward that is still to come may have saved it


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within ``torch.compile``'s and the data-parallel wrappers."""
    while type(model).__name__ in ("OptimizedModule", "DistributedDataParallel", "DataParallel"):
        model = model.get_submodule("_orig_mod" if type(model).__name__ == "OptimizedModule" else "module")
    return model
