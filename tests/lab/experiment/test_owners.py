"""Sharing: what one process has taken is left alone while it lives, and free when it died."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from examples import decay, do, experiment, notes, start, table, wait_until
from rich.console import Console

from falign.lab.experiment import progress
from falign.lab.experiment.entries import Entry
from falign.lab.experiment.owners import Owner, running, taken
from falign.lab.experiment.records import frame
from falign.lab.experiment.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(folder=tmp_path)
    made.open(create=True)
    return made


def test_a_run_has_one_owner(store: Store) -> None:
    with Owner(store) as one, Owner(store) as two:
        assert one.take(["a", "b"]) == {"a", "b"}
        assert two.take(["b", "c"]) == {"c"}
        assert one.take(["a"]) == {"a"}, "what is one's own may be taken again"
        assert running(store) == taken(store) == {"a", "b", "c"}
        one.release(["b"])
        assert two.take(["b"]) == {"b"}
    assert running(store) == taken(store) == set()
    assert list((store.folder / "owners").iterdir()) == []


def test_what_a_dead_process_had_taken_is_free(store: Store) -> None:
    with Owner(store) as one:
        code = (
            "import sys, time; from pathlib import Path; from filelock import FileLock;"
            f"folder = Path({str(store.folder / 'owners')!r}); lock = FileLock(folder / 'other.lock'); lock.acquire();"
            "(folder / 'other.json').write_text('[\"a\"]'); print('ready', flush=True); time.sleep(100)"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            assert one.take(["a", "b"]) == {"b"}
            assert taken(store) == {"a", "b"}
            other.kill()
        assert running(store) == {"b"}
        assert (store.folder / "owners" / "other.json").exists(), "it only looks"
        assert one.take(["a"]) == {"a"}
        assert len(list((store.folder / "owners").iterdir())) == 2


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
    monkeypatch.setattr(progress, "_PAUSE", 0.1)
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
    take = Owner.take

    def finished_meanwhile(self: Owner, keys) -> set[str]:
        store = Store(folder=tmp_path / "out")
        store.put(Entry.of(first, "done"), frame(first, decay(first)))
        return take(self, keys)

    monkeypatch.setattr(Owner, "take", finished_meanwhile)
    assert do(selected, tmp_path / "out")[0] == 0
    assert sorted(notes(noted, "computed")) == sorted(task.key for task in selected.tasks("smoke")[1:])
