"""Run folders that several processes want, that vanish, and that hold files of other runs, pipes and leftovers."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from training_processes import Worker
from training_runs import begin, checkpoint, go_on, quiet, same, sealed_checkpoint, sealed_json, sealed_table

from falign.cli import main
from falign.lab import _compare, _files
from falign.lab._files import FolderLost, RunError
from falign.lab._learner import Learner
from falign.lab._run_folder import RunFolder
from falign.lab._train import default_folder, train
from falign.lab.config import TrainConfig

pytestmark = [
    pytest.mark.usefixtures("one_thread", "no_pictures"),
    pytest.mark.xdist_group("processes"),  # forked from one that is started once a process of the tests
]

FILES = ("config.json", "status.json", "records.parquet", "checkpoint-00000006.safetensors")


def config(**options) -> TrainConfig:
    fixed = {"dataset": "digits", "model": "mlp:64-12-10", "epochs": 2, "batch_size": 500}
    return TrainConfig(**{**fixed, **options})


def refusal(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one sentence with which a command ends."""
    assert main(words) == code
    said = capsys.readouterr().err
    assert said.startswith("falign: ")
    assert len(said.splitlines()) == 1
    return said


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs of three steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    begin(config(tensorboard=True), folder)
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copied"))


# Seals, and what belongs together


@pytest.mark.parametrize("name", FILES)
def test_one_changed_digit_is_seen(name: str, copied: Path, tmp_path: Path, capsys) -> None:
    path = copied / name
    content = bytearray(path.read_bytes())
    old, new = {
        "config.json": (b'"seed": 0', b'"seed": 1'),
        "status.json": (b'"step": 6', b'"step": 7'),
        "records.parquet": (b"angle_fc1", b"angle_fc2"),
        "checkpoint-00000006.safetensors": (b'correct\\": 0', b'correct\\": 7'),
    }[name]
    at = content.index(old)
    content[at : at + len(old)] = new
    path.write_bytes(content)
    words = ["compare", str(copied), "--out", str(tmp_path / "picture.png")]
    if "checkpoint" in name:
        words = ["train", "--resume", str(copied), "--epochs", "3"]
    said = refusal(words, capsys)
    assert f"{path} cannot be read (its checksum is wrong)" in said
    assert ("delete it to go on from the checkpoint before it" in said) == ("checkpoint" in name)
    assert ("--resume" in said) == (name in ("status.json", "records.parquet"))


def test_what_is_said_to_help_helps(copied: Path, trained: Path, tmp_path: Path, capsys) -> None:
    (copied / "records.parquet").write_bytes(b"damaged")
    (copied / "alignment.parquet").write_bytes(b"damaged")
    (copied / "status.json").unlink()
    (copied / "checkpoint-00000006.safetensors").unlink()
    assert main(["train", "--resume", str(copied)]) == 0
    assert same(copied, trained)
    assert main(["compare", str(copied), str(trained), "--out", str(tmp_path / "picture.png")]) == 0


@pytest.mark.parametrize("name", ["config.json", "status.json", "records.parquet", "checkpoint-00000006.safetensors"])
def test_a_file_of_another_run_is_refused(name: str, copied: Path, tmp_path: Path, capsys) -> None:
    """The same options, begun twice: nothing but the token differs."""
    begin(config(tensorboard=True), tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, copied / name)
    compared = ["compare", str(copied), "--out", str(tmp_path / "picture.png")]
    resumed = ["train", "--resume", str(copied), "--epochs", "3"]
    for words in [resumed] if "checkpoint" in name else [compared] if "records" in name else [compared, resumed]:
        assert "is of another run, or of another configuration, than" in refusal(words, capsys)
    if "checkpoint" in name:
        (copied / name).unlink()
        assert go_on(copied).status == "done"


def test_a_configuration_that_was_changed_is_another_one(copied: Path, tmp_path: Path, capsys) -> None:
    sealed_json(copied / "config.json", lambda content: content["config"].update(learning_rate=0.5))
    assert "of another configuration" in refusal(["train", "--resume", str(copied)], capsys)
    assert "of another configuration" in refusal(["compare", str(copied), "--out", str(tmp_path / "p.png")], capsys)


def test_files_without_a_seal_are_refused(copied: Path, tmp_path: Path, capsys) -> None:
    path = copied / "records.parquet"
    pl.read_parquet(path).write_parquet(path)
    words = ["compare", str(copied), "--out", str(tmp_path / "picture.png")]
    assert f"{path} cannot be read (it has no checksum)" in refusal(words, capsys)


NOT_RECORDS: dict[str, tuple[Callable[[pl.DataFrame], pl.DataFrame], str]] = {
    "text": (lambda table: table.with_columns(test_loss=pl.lit("[/x]")), "column test_loss holds String"),
    "words": (lambda table: table.with_columns(angle_fc1=pl.lit("ninety")), "column angle_fc1 holds String"),
    "lists": (lambda table: table.with_columns(epoch=pl.lit([1.0])), "column epoch holds List"),
    "float steps": (lambda table: table.with_columns(pl.col("step").cast(pl.Float64)), "column step holds Float64"),
    "nan": (lambda table: table.with_columns(train_loss=pl.lit(float("nan"))), "is not from 0 to"),
    "infinite": (lambda table: table.with_columns(dominance=pl.lit(float("-inf"))), "column dominance holds a number"),
    "negative steps": (lambda table: table.with_columns(pl.col("step") - 1), "column step holds a number"),
    "accuracies": (lambda table: table.with_columns(test_accuracy=pl.lit(1.5)), "is not from 0 to 1"),
    "angles": (lambda table: table.with_columns(angle_fc2=pl.lit(-1.0)), "is not from 0 to 180"),
    "order": (lambda table: table.reverse(), "its steps do not rise"),
    "no seconds": (lambda table: table.drop("seconds"), "it has no column seconds"),
    "no steps": (lambda table: table.with_columns(step=pl.lit(None, pl.Int64)), "a row has no step"),
    "none": (lambda table: pl.DataFrame(), "it has no column step"),
}


@pytest.mark.parametrize("kind", NOT_RECORDS)
def test_sealed_tables_that_are_no_records_are_refused(kind: str, copied: Path, tmp_path: Path, capsys) -> None:
    change, words = NOT_RECORDS[kind]
    sealed_table(copied / "records.parquet", change)
    said = refusal(["compare", str(copied), "--out", str(tmp_path / "picture.png")], capsys)
    assert "records.parquet cannot be read" in said
    assert words in said


NOT_CHECKPOINTS: dict[str, Callable[[dict, dict], object]] = {
    "a place of no training": lambda state, tensors: state["training"].update(batch=2, step=8),
    "a batch that never comes": lambda state, tensors: state["training"].update(batch=3, epoch=1),
    "negative": lambda state, tensors: state["training"].update(step=-1),
    "text": lambda state, tensors: state["training"].update(correct="7"),
    "a boolean": lambda state, tensors: state["training"].update(far_steps=True),
    "nan": lambda state, tensors: state["training"].update(level=float("nan")),
    "400 digits": lambda state, tensors: state["training"].update(seen=10**400),
    "a list": lambda state, tensors: state.update(training=[]),
    "no axes": lambda state, tensors: state.update(axes=3),
    "axes": lambda state, tensors: state["axes"].update({"model.fc1.weight": [0, 0]}),
    "no generators": lambda state, tensors: state.update(python=None),
    "a generator": lambda state, tensors: tensors.update({"generator.cpu": torch.zeros(3, dtype=torch.uint8)}),
    "extra": lambda state, tensors: state.update(extra={"fc1": {"tensor": "nowhere"}}),
    "no weights": lambda state, tensors: tensors.pop("model.fc1.weight"),
    "other weights": lambda state, tensors: tensors.update({"model.fc1.weight": torch.zeros(12, 65)}),
    "weights of another type": lambda state, tensors: tensors.update(
        {"model.fc1.weight": tensors["model.fc1.weight"].double()}
    ),
    "feedback that would be spread": lambda state, tensors: tensors.update(
        {"feedback.fc2.feedback.B": torch.zeros(1, dtype=torch.float32)}
    ),
    "an optimizer": lambda state, tensors: tensors.update({"optimizer.0.momentum_buffer": torch.zeros(2, 2)}),
    "an optimizer of more": lambda state, tensors: tensors.update({"optimizer.9.momentum_buffer": torch.zeros(2)}),
    "a table": lambda state, tensors: tensors.update({"table.records": torch.zeros(90, dtype=torch.uint8)}),
    "no table": lambda state, tensors: tensors.pop("table.neurons"),
    "another table": lambda state, tensors: tensors.update({"table.records": tensors["table.neurons"].clone()}),
}


@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
def test_sealed_checkpoints_that_are_of_no_training_are_refused(kind: str, copied: Path, capsys) -> None:
    path = copied / "checkpoint-00000006.safetensors"
    sealed_checkpoint(path, NOT_CHECKPOINTS[kind])
    before = {each.name: each.read_bytes() for each in copied.iterdir() if each.is_file()}
    said = refusal(["train", "--resume", str(copied), "--epochs", "3"], capsys)
    assert str(path) in said
    assert {each.name: each.read_bytes() for each in copied.iterdir() if each.is_file()} == before


def test_a_checkpoint_says_of_which_run_it_is(trained: Path) -> None:
    state, tensors = checkpoint(trained / "checkpoint-00000006.safetensors")
    run = RunFolder(trained)
    run.read_config()
    assert state["run"] == run.identity == pl.read_parquet_metadata(trained / "records.parquet")["run"]
    assert json.loads((trained / "status.json").read_text())["run"] == run.identity
    assert not [name for name in tensors if name.startswith("sha")]


# What is no file


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "nothing", "large"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(
    kind: str, name: str, copied: Path, tmp_path: Path, capsys
) -> None:
    path = copied / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "nothing":
        path.symlink_to(tmp_path / "nowhere")
    else:
        with path.open("wb") as stream:
            stream.truncate(1 << 40)  # a file of holes: it takes no room on the disk
    words = ["compare", str(copied), "--out", str(tmp_path / "picture.png")]
    if "checkpoint" in name:
        words = ["train", "--resume", str(copied), "--epochs", "3"]
    assert f"{path} cannot be read (" in refusal(words, capsys)


def test_links_to_regular_files_are_files(copied: Path, tmp_path: Path) -> None:
    for name in FILES:
        shutil.move(copied / name, tmp_path / name)
        (copied / name).symlink_to(tmp_path / name)
    assert go_on(copied, epochs=3).status == "done"


def test_what_is_not_ours_is_left_alone(copied: Path) -> None:
    strange = copied / "checkpoint-7.safetensors"
    os.mkfifo(strange)
    os.mkfifo(copied / "notes")
    (copied / "checkpoint-00000009.safetensors.bak").mkdir()
    assert go_on(copied, epochs=3).status == "done"
    assert strange.exists()
    assert [each.name for each in RunFolder(copied).checkpoints()] == [
        f"checkpoint-0000000{step}.safetensors" for step in (6, 9)
    ]


# Several processes, and folders that vanish


WORDS = ("train", "digits", "--model", "mlp:64-12-10", "--epochs", "2", "--batch-size", "500")


def test_a_folder_in_which_a_process_is_at_work_is_refused_to_all_others(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = default_folder(config())
    worker = Worker(*WORDS, "--out", str(tmp_path / folder), said=tmp_path / "said")
    worker.wait()
    for words in ([*WORDS], [*WORDS, "--force"], ["train", "--resume", str(folder)], [*WORDS, "--out", str(folder)]):
        assert f"another process is at work in {folder}: wait" in refusal(words, capsys)
    assert RunFolder(folder).read_status()["status"] == "running"
    assert main([*WORDS, "--lr", "0.02"]) == 0, "other options have another folder"
    assert worker.end() == 0
    begin(config(), tmp_path / "alone")
    assert same(folder, tmp_path / "alone")
    assert not list(folder.glob(".*"))


def test_a_killed_process_holds_nothing_and_is_no_longer_running(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    worker = Worker(*WORDS, "--out", str(folder), said=tmp_path / "said", step=5)
    worker.wait()
    worker.signal(signal.SIGKILL)
    assert worker.end() == -signal.SIGKILL
    (folder / ".checkpoint-00000003.safetensors.partial-0123456789abcdef").write_bytes(b"half")
    (folder / ".picture.png.partial-0123456789abcdef").write_bytes(b"somebody else's")
    assert RunFolder(folder).read_status()["status"] == "killed"
    assert go_on(folder).status == "done"
    begin(config(), tmp_path / "whole")
    assert same(folder, tmp_path / "whole")
    assert [path.name for path in folder.glob(".*")] == [".picture.png.partial-0123456789abcdef"]


@pytest.mark.parametrize("force", [[], pytest.param(["--force"], marks=pytest.mark.slow)], ids=str)
def test_of_several_at_once_one_gets_the_folder(force: list[str], tmp_path: Path) -> None:
    """They wait for each other just before they take it, and have all seen that it is free."""
    words = [*WORDS, *force, "--out", str(tmp_path / "run")]
    several = [Worker(*words, said=tmp_path / f"said-{number}", step=0) for number in range(3)]
    for worker in several:
        worker.wait()
    for worker in several:
        worker.release()
    codes = [worker.end() for worker in several]
    refused = [
        "another process is at work in" in worker.said or "holds a run already" in worker.said for worker in several
    ]
    assert codes == [2 if each else 0 for each in refused]
    assert codes.count(0) == 1 or (force and codes.count(0) >= 1), "by force one may come after the other"
    begin(config(), tmp_path / "alone")
    assert same(tmp_path / "run", tmp_path / "alone")


VANISHING: dict[str, Callable[[Path], object]] = {
    "deleted": lambda folder: shutil.rmtree(folder),
    "made anew": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "given to another run": lambda folder: (shutil.rmtree(folder), begin(config(seed=5), folder)),
    "emptied": lambda folder: [path.unlink() for path in folder.iterdir() if path.is_file()],
    "moved": lambda folder: folder.rename(folder.with_name("elsewhere")),
}


@pytest.mark.parametrize("how", VANISHING)
@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_folder_that_vanishes_ends_the_run(how: str, tensorboard: bool, tmp_path: Path, monkeypatch) -> None:
    folder, step = tmp_path / "run", Learner.step

    def vanishes(learner: Learner, x: torch.Tensor, y: torch.Tensor, done: int) -> tuple[float, int]:
        if done == 4:
            monkeypatch.setattr(Learner, "step", step)
            VANISHING[how](folder)
            before.append(state_of(folder))
        return step(learner, x, y, done)

    before: list[dict[str, bytes]] = []
    monkeypatch.setattr(Learner, "step", vanishes)
    with pytest.raises(FolderLost, match=r"run was deleted or replaced while its run was at work") as caught:
        begin(config(tensorboard=tensorboard, measure_every=1), folder)
    assert caught.value.code == 1
    assert state_of(folder) == before[0], "nothing is written into what is another's"
    if how != "emptied":
        assert not _files.is_in_use(folder)


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_says_that_the_folder_has_vanished(tmp_path: Path) -> None:
    worker = Worker(*WORDS, "--out", str(tmp_path / "run"), said=tmp_path / "said")
    worker.wait()
    shutil.rmtree(tmp_path / "run")
    assert worker.end() == 1
    assert worker.said.startswith(f"falign: {tmp_path / 'run'} was deleted or replaced while its run was at work")
    assert len(worker.said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_lock_that_cannot_be_had_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(_files.FileLock, "acquire", none)
    with pytest.raises(RunError, match=r"cannot lock .*\.lock: FileSystem does not .*; give another folder with --out"):
        begin(config(), tmp_path / "run")


def test_looking_whether_a_folder_is_held_keeps_nobody_out(tmp_path: Path) -> None:
    until, seen = time.monotonic() + 0.3, 0
    while time.monotonic() < until:
        with _files.FolderLock(tmp_path):
            assert _files.is_in_use(tmp_path)
        assert not _files.is_in_use(tmp_path)
        seen += 1
    assert seen > 3
    assert not list(tmp_path.iterdir())


def test_what_is_compared_while_it_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, step = [], Learner.step

    def look(learner: Learner, x: torch.Tensor, y: torch.Tensor, done: int) -> tuple[float, int]:
        if done == 3:
            found.extend(_compare.read([tmp_path / "run"]))
        return step(learner, x, y, done)

    monkeypatch.setattr(Learner, "step", look)
    train(config(), tmp_path / "run", console=quiet())
    assert [record.status["status"] for record in found] == ["running"]
    assert (found[0].status["step"], found[0].records.height) == (3, 2)
