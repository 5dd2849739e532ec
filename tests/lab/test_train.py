"""Runs on the digits: what every rule reaches, what is written, and where the numbers come from."""

import json
import re
import warnings
from contextlib import suppress
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from training_runs import quiet

from cases import TWINS
from falign import ALL_RULES
from falign.lab._batches import prepare
from falign.lab._learner import make_learner
from falign.lab._models import build
from falign.lab._train import default_folder, train
from falign.lab._validate import resolve
from falign.lab.config import ConfigError, TrainConfig
from falign.lab.data import load
from forks import run_each

MODEL = "mlp:64-64-10"

#: Test accuracy after six epochs; measured: 0.917 (adafa) to 0.936, drtp 0.886.
RULES = [name for name, rule in ALL_RULES.items() if rule.trained_layers is None]
REACHED = dict.fromkeys(RULES, 0.88) | {"drtp": 0.80}


pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def config(**options) -> TrainConfig:
    return TrainConfig(**{"dataset": "digits", "model": MODEL, "epochs": 2, **options})


@pytest.mark.parametrize("rule", [pytest.param(r, marks=pytest.mark.slow if r in TWINS else ()) for r in RULES])
def test_every_rule_learns_the_digits(rule: str, tmp_path: Path) -> None:
    options = {"scale": 0.3} if rule == "drtp" else {}
    outcome = train(config(rule=rule, epochs=6, **options), tmp_path, console=quiet())
    records = outcome.run.read_records()
    assert outcome.status == "done"
    assert records["test_accuracy"][-1] >= REACHED[rule]
    assert records["train_loss"][-1] < records["train_loss"][1]
    assert records["angle_fc2"][-1] == pytest.approx(0, abs=1e-3)
    assert (records["angle_fc1"][-1] < 1e-3) == (rule == "bp")
    assert records["angle_fc1"][-1] < 90


@pytest.mark.parametrize(("rule", "trained"), [("frozen", {"fc3"}), ("shallow", {"fc2", "fc3"})])
def test_references_train_the_last_layers_alone(rule: str, trained: set[str], tmp_path: Path) -> None:
    three = "mlp:64-20-16-10"
    outcome = train(config(rule=rule, model=three, learning_rate=0.2), tmp_path, console=quiet())
    first, last = (load_file(path) for path in sorted(tmp_path.glob("checkpoint-*.safetensors")))
    weights = [name for name in first if name.startswith("model.")]
    moved = {name.split(".")[1] for name in weights if not torch.equal(first[name], last[name])}
    assert moved == trained
    assert sum(name.startswith("optimizer.") for name in last) == 2 * len(trained)
    assert outcome.run.read_records()["test_accuracy"][-1] > 0.4


def test_what_a_run_folder_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with pictures
    outcome = train(config(measure_every=10), tmp_path, console=quiet())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy.png",
        "alignment.parquet",
        "angles.png",
        "checkpoint-00000023.safetensors",
        "checkpoint-00000046.safetensors",
        "config.json",
        "dominance.png",
        "loss.png",
        "neurons.parquet",
        "neurons.png",
        "records.parquet",
        "status.json",
    ]
    records = pl.read_parquet(tmp_path / "records.parquet")
    assert records.columns == [
        *("step", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
        *("angle_fc1", "angle_fc2", "dominance", "descent", "unreadable", "seconds"),
    ]
    assert records["step"].to_list() == [0, 10, 20, 23, 30, 40, 46]
    assert records["epoch"].to_list() == pytest.approx(
        [0, 640 / 1437, 1280 / 1437, 1, 1 + 448 / 1437, 1 + 1088 / 1437, 2]
    )
    tested = [step for step, loss in records.select("step", "test_loss").iter_rows() if loss is not None]
    assert tested == [0, 23, 46], "the test set is seen at the ends of epochs only"
    assert records["train_loss"].null_count() == 1, "before the first step there is no training loss"
    written = json.loads((tmp_path / "config.json").read_text())
    assert TrainConfig(**written["config"]) == resolve(config(measure_every=10))
    assert written["provenance"].keys() >= {
        "falign",
        "packages",
        "git",
        "threads",
        "device",
        "platform",
        "started",
    }
    assert json.loads((tmp_path / "status.json").read_text())["status"] == outcome.status == "done"


def test_measuring_more_often_changes_no_number(tmp_path: Path) -> None:
    often = train(config(rule="brsf", measure_every=3), tmp_path / "often", console=quiet()).run.read_records()
    seldom = train(config(rule="brsf"), tmp_path / "seldom", console=quiet()).run.read_records()
    often = often.filter(pl.col("test_loss").is_not_null())
    assert often.drop("seconds").equals(seldom.drop("seconds"))


def test_rules_start_from_the_same_weights_and_see_the_same_batches(tmp_path: Path) -> None:
    """A learning rate that changes next to nothing shows the batches: the losses of an epoch are equal."""
    weights, losses = [], []
    for rule in ("bp", "fa", "dfa", "kp"):
        options = resolve(config(rule=rule, learning_rate=1e-12, epochs=1))
        learner = make_learner(options, shape=(1, 8, 8), classes=10, example=torch.zeros(2, 1, 8, 8))
        weights.append(learner.model.get_parameter("fc1.weight"))
        losses.append(train(options, tmp_path / rule, console=quiet()).run.read_records()["train_loss"][1])
    assert all(torch.equal(weights[0], other) for other in weights)
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-6)


def test_feedback_that_never_meets_the_weights_is_told_once(tmp_path: Path) -> None:
    """In the description; PyTorch users get a warning of it at the optimizer's first step, which would say it again."""
    console = quiet()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train(config(rule="kp", epochs=1), tmp_path, console=console)
    assert [str(each.message) for each in warned] == []
    assert console.file.getvalue().count("never meets the weights") == 1


def test_the_test_is_in_evaluation_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "network_with_dropout_only.py").write_text(
        "from torch import nn\n"
        "def network(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Dropout(0.5), nn.Linear(20, 10))"
    )
    monkeypatch.chdir(tmp_path)
    options = resolve(config(model="network_with_dropout_only:network"))
    learner = make_learner(options, shape=(1, 8, 8), classes=10, example=torch.zeros(2, 1, 8, 8))
    _, test = prepare(load("digits"), device=torch.device("cpu"), dtype=torch.float32)
    loss, accuracy = learner.test(test)
    assert learner.model.training
    x, y = test.take(slice(None))
    output = learner.model.eval()(x)
    assert loss == pytest.approx(nn.functional.cross_entropy(output, y).item(), rel=1e-5)
    assert accuracy == (output.argmax(1) == y).double().mean().item()


def test_seeds_differ_in_weights(tmp_path: Path) -> None:
    one, other = (build(MODEL, shape=(1, 8, 8), classes=10, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.get_parameter("fc1.weight"), other.get_parameter("fc1.weight"))


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(config(epochs=1), tmp_path, console=quiet())
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_of_a_fixed_rule_loads_into_the_plain_network(tmp_path: Path) -> None:
    train(config(rule="dfa"), tmp_path, console=quiet())
    tensors = load_file(tmp_path / "checkpoint-00000046.safetensors")
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    build(MODEL, shape=(1, 8, 8), classes=10, seed=3).load_state_dict(state)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float64"},
        {"autocast": "bf16"},
        {"autocast": "bf16", "rule": "drtp", "scale": 0.3},
        {"feedback": "shared"},
        {"feedback": "low-rank(4)", "rule": "dfa", "scale": 0.5},
        {"rule": "adafa", "adafa_rate": 1.0, "optimizer": "adam"},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"activation": "tanh"},
        {"ridge": 0.1, "ridge_schedule": "cutoff", "ridge_steps": 20.0},
    ],
    ids=str,
)
def test_options_train(options: dict, tmp_path: Path) -> None:
    records = train(config(**options), tmp_path, console=quiet()).run.read_records()
    assert records["test_accuracy"][-1] > 0.5
    assert records["test_loss"][-1] < records["test_loss"][0]


def test_the_learning_rate_falls_from_epoch_to_epoch(tmp_path: Path) -> None:
    options = resolve(config(rate_decay=0.5, learning_rate=0.08))
    learner = make_learner(options, shape=(1, 8, 8), classes=10, example=torch.zeros(2, 1, 8, 8))
    for epoch, expected in ((0, 0.08), (1, 0.04), (3, 0.01)):
        learner.begin_epoch(epoch)
        assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    still = train(config(rate_decay=1e-12, epochs=3), tmp_path, console=quiet()).run.read_records()
    assert still["test_loss"][0] != still["test_loss"][1]
    assert still["test_loss"][3] == pytest.approx(still["test_loss"][1], rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("linear", [0.08, 0.06, 0.04, 0.02]), ("cosine", [0.08, 0.0682843, 0.04, 0.0117157])]
)
def test_the_learning_rate_follows_a_schedule(schedule: str, expected: list[float]) -> None:
    options = resolve(config(rate_schedule=schedule, learning_rate=0.08, epochs=4))
    learner = make_learner(options, shape=(1, 8, 8), classes=10, example=torch.zeros(2, 1, 8, 8))
    for epoch, rate in enumerate(expected):
        learner.begin_epoch(epoch)
        assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-5)


def test_a_decay_that_a_schedule_has_no_use_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--rate-decay 0\.5 has no effect under --rate-schedule linear"):
        resolve(config(rate_schedule="linear", rate_decay=0.5))


def test_no_epochs_measures_the_beginning(tmp_path: Path) -> None:
    records = train(config(epochs=0), tmp_path, console=quiet()).run.read_records()
    assert records.height == 1
    assert records["train_loss"].to_list() == [None]


def test_lines_without_a_terminal(tmp_path: Path) -> None:
    console = quiet()
    train(config(), tmp_path, console=console)
    lines = console.file.getvalue().splitlines()
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line.split()[1] for line in epochs] == ["0/2", "1/2", "2/2"]
    assert all(word in epochs[-1] for word in ("loss", "train", "test", "angles fc1", "fc2 0°"))
    assert "\x1b" not in console.file.getvalue()


def test_default_folder_names_the_run() -> None:
    fixed = {"dataset": "digits", "model": MODEL}
    assert default_folder(TrainConfig(**fixed, rule="dfa", seed=3)) == Path("runs/digits-mlp-64-64-10-dfa-3")
    explicit = TrainConfig(**fixed, learning_rate=0.01, momentum=0.9)
    assert default_folder(explicit) == default_folder(TrainConfig(**fixed))
    several = TrainConfig(**fixed, epochs=2, optimizer="adam", learning_rate=0.1, check_law=True, weight_decay=1e-5)
    words = "epochs=2-optimizer=adam-lr=0.1-weight-decay=1e-05-check-law"
    assert default_folder(several).name == f"digits-mlp-64-64-10-fa-0-{words}"


#: Beside the defaults, values of every option, some of which no file name can hold or tell from another.
VALUES: dict[str, list] = {
    "dataset": [
        "digits",
        "mnist",
        "mnist-10k",
        "/a/Digits",
        "/b/Digits",
        "/b/digits",
        "/b/digits-mlp-64-64-10-fa-0",
        "ä",
    ],
    "model": [
        MODEL,
        "mlp:64-64-64-10",
        "lenet",
        "my.networks:Small",
        "my.networks:small",
        "my-networks:small",
        "my:networks.small",
    ],
    "rule": ["fa", "dfa", "bp"],
    "feedback": ["low-rank(4)", "low-rank(5)", "sparse(4)", "orthogonal"],
    "scale": [0.1, 0.1 + 1e-15, 10.0],
    "epochs": [1, 11, 100],
    "optimizer": ["adam", "adamw"],
    "learning_rate": [0.1, 0.10000000000000002, 1e-7],
    "momentum": [0.0, 0.5],
    "batch_size": [1, 640],
    "seed": [0, 1, -1, 10],
    "activation": ["tanh", "gelu"],
    "check_law": [True],
    "tensorboard": [True],
    "measure_every": [1, 64],
    "autocast": ["bf16"],
    "dtype": ["float64"],
}


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in VALUES.items()}), min_size=2))
def test_two_configurations_never_have_one_default_folder(several: list[dict]) -> None:
    names: dict[str, TrainConfig] = {}
    for options in several:
        with suppress(ConfigError):  # a combination that there is not
            found = resolve(TrainConfig(**{"dataset": "digits", "model": MODEL, **options}))
            name = default_folder(found).name
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}", name)
            assert names.setdefault(name.lower(), found) == found


@pytest.mark.parametrize("dataset", ["/" + "x" * 250, "/data/" + "ß" * 100, "...", "/", "-", "/tmp/a b", "/tmp/\udcfc"])
def test_any_data_set_gives_a_name_that_a_folder_can_have(dataset: str) -> None:
    name = default_folder(TrainConfig(dataset, model="mlp:" + "-".join(["100"] * 80))).name
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}", name)


_LIGHT = """
import sys
from falign.cli import main

assert main(["train", "digits", "--model", "mlp:64-6-10", "--epochs", "1", "--out", "light"]) == 0
heavy = {"sklearn", "scipy.stats", "sympy", "torch._dynamo"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_a_training_imports_nothing_that_takes_seconds_for_nothing(tmp_path: Path) -> None:
    (done,) = run_each([_LIGHT], tmp_path)
    assert done.returncode == 0, done.stderr
