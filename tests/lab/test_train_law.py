"""``--check-law``: the conservation law watches a run, and says whether every step was the rule's."""

from pathlib import Path

import polars as pl
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from training_runs import begin, go_on, quiet, same

from falign.cli import main
from falign.lab._divergence import Diverged
from falign.lab._learner import Learner
from falign.lab._models import build
from falign.lab._pictures import law as picture
from falign.lab.config import TrainConfig

pytestmark = [pytest.mark.unchecked, pytest.mark.usefixtures("one_thread", "no_pictures")]

NETWORK = """
from torch import nn

def network(shape, classes):
    return nn.Sequential(
        nn.Conv2d(shape[0], 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, classes),
    )
"""


def config(**options) -> TrainConfig:
    fixed = {"dataset": "digits", "model": "mlp:64-24-16-10", "epochs": 2, "batch_size": 100, "momentum": 0.0}
    return TrainConfig(**{**fixed, "check_law": True, "dtype": "float64", "learning_rate": 0.05, **options})


def said(console: Console) -> str:
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def squares(weights: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    return 0.5 * weights[f"{layer}.weight"].square().sum(1) + 0.5 * weights[f"{layer}.bias"].square()


def test_the_table_holds_both_changes_of_every_neuron(tmp_path: Path) -> None:
    console = quiet()
    outcome = begin(config(measure_every=4), tmp_path, console)
    assert outcome.failure == ""
    assert outcome.run.read_status()["law"] == "holds"
    assert "conservation law after 30 steps: holds (2 layers of 2 checked" in said(console)
    table = pl.read_parquet(tmp_path / "law.parquet")
    before = dict(build("mlp:64-24-16-10", shape=(1, 8, 8), classes=10, seed=0).double().state_dict())
    tensors = load_file(outcome.run.checkpoints()[-1])
    after = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    for layer, target in (("fc1", "fc2"), ("fc2", "fc3")):
        own = table.filter(layer=layer)
        assert own["targets"].unique().to_list() == [target]
        assert own["status"].unique().to_list() == ["exact"]
        weights = squares(after, layer) - squares(before, layer)
        moved = after[f"{target}.weight"] - before[f"{target}.weight"]
        alignment = (tensors[f"feedback.{target}.feedback.B"] * moved).sum(0)
        assert own["weights"].to_list() == pytest.approx(weights.tolist(), abs=1e-7)
        assert own["alignment"].to_list() == pytest.approx(alignment.tolist(), abs=1e-7)
        assert own["drift"].to_list() == pytest.approx((weights - alignment).tolist(), abs=1e-7)
        assert own["residual"].abs().max() < 1e-14  # pyright: ignore[reportOperatorIssue]


CASES = [
    *(("fa", options) for options in ({}, {"weight_decay": 1e-3, "rate_decay": 0.5}, {"momentum": 0.9})),
    *((rule, {}) for rule in ("bp", "usf", "brsf", "frsf", "kp", "adafa", "dfa", "drtp")),
    ("fa", {"model": "network_of_a_law:network", "dtype": "float32"}),
    ("fa", {"optimizer": "adam", "momentum": None}),
    ("adafa", {"measure_every": 4}),
    ("fa", {"autocast": "bf16", "dtype": "float32"}),
]


@pytest.mark.parametrize(("rule", "options"), CASES, ids=str)
def test_a_resumed_run_knows_all_that_was_added_up(
    rule: str, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network_of_a_law.py").write_text(NETWORK)
    whole = begin(config(rule=rule, **options), tmp_path / "whole")
    begin(config(rule=rule, **{**options, "epochs": 1}), tmp_path / "parts")
    parts = go_on(tmp_path / "parts", epochs=2)
    assert same(tmp_path / "parts", tmp_path / "whole")
    drifts = "optimizer" in options or options.get("momentum")
    expected = "drift" if drifts else "none" if rule == "drtp" else "holds"
    assert parts.run.read_status()["law"] == whole.run.read_status()["law"] == expected


def test_a_resumed_run_that_does_nothing_more_says_the_same(tmp_path: Path) -> None:
    first, again = quiet(), quiet()
    begin(config(), tmp_path, first)
    before = pl.read_parquet(tmp_path / "law.parquet")
    go_on(tmp_path, again)
    report = said(first)[said(first).index("conservation law after") :]
    assert report in said(again)
    assert pl.read_parquet(tmp_path / "law.parquet").equals(before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": None}, "exact under plain SGD (--momentum 0): with momentum 0.9 it drifts"),
        ({"momentum": None, "optimizer": "adam"}, "exact under plain SGD: with adam it is reported as a drift"),
    ],
    ids=str,
)
def test_what_makes_it_a_drift_is_said_before(options: dict, words: str, tmp_path: Path) -> None:
    console = quiet()
    outcome = begin(config(**options, learning_rate=1e-3), tmp_path, console)
    assert words in said(console).split("epoch ")[0]
    assert outcome.failure == "", "a drift that was to be expected is no failure"


def test_plain_sgd_needs_no_words(tmp_path: Path) -> None:
    console = quiet()
    begin(config(epochs=0), tmp_path, console)
    assert "exact under" not in said(console)
    assert "the conservation law was not checked: no step was made" in said(console)
    assert not (tmp_path / "law.parquet").exists()


def test_an_update_that_is_not_the_rules_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Learner.step

    def wrong(learner: Learner, x: torch.Tensor, y: torch.Tensor, done: int) -> tuple[float, int]:
        found = step(learner, x, y, done)
        if done == 7:
            with torch.no_grad():
                learner.model.get_parameter("fc1.weight")[3] *= 1.001
        return found

    monkeypatch.setattr(Learner, "step", wrong)
    words = ["train", "digits", "--model", "mlp:64-24-16-10", "--momentum", "0", "--check-law", "--out"]
    code = main([*words, str(tmp_path / "run"), "--epochs", "1"])
    shown = capsys.readouterr()
    assert code == 1
    assert "IS BROKEN" in shown.out
    assert shown.err.startswith("falign: the conservation law does not hold for layer 'fc1', off by")
    assert len(shown.err.splitlines()) == 1
    table = pl.read_parquet(tmp_path / "run" / "law.parquet").filter(layer="fc1")
    assert table["residual"].abs().arg_max() == 3
    main([*words, str(tmp_path / "bp"), "--rule", "bp", "--epochs", "0"])
    capsys.readouterr()
    main(["compare", str(tmp_path / "run"), str(tmp_path / "bp"), "--out", str(tmp_path / "both.png")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert any(row[:1] == ["run"] and row[-2:] == ["fails", "done"] for row in rows)
    assert any(row[:1] == ["bp"] and row[-3:] == ["not", "checked", "done"] for row in rows)


@pytest.mark.parametrize("finite", [True, False])
def test_a_diverged_run_ends_as_ever(finite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if finite:
        step = Learner.step

        def broken(learner: Learner, x: torch.Tensor, y: torch.Tensor, done: int) -> tuple[float, int]:
            if done == 5:
                raise Diverged(step=6, layer="fc3", what="loss")
            return step(learner, x, y, done)

        monkeypatch.setattr(Learner, "step", broken)
    console = quiet()
    outcome = begin(config() if finite else config(learning_rate=1e45, dtype="float32"), tmp_path, console)
    assert outcome.status == "diverged"
    words = "conservation law after 5 steps: holds" if finite else "law was not checked: the run diverged"
    assert words in said(console)
    assert (tmp_path / "law.parquet").exists() == finite


def test_the_law_is_as_good_where_batch_norm_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that measure are none of the training's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network_of_a_law.py").write_text(NETWORK)
    options = config(model="network_of_a_law:network", measure_every=4)
    outcome = begin(options, tmp_path / "run")
    table = pl.read_parquet(tmp_path / "run" / "law.parquet")
    status = dict(table.select("layer", "status").unique().iter_rows())
    assert status == {"0": "accounted", "1": "exact", "6": "exact"}
    assert outcome.run.read_status()["law"] == "holds"
    figure = picture(table, dict.fromkeys(("0", "6", "8"), "#1f5fa8"), "batch norm")
    named = {str(each.get_label()): each for each in figure.axes[0].collections}
    drawn = [tuple(named[label].get_facecolor()[0]) for label in ("0, accounted", "1, exact", "6, exact")]  # pyright: ignore
    assert len(set(drawn)) == 3, "batch norm is no layer with an angle, and has a colour all the same"


def test_without_the_option_nothing_is_said(tmp_path: Path) -> None:
    console = quiet()
    begin(config(check_law=False, epochs=1), tmp_path, console)
    assert not (tmp_path / "law.parquet").exists()
    assert "law" not in (tmp_path / "status.json").read_text() + said(console)
