"""Reading of the field's table, and its pictures: accuracy beside that of backpropagation, and costs."""

from typing import Any

import polars as pl
import scipy

from falign.lab.experiment import Picture
from falign.lab.report.style import AXIS, COLOURS, INK, Axes, Figure, each_of, logarithmic, panels
from falign.papers.benchmark._training import NETWORKS, ROWS

_KEYS = ["dataset", "network", "row"]


def best_trials(table: pl.DataFrame) -> pl.DataFrame:
    """The record of the best trial of every study, one row a run."""
    return table.filter(pl.col("best")).sort([*_KEYS, "seed"])


def behind(table: pl.DataFrame) -> pl.DataFrame:
    """The best trials, with the points of test accuracy behind backpropagation with the same seed.

    Returns:
        One row a run whose backpropagation is there: its columns, and "behind", in points.
    """
    runs = best_trials(table)
    true = runs.filter(pl.col("row") == "bp").select("dataset", "network", "seed", true="test")
    return runs.join(true, on=["dataset", "network", "seed"]).with_columns(
        behind=100 * (pl.col("true") - pl.col("test"))
    )


_COLOURS = {
    "bp": INK,
    "layerwise": COLOURS[0],
    "learned direct": COLOURS[1],
    "fixed": COLOURS[2],
    "transport": COLOURS[3],
    "reference": AXIS,
}
"""Kind of a row -> its colour."""
_INTERVAL = 0.95
"""Of the bars in pictures."""


def summary(table: pl.DataFrame) -> pl.DataFrame:
    """Mean test accuracy of each cell, in %, with the interval of 95 % (null of a single run), and the costs."""
    runs = behind(table)
    cells = runs.group_by(_KEYS, maintain_order=True).agg(
        accuracy=100 * pl.col("test").mean(),
        error=100 * pl.col("test").std() / pl.len().cast(pl.Float64).sqrt(),
        behind=pl.col("behind").mean(),
        behind_error=pl.col("behind").std() / pl.len().cast(pl.Float64).sqrt(),
        seconds=(pl.col("step_seconds") / pl.col("bp_step_seconds")).median(),
        flops=(pl.col("flops") / pl.col("bp_flops")).mean(),
        bytes=(pl.col("kept_bytes") / pl.col("bp_kept_bytes")).mean(),
        cosine=pl.col("cosine").mean(),
        unreadable=pl.col("unreadable").max(),
        growth=pl.col("growth").mean(),
        runs=pl.len(),
    )
    halves = pl.col("runs").map_elements(_factor, return_dtype=pl.Float64)
    return cells.with_columns(
        half=halves * pl.col("error"),
        behind_half=halves * pl.col("behind_error"),
        kind=pl.col("row").replace_strict({name: row.kind for name, row in ROWS.items()}),
    ).drop("error", "behind_error")


def _factor(runs: int) -> float | None:
    return float(scipy.stats.t.ppf(0.5 + _INTERVAL / 2, runs - 1)) if runs > 1 else None


def _cells(data: pl.DataFrame) -> list[tuple[str, str, pl.DataFrame]]:
    """[(data set, network, rows)] in the order of the catalogue."""
    return [
        (str(dataset), str(network), rows)
        for dataset, part in each_of(data, "dataset")
        for network, rows in each_of(part, "network", tuple(NETWORKS))
    ]


def _draw_accuracy(data: pl.DataFrame) -> Figure:
    """Test accuracy of every row, the best one on top; a panel a network."""
    cells = _cells(data)
    columns = min(3, len(cells))
    rows = -(-len(cells) // columns)
    figure, axes = panels(
        columns,
        rows,
        titles=[f"{NETWORKS[network].title}\n{dataset}" for dataset, network, _ in cells],
        xlabels=["test accuracy, %"],
        width=9.5,
        height=3.9,
    )
    for panel, (_, _, part) in zip(axes, cells, strict=False):
        part = part.sort("accuracy")
        for at, row in enumerate(part.to_dicts()):
            draw_row(panel, at, row)
        true = part.filter(row="bp")["accuracy"]
        if len(true):
            panel.axvline(true[0], color=INK, linewidth=0.8, linestyle=(0, (4, 2.5)), zorder=0)
        panel.set_yticks(range(part.height), part["row"].to_list())
        panel.set_ylim(-0.7, part.height - 0.3)
        _zoom(panel, part["accuracy"].to_list())
    for panel in axes[len(cells) :]:
        panel.set_visible(False)
    _kinds(figure)
    return figure


def draw_row(panel: Axes, at: int, cell: dict[str, Any]) -> None:
    """Draw a cell of ``summary`` at a height: its accuracy as the marker of its kind, with its interval."""
    panel.errorbar(cell["accuracy"], at, xerr=cell["half"] or 0, elinewidth=1.2, **marker_of(cell["kind"]))


def marker_of(kind: str) -> dict[str, Any]:
    """Options of matplotlib for the marker of a kind of rows."""
    return {"color": _COLOURS[kind], "marker": "s" if kind == "bp" else "o", "linestyle": "none"}


def _zoom(panel: Axes, values: list[float]) -> None:
    """Leave rows far behind outside of the panel, with their number at its edge, so that the others can be told apart.

    Intervals that are longer than the panel are cut.
    """
    best, worst = max(values), min(values)
    middle = sorted(values)[len(values) // 2]
    low = max(worst, best - 4 * max(best - middle, 1.0))
    for at, value in enumerate(values):
        if value < low:
            panel.annotate(
                f"← {value:.1f}", (low, at), xytext=(2, 0), textcoords="offset points", va="center", size=7.5
            )
    margin = 0.08 * max(best - low, 1.0)
    panel.set_xlim(low - margin, best + margin)


def _kinds(figure: Figure) -> None:
    """A legend of the kinds of rows, one marker each."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=kind, **marker_of(kind)) for kind in _COLOURS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def _draw_cost(data: pl.DataFrame) -> Figure:
    """Points behind backpropagation against the time and the operations of a step; a row a network."""
    cells = _cells(data)
    figure, axes = panels(
        2,
        len(cells),
        titles=[
            f"{NETWORKS[network].title}, {dataset}: {what}"
            for dataset, network, _ in cells
            for what in ("time", "operations")
        ],
        xlabels=["of a step, over backpropagation's"],
        ylabels=["points behind bp"] * len(cells),
        width=9.5,
        height=3.2,
    )
    for place, (_, _, part) in enumerate(cells):
        for panel, value in zip(axes[2 * place : 2 * place + 2], ("seconds", "flops"), strict=True):
            rows = part.drop_nulls(value).sort("behind", value).to_dicts()
            panel.axhline(0, color=AXIS, linewidth=0.8)
            panel.axvline(1, color=AXIS, linewidth=0.8)
            panel.set_yscale("symlog", linthresh=1.0)
            among = (-2.0, -1.0, 0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
            ticks = [tick for tick in among if _between(tick, [r["behind"] for r in rows])]
            panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.minorticks_off()
            panel.invert_yaxis()
            logarithmic(panel, "x", ticks=_ticks([row[value] for row in rows]))
            panel.set_xlim(min(0.9, *(row[value] for row in rows)) / 1.08, max(row[value] for row in rows) * 1.08)
            for at, row in enumerate(rows):
                marker = marker_of(row["kind"])
                panel.plot(row[value], row["behind"], **marker)
                panel.annotate(
                    row["row"],
                    (row[value], row["behind"]),
                    xytext=(1.06, 1 - (at + 0.5) / len(rows)),
                    textcoords="axes fraction",
                    va="center",
                    size=7,
                    color=marker["color"],
                    arrowprops={"arrowstyle": "-", "color": marker["color"], "linewidth": 0.4, "alpha": 0.6},
                )
    _kinds(figure)
    return figure


def _between(tick: float, values: list[float]) -> bool:
    return min([*values, 0.0]) - 0.5 <= tick <= max([*values, 1.0]) + 0.5


def _ticks(values: list[float]) -> list[float]:
    among = (0.1, 0.25, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
    low, high = min([*values, 1.0]) / 1.1, max([*values, 1.0]) * 1.1
    return [tick for tick in among if low <= tick <= high]


PICTURES = (
    Picture(
        name="accuracy",
        caption="Test accuracy of every row, the best on top; mean and 95 % interval over the seeds. Dashed: "
        "backpropagation. Rows that are far behind stand at the edge, with their number. A row that ran away at every "
        "learning rate is missing.",
        data=summary,
        draw=_draw_accuracy,
    ),
    Picture(
        name="cost",
        caption="Points of test accuracy behind backpropagation with the same seed, mean, against the "
        "time and the counted operations of a training step over those of backpropagation, measured by turns in one "
        "process. Up and left is better.",
        data=summary,
        draw=_draw_cost,
    ),
)
