"""What experiments raise and leave: each such run is kept as failed with the reason, and the others go on."""

import array
import math
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from examples import CLAIM, decay, do, experiment, table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from falign.lab._memory import GIB
from falign.lab.data import DataError
from falign.lab.experiment import Outcome, Setting, Task, _run_file
from falign.lab.experiment._execution import compute
from falign.lab.experiment._local import Workers
from falign.lab.experiment._run_file import InvalidOutcome, records_frame, relative_difference
from falign.lab.experiment._store import Store

TASK = experiment().tasks("smoke")[0]
BAD = 3
"""The seed whose run is a bad one; the others are good."""


class RudeError(Exception):
    """An exception that cannot even say what it is."""

    def __str__(self) -> str:
        raise ValueError("no")


class Endless(Sequence):
    """A column that never ends, whatever it says of its length."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> float:
        return 0.5


class Raising(dict):
    """Records that cannot be read."""

    def items(self) -> Any:
        raise OSError("gone")


class Locked:
    """What no pickle takes: it would have to hold a lock."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle a lock")


def outcome(records: Any, diverged: Any = None) -> Outcome:
    """An outcome as an experiment leaves it where nobody checks its types."""
    found = object.__new__(Outcome)
    object.__setattr__(found, "records", records)
    object.__setattr__(found, "diverged", diverged)
    return found


def raising(error: BaseException) -> Callable[[], Outcome]:
    def run() -> Outcome:
        raise error

    return run


OUTCOMES: dict[str, tuple[Any, str]] = {
    "diverged a number": (outcome(records={"x": [1.0]}, diverged=12), "diverged is 12, expected None, or a text"),
    "diverged false": (outcome(records={}, diverged=False), "diverged is False, expected None, or a text"),
    "diverged empty": (outcome(records={}, diverged=" "), "diverged is ' ', expected None, or a text"),
    "diverged a list": (outcome(records={}, diverged=["x"]), "diverged is a list, expected"),
    "records None": (outcome(records=None), "the records are a NoneType, expected a mapping"),
    "records pairs": (outcome(records=[("x", [1])]), "the records are a list, expected a mapping"),
    "records that raise": (outcome(records=Raising(x=[1])), "what it left cannot be read: OSError: gone"),
    "a thousand columns": (outcome(records={f"c{i}": [1] for i in range(1001)}), "have 1001 columns, expected at most"),
    "a text": (outcome(records={"x": "abc"}), "column 'x' is a str, expected a list of values"),
    "bytes": (outcome(records={"x": b"abc"}), "column 'x' is a bytes, expected a list"),
    "a number": (outcome(records={"x": 1.0}), "column 'x' is a float, expected a list"),
    "a set": (outcome(records={"x": {1.0}}), "column 'x' is a set, expected a list"),
    "a mapping": (outcome(records={"x": {0: 1.0}}), "column 'x' is a dict, expected a list"),
    "a generator": (outcome(records={"x": (i for i in "ab")}), "column 'x' is a generator, expected a list"),
    "two axes": (outcome(records={"x": np.zeros((2, 2))}), "column 'x' is an array of 2 axes"),
    "no axis": (outcome(records={"x": torch.tensor(1.0)}), "column 'x' is an array of 0 axes"),
    "endless": (outcome(records={"x": Endless()}), "column 'x' has more than 100000 values: keep fewer"),
    "a number as often as one likes": (
        outcome(records={"x": np.broadcast_to(np.float32(0.5), 2**40)}),
        "column 'x' has more than 100000 values: keep fewer",
    ),
    "expanded": (outcome(records={"x": torch.tensor(7).expand(2**40)}), "column 'x' has more than 100000 values"),
    "many letters": (outcome(records={"x": ["a" * 1000] * 101}), "column 'x' holds more than 100000 letters"),
    "many letters in two columns": (
        outcome(records={"x": ["a" * 1000] * 51, "y": ["b"] * 51}),
        "column 'x' holds more than 50000 letters",
    ),
    "nested": (outcome(records={"x": [[1.0]]}), "column 'x' holds a list, expected str, int"),
    "complex": (outcome(records={"x": [1j]}), "column 'x' holds a complex, expected"),
    "complex array": (outcome(records={"x": torch.zeros(2) * 1j}), "column 'x' holds a complex"),
    "a date": (outcome(records={"x": [datetime.now(UTC)]}), "column 'x' holds a datetime"),
    "dates": (outcome(records={"x": np.array(["2026-01-01"], "M8[ns]")}), "column 'x' holds datetime64"),
    "a difference of dates": (outcome(records={"x": [np.timedelta64(1, "ns")]}), "holds a timedelta64"),
    "decimal": (outcome(records={"x": [Decimal("0.1")]}), "column 'x' holds a Decimal"),
    "fraction": (outcome(records={"x": [Fraction(1, 3)]}), "column 'x' holds a Fraction"),
    "huge": (outcome(records={"x": [10**400]}), "a whole number beyond 64 bits"),
    "huge among fractions": (outcome(records={"x": [0.5, 10**400]}), "a whole number beyond 64 bits"),
    "not a float": (outcome(records={"x": [0.5, 2**53 + 1]}), "a whole number that no float is equal to"),
    "nan": (outcome(records={"x": np.array([1.0, math.nan], "f4")}), "holds nan in record 1, expected finite"),
    "half a letter": (outcome(records={"x": ["\ud800"]}), "column 'x' holds a text that is no Unicode"),
    "kinds": (outcome(records={"x": [True, 2]}), "column 'x' mixes bool, int"),
    "an object": (outcome(records={"x": [Locked()]}), "column 'x' holds a Locked"),
    "__file__": (outcome(records={"__file__": ["a"]}), "a column '__file__': names that begin with __ are"),
    "__run__": (outcome(records={"__run__": [0]}), "a column '__run__': names that begin with __ are"),
    "seed": (outcome(records={"seed": [0]}), "a column 'seed', which is the name of an axis or of the store's own"),
    "status": (outcome(records={"status": ["done"]}), "a column 'status', which is the name of an axis or of"),
    "an axis": (outcome(records={"steps": [1]}), "a column 'steps', which is the name of an axis"),
    "name a number": (outcome(records={7: [1]}), "a column 7: its name is a int, expected a text"),
    "name bytes": (outcome(records={b"x": [1]}), "a column a bytes: its name is a bytes, expected a text"),
    "name empty": (outcome(records={"": [1]}), "a column '': its name is empty, or has letters that cannot be seen"),
    "name with NUL": (outcome(records={"x\0": [1]}), r"a column 'x\x00': its name is empty, or has letters"),
    "name of half a letter": (outcome(records={"\udcff": [1]}), r"a column '\udcff': its name is empty, or has"),
    "name too long": (outcome(records={"x" * 201: [1]}), "its name has 201 letters, expected at most 200"),
    "not an outcome": ({"x": [1.0]}, "1 outcomes came back for 1 runs, expected an Outcome for each"),
    "exits": (raising(SystemExit(3)), "SystemExit: 3"),
    "interrupts": (raising(KeyboardInterrupt()), "KeyboardInterrupt"),
    "ends a generator": (raising(GeneratorExit()), "GeneratorExit"),
    "rude": (raising(RudeError()), "RudeError: it has a message that cannot be shown"),
    "escapes": (raising(ValueError("\x1b[2J\ud800")), r"ValueError: \x1b[2J\ud800"),
    "long": (raising(ValueError("x" * 10**6)), "ValueError: xxxxx"),
}


def one_bad(left: Any) -> Callable[[Sequence[Task], Setting], list]:
    """Good runs, and at seed ``BAD`` one that leaves, or does, what is given."""

    def run(tasks: Sequence[Task], setting: Setting) -> list:
        return [(left() if callable(left) else left) if task.seed == BAD else decay(task) for task in tasks]

    return run


def statuses(selected: Any, out: Path) -> dict[int, tuple[str, str]]:
    """{seed: status and message}."""
    runs = Store(folder=out).results(selected, "smoke").runs
    return {row["seed"]: (row["status"], row["message"] or "") for row in runs.to_dicts()}


@pytest.mark.parametrize(("left", "words"), OUTCOMES.values(), ids=OUTCOMES)
def test_a_bad_run_is_kept_as_failed_and_the_others_go_on(
    left: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_run_file, "MAX_VALUES", 10**5)
    monkeypatch.setattr(_run_file, "_MAX_LETTERS", 10**5)
    selected = experiment(one_bad(left), rates=(0.1,), seeds=5)
    code, said = do(selected, tmp_path)
    assert code == 1
    found = statuses(selected, tmp_path)
    assert {seed: status for seed, (status, _) in found.items()} == dict.fromkeys(range(5), "done") | {BAD: "failed"}
    assert words in found[BAD][1]
    assert len(found[BAD][1]) < 3000
    assert words[:60] in said
    assert "\x1b" not in said
    assert set(table(selected, tmp_path)["seed"]) == set(range(5)) - {BAD}


COLUMNS: dict[str, tuple[Any, list]] = {
    "float32": (np.array([0.5, 0.25], "f4"), [0.5, 0.25]),
    "int8": (np.array([1, -1], "i1"), [1, -1]),
    "strided": (np.arange(10)[::-3], [9, 6, 3, 0]),
    "texts": (np.array(["a", "b"]), ["a", "b"]),
    "objects": (np.array([None, "b"], object), [None, "b"]),
    "bool": (torch.tensor([True, False]), [True, False]),
    "learned": (torch.tensor([1.5], requires_grad=True), [1.5]),
    "bfloat16": (torch.tensor([1.5, 2.0], dtype=torch.bfloat16), [1.5, 2.0]),
    "series": (pl.Series([1, 2]), [1, 2]),
    "scalars": ([np.float64(0.5), np.float32(0.25), 1.0], [0.5, 0.25, 1.0]),
    "range": (range(3), [0, 1, 2]),
    "deque": (deque([1, 2]), [1, 2]),
    "array": (array.array("d", [0.5]), [0.5]),
    "nothing": ([None, None], [None, None]),
    "no records": (np.zeros(0), []),
    "whole among fractions": ([1, 0.5, None], [1.0, 0.5, None]),
}


@pytest.mark.parametrize(("values", "kept"), COLUMNS.values(), ids=COLUMNS)
def test_columns_of_plain_scalars_are_kept_whatever_holds_them(values: Any, kept: list) -> None:
    found = records_frame(TASK, outcome({"x": values}))["x"].to_list()
    assert found == kept
    assert [type(value) for value in found] == [type(value) for value in kept]


def test_half_a_million_records_are_kept(tmp_path: Path) -> None:
    selected = experiment(
        lambda tasks, setting: [outcome({"x": np.arange(500_000)}) for _ in tasks],
        rates=(0.1,),
        seeds=1,
        claims=(),
    )
    assert do(selected, tmp_path)[0] == 0
    assert int(table(selected, tmp_path)["x"].sum()) == 499_999 * 250_000  # pyright: ignore


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
    | st.datetimes()
    | st.decimals()
    | st.sampled_from(
        [object(), Locked(), int, RudeError(), np.float32(2), np.datetime64("2026-01-01", "ns"), torch.ones(2)]
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.text(max_size=5) | st.sampled_from(["x", "rate", "seed", "__file__", "key", "x" * 300]) | st.integers()


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_whatever_an_experiment_leaves_can_be_kept_or_is_refused(count: int, tmp_path: Path) -> None:
    store = Store(folder=tmp_path)
    store.open(create=True)

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(NAMES, st.lists(ANYTHING, max_size=3) | ANYTHING, max_size=3) | ANYTHING, ANYTHING)
    def tried(records: Any, diverged: Any) -> None:
        result = compute(lambda tasks, setting: [outcome(records, diverged)], [TASK], Setting())
        assert result.run_results is not None
        (run_result,) = result.run_results
        assert (run_result.status == "done") == (run_result.message is None)
        if run_result.status == "failed":
            assert run_result.message
            run_result.message.encode()
            return
        assert run_result.records.width == len(records)
        for name, values in records.items():
            kept = run_result.records[name].to_list()
            assert kept == [value.item() if isinstance(value, np.generic) else value for value in values][: len(kept)]
            if run_result.status == "done":
                assert len(kept) == len(values)
                assert all(math.isfinite(value) for value in kept if isinstance(value, float))

    tried()


def disturbing(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Changes all that a process has one of, and leaves what it drew without a seed."""
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
    os.chdir("/")
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    print("a line of the experiment")
    return [Outcome(records={"drawn": drawn}) for _ in tasks]


def around() -> list:
    """What a process has one of."""
    state = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # pyright: ignore  # noqa: NPY002
    what = (os.getcwd(), torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device())
    return [*state, *what, torch.is_grad_enabled()]


@pytest.mark.unchecked  # checks draw from Python's generator
def test_what_a_block_changes_in_its_process_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    selected, before = experiment(disturbing, claims=(), at_most=1), around()
    assert do(selected, Path("here"))[0] == 0
    assert around() == before
    assert (tmp_path / "here" / "falign.json").exists(), "a relative folder stays where it was"
    assert do(selected, Path("there"), executor=Workers(2, Setting()))[0] == 0
    drawn = table(selected, Path("here"))
    assert drawn.equals(table(selected, Path("there"))), "what is drawn without a seed depends on the run alone"
    assert drawn["drawn"].n_unique() == len(drawn)


def forks(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """A copy of the process comes back with outcomes of its own."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return [Outcome(records={"child": [child == 0]}) for _ in tasks]


def exits_at_three(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    if any(task.seed == BAD for task in tasks):
        sys.exit("enough")
    return [decay(task) for task in tasks]


def leaves_locks(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    outcomes = [decay(task) for task in tasks]
    outcomes[BAD] = outcome({"x": [Locked()]})
    return outcomes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot copy a process")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_copies_its_process_answers_once(workers: int, tmp_path: Path) -> None:
    selected = experiment(forks, claims=(), rates=(0.1,), seeds=3)
    assert do(selected, tmp_path, workers=workers)[0] == 0
    assert table(selected, tmp_path)["child"].to_list() == [False] * 3


@pytest.mark.parametrize(
    ("function", "words"),
    [(exits_at_three, "SystemExit: enough"), (leaves_locks, "column 'x' holds a Locked, expected str")],
    ids=["exits", "cannot be sent"],
)
def test_workers_live_through_bad_runs(function: Callable, words: str, tmp_path: Path) -> None:
    selected = experiment(function, rates=(0.1,), seeds=5)
    assert do(selected, tmp_path, executor=Workers(1, Setting()))[0] == 1
    found = statuses(selected, tmp_path)
    assert {seed for seed, (status, _) in found.items() if status == "failed"} == {BAD}
    assert words in found[BAD][1]


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (lambda tasks, setting: None, "the runs left a NoneType, expected a list with an Outcome for each"),
        (lambda tasks, setting: 7, "the runs left a int, expected a list"),
        (lambda tasks, setting: (decay(task) for task in [*tasks, *tasks]), "more than 10 outcomes came back for 10"),
        (lambda tasks, setting: iter(int, 1), "more than 10 outcomes came back for 10 runs"),
        (lambda tasks, setting: {task: decay(task) for task in tasks}, "10 outcomes came back for 10 runs, expected"),
    ],
)
def test_what_is_no_list_of_outcomes(left: Callable, words: str) -> None:
    result = compute(left, experiment().tasks("smoke"), Setting())
    assert result.run_results is None
    assert words in (result.error or "")


def test_outcomes_may_come_from_a_generator(tmp_path: Path) -> None:
    selected = experiment(lambda tasks, setting: (decay(task) for task in setting.each(tasks)))
    assert do(selected, tmp_path)[0] == 0
    assert len(table(selected, tmp_path)) == 40


def test_data_that_are_not_here_may_have_any_name(tmp_path: Path) -> None:
    selected = experiment(one_bad(raising(DataError("\x1b]0;x\x07 is not here"))), at_most=1, rates=(0.1,))
    assert do(selected, tmp_path)[0] == 0
    assert statuses(selected, tmp_path)[BAD] == ("no data", r"\x1b]0;x\x07 is not here")


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -1, -math.inf, "much", None, [1], ZeroDivisionError("no")], ids=repr
)
def test_a_memory_that_is_no_number_of_bytes_fails_its_runs_only(value: Any, tmp_path: Path) -> None:
    def memory(tasks: Sequence[Task]) -> Any:
        if any(task.seed == BAD for task in tasks):
            if isinstance(value, Exception):
                raise value
            return value
        return GIB // 4

    selected = experiment(rates=(0.1,), memory=memory)
    assert do(selected, tmp_path)[0] == 1
    found = statuses(selected, tmp_path)
    assert {seed for seed, (status, _) in found.items() if status == "failed"} == {BAD}
    assert found[BAD][1].startswith("how much memory it needs cannot be told: ")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 0, "much", None, [1], ZeroDivisionError("no")], ids=repr)
def test_a_cost_that_is_no_number_changes_nothing_but_the_estimate(value: Any, tmp_path: Path) -> None:
    def cost(task: Task) -> Any:
        if task.seed == BAD:
            if isinstance(value, Exception):
                raise value
            return value
        return 2.0

    assert do(experiment(cost=cost, at_most=2), tmp_path)[0] == 0
    assert len(table(experiment(), tmp_path)) == 40


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"status": 1}, "an axis 'status': it is a name of the store's own: rename it"),
        ({"__run__": 1}, "an axis '__run__': names that begin with __"),
        ({"": 1}, "an axis '': its name is empty"),
        ({"a\0": 1}, "its name is empty, or has letters that cannot be seen"),
        ({3: 1}, "an axis 3: its name is a int"),
        ({"a": math.nan}, "has nan on axis 'a', expected a text, a truth value, a whole number of 64 bits or a finite"),
        ({"a": None}, "has a NoneType on axis 'a'"),
        ({"a": (1, 2)}, "has a tuple on axis 'a'"),
        ({"a": 2**63}, "has a int on axis 'a'"),
        ({"a": np.float64(1)}, r"np.float64\(1.0\) on axis 'a'"),
    ],
    ids=str,
)
def test_a_grid_that_no_table_can_hold_is_refused_when_it_is_made(point: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(experiment(), grid={"smoke": (point,)}, seeds={"smoke": 1}, together=())
    with pytest.raises(ValueError, match="has int, str on axis 'a', expected one kind"):
        replace(experiment(), grid={"smoke": ({"a": 1}, {"a": "b"})}, seeds={"smoke": 1}, together=())


def test_how_far_two_computations_of_a_run_are_apart() -> None:
    one = pl.DataFrame({"step": [0, 1], "x": [2.0, -4.0], "left": [1e-16, 0.0], "name": ["a", None], "y": [None, 1.0]})
    assert relative_difference(one, one.clone()) == 0.0
    assert relative_difference(one, one.with_columns(x=pl.Series([2.0, -4.0 - 4e-9]))) == pytest.approx(1e-9)
    assert relative_difference(one, one.with_columns(left=pl.Series([3e-16, 0.0]))) == pytest.approx(2e-10)
    for other in (one.head(1), one.drop("x"), one.with_columns(name=pl.lit("a")), one.with_columns(y=pl.lit(1.0))):
        assert relative_difference(one, other) == math.inf


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ([-(2**63), None, 5], [2**63 - 1, None, 5], 2.0),
        ([-(2**63)] * 3, [-(2**63)] * 3, 0.0),
        ([2**63 - 1, 0], [2**63 - 2, 0], 2.0**-63),
        ([3 * 2**61, 1], [-3 * 2**61, 1], 2.0),
        ([0, 2], [1, 2], 0.5),
        ([1e300, 0.0], [1e300, 5e-324], 5e-324),
    ],
    ids=str,
)
def test_the_furthest_and_the_nearest_numbers_are_told_apart(one: list, other: list, apart: float) -> None:
    ours, theirs = pl.DataFrame({"x": one}), pl.DataFrame({"x": other})
    assert relative_difference(ours, theirs) == relative_difference(theirs, ours) == apart


def test_a_claim_that_wants_a_column_that_failed_runs_lack(tmp_path: Path) -> None:
    """Nothing of a paper is read off runs that left nothing, and the command says so."""
    selected = experiment(lambda tasks, setting: [outcome({"x": "no"}) for _ in tasks], claims=(CLAIM,))
    start = time.monotonic()
    code, said = do(selected, tmp_path)
    assert code == 1
    assert "claims: 1 not run" in said
    assert time.monotonic() - start < 60


def test_unfit_is_what_frame_raises() -> None:
    with pytest.raises(InvalidOutcome, match="differ in length: x 2, y 1"):
        records_frame(TASK, Outcome(records={"x": [1.0, 2.0], "y": [1.0]}))
