"""Reproduce experiments: compute the runs that are missing, judge the claims, write the report."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from falign.lab.experiment import marker
from falign.lab.experiment.entries import RETRIED
from falign.lab.experiment.execution import Executor
from falign.lab.experiment.owners import Owner
from falign.lab.experiment.progress import Progress
from falign.lab.experiment.results import PaperResults
from falign.lab.experiment.schedule import Schedule
from falign.lab.experiment.selection import Selection
from falign.lab.experiment.signals import Stop, Stopped
from falign.lab.experiment.specification import Experiment
from falign.lab.experiment.store import Store
from falign.lab.experiment.summary import show
from falign.lab.experiment.tally import Tally
from falign.lab.text import say

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
    store = Store(folder=out, say=lambda text: say(console, text))
    marker.version(out)
    try:
        with Stop() as stop:
            _run(store, selection.experiments, preset, executor, memory, console, stop)
            store.check()
            found = read(store, selection, preset)
            show(store, selection, found, console)
            pages = (write_report or _report())(out, found)
            store.check()
    except KeyboardInterrupt as asked:
        store.say(f"interrupted: the runs that were finished are kept in {out}, and the same command goes on from them")
        return asked.code if isinstance(asked, Stopped) else 130
    store.say(f"the page is {pages[0]}, the same as JSON {pages[1]}")
    chosen = {experiment.name for experiment in selection.experiments}
    results = [result for paper in found for result in paper.results if result.experiment.name in chosen]
    return int(any(result.count("failed") or result.count("missing") for result in results))


def read(store: Store, selection: Selection, preset: str) -> tuple[PaperResults, ...]:
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
    stop: Stop,
) -> None:
    """Compute the runs that are missing."""
    tallies, before = {}, {}
    for experiment in experiments:
        tasks = experiment.tasks(preset)
        entries = store.entries(tasks)
        failed = {key: entry for key, entry in entries.items() if entry.status in RETRIED}
        left = {task.key: task for task in tasks if task.key not in entries or task.key in failed}
        there = [entry.status for entry in entries.values() if entry.status not in RETRIED]
        tallies[experiment.name] = Tally(
            experiment=experiment,
            total=len(tasks),
            left=left,
            status={status: there.count(status) for status in set(there)},
        )
        before.update(failed)
    progress = Progress(console, list(tallies.values()), lambda: executor.slots)
    if not any(tally.left for tally in tallies.values()):
        store.open(create=True)
        with Owner(store):  # takes away what killed processes have left
            return  # an executor that is never entered need not be reachable
    with stop.held(), ExitStack() as stack:
        stack.enter_context(progress)
        with stop.heard():
            stack.enter_context(executor)
        store.open(create=True)  # not before the executor has turned out to be reachable
        owner = stack.enter_context(Owner(store))
        Schedule(
            store=store,
            owner=owner,
            executor=executor,
            memory=memory,
            tallies=tallies,
            before=before,
            progress=progress,
            stop=stop,
        ).run()


def _report() -> WriteReport:
    from falign.lab.report import write_report  # draws figures, so it is only imported when it is needed

    return write_report
