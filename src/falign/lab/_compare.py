"""Comparison of several runs: one table for the terminal, one figure."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from falign.lab._files import RunError
from falign.lab._pictures import TITLE, Line, against_minus_one, decades, degrees, line, literal, plot
from falign.lab._run_folder import RunFolder
from falign.lab._tables import TEXT_COLUMNS
from falign.lab._text import plain_cell
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


@dataclass(frozen=True, kw_only=True, eq=False)
class RunData:
    """Content of a run folder.

    Attributes:
        name: The folder's name, or its path where two names are equal.
        config: The configuration.
        records: The table of records.
        status: The status.
    """

    name: str
    config: TrainConfig
    records: pl.DataFrame
    status: dict[str, Any]

    def tested(self) -> pl.DataFrame:
        """Select the records at which the test set was evaluated, with the mean angle of the layers before the last."""
        names = [name for name in self.records.columns if name.startswith("angle_")]
        mean = pl.mean_horizontal(names[:-1] or names) if names else pl.lit(None, pl.Float64)
        return self.records.filter(pl.col("test_loss").is_not_null()).with_columns(mean_angle=mean)

    def last_angles(self) -> dict[str, float | None]:
        """Return {layer: last angle of its gradient}, in the order in which the layers run."""
        last = self.records.tail(1)
        names = [name for name in last.columns if name.startswith("angle_") and last.height]
        return {name.removeprefix("angle_"): last[name].item() for name in names}

    @property
    def diverged(self) -> bool:
        """Tell whether the run diverged."""
        return self.status.get("status") == "diverged"

    @property
    def dominance(self) -> float | None:
        """Last alignment dominance that was measured."""
        measured = self.records["dominance"].drop_nulls()
        return measured[-1] if len(measured) else None

    @property
    def is_text(self) -> bool:
        """Tell whether the run is of a text, with its validation and perplexity."""
        return set(TEXT_COLUMNS) <= set(self.records.columns)

    @property
    def perplexity(self) -> float | None:
        """Last perplexity of the test; None of images, or where no float holds it."""
        return self.tested()["perplexity"][-1] if self.is_text and self.tested().height else None

    @property
    def law(self) -> str | None:
        """Verdict of the conservation law; None where it was not checked."""
        verdict = self.status.get("law")
        return None if verdict is None else str(verdict)


def read(folders: Sequence[Path]) -> list[RunData]:
    """Read run folders.

    Args:
        folders: At least one.

    Returns:
        Their content, in the same order.

    Raises:
        RunError: A folder is no run, or a file in it is damaged or of another run.
    """
    if not folders:
        raise RunError("no run folders given: give one or more that falign train wrote")
    runs = []
    for folder in folders:
        run_folder = RunFolder(folder)
        config, _ = run_folder.read_config()
        records, status = run_folder.read_records(), run_folder.read_status()
        name = os.path.basename(os.path.realpath(folder))
        runs.append(RunData(name=name, config=config, records=records, status=status))
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(folder))
        for run, folder in zip(runs, folders, strict=True)
    ]


def show(runs: Sequence[RunData], console: Console) -> None:
    """Print the table; where the terminal is narrower, at the table's own width: wrapped lines lose no digits."""
    contents = table(runs)
    natural = Measurement.get(console, console.options.update(width=1000), contents).maximum
    console.width = max(console.width, natural)
    console.print(contents)


def table(runs: Sequence[RunData]) -> Table:
    """Make a table for the terminal, one row for each run; options that all runs share are its title.

    Accuracies are of the test set, in percent, and of no run that diverged: the last one, and the best, which of a text
    is the one where the loss of the validation was least. The loss is the last epoch's mean over the training set;
    perplexity, exp of the last loss of the test, has a column if a run is of a text. Angles are the last ones, layer by
    layer in degrees, or their mean over the layers before the last, which always has its true gradient; D is the last
    alignment dominance; law is the verdict of the conservation law.
    """
    common = shared(runs)
    checked, texts = any(run.law for run in runs), any(run.is_text for run in runs)
    made = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=_literal(" · ".join(common.values())) if common else None,
        title_style="bold",
    )
    made.add_column("run", overflow="fold", max_width=_WIDTH)
    for name in _WORDS:
        if name not in common:
            made.add_column(name, overflow="fold", max_width=_WIDTH)
    perplexity = ("perplexity",) if texts else ()
    for name in ("epochs", "test %", "best %", "train loss", *perplexity, "angles °", "D", "seconds"):
        made.add_column(name, justify="right", no_wrap=True)
    for name in ("law", "status") if checked else ("status",):
        made.add_column(name, no_wrap=True)
    for run in runs:
        words = [str(getattr(run.config, name)) for name in _WORDS if name not in common]
        law = [(run.law or "—")[:_SHOWN]] if checked else []
        made.add_row(*map(_literal, (run.name, *words, *_figures(run, texts), *law, _status(run)[:_SHOWN])))
    return made


def _literal(text: str) -> Text:
    """Escape a text to one line without markup or control characters."""
    return plain_cell(text.replace("\n", "\\n").replace("\t", "\\t"))


def shared(runs: Sequence[RunData]) -> dict[str, str]:
    """Return {option: value} of the columns that several runs have in common."""
    values = {name: {str(getattr(run.config, name)) for run in runs} for name in _WORDS}
    return {name: different.pop() for name, different in values.items() if len(runs) > 1 and len(different) == 1}


def _figures(run: RunData, texts: bool) -> list[str]:
    tested = run.tested()
    accuracy = tested["test_accuracy"].drop_nulls()
    chosen = tested.drop_nulls("validation_loss").sort("validation_loss") if run.is_text else None
    best = accuracy.max() if chosen is None or not chosen.height else chosen["test_accuracy"][0]
    perplexity = "—" if run.perplexity is None or run.diverged else f"{run.perplexity:.4g}"
    losses = tested["train_loss"].drop_nulls()
    last = run.records.tail(1)
    learned = len(accuracy) and not run.diverged  # the accuracy of a network that diverged is chance
    shown = [value for value in run.last_angles().values() if value is not None]
    if len(shown) > _LISTED:
        angle = f"mean {sum(shown[:-1]) / (len(shown) - 1):.0f}"
    else:
        angle = " ".join(f"{value:.0f}" for value in shown)
    return [
        f"{tested['epoch'].max() or 0:g}" if tested.height else "0",
        f"{100 * accuracy[-1]:.2f}" if learned else "—",
        f"{100 * float(best):.2f}" if learned and best is not None else "—",  # pyright: ignore[reportArgumentType]
        f"{losses[-1]:.4g}" if len(losses) else "—",
        *([perplexity] if texts else []),
        angle or "—",
        "—" if run.dominance is None else f"{run.dominance:.2f}",
        f"{last['seconds'].item():.1f}" if last.height else "—",
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
    accuracy.
    """
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
        return [line(run.tested(), column, name, colour, factor) for run, name, colour in labels]

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
    titles = [rule_title(run.config) for run in runs]
    for names in (titles, [f"{title}, seed {run.config.seed}" for title, run in zip(titles, runs, strict=True)]):
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
