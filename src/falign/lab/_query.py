"""SQL over what is there: stores of ``falign reproduce`` and folders of ``falign train``, read by DuckDB.

The tables are copies in memory, and the connection may reach no file: a query can read, and nothing else.
"""

import csv
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table

from falign.lab._files import RunError, Unreadable, Unsealed, read_bounded, verify_seal
from falign.lab._memory import available
from falign.lab._run_folder import RunFolder
from falign.lab._text import echo, plain_cell, print_plain
from falign.lab.config import ConfigError
from falign.lab.experiment._catalogue import SUFFIX, stored_keys
from falign.lab.experiment._run_file import PARQUET_ERRORS, CorruptRun, OlderFormat, decode, read_regular_file
from falign.lab.experiment._selection import choose_presets
from falign.lab.experiment._specification import Paper
from falign.lab.experiment._store import Store, concat_layouts, is_store

_TABLE = 1 << 30
"""Bytes that a table of a run folder may have."""
_LISTENING = 0.05
"""Seconds after which Ctrl-C is heard."""
_LINES = 25
"""Letters of a value that a column is given at least, before rows are shown one below the other."""


Read = Callable[[], pl.DataFrame | None]
"""Reads a table; None where there is nothing."""


def views(folders: Sequence[Path], papers: Mapping[str, Paper]) -> dict[str, Read]:
    """Find the tables of folders, by their names in SQL; nothing is read.

    Args:
        folders: Stores of ``falign reproduce``, run folders of ``falign train``, and folders of these.
        papers: {name: paper} of those whose claims can be judged.

    Raises:
        ConfigError: A folder is none of these.
    """
    stores = [folder for folder in folders if is_store(folder)]
    runs = [run for folder in folders if folder not in stores for run in run_folders(folder)]
    found: dict[str, Read] = {}
    if stores:
        found["runs"] = lambda: _join(map(_runs, stores))
        found["records"] = lambda: _all_records(stores)
        found["claims"] = lambda: _join(_claims(each, papers) for each in stores)
        for name in sorted({path.name for each in stores for path in _experiments(each)}):
            short = ".".join(re.sub(r"\W", "_", part) for part in name.split(".", 1))
            found[short] = lambda name=name: _records([each / name for each in stores])
    if runs:
        found["trainings"] = lambda: _trainings(runs)
        for name, file in (("steps", "records"), *((each, each) for each in ("alignment", "neurons", "law"))):
            found[name] = lambda file=file: _join(_table_of(run, file) for run in runs)
    return found


def run_folders(folder: Path) -> list[Path]:
    """List the run folders in a folder, which may be one itself.

    Raises:
        ConfigError: There is none.
    """
    found = [folder] if RunFolder(folder).exists else []
    if folder.is_dir():
        found += sorted(path for path in folder.iterdir() if path.is_dir() and RunFolder(path).exists)
    if not found:
        raise ConfigError(
            f"--store is {folder}, which holds no results: give a folder of falign reproduce, a run folder of falign "
            "train, or a folder of run folders"
        )
    return found


def _join(tables: Any) -> pl.DataFrame | None:
    """Put tables of the same kind below each other."""
    there = [table for table in tables if table is not None and table.width]
    return concat_layouts(there) if there else None


# What a store holds.


def _experiments(store: Path) -> list[Path]:
    """List the folders of the experiments, which have a paper in their names."""
    return sorted(path for path in store.iterdir() if "." in path.name.lstrip(".") and path.is_dir())


def _stored(folder: Path) -> Iterator[tuple[Any, bytes]]:
    """Read the runs of an experiment, each with its checksum verified, and the content of its file."""
    lost = 0
    for key in sorted(stored_keys(folder)):
        try:
            content, _ = read_regular_file(folder / f"{key}{SUFFIX}")
            run, _ = decode(content)
        except FileNotFoundError:
            continue
        except (CorruptRun, OlderFormat):
            lost += 1
            continue
        yield run, content
    if lost:
        echo(f"falign: {folder}: {lost} damaged or older files are left out: falign status names them", error=True)


def _runs(store: Path) -> pl.DataFrame | None:
    rows = [
        {
            "experiment": run.experiment,
            "key": run.key,
            "revision": run.revision,
            "seed": run.seed,
            "status": run.status,
            "message": run.message,
            "seconds": run.seconds,
            "point": json.dumps(dict(run.point)),
            "provenance": json.dumps(dict(run.provenance)),
        }
        for folder in _experiments(store)
        for run, _ in _stored(folder)
    ]
    return pl.DataFrame(rows, infer_schema_length=None) if rows else None


def _records(folders: Sequence[Path]) -> pl.DataFrame | None:
    """Read the records of an experiment's runs that are done, beside key, seed and point."""
    tables = []
    for folder in folders:
        for run, content in _stored(folder):
            if run.status != "done":
                continue
            try:
                records = pl.read_parquet(io.BytesIO(content))
            except PARQUET_ERRORS:  # its checksum is right: no store has written it
                continue
            beside = {"key": run.key, "seed": run.seed, **run.point}
            tables.append(records.select(*(pl.lit(value).alias(name) for name, value in beside.items()), pl.all()))
    return _join(tables)


def _all_records(stores: Sequence[Path]) -> pl.DataFrame | None:
    return _join(
        table.select(pl.lit(folder.name).alias("experiment"), pl.all())
        for store in stores
        for folder in _experiments(store)
        if (table := _records([folder])) is not None
    )


def _claims(store: Path, papers: Mapping[str, Paper]) -> pl.DataFrame | None:
    """Judge the claims of the papers of which the store has runs, each at the preset of which it has most."""
    there = {path.name.partition(".")[0] for path in _experiments(store)}
    opened, rows = Store(folder=store, repairs=False), []
    for paper in (papers[name] for name in papers if name in there):
        presets = choose_presets([paper], {each.name: opened.there(each) for each in paper.experiments})
        for experiment in paper.experiments:
            preset = presets[experiment.name]
            for each in opened.results(experiment, preset).verdicts:
                claim = each.claim
                told = {
                    "paper": paper.name,
                    "experiment": experiment.name,
                    "preset": preset,
                    "claim": claim.name,
                    "origin": claim.origin,
                    "verdict": each.verdict,
                }
                ending = {"statement": claim.statement, "reference": claim.reference, "message": each.message}
                checks = each.evidence.checks if each.evidence is not None else ()
                numbers = [
                    {"number": check.label, "measured": check.measured, "low": check.low, "high": check.high}
                    for check in checks
                ]
                for number in numbers or [dict.fromkeys(("number", "measured", "low", "high"))]:
                    rows.append({**told, **number, **ending})
    return pl.DataFrame(rows, infer_schema_length=None) if rows else None


# What run folders hold.


def _trainings(folders: Sequence[Path]) -> pl.DataFrame | None:
    rows = []
    for folder in folders:
        run = RunFolder(folder)
        try:
            config, provenance = run.read_config()
            status = run.read_status()
        except RunError as error:
            echo(f"falign: {error}", error=True)
            continue
        options = {name: " ".join(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
        ended = {name: status.get(name) for name in ("status", "step", "epoch", "message", "law")}
        versions = {name: provenance.get(name) for name in ("falign", "started", "device")}
        rows.append({"folder": str(folder), **ended, **options, **versions})
    return pl.DataFrame(rows, infer_schema_length=None) if rows else None


def _table_of(folder: Path, name: str) -> pl.DataFrame | None:
    """Read a table of a run folder; None where there is none, or where it is damaged, which is said."""
    path = folder / f"{name}.parquet"
    if not path.exists():
        return None
    try:
        content = read_bounded(path, _TABLE)
        verify_seal(content)
        table = pl.read_parquet(io.BytesIO(content))
    except (Unreadable, Unsealed, *PARQUET_ERRORS) as error:
        echo(f"falign: {path} is left out: {str(error).splitlines()[0]}", error=True)
        return None
    return table.select(pl.lit(str(folder)).alias("folder"), pl.all())


# The query.


def run_query(sql: str, there: Mapping[str, Read]) -> "duckdb.DuckDBPyConnection":
    """Run one statement that reads.

    Args:
        sql: The statement.
        there: The tables; those that it names are read.

    Returns:
        The connection, with the result.

    Raises:
        ConfigError: The statement is wrong, is none that reads, or there are several.
    """
    connection = duckdb.connect(":memory:")
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1:
            raise ConfigError(f"the query has {len(statements)} statements, expected one")
        if statements[0].type not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
            raise ConfigError(f"the query is no SELECT but {_kind(statements[0])}: falign query only reads")
        with tempfile.TemporaryDirectory() as folder:
            for name, read in there.items():
                if _names(sql, name) and (table := read()) is not None:
                    _load(connection, name, table, Path(folder, "table.parquet"))
        connection.execute(f"SET memory_limit = '{available() // 2} bytes'; SET enable_progress_bar = false")
        connection.execute("SET enable_external_access = false; SET lock_configuration = true")
        return _interruptible(connection, sql)
    except duckdb.Error as error:
        raise ConfigError(_sentence(error, there)) from None


def _interruptible(connection: "duckdb.DuckDBPyConnection", sql: str) -> "duckdb.DuckDBPyConnection":
    """Run a statement in a thread: within DuckDB the main one would not hear Ctrl-C.

    Nor does it while it waits for good: the handler of polars has the system go on waiting.
    """
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(connection.execute, sql)
        try:
            while not running.done():
                wait([running], timeout=_LISTENING)
            return running.result()
        except KeyboardInterrupt:
            connection.interrupt()
            raise


def _kind(statement: Any) -> str:
    return str(statement.type).rpartition(".")[2]


def _names(sql: str, name: str) -> bool:
    """Test for the name of a table in a statement; one that only looks like it is read in vain."""
    return re.search(r"\W+".join(rf"\b{part}\b" for part in name.split(".")), sql, re.IGNORECASE) is not None


def _load(connection: "duckdb.DuckDBPyConnection", name: str, table: pl.DataFrame, file: Path) -> None:
    """Copy a table; by a file, as DuckDB reads those of polars only through a third library."""
    schema, _, short = name.rpartition(".")
    if schema:
        connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
    table.write_parquet(file)
    connection.execute(
        f'CREATE TABLE {f""""{schema}".""" if schema else ""}"{short}" AS FROM read_parquet(?)', [str(file)]
    )


def _sentence(error: Exception, there: Iterable[str]) -> str:
    """Make one sentence of an error of DuckDB: its first paragraph."""
    text = " ".join((str(error).split("\n\nLINE")[0].partition(": ")[2] or str(error)).split())
    if unknown := re.match(r"Table with name (\S+) does not exist", text):
        return f"the query names a table {unknown[1]}, expected one of {', '.join(there)}"
    return f"the query is wrong: {text[:1].lower()}{text[1:]}".replace("! ", "; ").rstrip(".!")


# What is shown.


def show_views(there: Mapping[str, Read], console: Console) -> None:
    """Print the tables with their columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("table", "rows", "columns"):
        table.add_column(title, justify="right" if title == "rows" else "left", overflow="fold")
    for name, read in there.items():
        if name == "claims":  # to judge them takes seconds
            table.add_row(name, "", "paper, experiment, preset, claim, origin, verdict, number, …")
        elif (found := read()) is not None:
            table.add_row(plain_cell(name), str(found.height), plain_cell(", ".join(found.columns)))
    console.print(table)
    print_plain(console, 'falign query "SELECT …" runs a query of them')


def show(result: "duckdb.DuckDBPyConnection", console: Console, most: int) -> None:
    """Print the first rows of a result: as a table, or one below the other where the columns have no room."""
    with closing(result):
        names = [column[0] for column in result.description or ()]
        rows = [[_cell(value) for value in row] for row in result.fetchmany(most)]
        more = _count(result)
    wanted = [
        min(max([len(name), *(len(row[place]) for row in rows)]), max(_LINES, len(name)))
        for place, name in enumerate(names)
    ]
    if not rows:
        print_plain(console, f"no rows of {', '.join(names)}")
    elif sum(wanted) + 2 * len(wanted) > console.width:
        width = max(map(len, names))
        for number, row in enumerate(rows):
            lines = [f"{name:>{width}}  {value}" for name, value in zip(names, row, strict=True)]
            print_plain(console, "\n".join(lines if number == 0 else ["", *lines]))
    else:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place, name in enumerate(names):
            numeric = all(re.fullmatch(r"[-+\d.e]+|—|inf|nan", row[place]) for row in rows)
            table.add_column(plain_cell(name), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(plain_cell, row))
        console.print(table)
    if more:
        print_plain(console, f"and {more:,} rows more: --rows {len(rows) + more}, or --csv FILE for all of them")


def _count(result: "duckdb.DuckDBPyConnection") -> int:
    return sum(len(rows) for rows in iter(lambda: result.fetchmany(10_000), []))


def _cell(value: object) -> str:
    if value is None:
        return "—"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def as_csv(result: "duckdb.DuckDBPyConnection") -> Iterator[str]:
    """Write a result as CSV with a header, some lines at a time; NULL is empty, numbers have all their digits."""
    with closing(result):
        lines = io.StringIO(newline="")
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow([column[0] for column in result.description or ()])
        yield lines.getvalue()
        while rows := result.fetchmany(10_000):
            lines.seek(0)
            lines.truncate()
            writer.writerows(rows)
            yield lines.getvalue()
