"""Comparison of several runs: tables for the terminal and for programs, one figure."""

import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from falign.lab._files import RunError, Unreadable, read_bounded
from falign.lab._grid import short
from falign.lab._pictures import TITLE, Line, against_minus_one, decades, degrees, line, literal, plot
from falign.lab._run_folder import RunFolder
from falign.lab._tables import TEXT_COLUMNS, record_table
from falign.lab._text import plain_cell, print_table
from falign.lab.config import TrainConfig, rule_title
from falign.lab.report.style import COLOURS, RC_PARAMS, panels

_LISTED = 6
"""Angles that are listed one by one; of more, the mean is."""
_WIDTH = 26
"""Width of a column of texts; longer ones are folded."""
_SHOWN = 60
"""Letters of a status that are shown."""
_WORDS = ("dataset", "model", "rule")
"""Options that are columns, or the title if all runs share them."""
_UNSHOWN = ("epochs",)
"""Options that have no column of their own: the epochs that are done have one."""
_MONITOR = 1 << 30
"""Bytes that a file of a Monitor may have."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunData:
    """Content of a run folder, or of a file that ``falign.measure.Monitor`` saved.

    Attributes:
        name: The folder's name, or its path where two names are equal.
        config: The configuration; None of a Monitor, which knows of none.
        records: The table of records; of a Monitor with its loss in place of the training loss.
        status: The status.
    """

    name: str
    config: TrainConfig | None
    records: pl.DataFrame
    status: dict[str, Any]

    def tested(self) -> pl.DataFrame:
        """Select the records at which the test set was evaluated, with the mean angle of the layers before the last.

        Of a Monitor these are all.
        """
        names = [name for name in self.records.columns if name.startswith("angle_")]
        mean = pl.mean_horizontal(names[:-1] or names) if names else pl.lit(None, pl.Float64)
        records = self.records if self.config is None else self.records.filter(pl.col("test_loss").is_not_null())
        return records.with_columns(mean_angle=mean)

    def option(self, name: str) -> str:
        """Return the value of an option as tables show it."""
        if self.config is None:
            return "—"
        value = getattr(self.config, name)
        if isinstance(value, tuple):
            return ",".join(value) or "—"
        return "—" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    def last_angles(self) -> dict[str, float | None]:
        """Return {layer: last angle of its gradient}, in the order in which the layers run."""
        last = self.records.tail(1)
        names = [name for name in last.columns if name.startswith("angle_") and last.height]
        return {name.removeprefix("angle_"): last[name].item() for name in names}

    def numbers(self) -> dict[str, float | None]:
        """Return what a run came to, {column: number}; accuracies and perplexity of none that diverged."""
        tested = self.tested()
        accuracy = tested["test_accuracy"].drop_nulls()
        chosen = tested.drop_nulls("validation_loss").sort("validation_loss") if self.is_text else None
        best = accuracy.max() if chosen is None or not chosen.height else chosen["test_accuracy"][0]
        losses, last = tested["train_loss"].drop_nulls(), self.records.tail(1)
        learned = len(accuracy) and not self.diverged  # the accuracy of a network that diverged is chance
        angles = tested["mean_angle"].drop_nulls()
        perplexity = tested["perplexity"][-1] if self.is_text and tested.height else None
        measured = self.records["dominance"].drop_nulls()
        return {
            "epochs": float(tested["epoch"].max() or 0) if tested.height else 0.0,  # pyright: ignore[reportArgumentType]
            "test_accuracy": accuracy[-1] if learned else None,
            "best_accuracy": float(best) if learned and best is not None else None,  # pyright: ignore[reportArgumentType]
            "train_loss": losses[-1] if len(losses) else None,
            "perplexity": None if self.diverged else perplexity,
            "mean_angle": angles[-1] if len(angles) else None,
            "dominance": measured[-1] if len(measured) else None,
            "seconds": last["seconds"].item() if last.height else None,
        }

    @property
    def diverged(self) -> bool:
        """Tell whether the run diverged."""
        return self.status.get("status") == "diverged"

    @property
    def is_text(self) -> bool:
        """Tell whether the run is of a text, with its validation and perplexity."""
        return set(TEXT_COLUMNS) <= set(self.records.columns)

    @property
    def law(self) -> str | None:
        """Verdict of the conservation law; None where it was not checked."""
        verdict = self.status.get("law")
        return None if verdict is None else str(verdict)


def read(paths: Sequence[Path]) -> list[RunData]:
    """Read run folders, and files that ``falign.measure.Monitor`` saved.

    A run that ended before anything of it was saved has no records.

    Args:
        paths: At least one.

    Returns:
        Their content, in the same order.

    Raises:
        RunError: A folder is no run, or a file is damaged, of another run or of no Monitor.
    """
    if not paths:
        raise RunError("no run folders given: give one or more that falign train wrote")
    runs = []
    for path in paths:
        name = os.path.basename(os.path.realpath(path))
        if path.suffix == ".parquet" and not RunFolder(path).exists:
            runs.append(RunData(name=name, config=None, records=_monitored(path), status={"status": "monitor"}))
            continue
        folder = RunFolder(path)
        config, _ = folder.read_config()
        status = folder.read_status()
        unsaved = status["status"] not in ("done", "diverged") and not status.get("saved")
        records = record_table([]) if unsaved and not folder.has_records else folder.read_records()
        runs.append(RunData(name=name, config=config, records=records, status=status))
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(path))
        for run, path in zip(runs, paths, strict=True)
    ]


def _monitored(path: Path) -> pl.DataFrame:
    """Read the file of a Monitor as a table of records, a row a measured step.

    Raises:
        RunError: It is none.
    """
    try:
        table = pl.read_parquet(io.BytesIO(read_bounded(path, _MONITOR)))
        rows: dict[int, dict[str, Any]] = {}
        for each in table.select("step", "loss", "dominance", "total_descent", "layer", "gradient_angle").to_dicts():
            numbers = {"step": each["step"], "train_loss": each["loss"], "dominance": each["dominance"]}
            row = rows.setdefault(each["step"], {**numbers, "descent": each["total_descent"]})
            if each["gradient_angle"] is not None:
                row[f"angle_{each['layer']}"] = each["gradient_angle"]
        return record_table([rows[step] for step in sorted(rows)])
    except (Unreadable, ValueError, TypeError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"{path} cannot be read as what falign.measure.Monitor saves ({why}): give run folders, or such files"
        ) from None


# The tables.


def show(runs: Sequence[RunData], console: Console) -> None:
    """Print the table of all runs, and one of groups where runs differ in nothing but their seeds."""
    print_table(table(runs), console)
    if (together := groups(runs)) is not None:
        print_table(together, console)


def table(runs: Sequence[RunData]) -> Table:
    """Make a table for the terminal, one row for each run; options that all runs share are its title.

    Any other option in which runs differ has a column, unless the names of all runs tell it, as those of a grid do.
    Accuracies are of the test set, in percent, and of no run that diverged: the last one, and the best, which of a text
    is the one where the loss of the validation was least. The loss is the last epoch's mean over the training set;
    perplexity, exp of the last loss of the test, has a column if a run is of a text. Angles are the last ones, layer by
    layer in degrees, or their mean over the layers before the last, which always has its true gradient; D is the last
    alignment dominance; law is the verdict of the conservation law.
    """
    common = shared(runs)
    checked, texts = any(run.law for run in runs), any(run.is_text for run in runs)
    shown = [name for name in _WORDS if name not in common] + _differing(runs)
    shown = [name for name in shown if not _is_told(name, runs)]
    made = _empty(" · ".join(common.values()))
    for name in ("run", *shown):
        made.add_column(short(name), overflow="fold", max_width=_WIDTH)
    perplexity = ("perplexity",) if texts else ()
    for name in ("epochs", "test %", "best %", "train loss", *perplexity, "angles °", "D", "seconds"):
        made.add_column(name, justify="right", no_wrap=True)
    for name in ("law", "status") if checked else ("status",):
        made.add_column(name, no_wrap=True)
    for run in runs:
        words = [run.option(name) for name in shown]
        law = [(run.law or "—")[:_SHOWN]] if checked else []
        made.add_row(*map(_literal, (run.name, *words, *_figures(run, texts), *law, _status(run)[:_SHOWN])))
    return made


def groups(runs: Sequence[RunData]) -> Table | None:
    """Make a table of runs that differ in their seeds alone, a row a group; None if there are no two such runs.

    Numbers are means ± standard deviations over the runs that have them; n is how many of a group have an accuracy.
    """
    grouped: dict[TrainConfig, list[RunData]] = {}
    for run in runs:
        if run.config is not None:
            grouped.setdefault(replace(run.config, seed=0), []).append(run)
    if all(len(group) == 1 for group in grouped.values()):
        return None
    firsts, texts = [group[0] for group in grouped.values()], any(run.is_text for run in runs)
    common = shared(runs)
    shown = [name for name in _WORDS if name not in common] + _differing(firsts)
    made = _empty("seeds together")
    for name in [name for name in shown if name != "seed"] or ["rule"]:
        made.add_column(short(name), overflow="fold", max_width=_WIDTH)
    perplexity = ("perplexity",) if texts else ()
    for name in ("n", "test %", "best %", "train loss", *perplexity, "mean angle °", "D"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("status")
    for group in grouped.values():
        numbers = [run.numbers() for run in group]

        def spread(name: str, digits: int, factor: float = 1.0, numbers: list = numbers) -> str:
            values = [factor * each[name] for each in numbers if each[name] is not None]
            if not values:
                return "—"
            deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{mean(values):.{digits}f}{deviation}"

        counted = Counter(str(run.status.get("status")) for run in group)
        words = [group[0].option(name) for name in shown if name != "seed"] or [group[0].option("rule")]
        cells = [
            *words,
            str(sum(each["test_accuracy"] is not None for each in numbers)),
            spread("test_accuracy", 2, 100.0),
            spread("best_accuracy", 2, 100.0),
            spread("train_loss", 4),
            *([spread("perplexity", 3)] if texts else []),
            spread("mean_angle", 1),
            spread("dominance", 2),
            ", ".join(f"{number} {status}" for status, number in counted.items()),
        ]
        made.add_row(*map(_literal, cells))
    return made


def frame(runs: Sequence[RunData]) -> pl.DataFrame:
    """Make a table for programs, a row a run: its name, what differs, what it came to, law and status."""
    words = dict.fromkeys((*_WORDS, "seed", *_differing(runs)))
    rows = []
    for run in runs:
        options = {short(name): None if run.config is None else _plain(getattr(run.config, name)) for name in words}
        rows.append({"run": run.name, **options, **run.numbers(), "law": run.law, "status": run.status.get("status")})
    return pl.DataFrame(rows, infer_schema_length=None, strict=False)


def _plain(value: Any) -> Any:
    return ",".join(value) if isinstance(value, tuple) else value


def _empty(title: str) -> Table:
    return Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=_literal(title) if title else None, title_style="bold"
    )


def _literal(text: str) -> Text:
    """Escape a text to one line without markup or control characters."""
    return plain_cell(text.replace("\n", "\\n").replace("\t", "\\t"))


def shared(runs: Sequence[RunData]) -> dict[str, str]:
    """Return {option: value} of the columns that several runs have in common."""
    values = {name: {run.option(name) for run in runs if run.config is not None} for name in _WORDS}
    return {name: different.pop() for name, different in values.items() if len(runs) > 1 and len(different) == 1}


def _differing(runs: Sequence[RunData]) -> list[str]:
    """Return the options in which runs differ, without those of ``_WORDS``."""
    configs = [asdict(run.config) for run in runs if run.config is not None]
    names = [name for name in (configs or [{}])[0] if name not in (*_WORDS, *_UNSHOWN)]
    return [name for name in names if len({each[name] for each in configs}) > 1]


def _is_told(name: str, runs: Sequence[RunData]) -> bool:
    return all(run.config is not None and f"{short(name)}={run.option(name)}" in run.name.split(",") for run in runs)


def _figures(run: RunData, texts: bool) -> list[str]:
    numbers = run.numbers()

    def said(name: str, form: str, factor: float = 1.0) -> str:
        value = numbers[name]
        return "—" if value is None else format(factor * value, form)

    shown = [value for value in run.last_angles().values() if value is not None]
    if len(shown) > _LISTED:
        angle = f"mean {sum(shown[:-1]) / (len(shown) - 1):.0f}"
    else:
        angle = " ".join(f"{value:.0f}" for value in shown)
    return [
        said("epochs", "g"),
        said("test_accuracy", ".2f", 100.0),
        said("best_accuracy", ".2f", 100.0),
        said("train_loss", ".4g"),
        *([said("perplexity", ".4g")] if texts else []),
        angle or "—",
        said("dominance", ".2f"),
        said("seconds", ".1f"),
    ]


def _status(run: RunData) -> str:
    status = str(run.status.get("status"))
    return f"diverged at step {run.status.get('step')}" if run.diverged else status


# The figure.

_NAMED = 6
"""Layers that are named on the axis."""
_MANY = matplotlib.colormaps["turbo"]
"""Colours of more runs than the palette has."""


@matplotlib.rc_context(RC_PARAMS)
def comparison_figure(runs: Sequence[RunData]) -> Figure:
    """Draw test accuracy, training loss, mean angle and dominance against the epoch, and the last angle of every layer.

    One line for each run; the last panel is the legend. Where all runs are of texts, perplexity takes the place of
    accuracy. Where one is of a Monitor, which knows no epochs, the axis is that of the steps.
    """
    steps = any(run.config is None for run in runs)
    texts = all(run.is_text for run in runs)
    titles = (
        "Test perplexity" if texts else "Test accuracy",
        "Training loss",
        "Mean angle before the last layer",
        "Alignment dominance D",
        "Angle of every layer at the end",
        "",
    )
    made, (accuracy, loss, mean, dominance, layers, names) = panels(3, 2, titles=titles, width=11, height=3.1)
    made.suptitle(literal(" · ".join(shared(runs).values())), **TITLE)
    named = [f"{name} (diverged)" if run.diverged else name for run, name in zip(runs, _names(runs), strict=True)]
    labels = list(zip(runs, named, _colours(len(runs)), strict=True))

    def lines(column: str, factor: float = 1.0) -> list[Line]:
        tables = [(run.tested(), name, colour) for run, name, colour in labels]
        if steps:
            tables = [(table.with_columns(epoch=pl.col("step")), name, colour) for table, name, colour in tables]
        return [line(table, column, name, colour, factor) for table, name, colour in tables]

    if texts:
        plot(accuracy, lines("perplexity"))
        decades(accuracy)
    else:
        plot(accuracy, lines("test_accuracy", 100.0))
        _trained(accuracy)
    plot(loss, lines("train_loss"))
    decades(loss)
    plot(mean, lines("mean_angle"))
    against_minus_one(dominance, lines("dominance"))
    for panel in (accuracy, loss, mean, dominance) if steps else ():
        panel.set_xlabel("step")
    _angles_at_the_end(layers, labels)
    degrees(mean, layers)
    accuracy.set_ylabel("characters" if texts else "right answers, %")
    loss.set_ylabel("cross-entropy, nats")
    mean.set_ylabel("degrees")
    layers.set_ylabel("degrees")
    names.axis("off")
    drawn = accuracy.get_lines()
    names.legend(drawn, [str(each.get_label()) for each in drawn], loc="center left", ncols=1 + len(runs) // 14)
    return made


def _angles_at_the_end(axes: Axes, labels: Sequence[tuple[RunData, str, str]]) -> None:
    """Draw the last angle of every layer in running order, with names where all runs have the same few layers."""
    shown: set[tuple[str, ...]] = set()
    for run, name, colour in labels:
        angles = {layer: angle for layer, angle in run.last_angles().items() if angle is not None}
        shown.add(tuple(angles))
        axes.plot(range(1, len(angles) + 1), list(angles.values()), color=colour, label=literal(name), marker="o")
    axes.set_xlabel("layer, from the input")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(shown) == 1 and 0 < len(same := shown.pop()) <= _NAMED:
        axes.set_xticks(range(1, len(same) + 1), [literal(layer) for layer in same])
        axes.set_xlabel("layer")


def _names(runs: Sequence[RunData]) -> list[str]:
    """Name the runs in the figure: by rule, else by rule and seed, else by folder."""
    titles = [run.name if run.config is None else rule_title(run.config) for run in runs]
    seeds = [
        title if run.config is None else f"{title}, seed {run.config.seed}"
        for title, run in zip(titles, runs, strict=True)
    ]
    for names in (titles, seeds):
        if len(set(names)) == len(runs):
            return names
    return [run.name for run in runs]


def _trained(target: Axes) -> None:
    """Fit the axis to the epochs from the first on: the accuracy before training would press all lines together."""
    values = [y for drawn in target.lines for x, y in drawn.get_xydata() if x >= 1]  # pyright: ignore
    if values:
        low, high = min(values), max(values)
        target.set_ylim(max(0.0, low - 0.1 * (high - low) - 1), min(100.5, high + 0.1 * (high - low) + 1))


def _colours(count: int) -> list[str]:
    return (
        list(COLOURS[:count])
        if count <= len(COLOURS)
        else [to_hex(_MANY(index / (count - 1))) for index in range(count)]
    )
