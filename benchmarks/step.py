"""Time of a training step under each rule, as a ratio to plain PyTorch backpropagation in the same run.

Every repetition times one step of every variant, in shuffled order, so that a slow moment of a shared machine
falls on all of them; the ratio is the median, over repetitions, of variant time / backpropagation time of that
repetition, with quartiles; beside it stands the ratio of the fastest
times, which a busy machine disturbs least. Of rules that learn between steps, a pass is timed as well, and shared out
among the steps between two as ``falign train`` has them. ``python benchmarks/step.py --help`` lists what can be chosen.
"""

import argparse
import contextlib
import copy
import io
import json
import platform
import random
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import falign
from falign.lab._models import build

RULES = [rule for rule in falign.ALL_RULES if rule != "bp"]


def mlp(*sizes: int) -> nn.Sequential:
    """ReLU network of linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def small_conv() -> nn.Sequential:
    """Three convolutions and a linear layer on 3 x 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 16, 10),
    )  # fmt: skip


class Pooled(nn.Module):
    """A module over (batch, time, 128) and a linear layer behind the mean over time.

    Args:
        body: Gives (batch, time, 128), or a pair of which that is the first.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 128) to (batch, 10)."""
        y = self.body(x)
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


def attention() -> nn.Module:
    """Three blocks of ``nn.TransformerEncoder``, without dropout."""
    block = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
    return Pooled(nn.TransformerEncoder(block, 3, enable_nested_tensor=False))


#: name: (model, input shape without batch, classes, batch, repetitions)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, int]] = {
    "wide": (lambda: mlp(784, 4096, 4096, 4096, 4096, 10), (784,), 10, 256, 25),
    "conv": (small_conv, (3, 32, 32), 10, 64, 60),
    "resnet20": (lambda: build("resnet20", shape=(3, 32, 32), classes=10, seed=0), (3, 32, 32), 10, 64, 30),
    "attention": (attention, (64, 128), 10, 32, 40),
    "lstm": (lambda: Pooled(nn.LSTM(128, 128, 2, batch_first=True)), (64, 128), 10, 32, 60),
    "gru": (lambda: Pooled(nn.GRU(128, 128, 2, batch_first=True)), (64, 128), 10, 32, 60),
    "tiny": (lambda: mlp(20, 30, 25, 7), (20,), 7, 16, 2000),
}

#: rule: (what it does between steps, of the model and a batch; steps between two)
BETWEEN: dict[str, tuple[Callable[[nn.Module, Tensor], object], int]] = {
    **{rule: (lambda model, x: falign.follow(model, x), 10) for rule in ("fdfa", "grape", "afa")},
    "wm": (lambda model, x: falign.mirror(model), 20),
}

SEQUENCES = ("attention", "lstm", "gru")  # biotorch knows linear layers and convolutions


def stepper(model: nn.Module, x: Tensor, y: Tensor, optimizer: bool, targeted: bool = False) -> Callable[[], None]:
    """One training step: forward, cross-entropy, backward, and SGD where asked for."""
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        sgd.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if optimizer:
            sgd.step()

    def targeted_step() -> None:
        with falign.targets(model, y):
            step()

    return targeted_step if targeted else step


def peers(base: nn.Module, classes: int) -> dict[str, nn.Module]:
    """The same network under biotorch 0.0.16, where that can be imported (it wants torchvision; a stub will do)."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.models", "torchvision.transforms"):
        sys.modules.setdefault(name, types.ModuleType(name))
    try:
        from biotorch.module.biomodule import BioModule
    except Exception as error:
        print(f"biotorch is not here ({type(error).__name__}: {error}); its rows are left out", file=sys.stderr)
        return {}
    warnings.filterwarnings("ignore", category=FutureWarning)
    with contextlib.redirect_stdout(io.StringIO()):
        return {
            f"biotorch {mode}": BioModule(copy.deepcopy(base), mode=mode, output_dim=classes)
            for mode in ("fa", "dfa", "usf", "frsf", "brsf")
        }


def biotorch_stepper(model: nn.Module, x: Tensor, y: Tensor, optimizer: bool) -> Callable[[], None]:
    """The same step; biotorch's direct rule wants targets and loss within forward."""
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = nn.CrossEntropyLoss()

    def step() -> None:
        sgd.zero_grad()
        output = model(x, y, loss) if model.mode == "dfa" else model(x)
        loss(output, y).backward()
        if optimizer:
            sgd.step()

    return step


def measure(case: str, optimizer: bool, rules: list[str], with_peers: bool, repetitions: int | None) -> list[dict]:
    """Rows of one case: variant, ratio with quartiles, milliseconds."""
    make, shape, classes, batch, default_repetitions = CASES[case]
    torch.manual_seed(0)
    base = make()
    x, y = torch.randn(batch, *shape), torch.randint(0, classes, (batch,))
    steps = {"backprop": stepper(copy.deepcopy(base), x, y, optimizer)}
    for rule in rules:
        model = falign.convert(copy.deepcopy(base), rule, example=x[:2])
        steps[rule] = stepper(model, x, y, optimizer, falign.ALL_RULES[rule].targeted)
        if rule in BETWEEN:
            steps[f"{rule}'s pass"] = partial(BETWEEN[rule][0], model, x)
    if with_peers:
        for name, model in peers(base, classes).items():
            steps[name] = biotorch_stepper(model, x, y, optimizer)
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0)
    for repetition in range((repetitions or default_repetitions) + 3):
        shuffle.shuffle(order)
        for name in order:
            begin = time.perf_counter()
            steps[name]()
            if repetition >= 3:
                times[name].append(time.perf_counter() - begin)
    for rule, (_, every) in BETWEEN.items():
        if passes := times.pop(f"{rule}'s pass", None):
            times[rule] = [step + one / every for step, one in zip(times[rule], passes, strict=True)]
    rows = []
    for name, own in times.items():
        low, ratio, high = statistics.quantiles([t / b for t, b in zip(own, times["backprop"], strict=True)], n=4)
        rows.append({
            "case": case, "step": "whole" if optimizer else "forward+backward", "variant": name,
            "ratio": round(ratio, 3), "low": round(low, 3), "high": round(high, 3),
            "fastest": round(min(own) / min(times["backprop"]), 3), "ms": round(statistics.median(own) * 1e3, 3),
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure what the command line asks for, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rules", nargs="*", default=RULES, choices=RULES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = []
    for case in chosen.cases:
        for optimizer in (False, True):
            others = optimizer and not chosen.no_peers and case not in SEQUENCES
            new = measure(case, optimizer, chosen.rules, others, chosen.repetitions)
            for row in new:
                print(
                    "{case:9} {step:17} {variant:14} {ratio:6.3f} [{low:.3f}, {high:.3f}] "
                    "fastest {fastest:.3f} {ms:10.3f} ms".format(**row)
                )
            rows += new
    if chosen.out:
        where = f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {chosen.threads} threads"
        chosen.out.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
