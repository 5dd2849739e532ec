"""A run that was stopped goes on to the same numbers as one that was not."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import begin, go_on, numbers, same

from falign import ALL_RULES
from falign.lab import train as train_module
from falign.lab.config import ConfigError, TrainConfig
from falign.lab.learner import Learner
from falign.lab.packing import axes_by_stride
from falign.lab.runs import Run
from falign.lab.writing import RunError

OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "weight_decay": 1e-3},
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw"},
}


pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def config(**options) -> TrainConfig:
    fixed = {"dataset": "digits", "model": "mlp:64-24-16-10", "epochs": 3, "batch_size": 100}
    return TrainConfig(**{**fixed, **options})


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch):
    """Sends a real SIGINT to this process while it makes its step number ``step``."""
    step = Learner.step

    def arm(number: int) -> None:
        def armed(learner: Learner, x: torch.Tensor, y: torch.Tensor, done: int) -> tuple[float, int]:
            if done + 1 == number:
                signal.raise_signal(signal.SIGINT)
            return step(learner, x, y, done)

        monkeypatch.setattr(Learner, "step", armed)

    return arm


NETWORK = """
from torch import nn

def network(shape, classes):
    return nn.Sequential(
        nn.Conv2d(shape[0], 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(144, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, classes),
    )
"""

CASES = [
    *((rule, "sgd", {}) for rule in ALL_RULES),
    *((rule, "adam", {}) for rule in ("bp", "kp", "adafa", "brsf", "drtp")),
    ("kp", "adamw", {}),
    ("brsf", "sgd", {"feedback": "shared"}),
    ("fa", "sgd", {"feedback": "shared", "dtype": "float64"}),
    ("fa", "sgd", {"ridge": 0.1, "ridge_schedule": "exponential", "ridge_steps": 10.0}),
    ("fa", "sgd", {"rate_decay": 0.5, "ridge": 0.1}),
    ("dfa", "sgd", {"autocast": "bf16"}),
    ("dfa", "sgd", {"model": "networks_with_dropout:network"}),
]


@pytest.mark.parametrize(("rule", "optimizer", "options"), CASES, ids=lambda value: str(value))
def test_interrupted_within_an_epoch_and_resumed(
    rule: str, optimizer: str, options: dict, tmp_path: Path, interrupt_at, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "networks_with_dropout.py").write_text(NETWORK)
    options = config(rule=rule, measure_every=7, **{**OPTIMIZERS[optimizer], **options})
    begin(options, tmp_path / "whole")
    interrupt_at(22)
    outcome = begin(options, tmp_path / "parts")
    assert (outcome.status, outcome.step) == ("interrupted", 22)
    assert "--resume" in outcome.message
    torch.manual_seed(99)  # nothing may come from the process's own generator
    assert go_on(tmp_path / "parts").status == "done"
    assert same(tmp_path / "parts", tmp_path / "whole")


def test_dropout_depends_on_the_seed_of_the_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "networks_with_dropout.py").write_text(NETWORK)
    found = []
    for process, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(process)
        begin(config(model="networks_with_dropout:network", epochs=1, seed=seed), tmp_path / f"{process}-{seed}")
        found.append(tmp_path / f"{process}-{seed}")
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


CHANNELS_LAST = """
import torch
from torch import nn

def network(shape, classes):
    layers = [nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, classes)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)
"""


@pytest.mark.parametrize("rule", ["fa", "brsf", "kp"])
def test_a_model_in_channels_last_stays_so(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "networks_in_channels_last.py").write_text(CHANNELS_LAST)
    options = config(model="networks_in_channels_last:network", rule=rule, feedback="orthogonal", learning_rate=0.01)
    kept: list[Learner] = []
    ended = train_module.end

    def keep(run, learner, *rest, **options):
        kept.append(learner)
        return ended(run, learner, *rest, **options)

    monkeypatch.setattr(train_module, "end", keep)
    begin(options, tmp_path / "whole")
    begin(replace(options, epochs=1), tmp_path / "parts")
    go_on(tmp_path / "parts", epochs=options.epochs)
    whole, _, parts = kept
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
        first, second = (
            learner.optimizer.state[part]["momentum_buffer"] for learner, part in ((whole, one), (parts, other))
        )
        assert torch.equal(first, second)
        assert axes_by_stride(first.squeeze()) == axes_by_stride(second.squeeze())
    assert whole.model[2].weight.is_contiguous(memory_format=torch.channels_last)  # pyright: ignore


def test_resumed_at_the_end_of_an_epoch_with_more_epochs(tmp_path: Path) -> None:
    begin(config(rule="kp", epochs=4, **OPTIMIZERS["sgd"]), tmp_path / "whole")
    begin(config(rule="kp", epochs=2, **OPTIMIZERS["sgd"]), tmp_path / "parts")
    outcome = go_on(tmp_path / "parts", epochs=4)
    assert outcome.status == "done"
    assert same(tmp_path / "parts", tmp_path / "whole")
    checkpoints = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert checkpoints == ["checkpoint-00000045.safetensors", "checkpoint-00000060.safetensors"]


def test_a_run_that_lost_its_checkpoints_is_not_begun_again_unasked(tmp_path: Path) -> None:
    begin(config(), tmp_path / "run")
    for path in (tmp_path / "run").glob("*.safetensors"):
        path.unlink()
    before = numbers(tmp_path / "run")
    with pytest.raises(RunError, match="no checkpoint left to go on from"):
        go_on(tmp_path / "run", epochs=9)
    assert all(before[name].equals(table) for name, table in numbers(tmp_path / "run").items())


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path, monkeypatch) -> None:
    begin(config(), tmp_path / "whole")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(config(), tmp_path / "parts")
    assert go_on(tmp_path / "parts").status == "done"
    assert same(tmp_path / "parts", tmp_path / "whole")


def test_a_complete_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    begin(config(epochs=1), tmp_path)
    before = numbers(tmp_path)
    outcome = go_on(tmp_path)
    assert "--epochs" in outcome.message
    after = numbers(tmp_path)
    assert before.keys() == after.keys()
    assert all(after[name].equals(before[name]) for name in before)


def test_fewer_epochs_than_done_are_refused(tmp_path: Path) -> None:
    begin(config(epochs=2), tmp_path)
    with pytest.raises(ConfigError, match=r"--epochs is 1, .* is in epoch 2"):
        go_on(tmp_path, epochs=1)


def test_other_data_are_refused(tmp_path: Path) -> None:
    begin(config(epochs=1), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"data_sha256": "', '"data_sha256": "0'))
    with pytest.raises(RunError, match="digits is not the data"):
        go_on(tmp_path)


def test_ctrl_c_in_a_process_of_its_own(tmp_path: Path) -> None:
    options = config(model="mlp:64-12-10", rule="brsf", batch_size=8, learning_rate=1e-3)
    words = [
        "train",
        "digits",
        "--model",
        options.model,
        "--rule",
        "brsf",
        "--batch-size",
        "8",
        "--lr",
        "1e-3",
    ]
    code = "import sys, torch; torch.set_num_threads(1); from falign.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--epochs", "100000", "--out", str(tmp_path / "parts")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.lstrip().startswith("epoch") and line.split()[1].startswith("1/"):
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted after step" in said
    assert f"--resume {tmp_path / 'parts'}" in said
    assert "Traceback" not in said
    status = Run(tmp_path / "parts").read_status()
    assert status["status"] == "interrupted"
    assert go_on(tmp_path / "parts", epochs=status["epoch"] + 1).status == "done"
    begin(replace(options, epochs=status["epoch"] + 1), tmp_path / "whole")
    assert same(tmp_path / "parts", tmp_path / "whole")
