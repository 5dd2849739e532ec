"""Steps of the field's table on a GPU, recorded and replayed, beside the same steps without: time, and weights after.

Prints a line for every network and row: milliseconds of a training step without and with a recording, whether it was
recorded, and the largest difference of a parameter afterwards, relative to its norm.
"""

import argparse
from time import perf_counter

import torch

from falign.lab.experiment import Setting
from falign.papers.benchmark._training import NETWORKS, ROWS, Cell, Trained, needs_enlarging, split_images, train


def trained(cell: Cell, rate: float, *, graphs: bool) -> tuple[Trained | None, float]:
    """Train with or without recordings; the network and the seconds of a step."""
    torch.manual_seed(0)  # of the passes of wm, fdfa and grape
    torch.cuda.synchronize()
    begin = perf_counter()
    result = train(cell, rate, graphs=graphs)
    torch.cuda.synchronize()
    return result, (perf_counter() - begin) / (cell.epochs * -(-len(cell.split.train) // 64))


def main() -> None:
    """Print a line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--images", type=int, default=0)
    chosen = parser.parse_args()
    setting = Setting(device="cuda")
    for network in chosen.networks:
        enlarged = needs_enlarging(network, chosen.dataset, setting)
        split = split_images(chosen.dataset, setting, images=chosen.images, enlarged=enlarged)
        for row in chosen.rows:
            cell = Cell(
                dataset=chosen.dataset,
                network=network,
                row=row,
                width=NETWORKS[network].width,
                epochs=2,
                seed=0,
                device="cuda",
                split=split,
            )
            (plain, slow), (fast, quick) = (trained(cell, 0.01, graphs=graphs) for graphs in (False, True))
            apart = "diverged"
            if plain is not None and fast is not None:
                pairs = zip(plain.learner.model.parameters(), fast.learner.model.parameters(), strict=True)
                apart = f"{max(float((a - b).norm() / (a.norm() + 1e-12)) for a, b in pairs):.1e}"
            said = "recorded" if fast is not None and fast.recorded else "not recorded"
            print(f"{network:11} {row:15} {1000 * slow:7.3f} {1000 * quick:7.3f} ms  {said}  apart {apart}", flush=True)


if __name__ == "__main__":
    main()
