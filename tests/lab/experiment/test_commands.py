"""``falign list``, ``reproduce``, ``status`` and ``report`` on a paper of toys."""

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import examples
import polars as pl
import pytest
from examples import CLAIM, WRONG, experiment, notes, paper
from filelock import FileLock
from rich.console import Console

from falign import papers
from falign.cli import main
from falign.lab._listing import show_one
from falign.lab.experiment import Evidence, grid
from falign.lab.experiment._leases import RunLeases
from falign.lab.experiment._reproduce import read_results, show_status
from falign.lab.experiment._run_file import StoredRun, records_frame
from falign.lab.experiment._selection import select
from falign.lab.experiment._store import Store


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
    assert "toy: Nobody. Toys. nowhere. https://example.org\n  one, two\n" in said
    assert "rules: bp, fa, dfa" in said
    code, said, _ = run(["list", "toy", "toy.one"], capsys)
    assert code == 0
    assert "claim " in said
    assert rows(said) == {"toy.one": ["10", "10", "10", "2", "0"], "toy.two": ["5", "5", "5", "1", "0"]}
    assert "toy: Nobody. Toys. nowhere. https://example.org" in said


def test_from_the_first_run_to_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run(["reproduce", "toy.one"], capsys)
    assert code == 0, "a failing claim is a result"
    assert rows(said)["toy.one"][:2] == ["10", "10"]
    assert "claims: 1 hold, 1 fail" in said
    assert "the page is results/report/toy.html, the same as JSON beside it\nall papers: results/report.html" in said
    code, said, _ = run(["reproduce"], capsys)
    assert code == 1, "a run failed"
    assert "toy.two: 1 failed; it (rate=0.1, steps=4, seed=3): ZeroDivisionError: seed three" in said
    assert len(notes(Path("notes"), "computed")) == 10, "nothing was computed twice"
    code, said, _ = run(["status"], capsys)
    assert code == 0
    assert rows(said)["toy.two"][:2] == ["5", "4"]
    assert rows(said)["toy.two"][-2:] == ["1", "failed"]
    assert rows(run(["status", "toy.two"], capsys)[1]).keys() == {"toy.two"}
    Path("results/report/toy.html").unlink()
    code, said, _ = run(["report"], capsys)
    assert code == 0
    assert "toy.two" in Path("results/report/toy.html").read_text()
    assert json.loads(Path("results/report/toy.json").read_text())


def test_status_of_what_is_running_and_of_other_revisions(capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(folder=Path("results"))
    store.open(create=True)
    older = experiment(name="toy.one", revision=0).tasks("smoke")[0]
    store.put(StoredRun.of(older, "done"), records_frame(older, examples.decay(older)))
    with RunLeases(store) as leases:
        leases.acquire([task.key for task in papers.PAPERS["toy"].experiments[0].tasks("quick")[:3]])
        code, said, _ = run(["status"], capsys)
    assert code == 0
    assert rows(said)["toy.one"] == ["10", "0", "0.0", "s", "2", "not", "run", "-", "3", "running,", "7", "missing"]
    assert "toy.one: 1 run of another revision is left alone" in said


def test_status_of_what_was_killed(capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(folder=Path("results"))
    store.open(create=True)
    keys = [task.key for task in papers.PAPERS["toy"].experiments[0].tasks("quick")[:3]]
    child = subprocess.run([sys.executable, "-c", KILLED, *keys], check=False)
    assert child.returncode == -signal.SIGKILL
    code, said, _ = run(["status", "toy.one"], capsys)
    assert code == 0
    assert rows(said)["toy.one"][-4:] == ["3", "killed,", "7", "missing"]
    assert "3 runs were at work when their command was killed: the same command computes them" in said
    assert run(["reproduce", "toy.one"], capsys)[0] == 0
    assert "killed" not in run(["status", "toy.one"], capsys)[1]


KILLED = """
import os, signal, sys
from pathlib import Path
from falign.lab.experiment._leases import RunLeases
from falign.lab.experiment._store import Store
store = Store(folder=Path("results"))
with RunLeases(store) as leases:
    leases.acquire(sys.argv[1:])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_reading_that_raises_is_told_with_its_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(table: pl.DataFrame) -> Evidence:
        return table["loss"].no_such_thing  # pyright: ignore

    broken = replace(CLAIM, name="broken", read=read)
    monkeypatch.setattr(papers, "PAPERS", {"toy": paper(experiment(name="toy.one", claims=(broken, CLAIM)))})
    code, said, _ = run(["reproduce"], capsys)
    assert code == 0
    where = f"(test_commands.py:{read.__code__.co_firstlineno + 1})"
    reason = next(line for line in said.splitlines() if "cannot be read" in line)
    assert reason.startswith("toy.one: broken: the claim cannot be read: ColumnNotFoundError: ")
    assert reason.endswith(where)
    assert "claims: 1 hold, 1 not run" in said, "the rest goes on"
    assert where in Path("results/report/toy.html").read_text()


def test_presets_are_mixed_on_one_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"smoke": grid(rate=0.1, steps=4), "quick": grid(rate=0.1, steps=6)}
    one, two = (
        replace(experiment(name=name), grid=sizes, seeds={"smoke": 1, "quick": 2}) for name in ("toy.a", "toy.b")
    )
    monkeypatch.setattr(papers, "PAPERS", {"toy": paper(one, two)})
    assert run(["reproduce", "--preset", "smoke"], capsys)[0] == 0
    assert run(["reproduce", "toy.b", "--preset", "quick"], capsys)[0] == 0
    told = json.loads(Path("results/report/toy.json").read_text())
    assert [(each["preset"], each["summary"]["runs"]["done"]) for each in told["experiments"]] == [
        ("smoke", 1),
        ("quick", 2),
    ]
    said = run(["status"], capsys)[1]
    assert said.startswith(
        "presets are mixed, each the one of which most runs are there: smoke of toy.a; quick of toy.b\n"
    )
    assert [words[0] for words in rows(said).values()] == ["smoke", "quick"]


def contents(folder: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def test_status_only_reads(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(["reproduce", "toy.one"], capsys)
    Path("results/.lock").unlink(missing_ok=True)
    damaged = next(Path("results/toy.one").iterdir())
    damaged.write_bytes(b"PAR1")
    before = contents("results")
    monkeypatch.setattr(FileLock, "acquire", None)
    code, said, wrong = run(["status"], capsys)
    assert code == 0
    assert rows(said)["toy.one"][:2] == ["10", "9"]
    assert f"falign: {damaged} is damaged (" in wrong
    assert "the run counts as missing, and falign reproduce computes it again" in wrong
    assert contents("results") == before
    code, _, wrong = run(["report"], capsys)
    assert code == 0
    assert "is damaged" in wrong
    assert {path.name for path in contents("results").keys() ^ before.keys()} == set()


def test_the_preset_of_which_most_runs_are_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = experiment(name="toy.one", claims=(CLAIM,))
    other = {"smoke": 2, "quick": 3}
    sized = replace(one, grid={**one.grid, "paper": grid(rate=0.3, steps=9)}, seeds={**one.seeds, **other})
    monkeypatch.setattr(papers, "PAPERS", {"toy": paper(sized)})
    assert run(["reproduce", "--preset", "smoke"], capsys)[0] == 0
    code, said, _ = run(["status"], capsys)
    assert code == 0
    assert said.splitlines()[0] == "preset smoke, of which 4 runs are there", "quick has no other ones"
    page = Path("results/report/toy.html").read_text()
    code, said, wrong = run(["report", "--preset", "paper"], capsys)
    assert (code, said) == (2, "")
    assert wrong == (
        "falign: no run of preset paper is there, but of preset quick 4 runs are: use --preset quick; "
        "the page was left as it is\n"
    )
    assert Path("results/report/toy.html").read_text() == page
    code, said, _ = run(["status", "--preset", "paper"], capsys)
    assert code == 0
    assert said.startswith("no run of preset paper is there, but of preset quick 4 runs are: use --preset quick\n")
    code, said, _ = run(["report"], capsys)
    assert code == 0
    assert said.startswith("preset smoke, of which 4 runs are there\nthe page is")


@pytest.mark.parametrize("width", [70, 80, 100])
def test_a_narrow_terminal_cuts_no_word(width: int, tmp_path: Path) -> None:
    experiments = tuple(
        replace(experiment(name=name, claims=(CLAIM, WRONG)), title="t") for name in ("toy.figure2-and-3", "toy.one")
    )
    whole = paper(*experiments)
    store = Store(folder=tmp_path / "many")
    store.open(create=True)
    statuses = ("done", "diverged", "failed", "no data")
    for each in experiments:
        for number, task in enumerate(each.tasks("smoke")[:9]):
            entry = StoredRun.of(task, statuses[number % 4], message="m", seconds=1999.0)  # pyright: ignore
            store.put(entry, records_frame(task, examples.decay(task)))
    selection = select([], {"toy": whole})
    printed = io.StringIO()
    console = Console(file=printed, force_terminal=True, width=width, color_system=None)
    show_status(store, selection, read_results(store, selection, dict.fromkeys(whole.names, "smoke")), console)
    show_one("toy", {"toy": whole}, console)
    said = printed.getvalue()
    tables = [line for line in said.splitlines() if line.startswith(" ")]
    assert max(map(len, tables)) <= width
    assert "…" not in said
    words = set(said.replace(",", " ").split())
    assert {"toy.figure2-and-3", "diverged", "failed", "missing", "data", "not", "run"} <= words
    assert {"experiment", "runs", "done", "time", "claims", "other", "smoke", "quick", "paper", "judged"} <= words
    assert "4 h 59 min" in said or "5 h" in said, "a time stays on one line"


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


LABORATORY = Path(__file__).parents[3] / "docs" / "laboratory.md"


@pytest.fixture
def own_paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The paper of the docs as ``notes/mine.py`` below the working folder."""
    if not LABORATORY.exists():
        pytest.skip("the docs are not beside the tests")
    text = re.search(r"```python\n(import polars.*?)```", LABORATORY.read_text(), re.DOTALL)
    assert text is not None
    assert len(text[1].splitlines()) <= 60
    Path("notes").mkdir()
    Path("notes/mine.py").write_text(text[1])
    Path("notes/__init__.py").touch()
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mine", "notes", "copied", "leaving"):
            del sys.modules[name]


@pytest.mark.usefixtures("own_paper")
@pytest.mark.parametrize(("own", "workers"), [("notes.mine:MINE", "1"), ("./notes/mine.py:MINE", "2")])
def test_a_paper_of_ones_own_is_a_paper_like_any_other(
    own: str, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, errors = run(["reproduce", "--paper", own, "--preset", "smoke", "--workers", workers], capsys)
    assert code == 0, errors
    assert "claims: 1 hold" in said
    assert len(list(Path("results/mine.angles").glob("*.parquet"))) == 4
    assert "mine.angles" in run(["list", "--paper", own], capsys)[1]
    code, said, _ = run(["status", "mine.angles", "--paper", own], capsys)
    assert code == 0
    assert "toy.one" not in said
    assert run(["report", "--paper", own], capsys)[0] == 0
    page = Path("results/report/mine.html").read_text()
    assert "Gradients come nearer than chance, 90°." in page
    assert "cannot be drawn" not in page
    assert 'href="report/mine.html"' in Path("results/report.html").read_text()


OWN = [
    ("mine:", "is 'mine:', expected package.module:PAPER or path/to/file.py:PAPER"),
    ("nobody:MINE", "nobody:MINE cannot be imported: ModuleNotFoundError: No module named 'nobody'"),
    ("nobody.py:MINE", "is nobody.py:MINE, but there is no file nobody.py: check the path"),
    (
        "notes/mine.py:YOURS",
        "notes/mine.py:YOURS cannot be imported: AttributeError: module 'mine' has no attribute 'YOURS'",
    ),
    ("notes.mine:ANGLES", "notes.mine:ANGLES is of the kind Experiment, expected falign.lab.experiment.Paper"),
    ("notes/copied.py:TOY", "notes/copied.py:TOY calls itself 'toy', as one of falign's papers does: rename it"),
    ("notes/leaving.py:MINE", "notes/leaving.py:MINE cannot be imported: SystemExit: 3 (leaving.py:1)"),
    (
        "notes/wrong.py:M",
        "notes/wrong.py:M cannot be imported: ValueError: paper 'mine': its title is '', expected a text (wrong.py:3)",
    ),
]


@pytest.mark.usefixtures("own_paper")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        *((["--paper", text], f"--paper {sentence}") for text, sentence in OWN),
        (["mine:MINE"], "NAME is 'mine:MINE', expected a name: a paper of your own is --paper mine:MINE"),
        (
            ["toy.on"],
            "NAME is 'toy.on', which is neither a paper nor an experiment: did you mean toy.one or toy.two or toy?",
        ),
        (["x"], "NAME is 'x', which is neither a paper nor an experiment: expected toy, or what falign list shows"),
    ],
)
@pytest.mark.unchecked
def test_what_is_no_paper_is_told_in_a_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = "replace(MINE, name='toy', experiments=(replace(ANGLES, name='toy.angles'),))"
    Path("notes/copied.py").write_text(f"from dataclasses import replace\nfrom mine import ANGLES, MINE\nTOY = {toy}\n")
    Path("notes/leaving.py").write_text("raise SystemExit(3)\n")
    Path("notes/wrong.py").write_text(
        "from dataclasses import replace\nfrom mine import MINE as GOOD\nM = replace(GOOD, title='')\n"
    )
    code, _, errors = run(["list", *words], capsys)
    assert code == 2
    assert errors.strip().splitlines() == [f"falign: {sentence}"]


@pytest.mark.usefixtures("own_paper")
def test_a_file_that_is_called_as_a_module_is_not_taken_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes/json.py").write_text("MINE = 3\n")
    code, _, errors = run(["list", "--paper", "notes/json.py:MINE"], capsys)
    assert code == 2
    assert "but a module json is " in errors
    assert "already: rename the file" in errors
