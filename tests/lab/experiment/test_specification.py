"""Experiments as values: keys of runs, grids, verdicts."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from examples import CLAIM, WRONG, experiment, paper

from falign.lab.config import ConfigError
from falign.lab.experiment import PRESETS, Check, Evidence, Missing, Task, grid
from falign.lab.experiment._results import Results, judge
from falign.lab.experiment._selection import choose_preset, select
from falign.lab.experiment._store import Store

TASK = Task("toy.decay", 1, {"rate": 0.1, "steps": 4}, 0)


@pytest.mark.parametrize(
    "other",
    [
        Task("toy.other", 1, {"rate": 0.1, "steps": 4}, 0),
        Task("toy.decay", 2, {"rate": 0.1, "steps": 4}, 0),
        Task("toy.decay", 1, {"rate": 0.2, "steps": 4}, 0),
        Task("toy.decay", 1, {"rate": 0.1, "steps": 4, "width": 1}, 0),
        Task("toy.decay", 1, {"rate": 0.1, "steps": 4}, 1),
    ],
    ids=str,
)
def test_a_key_changes_with_everything_that_a_run_depends_on(other: Task) -> None:
    assert other.key != TASK.key


def test_a_key_is_the_same_in_any_order_and_in_any_process() -> None:
    assert Task("toy.decay", 1, {"steps": 4, "rate": 0.1}, 0).key == TASK.key
    code = (
        "import json, hashlib; print(hashlib.sha256(json.dumps("
        "['toy.decay', 1, {'rate': 0.1, 'steps': 4}, 0]).encode()).hexdigest()[:32])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == TASK.key


def test_presets_share_the_runs_that_they_have_in_common() -> None:
    one = experiment(seeds=2)
    more = replace(one, seeds={**one.seeds, "paper": 5})
    assert {task.key for task in one.tasks("smoke")} < {task.key for task in more.tasks("paper")}


def test_a_grid_is_the_product_of_its_axes() -> None:
    assert grid(p=[1, 2], rule="fa", rate=(0.1, 0.2)) == (
        {"p": 1, "rule": "fa", "rate": 0.1},
        {"p": 1, "rule": "fa", "rate": 0.2},
        {"p": 2, "rule": "fa", "rate": 0.1},
        {"p": 2, "rule": "fa", "rate": 0.2},
    )


@pytest.mark.parametrize(
    ("value", "holds"), [(1.0, True), (2.0, True), (2.1, False), (float("nan"), False), (float("inf"), False)]
)
def test_a_check_holds_in_its_interval_ends_included(value: float, holds: bool) -> None:
    assert Check(label="x", measured=value, low=1.0, high=2.0).holds is holds


def test_a_reading_needs_a_check() -> None:
    with pytest.raises(ValueError, match="raise Missing"):
        Evidence(checks=())


def raising(error: Exception) -> Callable[[pl.DataFrame], Evidence]:
    def read(table: pl.DataFrame) -> Evidence:
        raise error

    return read


def test_verdicts() -> None:
    table = pl.DataFrame({"step": [0], "rate": [0.5], "seed": [0], "x": [0.5]})
    run = {"key": "k", "rate": 0.5, "seed": 0, "status": "done", "message": None, "seconds": 1.0}
    results = Results(experiment=experiment(), preset="smoke", table=table, runs=pl.DataFrame([run]), provenance=())
    assert judge(CLAIM, results).verdict == "holds"
    assert judge(WRONG, results).verdict == "fails"
    lacking = replace(results, table=table.clear(), runs=pl.DataFrame([run | {"status": "missing"}]))
    assert judge(CLAIM, lacking).message == "no run is done"
    missing = judge(replace(CLAIM, read=raising(Missing("no run has p = 100"))), results)
    assert (missing.verdict, missing.message, missing.evidence) == ("not run", "no run has p = 100", None)
    broken = judge(replace(CLAIM, read=raising(KeyError("cosine"))), results)
    assert (broken.verdict, broken.message) == ("not run", "the claim cannot be read: KeyError: 'cosine'")


def test_names_mean_papers_or_experiments() -> None:
    one, two = experiment(name="toy.one"), experiment(name="toy.two")
    papers = {"toy": paper(one, two)}
    assert [each.name for each in select([], papers).experiments] == ["toy.one", "toy.two"]
    assert [each.name for each in select(["toy.two", "toy.two"], papers).experiments] == ["toy.two"]
    assert select(["toy.two"], papers).papers == (papers["toy"],), "the report shows the whole paper"
    assert [each.name for each in select(["toy.two", "toy"], papers).experiments] == ["toy.one", "toy.two"]
    with pytest.raises(
        ConfigError,
        match=r"NAME is 'tony' \(did you mean toy\?\), expected a paper or an experiment: toy, toy.one, toy.two",
    ):
        select(["tony"], papers)


@pytest.mark.parametrize(
    ("asked", "counts", "expected"),
    [
        (None, (10, 20, 3), ("quick", "preset quick, of which 20 runs are there")),
        (None, (10, 10, 3), ("quick", "preset quick, of which 10 runs are there")),
        (None, (1, 1, 1), ("paper", "preset paper, of which 1 run is there")),
        (None, (0, 0, 0), ("quick", "")),
        ("smoke", (0, 0, 0), ("smoke", "")),
        ("smoke", (1, 20, 0), ("smoke", "")),
        (
            "paper",
            (1, 5, 0),
            ("paper", "no run of preset paper is there, but of preset quick 5 runs are: use --preset quick"),
        ),
    ],
)
def test_the_preset_that_is_shown(asked: str | None, counts: tuple[int, ...], expected: tuple[str, str]) -> None:
    assert choose_preset(asked, dict(zip(PRESETS, counts, strict=True))) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"seeds": {"smoke": range(3), "quick": 1, "paper": 1}},
            r"its seeds of preset smoke are range\(0, 3\), expected",
        ),
        ({"seeds": {"smoke": [0, 1], "quick": 1, "paper": 1}}, r"its seeds of preset smoke are \[0, 1\], expected"),
        ({"seeds": {"smoke": 0, "quick": 1, "paper": 1}}, "its seeds of preset smoke are 0, expected"),
        ({"seeds": {"smoke": True, "quick": 1, "paper": 1}}, "its seeds of preset smoke are True, expected"),
        ({"seeds": {"smoke": 1, "quick": 1}}, "its seeds leave out the preset 'paper'"),
        ({"grid": {"smoke": grid(rate=0.1)}}, "its grid leave out the preset 'quick'"),
        (
            {"grid": {"smok": grid(rate=0.1)}, "seeds": {"smok": 1}},
            "it has a preset 'smok', expected smoke, quick, paper",
        ),
        ({"grid": {"quick": iter(())}, "seeds": {"quick": 1}}, "its grid of preset quick is a tuple_iterator"),
        ({"name": "../elsewhere"}, "its name is that of a folder"),
        ({"name": ".index"}, "its name is that of a folder"),
        ({"name": "leases"}, "its name is that of a folder"),
        ({"name": ""}, "its name is that of a folder"),
        ({"revision": "1"}, "its revision is '1', expected a whole number"),
        ({"at_most": 0}, "at_most is 0, expected"),
        ({"together": ("rates",)}, "together names 'rates', which is no axis"),
        ({"claims": (CLAIM, CLAIM)}, "two of its claims are called 'first-step'"),
        ({"agreement": -1.0}, "its agreement is -1.0"),
        ({"grid": {"quick": ({"rate": "\ud800"},)}, "seeds": {"quick": 1}}, "expected a text of UTF-8"),
    ],
    ids=lambda each: re.sub(r" at 0x\w+", "", str(each)),  # addresses differ from process to process
)
@pytest.mark.unchecked
def test_what_is_no_experiment_is_refused_when_it_is_made(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(experiment(), **changes)


def test_a_preset_that_is_left_out_has_no_runs(tmp_path: Path) -> None:
    only = replace(experiment(), grid={"quick": grid(rate=0.1, steps=2)}, seeds={"quick": 2})
    assert [len(only.tasks(preset)) for preset in PRESETS] == [0, 2, 0]
    store = Store(folder=tmp_path)
    store.open(create=True)
    for preset in PRESETS:
        found = store.results(only, preset)
        assert found.runs.height == len(only.tasks(preset))
        assert judge(CLAIM, found).verdict == "not run"
    assert store.counts([only]) == dict.fromkeys(PRESETS, 0)
    assert Task(only.name, 1, {"rate": 0.1, "steps": 2}, 1).key == only.tasks("quick")[1].key


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda: None, "TypeError: it gives a NoneType, expected Evidence"),
        (lambda: 0.5, "TypeError: it gives a float, expected Evidence"),
        (lambda: Evidence(checks=(Check(label="x", measured=None),)), "TypeError"),  # pyright: ignore
        (lambda: Evidence(checks=(Check(label="x", measured="much"),)), "ValueError: could not convert"),  # pyright: ignore
        (lambda: Evidence(checks=(Check(label="x", measured=10**400),)), "OverflowError"),
        (lambda: Evidence(checks=(Check(label=3, measured=1.0),)), "TypeError"),  # pyright: ignore
        (lambda: Evidence(checks=("x",)), "TypeError"),  # pyright: ignore
    ],
    ids=range(7),
)
@pytest.mark.unchecked
def test_what_is_no_reading_is_not_run(read: Callable, words: str) -> None:
    table = pl.DataFrame({"step": [0], "rate": [0.5], "seed": [0], "x": [0.5]})
    run = {"key": "k", "rate": 0.5, "seed": 0, "status": "done", "message": None, "seconds": 1.0}
    results = Results(experiment=experiment(), preset="smoke", table=table, runs=pl.DataFrame([run]), provenance=())
    verdict = judge(replace(CLAIM, read=lambda _: read()), results)
    assert verdict.verdict == "not run"
    assert words in (verdict.message or "")
    scoped = judge(replace(CLAIM, scope=pl.col("nowhere") > 1), results)
    assert "the claim cannot be read: ColumnNotFoundError" in (scoped.message or "")
