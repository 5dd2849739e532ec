"""Which scale of the feedback serves each rule: test accuracy over a grid of scale and learning rate.

For every rule and scale the best learning rate of a grid is taken, by the mean accuracy over seeds; the table shows
that best accuracy, so a scale is not credited with what a learning rate does. Two networks: an MLP and a small
convolutional network, on 10,000 images of Fashion-MNIST (``FALIGN_DATA`` or a download), momentum 0.9.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

import falign
from falign.lab.data import load

SCALES = (0.1, 0.3, 0.6, 1.0, 2.0, 4.0)
RATES = (0.003, 0.01, 0.03, 0.1)
RULES = [rule for rule in falign.ALL_RULES if rule != "bp"]


def networks() -> dict[str, nn.Module]:
    """The three networks."""
    return {
        "relu": nn.Sequential(
            nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        ),
        "tanh": nn.Sequential(
            nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)
        ),
        "conv": nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.Tanh(), nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.Tanh(),
            nn.Flatten(), nn.Linear(16 * 49, 64), nn.Tanh(), nn.Linear(64, 10),
        ),
    }  # fmt: skip


def accuracy(
    network: str, rule: str, scale: float | None, rate: float, seed: int, data: tuple[Tensor, ...], epochs: int
) -> float:
    """Test accuracy in per cent after training once; 0 where the loss is not finite."""
    x, y, test_x, test_y = data
    torch.manual_seed(seed)
    model = networks()[network]
    if rule != "bp":
        falign.convert(model, rule, seed=seed, scale=scale, example=x[:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-3 if rule == "kp" else 0.0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            if rule == "drtp":
                with falign.targets(model, y[batch]):
                    loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            else:
                loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            if not torch.isfinite(loss):
                return 0.0
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return 100 * (model(test_x).argmax(1) == test_y).float().mean().item()


def main() -> None:
    """Run the grid and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=list(networks()))
    parser.add_argument("--rules", nargs="*", default=RULES)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("scales.json"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    images = load("fashion-mnist")
    mean, std = images.mean_and_std()
    first = torch.randperm(60000, generator=torch.Generator().manual_seed(0))[:10000]

    def prepared(x: Tensor) -> Tensor:
        return ((x.float() - mean.float()) / std.float()).contiguous()

    data = (
        prepared(images.train_images[first]), images.train_labels[first],
        prepared(images.test_images[:5000]), images.test_labels[:5000],
    )  # fmt: skip
    rows = []
    for network, rule in product(chosen.networks, chosen.rules):
        for scale in SCALES if rule != "bp" else (None,):
            best = {}
            for rate in RATES:
                runs = [accuracy(network, rule, scale, rate, seed, data, chosen.epochs) for seed in range(chosen.seeds)]
                best[rate] = sum(runs) / len(runs)
            rate = max(best, key=best.get)
            rows.append(
                {"network": network, "rule": rule, "scale": scale, "rate": rate, "accuracy": round(best[rate], 2)}
            )
            print(f"{network:5} {rule:6} scale {scale} rate {rate} accuracy {best[rate]:.2f}", flush=True)
            chosen.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
