"""Reproducing: only what is missing, every failure recorded, and output that can be read without a terminal."""

import io
import json
from dataclasses import replace
from pathlib import Path

import examples
import polars as pl
import pytest
from examples import WRONG, do, experiment, notes, report, table
from rich.console import Console

from falign.lab.experiment import _progress
from falign.lab.experiment._execution import Block
from falign.lab.experiment._local import local_executor
from falign.lab.experiment._progress import RunCounts, duration
from falign.lab.experiment._reproduce import reproduce
from falign.lab.experiment._selection import Selection
from falign.lab.experiment._specification import Experiment, Setting
from falign.lab.experiment._store import Store


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "notes"
    monkeypatch.setenv("FALIGN_TEST_NOTES", str(path))
    return path


def status(selected: Experiment, out: Path) -> dict[int, tuple[str, str | None]]:
    """{seed: status and message} at the first point."""
    runs = Store(folder=out).results(selected, "smoke").runs
    return {row["seed"]: (row["status"], row["message"]) for row in runs.to_dicts()[: selected.seeds["smoke"]]}


def test_only_what_is_missing_is_computed(tmp_path: Path, noted: Path) -> None:
    one = experiment(seeds=2)
    for selected, new in [
        (one, 4),
        (one, 0),
        (experiment(seeds=3), 2),
        (experiment(seeds=3, rates=(0.1, 0.3, 0.5)), 3),
        (experiment(seeds=3, rates=(0.1, 0.3, 0.5), steps=5), 9),
        (one, 0),
    ]:
        noted.unlink(missing_ok=True)
        assert do(selected, tmp_path / "out")[0] == 0
        assert len(notes(noted, "computed")) == new
        do(selected, tmp_path / f"fresh-{new}-{selected.seeds['smoke']}")
        fresh = table(selected, tmp_path / f"fresh-{new}-{selected.seeds['smoke']}")
        assert table(selected, tmp_path / "out").equals(fresh)


def test_one_bad_run_is_found_in_its_block_and_tried_again_next_time(tmp_path: Path, noted: Path) -> None:
    selected = experiment(examples.fails_at_three, rates=(0.1,), seeds=8)
    code, said = do(selected, tmp_path)
    assert code == 1
    expected = dict.fromkeys(range(8), ("done", None)) | {3: ("failed", "ZeroDivisionError: seed three")}
    assert status(selected, tmp_path) == expected
    assert said.count("toy.decay: a run failed: ZeroDivisionError: seed three") == 1
    repaired = replace(selected, run=examples.run)
    noted.unlink()
    assert do(repaired, tmp_path)[0] == 0
    assert len(notes(noted, "computed")) == 1
    assert status(repaired, tmp_path)[3] == ("done", None)


def test_a_number_that_is_not_finite_is_a_failure_and_no_result(tmp_path: Path) -> None:
    selected = experiment(examples.not_finite_at_three)
    assert do(selected, tmp_path)[0] == 1
    assert status(selected, tmp_path)[3] == ("failed", "column 'x' holds nan in record 1, expected finite numbers")
    assert status(selected, tmp_path)[2] == ("done", None)
    assert table(selected, tmp_path)["x"].is_finite().all()


def test_a_diverged_run_is_kept_and_is_no_failure(tmp_path: Path, noted: Path) -> None:
    selected = experiment(rates=(2.5, 0.1), steps=40)
    code, said = do(selected, tmp_path)
    assert code == 0
    assert status(selected, tmp_path)[0] == ("diverged", "|x| beyond 1e6 at step 34")
    assert "5 diverged; the first (rate=2.5, steps=40, seed=0): |x| beyond 1e6 at step 34" in said
    assert set(table(selected, tmp_path)["rate"]) == {0.1}
    noted.unlink()
    do(selected, tmp_path)
    assert notes(noted, "computed") == []


def test_a_failing_claim_is_a_result(tmp_path: Path) -> None:
    code, said = do(experiment(claims=(examples.CLAIM, WRONG)), tmp_path)
    assert code == 0
    assert "claims: 1 hold, 1 fail" in said


def test_the_report_shows_whole_papers(tmp_path: Path) -> None:
    one, two = experiment(name="toy.one"), experiment(name="toy.two")
    selection = Selection(papers=(examples.paper(one, two),), experiments=(one,))
    console = Console(file=io.StringIO())
    code = reproduce(
        selection,
        "smoke",
        out=tmp_path,
        executor=local_executor(1, Setting()),
        memory=2**30,
        console=console,
        write_report=report,
    )
    assert code == 0
    assert json.loads((tmp_path / "report.html").read_text()) == ["toy.one", "toy.two"]
    assert not (tmp_path / "toy.two").exists()


def test_the_report_of_the_laboratory_is_written(tmp_path: Path) -> None:
    code, said = do(experiment(), tmp_path, write_report=None)
    assert code == 0
    page = tmp_path / "report" / "toy.html"
    assert f"the page is {page}, the same as JSON beside it\nall papers: {tmp_path / 'report.html'}" in said
    assert "The first step is as written." in page.read_text()


def test_progress_without_a_terminal_is_lines_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "_PAUSE", 0.0)
    _, said = do(experiment(at_most=2), tmp_path)
    assert all(character.isprintable() or character == "\n" for character in said)
    lines = said.splitlines()
    assert lines[0] == "toy.decay: 0 of 10 runs there, 10 left"
    assert lines[1] == "toy.decay: 2 runs begun"
    assert lines[2] == "toy.decay: 0 of 10 runs there, 2 running, 8 left"
    assert lines[3].startswith("toy.decay: 2 of 10 runs there, 2 running, 6 left, about ")
    assert any(line.startswith("toy.decay: 10 of 10 runs there, after ") for line in lines)


def test_lines_come_seldom(tmp_path: Path) -> None:
    _, said = do(experiment(at_most=1), tmp_path)
    assert [line for line in said.splitlines() if "toy.decay: " in line][:2] == [
        *("toy.decay: 0 of 10 runs there, 10 left", "toy.decay: 1 run begun")
    ]
    assert len([line for line in said.splitlines() if "runs there" in line or "begun" in line]) == 3


def test_a_terminal_has_bars(tmp_path: Path) -> None:
    printed = io.StringIO()
    do(experiment(), tmp_path, console=Console(file=printed, force_terminal=True, width=100))
    assert "━" in printed.getvalue()
    assert "begun" not in printed.getvalue()


def test_the_estimate_counts_what_runs_cost() -> None:
    selected = experiment(rates=(1.0, 3.0), seeds=2, cost=lambda task: float(task.point["rate"]))
    tasks = selected.tasks("smoke")
    counts = RunCounts(experiment=selected, total=4, missing={task.key: task for task in tasks}, status={})
    assert counts.estimate(1) is None
    block = Block(experiment=selected, tasks=tasks[:1])
    counts.start(block)
    counts.add(tasks[0], "done")
    counts.end(block, 2.0)
    assert counts.estimate(1) == pytest.approx(2.0 * 7)
    assert counts.estimate(2) == pytest.approx(7.0)


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.42, 9.94, 9.96, 59.7, 200.0, 7500.0)] == [
        *("0.4 s", "9.9 s", "10 s", "1 min", "3 min 20 s", "2 h 5 min")
    ]


def test_the_time_a_block_takes_is_shared_among_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FALIGN_TEST_PAUSE", "0.01")
    do(experiment(), tmp_path)
    seconds = Store(folder=tmp_path).results(experiment(), "smoke").runs["seconds"]
    assert seconds.n_unique() == 1
    assert 0.1 <= seconds.sum() < 5
    assert seconds.dtype == pl.Float64


def test_a_run_whose_data_are_not_here_is_told_from_a_failed_one(tmp_path: Path, noted: Path) -> None:
    selected = experiment(examples.wants_data, rates=(0.1,), seeds=4)
    code, said = do(selected, tmp_path)
    assert code == 0, "the program did all that it could"
    assert status(selected, tmp_path) == dict.fromkeys(range(4), ("no data", "mnist is not in nowhere: put it there"))
    assert len(notes(noted, "begun")) == 4, "the block is not halved: no half of it would find the data"
    assert "toy.decay: no data: mnist is not in nowhere: put it there" in said
    do(selected, tmp_path)
    assert len(notes(noted, "begun")) == 8, "the data may be here by now"
