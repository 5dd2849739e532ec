"""Lists of ``falign list``: papers, data sets, rules and networks by name, and one of them in detail.

The names alone need neither PyTorch nor an experiment's module, which take seconds to import.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from inspect import cleandoc

from rich import box
from rich.console import Console
from rich.table import Table

from falign.lab._streams import suggestion
from falign.lab._text import plain_cell, print_table
from falign.lab._validate import BUILT_IN, DATASETS, RULES, default_activation, is_built_in
from falign.lab.config import TEXTS, ConfigError
from falign.lab.experiment import PRESETS, Experiment, Paper
from falign.lab.experiment._selection import select

_MODELS = ("mlp", *BUILT_IN)
_DISTINCT = 12
"""Values of an axis that are listed; of more, the first and the last are."""


def names_table(papers: Mapping[str, Paper]) -> Table:
    """Make a table of all names, a row each: what it names, the name, what that is."""
    table = _table("kind", "name", "what it is")
    for name, paper in papers.items():
        table.add_row("paper", name, plain_cell(f"{paper.authors}: {paper.title}. {paper.venue}"))
        for each in paper.names:
            table.add_row("experiment", each, f"of {name}")
    for kind, names in (("data set", (*DATASETS, *TEXTS)), ("rule", RULES), ("model", _MODELS)):
        for name in names:
            table.add_row(kind, name, _TOLD[kind])
    return table


_TOLD = {
    "data set": "falign train DATASET",
    "rule": "falign train --rule",
    "model": "falign train --model",
}


def show_names(papers: Mapping[str, Paper], console: Console) -> None:
    """Print the names, those of a kind together."""
    for paper in papers.values():
        _say(console, f"{paper.name}: {paper.authors}. {paper.title}. {paper.venue}. {paper.address}")
        _say(console, ", ".join(name.removeprefix(f"{paper.name}.") for name in paper.names), 2)
    for kind, names in (("data sets", (*DATASETS, *TEXTS)), ("rules", RULES), ("models", _MODELS)):
        _say(console, f"{kind}: {', '.join(names)}")
    example = next((name for paper in papers.values() for name in paper.names), "fa")
    _say(console, f"more about one: falign list NAME, as falign list {example}")


def show_one(name: str, papers: Mapping[str, Paper], console: Console) -> None:
    """Print one paper, experiment, data set, rule or network in detail.

    Args:
        name: Its name.
        papers: {name: paper}.
        console: Where it is printed.

    Raises:
        ConfigError: There is no such name.
    """
    if name in RULES:
        return _show_rule(name, console)
    if name in DATASETS or name in TEXTS:
        return _show_data(name, console)
    if is_built_in(name) and name.partition(":")[0] in _MODELS:
        return _show_model(name.partition(":")[0], console)
    experiments = {each for paper in papers.values() for each in paper.names}
    if ":" not in name and name not in papers and name not in experiments:
        known = [*papers, *experiments, *DATASETS, *TEXTS, *RULES, *_MODELS]
        raise ConfigError(
            f"NAME is {name!r:.80}{suggestion(name, known)}, expected a paper, an experiment, a data set, a rule or a "
            "model: falign list shows all names"
        )
    selection = select([name], papers)
    (paper,) = selection.papers
    return _show_experiment(selection.experiments[0], console) if name in experiments else _show_paper(paper, console)


def _show_paper(paper: Paper, console: Console) -> None:
    _say(console, f"{paper.name}: {paper.authors}. {paper.title}. {paper.venue}. {paper.address}")
    table = _table("experiment", *(f"{preset} runs" for preset in PRESETS), "claims judged", "figures")
    for each in paper.experiments:
        runs = [str(len(each.tasks(preset))) for preset in PRESETS]
        table.add_row(*map(plain_cell, (each.name, *runs, str(len(each.claims)), str(len(each.pictures)))))
    print_table(table, console)
    for each in paper.experiments:
        _say(console, f"{each.name}: {each.title} ({each.source})", 2)
    if paper.interpretations:
        _say(console, f"{len(paper.interpretations)} readings taken where the paper is open: the page lists them")


def _show_experiment(experiment: Experiment, console: Console) -> None:
    _say(console, f"{experiment.name}: {experiment.title} ({experiment.source})")
    table = _table("axis", *PRESETS)
    axes = dict.fromkeys(axis for points in experiment.grid.values() for point in points for axis in point)
    for axis in axes:
        cells = []
        for preset in PRESETS:
            values = list(dict.fromkeys(point[axis] for point in experiment.grid.get(preset, ()) if axis in point))
            few = values if len(values) <= _DISTINCT else [values[0], "…", values[-1]]
            cells.append(", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in few))
        table.add_row(*map(plain_cell, (axis, *cells)))
    table.add_row("seeds", *(str(experiment.seeds.get(preset, 0)) for preset in PRESETS))
    table.add_row("runs", *(str(len(experiment.tasks(preset))) for preset in PRESETS))
    print_table(table, console)
    for claim in experiment.claims:
        _say(console, f"claim {claim.name} ({claim.origin}): {claim.statement} [{claim.reference}]", 2)
    for picture in experiment.pictures:
        _say(console, f"figure {picture.name}: {picture.caption}", 2)


def _show_rule(name: str, console: Console) -> None:
    from falign.rules import ALL_RULES

    rule = ALL_RULES[name]
    _say(console, f"{name}: {rule.__module__}.{rule.__qualname__}")
    for paragraph in cleandoc(rule.__doc__ or "").split("\n\n"):
        lines = paragraph.splitlines()
        indented = any(line.startswith(" ") for line in lines)
        for text in lines if indented else [" ".join(lines)]:
            _say(console, text, 2)
    if options := [part for part in fields(rule) if part.init]:
        defaults = (str(part.default) if part.default is not MISSING else "…" for part in options)
        told = ", ".join(f"{part.name}={value}" for part, value in zip(options, defaults, strict=True))
        _say(console, f"--rule-option {told}")
    _say(console, f"falign train digits --model mlp:64-128-10 --rule {name}")


def _show_data(name: str, console: Console) -> None:
    from falign.lab.data import load_text
    from falign.lab.data._loading import locate

    if name in TEXTS:
        text = load_text(name)
        sizes = (
            f"{len(text.train):,} training, {len(text.validation):,} validation and {len(text.test):,} test characters"
        )
        _say(console, f"{name}: a text of {len(text.vocabulary)} kinds of characters: {sizes}; no download")
        return
    place = locate(name)
    where = ", ".join(map(str, place.paths)) if place.paths else "not here" if place.remedy else "no download"
    _say(console, f"{name}: {where}, {place.bytes / 2**20:.1f} MiB" if place.bytes else f"{name}: {where}")
    if place.remedy:
        _say(console, place.remedy, 2)


def _show_model(name: str, console: Console) -> None:
    if name == "mlp":
        _say(console, "mlp:SIZES, a perceptron: inputs, hidden layers and classes, as mlp:784-1000-10")
    else:
        sizes = ",".join(
            f"{key}={'from the data' if value is None else value}" for key, value in BUILT_IN[name].items()
        )
        _say(console, f"{name}:{sizes}, any of which may be left out" if sizes else f"{name}, of fixed sizes")
    activation = default_activation(name)
    _say(console, f"--activation is {activation} unless said" if activation else "its activations are its own", 2)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column.split()[-1] in ("runs", "judged", "figures") else "left")
    return table


def _say(console: Console, text: str, indent: int = 0) -> None:
    """Print a text, broken between words at the width of the console, what follows the first line moved in."""
    width = max(20, console.width)
    lines = plain_cell(text).wrap(console, width - indent - 2)
    for number, line in enumerate(lines):
        console.print(plain_cell(" " * (indent + 2 * (number > 0)) + line.plain.rstrip()), soft_wrap=True)
