"""What may lie in a store's folder: files that are whole and hold something else, and what is no file at all."""

import io
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from examples import CLAIM, decay, experiment, paper
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from falign import papers
from falign.cli import main
from falign.lab._files import BLANK, Unsealed, last_seal, seal, verify_seal
from falign.lab.experiment import Task
from falign.lab.experiment._run_file import (
    FORMAT,
    MAX_BYTES,
    CorruptRun,
    OlderFormat,
    RecordsShape,
    StoredRun,
    decode,
    encode,
    records_frame,
)
from falign.lab.experiment._store import Store
from mutations import mutations

ONE = Task("toy.decay", 1, {"rate": 0.1, "steps": 4}, 0)
WHOLE = encode(StoredRun.of(ONE, "done", provenance={"torch": "2"}), records_frame(ONE, decay(ONE)))
VALUES = json.loads(pl.read_parquet_metadata(io.BytesIO(WHOLE))["falign"])


def filled(folder: Path) -> tuple[Store, list[str]]:
    said: list[str] = []
    store = Store(folder=folder, repairs=False, log=said.append)
    store.open(create=True)
    for task in experiment().tasks("smoke"):
        store.put(StoredRun.of(task, "done"), records_frame(task, decay(task)))
    return store, said


def file_of(values: dict[str, Any] | str, records: pl.DataFrame) -> bytes:
    """A file with a right checksum, whatever it says of itself."""
    text = values if isinstance(values, str) else json.dumps({**values, "checksum": BLANK})
    stream = io.BytesIO()
    records.write_parquet(stream, metadata={"falign": text})
    seal(stream, last_seal(stream.getvalue()))
    return stream.getvalue()


RECORDS: dict[str, tuple[pl.DataFrame, str]] = {
    "a list": (pl.DataFrame({"x": [[1.0], [2.0]]}), "column 'x' of the records is of type 'List(Float64)'"),
    "a structure": (pl.DataFrame({"x": [{"a": 1}]}), "column 'x' of the records is of type \"Struct("),
    "small numbers": (pl.DataFrame({"x": [1]}, schema={"x": pl.Int8}), "column 'x' of the records is of type 'Int8'"),
    "seed": (pl.DataFrame({"seed": [1]}), "the records have a column 'seed'"),
    "an axis": (pl.DataFrame({"rate": [1.0]}), "the records have a column 'rate'"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_records_that_no_run_leaves(kind: str, tmp_path: Path) -> None:
    store, said = filled(tmp_path)
    records, words = RECORDS[kind]
    store.put(StoredRun.of(ONE, "done"), records)
    results = store.results(experiment(), "smoke")
    assert (results.count("missing"), results.count("done")) == (1, 9)
    assert len(said) == 1
    assert words in said[0]


@pytest.mark.parametrize("name", ["__file__", "__run__", "place", "name", "kind", "x y", "Ünicode"])
def test_columns_are_called_as_they_like(name: str, tmp_path: Path) -> None:
    store, said = filled(tmp_path)
    store.put(StoredRun.of(ONE, "done"), pl.DataFrame({name: [1.5, 2.5]}))
    table = store.results(experiment(), "smoke").table
    assert table.filter(pl.col(name).is_not_null())[name].to_list() == [1.5, 2.5]
    assert (table.height, said) == (9 * 4 + 2, [])


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (["high", "low"], ["high", "low"]),
        ([True, False], ["true", "false"]),
        ([7, 8], [7.0, 8.0]),
        ([None, None], [None, None]),
        ([None, -(2**63)], [None, -(2.0**63)]),
        ([None, 2**63 - 1], [None, "9223372036854775807"]),
        ([-(2**53) - 1, 0], ["-9007199254740993", "0"]),
        ([2**53, 2**53 + 2], [2.0**53, 2.0**53 + 2]),
    ],
    ids=str,
)
def test_columns_that_differ_from_run_to_run(column: list, expected: list, tmp_path: Path) -> None:
    store, said = filled(tmp_path)
    store.put(StoredRun.of(ONE, "done"), pl.DataFrame({"step": [0, 1], "x": column}))
    table = store.results(experiment(), "smoke").table
    assert table.filter(rate=0.1, seed=0)["x"].to_list() == expected
    assert (
        table.filter(rate=0.1, seed=1)["x"].cast(pl.Float64).to_list()
        == decay(experiment().tasks("smoke")[1]).records["x"]
    )
    assert said == []


@pytest.mark.parametrize(
    "records",
    [
        pl.DataFrame({"step": [0, 1], "x": [1.0, 2.0]}),
        pl.DataFrame({"step": [0, 1, 2, 3], "y": [1.0] * 4}),
        pl.DataFrame({"step": ["0", "1", "2", "3"], "x": [1.0] * 4}),
        pl.DataFrame({"step": [0, 1, 2, 3], "x": [1.0] * 4, "z": [0] * 4}),
        pl.DataFrame(),
    ],
    ids=str,
)
def test_records_other_than_the_metadata_say(records: pl.DataFrame, tmp_path: Path) -> None:
    store, said = filled(tmp_path)
    store.path(ONE).write_bytes(file_of(VALUES, records))
    results = store.results(experiment(), "smoke")
    assert (results.count("missing"), results.table.height) == (1, 36)
    assert len(said) == 1
    assert "is damaged (" in said[0]
    repairing = Store(folder=tmp_path, log=said.append)
    assert repairing.results(experiment(), "smoke").count("missing") == 1
    assert "it is set aside as" in said[1]


@pytest.mark.parametrize(
    ("columns", "rows", "words"),
    [
        ({}, 1, "it has 1 records without columns"),
        ({}, 2**63 - 1, "it has 9223372036854775807 records without columns"),
        ({"step": "Int64", "x": "Float64"}, 2**40, "it has 1099511627776 records of 2 columns, expected at most"),
        ({f"c{n}": "Float64" for n in range(1001)}, 10**4, "it has 10000 records of 1001 columns, expected at most"),
    ],
    ids=["no columns", "most", "long", "wide"],
)
@pytest.mark.parametrize("status", ["done", "diverged"])
def test_more_records_than_a_run_leaves(
    columns: dict, rows: int, words: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(papers, "PAPERS", {"toy": paper(experiment())})
    store, said = filled(tmp_path)
    changed = {**VALUES, "columns": columns, "rows": rows, "status": status}
    store.path(ONE).write_bytes(file_of(changed, records_frame(ONE, decay(ONE))))
    assert store.results(experiment(), "smoke").count("missing") == 1
    assert f"is damaged (its metadata is no entry: {words}" in said[0]
    assert main(["status", "--out", str(tmp_path)]) == 0
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_folder_full_of_other_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, said = filled(tmp_path)
    tasks = experiment().tasks("smoke")
    folder = tmp_path / "toy.decay"
    for task in tasks[:5]:
        store.path(task).unlink()
    os.mkfifo(store.path(tasks[0]))
    store.path(tasks[1]).mkdir()
    store.path(tasks[2]).symlink_to(store.path(tasks[2]))
    store.path(tasks[3]).symlink_to(folder / "nothing")
    kept = tmp_path / "elsewhere"
    kept.write_bytes(encode(StoredRun.of(tasks[4], "done"), records_frame(tasks[4], decay(tasks[4]))))
    store.path(tasks[4]).symlink_to(kept)
    (folder / f".{tasks[0].key}.parquet.partial-123").write_text("PAR1")
    (folder / "notes.parquet").write_text("mine")
    Path(os.fsdecode(os.fsencode(folder) + b"/M\xfcller.parquet")).write_text("mine")
    Path(os.fsdecode(os.fsencode(folder) + b"/" + b"\xfc" * 32 + b".parquet")).write_text("mine")
    start = time.monotonic()
    results = store.results(experiment(), "smoke")
    assert time.monotonic() - start < 5
    assert results.runs["status"].to_list() == ["missing"] * 4 + ["done"] * 6
    assert [("it is not a regular file" in each, each.split(" ")[0]) for each in said] == [
        (True, str(store.path(task))) for task in tasks[:4]
    ]
    assert results.others == 0
    assert len(store.there(experiment())["smoke"]) == 10
    Store(folder=tmp_path, log=said.append).results(experiment(), "smoke")
    assert sum("it is set aside as" in each for each in said) == 4


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 2**35])
def test_a_file_that_has_grown_beyond_all_bounds(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is sparse, as after a crash: the disk holds nearly nothing of it, and memory could not hold it."""
    store, said = filled(tmp_path)
    with store.path(ONE).open("rb+") as stream:
        stream.truncate(size)
    words = f"{store.path(ONE)} is damaged (it has {size:,} bytes, expected at most {MAX_BYTES:,}): "
    for attempt in (lambda: store.results(experiment(), "smoke").count("missing"), lambda: int(not store.get(ONE))):
        assert attempt() == 1
        assert said.pop().startswith(words)
    monkeypatch.setattr(papers, "PAPERS", {"toy": paper(experiment())})
    assert main(["status", "--out", str(tmp_path)]) == 0
    assert " ".join(words.split()[1:]) in " ".join(capsys.readouterr().err.split())
    Store(folder=tmp_path, log=said.append).results(experiment(), "smoke")
    assert said[0].startswith(f"{words}it is set aside as ")


def test_messages_that_no_encoding_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(papers, "PAPERS", {"toy": paper(experiment(claims=(CLAIM,)))})
    store, _ = filled(tmp_path / "results")
    message = "OSError: M\udcfcller.png [/x] \x1b[31m :smile: <b>"
    store.put(StoredRun.of(ONE, "failed", message=message, provenance={"git": "\udcff"}), pl.DataFrame())
    assert store.get_all(experiment().tasks("smoke"))[ONE.key] == store.get(ONE)
    assert main(["status"]) == 0
    said = capsys.readouterr().out
    assert "OSError: M\\udcfcller.png [/x] \\x1b[31m :smile: <b>" in said
    assert main(["report"]) == 0
    assert "M\\udcfcller.png [/x]" in Path("results/report/toy.html").read_text(encoding="utf-8")
    told = json.loads(Path("results/report/toy.json").read_text(encoding="utf-8"))
    assert "M\\udcfcller.png" in told["experiments"][0]["unfinished"][0]["message"]


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from([10**400, 2**63 - 1, 2**31])
)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


def judged(content: bytes, store: Store) -> None:
    """A file is a run, or it is told in a sentence why it is none; and so it is in a store."""
    store.path(ONE).write_bytes(content)
    results = store.results(experiment(), "smoke")
    assert results.count("done") >= 9
    assert results.runs.height == 10
    try:
        entry, shape = decode(content)
    except (CorruptRun, OlderFormat) as error:
        if len(str(error).splitlines()) > 1:
            raise AssertionError("it is one sentence") from error
        return
    assert isinstance(entry, StoredRun)
    assert isinstance(shape, RecordsShape)
    assert Task(entry.experiment, entry.revision, entry.point, entry.seed).key == entry.key


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_whatever_the_metadata_hold(count: int, tmp_path: Path) -> None:
    store, _ = filled(tmp_path)

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.sampled_from([name for name in VALUES if name != "checksum"]), JSON, st.booleans())
    def tried(name: str, value: object, leaves_out: bool) -> None:
        values = {key: each for key, each in VALUES.items() if key != "checksum"}
        values |= {} if leaves_out else {name: value}
        if leaves_out:
            del values[name]
        judged(file_of(values, records_frame(ONE, decay(ONE))), store)

    tried()


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_files_with_and_without_a_right_checksum(count: int, tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    for how, content in mutations(WHOLE, count):
        with pytest.raises((CorruptRun, OlderFormat)):
            print(how, decode(content))
    text = json.dumps({**VALUES, "checksum": BLANK}).encode()
    for _, changed in mutations(text, count):
        judged(
            file_of(changed.decode(errors="replace").replace("\0", "") + BLANK, records_frame(ONE, decay(ONE))), store
        )
    with pytest.raises(Unsealed):
        verify_seal(b"PAR1")


def test_text_that_looks_like_a_checksum_or_an_entry(tmp_path: Path) -> None:
    store, said = filled(tmp_path)
    odd = [BLANK, '{"falign-run": 3, "checksum": "' + BLANK + '"}', "falign-sha256:" * 40]
    message = '"checksum": "' + BLANK + '"} {"falign-run": 3'
    provenance = {"a": {"falign-run": FORMAT, "checksum": BLANK}, BLANK: odd}
    entry = StoredRun.of(ONE, "done", message=message, provenance=provenance)
    store.put(entry, pl.DataFrame({"x": odd, **{f"c{n}": odd for n in range(20)}}))
    assert store.get(ONE) == entry
    table = store.results(experiment(), "smoke").table
    assert table.filter(rate=0.1, seed=0)["c7"].to_list() == odd
    assert said == []


def test_reading_needs_no_rights_to_write(tmp_path: Path) -> None:
    filled(tmp_path)
    before = subprocess.run(["ls", "-laR", str(tmp_path)], capture_output=True, text=True).stdout
    Store(folder=tmp_path, repairs=False).results(experiment(), "smoke")
    assert subprocess.run(["ls", "-laR", str(tmp_path)], capture_output=True, text=True).stdout == before
