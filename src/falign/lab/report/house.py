"""The house style: inks, colours and the settings of matplotlib in which every picture is drawn."""

from typing import Any

from cycler import cycler

INK, AXIS, GRID = "#1c1f23", "#85898f", "#e4e5e3"
"""Text and laws; ticks and frames; grids."""
COLOURS = ("#1f5fa8", "#c04a12", "#17795a", "#8a4a9c", "#8c6a00", "#5b6470")
"""Of things without an order: at least 4:1 on white, and told apart with colour-blind eyes."""
MARKERS = "osD^vP"
"""One a line, so that colour is not all that tells them apart."""

HOUSE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": AXIS,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.xmargin": 0.03,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],  # it comes with matplotlib: the layout is the same everywhere
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.title_fontsize": 9,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "none",
    "svg.hashsalt": "falign",
    "text.color": INK,
    "xtick.color": AXIS,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": AXIS,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8.5,
}
"""Settings of matplotlib in which the report draws every picture."""
