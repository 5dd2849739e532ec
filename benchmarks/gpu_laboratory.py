"""Stage 4 of ``gpu.py``: ``falign train`` and ``falign reproduce`` on the device. It needs the extra ``lab``."""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import polars as pl
import torch

from falign.lab._learner import Learner
from falign.lab.config import TrainConfig
from falign.lab.experiment._agreement import compare
from falign.lab.experiment._store import Store
from falign.papers import PAPERS
from gpu_correctness import of_tests
from gpu_record import Record, Row, Setting, check

runs = of_tests("training_runs", "tests/lab")

CLOSE = 1e-8
"""What the losses of some steps in float64 may differ by from the CPU's, relatively: rounding, grown by training."""
NETWORKS = {
    "mlp": {"model": "mlp:784-64-32-10"},
    "lenet": {"model": "lenet"},
    "lenet, bfloat16": {"model": "lenet", "autocast": "bf16"},
    "resnet20": {"model": "resnet20"},
    "dropout": {"model": "gpu_laboratory:dropping"},
}
OPTIMIZERS = {"kp": {"weight_decay": 1e-3}, "dfa": {"optimizer": "adam"}, "adafa": {"momentum": 0.0, "check_law": True}}


def dropping(shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """A network whose dropout and batch normalisation have states that a checkpoint must hold."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(shape[0], 6, 5), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Dropout(0.3),
        torch.nn.Flatten(), torch.nn.Linear(6 * 24 * 24, 32), torch.nn.Tanh(), torch.nn.Dropout(0.3),
        torch.nn.Linear(32, classes),
    )  # fmt: skip


@contextmanager
def interrupted_at(number: int) -> Iterator[None]:
    """Send this process an interrupt while it makes that step."""
    step = Learner.step

    def armed(learner: Learner, x: torch.Tensor, y: torch.Tensor, done: int) -> tuple[float, int]:
        if done + 1 == number:
            signal.raise_signal(signal.SIGINT)
        return step(learner, x, y, done)

    Learner.step = armed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Learner.step = step  # type: ignore[method-assign]


def _state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, feedback, the optimizer's and the generators' states; of the tables the measured ones are compared."""
    return {name: value for name, value in runs.checkpoint(checkpoint)[1].items() if not name.startswith("table.")}


def _unlike(one: Path, other: Path) -> float:
    """0 if two runs have the same tables and the same last checkpoint, to the bit; otherwise infinite."""
    same = bool(runs.numbers(one)) and runs.same(one, other)
    last, also = (_state(max(folder.glob("checkpoint-*"))) for folder in (one, other))
    same &= bool(last) and last.keys() == also.keys() and all(torch.equal(last[name], also[name]) for name in last)
    return 0.0 if same else float("inf")


def training_rows(setting: Setting, rule: str, network: str) -> list[Row]:
    """A run twice, and interrupted and resumed; of the MLP the losses in float64 beside the CPU's."""
    options = TrainConfig(
        dataset="mnist-10k", epochs=2, batch_size=500, rule=rule, device=str(setting.device), learning_rate=1e-3,
        measure_every=7, **NETWORKS[network], **OPTIMIZERS.get(rule, {}),
    )  # fmt: skip
    about = {"network": network}
    with tempfile.TemporaryDirectory() as place:
        once, again, resumed, there, here = (Path(place) / name for name in ("1", "2", "3", "4", "5"))
        runs.begin(options, once)
        runs.begin(options, again)
        with interrupted_at(13):
            runs.begin(options, resumed)
        stopped = _rows(resumed) < _rows(once)
        runs.go_on(resumed)
        rows = [
            check("the same command twice", _unlike(once, again), 0.0, **about),
            check("interrupted and resumed", _unlike(once, resumed) if stopped else float("nan"), 0.0, **about),
        ]
        if network == "mlp":
            exact = replace(options, dtype="float64", epochs=1)
            runs.begin(exact, there)
            runs.begin(replace(exact, device="cpu"), here)
            first, second = (_test_losses(folder) for folder in (there, here))
            worst = float(((first - second) / second).abs().max())
            rows.append(check("test losses of an epoch in float64 against the CPU", worst, CLOSE, **about))
    return rows


def _rows(folder: Path) -> int:
    return len(pl.read_parquet(folder / "records.parquet"))


def _test_losses(folder: Path) -> torch.Tensor:
    return pl.read_parquet(folder / "records.parquet")["test_loss"].drop_nulls().to_torch()


def paper_rows(setting: Setting, name: str) -> list[Row]:
    """A paper's experiments at their smallest, on the device and on the CPU: how many runs are equal, near or not."""
    with tempfile.TemporaryDirectory() as place:
        stores = []
        for device in (setting.device.type, "cpu"):
            words = ["reproduce", name, "--preset", "smoke", "--device", device, "--out", f"{place}/{len(stores)}"]
            done = subprocess.run([sys.executable, "-m", "falign", *words], capture_output=True, text=True, check=False)
            if done.returncode not in (0, 1):  # 1: a claim fails at these few runs
                raise RuntimeError(f"falign {' '.join(words)}: {done.stderr[-250:]}")
            stores.append(Store(folder=Path(place) / str(len(stores))))
        found = [compare(*stores, experiment) for experiment in PAPERS[name].experiments]
    return [
        {
            "what": "recomputed on the device: the same runs as on the CPU",
            "quantity": each.experiment.name,
            "equal": each.equal,
            "within": each.within,
            "beyond": each.beyond,
            "difference": each.worst[1] if each.worst else 0.0,
            "tolerance": each.experiment.agreement,
            "holds": each.beyond == 0 and each.equal + each.within > 0,
        }
        for each in found
    ]


def cases(record: Record, setting: Setting) -> None:
    """Trainings by rules that share no code, then every network, then the papers."""
    chosen = [(rule, "mlp") for rule in ("fa", "dfa", "kp", "adafa")] + [("fa", network) for network in NETWORKS]
    for rule, network in dict.fromkeys(chosen[:2] if setting.small else chosen):
        record.case(
            "training", rule, lambda rule=rule, network=network: training_rows(setting, rule, network), needs=15
        )
    for name in ("garg2022",) if setting.small else PAPERS:
        record.case("papers", name, lambda name=name: paper_rows(setting, name), needs=60)
