"""The commands of ``falign`` about results: papers, runs and claims, queries, pages, the demo, and what is here."""

import gc
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from falign._commands import (
    _CSV,
    _FILES,
    _RESULTS,
    _WHERE,
    _Data,
    _Folder,
    _Names,
    _Own,
    _Preset,
    _ShownPreset,
    _SomeFolder,
    app,
)
from falign.lab._text import echo, standard_console, table_csv
from falign.lab.config import ConfigError

_DEMO_TAKES = {"smoke": "half a minute", "quick": "two minutes", "paper": "many hours"}


@app.command(name="list")
def list_names(*names: _Names, paper: _Own = (), csv: _CSV = False) -> int:
    """List papers with their experiments, data sets, rules and models, or show some of them in detail.

    falign list song2021.figure2

    Args:
        names: What is shown in detail: papers, experiments, data sets, rules, models; none is the names of all.
        paper: A paper of your own, module:PAPER or path/to/file.py:PAPER; may be given several times.
        csv: Print the names for programs, a row each.
    """
    if names and csv:
        raise ConfigError("--csv is for the list of all names: leave it or NAME out")
    from falign.lab import _listing
    from falign.lab.experiment._selection import select
    from falign.papers import PAPERS

    own = {each.name: each for each in select((), PAPERS, paper).papers} if paper else {}
    known = {**PAPERS, **own}
    if csv:
        echo(table_csv(_listing.names_table(known)))
    elif not names and not own:
        _listing.show_names(known, standard_console())
    for name in names or own:
        _listing.show_one(name, known, standard_console())
    return 0


@app.command
def reproduce(
    *names: _Names,
    paper: _Own = (),
    preset: _Preset = "quick",
    only: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    seeds: int | None = None,
    out: _Folder = _RESULTS,
    data: _Data = None,
    workers: Annotated[int | None, Parameter(group=_WHERE, show_default=lambda _: "1")] = None,
    memory: Annotated[
        float | None, Parameter(group=_WHERE, show_default=lambda _: "half of the machine's, shared among the workers")
    ] = None,
    device: Annotated[str, Parameter(group=_WHERE)] = "cpu",
    ray: Annotated[str | None, Parameter(group=_WHERE)] = None,
    cpus_per_run: Annotated[float | None, Parameter(group=_WHERE, show_default=lambda _: "1")] = None,
    gpus_per_run: Annotated[float | None, Parameter(group=_WHERE, show_default=lambda _: "0")] = None,
) -> int:
    """Compute the runs of papers that are missing, judge what the papers claim, and write a page of it.

    falign reproduce song2021 --preset quick --workers 2

    Called again, it does only what is missing; several may work on one folder at once.

    Args:
        names: Papers or experiments; none is all papers.
        paper: A paper of your own, module:PAPER or path/to/file.py:PAPER; may be given several times.
        preset: Sizes and repetitions: seconds, minutes on two cores, or the paper's own.
        only: AXIS=VALUE, or several values with commas between them: only runs of these; may be given several times.
        seeds: Only the first so many seeds.
        out: Folder of the results.
        data: Folder that holds the data sets; what is not there is downloaded.
        workers: Processes that compute; 1 is this one alone.
        memory: GiB that a block of runs may need.
        device: cpu, cuda or cuda:INDEX.
        ray: Compute on the Ray cluster at this address; local starts one here.
        cpus_per_run: Cores that Ray gives to a block of runs.
        gpus_per_run: GPUs, or a part of one, that Ray gives to a block of runs.
    """
    from falign.lab._options import ExecutionOptions

    options = ExecutionOptions(
        workers=workers,
        device=device,
        data=data,
        memory=memory,
        ray=ray,
        cpus_per_run=cpus_per_run,
        gpus_per_run=gpus_per_run,
    )
    from falign.lab.experiment._selection import narrow, select
    from falign.papers import PAPERS

    selection = select(names, PAPERS, paper)
    if only or seeds is not None:
        selection = narrow(selection, only, seeds, preset)
    from falign.lab.experiment import _reproduce

    executor, limit = _reproduce.make_executor(options, selection.modules), _reproduce.memory_limit(options)
    return _reproduce.reproduce(selection, preset, out=out, executor=executor, memory=limit, console=standard_console())


@app.command
def status(
    *names: _Names,
    paper: _Own = (),
    preset: _ShownPreset = None,
    out: _Folder = _RESULTS,
    against: _SomeFolder = None,
    csv: _CSV = False,
) -> int:
    """Show how the runs of papers stand, and what their claims come to so far.

    falign status song2021 --preset quick

    Args:
        names: Papers or experiments; none is all papers.
        paper: A paper of your own, module:PAPER or path/to/file.py:PAPER; may be given several times.
        preset: Which runs.
        out: Folder of the results.
        against: Folder of other results: compare the runs that are in both, at all presets.
        csv: Print the table for programs, and nothing else.
    """
    if csv and against is not None:
        raise ConfigError("--csv is for the table of one folder: leave it or --against out")
    from falign.lab.experiment._selection import choose_presets, select, told_presets
    from falign.papers import PAPERS

    selection = select(names, PAPERS, paper)
    from falign.lab.experiment import _agreement
    from falign.lab.experiment._reproduce import read_results, runs_there, show_status, status_table
    from falign.lab.experiment._store import Store

    gc.freeze()  # modules stay: the collector need not look through them while many runs are read
    store = Store(folder=out, repairs=False)
    store.open(create=False)
    there = runs_there(store, selection.papers)
    chosen = choose_presets(selection.papers, there, preset)
    results = read_results(store, selection, chosen)
    if csv:
        echo(table_csv(status_table(store, selection, results, plain=True)))
        return 0
    if note := told_presets(chosen, {each.name: there[each.name] for each in selection.experiments}, preset):
        echo(note)
    show_status(store, selection, results, standard_console())
    if against is None:
        return 0
    other = Store(folder=against, repairs=False)
    other.open(create=False)
    return _agreement.show_agreements(store, other, selection.experiments, standard_console())


@app.command
def report(
    *names: _Names,
    paper: _Own = (),
    preset: _ShownPreset = None,
    out: _Folder = _RESULTS,
) -> int:
    """Write the page of papers again from the runs that are there; nothing is computed.

    falign report song2021 --preset quick

    Args:
        names: Papers, or experiments whose papers are meant; none is all papers.
        paper: A paper of your own, module:PAPER or path/to/file.py:PAPER; may be given several times.
        preset: Which runs.
        out: Folder of the results, where the page is written.
    """
    from falign.lab.experiment._selection import choose_presets, select, told_presets
    from falign.papers import PAPERS

    selection = select(names, PAPERS, paper)
    from falign.lab._files import RunError
    from falign.lab.experiment._reproduce import read_results, runs_there, tell_pages
    from falign.lab.experiment._store import Store
    from falign.lab.report import write_report

    gc.freeze()  # modules stay: the collector need not look through them while many runs are read
    store = Store(folder=out, repairs=False)
    store.open(create=False)
    there = runs_there(store, selection.papers)
    chosen = choose_presets(selection.papers, there, preset)
    note = told_presets(chosen, there, preset)
    if preset and note:
        raise RunError(f"{note}; the page was left as it is")
    if note:
        echo(note)
    tell_pages(write_report(out, read_results(store, selection, chosen)), echo)
    return 0


@app.command
def query(
    sql: Annotated[str | None, Parameter(name="SQL", show_default=False)] = None,
    *,
    store: Annotated[
        tuple[Path, ...], Parameter(group=_FILES, negative="", show_default=lambda _: "results and runs, as there are")
    ] = (),
    csv: Annotated[Path | None, Parameter(group=_FILES, allow_leading_hyphen=True)] = None,
    rows: int = 100,
) -> int:
    """Run a query in SQL over results: runs, records and claims of papers, trainings and their measurements.

    falign query "SELECT experiment, status, count(*) FROM runs GROUP BY ALL"

    Without a query it lists the tables and their columns. It only reads.

    Args:
        sql: One SELECT, in DuckDB's dialect.
        store: A folder of falign reproduce, a run folder of falign train, or a folder of these; several times for more.
        csv: Write the result into this file, all of it, as CSV; - is standard output.
        rows: Rows that are printed at most.
    """
    if rows < 1:
        raise ConfigError(f"--rows is {rows}, expected a number from 1 on")
    if csv is not None and sql is None:
        raise ConfigError('--csv needs a query: falign query "SELECT …" --csv FILE')
    from falign.lab import _query

    folders = list(store) or [folder for folder in (_RESULTS, Path("runs")) if folder.is_dir()]
    if not folders:
        raise ConfigError("there is neither a folder results nor runs here: name one with --store")
    from falign.papers import PAPERS

    there = _query.views(folders, PAPERS)
    if sql is None:
        _query.show_views(there, standard_console())
        return 0
    result = _query.run_query(sql, there)
    if csv is None:
        _query.show(result, standard_console(), rows)
    elif str(csv) == "-":
        for lines in _query.as_csv(result):
            echo(lines.removesuffix("\n"))
    else:
        from falign.lab._files import atomic_write

        atomic_write(csv, "".join(_query.as_csv(result)).encode())
        echo(f"the result is {csv}")
    return 0


@app.command
def explore(
    *,
    runs: _Folder = Path("runs"),
    store: _Folder = _RESULTS,
    port: Annotated[int, Parameter(show_default=lambda _: "any that is free")] = 0,
    browser: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Open a page of this machine alone: watch runs, and move the parameters of the simulators.

    falign explore

    It listens on 127.0.0.1 and lets in those who have the address that is printed, with a random token in it. Ctrl-C
    ends it.

    Args:
        runs: Folder of run folders.
        store: Folder of the results of falign reproduce.
        port: Port to listen to.
        browser: Open the page in a browser.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"--port is {port}, expected a number from 0 to 65535")
    from falign.lab.explore._server import serve

    serve(runs=runs, store=store, port=port, browser=browser)
    return 0


@app.command
def demo(
    *,
    preset: _Preset = "quick",
    runs: _Folder = Path("runs"),
    out: _Folder = _RESULTS,
    workers: Annotated[int, Parameter(group=_WHERE)] = 2,
) -> int:
    """Train four rules on real digits, reproduce a paper, and write one page on which both stand.

    falign demo

    About two minutes on two quiet cores, without a download. Called again, it trains anew, and computes of the paper
    only what is missing.

    Args:
        preset: Sizes of the paper's runs.
        runs: Folder of the trainings, demo-bp and so on: falign compare runs/demo-* shows them again.
        out: Folder of the results, where the page is written.
        workers: Processes that compute the paper.
    """
    from falign.lab._options import ExecutionOptions

    ExecutionOptions(workers=workers)  # is checked before anything is imported
    echo(
        f"falign demo: four small trainings, then Song, Xu and Lafferty 2021 at preset {preset}: {_DEMO_TAKES[preset]} "
        f"on two quiet cores, 20 MB in {runs} and {out}, nothing is downloaded"
    )
    from falign.lab._demo import demonstrate
    from falign.lab.experiment._selection import select
    from falign.papers import PAPERS

    selection = select(["song2021"], PAPERS)
    return demonstrate(selection, preset, runs=runs, out=out, workers=workers, console=standard_console())


@app.command
def doctor(
    *,
    data: _Data = None,
    out: _Folder = _RESULTS,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Show what is here and what is not: versions, devices, data sets, folders, and what killed processes left.

    falign doctor --json

    Args:
        data: Folder that holds the data sets.
        out: Folder of the results.
        json: Print the same for programs, and for reports of faults.
    """
    from falign.lab._doctor import as_json, examine, show

    findings = examine(data=data, out=out)
    if json:
        echo(as_json(findings))
    else:
        show(findings, standard_console())
    return int(any(each.broken for each in findings))
