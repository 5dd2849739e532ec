"""Four rules on the digits that scikit-learn ships: ``python -m falign.lab.demo``."""

import sys
from pathlib import Path

import torch

from falign.lab import _compare
from falign.lab._compare import comparison_figure
from falign.lab._files import atomic_write
from falign.lab._text import print_plain, standard_console
from falign.lab._train import train
from falign.lab.config import TrainConfig
from falign.lab.report._figures import png

__all__ = ["main"]

_RULES = ("bp", "fa", "dfa", "usf")


def main(out: Path = Path("runs/demo")) -> None:
    """Train the same network by four rules, print the comparison, and write the pictures.

    Args:
        out: A folder; each rule gets a run folder in it, and what an earlier demonstration wrote is replaced.
    """
    torch.set_num_threads(1)  # for so small a network two only wait for each other
    console = standard_console()
    folders = [out / rule for rule in _RULES]
    for rule, folder in zip(_RULES, folders, strict=True):
        console.rule(rule)
        config = TrainConfig("digits", model="mlp:64-128-128-10", rule=rule, epochs=20, batch_size=32)
        train(config, folder, replaces=True, console=console)
    runs = _compare.read(folders)
    _compare.show(runs, console)
    picture = out / "comparison.png"
    atomic_write(picture, png(comparison_figure(runs)))
    print_plain(console, f"comparison: {picture}")
    for folder in folders:
        print_plain(console, f"{folder.name}: loss, accuracy and angles in {folder}")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))
