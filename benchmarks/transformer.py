"""A small GPT on characters under each rule, all tuned alike: validation loss in nats, and perplexity.

The model is that of ``falign train --model gpt``: 4 pre-norm blocks of width 64 with 4 heads on 48 characters. The text
is Python's own language reference (``falign.lab.data.load_text("pydoc")``), so nothing is downloaded. A run is 500
steps of AdamW. Weights start as GPT-2's. Every row of the table gets the same candidates, a learning rate and a weight
decay; the best on the validation text with seed 0 is then run with the other seeds. The test text is looked at by
nobody in between.

Every run is a line of ``--out``, written as it ends; called again, the script makes only what is missing. ``--table``
prints what docs/transformers.md shows. With one thread a run takes half a minute.
"""

import argparse
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
STD = 0.02  # of GPT-2's weights
BLOCKS = 4
CANDIDATES = ({"rate": 3e-3, "decay": 0.01}, {"rate": 3e-3, "decay": 1.0}, {"rate": 1.5e-3, "decay": 0.01})
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


def adds(name: str) -> float:
    """Share of GPT-2's standard deviation that a layer starts with: less where branches add to the stream."""
    return (2 * BLOCKS) ** -0.5 if name.endswith((".out", ".fc2")) else 1.0


def model_of(row: Row, text: Text, seed: int) -> nn.Module:
    """The converted model."""
    model = build(f"gpt:width=64,blocks={BLOCKS},heads=4", shape=(CONTEXT,), classes=len(text.vocabulary), seed=seed)
    random = torch.Generator().manual_seed(seed)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=adds(name) * STD, generator=random)
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


def unigram(text: Text) -> dict[str, float]:
    """Losses of the frequencies of the training characters, one added to each count."""
    counts = text.train.bincount(minlength=len(text.vocabulary)).double() + 1
    logs = (counts / counts.sum()).log()
    return {part: -float(logs[getattr(text, part).long()].mean()) for part in ("validation", "test")}


def score(line: Mapping[str, Any]) -> float:
    """What is tuned: the larger, the better."""
    return -line["validation"]


def table(runs: Runs, text: Text) -> Iterator[str]:
    """Lines of the table, of what is there; behind bp seed by seed, in per cent of its loss."""
    yield "| trained by | rate | decay | seeds | validation, nats | perplexity | test, nats | behind bp |"
    yield "|---|---|---|---|---|---|---|---|"
    truth = {line["seed"]: line["validation"] for line in runs.best({"row": "bp"}, CANDIDATES, score)}
    for name, row in ROWS.items():
        lines = runs.best({"row": name}, CANDIDATES, score)
        if not lines:
            yield f"| {row.title} | | | 0 | pending | | | |"
            continue
        validation = [line["validation"] for line in lines]
        behind = [100 * (line["validation"] / truth[line["seed"]] - 1) for line in lines if line["seed"] in truth]
        yield (
            f"| {row.title} | {lines[0]['rate']:g} | {lines[0]['decay']:g} | {len(lines)} | {spread(validation, 3)} "
            f"| {spread([math.exp(value) for value in validation], 2)} | {spread([line['test'] for line in lines], 3)} "
            f"| {spread(behind, 1) if name != 'bp' else '0'} % |"
        )
    known = unigram(text)
    yield (
        f"| frequencies of the characters | | | | {known['validation']:.3f} | {math.exp(known['validation']):.2f} "
        f"| {known['test']:.3f} | |"
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
        runs.tune({"row": name}, CANDIDATES, SEEDS, score)
    print("\n".join(table(runs, text)))


if __name__ == "__main__":
    main()
