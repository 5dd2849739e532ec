"""Ctrl-C, TERM and HUP: the first one saves, the second one stops at once, and what is ignored stays so."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from training_processes import Worker
from training_runs import begin, go_on, same

from falign.lab import _ending, _train
from falign.lab._learner import Learner
from falign.lab._run_folder import RunFolder
from falign.lab._signals import GracefulStop, Stopped
from falign.lab.config import TrainConfig

pytestmark = [
    pytest.mark.usefixtures("one_thread", "no_pictures"),
    pytest.mark.xdist_group("processes"),  # forked from one that is started once a process of the tests
]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SOME = [pytest.param(number, marks=[] if number == signal.SIGTERM else [pytest.mark.slow]) for number in SIGNALS]
WORDS = ("train", "digits", "--model", "mlp:64-12-10", "--epochs", "2", "--batch-size", "500")


def config(**options) -> TrainConfig:
    return TrainConfig(**{"dataset": "digits", "model": "mlp:64-12-10", "epochs": 2, "batch_size": 500, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    begin(config(), folder)
    return folder


@pytest.mark.parametrize("number", SOME)
def test_the_first_one_saves_after_the_step(number: int, tmp_path: Path, whole: Path) -> None:
    worker = Worker(*WORDS, "--out", str(tmp_path / "run"), said=tmp_path / "said", step=5)
    worker.wait()
    worker.signal(number)
    assert worker.end() == 128 + number
    assert worker.said == f"interrupted after step 5: go on with falign train --resume {tmp_path / 'run'}\n"
    status = RunFolder(tmp_path / "run").read_status()
    assert (status["status"], status["step"], status["saved"]) == ("interrupted", 5, 5)
    assert go_on(tmp_path / "run").status == "done"
    assert same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("first", "second"),
    [(2, 15), pytest.param(15, 15, marks=pytest.mark.slow), pytest.param(1, 2, marks=pytest.mark.slow)],
)
def test_the_second_one_stops_at_once(first: int, second: int, tmp_path: Path, whole: Path) -> None:
    """It waits in step 5, which never ends."""
    worker = Worker(*WORDS, "--out", str(tmp_path / "run"), said=tmp_path / "said", step=5)
    worker.wait()
    worker.signal(first)
    worker.process.join(0.3)
    assert worker.process.is_alive(), "the first one waits for the step"
    worker.signal(second)
    worker.process.join(60)
    assert worker.process.exitcode == 128 + second
    worker.end()
    assert worker.said == "falign: interrupted\n"
    status = RunFolder(tmp_path / "run").read_status()
    assert (status["status"], status["saved"]) == ("interrupted", 3)
    assert status["message"].startswith("stopped at once, saved up to step 3: go on with")
    assert go_on(tmp_path / "run").status == "done"
    assert same(tmp_path / "run", whole)


@pytest.mark.parametrize("number", SOME)
def test_before_there_is_anything_to_save_nothing_is_written(number: int, tmp_path: Path) -> None:
    worker = Worker(*WORDS, "--out", str(tmp_path / "run"), said=tmp_path / "said", step=-1)
    worker.wait()
    worker.signal(number)
    worker.process.join(60)
    assert worker.process.exitcode == 128 + number
    assert worker.said == "falign: interrupted\n"
    assert not (tmp_path / "run").exists()


def test_what_is_ignored_stays_ignored(tmp_path: Path, whole: Path) -> None:
    """As under ``nohup``."""
    options = {"said": tmp_path / "said", "step": 2, "ignored": (signal.SIGHUP,)}
    worker = Worker(*WORDS, "--out", str(tmp_path / "run"), **options)
    worker.wait()
    worker.signal(signal.SIGHUP)
    worker.signal(signal.SIGHUP)
    assert worker.end() == 0
    assert same(tmp_path / "run", whole)


def test_a_process_that_was_stopped_goes_on(tmp_path: Path, whole: Path) -> None:
    worker = Worker(*WORDS, "--out", str(tmp_path / "run"), said=tmp_path / "said", step=2)
    worker.wait()
    worker.signal(signal.SIGSTOP)
    assert RunFolder(tmp_path / "run").read_status()["status"] == "running", "it still holds its folder"
    worker.signal(signal.SIGCONT)
    assert worker.end() == 0
    assert same(tmp_path / "run", whole)


@pytest.mark.parametrize("number", SOME)
@pytest.mark.parametrize("at", ["begin", "write_config", "write_tables", "write_status", "draw"])
@pytest.mark.parametrize("times", [1, 2])
def test_no_moment_leaves_half_a_state(
    number: int, at: str, times: int, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signals that come while the run begins, or while its end is written."""
    folder, came = tmp_path / "run", []
    owner = _ending if at == "draw" else RunFolder
    before = getattr(owner, at)

    def signalled(*parts, **options):
        wanted = "draw" if at == "draw" else "done" if at == "write_status" else None
        if not came and (wanted != "done" or "done" in parts):
            came.append(number)
            for _ in range(times):
                signal.raise_signal(number)
        return before(*parts, **options)

    monkeypatch.setattr(owner, at, signalled)
    stopped = None
    try:
        outcome = begin(config(), folder)
    except Stopped as error:
        outcome, stopped = None, error
    monkeypatch.undo()
    assert came
    assert (stopped is not None and stopped.number == number) == (times == 2)
    if not (folder / "config.json").exists():
        assert times == 2
        return
    status = RunFolder(folder).read_status()["status"]
    assert status in ("done", "interrupted", "unknown")
    assert status != "unknown" or times == 2, "stopped before the first word of it"
    if outcome is not None:
        assert outcome.status == status == ("done" if at in ("write_status", "draw") else "interrupted")
    assert go_on(folder).status == "done"
    assert same(folder, whole)


def test_a_pipe_that_nobody_reads_any_more_interrupts(tmp_path: Path) -> None:
    """As under ``| head -5``: nothing is said, and the run goes on from what was saved."""
    words = ["train", "digits", "--model", "mlp:64-8-10", "--epochs", "5000", "--out", str(tmp_path / "run")]
    with subprocess.Popen([sys.executable, "-m", "falign", *words], stdout=-1, stderr=-1, text=True) as process:
        for _ in range(5):
            assert process.stdout.readline()
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (1, "")
    status = RunFolder(tmp_path / "run").read_status()
    assert status["status"] == "interrupted"
    assert "--resume" in status["message"]
    assert status["saved"] >= 46  # of 23 steps an epoch: the last line that was read is of the first
    assert not (tmp_path / "run" / "traceback.txt").exists()


@pytest.mark.parametrize(
    "words",
    [("train", "digits", "--model", "mlp:64-8-10", "--epochs", "5000"), ("reproduce", "song2021.convergence")],
)
def test_a_terminal_that_is_closed_is_answered_as_its_signal(words: tuple[str, ...], tmp_path: Path) -> None:
    """What is still printed then has nowhere to go."""
    master, terminal = os.openpty()
    command = [sys.executable, "-m", "falign", *words, "--out", str(tmp_path / "out")]
    attach = "import fcntl, os, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", attach, *command], stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True,
    ) as process:  # fmt: skip
        os.close(terminal)
        shown = b""
        while b"epoch    2/" not in shown and b"%" not in shown.partition(b"runs")[2]:
            shown += os.read(master, 4096)
        os.close(master)
        assert process.wait(60) == 128 + signal.SIGHUP, shown
    if words[0] == "train":
        status = RunFolder(tmp_path / "out").read_status()
        assert (status["status"], status["step"]) == ("interrupted", status["saved"])
        assert go_on(tmp_path / "out", epochs=status["epoch"] + 1).status == "done"


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with GracefulStop() as stop:
        assert all(signal.getsignal(number) != each for number, each in zip(SIGNALS, before, strict=True))
        with stop.first_deferred():
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested == signal.SIGTERM
            with stop.all_deferred():
                for number in SIGNALS:
                    signal.raise_signal(number)
            with pytest.raises(Stopped) as caught:
                signal.raise_signal(signal.SIGHUP)
            assert caught.value.number == signal.SIGHUP
        with pytest.raises(Stopped), stop.first_deferred():
            raise AssertionError("one came already")
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_other_threads_train_as_ever(tmp_path: Path, whole: Path) -> None:
    thread = threading.Thread(target=begin, args=(config(), tmp_path / "run"))
    thread.start()
    thread.join()
    assert same(tmp_path / "run", whole)


def test_a_forward_that_swallows_the_second_one_is_stopped_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Learner.step

    def swallows(learner: Learner, x: torch.Tensor, y: torch.Tensor, done: int) -> tuple[float, int]:
        if done == 1:
            signal.raise_signal(signal.SIGTERM)
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        return step(learner, x, y, done)

    monkeypatch.setattr(Learner, "step", swallows)
    assert begin(config(), tmp_path / "run").status == "interrupted"
    assert _train.RunFolder(tmp_path / "run").read_status()["step"] == 2
