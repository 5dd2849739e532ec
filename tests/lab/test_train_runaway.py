"""Runs whose loss stays finite and far above where it began, and runs that only look like them for a while."""

import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from training_runs import begin, go_on, numbers, quiet, same, sealed_json

from falign.cli import main
from falign.lab import _compare
from falign.lab._divergence import Baseline, Diverged
from falign.lab._files import RunError
from falign.lab.config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def config(**options) -> TrainConfig:
    fixed = {"dataset": "digits", "model": "mlp:64-64-64-10", "rule": "dfa", "learning_rate": 1.0, "epochs": 6}
    return TrainConfig(**{"probe_size": 64, **fixed, **options})


def test_a_loss_that_stays_far_above_its_start_is_a_divergence(tmp_path: Path) -> None:
    outcome = begin(config(), tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    assert outcome.status == status["status"] == "diverged"
    assert (status["step"], status["what"], status["layer"]) == (outcome.step, "loss", "fc3")
    records = outcome.run.read_records()
    last = records["train_loss"][-1]
    assert math.isfinite(last)
    assert last > 100
    assert records["step"][-1] == outcome.step == 6 * 23, "records are kept"
    assert "that it began with, at its end; the weights of layer 'fc3' grew most, to " in outcome.message
    for word in ("below 1 (--learning-rate)", "--scale", "--activation such as tanh, it is relu", "--rule"):
        assert word in outcome.message
    with pytest.raises(RunError, match=r"cannot go on: the run diverged at step 138: its training loss runs at"):
        go_on(tmp_path, epochs=9)


def test_it_is_stopped_after_two_hundred_steps(tmp_path: Path) -> None:
    outcome = begin(config(epochs=100, learning_rate=0.3, scale=0.3), tmp_path)
    assert outcome.status == "diverged"
    assert 200 < outcome.step < 300
    assert "after 200 steps above 10 times" in outcome.message
    assert outcome.run.read_records()["step"][-1] == outcome.step - outcome.step % 23


def test_convolutions_that_run_away_finitely(data_folder: Path, tmp_path: Path) -> None:
    """What `falign train fashion-mnist --model lenet --rule dfa` did, at once."""
    options = config(dataset="fashion-mnist", model="lenet", scale=10.0, learning_rate=0.03, epochs=1)
    outcome = begin(options, tmp_path)
    assert outcome.status == "diverged"
    assert 200 < outcome.step < 938


def test_the_command_ends_with_one_and_the_comparison_shows_no_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "digits", "--model", "mlp:64-64-64-10", "--rule", "dfa", "--epochs", "6", "--probe-size", "64"]
    assert main([*words, "--lr", "1", "--out", "away"]) == 1
    assert "the run diverged at step 138: its training loss runs at" in capsys.readouterr().err
    assert main([*words, "--lr", "0.01", "--out", "fine"]) == 0
    assert main(["train", "--resume", "away"]) != 0
    assert "cannot go on: the run diverged at step 138" in capsys.readouterr().err
    console = quiet()
    _compare.show(_compare.read([Path("away"), Path("fine")]), console)
    away, fine = (line.split() for line in _lines(console) if line.split()[:1] in (["away"], ["fine"]))
    assert away[1:4] == ["6", "—", "—"]
    assert away[-4:] == ["diverged", "at", "step", "138"]
    assert float(fine[2]) > 50
    assert fine[-1] == "done"


def _lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


def test_an_interrupted_run_finds_the_same(tmp_path: Path) -> None:
    begin(config(), tmp_path / "whole")
    begin(config(epochs=2), tmp_path / "parts")
    sealed_json(tmp_path / "parts" / "status.json", lambda content: content.update(status="interrupted"))
    outcome = go_on(tmp_path / "parts", epochs=6)
    assert outcome.message == begin(config(), tmp_path / "again").message
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert numbers(tmp_path / "whole").keys() == {"records.parquet", "alignment.parquet", "neurons.parquet"}


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "usf", "learning_rate": 1.0, "epochs": 8},  # single batches of a thousand times the initial loss
        {"rule": "bp", "learning_rate": 3.0, "momentum": 0.0, "epochs": 10},  # runs at thirty times for ten steps
        {"rule": "bp", "learning_rate": 0.3},
        {"rule": "bp", "optimizer": "adam", "learning_rate": 0.1, "momentum": None},
        {"rule": "dfa", "activation": "tanh", "learning_rate": 0.3},
        {"rule": "fa", "learning_rate": 0.01, "batch_size": 4, "epochs": 1},
    ],
    ids=str,
)
def test_rough_trainings_that_come_back_are_let_go_on(options: dict, tmp_path: Path) -> None:
    outcome = begin(config(**options), tmp_path)
    assert outcome.status == "done"


def course(losses: list[float], tested: float = 2.3) -> list[float]:
    baseline, level, found = Baseline(classes=10, weight_norms={}), 0.0, []
    for loss in losses:
        level = baseline.update_level(level, loss, tested)
        found.append(level)
    return found


def test_what_counts_is_where_the_loss_runs() -> None:
    assert max(course([2.3] * 100)) < 0.01
    assert max(course([2.3, 1e4, *[2.3] * 50])) < math.log(2), "one batch of four thousand times"
    assert max(course([0.0] * 50 + [1e5])) < math.log(2)
    assert course([2.3, 40.0] * 100)[-1] > math.log(2), "every other one of seventeen times"
    assert course([1e13] * 40)[-1] > math.log(10)
    assert course([5.0] * 100, tested=50.0)[-1] < 0, "it began higher"
    assert course([5.2] * 100)[-1] > math.log(2)


def test_growth_is_of_norms_and_layers_of_zeros_have_none() -> None:
    import torch
    from torch import nn

    from falign.lab._divergence import weight_norms

    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[3].weight)
    baseline = Baseline(classes=2, weight_norms=weight_norms(model, ["0", "2", "3"]))
    with torch.no_grad():
        model[2].weight.mul_(1e30)
        model[3].weight.fill_(1.0)
    layer, factor = baseline.most_grown(model)
    assert layer == "2"
    assert factor == pytest.approx(1e30)
    assert isinstance(Diverged(step=3, layer="2", what="loss", how="it ran"), Exception)
