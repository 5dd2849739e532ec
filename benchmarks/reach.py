"""How near rules without weight transport come to backpropagation on Fashion-MNIST, all tuned alike.

Networks: a perceptron 784-1000-1000-10 with ReLU, and LeNet-5 with tanh and average pooling, with ReLU and maximum
pooling, and with batch normalisation in front of each ReLU. A run is stochastic gradient descent with momentum 0.9 on
batches of 64, its rate times 0.6 after every epoch. Every row gets the same learning rates; the best on 5,000 training
images that are kept apart, with seed 0, is then run with the other seeds. The test images are looked at once, at the
end of a run. Beside the rules stand the references ``frozen`` and ``shallow``.

Every run is a line of ``--out``, written as it ends; called again, the script makes only what is missing. ``--table``
prints what docs/reach.md shows.
"""

import argparse
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import falign
from falign.lab.data import load
from tuned import Runs, spread

APART = 5000
BATCH = 64


def perceptron() -> nn.Module:
    """784-1000-1000-10 with ReLU."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10)
    )


def lenet(activation: type[nn.Module], pooling: type[nn.Module], *, normalised: bool) -> nn.Module:
    """LeNet-5 on 28 × 28 images."""

    def behind(*layers: nn.Module, norm: nn.Module) -> list[nn.Module]:
        return [*layers, *([norm] if normalised else []), activation()]

    return nn.Sequential(
        *behind(nn.Conv2d(1, 6, 5, padding=2), norm=nn.BatchNorm2d(6)),
        pooling(2),
        *behind(nn.Conv2d(6, 16, 5), norm=nn.BatchNorm2d(16)),
        pooling(2),
        nn.Flatten(),
        *behind(nn.Linear(400, 120), norm=nn.BatchNorm1d(120)),
        *behind(nn.Linear(120, 84), norm=nn.BatchNorm1d(84)),
        nn.Linear(84, 10),
    )


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of the table.

    Attributes:
        title: what the table calls it.
        make: builds it.
        epochs: of a run.
    """

    title: str
    make: Any
    epochs: int


NETWORKS = {
    "tanh": Network(title="LeNet, tanh", make=partial(lenet, nn.Tanh, nn.AvgPool2d, normalised=False), epochs=4),
    "norm": Network(
        title="LeNet, batch norm, ReLU", make=partial(lenet, nn.ReLU, nn.MaxPool2d, normalised=True), epochs=4
    ),
    "relu": Network(title="LeNet, ReLU", make=partial(lenet, nn.ReLU, nn.MaxPool2d, normalised=False), epochs=4),
    "mlp": Network(title="784-1000-1000-10, ReLU", make=perceptron, epochs=10),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Attributes:
        title: what the table calls it.
        rule: of ``falign.convert``.
        options: of ``falign.convert``, beside the rule.
        decay: weight decay, of a rule that needs it.
    """

    title: str
    rule: str
    options: Mapping[str, Any] = field(default_factory=dict)
    decay: float = 0.0


ROWS = {
    "bp": Row(title="backpropagation", rule="bp"),
    "probe": Row(title="`probe`", rule="probe"),
    "kp": Row(title="`kp`", rule="kp", decay=1e-3),
    "pfa": Row(title="`pfa`", rule="pfa", decay=1e-3),
    "usf": Row(title="`usf`", rule="usf"),
    "dkp": Row(title="`dkp`", rule="dkp"),
    "dkp-centred": Row(title="`dkp`, centred error", rule="dkp", options={"transform": "centred"}),
    "dfa": Row(title="`dfa`", rule="dfa"),
    "dfa-centred": Row(title="`dfa`, centred error", rule="dfa", options={"transform": "centred"}),
    "fa": Row(title="`fa`", rule="fa"),
    "shallow": Row(title="last two layers alone", rule="shallow"),
    "frozen": Row(title="last layer alone", rule="frozen"),
}
CANDIDATES = ({"rate": 0.03}, {"rate": 0.01}, {"rate": 0.1})
SEEDS = (0, 1, 2)


@cache
def images() -> tuple[tuple[Tensor, Tensor], ...]:
    """Training, validation and test set: images of mean 0 and deviation 1 on the training set, and labels."""
    data = load("fashion-mnist")
    x, y = data.train_images.float() / 255, data.train_labels
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    mean, deviation = x[:-APART].mean(), x[:-APART].std()
    test = (data.test_images.float() / 255 - mean) / deviation
    x = (x - mean) / deviation
    return (x[:-APART], y[:-APART]), (x[-APART:], y[-APART:]), (test, data.test_labels)


def train(network: str, row: str, seed: int, rate: float) -> dict[str, float | None]:
    """Accuracies in % after a training, and the seconds that it took; None where it left the finite numbers."""
    begin = time.perf_counter()
    (x, y), *rest = images()
    what, how = NETWORKS[network], ROWS[row]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = what.make()
    falign.convert(model, how.rule, seed=seed, example=x[:8], **how.options)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=how.decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.6)
    random = torch.Generator().manual_seed(seed)
    finite = True
    for _ in range(what.epochs):
        for chosen in torch.randperm(len(x), generator=random).split(BATCH):
            optimizer.zero_grad()
            loss = cross_entropy(model(x[chosen]), y[chosen])
            finite = finite and math.isfinite(loss.item())
            if not finite:
                break
            loss.backward()
            optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = [100 * float((model(part).argmax(-1) == labels).double().mean()) for part, labels in rest]
    names = ("validation", "test")
    return {
        **{name: round(value, 2) if finite else None for name, value in zip(names, right, strict=True)},
        "seconds": round(time.perf_counter() - begin, 1),
    }


def score(line: Mapping[str, Any]) -> float:
    """What is tuned: the larger, the better."""
    return -1.0 if line["validation"] is None else line["validation"]


def table(runs: Runs, networks: list[str]) -> Iterator[str]:
    """Lines of the table."""
    yield f"| trained by | {' | '.join(f'{NETWORKS[name].title} | behind' for name in networks)} |"
    yield f"|---|{'---|---|' * len(networks)}"
    for row, how in ROWS.items():
        cells = []
        for name in networks:
            lines = runs.best({"network": name, "row": row}, CANDIDATES, score)
            true = {line["seed"]: line for line in runs.best({"network": name, "row": "bp"}, CANDIDATES, score)}
            if not lines:
                cells.append("pending | ")
            elif any(line["test"] is None for line in lines):
                cells.append(f"runs away at {lines[0]['rate']} | ")
            else:
                pairs = [true[line["seed"]]["test"] - line["test"] for line in lines if line["seed"] in true]
                behind = spread(pairs, 2) if row != "bp" and pairs else ""
                cells.append(f"{spread([line['test'] for line in lines], 2)} | {behind}")
        yield f"| {how.title} | {' | '.join(cells)} |"


def main() -> None:
    """Make what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("docs/reach/runs.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and train nothing")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    runs = Runs(chosen.out, train)
    for network, row in () if chosen.table else product(chosen.networks, chosen.rows):
        runs.tune({"network": network, "row": row}, CANDIDATES, SEEDS, score)
    print("\n".join(table(runs, chosen.networks)))


if __name__ == "__main__":
    main()
