"""Sharing: what one process has taken is left alone while it lives, and free when it died."""

import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from examples import decay, do, experiment, module_path, notes, start, started, table, wait_until
from filelock import FileLock
from rich.console import Console

from falign.lab._files import RunError, WriteError, to_json
from falign.lab.experiment import _progress
from falign.lab.experiment._leases import RunLeases, leased_runs, leases_read_only
from falign.lab.experiment._run_file import StoredRun, records_frame
from falign.lab.experiment._store import Store
from mutations import mutations


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(folder=tmp_path)
    made.open(create=True)
    return made


def test_a_run_has_one_owner(store: Store) -> None:
    with RunLeases(store) as one, RunLeases(store) as two:
        assert one.acquire(["a", "b"]) == {"a", "b"}
        assert two.acquire(["b", "c"]) == {"c"}
        assert one.acquire(["a"]) == {"a"}, "what is one's own may be taken again"
        assert leases_read_only(store)[0] == leased_runs(store) == {"a", "b", "c"}
        one.release(["b"])
        assert two.acquire(["b"]) == {"b"}
    assert leases_read_only(store)[0] == leased_runs(store) == set()
    assert list((store.folder / "leases").iterdir()) == []


def test_what_a_dead_process_had_taken_is_free(store: Store) -> None:
    with RunLeases(store) as one:
        code = (
            "import sys, time; from pathlib import Path; from filelock import FileLock;"
            f"folder = Path({str(store.folder / 'leases')!r}); lock = FileLock(folder / 'other.lock'); lock.acquire();"
            "from falign.lab._files import to_json; (folder / 'other.json').write_bytes(to_json({'runs': ['a']}));"
            "print('ready', flush=True); time.sleep(100)"
        )
        environment = {**os.environ, "PYTHONPATH": module_path()}
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            assert one.acquire(["a", "b"]) == {"b"}
            assert leased_runs(store) == {"a", "b"}
            other.kill()
        assert leases_read_only(store)[0] == {"b"}
        assert (store.folder / "leases" / "other.json").exists(), "it only looks"
        assert one.acquire(["a"]) == {"a"}
        assert len(list((store.folder / "leases").iterdir())) == 2


def test_two_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted, out = tmp_path / "notes", tmp_path / "shared"
    selected = experiment(seeds=10, at_most=2)
    monkeypatch.setenv("FALIGN_TEST_NOTES", str(noted))
    monkeypatch.setenv("FALIGN_TEST_PAUSE", "0.05")
    with start(out, noted, pause=0.05, seeds=10, at_most=2) as other:
        wait_until(lambda: bool(notes(noted, "begun")))
        code, _ = do(selected, out)
        said, _ = other.communicate(timeout=60)
    assert (code, other.returncode) == (0, 0)
    assert "20 of 20 runs there" in said
    computed = notes(noted, "computed")
    assert sorted(computed) == sorted(task.key for task in selected.tasks("smoke")), "each run is computed once"
    assert len({line.split()[2] for line in noted.read_text().splitlines()}) == 2, "by two processes"
    do(selected, tmp_path / "alone")
    assert table(selected, out).equals(table(selected, tmp_path / "alone"))


class KillsWhenAllElseIsDone(io.StringIO):
    """What is printed; kills a process as soon as it says that nothing but that one's runs are left."""

    def __init__(self, process: subprocess.Popen) -> None:
        super().__init__()
        self._process = process

    def write(self, text: str) -> int:
        if "9 of 12 runs there, 3 taken by other processes" in text:
            self._process.kill()
        return super().write(text)


def test_the_runs_of_a_killed_process_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process holds a block for ever; this one does the rest, waits for it, and sees it killed."""
    noted, out = tmp_path / "notes", tmp_path / "shared"
    selected = experiment(seeds=6, at_most=3)
    monkeypatch.setattr(_progress, "_PAUSE", 0.1)
    with start(out, noted, pause=1000, seeds=6, at_most=3) as other:
        wait_until(lambda: bool(notes(noted, "begun")))
        printed = KillsWhenAllElseIsDone(other)
        code, _ = do(selected, out, console=Console(file=printed))
    said = printed.getvalue()
    assert code == 0
    assert said.count("taken by other processes") >= 1
    assert len(table(selected, out)) == 12 * 4
    do(selected, tmp_path / "alone")
    assert table(selected, out).equals(table(selected, tmp_path / "alone"))


def test_a_run_that_another_process_has_just_finished_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted, selected = tmp_path / "notes", experiment()
    monkeypatch.setenv("FALIGN_TEST_NOTES", str(noted))
    first = selected.tasks("smoke")[0]
    acquire = RunLeases.acquire

    def finished_meanwhile(self: RunLeases, keys) -> set[str]:
        store = Store(folder=tmp_path / "out")
        store.put(StoredRun.of(first, "done"), records_frame(first, decay(first)))
        return acquire(self, keys)

    monkeypatch.setattr(RunLeases, "acquire", finished_meanwhile)
    assert do(selected, tmp_path / "out")[0] == 0
    assert sorted(notes(noted, "computed")) == sorted(task.key for task in selected.tasks("smoke")[1:])


@pytest.mark.parametrize("count", [240, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_damaged_list_of_a_living_owner_counts_as_empty(count: int, store: Store) -> None:
    """Then a run may be computed twice, to the same numbers; nobody waits for ever, and nothing ends raw."""
    whole = to_json({"runs": ["a", "b"]})
    listed = store.folder / "leases" / "other.json"
    with RunLeases(store) as leases, FileLock(listed.with_suffix(".lock")):
        listed.write_bytes(whole)
        assert leases_read_only(store)[0] == leased_runs(store) == {"a", "b"}
        for how, damaged in mutations(whole, count):
            listed.write_bytes(damaged)
            assert leases_read_only(store)[0] == set(), how
        others = (b"", b"[]", b"null", b"\xff\xfe", b"[" * 10**5, to_json({}), to_json({"runs": 3}))
        for content in (*others, to_json({"runs": {"a": 1}}), to_json({"runs": [1, None, ["a"]]})):
            listed.write_bytes(content)
            assert leases_read_only(store)[0] == leased_runs(store) == set()
        os.truncate(listed, 2**35)
        assert leases_read_only(store)[0] == leased_runs(store) == set()
        assert leases.acquire(["a"]) == {"a"}
        listed.write_bytes(whole)
        assert leases.acquire(["b"]) == set(), "a list that is whole again counts again"


def as_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").touch()


PLACES: dict[str, Callable[[Path], object]] = {
    "folder": as_folder,
    "pipe": os.mkfifo,
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
def test_whatever_else_is_among_the_owners_disturbs_nobody(make: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    store = Store(folder=out)
    store.open(create=True)
    (out / "leases").mkdir()
    make(out / "leases" / "odd.lock")
    make(out / "leases" / "odd.json")
    make(out / "leases" / "living.json")
    with FileLock(out / "leases" / "living.lock"):
        assert leases_read_only(store)[0] == leased_runs(store) == set()
        assert do(experiment(), out)[0] == 0
    assert len(table(experiment(), out)) == 40


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", ["falign.json", ".lock", "leases", "toy.decay"])
def test_something_else_in_a_place_of_the_store_is_said_in_a_sentence(
    name: str, make: Callable, tmp_path: Path
) -> None:
    """A pipe serves as a lock, for nothing is read from it."""
    out = tmp_path / "out"
    Store(folder=out).open(create=True)
    (out / name).unlink(missing_ok=True)
    make(out / name)
    if name == ".lock" and make in (os.mkfifo, PLACES["link to nothing"], PLACES["device"]):
        try:  # which of them is up to the system's locks
            said = do(experiment(), out)[1]
        except RunError as error:
            said = str(error)
        assert "10 of 10 runs there" in said or str(out) in said
    elif name in ("leases", "toy.decay") and make is as_folder:
        assert do(experiment(), out)[0] == 0
    else:
        with pytest.raises(RunError, match=rf"{out}") as error:
            do(experiment(), out)
        assert "\n" not in str(error.value)


def vanishing(out: Path, how: Callable[[Path], object]) -> Callable:
    """Deletes the store in the midst of the second block."""
    blocks = []

    def run(tasks, setting):
        blocks.append(tasks)
        if len(blocks) == 2:
            shutil.rmtree(out)
            how(out)
        return [decay(task) for task in tasks]

    return run


@pytest.mark.parametrize("how", [lambda out: None, Path.mkdir, Path.touch], ids=["gone", "made again", "a file"])
def test_a_store_that_is_deleted_meanwhile_is_not_made_again_by_halves(how: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(WriteError, match=rf"{out} was deleted, or is no longer a store, it has no falign.json: call"):
        do(experiment(vanishing(out, how), at_most=2), out)
    assert WriteError.code == 1
    assert not out.is_dir() or list(out.iterdir()) == []
    if out.is_file():
        out.unlink()
    assert do(experiment(), out)[0] == 0


@pytest.mark.skipif(os.name != "posix", reason="needs a limit that this system lacks")
def test_a_full_disk_is_said_and_what_was_reported_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From some write on the system takes no more bytes of a file, whichever it is."""
    fsync, out = os.fsync, tmp_path / "out"
    selected = experiment(at_most=1)
    for writes in range(12):
        left = writes

        def full(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            printed = io.StringIO()
            with pytest.raises(RunError, match="No space left on device") as error:
                do(selected, out, console=Console(file=printed))
        assert type(error.value) is WriteError
        assert not [path for path in out.rglob("*") if ".partial-" in path.name]
    assert do(selected, out)[0] == 0
    assert len(table(selected, out)) == 40


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_started_at_once_on_one_folder_do_every_run_once(count: int, tmp_path: Path) -> None:
    noted, out = tmp_path / "notes", tmp_path / "shared"
    processes = [start(out, noted, pause=0.01, seeds=20, at_most=2) for _ in range(count)]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, said
    selected = experiment(seeds=20, at_most=2)
    assert sorted(notes(noted, "computed")) == sorted(task.key for task in selected.tasks("smoke"))
    assert list((out / "leases").iterdir()) == []
    assert not list(out.rglob("*.corrupt*"))
    do(selected, tmp_path / "alone")
    assert table(selected, out).equals(table(selected, tmp_path / "alone"))


def test_a_folder_that_vanishes_under_another_process_ends_it_in_a_sentence(tmp_path: Path) -> None:
    noted, out = tmp_path / "notes", tmp_path / "out"
    with started(out, noted, workers=2, pause=0.05, seeds=200, at_most=1) as process:
        wait_until(lambda: len(notes(noted, "computed")) >= 3)
        while out.exists():  # what is written meanwhile makes one call fail
            shutil.rmtree(out, ignore_errors=True)
            time.sleep(0.01)
        said, _ = process.communicate(timeout=60)
    assert "WriteError: " in said.splitlines()[-1]
    assert not out.exists()
