"""A small GPT on characters under each rule, all tuned alike: validation loss in nats, and perplexity.

The model is that of ``falign train --model gpt``: 4 pre-norm blocks of width 64 with 4 heads on 48 characters. The text
is Python's own language reference (``falign.lab.data.load_text("pydoc")``), so nothing is downloaded. A run is 500
steps of AdamW. Every row of the table gets the same candidates, learning rate × weight decay; the best on the
validation text with seed 0 is then run with the other seeds. The test text is looked at by nobody in between.

Every run is a line of ``--out``, written as it ends; called again, the script makes only what is missing. ``--table``
prints what docs/transformers.md shows. With one thread a run takes half a minute.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import falign
from falign.lab._models import build
from falign.lab.data import Text, load_text
from tuned import Runs, spread

CONTEXT = 48
BATCH = 8
STEPS = 500
WARM_UP = 50
RATES = (1e-3, 3e-3, 1e-2)
DECAYS = (0.01, 1.0)
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table.

    Attributes:
        title: what the table calls it.
        rule: of ``falign.convert``.
        options: of ``falign.convert``, beside the rule.
        trained: modules that are trained, all without any.
    """

    title: str
    rule: str | falign.Rule = "bp"
    options: Mapping[str, Any] = field(default_factory=dict)
    trained: tuple[str, ...] = ()


ROWS = {
    "bp": Row(title="backpropagation"),
    "usf": Row(title="`usf`", rule="usf"),
    "kp": Row(title="`kp`", rule="kp"),
    "adafa": Row(title="`adafa`", rule="adafa"),
    "fa": Row(title="`fa`", rule="fa"),
    "dfa": Row(title="`dfa`, e at the logits", rule="dfa"),
    "dfa-norm": Row(title="`dfa`, e before the vocabulary", rule="dfa", options={"error_at": "norm"}),
    "blocks": Row(title="`dfa`, blocks cut", rule="dfa", options={"cut": "blocks"}),
    "blocks-norm": Row(
        title="`dfa`, blocks cut, e before the vocabulary", rule="dfa", options={"cut": "blocks", "error_at": "norm"}
    ),
    "head": Row(title="last norm and head alone", trained=("norm", "head")),
}


def model_of(row: Row, text: Text, seed: int) -> nn.Module:
    """The converted model."""
    model = build("gpt:width=64,blocks=4,heads=4", shape=(CONTEXT,), classes=len(text.vocabulary), seed=seed)
    random = torch.Generator().manual_seed(seed)
    for layer in model.modules():  # as GPT-2: small weights, no biases
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02, generator=random)
            nn.init.zeros_(layer.bias)
    if row.trained:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in row.trained)
    example = text.train[: 4 * CONTEXT].long().view(4, CONTEXT)
    return falign.convert(model, row.rule, seed=seed, example=example, **row.options)


def batches(train: Tensor, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Characters and those that follow them, (batch, context) each, from random places of the text."""
    random = torch.Generator().manual_seed(seed)
    window = torch.arange(CONTEXT + 1)
    for _ in range(steps):
        start = torch.randint(len(train) - CONTEXT, (BATCH, 1), generator=random)
        piece = train[start + window].long()
        yield piece[:, :-1], piece[:, 1:]


@torch.no_grad()
def nats(model: nn.Module, part: Tensor) -> float:
    """Mean loss over a text in consecutive pieces."""
    pieces = part[: (len(part) - 1) // CONTEXT * CONTEXT + 1].long()
    x, y = pieces[:-1].view(-1, CONTEXT), pieces[1:].view(-1, CONTEXT)
    total = sum(
        float(cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum"))
        for x, y in zip(x.split(128), y.split(128), strict=True)
    )
    return total / y.numel()


def share(step: int) -> float:
    """Learning rate over its largest: linear up to it, then down to zero as a cosine."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - WARM_UP)))


def train(row: Row, text: Text, seed: int, rate: float, decay: float) -> dict[str, float]:
    """Losses after a training, and the seconds that it took."""
    begin = time.perf_counter()
    model = model_of(row, text, seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    others = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    loss = torch.tensor(torch.nan)
    for x, y in batches(text.train, seed, STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
    return {
        "training": round(loss.item(), 4),
        "validation": round(nats(model, text.validation), 4),
        "test": round(nats(model, text.test), 4),
        "seconds": round(time.perf_counter() - begin, 1),
    }


CANDIDATES = tuple({"rate": rate, "decay": decay} for rate, decay in product(RATES, DECAYS))


def unigram(text: Text) -> dict[str, float]:
    """Losses of the frequencies of the training characters, one added to each count."""
    counts = text.train.bincount(minlength=len(text.vocabulary)).double() + 1
    logs = (counts / counts.sum()).log()
    return {part: -float(logs[getattr(text, part).long()].mean()) for part in ("validation", "test")}


def table(runs: Runs, text: Text) -> Iterator[str]:
    """Lines of the table, those that are complete."""
    yield "| trained by | rate | weight decay | validation, nats | perplexity | test, nats | behind bp |"
    yield "|---|---|---|---|---|---|---|"
    first = None
    for name, row in ROWS.items():
        lines = runs.best({"row": name}, CANDIDATES, len(SEEDS))
        if not lines:
            yield f"| {row.title} | | | not measured | | | |"
            continue
        validation = [line["validation"] for line in lines]
        first = first or statistics.mean(validation)
        yield (
            f"| {row.title} | {lines[0]['rate']:g} | {lines[0]['decay']:g} | {spread(validation, 3)} "
            f"| {spread([math.exp(value) for value in validation], 2)} | {spread([line['test'] for line in lines], 3)} "
            f"| {100 * (statistics.mean(validation) / first - 1):+.1f} % |"
        )
    known = unigram(text)
    yield (
        f"| frequencies of the characters | | | {known['validation']:.3f} | {math.exp(known['validation']):.2f} "
        f"| {known['test']:.3f} | {100 * (known['validation'] / (first or 1) - 1):+.1f} % |"
    )


def main() -> None:
    """Make what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("docs/architectures/transformer.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and train nothing")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    text = load_text("pydoc")
    runs = Runs(chosen.out, lambda row, **rest: train(ROWS[row], text, **rest))
    for name in () if chosen.table else chosen.rows:
        runs.tune({"row": name}, CANDIDATES, SEEDS, lambda line: -line["validation"])
    print("\n".join(table(runs, text)))


if __name__ == "__main__":
    main()
