"""Pictures of the order of learning in networks: components over time, and the time of each against its size."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, COLOURS, INK, MARKERS, law, legend, logarithmic, panels, sequence

_KINDS = (
    ("fa", 2, "small", "random"),
    ("fa", 2, "anti-aligned", "random"),
    ("fa", 3, "small", "random"),
    ("dfa", 3, "small", "random"),
    ("bp", 2, "small", "random"),
    ("bp", 2, "anti-aligned", "random"),
)
_LINES = 6
"""Components drawn of a problem that has more: evenly among them, the largest and the smallest with them."""


def _problems(data: pl.DataFrame) -> list[tuple[str, str]]:
    return sorted(data.select("dataset", "task").unique().rows(), key=lambda pair: (pair[0] != "teacher", pair))


def _of(data: pl.DataFrame, kind: tuple[str, int, str, str]) -> pl.DataFrame:
    rule, depth, scheme, basis = kind
    return data.filter(
        (pl.col("rule") == rule)
        & (pl.col("depth") == depth)
        & (pl.col("scheme") == scheme)
        & (pl.col("basis") == basis)
    )


def courses(data: pl.DataFrame) -> Figure:
    """A column a rule and start, a row a problem; the larger the component, the darker."""
    problems = _problems(data)
    figure, axes = panels(
        len(_KINDS),
        len(problems),
        titles=[
            f"{rule}, {depth} layers\n{scheme}" if row == 0 else ""
            for row in range(len(problems))
            for rule, depth, scheme, _ in _KINDS
        ],
        xlabels=["time"],
        ylabels=[f"{name}, {task}" for name, task in problems],
        share="all",
        width=10.5,
        height=1.9,
    )
    for row, (name, task) in enumerate(problems):
        whole = data.filter((pl.col("dataset") == name) & (pl.col("task") == task))
        count = whole["mode"].n_unique()
        kept = sorted({round(k * (count - 1) / (min(_LINES, count) - 1)) for k in range(min(_LINES, count))})
        for panel, kind in zip(axes[row * len(_KINDS) :], _KINDS, strict=False):
            own = _of(whole, kind).filter(pl.col("time") > 0)
            for colour, mode in zip(reversed(sequence(len(kept))), kept, strict=True):
                line = own.filter(pl.col("mode") == mode).sort("time")
                panel.plot(line["time"], line["share"], color=colour, linewidth=1.3)
            panel.axhline(0.9, color=INK, linewidth=0.8, linestyle=(0, (4, 2.5)))
            panel.axhline(0.0, color=AXIS, linewidth=0.8)
            panel.set_xlim(0.09, 60)
            panel.set_ylim(-0.1, 1.1)
            logarithmic(panel, "x", ticks=(0.1, 1, 10))
    return figure


def components(data: pl.DataFrame) -> Figure:
    """A column a problem, a line a rule and start."""
    problems = _problems(data)
    figure, axes = panels(
        len(problems),
        titles=[f"{name}, {task}" for name, task in problems],
        xlabels=["λ"],
        ylabels=["time to 90 %"],
        share="all",
        height=3.6,
    )
    looks = dict(zip(_KINDS, zip((*COLOURS[:5], INK), MARKERS, strict=True), strict=True))
    for panel, (name, task) in zip(axes, problems, strict=True):
        whole = data.filter((pl.col("dataset") == name) & (pl.col("task") == task))
        for kind, (colour, marker) in looks.items():
            rule, depth, scheme, _ = kind
            _points(panel, _of(whole, kind), colour, marker, f"{rule}, {depth} layers, {scheme}")
        for kind, scheme in (("small", "zero"), ("anti-aligned", "anti-aligned")):
            own = _of(whole, ("fa", 2, scheme, "spectral"))
            _points(panel, own, looks["fa", 2, kind, "random"][0], "o", "", open_=True)
        for kind, slope in ((_KINDS[0], -2 / 3), (_KINDS[2], -6 / 7), (_KINDS[4], -1.0)):
            own = _of(whole, kind).drop_nulls("learned")
            sizes = [float(size) for size in (own["component"].to_numpy().min(), own["component"].to_numpy().max())]
            scale = float((own["learned"].log() - slope * own["component"].log()).to_numpy().mean())
            law(panel, sizes, [2.718281828459045**scale * size**slope for size in sizes], "")
        logarithmic(panel, "both")
    legend(figure, columns=3)
    return figure


def _points(panel: Axes, own: pl.DataFrame, colour: str, marker: str, label: str, *, open_: bool = False) -> None:
    panel.plot(
        own["component"],
        own["learned"],
        marker,
        color=colour,
        fillstyle="none" if open_ else "full",
        markersize=6 if open_ else 3.2,
        label=label or None,
    )
