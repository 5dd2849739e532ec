"""The rules compared: one table, made from the classes, the README, the field's table and the published values."""

import csv
import inspect
import re
from pathlib import Path

import torch
from sphinx.application import Sphinx
from torch import nn

import falign
from falign.rules import Rule

MARK = "<!-- the matrix -->"
COLUMNS = (
    "rule", "update: the error at a layer's input", "matrices", "memory of them", "passes", "weight transport",
    "targets", "attention", "normalisation", "needs", "size of B", "our number: MLP", "our number: LeNet, tanh",
    "published number", "source",
)  # fmt: skip


def setup(app: Sphinx) -> dict[str, bool]:
    """Take part in a build."""
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _read(app: Sphinx, docname: str, content: list[str]) -> None:
    if MARK in content[0]:
        content[0] = content[0].replace(MARK, table(Path(app.srcdir)))


def table(docs: Path) -> str:
    """The matrix in Markdown, a row for every rule of the package."""
    said = _readme(docs.parent / "README.md")
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, rule in falign.ALL_RULES.items():
        update, needs = said[name]
        rows.append((
            f"[`{name}`](#{'falign.rules.' + rule.__module__.rpartition('.')[2]}.{rule.__qualname__})", update,
            _matrices(rule), _memory(name), _passes(rule), _transport(rule), "every batch" if rule.targeted else "–",
            _attention(name, rule), "wanted" if "normalised" in needs else "as it is", needs,
            f"{rule.size:g}" if rule.wiring != "none" else "–",
            _ours(docs, name, "mlp"), _ours(docs, name, "lenet"), _published(name), _source(rule),
        ))  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _readme(path: Path) -> dict[str, tuple[str, str]]:
    """What the README says a rule does, and what it needs."""
    found = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: (update, needs) for name, update, needs in found}


def _matrices(rule: type[Rule]) -> str:
    if rule.wiring == "none":
        return "–"
    shape = "W's shape" if rule.wiring == "layerwise" else "(outputs, features)"
    moves = "learned" if rule.learned else "fresh in every pass" if rule.fresh else "W's signs now" if rule.magnitudes \
        else "moved by the rule" if _moves(rule) else "fixed"  # fmt: skip
    made = " of two factors" if rule.factors is not Rule.factors else ""
    return f"{shape}{made}; {moves}"


def _moves(rule: type[Rule]) -> bool:
    own = [
        rule.observe is not Rule.observe,
        rule.observe_error is not Rule.observe_error,
        rule.follow is not Rule.follow,
    ]
    return rule.adapts or any(own)


def _memory(name: str) -> str:
    """Numbers that a rule keeps at 784-1000-1000-10, over those of the weights: counted on the network itself."""
    model = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))
    weights = sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear))
    plain = {id(each) for each in (*model.parameters(), *model.buffers())}
    falign.convert(model, name, seed=0, example=torch.zeros(2, 784))
    kept = sum(each.numel() for each in (*model.parameters(), *model.buffers()) if id(each) not in plain)
    if kept < 100:
        return "a number a layer" if kept else "none"
    return f"{kept / weights:.2f} × W"


def _passes(rule: type[Rule]) -> str:
    if rule.answers_noise:
        return "and `mirror` now and then"
    if rule.follow is not Rule.follow:
        return "and a forward-mode one now and then"
    if rule.trained_layers is not None:
        return "backward through the last layer" + ("s" if rule.trained_layers > 1 else "")
    return "one forward, one backward"


def _transport(rule: type[Rule]) -> str:
    if rule.wiring == "none":
        return "of the last layers" if (rule.trained_layers or 0) > 1 else "none" if rule.trained_layers else "whole"
    return "none" if not rule.reads_weight else "signs" if rule.magnitudes else "slow"


def _attention(name: str, rule: type[Rule]) -> str:
    """Ask whether a transformer converts, and say how the error gets through attention."""
    x = torch.randn(2, 5, 8)
    problems = falign.check(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), name, example=x)
    if problems:
        return "refused"
    if rule.trained_layers is not None:
        return "–"
    return {"direct": "e B at every position", "layerwise": "exactly, B for q, k, v, o"}.get(rule.wiring, "exactly")


def _ours(docs: Path, name: str, network: str) -> str:
    with (docs / "benchmark" / "cells.csv").open(encoding="utf-8") as cells:
        for cell in csv.DictReader(cells):
            if (cell["row"], cell["network"]) == (name, network) and float(cell["runs"]) > 0:
                return f"{float(cell['accuracy']):.2f} ± {float(cell['half']):.2f}"
    return ""


def _published(name: str) -> str:
    """The value that is nearest to our own setting: on Fashion-MNIST if there is one, and read at its source if so."""
    path = Path(falign.__file__).parent / "papers" / "benchmark" / "published.csv"
    with path.open(encoding="utf-8") as values:
        rows = [row for row in csv.DictReader(values) if row["rule"] == name]
    if not rows:
        return ""
    data = ("fashion-mnist", "mnist", "cifar10", "cifar100", "imagenet")
    row = min(rows, key=lambda row: ("not checked" in row["provenance"], data.index(row["data"])))
    deviation = f" ± {float(row['sd']):g}" if row["sd"] else ""
    unsure = ", not checked" if "not checked" in row["provenance"] else ""
    return (
        f"{float(row['value']):g}{deviation} ({row['network']}, {row['data']}; {row['source'].split(',')[0]}{unsure})"
    )


def _source(rule: type[Rule]) -> str:
    """Author and year from the docstring."""
    text = " ".join(inspect.getdoc(rule).split("Source:")[1].split("\n\n")[0].split())
    found = re.match(r"(.*?\b(?:19|20)\d\d)", text)
    return (found[1].rpartition("(")[2] if found else text.split(".")[0]).replace("``", "`")
