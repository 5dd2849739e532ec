"""``falign list``, ``reproduce``, ``status`` and ``report`` on a paper of toys."""

import json
from pathlib import Path

import examples
import pytest
from examples import CLAIM, WRONG, experiment, notes, paper

from falign import papers
from falign.cli import main
from falign.lab.experiment.entries import Entry
from falign.lab.experiment.owners import Owner
from falign.lab.experiment.records import frame
from falign.lab.experiment.store import Store


@pytest.fixture(autouse=True)
def _toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FALIGN_TEST_NOTES", str(tmp_path / "notes"))
    one = experiment(name="toy.one", claims=(CLAIM, WRONG))
    two = experiment(examples.fails_at_three, name="toy.two", rates=(0.1,))
    monkeypatch.setattr(papers, "PAPERS", {"toy": paper(one, two)})


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(words)
    said = capsys.readouterr()
    return code, said.out, said.err


def rows(said: str) -> dict[str, list[str]]:
    """{experiment: the words of its row}."""
    return {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith(" toy.")}


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run(["list"], capsys)
    assert code == 0
    assert rows(said) == {"toy.one": ["10", "10", "10", "2", "0"], "toy.two": ["5", "5", "5", "1", "0"]}
    assert "toy: Nobody. Toys. nowhere. https://example.org" in said


def test_from_the_first_run_to_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run(["reproduce", "toy.one"], capsys)
    assert code == 0, "a failing claim is a result"
    assert rows(said)["toy.one"][:2] == ["10", "10"]
    assert "claims: 1 hold, 1 fail" in said
    assert "the page is results/report.html, the same as JSON results/report.json" in said
    code, said, _ = run(["reproduce"], capsys)
    assert code == 1, "a run failed"
    assert "toy.two: 1 failed; it (rate=0.1, steps=4, seed=3): ZeroDivisionError: seed three" in said
    assert len(notes(Path("notes"), "computed")) == 10, "nothing was computed twice"
    code, said, _ = run(["status"], capsys)
    assert code == 0
    assert rows(said)["toy.two"][:2] == ["5", "4"]
    assert rows(said)["toy.two"][-2:] == ["1", "failed"]
    assert rows(run(["status", "toy.two"], capsys)[1]).keys() == {"toy.two"}
    Path("results/report.html").unlink()
    code, said, _ = run(["report"], capsys)
    assert code == 0
    assert "toy.two" in Path("results/report.html").read_text()
    assert json.loads(Path("results/report.json").read_text())


def test_status_of_what_is_running_and_of_other_revisions(capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(folder=Path("results"))
    store.open(create=True)
    older = experiment(name="toy.one", revision=0).tasks("smoke")[0]
    store.put(Entry.of(older, "done"), frame(older, examples.decay(older)))
    with Owner(store) as owner:
        owner.take([task.key for task in papers.PAPERS["toy"].experiments[0].tasks("quick")[:3]])
        code, said, _ = run(["status"], capsys)
    assert code == 0
    assert rows(said)["toy.one"] == ["10", "0", "0.0", "s", "2", "not", "run", "3", "running,", "7", "missing"]
    assert "toy.one: 1 run of another revision is left alone" in said


def test_a_folder_that_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    Path("thesis").mkdir()
    Path("thesis/thesis.tex").write_text("mine")
    for command in ("reproduce", "status", "report"):
        code, _, said = run([command, "--out", "thesis"], capsys)
        assert code == 2
        assert said == (
            "falign: thesis is an output folder that is not ours, it has no falign.json: "
            "give a new or an empty folder with --out\n"
        )
    assert [path.name for path in Path("thesis").iterdir()] == ["thesis.tex"]


def test_memory_is_given_in_gib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    large = experiment(name="toy.large", memory=lambda tasks: 2**30 * len(tasks))
    monkeypatch.setattr(papers, "PAPERS", {"toy": paper(large)})
    code, said, _ = run(["reproduce", "--memory", "0.5"], capsys)
    assert code == 1
    assert "it needs 1 GiB of memory, but a block may have 0.5: raise --memory" in said
    assert run(["reproduce", "--memory", "1"], capsys)[0] == 0
