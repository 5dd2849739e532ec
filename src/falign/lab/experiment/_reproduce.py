"""Reproduce experiments: compute the runs that are missing, judge the claims, write the report."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from falign.lab._memory import GIB, available
from falign.lab._options import ExecutionOptions
from falign.lab._signals import ImmediateStop, Stopped
from falign.lab._text import plain_cell, print_plain
from falign.lab.config import ConfigError
from falign.lab.experiment import _store
from falign.lab.experiment._execution import Executor
from falign.lab.experiment._leases import RunLeases, leased_runs_read_only
from falign.lab.experiment._local import local_executor
from falign.lab.experiment._progress import ProgressDisplay, RunCounts, duration
from falign.lab.experiment._results import PaperResults, Results
from falign.lab.experiment._run_file import RETRIED
from falign.lab.experiment._schedule import Schedule
from falign.lab.experiment._specification import PRESETS, Experiment, Paper, Setting
from falign.lab.experiment._store import Store

# Which papers and experiments the names on the command line mean.

_DEFAULT = "quick"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Papers, and those of their experiments that were asked for.

    Args:
        papers: The papers, whole: a report shows all of a paper, whichever experiment was run last.
        experiments: The experiments that were asked for, in the order of their papers.
    """

    papers: tuple[Paper, ...]
    experiments: tuple[Experiment, ...]


def select(names: Sequence[str], papers: Mapping[str, Paper]) -> Selection:
    """Find papers and experiments by their names.

    Args:
        names: Names of papers, or full names of experiments; none is all.
        papers: {name: paper}.

    Returns:
        What they mean, each experiment once.

    Raises:
        ConfigError: A name is not known.
    """
    known = {name for paper in papers.values() for name in paper.names}
    for name in names:
        if name not in papers and name not in known:
            listed = ", ".join([*papers, *sorted(known)]) or "none"
            raise ConfigError(f"NAME is {name!r}, expected a paper or an experiment: {listed}")
    chosen = tuple(
        paper.experiment(name)
        for paper in papers.values()
        for name in paper.names
        if not names or paper.name in names or name in names
    )
    asked = {experiment.name for experiment in chosen}
    return Selection(
        papers=tuple(paper for paper in papers.values() if not asked.isdisjoint(paper.names)), experiments=chosen
    )


def choose_preset(asked: str | None, counts: Mapping[str, int]) -> tuple[str, str]:
    """Choose which preset to show.

    Args:
        asked: The preset that was asked for; None is the one of which most runs are there, of several the largest.
        counts: {preset: how many of its runs are there}.

    Returns:
        The preset, and what a person should know of the choice; empty if nothing.
    """
    best = max(reversed(PRESETS), key=counts.__getitem__)
    number = "1 run is" if counts[best] == 1 else f"{counts[best]} runs are"
    if asked is None:
        return (best, f"preset {best}, of which {number} there") if counts[best] else (_DEFAULT, "")
    if counts[asked] or not counts[best]:
        return asked, ""
    return asked, f"no run of preset {asked} is there, but of preset {best} {number}: use --preset {best}"


# Tables in the terminal: what there is to reproduce, and how it stands.

_WIDTH = 120
_WORDS = ("experiment", "paper's claims", "theory and beyond", "other")
_VERDICTS = {"holds": "hold", "fails": "fail", "not run": "not run"}


def show_papers(papers: Mapping[str, Paper], console: Console) -> None:
    """Print the papers, their experiments, and how much each is.

    Args:
        papers: {name: paper}.
        console: Where to.
    """
    if not papers:
        print_plain(console, "there are no papers yet")
    for paper in papers.values():
        print_plain(console, f"{paper.name}: {paper.authors}. {paper.title}. {paper.venue}. {paper.address}")
        table = _table("experiment", *(f"{preset} runs" for preset in PRESETS), "claims judged", "figures")
        for each in paper.experiments:
            runs = [str(len(each.tasks(preset))) for preset in PRESETS]
            _add(table, each.name, *runs, str(len(each.claims)), str(len(each.pictures)))
        _print(table, console)
        for each in paper.experiments:
            print_plain(console, f"  {each.name}: {each.title} ({each.source})")


def show_status(store: Store, selection: Selection, papers: Sequence[PaperResults], console: Console) -> None:
    """Print how experiments stand: a row each, what went wrong, and what their claims came to.

    Args:
        store: The store.
        selection: Which experiments to show.
        papers: What there is of their papers.
        console: Where to.
    """
    chosen = {experiment.name for experiment in selection.experiments}
    results = [result for paper in papers for result in paper.results if result.experiment.name in chosen]
    leased = leased_runs_read_only(store)
    table = _table("experiment", "runs", "done", "time", "paper's claims", "theory and beyond", "other")
    stated, derived = Counter(), Counter()
    for result in results:
        told = [
            Counter(each.verdict for each in result.verdicts if (each.claim.origin == "paper") is of_paper)
            for of_paper in (True, False)
        ]
        stated, derived = stated + told[0], derived + told[1]
        missing = result.runs.filter(pl.col("status") == "missing")["key"]
        at_work = sum(key in leased for key in missing)
        others = {
            "running": at_work,
            **{status: result.count(status) for status in ("diverged", "failed", "no data")},
            "missing": missing.len() - at_work,
        }
        _add(
            table,
            result.experiment.name,
            str(result.runs.height),
            str(result.count("done")),
            duration(float(result.runs["seconds"].sum())),
            *(_counted(each) or "-" for each in told),
            ", ".join(f"{number} {status}" for status, number in others.items() if number),
        )
    _print(table, console)
    for result in results:
        for status in ("failed", "diverged", "no data"):
            _first(result, status, console)
        if others := result.others:
            which = "1 run of another revision is" if others == 1 else f"{others} runs of other revisions are"
            print_plain(console, f"{result.experiment.name}: {which} left alone")
    print_plain(console, f"the papers' claims: {_counted(stated) or 'none'}")
    if derived:
        print_plain(console, f"what follows from the theory, and beyond: {_counted(derived)}")


def _first(result: Results, status: str, console: Console) -> None:
    runs = result.runs.filter(pl.col("status") == status)
    if runs.is_empty():
        return
    run = runs.row(0, named=True)
    axes = [name for name in runs.columns if name not in ("key", "status", "message", "seconds")]
    where = ", ".join(f"{axis}={run[axis]}" for axis in axes if run[axis] is not None)
    first = "it" if runs.height == 1 else "the first"
    print_plain(console, f"{result.experiment.name}: {runs.height} {status}; {first} ({where}): {run['message']}")


def _counted(verdicts: Mapping[str, int]) -> str:
    return ", ".join(f"{verdicts[name]} {word}" for name, word in _VERDICTS.items() if verdicts.get(name))


def _table(*columns: str) -> Table:
    """An empty table: columns of words begin at the left, columns of numbers end at the right."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        made.add_column(column, justify="left" if column in _WORDS else "right")
    return made


def _add(table: Table, *texts: str) -> None:
    table.add_row(*map(plain_cell, texts))


def _print(table: Table, console: Console) -> None:
    """Print a table: one that is too wide breaks its lines between words. Without a terminal they may be longer."""
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, _WIDTH))
    for column in table.columns:
        texts = [str(each) for each in (column.header, *column.cells)]
        column.min_width = max(len(word) for text in texts for word in text.split(" "))
        column.no_wrap = column.header == "time" or not any(" " in text for text in texts)
    console.print(table)


WriteReport = Callable[[Path, Sequence[PaperResults]], tuple[Path, Path]]


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

    What is there already is not computed again, but runs that failed are tried once more. Runs that another
    living process has taken are waited for.

    Args:
        selection: What to reproduce.
        preset: At which sizes.
        out: The store's folder; made if there is none.
        executor: Where runs are computed.
        memory: Bytes that a block of runs may need.
        console: Where to show how it goes.
        write_report: Writes the report; None is the report of the laboratory.

    Returns:
        0: all runs are there, whatever the claims came to, but for those whose data set is not here; 1: runs failed;
        130, 143 or 129: ended by Ctrl-C, SIGTERM or SIGHUP.

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
            found = read_results(store, selection, preset)
            show_status(store, selection, found, console)
            pages = (write_report or _report())(out, found)
            store.check()
    except KeyboardInterrupt as interruption:
        store.log(f"interrupted: the runs that were finished are kept in {out}, and the same command goes on from them")
        return interruption.code if isinstance(interruption, Stopped) else 130
    store.log(f"the page is {pages[0]}, the same as JSON {pages[1]}")
    chosen = {experiment.name for experiment in selection.experiments}
    results = [result for paper in found for result in paper.results if result.experiment.name in chosen]
    return int(any(result.count("failed") or result.count("missing") for result in results))


def read_results(store: Store, selection: Selection, preset: str) -> tuple[PaperResults, ...]:
    """What a store holds of the papers of a selection, whole.

    Args:
        store: The store.
        selection: The selection.
        preset: The preset.
    """
    return tuple(
        PaperResults(
            paper=paper, preset=preset, results=tuple(store.results(each, preset) for each in paper.experiments)
        )
        for paper in selection.papers
    )


def _run(
    store: Store,
    experiments: Sequence[Experiment],
    preset: str,
    executor: Executor,
    memory: int,
    console: Console,
    stop: ImmediateStop,
) -> None:
    """Compute the runs that are missing."""
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
        with RunLeases(store):  # takes away what killed processes have left
            return  # an executor that is never entered need not be reachable
    with stop.deferred(), ExitStack() as stack:
        stack.enter_context(progress)
        with stop.immediate():
            stack.enter_context(executor)
        store.open(create=True)  # not before the executor has turned out to be reachable
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


def _report() -> WriteReport:
    from falign.lab.report import write_report  # draws figures, so it is only imported when it is needed

    return write_report


# Where and with how much memory it is computed.


def make_executor(options: ExecutionOptions) -> Executor:
    """Make the executor that options ask for.

    Args:
        options: The options, which are right for themselves.

    Returns:
        The executor, not yet entered.

    Raises:
        ConfigError: This machine has no such device.
    """
    setting = Setting(device=options.device, data=None if options.data is None else options.data.absolute())
    if options.ray is not None:
        from falign.lab.experiment._ray import RayExecutor  # Ray is an extra of its own

        return RayExecutor(options.ray, setting, cpus_per_run=options.cpus, gpus_per_run=options.gpus)
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
