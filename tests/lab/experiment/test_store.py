"""The store: one file a run, written whole, read into one table; damage is named and set aside."""

import errno
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from examples import decay, do, experiment, table
from filelock import FileLock

from falign.lab._files import RunError, WriteError, from_json, to_json
from falign.lab.experiment import Outcome, Task, _run_file
from falign.lab.experiment._leases import RunLeases
from falign.lab.experiment._run_file import (
    FORMAT,
    CorruptRun,
    InvalidOutcome,
    StoredRun,
    encode,
    read_run,
    records_frame,
)
from falign.lab.experiment._store import Store

ONE = Task("toy.decay", 1, {"rate": 0.1, "steps": 4}, 0)


def made(folder: Path) -> tuple[Store, list[str]]:
    said: list[str] = []
    store = Store(folder=folder, log=said.append)
    store.open(create=True)
    return store, said


def filled(folder: Path, **options) -> tuple[Store, list[str]]:
    store, said = made(folder)
    for task in experiment(**options).tasks("smoke"):
        store.put(StoredRun.of(task, "done", seconds=0.5), records_frame(task, decay(task)))
    return store, said


def test_a_run_keeps_everything_about_it(tmp_path: Path) -> None:
    store, _ = made(tmp_path)
    origin = {"torch": "2", "git": {"commit": "abc", "changed": True}, "started": "2026-01-01T00:00:00+00:00"}
    entry = StoredRun.of(ONE, "diverged", message="at step 3", seconds=1.5, provenance=origin)
    store.put(entry, records_frame(ONE, decay(ONE)))
    assert store.get(ONE) == entry
    path = tmp_path / "toy.decay" / f"{ONE.key}.parquet"
    values = json.loads(pl.read_parquet_metadata(path)["falign"])
    assert {name: values[name] for name in ("falign-run", "point", "seed", "status", "provenance", "columns")} == {
        "falign-run": FORMAT,
        "point": {"rate": 0.1, "steps": 4},
        "seed": 0,
        "status": "diverged",
        "provenance": origin,
        "columns": {"step": "Int64", "x": "Float64"},
    }
    assert pl.read_parquet(path)["x"].to_list() == decay(ONE).records["x"]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_the_table_has_points_seeds_and_records_in_the_order_of_the_runs(tmp_path: Path) -> None:
    selected = experiment()
    store, _ = filled(tmp_path)
    results = store.results(selected, "smoke")
    expected = [
        {**task.point, "seed": task.seed, "step": step, "x": x}
        for task in selected.tasks("smoke")
        for step, x in enumerate(decay(task).records["x"])
    ]
    assert results.table.to_dicts() == expected
    assert results.runs["status"].to_list() == ["done"] * 10
    assert results.runs["seconds"].to_list() == [0.5] * 10
    assert results.runs.columns == ["key", "rate", "steps", "seed", "status", "message", "seconds"]


def test_columns_of_different_types_become_one(tmp_path: Path) -> None:
    store, _ = made(tmp_path)
    selected = experiment(rates=(0, 0.5), seeds=2)
    kept: list[dict] = [{"x": [1, 2], "y": [None, None]}, {"x": [0.5], "y": ["a"]}, {}, {"x": [], "z": []}]
    for task, records in zip(selected.tasks("smoke"), kept, strict=True):
        store.put(StoredRun.of(task, "done"), records_frame(task, Outcome(records=records)))
    found = store.results(selected, "smoke").table
    assert found["rate"].dtype == pl.Float64
    assert found["x"].to_list() == [1.0, 2.0, 0.5]
    assert found["y"].to_list() == [None, None, "a"]
    assert found["seed"].to_list() == [0, 0, 1]


def test_a_store_without_records(tmp_path: Path) -> None:
    store, _ = made(tmp_path)
    selected = experiment()
    assert store.results(selected, "smoke").table.is_empty()
    assert store.results(selected, "smoke").count("missing") == 10
    for task in selected.tasks("smoke"):
        store.put(StoredRun.of(task, "done"), records_frame(task, Outcome(records={})))
    results = store.results(selected, "smoke")
    assert results.table.is_empty()
    assert results.count("done") == 10
    assert results.table.columns == ["rate", "steps", "seed"]


def test_only_runs_that_are_done_come_into_the_table(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    first, second, third, *_ = experiment().tasks("smoke")
    store.put(StoredRun.of(first, "diverged", message="at step 2"), records_frame(first, decay(first)))
    store.put(StoredRun.of(second, "failed", message="ValueError: no"), pl.DataFrame())
    store.path(third).unlink()
    results = store.results(experiment(), "smoke")
    assert set(results.table.filter(pl.col("rate") == 0.1)["seed"]) == {3, 4}
    assert results.runs["status"].to_list()[:4] == ["diverged", "failed", "missing", "done"]
    assert results.runs["message"].to_list()[:4] == ["at step 2", "ValueError: no", None, None]


def test_the_distinct_origins(tmp_path: Path) -> None:
    store, _ = made(tmp_path)
    for number, task in enumerate(experiment().tasks("smoke")):
        origin = {"threads": 1 + number % 2, "started": str(number)}
        store.put(StoredRun.of(task, "done", provenance=origin), pl.DataFrame())
    assert store.results(experiment(), "smoke").provenance == ({"threads": 1}, {"threads": 2})


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def zeroed(content: bytes) -> bytes:
    """The records are gone, the metadata at the file's end is whole."""
    return content[:4] + bytes(100) + content[104:]


def emptied(content: bytes) -> bytes:
    return b""


def foreign(content: bytes) -> bytes:
    return b"PAR1" + b"what is this" * 10 + b"PAR1"


@pytest.mark.parametrize("damage", [cut, zeroed, emptied, foreign])
def test_a_damaged_file_is_named_set_aside_and_computed_again(damage, tmp_path: Path) -> None:
    filled(tmp_path / "whole")
    store, said = filled(tmp_path / "damaged")
    path = store.path(ONE)
    path.write_bytes(damage(path.read_bytes()))
    results = store.results(experiment(), "smoke")
    assert results.runs["status"].to_list() == ["missing"] + ["done"] * 9
    assert len(said) == 1
    assert f"{path} is damaged (" in said[0]
    assert f"it is set aside as {path.name}.corrupt, and the run counts as missing" in said[0]
    assert path.with_name(f"{path.name}.corrupt").exists()
    assert do(experiment(), tmp_path / "damaged")[0] == 0
    assert table(experiment(), tmp_path / "damaged").equals(table(experiment(), tmp_path / "whole"))


def test_a_file_under_the_name_of_another_run_is_set_aside(tmp_path: Path) -> None:
    store, said = filled(tmp_path)
    first, second, *_ = experiment().tasks("smoke")
    shutil.copy(store.path(first), store.path(second))
    assert store.get(second) is None
    assert f"it holds the run {first.key} of toy.decay" in said[0]
    pl.DataFrame({"x": [1]}).write_parquet(store.path(first))
    assert store.get(first) is None
    assert "it has no checksum" in said[1]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    store, said = filled(tmp_path, rates=(0.1,), seeds=1)
    path = store.path(ONE)
    content = path.read_bytes()
    read_run(path)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(CorruptRun):
            read_run(path)
    assert said == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 7}, "its key is {key}, but its experiment, revision, point and seed have"),
        ({"point": {"rate": 0.2, "steps": 4}}, "its key is {key}, but its experiment, revision, point and seed have"),
        ({"revision": 2}, "its key is {key}, but its experiment, revision, point and seed have"),
        ({"status": "fine"}, "its status is 'fine'"),
        ({"point": 3}, "its metadata is no entry"),
    ],
    ids=str,
)
def test_an_entry_must_be_of_the_run_that_its_key_says(change: dict, words: str, tmp_path: Path) -> None:
    store, said = made(tmp_path)
    entry = StoredRun.of(ONE, "done")
    for name, value in change.items():
        object.__setattr__(entry, name, value)  # what no entry would be made with
    store.put(entry, records_frame(ONE, decay(ONE)))
    assert store.get(ONE) is None
    assert words.format(key=ONE.key) in said[0]


def test_files_of_an_older_format_count_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, said = filled(tmp_path)
    (tmp_path / "falign.json").write_bytes(to_json({"format": 1}))
    for number, task in enumerate(experiment().tasks("smoke")[:3]):
        with monkeypatch.context() as older:
            older.setattr(_run_file, "FORMAT", 1 + number % 2)
            store.path(task).write_bytes(encode(StoredRun.of(task, "done"), pl.DataFrame({"x": [1.0]})))
    assert store.results(experiment(), "smoke").count("missing") == 3
    assert said == ["toy.decay: 3 runs are of an older format: such runs count as missing"]
    assert store.get(ONE) is None
    assert do(experiment(), tmp_path)[0] == 0
    assert store.results(experiment(), "smoke").count("done") == 10
    assert len(list((tmp_path / "toy.decay").iterdir())) == 10, "none was set aside"
    assert from_json((tmp_path / "falign.json").read_bytes()) == {"format": FORMAT}, "an older falign keeps away"


def test_what_was_set_aside_before_stays(tmp_path: Path) -> None:
    store, said = filled(tmp_path)
    path = store.path(ONE)
    path.with_name(f"{path.name}.corrupt").mkdir()
    for number, content in ((2, b"one"), (3, b"two")):
        path.write_bytes(content)
        assert store.get(ONE) is None
        assert path.with_name(f"{path.name}.corrupt-{number}").read_bytes() == content
        assert f"it is set aside as {path.name}.corrupt-{number}," in said[-1]


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("damage", [cut, emptied, "folder"])
def test_a_run_that_is_put_while_a_damaged_file_is_set_aside_is_kept(
    times: int, damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process puts it right before the file is moved, and perhaps once more right after."""
    store, said = filled(tmp_path)
    path, really = store.path(ONE), os.replace
    good = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(damage(good))

    def put() -> None:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(good)

    def moved(source: Path, target: Path) -> None:
        aside = str(target).endswith(".corrupt")
        if aside:
            put()
        really(source, target)
        if aside and times == 2:
            put()

    monkeypatch.setattr(os, "replace", moved)
    store.results(experiment(), "smoke")
    assert store.results(experiment(), "smoke").count("done") == 10
    assert [each.name for each in path.parent.iterdir() if "corrupt" in each.name] == said == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_a_file_that_cannot_be_read_is_not_damaged(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, said = filled(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    really = os.open

    def refused(path: object, *options: Any, **more: Any) -> int:
        if str(path).endswith(".parquet"):
            raise OSError(number, os.strerror(number), str(path))
        return really(path, *options, **more)  # pyright: ignore

    monkeypatch.setattr(os, "open", refused)
    words = rf"cannot read {store.path(ONE)}: {os.strerror(number)}; nothing was done to it"
    for attempt in (lambda: store.get(ONE), lambda: store.results(experiment(), "smoke")):
        with pytest.raises(RunError, match=words):
            attempt()
    assert (said, sorted(tmp_path.rglob("*"))) == ([], before)


def test_a_store_that_is_only_read_is_not_changed(tmp_path: Path) -> None:
    filled(tmp_path)
    said: list[str] = []
    store = Store(folder=tmp_path, repairs=False, log=said.append)
    store.path(ONE).write_bytes(b"PAR1")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert store.results(experiment(), "smoke").count("missing") == 1
    assert len(said) == 1
    assert said[0].startswith(f"{store.path(ONE)} is damaged (")
    assert said[0].endswith("): the run counts as missing, and falign reproduce computes it again")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_file_where_a_folder_belongs(tmp_path: Path) -> None:
    store, _ = made(tmp_path)
    (tmp_path / "toy.decay").write_text("mine")
    with pytest.raises(
        RunError, match=r"toy.decay is a file, expected the folder of the runs of toy.decay: move it away"
    ):
        store.results(experiment(), "smoke")
    with pytest.raises(RunError, match=r"toy\.decay is a file"):
        do(experiment(), tmp_path)
    with pytest.raises(WriteError, match=r"cannot make the folder .*toy.decay: File exists"):
        store.put(StoredRun.of(ONE, "done"), records_frame(ONE, decay(ONE)))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_reproducing_in_a_folder_that_cannot_be_written(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, seeds=1)

    def refused(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FileLock, "acquire", refused)
    with pytest.raises(RunError, match=rf"cannot write in {tmp_path}: {os.strerror(code)}; make it writable, or give"):
        do(experiment(), tmp_path)


def test_another_revision_is_left_alone(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    newer = experiment(revision=2, seeds=1)
    before = {path: path.read_bytes() for path in (tmp_path / "toy.decay").iterdir()}
    assert store.results(newer, "smoke").count("missing") == 2
    _, said = do(newer, tmp_path)
    assert "toy.decay: 10 runs of other revisions are left alone" in said
    assert store.results(newer, "smoke").others == 10
    assert store.results(newer, "smoke").count("done") == 2
    assert before.items() <= {path: path.read_bytes() for path in (tmp_path / "toy.decay").iterdir()}.items()


def test_a_folder_that_another_process_makes_a_store_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look for its marker and the look for anything else."""
    exists = os.path.lexists
    looks = iter([False])

    def first_look_is_too_early(path: object) -> bool:
        if not next(looks, True):
            Store(folder=tmp_path).open(create=True)
            (tmp_path / "toy.decay").mkdir()
            return False
        return exists(path)

    monkeypatch.setattr("os.path.lexists", first_look_is_too_early)
    Store(folder=tmp_path).open(create=True)
    assert next(looks, None) is None


def test_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"is an output folder that is not ours, it has no falign.json: give a new"):
        Store(folder=tmp_path).open(create=True)
    with pytest.raises(RunError, match=r"thesis.tex is an output folder that is not ours"):
        Store(folder=tmp_path / "thesis.tex").open(create=True)
    with pytest.raises(RunError, match=r"cannot use .*Not a directory; give another folder"):
        Store(folder=tmp_path / "thesis.tex" / "results").open(create=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_another_process_is_just_making(tmp_path: Path) -> None:
    (tmp_path / ".falign.json.partial-123").write_text("{")
    Store(folder=tmp_path).open(create=True)
    assert (tmp_path / "falign.json").exists()


def test_what_killed_processes_left_half_written_is_taken_away(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    partial = tmp_path / "toy.decay" / f".{ONE.key}.parquet.partial-123"
    partial.write_text("PAR1")
    with RunLeases(store), RunLeases(store):
        assert not partial.exists()
        partial.write_text("PAR1")
        with RunLeases(store):
            assert partial.exists(), "somebody else may be writing it"


def test_what_others_are_writing_below_a_store_is_not_taken_away(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    key, number = ONE.key, "0011223344556677"
    names = [
        f"fa/.checkpoint-00000020.safetensors.partial-{number}",
        f"fa/.records.parquet.partial-{number}",
        f"toy.decay/.notes.parquet.partial-{number}",
        f"toy.decay/.{key.upper()}.parquet.partial-{number}",
        f"fa/pictures/.{key}.parquet.partial-{number}",
    ]
    ours = [
        f"toy.decay/.{key}.parquet.partial-{number}",
        f"leases/.1-abc.json.partial-{number}",
        f".index/.toy.decay.partial-{number}",
    ]
    for name in (*names, *ours):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("being written")
    with RunLeases(store):
        assert [(tmp_path / name).exists() for name in names] == [True] * len(names)
        assert not any((tmp_path / name).exists() for name in ours)


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there are no results in"):
        Store(folder=tmp_path / "nothing").open(create=False)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (to_json({"format": 9}), rf"by a newer falign \(format 9, this one knows {FORMAT}\): update"),
        (to_json({"format": "2"}), r"falign.json cannot be read \(it tells no format\)"),
        (b'{"format": 2}', r"falign.json cannot be read \(it has no checksum\)"),
        (b"\xff{", "falign.json cannot be read"),
    ],
)
def test_a_store_of_another_version(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "falign.json").write_bytes(content)
    with pytest.raises(RunError, match=words):
        Store(folder=tmp_path).open(create=True)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ({"x": [1.0, math.nan]}, "column 'x' holds nan in record 1, expected finite numbers"),
        ({"step": [0, 1], "x": [-math.inf, 1.0]}, "column 'x' holds -inf in record 0"),
        ({"x": [1.0, 2.0], "y": [1]}, "differ in length: x 2, y 1"),
        ({"rate": [1.0]}, "a column 'rate', which is the name of an axis"),
        ({"seed": [1]}, "a column 'seed', which is the name of an axis or of the store's own"),
        ({"x": [1, "one"]}, "column 'x' mixes int, str"),
        ({"x": [True, 1.0]}, "column 'x' mixes bool, float"),
        ({"x": [2**70]}, "column 'x' holds a whole number beyond 64 bits"),
    ],
    ids=str,
)
def test_records_that_are_not_fit_to_be_kept(records: dict, words: str) -> None:
    with pytest.raises(InvalidOutcome, match=words):
        records_frame(ONE, Outcome(records=records))


def test_records_of_a_diverged_run_end_before_the_numbers_do() -> None:
    outcome = Outcome(records={"step": [0, 1, 2], "x": [1.0, math.inf, 3.0]}, diverged="at step 1")
    assert records_frame(ONE, outcome).to_dicts() == [{"step": 0, "x": 1.0}]


def test_a_large_store_is_read_at_once(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, rates=[number / 100 for number in range(10)], seeds=30)
    selected = experiment(rates=[number / 100 for number in range(10)], seeds=30)
    start = time.process_time()
    assert store.results(selected, "smoke").count("done") == 300
    assert time.process_time() - start < 1.0
