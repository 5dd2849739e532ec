"""What it costs to look at every gradient and every module: a step of 784-1000-10 with the looks and without them.

Repetitions take the variants by turns, in shuffled order; the ratio is the median over repetitions. Without the
looks is the same converted model, with the root's pre-hook and the hooks on its weights taken off by hand.
"""

import argparse
import random
import statistics
import time

import torch
from torch import nn

import falign
from falign._guard import unguard


def network() -> nn.Module:
    """784-1000-10 with ReLU."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 10))


def bare(rule: str, x: torch.Tensor) -> nn.Module:
    """A converted model that looks at nothing."""
    model = falign.convert(network(), rule, example=x)
    for key, hook in list(model._forward_pre_hooks.items()):
        if getattr(hook, "__name__", "") == "check_modules":
            del model._forward_pre_hooks[key]
    for parameter in model.parameters():
        unguard(parameter)
    return model


def main() -> None:
    """Time both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=2000)
    chosen = parser.parse_args()
    x, y = torch.randn(chosen.batch, 784), torch.randint(10, (chosen.batch,))
    for rule in ("fa", "dfa", "usf"):
        models = {"with": falign.convert(network(), rule, example=x), "without": bare(rule, x)}
        times: dict[str, list[float]] = {name: [] for name in models}
        for repetition in range(chosen.repetitions + 20):
            for name in random.sample(list(models), 2):
                model = models[name]
                model.zero_grad()
                start = time.perf_counter()
                nn.functional.cross_entropy(model(x), y).backward()
                if repetition >= 20:
                    times[name].append(time.perf_counter() - start)
        ratios = [one / other for one, other in zip(times["with"], times["without"], strict=True)]
        fastest = min(times["with"]) / min(times["without"])
        print(
            f"{rule:4} {1e6 * statistics.median(times['without']):7.0f} µs a step, with the looks "
            f"{statistics.median(ratios):.4f} times that (fastest {fastest:.4f})"
        )


if __name__ == "__main__":
    main()
