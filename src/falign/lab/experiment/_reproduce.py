"""Reproduce experiments: compute the runs that are missing, print how they stand, write the report."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import polars as pl
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from falign.lab._memory import GIB, available
from falign.lab._options import ExecutionOptions
from falign.lab._signals import ImmediateStop, Stopped
from falign.lab._text import plain_cell, print_plain, print_table
from falign.lab.config import ConfigError
from falign.lab.experiment import _store
from falign.lab.experiment._execution import Executor
from falign.lab.experiment._leases import RunLeases, leases_read_only
from falign.lab.experiment._local import local_executor
from falign.lab.experiment._progress import ProgressDisplay, RunCounts, duration
from falign.lab.experiment._results import PaperResults, Results
from falign.lab.experiment._run_file import RETRIED
from falign.lab.experiment._schedule import Schedule
from falign.lab.experiment._selection import Selection, choose_presets
from falign.lab.experiment._specification import Experiment, Paper, Setting
from falign.lab.experiment._store import Store

WriteReport = Callable[[Path, Sequence[PaperResults]], tuple[Path, list[Path]]]
"""(Folder, results) -> the index of all pages, and the pages that were written."""


def reproduce(
    selection: Selection,
    preset: str,
    *,
    out: Path,
    executor: Executor,
    memory: int,
    console: Console,
    write_report: WriteReport | None = None,
) -> int:
    """Bring all runs of experiments into a store, and write the report of their papers.

    Runs that are there already are not computed again, but those that failed are tried once more. Runs that another
    living process has leased are waited for.

    Args:
        selection: The experiments, and their papers for the report.
        preset: Sizes and number of seeds.
        out: The store's folder; made if there is none.
        executor: Where runs are computed.
        memory: Bytes that a block of runs may need.
        console: Where progress and tables are printed.
        write_report: Writes the report; None is the report of the laboratory.

    Returns:
        0: all runs are there except those whose data set is not on this machine, whatever the claims came to; 1: runs
        failed; 130, 143 or 129: ended by Ctrl-C, SIGTERM or SIGHUP.

    Raises:
        RunError: The folder is not a store.
        WriteError: Something cannot be written.
    """
    store = Store(folder=out, log=lambda text: print_plain(console, text))
    _store.store_format(out)
    try:
        with ImmediateStop() as stop:
            _run(store, selection.experiments, preset, executor, memory, console, stop)
            store.check()
            there = runs_there(store, selection.papers)
            presets = choose_presets(selection.papers, there, preset, selection.experiments)
            papers = read_results(store, selection, presets)
            show_status(store, selection, papers, console)
            pages = (write_report or _report())(out, papers)
            store.check()
    except KeyboardInterrupt as interruption:
        store.log(f"interrupted: the runs that were finished are kept in {out}, and the same command goes on from them")
        return interruption.code if isinstance(interruption, Stopped) else 130
    tell_pages(pages, store.log)
    asked = {task.key for experiment in selection.experiments for task in experiment.tasks(preset)}
    endings = [result.runs.filter(pl.col("key").is_in(asked))["status"] for each in papers for result in each.results]
    return int(any(statuses.is_in(["failed", "missing"]).any() for statuses in endings))


def read_results(store: Store, selection: Selection, presets: Mapping[str, str]) -> tuple[PaperResults, ...]:
    """Read all that a store holds of the papers of a selection.

    Args:
        store: The store.
        selection: The papers, and what was asked for.
        presets: {full name of an experiment: its preset}.
    """
    return tuple(
        PaperResults(paper=paper, results=tuple(store.results(each, presets[each.name]) for each in paper.experiments))
        for paper in selection.papers
    )


def runs_there(store: Store, papers: Sequence[Paper]) -> dict[str, dict[str, set[str]]]:
    """Find the runs that are there: {full name of an experiment: {preset: their keys}}."""
    return {each.name: store.there(each) for paper in papers for each in paper.experiments}


def _run(
    store: Store,
    experiments: Sequence[Experiment],
    preset: str,
    executor: Executor,
    memory: int,
    console: Console,
    stop: ImmediateStop,
) -> None:
    """Compute the missing runs."""
    counts, failed_before = {}, {}
    for experiment in experiments:
        tasks = experiment.tasks(preset)
        stored = store.get_all(tasks)
        failed = {key: run for key, run in stored.items() if run.status in RETRIED}
        counts[experiment.name] = RunCounts(
            experiment=experiment,
            total=len(tasks),
            missing={task.key: task for task in tasks if task.key not in stored or task.key in failed},
            status=Counter(run.status for run in stored.values() if run.status not in RETRIED),
        )
        failed_before.update(failed)
    progress = ProgressDisplay(console, list(counts.values()), lambda: executor.slots)
    if not any(each.missing for each in counts.values()):
        store.open(create=True)
        with RunLeases(store):  # entering deletes what killed processes have left
            return  # the executor is not entered: its cluster need not even be reachable
    with stop.deferred(), ExitStack() as stack:
        stack.enter_context(progress)
        with stop.immediate():
            stack.enter_context(executor)
        store.open(create=True)  # only now that the executor could be entered: a wrong address leaves no folder behind
        leases = stack.enter_context(RunLeases(store))
        Schedule(
            store=store,
            leases=leases,
            executor=executor,
            memory=memory,
            counts=counts,
            failed_before=failed_before,
            progress=progress,
            stop=stop,
        ).run()


def tell_pages(pages: tuple[Path, list[Path]], say: Callable[[str], None]) -> None:
    """Say where the pages are."""
    index, written = pages
    say(f"the page is {written[0]}, the same as JSON beside it" if len(written) == 1 else "the pages are")
    for page in written if len(written) > 1 else ():
        say(f"  {page}")
    say(f"all papers: {index}")


def _report() -> WriteReport:
    from falign.lab.report import write_report  # draws figures, so it is only imported when it is needed

    return write_report


def make_executor(options: ExecutionOptions, modules: Sequence[str] = ()) -> Executor:
    """Make the executor that options ask for.

    Args:
        options: The options.
        modules: Names of modules that the nodes of a cluster do not have.

    Returns:
        The executor, not yet entered.

    Raises:
        ConfigError: This machine has no such device.
    """
    setting = Setting(device=options.device, data=None if options.data is None else options.data.absolute())
    if options.ray is not None:
        from falign.lab.experiment._ray import RayExecutor  # Ray is an extra of its own

        share = {"cpus_per_run": options.cpus, "gpus_per_run": options.gpus}
        return RayExecutor(options.ray, setting, **share, modules=modules)
    device, devices = torch.device(options.device), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= devices:
        raise ConfigError(
            f"--device is {options.device}, but PyTorch sees {devices} CUDA devices here: use --device cpu"
        )
    return local_executor(options.workers or 1, setting)


def memory_limit(options: ExecutionOptions) -> int:
    """Bytes that a block may need: what was asked for, or half of what there is, shared among the workers.

    Args:
        options: The options; of a CUDA device its own memory counts.
    """
    if options.memory is not None:
        return int(options.memory * GIB)
    cuda = options.device != "cpu" and torch.cuda.is_available()
    whole = torch.cuda.get_device_properties(options.device).total_memory if cuda else available()
    return max(1, int(whole) // 2 // (options.workers or 1))


# Tables in the terminal.

_TEXT_COLUMNS = ("experiment", "preset", "paper's claims", "theory and beyond", "other")
_VERDICTS = {"holds": "hold", "fails": "fail", "not run": "not run"}


def show_status(store: Store, selection: Selection, papers: Sequence[PaperResults], console: Console) -> None:
    """Print the state of experiments: one row each, then the first failures, then a count of the verdicts.

    Args:
        store: The store, which tells which missing runs are being computed.
        selection: The experiments to show.
        papers: Results of their papers.
        console: Where it is printed.
    """
    results = _chosen(selection, papers)
    print_table(status_table(store, selection, papers), console)
    _, killed = leases_read_only(store)
    if number := sum(int(result.runs["key"].is_in(list(killed)).sum()) for result in results):
        were = "1 run was" if number == 1 else f"{number} runs were"
        print_plain(console, f"{were} at work when their command was killed: the same command computes them")
    for result in results:
        for verdict in result.verdicts:
            if verdict.broken:
                print_plain(console, f"{result.experiment.name}: {verdict.claim.name}: {verdict.message}")
        for status in ("failed", "diverged", "no data"):
            _print_first(result, status, console)
        if others := result.others:
            which = "1 run of another revision is" if others == 1 else f"{others} runs of other revisions are"
            print_plain(console, f"{result.experiment.name}: {which} left alone")
    stated, derived = (
        sum((_verdicts(result, of_paper=of_paper) for result in results), Counter()) for of_paper in (True, False)
    )
    print_plain(console, f"the papers' claims: {_verdict_counts(stated) or 'none'}")
    if derived:
        print_plain(console, f"what follows from the theory, and beyond: {_verdict_counts(derived)}")


def status_table(store: Store, selection: Selection, papers: Sequence[PaperResults], *, plain: bool = False) -> Table:
    """Make the table of the state of experiments, one row each.

    Args:
        store: The store, which tells which missing runs are being computed, and which were when a command was killed.
        selection: The experiments to show.
        papers: Results of their papers.
        plain: Whether it is for programs: a column for each count and for the preset, and the time in seconds.
    """
    leased, killed = leases_read_only(store)
    results = _chosen(selection, papers)
    preset = ("preset",) if plain or len({result.preset for result in results}) > 1 else ()
    counted = ("running", "killed", *_ENDINGS, "missing")
    names = ("time", "paper's claims", "theory and beyond", "other")
    verdicts = tuple(f"{origin} {word}" for origin in ("paper", "theory") for word in _VERDICTS.values())
    table = _table("experiment", *preset, "runs", "done", *(("seconds", *counted, *verdicts) if plain else names))
    for result in results:
        missing = result.runs.filter(pl.col("status") == "missing")["key"]
        at_work, ended = sum(key in leased for key in missing), sum(key in killed for key in missing)
        others = {
            "running": at_work,
            "killed": ended,
            **{status: result.count(status) for status in _ENDINGS},
            "missing": missing.len() - at_work - ended,
        }
        claims = [_verdicts(result, of_paper=of_paper) for of_paper in (True, False)]
        shown = [result.preset] if preset else []
        first = (result.experiment.name, *shown, str(result.runs.height), str(result.count("done")))
        seconds = float(result.runs["seconds"].sum())
        if plain:
            verdict_counts = (str(each[verdict]) for each in claims for verdict in _VERDICTS)
            _add(table, *first, f"{seconds:.3f}", *map(str, others.values()), *verdict_counts)
            continue
        told = ", ".join(f"{number} {status}" for status, number in others.items() if number)
        _add(table, *first, duration(seconds), *(_verdict_counts(each) or "-" for each in claims), told)
    return table


_ENDINGS = ("diverged", "failed", "no data")


def _chosen(selection: Selection, papers: Sequence[PaperResults]) -> list[Results]:
    chosen = {experiment.name for experiment in selection.experiments}
    return [result for paper in papers for result in paper.results if result.experiment.name in chosen]


def _verdicts(result: Results, *, of_paper: bool) -> Counter[str]:
    return Counter(each.verdict for each in result.verdicts if (each.claim.origin == "paper") is of_paper)


def _print_first(result: Results, status: str, console: Console) -> None:
    runs = result.runs.filter(pl.col("status") == status)
    if runs.is_empty():
        return
    run = runs.row(0, named=True)
    axes = [name for name in runs.columns if name not in ("key", "status", "message", "seconds")]
    where = ", ".join(f"{axis}={run[axis]}" for axis in axes if run[axis] is not None)
    first = "it" if runs.height == 1 else "the first"
    print_plain(console, f"{result.experiment.name}: {runs.height} {status}; {first} ({where}): {run['message']}")


def _verdict_counts(verdicts: Mapping[str, int]) -> str:
    return ", ".join(f"{verdicts[name]} {word}" for name, word in _VERDICTS.items() if verdicts.get(name))


def _table(*columns: str) -> Table:
    """Make an empty table with texts aligned to the left and numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        left = column in _TEXT_COLUMNS
        table.add_column(column, justify="left" if left else "right", no_wrap=column == "time")
    return table


def _add(table: Table, *texts: str) -> None:
    table.add_row(*map(plain_cell, texts))
