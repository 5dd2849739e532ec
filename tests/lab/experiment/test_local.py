"""Worker processes: the same numbers, and what happens when a run raises or kills its worker."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import examples
import pytest
from examples import do, experiment, notes, start, started, table, wait_until

from falign.lab.experiment._execution import Block, BlockResult, compute
from falign.lab.experiment._local import Workers, local_executor
from falign.lab.experiment._specification import Setting
from falign.lab.experiment._store import Store


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_workers_leave_the_same_numbers_as_this_process(tmp_path: Path) -> None:
    selected = experiment(rates=(0.1, 0.5, 2.5), steps=40)
    assert do(selected, tmp_path / "two", workers=2)[0] == do(selected, tmp_path / "one")[0] == 0
    assert table(selected, tmp_path / "two").equals(table(selected, tmp_path / "one"))
    origin = Store(folder=tmp_path / "two").results(selected, "smoke").provenance
    assert len(origin) == 1, "both workers have the same share of the cores"
    assert origin[0]["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert origin[0].keys() == {"falign", "python", "torch", "numpy", "polars", "git", "platform", "device", "threads"}


def test_a_run_that_kills_its_worker_is_found_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FALIGN_TEST_NOTES", str(tmp_path / "notes"))
    selected = experiment(examples.dies_at_one, rates=(0.1,), seeds=2)
    code, said = do(selected, tmp_path / "out", executor=Workers(1, Setting()))
    assert code == 1
    assert "1 failed; it (rate=0.1, steps=4, seed=1): its worker process ended with exit code 7" in said
    assert set(table(selected, tmp_path / "out")["seed"]) == {0}
    good, bad = (task.key for task in selected.tasks("smoke"))
    assert notes(tmp_path / "notes", "begun") == [good, bad, good, bad, good, bad], "twice together, then one by one"


def test_a_worker_that_was_killed_and_a_function_that_cannot_travel() -> None:
    selected, foreign = experiment(), experiment(lambda tasks, setting: [])
    with Workers(1, Setting()) as workers:
        workers.submit(Block(experiment=foreign, tasks=foreign.tasks("smoke")))
        (refused,) = workers.wait()  # at once: the worker has not even started
        workers.submit(Block(experiment=selected, tasks=selected.tasks("smoke")))
        for worker in workers._busy:
            worker.process.kill()
        killed = next(each for _ in range(9) for each in workers.wait())
        assert workers.wait() == []
    assert "the runs cannot be sent to a worker" in (refused.result.error or "")
    assert not refused.result.worker_died
    assert killed.result == BlockResult(
        error="its worker process was killed by SIGKILL, perhaps for want of memory", worker_died=True
    )


def test_a_worker_that_cannot_start_is_an_error_and_no_verdict_on_the_runs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import examples as e; from pathlib import Path\n"
        f"e.do(e.experiment(), Path({str(tmp_path / 'out')!r}), 2)  # without the guard that spawned processes need\n"
    )
    environment = {**os.environ, "PYTHONPATH": examples.module_path()}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert "RunError: a worker process cannot start (exit code 1): use --workers 1" in done.stderr
    assert not (tmp_path / "out" / "toy.decay").exists()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (examples.too_few, "9 outcomes came back for 10 runs, expected an Outcome for each"),
        (lambda tasks, setting: [1] * len(tasks), "10 outcomes came back for 10 runs, expected an Outcome for each"),
        (examples.fails_at_three, "ZeroDivisionError: seed three"),
        (lambda tasks, setting: {}[1], "KeyError: 1"),
        (lambda tasks, setting: [][0:].index(3), "ValueError: 3 is not in list"),
    ],
    ids=["too few", "not outcomes", "one raises", "key", "index"],
)
def test_every_fault_of_an_experiment_is_an_answer(function: Callable, words: str) -> None:
    result = compute(function, experiment().tasks("smoke"), Setting())
    assert (result.run_results, result.error, result.worker_died) == (None, words, False)


def test_one_worker_is_this_process() -> None:
    selected = experiment()
    with local_executor(1, Setting()) as here:
        assert here.wait() == []
        here.submit(Block(experiment=selected, tasks=selected.tasks("smoke")))
        (finished,) = here.wait()
        assert len(finished.result.run_results or ()) == 10


def at_work(noted: Path) -> set[int]:
    """Processes that have begun a run."""
    return {int(line.split()[2]) for line in noted.read_text().splitlines()}


@pytest.mark.parametrize(
    ("number", "workers", "group"),
    [
        (signal.SIGINT, 2, True),
        (signal.SIGTERM, 1, True),
        (signal.SIGTERM, 2, False),
        (signal.SIGHUP, 1, False),
        (signal.SIGHUP, 2, True),
    ],
    ids=str,
)
def test_interrupted_it_stops_at_once_and_says_how_to_go_on(
    number: int, workers: int, group: bool, tmp_path: Path
) -> None:
    noted, out = tmp_path / "notes", tmp_path / "out"
    with started(out, noted, workers=workers, pause=0.2, seeds=50, at_most=1) as process:
        wait_until(lambda: len(notes(noted, "computed")) >= 3)
        workers_begun = at_work(noted)
        (os.killpg if group else os.kill)(process.pid, number)
        said, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert f"interrupted: the runs that were finished are kept in {out}, and the same command goes on" in said
    assert "Traceback" not in said
    assert not any(alive(worker) for worker in at_work(noted) | workers_begun)
    assert len(list((out / "toy.decay").glob("*.parquet"))) >= 3 - workers
    assert list((out / "leases").iterdir()) == []
    assert not [path for path in out.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_signal_ends_it_at_once(workers: int, tmp_path: Path) -> None:
    """A run that takes no notice of the first one is left as it is; what is left behind is cleaned by the next call."""
    noted, out = tmp_path / "notes", tmp_path / "out"
    with started(out, noted, workers=workers, run="stubborn", seeds=2, at_most=1) as process:
        wait_until(lambda: len(notes(noted, "begun")) >= workers)
        process.terminate()
        if workers == 1:  # with two the first one is enough: stubborn is the worker, not the command
            wait_until(lambda: bool(notes(noted, "stubborn")))
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == (-signal.SIGINT if workers == 1 else 128 + signal.SIGTERM)
    wait_until(lambda: not any(alive(worker) for worker in at_work(noted)), 10)
    assert do(experiment(seeds=2), out)[0] == 0
    assert list((out / "leases").iterdir()) == []


def test_hangups_that_are_ignored_stay_ignored(tmp_path: Path) -> None:
    noted, out = tmp_path / "notes", tmp_path / "out"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does, for what it starts
    try:
        process = start(out, noted, workers=2, pause=0.05, seeds=6, at_most=1)
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        wait_until(lambda: len(notes(noted, "computed")) >= 2 or process.poll() is not None)
        os.killpg(process.pid, signal.SIGHUP)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "12 of 12 runs there" in said
    assert sorted(notes(noted, "computed")) == sorted(task.key for task in experiment(seeds=6).tasks("smoke"))


@pytest.mark.parametrize("count", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_signals_at_any_moment_lose_nothing_and_leave_nothing_behind(count: int, tmp_path: Path) -> None:
    """From the start of the workers to the writing of the report, by every signal in turn."""
    out, noted = tmp_path / "out", tmp_path / "notes"
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    draw, selected = random.Random(count), experiment(seeds=150, at_most=5)
    kept: set[str] = set()
    for turn in range(count):
        with started(out, noted, workers=1 + turn % 2, pause=0.002, seeds=150, at_most=5) as process:
            mine = f"{process.pid}-*.lock"
            wait_until(lambda: list((out / "leases").glob(mine)) != [] or process.poll() is not None)  # noqa: B023
            time.sleep(draw.random() * 0.4)
            process.send_signal(numbers[turn % 3])
            said, _ = process.communicate(timeout=60)
        assert "Traceback" not in said
        assert process.returncode in (0, 128 + numbers[turn % 3], -numbers[turn % 3]), said
        files = {path.stem for path in (out / "toy.decay").glob("*.parquet")}
        assert kept <= files
        kept = files
        assert not [path for path in out.rglob("*") if ".partial-" in path.name or ".corrupt" in path.name]
        if process.returncode > 0:
            assert list((out / "leases").iterdir()) == []
    assert do(selected, out)[0] == 0
    do(selected, tmp_path / "undisturbed")
    assert table(selected, out).equals(table(selected, tmp_path / "undisturbed"))


def test_killed_it_loses_the_runs_in_flight_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted, out = tmp_path / "notes", tmp_path / "out"
    selected = experiment(seeds=12, at_most=2)
    with start(out, noted, workers=2, pause=0.1, seeds=12, at_most=2) as process:
        wait_until(lambda: len(notes(noted, "computed")) >= 8)
        workers = at_work(noted)
        process.kill()
    wait_until(lambda: not any(alive(worker) for worker in workers), 5)  # no worker is left behind
    begun = set(notes(noted, "begun"))
    kept = {path.stem for path in (out / "toy.decay").glob("*.parquet")}
    assert kept <= begun
    assert len(begun - kept) <= 2 * 2 * 2, "two blocks of two runs at work, and two whose answers were on their way"
    monkeypatch.setenv("FALIGN_TEST_NOTES", str(tmp_path / "again"))
    assert do(selected, out)[0] == 0
    assert set(notes(tmp_path / "again", "computed")) == {task.key for task in selected.tasks("smoke")} - kept
    do(selected, tmp_path / "undisturbed")
    assert table(selected, out).equals(table(selected, tmp_path / "undisturbed"))
