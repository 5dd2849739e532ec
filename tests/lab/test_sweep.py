"""Grids of runs and studies: what the words stand for, what is trained, what is left, and what is refused before."""

import json
import re
from pathlib import Path

import polars as pl
import pytest

from falign.cli import main
from falign.lab import _validate
from falign.lab._grid import Axis, points, read_axes
from falign.lab._run_folder import RunFolder
from falign.lab.config import ConfigError
from falign.lab.data import NAMES
from falign.rules import ALL_RULES

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

TRAIN = ["train", "digits", "--model", "mlp:64-6-10", "--batch-size", "400", "--epochs", "1"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(words)
    said = capsys.readouterr()
    return code, said.out, said.err


def values(*words: str) -> dict[str, tuple[str, ...]]:
    return {axis.field: axis.values for axis in read_axes(words, ranges=False)[1]}


def test_the_words_of_a_grid():
    assert values("digits", "--rule", "fa,dfa", "--seed=0..2,7", "--lr", "0.1") == {
        "rule": ("fa", "dfa"),
        "seed": ("0", "1", "2", "7"),
    }
    assert values("--transform", "centred,signs") == {}, "its comma is its own"
    assert values("--transform", "centred,signs", "--transform", "none") == {"transform": ("centred,signs", "none")}
    assert values("--model", "vit:width=8,blocks=1", "--model", "mlp:4-2") == {
        "model": ("vit:width=8,blocks=1", "mlp:4-2")
    }
    assert values("--feedback", "sparse(3),normal") == {"feedback": ("sparse(3)", "normal")}
    assert values("--rule-option", "a=1", "--rule-option", "b=2") == {}, "which may be given several times"
    common, axes = read_axes(
        ["digits", "--seed", "-1..0", "--out", "a,b", "--transform", "none", "--transform", "signs"], ranges=False
    )
    assert common == ["digits", "--out", "a,b"]
    assert [(point.label, point.words[3:]) for point in points(common, axes)] == [
        ("seed=-1,transform=none", ("--seed=-1",)),
        ("seed=-1,transform=signs", ("--seed=-1", "--transform=signs")),
        ("seed=0,transform=none", ("--seed=0",)),
        ("seed=0,transform=signs", ("--seed=0", "--transform=signs")),
    ]
    rest, (rate, batch, rule) = read_axes(
        ["--lr", "0.001..0.3", "--batch-size", "16..64", "--rule", "fa,bp"], ranges=True
    )
    assert rest == []
    assert rate == Axis(field="learning_rate", low=0.001, high=0.3)
    assert batch == Axis(field="batch_size", low=16, high=64, whole=True)
    assert rule.values == ("fa", "bp")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed", "4..0"], "--seed is 4..0, expected LOW..HIGH, two whole numbers"),
        (["--seed", "0..1.5"], "--seed is 0..1.5, expected LOW..HIGH, two whole numbers"),
        (["--lr", "0.01..0.1"], "a range of real numbers, which falign tune searches"),
        (["--rule", "fa,,dfa"], "--rule is fa,,dfa, with nothing at a comma"),
        (["--rule", "fa,dfa,fa"], "--rule has the value fa twice"),
        (["--seed", "0..99999999"], "--seed is 0..99999999, expected at most 10,000 numbers"),
        (["--seed", "0..999", "--batch-size", "1..20"], "the grid has 20,000 runs, expected at most 10,000"),
        (["--rule", "fa,fba"], "rule=fba is impossible, and nothing was begun: --rule is 'fba'"),
        (["--rule", "fa,bp", "--feedback", "sparse(3)"], "rule=bp is impossible, and nothing was begun: --feedback"),
        (["--batch-size", "9,ten"], "batch-size=ten: Invalid value for --batch-size"),
        (["--model", "mlp:64-10", "--model", "mlp:784-10"], "model=mlp:784-10 is impossible, and nothing was begun: "),
        (["--lr", "0.1,.1"], "lr=.1 is the same run as lr=0.1"),
        (["--seed", "0,1", "--resume", "a"], "--resume is for one run, and here are 2"),
        (["--seed", "0,1", "--references"], "--references is for one run, and here are 2"),
        (["--workers", "2"], "--workers is 2, but it is for a grid of runs"),
        (["--seed", "0,1", "--workers", "0"], "--workers is 0, expected at least 1"),
    ],
)
def test_a_bad_grid_gets_one_sentence(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    begun = TRAIN if "--model" not in words else [*TRAIN[:2], *TRAIN[4:]]
    code, _, said = run([*(begun if "--batch-size" not in words else begun[:4]), *words], capsys)
    assert code == 2
    assert expected in said
    assert len(said.splitlines()) == 1
    assert not Path("runs").exists()


def test_a_grid_goes_on_with_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TRAIN, "--rule", "fa,dfa", "--lr", "0.01,1e30"]
    code, said, _ = run(words, capsys)
    assert code == 0, "a run that diverges is a result"
    parent = Path("runs/digits-mlp-64-6-10-0-epochs=1-batch-size=400-by-rule-lr")
    assert {path.name for path in parent.iterdir()} >= {"rule=fa,lr=0.01", "rule=dfa,lr=0.01"}
    assert re.search(r"\[2/4\] rule=fa,lr=1e30: the run diverged at step \d", said)
    assert len(re.findall(r"^ rule=d?fa,lr=0.01 .* \d\d?\.\d\d .* done", said, re.M)) == 2, "a row each in the table"
    killed = RunFolder(parent / "rule=dfa,lr=0.01")
    killed.read_config()
    killed.write_status("running", step=0, epoch=0)
    stamp = (parent / "rule=fa,lr=0.01/records.parquet").stat().st_mtime_ns
    code, said, _ = run([*words[:-1], "0.01,1e30,0.02", "--seed", "0"], capsys)
    assert code == 0
    assert f"6 runs in {parent}, 3 of them there already" in said
    assert "[6/6] rule=dfa,lr=0.02: test" in said
    assert (parent / "rule=fa,lr=0.01/records.parquet").stat().st_mtime_ns == stamp, "it was left"
    assert RunFolder(parent / "rule=dfa,lr=0.01").read_status()["status"] == "done"
    code, _, said = run([*words, "--momentum", "0.5", "--out", str(parent)], capsys)
    assert code == 2
    assert "holds a run with --momentum 0.9, and here it is 0.5" in said
    code, said, _ = run(["compare", "runs", "--csv"], capsys)
    assert code == 0
    table = pl.read_csv(said.encode())
    assert table.height == 6
    assert {"run", "rule", "seed", "lr", "test_accuracy", "status"} <= set(table.columns)
    assert sorted(set(table["status"])) == ["diverged", "done"]


def test_workers_train_the_same_numbers_and_seeds_are_summed_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run([*TRAIN, "--seed", "0..1", "--out", "one"], capsys)[0] == 0
    code, said, _ = run([*TRAIN, "--seed", "0..1", "--out", "two", "--workers", "2"], capsys)
    assert code == 0
    assert re.search(r"fa +2 +\d+\.\d\d ± \d\.\d\d", said)
    assert max(map(len, said.splitlines())) <= 80
    for seed in (0, 1):
        here, there = (pl.read_parquet(f"{folder}/seed={seed}/records.parquet") for folder in ("one", "two"))
        assert here.drop("seconds").equals(there.drop("seconds"))


def test_a_study_is_kept_and_its_best_is_tested_once(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    words = ["tune", *TRAIN[1:], "--optimizer", "sgd,adam", "--out", "study"]
    code, said, _ = run([*words, "--trials", "3"], capsys)
    assert code == 0
    assert "1,294 training, 143 validation and 360 test images" in said
    assert len(re.findall(r"^\[\d\] optimizer=\w+, lr=[\d.e-]+: validation", said, re.M)) == 3
    assert (tested := re.search(r"trial (\d) is the best: .* on the test set, looked at once, ([\d.]+%)", said))
    command = said.splitlines()[-1].split()
    assert command[:4] == ["falign", "train", "digits", "--model"]
    assert "--lr" in command
    code, again, _ = run([*words, "--trials", "3"], capsys)
    assert code == 0
    assert "study has 3 of 3 trials" in again
    assert "[1]" not in again
    assert tested[0] in again
    assert len(Path("study/trials.csv").read_text().splitlines()) == 4
    assert run([*words, "--trials", "4"], capsys)[0] == 0
    code, _, wrong = run([*words, "--momentum", "0..0.9", "--trials", "4"], capsys)
    assert code == 2
    assert "--momentum is for sgd" in wrong, "a corner that is impossible is said before anything starts"
    code, _, wrong = run(["tune", *TRAIN[1:], "--lr", "0.1"], capsys)
    assert (code, "nothing is left to search" in wrong) == (2, True)
    code, _, wrong = run([*words, "--trials", "0"], capsys)
    assert (code, "--trials is 0, expected at least 1" in wrong) == (2, True)


DATA = """
import numpy as np
import torch

from falign.lab.data import Dataset

draws = np.random.default_rng(0)


def make(folder=None):
    images = draws.integers(0, 255, (60, 4, 4), dtype=np.uint8)
    labels = np.arange(60) % 3
    return images[:40], labels[:40], images[40:], labels[40:]


def whole():
    a, b, c, d = map(torch.as_tensor, make())
    parts = {"train_images": a[:, None], "train_labels": b, "test_images": c[:, None], "test_labels": d}
    return Dataset(name="mine", classes=("x", "y", "z"), **parts)


def three():
    return 1, 2, 3


def short():
    images, labels, *rest = make()
    return images, labels[:-1], *rest


def grown():
    images, *rest = make()
    return images / 255, *rest


def fails():
    raise RuntimeError("no disk")
"""


def test_data_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sets.py").write_text(DATA)
    train = ["--model", "mlp:16-3", "--epochs", "1", "--rule", "bp", "--out"]
    code, said, wrong = run(["train", "sets:make", *train, "a"], capsys)
    assert code == 0, wrong
    assert "sets:make: 40 training and 20 test images of 1×4×4, 3 classes" in said
    assert run(["train", "./sets.py:whole", *train, "b"], capsys)[0] == 0
    assert run(["train", "--data", "sets:whole", *train, "c"], capsys)[0] == 0
    config, origin = RunFolder(Path("b")).read_config()
    assert config.dataset == "sets:whole"
    assert [Path(file).name for file in origin["code"]] == ["sets.py"]
    assert json.dumps(origin["data_sha256"])
    for words, expected in {
        "sets:three": "DATASET sets:three returned a tuple, expected a falign.lab.data.Dataset, or four arrays",
        "sets:short": "the training set has 39 labels for 40 images",
        "sets:grown": "expected uint8 of 4",
        "sets:fails": "DATASET sets:fails failed: RuntimeError: no disk",
        "sets:nothing": "DATASET sets:nothing cannot be imported: AttributeError",
        "../sets.py:make": "DATASET is '../sets.py:make', expected a file in the working folder or below",
    }.items():
        code, _, said = run(["train", words, *train, "d"], capsys)
        assert (code, len(said.splitlines())) == (2, 1), said
        assert expected in said
    Path("sets.py").write_text(DATA.replace("255", "254"))
    code, _, said = run(["train", "--resume", "b", "--epochs", "2"], capsys)
    assert code == 2
    assert "sets.py is not what it was when the run began" in said


def test_names_that_are_listed_without_an_import_are_those_of_the_package() -> None:
    assert set(_validate.RULES) == set(ALL_RULES)
    assert _validate.DATASETS == NAMES


@pytest.mark.parametrize(
    ("words", "close"),
    [
        (["train", "digit", "--model", "lenet"], "digits"),
        (["train", "digits", "--model", "lennet"], "lenet"),
        (["train", "digits", "--model", "mlp:64-10", "--rule", "ddfa"], "dfa"),
        (["reproduce", "song2012"], "song2021"),
        (["list", "fasion-mnist"], "fashion-mnist"),
        (["tarin"], "train"),
        (["train", "digits", "--modle", "lenet"], "--model"),
    ],
)
def test_mistyped_words_get_the_closest(words: list[str], close: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = run(words, capsys)
    assert code == 2
    assert re.search(rf'did you mean "?{close}\b', said, re.I)


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected one range, or values without one"):
        read_axes(["--lr", "0.1..0.2,0.5"], ranges=True)
