"""The pictures of one run: loss, accuracy, and the angle of every layer, against the epoch."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from falign.lab.config import TrainConfig
from falign.lab.runs import Run

TRAIN, TEST = "#7f8fa6", "#1f5fa8"
"""Colours of the training and the test set."""
_NAMED = 8
"""Up to so many layers are named one by one at their lines."""


@dataclass(frozen=True)
class Line:
    """One line of a picture; points without a value are left out."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: object


def draw(run: Run, records: pl.DataFrame, config: TrainConfig) -> None:
    """Write the three pictures of a run.

    Args:
        run: Where to.
        records: What was measured.
        config: What was run; the titles say it.

    Raises:
        WriteError: A picture cannot be written.
    """
    for name, figure in figures(records, config).items():
        run.write_picture(name, png(figure))


def figures(records: pl.DataFrame, config: TrainConfig) -> dict[str, Figure]:
    """{file name: figure} of the three pictures.

    Args:
        records: What was measured.
        config: What was run.

    Returns:
        The figures, not yet drawn.
    """
    about = f"{config.rule} · {config.dataset} · {config.model}"
    return {
        "loss.png": _both(records, "loss", f"Loss — {about}", 1.0, "cross-entropy"),
        "accuracy.png": _both(records, "accuracy", f"Accuracy — {about}", 100.0, "right answers, %"),
        "angles.png": _angles(records, f"Angle to the true gradient — {about}"),
    }


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file."""
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def axes(figure: Figure, position: int | tuple[int, int, int], title: str, ylabel: str) -> Axes:
    """Axes of the house style: a light grid, no box."""
    made = figure.add_subplot(*(position if isinstance(position, tuple) else (position,)))
    made.set_title(title, loc="left", fontsize=11)
    made.set_xlabel("epoch")
    made.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    made.set_ylabel(ylabel)
    made.margins(x=0.02)
    made.grid(color="#e6e6e6", linewidth=0.8)
    made.set_axisbelow(True)
    made.spines[["top", "right"]].set_visible(False)
    made.spines[["left", "bottom"]].set_color("#999999")
    return made


def plot(target: Axes, lines: Sequence[Line]) -> None:
    """Draw lines; few points are marked, so that a single one can be seen."""
    for line in lines:
        marker = "o" if len(line.x) <= 12 else None
        target.plot(line.x, line.y, color=line.colour, label=line.label, marker=marker, markersize=4, linewidth=1.8)


def line(records: pl.DataFrame, column: str, label: str, colour: object, factor: float = 1.0) -> Line:
    """One column against the epoch."""
    kept = records.select("epoch", column).drop_nulls()
    return Line(label, kept["epoch"].to_list(), (kept[column] * factor).to_list(), colour)


def _both(records: pl.DataFrame, what: str, title: str, factor: float, ylabel: str) -> Figure:
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    target = axes(figure, 111, title, ylabel)
    plot(
        target,
        [
            line(records, f"train_{what}", "training (mean over the epoch)", TRAIN, factor),
            line(records, f"test_{what}", "test", TEST, factor),
        ],
    )
    target.legend(frameon=False)
    if what == "loss":
        logarithmic(target)
    return figure


def _angles(records: pl.DataFrame, title: str) -> Figure:
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    target = axes(figure, 111, title, "degrees")
    names = [name for name in records.columns if name.startswith("angle_")]
    colours = matplotlib.colormaps["viridis"]
    shades = [colours(0.85 * index / max(1, len(names) - 1)) for index in range(len(names))]
    lines = [line(records, name, name.removeprefix("angle_"), shade) for name, shade in zip(names, shades, strict=True)]
    plot(target, lines)
    low, high = degrees(target)
    if len(lines) <= _NAMED:
        _name_at_the_end(target, lines, low=low, high=high)
    else:
        target.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def logarithmic(target: Axes) -> None:
    """Scale an axis of losses, which fall by orders of magnitude, with plain numbers at 1, 2 and 5."""
    target.set_yscale("log")
    target.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    target.yaxis.set_major_formatter("{x:g}")
    target.yaxis.set_minor_formatter(NullFormatter())


def degrees(target: Axes) -> tuple[float, float]:
    """Scale an axis of angles: from 0 to a right angle, which is marked, or beyond if there is anything.

    Returns:
        The lower and the upper limit.
    """
    drawn = [value for each in target.get_lines() for value in each.get_ydata()]  # pyright: ignore
    low, high = -2.0, max(95.0, *(float(value) + 5 for value in drawn), 0.0)
    target.set_ylim(low, high)
    target.set_yticks(range(0, int(high) + 1, 15))
    target.axhline(90, color="#bbbbbb", linewidth=1, linestyle="--", zorder=1)
    return low, high


def _name_at_the_end(target: Axes, lines: Sequence[Line], *, low: float, high: float) -> None:
    """Write every line's label at its right end, moved up where two would overlap."""
    ends = sorted((each for each in lines if each.y), key=lambda each: each.y[-1])
    free = (high - low) * 0.055
    next_height = low
    for each in ends:
        height = max(each.y[-1], next_height)
        next_height = height + free
        target.annotate(
            each.label,
            (each.x[-1], height),
            (8, 0),
            textcoords="offset points",
            color=each.colour,
            va="center",
            fontsize=9,
        )
