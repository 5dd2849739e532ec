"""Pictures of the conservation law: both sides of it, and how far apart they are by rate."""

from math import ceil

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from falign.lab.report.style import COLOURS, INK, each_of, law, logarithmic, panels, sequence
from falign.papers.robertson2024.drawing import LOOKS

_CASES = ("plain", "momentum", "Adam", "decay", "tanh", "residual", "batch norm")
_RULES = ("fa", "usf", "kp", "adafa")
_COLUMNS = 5
_COLOUR: dict[str, str] = dict(zip(_CASES, (INK, *COLOURS), strict=True))


def _kinds(data: pl.DataFrame) -> list[tuple[str, str]]:
    """[(case, rule)]: the rules under plain descent, then feedback alignment under the others."""
    there = set(data.select("case", "rule").unique().rows())
    return [(case, rule) for case in _CASES for rule in _RULES if (case, rule) in there]


def _convolutional(model: str) -> bool:
    return model.endswith((":pooled", ":normalised"))


def diagonals(data: pl.DataFrame) -> Figure:
    """Change of ½|W|² + ½|b|² against that of ⟨B, W⟩: a panel a rule, then a panel a departure; in rows by data set."""
    sets, kinds = each_of(data, "dataset"), _kinds(data)
    rows = ceil(len(kinds) / _COLUMNS)
    left_over = [""] * (rows * _COLUMNS - len(kinds))
    titles = [
        title
        for name, _ in sets
        for title in (*(f"{rule}, {name}" if case == "plain" else case for case, rule in kinds), *left_over)
    ]
    figure, axes = panels(
        _COLUMNS,
        rows * len(sets),
        titles=titles,
        xlabels=["change of ⟨B, W⟩"],
        ylabels=["change of ½|W|² + ½|b|²"] * rows * len(sets),
        height=2.2,
    )
    deepest = int(data["depth"].to_numpy().max())
    colours = sequence(deepest + 1)
    for index, (_, whole) in enumerate(sets):
        for panel, (case, rule) in zip(axes[index * rows * _COLUMNS :], kinds, strict=False):
            own = whole.filter((pl.col("case") == case) & (pl.col("rule") == rule)).sort("step")
            _diagonal(panel, own, colours)
    for panel in axes:
        panel.set_visible(panel.has_data())
    handles = [Line2D([], [], color=colour, marker="o", label=f"layer {k + 1}") for k, colour in enumerate(colours)]
    handles.append(Line2D([], [], color=INK, linestyle=(0, (4, 2.5)), linewidth=1.2, label="the law"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _diagonal(panel: Axes, data: pl.DataFrame, colours: list[str]) -> None:
    """One line a network and layer, from no change to the end of training."""
    low, high = 0.0, 0.0
    for (model, _, depth), layer in data.group_by(["model", "layer", "depth"], maintain_order=True):
        x, y = [0.0, *layer["outgoing_change"]], [0.0, *layer["incoming_change"]]
        open_ = "none" if _convolutional(str(model)) else "full"
        panel.plot(x, y, color=colours[int(str(depth))], marker="o", markersize=4, fillstyle=open_, linewidth=1.0)
        low, high = min(low, *x, *y), max(high, *x, *y)
    law(panel, [low, high], [low, high], "the law")


def drifts(data: pl.DataFrame) -> Figure:
    """Drift against the rate: rules under plain descent on the left, departures from it on the right."""
    sets = each_of(data, "dataset")
    figure, axes = panels(
        2,
        len(sets),
        titles=[title for name, _ in sets for title in (f"{name}: plain descent", "feedback alignment otherwise")],
        xlabels=["η"],
        ylabels=["Σ|C(T) - C(0)|"] * len(sets),
        share="all",
        height=3.4,
    )
    rates = sorted(data["rate"].unique().to_list())
    for row, (_, own) in enumerate(sets):
        left, right = axes[2 * row : 2 * row + 2]
        for case, rule in _kinds(own):
            for model, runs in each_of(own.filter((pl.col("case") == case) & (pl.col("rule") == rule)), "model"):
                plain = case == "plain"
                colour = LOOKS[rule].colour if plain else _COLOUR[case]
                _drift(left if plain else right, runs.sort("rate"), colour, str(model), rule if plain else case)
        base = own["mean"].to_numpy().min() / 3
        for panel in (left, right):
            law(panel, rates, [base * rate / rates[0] for rate in rates], "∝ η")
            logarithmic(panel, "both")
            logarithmic(panel, "x", ticks=rates)
            handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
            panel.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _drift(panel: Axes, data: pl.DataFrame, colour: str, model: str, label: str) -> None:
    spread = data["sd"].fill_null(0)
    low = pl.select(pl.min_horizontal(spread, data["mean"] * 0.9)).to_series()
    panel.errorbar(
        data["rate"],
        data["mean"],
        yerr=[low, spread],
        color=colour,
        marker="o",
        fillstyle="none" if _convolutional(model) else "full",
        linewidth=1.2,
        elinewidth=0.9,
        label=label,
    )
