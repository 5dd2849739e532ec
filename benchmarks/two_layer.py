"""Speed of the two-layer simulators, as ratios to what a PyTorch user would write, measured in the same run.

The reference is a loop over one run: W of p x d float32, feedback alignment by a custom autograd function, SGD by
hand. Every repetition times some steps of every variant, in shuffled order, so that a slow moment of a shared machine
falls on all of them; a ratio is the median over repetitions, with quartiles, and beside it stands the ratio of the
fastest times, which a busy machine disturbs least. Beside a ratio that no product of that shape could reach stands
the loop against the bare product. ``python benchmarks/two_layer.py --help`` lists what can be chosen.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from falign.theory.two_layer import Dual, Start, WidthFree, draw, draw_reduced

N, D = 50, 150
RATES = {"identity": 1e-4, "relu": 1e-3, "tanh": 1e-2}
BOUND = "- (what the dual could reach at most)"
PSI = {"identity": lambda u: u, "relu": torch.relu, "tanh": torch.tanh}


class _FeedbackOutput(torch.autograd.Function):
    """``h β / √p`` whose error returns through b."""

    @staticmethod
    def forward(ctx, hidden: Tensor, beta: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, b)
        return hidden @ beta / sqrt(len(beta))

    @staticmethod
    def backward(ctx, e: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, b = ctx.saved_tensors
        e = e / sqrt(len(b))
        return torch.outer(e, b), hidden.mT @ e, None


def autograd_loop(start: Start, activation: str) -> Callable[[], None]:
    """One step of one run, as a user would write it."""
    X, y, b = start.X[0], start.y[0], start.b[0]
    W, beta = (tensor[0].clone().requires_grad_() for tensor in (start.W, start.beta))
    psi, rate = PSI[activation], RATES[activation]

    def step() -> None:
        loss = (y - _FeedbackOutput.apply(psi(X @ W.mT), beta, b)).square().sum() / 2
        grad_W, grad_beta = torch.autograd.grad(loss, (W, beta))
        with torch.no_grad():
            W.sub_(grad_W, alpha=rate)
            beta.sub_(grad_beta, alpha=rate)

    return step


def times(variants: dict[str, tuple[Callable[[], object], int]], repetitions: int) -> dict[str, list[float]]:
    """Seconds a call of every variant; each is (function, calls a repetition)."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    order, shuffle = list(variants), random.Random(0)
    for repetition in range(repetitions + 2):
        shuffle.shuffle(order)
        for name in order:
            function, calls = variants[name]
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            if repetition >= 2:
                found[name].append((time.perf_counter() - begin) / calls)
    return found


def row(name: str, above: list[float], below: list[float], wanted: str, scale: float = 1.0) -> dict:
    """A ratio with its quartiles."""
    low, ratio, high = statistics.quantiles([scale * a / b for a, b in zip(above, below, strict=True)], n=4)
    fastest = scale * min(above) / min(below)
    return {"what": name, "ratio": ratio, "low": low, "high": high, "fastest": fastest, "wanted": wanted}


def stepping(engine: Dual | WidthFree, steps: int) -> Callable[[], None]:
    """That many steps of an engine."""
    return lambda: engine.advance(steps)


def wide(activation: str, repetitions: int, wanted: tuple[str, str]) -> list[dict]:
    """One run at p = 12,800; its product in the faster of the layouts [p n] @ [n n] and [n n] @ [n p]."""
    start = draw([0], n=N, d=D, p=12_800, activation=activation, dtype=torch.float32)
    signal, product, K = torch.randn(12_800, N), torch.empty(12_800, N), torch.randn(N, N)
    across, along = signal.mT.contiguous(), product.mT.contiguous()
    found = times({
        "loop": (autograd_loop(start, activation), 2),
        "dual": (stepping(Dual(start, activation=activation, rate=RATES[activation] / 4), 10), 1),
        "tall": (lambda: torch.mm(signal, K, out=product), 10),
        "flat": (lambda: torch.mm(K, across, out=along), 10),
    }, repetitions)  # fmt: skip
    bare = min(found["tall"], found["flat"], key=min)
    return [
        row(f"{activation} p=12800: loop / dual", found["loop"], found["dual"], wanted[0], 10),
        row(f"{activation} p=12800: dual / its product", found["dual"], bare, wanted[1], 0.1),
        row(f"{activation} p=12800: loop / that product", found["loop"], bare, BOUND),
    ]


def narrow(activation: str, repetitions: int, wanted: str) -> list[dict]:
    """50 runs at p = 200, per run and step, and the batched product of such a step."""
    start = draw([0], n=N, d=D, p=200, activation=activation, dtype=torch.float32)
    block = draw_reduced(range(50), n=N, d=D, p=200, activation=activation, dtype=torch.float32)
    K, signal, product = torch.randn(50, N, N), torch.randn(50, N, 200), torch.empty(50, N, 200)
    found = times({
        "loop": (autograd_loop(start, activation), 10),
        "dual": (stepping(Dual(block, activation=activation, rate=RATES[activation] / 4), 10), 1),
        "product": (lambda: torch.bmm(K, signal, out=product), 10),
    }, repetitions)  # fmt: skip
    return [
        row(f"{activation} p=200, 50 runs: loop / dual", found["loop"], found["dual"], wanted, 500),
        row(f"{activation} p=200, 50 runs: dual / its product", found["dual"], found["product"], "-", 0.1),
        row(f"{activation} p=200, 50 runs: loop / that product", found["loop"], found["product"], BOUND, 50),
    ]


def width_free(repetitions: int) -> list[dict]:
    """50 linear runs of any width, p = 10⁹ here, against the loop at p = 12,800."""
    engine = WidthFree.sample(range(50), n=N, d=D, p=10**9, rate=1e-4)
    start = draw([0], n=N, d=D, p=12_800, dtype=torch.float32)
    found = times({"loop": (autograd_loop(start, "identity"), 2), "free": (stepping(engine, 200), 1)}, repetitions)
    seconds = row("width-free, 50 runs x 20,000 steps: seconds", found["free"], [1.0] * repetitions, "<= 3", 100)
    return [seconds, row("width-free: loop at p=12800 / run and step", found["loop"], found["free"], ">= 1000", 10_000)]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = [
        *wide("relu", chosen.repetitions, (">= 5", "<= 1.3")),
        *wide("tanh", chosen.repetitions, (">= 3.5", "<= 2")),
        *narrow("relu", chosen.repetitions, ">= 40"),
        *narrow("tanh", chosen.repetitions, ">= 17"),
        *width_free(chosen.repetitions),
    ]
    for one in rows:
        print("{what:48} {ratio:9.2f} [{low:.2f}, {high:.2f}] fastest {fastest:.2f}, wanted {wanted}".format(**one))
    if chosen.out:
        where = f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {chosen.threads} threads"
        chosen.out.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
