"""SQL over a real store and a real training: what is told, what is refused, and that nothing can be written."""

import csv
import io
import os
import signal
import threading
import time
from pathlib import Path

import polars as pl
import pytest
from training_runs import begin

from falign.cli import main
from falign.lab import _ending
from falign.lab._text import standard_console
from falign.lab.config import TrainConfig
from falign.lab.experiment import _reproduce
from falign.lab.experiment._local import local_executor
from falign.lab.experiment._results import Results
from falign.lab.experiment._selection import select
from falign.lab.experiment._specification import Setting
from falign.lab.experiment._store import Store
from falign.papers import PAPERS

pytest.importorskip("duckdb", reason='DuckDB is not installed: pip install "falign[query]"')

pytestmark = pytest.mark.xdist_group("query")

DROPOUT = "song2021.dropout"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("query") / "results"
    _reproduce.reproduce(
        select([DROPOUT], PAPERS),
        "smoke",
        out=folder,
        executor=local_executor(1, Setting(device="cpu", data=None)),
        memory=2**30,
        console=standard_console(),
        write_report=lambda out, _: (out, [out]),
    )
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("query") / "runs"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_ending, "draw", lambda *_: None)
        for rule in ("fa", "dfa"):
            begin(TrainConfig("digits", model="mlp:64-16-10", rule=rule, epochs=1), folder / rule)
    return folder


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command: exit code, what it prints, and what it prints to standard error."""
    monkeypatch.setenv("COLUMNS", "80")

    def asked(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["query", *map(str, words)])
        return code, *capsys.readouterr()

    return asked


def stored(store: Path) -> Results:
    """What the laboratory itself reads of the experiment."""
    (experiment,) = select([DROPOUT], PAPERS).experiments
    return Store(folder=store, repairs=False).results(experiment, "smoke")


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_runs_and_records_are_what_the_store_holds(store: Path, ask, tmp_path: Path) -> None:
    expected = stored(store)
    sql = "SELECT status, count(*) AS n, round(sum(seconds), 9) AS seconds FROM runs GROUP BY status"
    code, said, _ = ask(sql, "--store", store, "--csv", "-")
    assert code == 0
    assert rows(said) == [
        {"status": "done", "n": str(expected.runs.height), "seconds": f"{round(expected.runs['seconds'].sum(), 9)}"}
    ]
    file = tmp_path / "all.csv"
    assert ask("SELECT * EXCLUDE key FROM song2021.dropout", "--store", store, "--csv", file)[0] == 0
    table = pl.read_csv(file)
    assert table.sort(table.columns).equals(
        expected.table.select(table.columns).sort(table.columns).cast(dict(table.schema))
    )
    code, said, _ = ask("SELECT count(*) AS n FROM records WHERE experiment = 'song2021.dropout'", "--store", store)
    assert str(table.height) in said


def test_claims_are_those_of_the_report(store: Path, ask) -> None:
    code, said, _ = ask(f"FROM claims WHERE experiment = '{DROPOUT}'", "--store", store, "--csv", "-")
    assert code == 0
    expected = {
        (each.claim.name, each.verdict, f"{check.measured}")
        for each in stored(store).verdicts
        for check in (each.evidence.checks if each.evidence else ())
    }
    assert expected <= {(row["claim"], row["verdict"], row["measured"]) for row in rows(said)}
    assert {row["preset"] for row in rows(said)} == {"smoke"}


def test_trainings_are_joined_with_their_measurements(trained: Path, ask) -> None:
    sql = """SELECT rule, status, max(s.step) AS step, count(DISTINCT layer) AS layers FROM trainings t
             JOIN steps s USING (folder) JOIN alignment USING (folder) GROUP BY ALL ORDER BY rule"""
    code, said, _ = ask(sql, "--store", trained, "--csv", "-")
    assert code == 0
    assert [(row["rule"], row["status"]) for row in rows(said)] == [("dfa", "done"), ("fa", "done")]
    records = pl.read_parquet(trained / "fa" / "records.parquet")
    assert {row["step"] for row in rows(said)} == {str(records["step"].max())}
    assert ask(sql, "--store", trained / "fa", "--csv", "-")[1].count("\n") == 2  # one run folder is enough


def test_what_is_printed_fits_a_terminal(store: Path, trained: Path, ask) -> None:
    for words in (
        (),
        ("SELECT experiment, status, count(*) AS n FROM runs GROUP BY ALL",),
        ("SELECT strength, step, loss, cosine FROM song2021.dropout", "--rows", 7),
    ):
        code, said, wrong = ask(*words, "--store", store, "--store", trained)
        assert (code, wrong) == (0, "")
        assert max(map(len, said.splitlines())) <= 80
    assert "rows more: --rows" in said
    assert all(f" {name} " in ask("--store", store)[1] for name in ("runs", "records", "claims", DROPOUT))
    _, said, _ = ask("SELECT * FROM runs LIMIT 2", "--store", store)
    assert "experiment  song2021.dropout" in said  # a row below the other
    assert "no rows of key, seed" in ask("SELECT * FROM song2021.dropout LIMIT 0", "--store", store)[1]


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("SELECT nope FROM runs", 'the query is wrong: referenced column "nope" not found in FROM clause'),
        ("SELECT * FROM runz", "the query names a table runz, expected one of runs, records, claims, song2021.dropout"),
        ("SELCT 1", 'the query is wrong: syntax error at or near "SELCT"'),
        ("SELECT 1; SELECT 2", "the query has 2 statements, expected one"),
        ("DROP TABLE runs", "the query is no SELECT but DROP: falign query only reads"),
        ("COPY (SELECT 1) TO 'written.csv'", "the query is no SELECT but COPY"),
        ("SELECT * FROM read_text('mine.txt')", "file system operations are disabled"),
        ("SELECT * FROM 'mine.csv'", "file system operations are disabled"),
        ("SELECT CAST('a' AS INTEGER)", "the query is wrong: could not convert string 'a' to INT32"),
    ],
)
def test_one_sentence_for_a_wrong_query(sql: str, sentence: str, store: Path, ask, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("secret")
    code, said, wrong = ask(sql, "--store", store)
    assert (code, said) == (2, "")
    assert sentence in wrong
    assert wrong.startswith("falign: ")
    assert len(wrong.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_one_sentence_for_folders_that_hold_nothing(ask, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is neither a folder results nor runs here" in ask("SELECT 1")[2]
    assert "which holds no results: give a folder of falign reproduce" in ask("SELECT 1", "--store", tmp_path)[2]
    assert "--csv needs a query" in ask("--csv", "a.csv")[2]
    assert "--rows is 0, expected a number from 1 on" in ask("SELECT 1", "--rows", "0")[2]


def test_damaged_files_are_left_out_and_said(trained: Path, store: Path, ask, tmp_path) -> None:
    run = tmp_path / "damaged"
    run.mkdir()
    for name in ("config.json", "status.json", "alignment.parquet"):
        content = (trained / "fa" / name).read_bytes()
        (run / name).write_bytes(content if name != "alignment.parquet" else content[:-9] + b"x" + content[-8:])
    code, said, wrong = ask("SELECT count(*) FROM trainings, alignment", "--store", run)
    assert "alignment.parquet is left out: its checksum is wrong" in wrong
    assert (code, "names a table alignment" in wrong) == (2, True)
    copy = tmp_path / "store"
    (copy / DROPOUT).mkdir(parents=True)
    (copy / "falign.json").write_bytes((store / "falign.json").read_bytes())
    first, *others = sorted((store / DROPOUT).iterdir())
    (copy / DROPOUT / first.name).write_bytes(b"nothing")
    (copy / DROPOUT / others[0].name).write_bytes(others[0].read_bytes())
    code, said, wrong = ask("SELECT count(*) AS n FROM runs", "--store", copy, "--csv", "-")
    assert (code, rows(said)) == (0, [{"n": "1"}])
    assert "1 damaged or older files are left out" in wrong


def test_ctrl_c_ends_a_query_that_would_take_for_ever(store: Path, ask) -> None:
    pressed = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    pressed.start()
    began = time.monotonic()
    code, _, wrong = ask(
        "SELECT sum(a.range * b.range % 7) FROM range(1000000) a, range(100000000) b", "--store", store
    )
    assert (code, wrong) == (130, "falign: interrupted\n")
    assert time.monotonic() - began < 20
