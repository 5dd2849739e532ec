"""What a pass that only looks must leave as it was: random generators, and what ``torch.compile`` would hide."""

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

# NumPy's global generator (rule NPY002 of ruff) is what a model may draw from, whatever one would write today.


@contextmanager
def generators(model: nn.Module) -> Iterator[None]:
    """Put the random generators back afterwards: PyTorch's (CPU, the model's devices), Python's and NumPy's."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    with _kept(devices):
        yield


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Within it the global generators of PyTorch, Python and NumPy start from a seed; afterwards they are put back.

    Args:
        seed: From 0 to below 2⁶⁴.
        devices: CUDA devices whose generators are put back too.
    """
    with _kept(devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002
        yield


def drawn() -> dict[str, Any]:
    """Where Python's and NumPy's global generators are, as JSON can hold it."""
    name, key, *rest = np.random.get_state()  # noqa: NPY002
    return {"python": random.getstate(), "numpy": [name, np.asarray(key).tolist(), *rest]}


def draw_on(state: Mapping[str, Any]) -> None:
    """Put Python's and NumPy's global generators where ``drawn`` found them.

    Raises:
        ValueError, TypeError, KeyError: This is no such state.
    """
    version, key, normal = state["python"]
    random.setstate((version, tuple(key), normal))
    name, key, *rest = state["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))  # noqa: NPY002


@contextmanager
def _kept(devices: Iterable[torch.device]) -> Iterator[None]:
    own, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def eagerly() -> Iterator[None]:
    """Run what is compiled uncompiled, or hooks and modes that are hung on it now would see nothing."""
    if "torch._dynamo" not in sys.modules:  # importing it takes a second, and without it nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
