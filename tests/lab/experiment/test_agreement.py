"""The runs of two stores beside each other: real runs in other blocks, and digits that were changed."""

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from examples import decay, experiment, paper, report
from rich.console import Console

from falign import papers
from falign.cli import main
from falign.lab.experiment import Outcome, Setting
from falign.lab.experiment._agreement import compare
from falign.lab.experiment._local import local_executor
from falign.lab.experiment._reproduce import reproduce
from falign.lab.experiment._run_file import StoredRun, records_frame
from falign.lab.experiment._selection import Selection
from falign.lab.experiment._store import Store
from falign.papers.song2021.figure2 import FIGURE2


def filled(folder: Path, factor: float = 1.0, **others) -> Store:
    """Toy runs, those of seed 2 times a factor."""
    store = Store(folder=folder, repairs=False)
    store.open(create=True)
    for task in experiment().tasks("smoke"):
        found = decay(task).records
        times = factor if task.seed == 2 else 1.0
        records = {**found, "x": [x * times for x in found["x"]]}  # pyright: ignore
        store.put(
            StoredRun.of(task, others.get(f"s{task.seed}", "done")), records_frame(task, Outcome(records=records))
        )
    return store


@pytest.fixture
def _toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(papers, "PAPERS", {"toy": paper(experiment(), replace(experiment(), name="toy.other"))})


@pytest.mark.usefixtures("_toys")
def test_status_says_how_two_stores_agree(capsys: pytest.CaptureFixture[str]) -> None:
    filled(Path("results"))
    filled(Path("same"))
    assert main(["status", "--against", "same"]) == 0
    said = capsys.readouterr().out
    assert "toy.decay: 10 runs are in both: 10 equal to the bit\n" in said
    assert "toy.other: 0 runs are in both\n" in said
    filled(Path("near"), 1 + 2e-9)
    assert main(["status", "--against", "near"]) == 1
    said = capsys.readouterr().out
    assert "10 runs are in both: 8 equal to the bit, 0 within 0, 2 beyond; the worst (rate=0." in said
    assert "seed=2) differs by 2e-09\n" in said
    assert main(["status", "--against", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("falign: there are no results in nowhere")


def test_what_an_experiment_allows_is_no_difference(tmp_path: Path) -> None:
    one, near = filled(tmp_path / "one"), filled(tmp_path / "near", 1 + 2e-9)
    allowed = replace(experiment(), agreement=1e-8)
    found = compare(one, near, allowed)
    assert (found.equal, found.within, found.beyond) == (8, 2, 0)
    assert str(found) == "toy.decay: 10 runs are in both: 8 equal to the bit, 2 within 1e-08"
    far = compare(one, filled(tmp_path / "far", 1.5), allowed)
    assert (far.beyond, str(far).endswith("seed=2) differs by 0.33")) == (2, True)


def test_only_runs_that_left_something_in_both_are_compared(tmp_path: Path) -> None:
    one = filled(tmp_path / "one", s0="failed", s1="diverged", s3="diverged", s4="no data")
    other = filled(tmp_path / "other", s1="diverged")
    other.path(experiment().tasks("smoke")[2]).unlink()
    found = compare(one, other, experiment())
    assert (found.equal, found.within, found.diverged, found.beyond) == (1, 0, 2, 2)
    assert "differs in what is no number, or in how it ended" in str(found)
    assert [(task.seed, folder) for task, folder in found.failed] == [(0, one.folder)] * 2
    assert str(found).endswith(f"; 2 failed in one of them, such as (rate=0.1, steps=4, seed=0) in {one.folder}")


def diverging(folder: Path, steps: Sequence[int]) -> Store:
    """Toy runs that diverged: of each seed at a step."""
    store = Store(folder=folder, repairs=False)
    store.open(create=True)
    for task in experiment().tasks("smoke"):
        store.put(StoredRun.of(task, "diverged", message=f"not finite at step {steps[task.seed]}"), pl.DataFrame())
    return store


def test_runs_that_diverged_agree_if_they_did_so_at_the_same_step(tmp_path: Path) -> None:
    one = diverging(tmp_path / "one", [3, 4, 5, 6, 7])
    assert (
        str(compare(one, diverging(tmp_path / "same", [3, 4, 5, 6, 7]), experiment()))
        == "toy.decay: 10 runs are in both: 0 equal to the bit, 10 diverged with the same words"
    )
    found = compare(one, diverging(tmp_path / "other", [3, 900, 5, 6, 8]), experiment())
    assert (found.equal, found.diverged, found.beyond) == (0, 6, 4)


@pytest.mark.usefixtures("_toys")
@pytest.mark.parametrize("ours", ["done", "diverged"])
def test_runs_that_failed_when_they_were_computed_again_are_named(
    ours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [f"s{seed}" for seed in range(5)]
    filled(Path("results"), **dict.fromkeys(every, ours))
    filled(Path("again"), **dict.fromkeys(every, "failed"))
    for against, out in (("again", "results"), ("results", "again")):
        assert main(["status", "--against", against, "--out", out]) == 1
        said = " ".join(capsys.readouterr().out.split())
        assert (
            "toy.decay: 0 runs are in both; 10 failed in one of them, such as (rate=0.1, steps=4, seed=0) in again"
            in said
        )
    assert main(["status", "--against", "again", "--out", "again"]) == 0, "what failed in both tells nothing"


def test_whole_numbers_are_not_the_fractions_that_they_are_equal_to(tmp_path: Path) -> None:
    one, other = filled(tmp_path / "one"), filled(tmp_path / "other")
    task = experiment().tasks("smoke")[3]
    one.put(StoredRun.of(task, "done"), pl.DataFrame({"x": [1, 2]}))
    other.put(StoredRun.of(task, "done"), pl.DataFrame({"x": [1.0, 2.0]}))
    found = compare(one, other, experiment())
    assert (found.equal, found.beyond, found.worst) == (9, 1, (task, math.inf))


def computed(out: Path, at_most: int) -> Store:
    """An experiment of a paper at the smallest size, in blocks of some runs."""
    whole = papers.PAPERS["song2021"]
    chosen = replace(FIGURE2, at_most=at_most)
    code = reproduce(
        Selection(papers=(replace(whole, experiments=(chosen,)),), experiments=(chosen,)),
        "smoke",
        out=out,
        executor=local_executor(1, Setting()),
        memory=2**30,
        console=Console(file=io.StringIO()),
        write_report=report,
    )
    assert code == 0
    return Store(folder=out, repairs=False)


def test_runs_of_a_paper_agree_whatever_blocks_they_were_in(tmp_path: Path) -> None:
    allowed = replace(FIGURE2, agreement=max(FIGURE2.agreement, 1e-12))
    found = compare(computed(tmp_path / "whole", 500), computed(tmp_path / "cut", 7), allowed)
    assert found.beyond == 0, str(found)
    assert found.equal + found.within == len(FIGURE2.tasks("smoke"))
