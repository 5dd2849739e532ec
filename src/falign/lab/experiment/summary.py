"""Tables in the terminal: what there is to reproduce, and how it stands."""

from collections import Counter
from collections.abc import Mapping, Sequence

import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table

from falign.lab.experiment.owners import running
from falign.lab.experiment.results import PaperResults, Results, judge
from falign.lab.experiment.selection import Selection
from falign.lab.experiment.specification import PRESETS, Paper
from falign.lab.experiment.store import Store
from falign.lab.experiment.tally import duration
from falign.lab.text import cell, say

_WIDTH = 120
_WORDS = ("experiment", "claims", "other")
_VERDICTS = {"holds": "hold", "fails": "fail", "not run": "not run"}


def show_papers(papers: Mapping[str, Paper], console: Console) -> None:
    """Print the papers, their experiments, and how much each is.

    Args:
        papers: {name: paper}.
        console: Where to.
    """
    if not papers:
        say(console, "there are no papers yet")
    for paper in papers.values():
        say(console, f"{paper.name}: {paper.authors}. {paper.title}. {paper.venue}. {paper.address}")
        table = _table("experiment", *(f"{preset} runs" for preset in PRESETS), "claims judged", "figures")
        for each in paper.experiments:
            runs = [str(len(each.tasks(preset))) for preset in PRESETS]
            _add(table, each.name, *runs, str(len(each.claims)), str(len(each.pictures)))
        _print(table, console)
        for each in paper.experiments:
            say(console, f"  {each.name}: {each.title} ({each.source})")


def show(store: Store, selection: Selection, papers: Sequence[PaperResults], console: Console) -> None:
    """Print how experiments stand: a row each, what went wrong, and what their claims came to.

    Args:
        store: The store.
        selection: Which experiments to show.
        papers: What there is of their papers.
        console: Where to.
    """
    chosen = {experiment.name for experiment in selection.experiments}
    results = [result for paper in papers for result in paper.results if result.experiment.name in chosen]
    claimed = running(store)
    table = _table("experiment", "runs", "done", "time", "claims", "other")
    verdicts = Counter()
    for result in results:
        judged = Counter(judge(claim, result).verdict for claim in result.experiment.claims)
        verdicts += judged
        missing = result.runs.filter(pl.col("status") == "missing")["key"]
        at_work = sum(key in claimed for key in missing)
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
            _counted(judged) or "-",
            ", ".join(f"{number} {status}" for status, number in others.items() if number),
        )
    _print(table, console)
    for result in results:
        for status in ("failed", "diverged", "no data"):
            _first(result, status, console)
        if others := result.others:
            which = "1 run of another revision is" if others == 1 else f"{others} runs of other revisions are"
            say(console, f"{result.experiment.name}: {which} left alone")
    say(console, f"claims: {_counted(verdicts) or 'none'}")


def _first(result: Results, status: str, console: Console) -> None:
    runs = result.runs.filter(pl.col("status") == status)
    if runs.is_empty():
        return
    run = runs.row(0, named=True)
    axes = [name for name in runs.columns if name not in ("key", "status", "message", "seconds")]
    where = ", ".join(f"{axis}={run[axis]}" for axis in axes if run[axis] is not None)
    first = "it" if runs.height == 1 else "the first"
    say(console, f"{result.experiment.name}: {runs.height} {status}; {first} ({where}): {run['message']}")


def _counted(verdicts: Mapping[str, int]) -> str:
    return ", ".join(f"{verdicts[name]} {word}" for name, word in _VERDICTS.items() if verdicts.get(name))


def _table(*columns: str) -> Table:
    """An empty table: columns of words begin at the left, columns of numbers end at the right."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        made.add_column(column, justify="left" if column in _WORDS else "right")
    return made


def _add(table: Table, *texts: str) -> None:
    table.add_row(*map(cell, texts))


def _print(table: Table, console: Console) -> None:
    """Print a table: one that is too wide breaks its lines between words. Without a terminal they may be longer."""
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, _WIDTH))
    for column in table.columns:
        texts = [str(each) for each in (column.header, *column.cells)]
        column.min_width = max(len(word) for text in texts for word in text.split(" "))
        column.no_wrap = column.header == "time" or not any(" " in text for text in texts)
    console.print(table)
