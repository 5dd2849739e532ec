"""Delayed recall with an LSTM and a GRU under each rule: accuracy of the last step.

A sequence is noise of deviation 0.1 in four channels. At its first step one of three channels has a one in addition;
at its last, ``delay`` steps later, the fourth has, which asks: which was it? Only the loss of the last step counts, and
chance is a third. The network is ``nn.LSTM`` or ``nn.GRU`` of 32 units with a linear layer behind every state; outputs
are (batch, time, 3), so that direct rules carry the error of step k to the products of step k. A run is 400 steps of
Adam on fresh sequences.

Every row gets the same learning rates; the best on sequences of its own with seed 0 is then run with the other seeds.
Every run is a line of ``--out``, written as it ends; called again, the script makes only what is missing. ``--table``
prints what docs/transformers.md shows.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import falign
from tuned import Runs, spread

SYMBOLS = 3
DELAYS = (7, 11)
NOISE = 0.1
HIDDEN = 32
BATCH = 32
STEPS = 400
RATES = (3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
NETWORKS = {"lstm": nn.LSTM, "gru": nn.GRU}
ROWS = {
    "bp": "backpropagation",
    "kp": "`kp`",
    "usf": "`usf`",
    "adafa": "`adafa`",
    "fa": "`fa`",
    "dfa": "`dfa`",
    "eprop": "`eprop`",
    "readout": "readout alone",
}


class Recaller(nn.Module):
    """A recurrent module and a linear layer behind every state.

    Args:
        kind: ``nn.LSTM`` or ``nn.GRU``.
    """

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.rnn = kind(SYMBOLS + 1, HIDDEN, batch_first=True)
        self.readout = nn.Linear(HIDDEN, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, symbols + 1) to (batch, time, symbols)."""
        return self.readout(self.rnn(x)[0])


def sequences(number: int, delay: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences (number, delay + 1, symbols + 1), and the symbols that they show."""
    symbol = torch.randint(SYMBOLS, (number,), generator=random)
    x = NOISE * torch.randn(number, delay + 1, SYMBOLS + 1, generator=random)
    x[torch.arange(number), 0, symbol] += 1
    x[:, -1, SYMBOLS] += 1
    return x, symbol


def train(network: str, delay: int, row: str, seed: int, rate: float) -> dict[str, float]:
    """Accuracies after a training, and the seconds that it took."""
    begin = time.perf_counter()
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Recaller(NETWORKS[network])
    if row == "readout":
        model.rnn.requires_grad_(False)
    example = sequences(BATCH, delay, random)[0]
    falign.convert(model, "bp" if row == "readout" else row, seed=seed, example=example)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(STEPS):
        x, symbol = sequences(BATCH, delay, random)
        optimizer.zero_grad()
        cross_entropy(model(x)[:, -1], symbol).backward()
        optimizer.step()
    with torch.no_grad():
        right = {
            part: round(float((model(x)[:, -1].argmax(-1) == symbol).double().mean()), 4)
            for part in ("validation", "test")
            for x, symbol in [sequences(2000, delay, random)]
        }
    return {**right, "seconds": round(time.perf_counter() - begin, 1)}


CANDIDATES = tuple({"rate": rate} for rate in RATES)


def score(line: Mapping[str, Any]) -> float:
    """What is tuned: the larger, the better."""
    return line["validation"]


def table(runs: Runs) -> Iterator[str]:
    """Lines of the table."""
    columns = tuple(product(DELAYS, NETWORKS))
    yield f"| rule | {' | '.join(f'{network.upper()}, delay {delay}' for delay, network in columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for row, title in ROWS.items():
        cells = []
        for delay, network in columns:
            lines = runs.best({"network": network, "delay": delay, "row": row}, CANDIDATES, score)
            cells.append(spread([line["test"] for line in lines], 2) if lines else "pending")
        yield f"| {title} | {' | '.join(cells)} |"


def main() -> None:
    """Make what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--delays", nargs="*", type=int, default=list(DELAYS))
    parser.add_argument("--out", type=Path, default=Path("docs/architectures/recall.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and train nothing")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    runs = Runs(chosen.out, train)
    for delay, network, row in () if chosen.table else product(chosen.delays, NETWORKS, chosen.rows):
        one = {"network": network, "delay": delay, "row": row}
        runs.tune(one, CANDIDATES, SEEDS, score)
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
