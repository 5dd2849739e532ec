"""What measuring costs: an alignment, a conservation law and a monitor beside training steps, in the same run.

The first table has one measurement over one whole training step (forward, loss, backward, SGD), of backpropagation and
of the rule itself; every repetition times each of them once, in shuffled order. The second has a hundred training steps
with a monitor (``every=100``; also one that takes a step of each layer, and one that reads every gradient twice, as
where rounding may show), and with a conservation law attached, over a hundred without. Ratios are medians over
repetitions, with quartiles. ``python benchmarks/measure.py --help`` lists what can be chosen.
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import cross_entropy

import falign
from falign.measure import ConservationLaw, Monitor, _alignment, alignment
from step import CASES, mlp, stepper

NETWORKS = {**CASES, "narrow": (lambda: mlp(784, 1000, 10), (784,), 10, 128, 100)}


def ratios(variants: Mapping[str, Callable[[], object]], over: str, repetitions: int) -> dict[str, tuple[float, ...]]:
    """{variant: lower quartile, median, upper quartile of its time over that of ``over``, and its milliseconds}."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    order, shuffle = list(variants), random.Random(0)
    for repetition in range(repetitions + 2):
        shuffle.shuffle(order)
        for name in order:
            begin = time.perf_counter()
            variants[name]()
            if repetition >= 2:
                times[name].append(time.perf_counter() - begin)
    return {
        name: (
            *statistics.quantiles([a / b for a, b in zip(own, times[over], strict=True)], n=4),
            statistics.median(own) * 1e3,
        )
        for name, own in times.items()
    }


def once(case: str, rule: str, repetitions: int | None) -> None:
    """One alignment over one step."""
    make, shape, classes, batch, usual = NETWORKS[case]
    torch.manual_seed(0)
    base = make()
    x, y = torch.randn(batch, *shape), torch.randint(0, classes, (batch,))
    model = falign.convert(copy.deepcopy(base), rule, example=x[:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    variants = {
        "step of backpropagation": stepper(copy.deepcopy(base), x, y, True),
        f"step of {rule}": stepper(model, x, y, True),
        "alignment": lambda: alignment(model, cross_entropy, x, y),
        "alignment with optimizer": lambda: alignment(model, cross_entropy, x, y, optimizer=optimizer),
    }
    own = ratios(variants, f"step of {rule}", repetitions or max(5, usual // 4))
    true = ratios(variants, "step of backpropagation", repetitions or max(5, usual // 4))
    for name in list(variants)[2:]:
        low, middle, high, ms = own[name]
        print(
            f"{case:9} {rule:5} {name:26} {middle:5.2f} [{low:.2f}, {high:.2f}] of its own step, "
            f"{true[name][1]:5.2f} of a backpropagation step, {ms:8.1f} ms"
        )


def along(case: str, rule: str, repetitions: int) -> None:
    """A hundred steps, watched and not."""
    make, shape, classes, batch, _ = NETWORKS[case]
    torch.manual_seed(0)
    base = falign.convert(make(), rule, example=torch.randn(2, *shape))
    x, y = torch.randn(batch, *shape), torch.randint(0, classes, (batch,))

    def hundred(watch: str) -> Callable[[], None]:
        model = copy.deepcopy(base)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        size = 1e-2 if watch == "monitor, steps of layers" else None
        monitor = Monitor(model, every=100, optimizer=optimizer, step_size=size) if "monitor" in watch else None
        if watch == "law":
            ConservationLaw(model, optimizer, example=x)

        def run() -> None:
            suspicious = _alignment.suspicious
            if watch == "monitor, read twice":
                _alignment.suspicious = lambda *_: True
            try:
                train()
            finally:
                _alignment.suspicious = suspicious

        def train() -> None:
            for _ in range(100):
                if monitor is not None:
                    monitor.step(cross_entropy, x, y)
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()

        return run

    watches = ("monitor", "monitor, steps of layers", "monitor, read twice", "law")
    found = ratios({name: hundred(name) for name in ("plain", *watches)}, "plain", repetitions)
    for name in watches:
        low, middle, high, ms = found[name]
        print(f"{case:9} {rule:5} 100 steps with a {name:24} {100 * (middle - 1):+5.1f} % "
              f"[{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}], {ms:8.1f} ms")  # fmt: skip


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rules", nargs="+", default=["fa", "dfa"], choices=[r for r in falign.ALL_RULES if r != "bp"])
    parser.add_argument("--repetitions", type=int, help="of the first table; the second has a fifth, at least five")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for case in chosen.cases:
        for rule in chosen.rules:
            once(case, rule, chosen.repetitions)
    for case in (case for case in chosen.cases if case in ("narrow", "conv", "tiny")):
        for rule in chosen.rules:
            along(case, rule, max(5, (chosen.repetitions or 50) // 5))


if __name__ == "__main__":
    main()
