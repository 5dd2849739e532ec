"""What a pass that only looks must leave as it was: random generators, and what ``torch.compile`` would hide."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def generators(model: nn.Module) -> Iterator[None]:
    """Put the random generators back afterwards: PyTorch's (CPU, the model's devices), Python's and NumPy's."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    own, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # the global one is what a model may draw from
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
