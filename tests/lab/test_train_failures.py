"""What goes wrong on the way: numbers that are not finite, disks that take nothing, damaged files."""

import json
import math
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import polars as pl
import pytest
import torch
from rich.console import Console
from torch import nn
from training_runs import begin, go_on, quiet, same, sealed_json

from falign.cli import main
from falign.lab import _ending
from falign.lab._batches import Images, order, prepare
from falign.lab._divergence import locate
from falign.lab._files import RunError, WriteError, atomic_write
from falign.lab._learner import Learner
from falign.lab._models import build
from falign.lab._run_folder import RunFolder
from falign.lab._train import train
from falign.lab.config import ConfigError, TrainConfig
from falign.lab.data import load

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def config(**options) -> TrainConfig:
    fixed = {"dataset": "digits", "model": "mlp:64-64-10", "epochs": 2, "batch_size": 100}
    return TrainConfig(**{**fixed, **options})


def said(console: Console) -> str:
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def step_at_which_plain_torch_diverges(rate: float) -> int:
    """The same training by hand: the step whose loss, or whose update, is the first that is not finite."""
    images, _ = prepare(load("digits"), device=torch.device("cpu"), dtype=torch.float32)
    model = build("mlp:64-64-10", shape=(1, 8, 8), classes=10, seed=0)
    for step, index in enumerate(order(0, 0, len(images)).split(100), 1):
        x, y = images.take(index)
        loss = nn.functional.cross_entropy(model(x), y)
        if not math.isfinite(loss.item()):
            return step
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
        if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
            return step
    raise AssertionError("it did not diverge")


def test_a_diverged_run_is_recorded(tmp_path: Path) -> None:
    options = config(rule="bp", learning_rate=1e12, momentum=0.0, measure_every=1)
    outcome = begin(options, tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    assert outcome.status == status["status"] == "diverged"
    assert outcome.step == status["step"] == step_at_which_plain_torch_diverges(1e12)
    assert status["layer"] in ("fc1", "fc2")
    assert f"step {outcome.step}" in outcome.message
    assert status["layer"] in outcome.message
    records = pl.read_parquet(tmp_path / "records.parquet")
    assert 0 < records.height <= outcome.step
    for column in records.get_columns():
        assert column.drop_nulls().is_finite().all(), column.name
    with pytest.raises(RunError, match="cannot go on: the run diverged at step"):
        go_on(tmp_path)


@pytest.mark.parametrize("options", [{"batch_size": 500, "measure_every": 1}, {"batch_size": 1437}], ids=str)
def test_an_update_beyond_all_numbers_is_seen_before_anything_is_recorded(options: dict, tmp_path: Path) -> None:
    outcome = begin(config(learning_rate=1e45, momentum=0.0, **options), tmp_path)
    assert (outcome.status, outcome.step) == ("diverged", 1)
    assert outcome.run.read_status()["layer"] == "fc2"
    assert outcome.run.read_records()["step"].to_list() == [0]
    assert outcome.run.checkpoints() == []


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("broken", "x", "expected"),
    [
        (["2.weight"], 1.0, (5, "2", "weights")),
        (["0.weight", "2.weight"], 1.0, (5, "2", "weights")),
        (["0.weight", "4.bias"], 1.0, (5, "4", "weights")),
        (["3.running_var"], 1.0, (5, "3", "buffers")),
        ([], 3e38, (6, "0", "output")),
        ([], 1.0, (6, "4", "loss")),
    ],
    ids=str,
)
def test_the_layer_that_was_first(broken: list[str], x: float, expected: tuple[int, str, str]) -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # pyright: ignore
        for name in broken:
            model.state_dict()[name].view(-1)[0] = float("nan")
    fault = locate(model, lambda: model(torch.full((3, 4), x)), steps=5)
    assert (fault.step, fault.layer, fault.what) == expected


def test_a_folder_that_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write into .*file/run: Not a directory; give another folder"):
        begin(config(), tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        begin(config(), tmp_path)


def test_a_folder_with_a_run_is_left_alone(tmp_path: Path) -> None:
    begin(config(epochs=1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunError, match="holds a run already: continue it with --resume"):
        begin(config(rule="bp"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_that_is_replaced_leaves_nothing_behind_and_takes_nothing_else(tmp_path: Path) -> None:
    begin(config(epochs=3), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".records.parquet.partial-123").write_text("killed")
    train(config(epochs=1), tmp_path, replaces=True, console=quiet())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["checkpoint-00000015.safetensors"]
    assert not list(tmp_path.glob(".*"))


def outcome_of(folder: Path) -> tuple[str, int]:
    status = RunFolder(folder).read_status()
    return status["status"], status["saved"]


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: writing more fails in its midst, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    begin(config(epochs=3), tmp_path / "whole")
    begin(config(epochs=1), tmp_path / "parts")
    with disk_of(20_000), pytest.raises(WriteError) as caught:
        go_on(tmp_path / "parts", epochs=3)
    assert "cannot write" in str(caught.value)
    assert "checkpoint-00000030.safetensors: File too large" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert outcome_of(tmp_path / "parts") == ("failed", 15), "what there was room for"
    names = [path.name for path in (tmp_path / "parts").iterdir()]
    assert [name for name in names if "safetensors" in name] == ["checkpoint-00000015.safetensors"]
    assert go_on(tmp_path / "parts").status == "done"
    assert same(tmp_path / "parts", tmp_path / "whole")


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"before")
    with disk_of(100), pytest.raises(WriteError, match=r"cannot write .*file: File too large"):
        atomic_write(path, b"x" * 1000)
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_the_name_never_holds_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"before")

    def fails(source: Path, target: Path) -> None:
        assert (source.read_bytes(), target.read_bytes()) == (b"after", b"before")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(WriteError, match="Input/output error"):
        atomic_write(path, b"after")
    assert path.read_bytes() == b"before"


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def altered(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def emptied(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, altered, emptied])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(damage, tmp_path: Path) -> None:
    begin(config(epochs=3), tmp_path / "whole")
    begin(config(epochs=2), tmp_path / "parts")
    path = tmp_path / "parts" / "checkpoint-00000030.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"checkpoint-00000030.safetensors cannot be read .*delete it"):
        go_on(tmp_path / "parts", epochs=3)
    path.unlink()
    go_on(tmp_path / "parts", epochs=3)
    assert same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": [1]}, "no configuration of this version"),
        ({"config": {"dataset": "digits", "model": "lenet"}}, "no configuration of this version"),
        ({"provenance": 3}, "no configuration of this version"),
        ({"epochs": "ten"}, "epochs is 'ten'"),
        ({"epochs": True}, "epochs is True"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"seed": 10**400}, "seed is 1000"),
        ({"dataset": "a\0b"}, "dataset is 'a.x00b'"),
    ],
    ids=str,
)
def test_a_configuration_that_says_something_else_is_named(change: dict, words: str, tmp_path: Path) -> None:
    begin(config(epochs=0), tmp_path)
    fields = change.keys() <= {"config", "provenance"}
    sealed_json(tmp_path / "config.json", lambda content: (content if fields else content["config"]).update(change))
    with pytest.raises(RunError, match=rf"config.json cannot be read \(.*{words}.*\): .*restore it, or begin"):
        go_on(tmp_path)


def test_a_checkpoint_whose_code_has_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = (
        "from torch import nn\ndef make(classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), "
    )
    code += "nn.Linear(WIDTH, classes))"
    module = tmp_path / "network_of_a_width.py"
    module.write_text(code.replace("WIDTH", "16"))
    begin(config(model="network_of_a_width:make", epochs=1), tmp_path / "run")
    origin = RunFolder(tmp_path / "run").read_config()[1]["code"]
    assert origin == {str(module): sha256(module.read_bytes()).hexdigest()}
    module.write_text(code.replace("WIDTH", "120"))
    del sys.modules["network_of_a_width"]
    console = quiet()
    with pytest.raises(RunError, match=r"does not fit --model network_of_a_width:make, was its code changed"):
        go_on(tmp_path / "run", epochs=2, console=console)
    assert f"the code of --model network_of_a_width:make in {module} changed since the run began" in said(console)


FAILING = """
import os, random, sys
import torch
from torch import nn

class Failing(nn.Module):
    passes = 0

    def forward(self, x):
        if self.training and torch.is_grad_enabled() and len(x) == 100:
            Failing.passes += 1
            if Failing.passes == int(os.environ["FAILS_AT"]):
                kind = os.environ["FAILS_BY"]
                if kind == "exit":
                    sys.exit(3)
                if kind == "recursion":
                    return self.forward(self.forward(x))
                if kind == "evil":
                    raise Evil()
                raise {"runtime": RuntimeError, "memory": MemoryError, "cuda": torch.OutOfMemoryError}[kind](
                    "mat1 and [/red] mat2\\nsecond line")
        return x

class Evil(Exception):
    def __str__(self):
        raise ValueError("no text")

def make(classes):
    Failing.passes = 0
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), Failing(), nn.Linear(12, classes))
"""
FAILURES = {
    "runtime": "RuntimeError: mat1 and [/red] mat2",
    "memory": "MemoryError (a smaller --batch-size or --probe-size needs less memory): mat1",
    "cuda": "OutOfMemoryError (a smaller",
    "exit": "SystemExit: 3",
    "evil": "Evil: the traceback is in",
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_model_that_fails_ends_the_run_as_failed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "networks_that_fail.py").write_text(FAILING)
    monkeypatch.setenv("FAILS_AT", "1000")
    monkeypatch.setenv("FAILS_BY", kind)
    words = ["train", "digits", "--model", "networks_that_fail:make", "--batch-size", "100", "--epochs", "3", "--out"]
    assert main([*words, "whole"]) == 0
    monkeypatch.setenv("FAILS_AT", "31")  # of fourteen full batches an epoch: batch 3 of epoch 2, step 33
    capsys.readouterr()
    assert main([*words, "parts"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert f"the run failed in step 33 with {FAILURES[kind]}" in err
    status = RunFolder(Path("parts")).read_status()
    assert (status["status"], status["step"], status["saved"]) == ("failed", 32, 30)
    assert err.strip() == status["message"]
    traceback = Path("parts/traceback.txt").read_text()
    assert "networks_that_fail.py" in traceback
    assert "in forward" in traceback
    assert main(["compare", "parts", "--out", "picture.png"]) == 0
    assert "failed" in capsys.readouterr().out
    monkeypatch.setenv("FAILS_AT", "1000")
    assert go_on(Path("parts")).status == "done"
    assert same(Path("whole"), Path("parts"))
    assert not Path("parts/traceback.txt").exists()


def test_what_fails_in_measuring_says_after_which_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Learner, "test", fails)
    outcome = begin(config(), tmp_path)
    assert (outcome.status, outcome.step) == ("failed", 0)
    assert "the run failed after step 0 with ZeroDivisionError: the traceback is in" in outcome.message
    monkeypatch.undo()
    assert go_on(tmp_path).status == "done", "there is no checkpoint, and none was lost"


def test_memory_that_the_test_lacks_is_not_asked_of_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Images, "pieces", lacks)
    outcome = begin(config(), tmp_path)
    assert "after step 0 with MemoryError (a smaller network or image needs less memory): the" in outcome.message


def test_what_fails_at_the_very_end_is_no_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("this picture cannot be drawn")

    monkeypatch.setattr(_ending, "draw", fails)
    outcome = begin(config(epochs=1), tmp_path)
    assert outcome.status == outcome.run.read_status()["status"] == "failed"
    assert "after step 15 with ValueError: this picture cannot be drawn" in outcome.message


STATES = """
import torch
from torch import nn

class Keeping(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state
    def forward(self, x):
        return x
    def get_extra_state(self):
        return self.state() if callable(self.state) else self.state
    def set_extra_state(self, state):
        self.state = state

def fails():
    raise KeyError("what")

def deep():
    state = []
    for _ in range(100_000):
        state = [state]
    return state

MADE = {"object": lambda: object(), "set": lambda: {1}, "long": lambda: 10**5000, "deep": deep, "fails": fails,
        "large": lambda: "x" * (17 << 20), "sparse": lambda: torch.eye(3).to_sparse(),
        "meta": lambda: torch.ones(2, device="meta")}

def make(name):
    return lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), Keeping(MADE[name]), nn.Linear(12, 10))

for _name in MADE:
    globals()[_name + "_"] = make(_name)
"""


@pytest.mark.parametrize("name", ["object", "set", "long", "deep", "fails", "large", "sparse", "meta"])
def test_a_state_that_no_checkpoint_holds_is_refused_before_the_first_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "networks_with_state.py").write_text(STATES)
    assert main(["train", "digits", "--model", f"networks_with_state:{name}_", "--out", "run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"falign: --model networks_with_state:{name}_")
    assert len(err.splitlines()) == 1
    assert not Path("run").exists()


def test_a_network_with_the_wrong_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_output.py").write_text(
        "from torch import nn\nmake = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3))"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"returned \(2, 3\) for 2 images, expected \(2, 10\)"):
        begin(config(model="wrong_output:make"), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing is made before the arguments are known to be right"
