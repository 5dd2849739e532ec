"""What goes wrong on the way: numbers that are not finite, disks that take nothing, damaged files."""

import json
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
import torch
from torch import nn
from training_runs import begin, go_on, quiet, same

from falign.lab.batches import order, prepare
from falign.lab.config import ConfigError, TrainConfig
from falign.lab.data import load
from falign.lab.divergence import locate
from falign.lab.models import build
from falign.lab.train import train
from falign.lab.writing import RunError, WriteError, write

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def config(**options) -> TrainConfig:
    fixed = {"dataset": "digits", "model": "mlp:64-64-10", "epochs": 2, "batch_size": 100}
    return TrainConfig(**{**fixed, **options})


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
    fault = locate(model, lambda: model(torch.full((3, 4), x)), done=5)
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
    names = [path.name for path in (tmp_path / "parts").iterdir()]
    assert [name for name in names if "safetensors" in name] == ["checkpoint-00000015.safetensors"]
    assert go_on(tmp_path / "parts").status == "done"
    assert same(tmp_path / "parts", tmp_path / "whole")


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"before")
    with disk_of(100), pytest.raises(WriteError, match=r"cannot write .*file: File too large"):
        write(path, b"x" * 1000)
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_the_name_never_holds_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write(path, b"before")

    def fails(source: Path, target: Path) -> None:
        assert (source.read_bytes(), target.read_bytes()) == (b"after", b"before")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(WriteError, match="Input/output error"):
        write(path, b"after")
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
    ("content", "words"),
    [
        ("{", "config.json cannot be read"),
        ("[]", "expected an object"),
        ('{"config": {"dataset": "digits"}}', "no configuration of this version"),
        (
            '{"config": {"dataset": "digits", "model": "lenet", "colour": 1}}',
            "no configuration of this version",
        ),
        ('{"config": {"dataset": "digits", "model": "lenet", "epochs": "ten"}}', "epochs is 'ten'"),
        ('{"config": {"dataset": "digits", "model": "lenet", "dtype": "int8"}}', "dtype is 'int8'"),
    ],
)
def test_a_damaged_configuration_is_named(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=words):
        go_on(tmp_path)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    begin(config(epochs=1), tmp_path / "one")
    begin(config(epochs=1, model="mlp:64-32-10"), tmp_path / "other")
    name = "checkpoint-00000015.safetensors"
    (tmp_path / "one" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(RunError, match="does not fit --model mlp:64-64-10"):
        go_on(tmp_path / "one", epochs=2)


def test_a_network_with_the_wrong_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_output.py").write_text(
        "from torch import nn\nmake = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3))"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"returned \(2, 3\) for 2 images, expected \(2, 10\)"):
        begin(config(model="wrong_output:make"), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing is made before the arguments are known to be right"
