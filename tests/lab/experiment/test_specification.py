"""Experiments as values: keys of runs, grids, verdicts."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from examples import CLAIM, WRONG, experiment, paper

from falign.lab.config import ConfigError
from falign.lab.experiment import PRESETS, Check, Evidence, LazyExperiments, Missing, Picture, Task, grid
from falign.lab.experiment._results import Results, judge
from falign.lab.experiment._selection import choose_presets, select, told_presets
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
    line = raising.__code__.co_firstlineno + 2
    reason = f"the claim cannot be read: KeyError: 'cosine' (test_specification.py:{line})"
    assert (broken.verdict, broken.message, broken.broken) == ("not run", reason, True)


def test_names_mean_papers_or_experiments() -> None:
    one, two = experiment(name="toy.one"), experiment(name="toy.two")
    papers = {"toy": paper(one, two)}
    assert [each.name for each in select([], papers).experiments] == ["toy.one", "toy.two"]
    assert [each.name for each in select(["toy.two", "toy.two"], papers).experiments] == ["toy.two"]
    assert select(["toy.two"], papers).papers == (papers["toy"],), "the report shows the whole paper"
    assert [each.name for each in select(["toy.two", "toy"], papers).experiments] == ["toy.one", "toy.two"]
    with pytest.raises(
        ConfigError,
        match=r"NAME is 'tony' \(did you mean toy\?\), expected a paper or an experiment: toy, or what",
    ):
        select(["tony"], papers)


SIZED = replace(
    experiment(name="toy.one"),
    grid={"smoke": grid(rate=0.1, steps=2), "quick": grid(rate=(0.1, 0.2), steps=2), "paper": grid(rate=0.9, steps=2)},
    seeds={"smoke": 2, "quick": 3, "paper": 9},
    together=(),
)
"""The runs of its preset smoke are two of the six of quick."""


NONE_OF_PAPER = "no run of preset paper is there, but of preset quick 5 runs are: use --preset quick"


def runs_of(*counts: int) -> dict[str, set[str]]:
    """{preset: keys of the runs that are there}, if the first so many of each were computed."""
    kept = {task.key for preset, count in zip(PRESETS, counts, strict=True) for task in SIZED.tasks(preset)[:count]}
    return {preset: {task.key for task in SIZED.tasks(preset)} & kept for preset in PRESETS}


@pytest.mark.parametrize(
    ("asked", "counts", "expected", "note"),
    [
        (None, (2, 0, 0), "smoke", "preset smoke, of which 2 runs are there"),
        (None, (2, 3, 0), "quick", "preset quick, of which 3 runs are there"),
        (None, (0, 1, 0), "smoke", "preset smoke, of which 1 run is there"),
        (None, (2, 6, 9), "paper", "preset paper, of which 9 runs are there"),
        (None, (0, 0, 0), "quick", ""),
        ("smoke", (0, 0, 0), "smoke", ""),
        ("smoke", (2, 6, 0), "smoke", ""),
        (
            "paper",
            (2, 5, 0),
            "paper",
            "no run of preset paper is there, but of preset quick 5 runs are: use --preset quick",
        ),
    ],
)
def test_the_preset_that_is_shown(asked: str | None, counts: tuple[int, ...], expected: str, note: str) -> None:
    there = {"toy.one": runs_of(*counts)}
    chosen = choose_presets([paper(SIZED)], there, asked)
    assert chosen == {"toy.one": expected}
    assert told_presets(chosen, there, asked) == note


def test_presets_of_a_paper_may_be_mixed() -> None:
    other, none = replace(SIZED, name="toy.two"), replace(SIZED, name="toy.three")
    whole = paper(SIZED, other, none)
    there = {"toy.one": runs_of(2, 6, 0), "toy.two": runs_of(0, 0, 3), "toy.three": runs_of(0, 0, 0)}
    chosen = choose_presets([whole], there)
    assert chosen == {"toy.one": "quick", "toy.two": "paper", "toy.three": "quick"}
    words = "presets are mixed, each the one of which most runs are there: quick of toy.one; paper of toy.two"
    assert told_presets(chosen, there, None) == words
    asked = choose_presets([whole], there, "smoke", [other])
    assert asked == {"toy.one": "quick", "toy.two": "smoke", "toy.three": "smoke"}


ONCE = {"grid": {"quick": grid(rate=0.1, steps=2)}, "seeds": {"quick": 1}}
PICTURE = Picture(name="line", caption="A line.", data=lambda table: table, draw=lambda data: data)  # pyright: ignore
PAPER = paper(experiment(name="toy.one"))


def no_seed(*, setting: object, rate: float, steps: int) -> None: ...


def no_setting(*, seed: int, rate: float, steps: int) -> None: ...


def no_steps(*, seed: int, setting: object, rate: float) -> None: ...


def text_rate(*, seed: int, setting: object, rate: str, steps: int) -> None: ...


def two_tables(one: object, other: object) -> None: ...


REFUSED: list[tuple[object, list[tuple[dict, str]]]] = [
    (
        experiment(),
        [
            (
                {"seeds": {"smoke": range(3), "quick": 1, "paper": 1}},
                "its seeds of preset smoke are range(0, 3), expected",
            ),
            ({"seeds": {"smoke": [0, 1], "quick": 1, "paper": 1}}, "its seeds of preset smoke are [0, 1], expected"),
            ({"seeds": {"smoke": 0, "quick": 1, "paper": 1}}, "its seeds of preset smoke are 0, expected"),
            ({"seeds": {"smoke": True, "quick": 1, "paper": 1}}, "its seeds of preset smoke are True, expected"),
            ({"seeds": {"smoke": 1, "quick": 1}}, "its seeds leave out the preset 'paper'"),
            ({"seeds": 3}, "its seeds is an int, expected {preset: …} with presets of smoke, quick, paper"),
            ({"grid": {"smoke": grid(rate=0.1)}}, "its grid leave out the preset 'quick'"),
            ({"grid": grid(rate=0.1)}, "its grid is a tuple, expected {preset: …}"),
            ({"grid": {}, "seeds": {}}, "it has no preset: give grid and seeds of at least one of smoke, quick, paper"),
            ({"grid": {"quick": ()}, "seeds": {"quick": 1}}, "its grid of preset quick has no points"),
            ({"grid": {"quick": (0.1, 0.2)}, "seeds": {"quick": 1}}, "its grid of preset quick has a float, expected"),
            (
                {"grid": {"quick": grid(rate=(0.1, 0.1))}, "seeds": {"quick": 1}},
                "has a point twice, rate=0.1: leave one",
            ),
            (
                {"grid": {"smok": grid(rate=0.1)}, "seeds": {"smok": 1}},
                "it has a preset 'smok', expected smoke, quick, p",
            ),
            ({"grid": {"quick": iter(())}, "seeds": {"quick": 1}}, "its grid of preset quick is a tuple_iterator"),
            ({"grid": {"quick": ({"rate": "\ud800"},)}, "seeds": {"quick": 1}}, "expected a text of UTF-8"),
            ({"name": "../elsewhere"}, "its name is '../elsewhere', expected at most 100 letters"),
            ({"name": ".index"}, "its name is '.index', expected"),
            ({"name": "leases"}, "its name is that of a folder of the store's own: rename it"),
            ({"name": "report"}, "its name is that of a folder of the store's own: rename it"),
            ({"name": ""}, "its name is '', expected"),
            ({"title": ""}, "its title is '', expected a text"),
            ({"source": None}, "its source is None, expected a text"),
            ({"revision": "1"}, "its revision is '1', expected a whole number"),
            ({"at_most": 0}, "at_most is 0, expected"),
            ({"agreement": -1.0}, "its agreement is -1.0"),
            ({"run": 3}, "its run is an int, expected a function"),
            ({"memory": 2**30}, "its memory is an int, expected a function"),
            (
                {"run": no_seed, **ONCE, "together": ()},
                "its run takes neither seed nor seeds: add one of these keywords",
            ),
            ({"run": no_setting, **ONCE, "together": ()}, "its run takes no setting: add this keyword"),
            ({"run": no_steps, **ONCE, "together": ()}, "its run takes no axis 'steps': add this keyword, or leave"),
            ({"run": text_rate, **ONCE, "together": ()}, "axis 'rate' has 0.1, expected str as run annotates it"),
            ({"together": ("rates",)}, "together names 'rates', which is no axis"),
            ({"together": "rate"}, "together is 'rate', expected a tuple of names, such as ('rate',)"),
            ({"claims": (CLAIM, CLAIM)}, "two of its claims are called 'first-step'"),
            ({"claims": CLAIM}, "its claims is a Claim, expected a tuple of them: write (claim,) with a comma"),
            ({"claims": (PICTURE,)}, "its claims has a Picture, expected Claim alone"),
            ({"pictures": 1}, "its pictures is an int, expected a tuple of Picture"),
        ],
    ),
    (
        CLAIM,
        [
            ({"name": "two words"}, "claim 'two words': its name is 'two words', expected letters, digits and hyphens"),
            ({"statement": " "}, "its statement is ' ', expected a text"),
            ({"method": 3}, "its method is 3, expected a text"),
            ({"origin": "papers"}, "its origin is 'papers', expected paper, theory, beyond"),
            ({"origin": "theory", "quotation": "As is well known."}, "it quotes a paper, but its origin is 'theory'"),
            ({"read": "loss"}, "its read is a str, expected a function of the table of runs"),
            (
                {"read": two_tables},
                "its read cannot be called with the table of runs alone (missing a required argument",
            ),
            ({"scope": True}, "its scope is a bool, expected a polars expression such as pl.col('p') > 100, or None"),
        ],
    ),
    (
        PICTURE,
        [
            ({"name": ""}, "picture '': its name is '', expected letters, digits and hyphens"),
            ({"caption": None}, "its caption is None, expected a text"),
            ({"data": None}, "its data is a NoneType, expected a function of the table of runs"),
            ({"draw": two_tables}, "its draw cannot be called with what data gives alone"),
        ],
    ),
    (
        PAPER,
        [
            (
                {"name": "a/b"},
                "paper 'a/b': its name is 'a/b', expected letters, digits, hyphens and underscores",
            ),
            ({"title": ""}, "its title is '', expected a text"),
            ({"authors": ("A", "B")}, "its authors is ('A', 'B'), expected a text"),
            ({"experiments": ()}, "it has no experiments: give at least one"),
            (
                {"experiments": PAPER.experiments[0]},
                "its experiments is an Experiment, expected a tuple of them: write",
            ),
            ({"experiments": (CLAIM,)}, "its experiments has a Claim, expected Experiment alone"),
            ({"experiments": (*PAPER.experiments, *PAPER.experiments)}, "two of its experiments are called 'toy.one'"),
            ({"name": "toys"}, "its experiment 'toy.one' is not named after it: call it toys.one"),
            (
                {"experiments": LazyExperiments({"toy.one": "nowhere"})},
                "an experiment is 'nowhere', expected module:VALUE",
            ),
            ({"interpretations": ("x",)}, "its interpretations has a str, expected Interpretation alone"),
        ],
    ),
]


@pytest.mark.parametrize(
    ("value", "changes", "sentence"),
    [
        pytest.param(value, changes, sentence, id=f"{type(value).__name__}-{sentence[:40]}")
        for value, cases in REFUSED
        for changes, sentence in cases
    ],
)
@pytest.mark.unchecked
def test_what_is_none_is_refused_in_a_sentence_when_it_is_made(value: Any, changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        replace(value, **changes)
    assert "\n" not in str(error.value)


def test_a_preset_that_is_left_out_has_no_runs(tmp_path: Path) -> None:
    only = replace(experiment(), grid={"quick": grid(rate=0.1, steps=2)}, seeds={"quick": 2})
    assert [len(only.tasks(preset)) for preset in PRESETS] == [0, 2, 0]
    store = Store(folder=tmp_path)
    store.open(create=True)
    for preset in PRESETS:
        found = store.results(only, preset)
        assert found.runs.height == len(only.tasks(preset))
        assert judge(CLAIM, found).verdict == "not run"
    assert store.there(only) == {preset: set() for preset in PRESETS}
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
