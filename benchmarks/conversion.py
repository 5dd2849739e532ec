"""Cost of ``falign.convert`` a layer, the drawing of B aside (B is given as tensors)."""

import statistics
import time

import torch
from torch import nn

import falign

LAYERS = 200


def measure(rule: str, wide: int) -> float:
    """Milliseconds a layer, the median of nine conversions."""
    times = []
    for _ in range(9):
        model = nn.Sequential(*(nn.Linear(wide, wide) for _ in range(LAYERS)))
        given = {str(index): torch.zeros(wide, wide) for index in range(LAYERS)}
        begin = time.perf_counter()
        falign.convert(model, rule, feedback=None if rule in ("bp", "usf") else given)
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / LAYERS * 1e3


if __name__ == "__main__":
    for rule in falign.ALL_RULES:
        print(f"{rule:6} {measure(rule, 16):.3f} ms a layer")
