"""The index of a store: nothing is read twice, nothing that changed is missed, no damage makes a number wrong."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from examples import decay, experiment

from falign.lab.experiment import Experiment, Outcome, grid
from falign.lab.experiment import _catalogue as catalogues
from falign.lab.experiment import _index as indices
from falign.lab.experiment import _store as stores
from falign.lab.experiment._results import Results
from falign.lab.experiment._run_file import StoredRun, records_frame
from falign.lab.experiment._store import Store
from forks import FORKSERVER
from mutations import mutations

READ: list[str] = []
"""Names of the runs' files that were opened."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices of small stores, and of files as young as a test's."""
    monkeypatch.setattr(stores, "_FEW", 3)
    monkeypatch.setattr(indices, "_RACY", 0)
    really = catalogues.read_regular_file

    def noted(path: Path | str) -> object:
        READ.append(Path(path).stem)
        return really(path)

    monkeypatch.setattr(catalogues, "read_regular_file", noted)


def filled(folder: Path, selected: Experiment, outcome: Callable = decay) -> Store:
    store = Store(folder=folder, repairs=False, log=lambda _: None)
    store.open(create=True)
    for number, task in enumerate(selected.tasks("paper")):
        origin = {"threads": 1 + number % 2, "started": f"at {number}"}
        store.put(StoredRun.of(task, "done", seconds=0.5, provenance=origin), records_frame(task, outcome(task)))
    time.sleep(0.02)  # longer than a tick of the file system's clock
    return store


def read(store: Store, selected: Experiment, preset: str = "paper") -> tuple[Results, set[str]]:
    """The results, and the runs whose files were opened for them."""
    READ.clear()
    return store.results(selected, preset), set(READ)


def same(one: Results, other: Results) -> bool:
    return one.table.equals(other.table) and one.runs.equals(other.runs) and one.provenance == other.provenance


def cold(store: Store, selected: Experiment, preset: str = "paper") -> Results:
    """The results without an index, which is put back afterwards."""
    folder = store.folder / indices.FOLDER
    folder.rename(store.folder / ".aside")
    found = store.results(selected, preset)
    shutil.rmtree(folder, ignore_errors=True)
    (store.folder / ".aside").rename(folder)
    return found


def test_what_has_not_changed_is_not_read_again(tmp_path: Path) -> None:
    selected = experiment(seeds=20)
    store = filled(tmp_path, selected)
    first, opened = read(store, selected)
    assert opened == {task.key for task in selected.tasks("paper")}
    second, opened = read(store, selected)
    assert opened == set()
    assert same(first, second)
    assert first.table.height == 40 * 4
    assert store.get_all(selected.tasks("paper"))[selected.tasks("paper")[7].key] == store.get(
        selected.tasks("paper")[7]
    )


def test_changed_new_and_removed_files_are_noticed(tmp_path: Path) -> None:
    selected = experiment(seeds=20)
    store = filled(tmp_path, selected)
    read(store, selected)
    tasks = selected.tasks("paper")
    store.path(tasks[3]).unlink()
    store.put(StoredRun.of(tasks[5], "failed", message="later"), pl.DataFrame())
    more = experiment(seeds=21)
    last = more.tasks("paper")[20]
    store.put(StoredRun.of(last, "done"), records_frame(last, decay(last)))
    found, opened = read(store, more)
    assert opened == {tasks[5].key, last.key}
    status = dict(zip(found.runs["key"], found.runs["status"], strict=True))
    assert [status[task.key] for task in (tasks[3], tasks[5], last)] == ["missing", "failed", "done"]
    assert same(found, cold(store, more))


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_damaged_file_is_found_beside_an_index(keeps_time: bool, tmp_path: Path) -> None:
    selected = experiment(seeds=20)
    store = filled(tmp_path, selected)
    read(store, selected)
    said: list[str] = []
    path = store.path(selected.tasks("paper")[11])
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    with path.open("r+b") as stream:  # in place: same file, same size
        stream.write(content)
    if keeps_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = replace(store, log=said.append).results(selected, "paper")
    assert found.count("missing") == 1
    assert len(said) == 1
    assert "its checksum is wrong" in said[0]


def test_files_that_have_just_changed_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selected = experiment(seeds=20)
    store = filled(tmp_path, selected)
    monkeypatch.setattr(indices, "_RACY", 60_000_000_000)
    read(store, selected)
    assert indices.load(tmp_path, selected.name).runs.is_empty()
    assert len(read(store, selected)[1]) == 40


def test_a_copied_store_is_read_anew(tmp_path: Path) -> None:
    selected = experiment(seeds=20)
    store = filled(tmp_path / "a", selected)
    first, _ = read(store, selected)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found, opened = read(replace(store, folder=tmp_path / "b"), selected)
    assert len(opened) == 40
    assert same(first, found)


def test_an_index_of_something_else_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selected, other = experiment(seeds=20), experiment(name="toy.other", seeds=20)
    store = filled(tmp_path, selected)
    read(store, selected)
    folder = tmp_path / indices.FOLDER
    (folder / other.name).write_bytes((folder / selected.name).read_bytes())
    assert indices.load(tmp_path, other.name).runs.is_empty()
    assert indices.load(tmp_path, selected.name).runs.height == 40
    monkeypatch.setitem(indices._BOUND, "falign", "0.0.9")
    assert indices.load(tmp_path, selected.name).runs.is_empty()
    (folder / selected.name).unlink()
    (folder / selected.name).mkdir()
    assert read(store, selected)[0].count("done") == 40
    (folder / selected.name).rmdir()
    os.mkfifo(folder / selected.name)
    assert read(store, selected)[0].count("done") == 40


def test_where_no_index_can_be_written_there_is_none(tmp_path: Path) -> None:
    selected = experiment(seeds=20)
    store = filled(tmp_path, selected)
    (tmp_path / indices.FOLDER).write_text("mine")
    for _ in range(2):
        found, opened = read(store, selected)
        assert (found.count("done"), len(opened)) == (40, 40)
    assert (tmp_path / indices.FOLDER).read_text() == "mine"


def of_several_kinds(task) -> Outcome:
    """Whole numbers, fractions, texts, nothing: columns that differ from run to run."""
    kinds: list[dict] = [
        {"x": [1, 2], "y": [None, None]},
        {"x": [0.5], "y": ["a"]},
        {},
        {"x": [], "z": []},
        {"x": [3], "w": [True]},
    ]
    return Outcome(records=kinds[task.seed % len(kinds)])


def test_columns_of_many_kinds_are_the_same_with_and_without(tmp_path: Path) -> None:
    points = grid(rate=(0.1, 0.5), steps=4)
    selected = replace(
        experiment(),
        grid={"smoke": points[:1], "quick": points[1:], "paper": points},
        seeds={"smoke": 1, "quick": 6, "paper": 20},
    )
    store = filled(tmp_path, selected, of_several_kinds)
    for preset in ("quick", "paper", "smoke"):  # the first knows some only
        first, _ = read(store, selected, preset)
        again, opened = read(store, selected, preset)
        assert opened == set()
        assert same(first, again)
        assert same(first, cold(store, selected, preset))
    assert read(store, selected, "smoke")[0].table.schema["x"] == pl.Int64
    assert read(store, selected, "paper")[0].table.schema["x"] == pl.Float64


def test_other_revisions_are_counted_from_the_index(tmp_path: Path) -> None:
    store = filled(tmp_path, experiment(seeds=20))
    newer = experiment(revision=2, seeds=1)
    first, opened = read(store, newer)
    assert (first.others, len(opened)) == (40, 40)
    second, opened = read(store, newer)
    assert (second.others, opened) == (40, set())
    found, opened = read(store, experiment(seeds=20))  # whose records were not read before
    assert (found.count("done"), found.table.height, len(opened)) == (40, 160, 40)


@pytest.mark.parametrize("count", [200, pytest.param(4000, marks=pytest.mark.slow)])
def test_a_damaged_index_is_none(count: int, tmp_path: Path) -> None:
    selected = experiment(seeds=20)
    store = filled(tmp_path, selected)
    truth, _ = read(store, selected)
    path = tmp_path / indices.FOLDER / selected.name
    for number, (how, content) in enumerate(mutations(path.read_bytes(), count)):
        path.write_bytes(content)
        assert indices.load(tmp_path, selected.name).runs.is_empty(), how
        if number % 50 == 0:
            assert same(read(store, selected)[0], truth), how
            assert indices.load(tmp_path, selected.name).runs.height == 40, "it is made anew"


def put_some(folder: Path, part: int, parts: int) -> None:
    """Put every so-many-th run."""
    selected = experiment(seeds=120)
    store = Store(folder=folder)
    for task in selected.tasks("paper")[part::parts]:
        store.put(StoredRun.of(task, "done", provenance={"part": part}), records_frame(task, decay(task)))


def test_eight_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    selected = experiment(seeds=120)
    said: list[str] = []
    store = Store(folder=tmp_path, repairs=False, log=said.append)
    store.open(create=True)
    writers = [FORKSERVER.Process(target=put_some, args=(tmp_path, part, 8)) for part in range(8)]
    for writer in writers:
        writer.start()
    seen = readings = 0
    while any(writer.is_alive() for writer in writers):
        found = store.results(selected, "paper")
        assert set(found.runs["status"]) <= {"done", "missing"}
        assert found.count("done") >= seen, "what was there is there"
        seen, readings = found.count("done"), readings + 1
        if not seen:
            continue
        rows = found.table.filter(pl.col("step") == 0)
        assert rows.height == seen
        assert (rows["x"] - (1 + rows["seed"]) * (1 - rows["rate"])).abs().max() in (None, 0.0)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert store.results(selected, "paper").count("done") == 240
    assert same(store.results(selected, "paper"), cold(store, selected))
    assert said == []
    assert readings > 1
