"""The map of (K, λ): how long a component takes, and whether a larger one takes less time or more."""

import numpy as np
import polars as pl

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Picture, Point, Setting, grid
from falign.lab.experiment.statistics import sorted_groups
from falign.lab.report.style import COLOURS, Figure, each_of, law, logarithmic, panels
from falign.theory.deep_linear import critical_target, phase_diagram

__all__ = ["CHART"]


_BRANCHES = ("output", "aligned", "anti-aligned")


def _points(cells: int) -> tuple[Point, ...]:
    return grid(branch=_BRANCHES, feedback=(1.0, 4.0), cells=cells)


_SIDES = 3.0, (0.02, 10.0)
"""K from minus so much to so much; λ from, to, on a logarithmic axis."""


def _run(*, seed: int, setting: Setting, branch: str, feedback: float, cells: int) -> Outcome:
    """Chart the learning times of a branch over K and λ."""
    # Middles of an even number of cells, so that none is K = 0, at which all three branches are the zero start.
    middles = (np.arange(cells) + 0.5) / cells
    invariants = _SIDES[0] * (2 * middles - 1 if branch == "output" else middles - 1)
    targets = np.geomspace(*_SIDES[1], cells)
    diagram = phase_diagram(invariants, targets, feedback=feedback, branch=branch)  # pyright: ignore[reportArgumentType]  # it checks
    return Outcome(
        records={
            "invariant": np.repeat(invariants, cells).tolist(),
            "target": np.tile(targets, cells).tolist(),
            "critical": diagram.critical.repeat_interleave(cells).tolist(),
            "time": diagram.time.flatten().tolist(),
            "slope": diagram.slope.flatten().tolist(),
        }
    )


_MAP = ["branch", "feedback"]
_BOTTLENECK = 2.0
"""From λ_c to so many times λ_c the time is that of passing by the fixed points that have just vanished."""


def _falls(table: pl.DataFrame) -> Evidence:
    return Evidence(
        checks=tuple(
            Check(
                label=f"{branch}, m = {m:g}: share of {runs.height} cells", measured=_share(runs["slope"] < 0), low=1.0
            )
            for (branch, m), runs in sorted_groups(table, _MAP)
        )
    )


def _turns(table: pl.DataFrame) -> Evidence:
    below = table.filter(pl.col("target") < pl.col("critical"))
    above = table.filter(pl.col("target") > _BOTTLENECK * pl.col("critical"))
    return Evidence(
        checks=(
            Check(
                label=f"rises for λ < λ_c: share of {below.height} cells", measured=_share(below["slope"] > 0), low=1.0
            ),
            Check(
                label=f"falls for λ > {_BOTTLENECK:g} λ_c: share of {above.height} cells",
                measured=_share(above["slope"] < 0),
                low=1.0,
            ),
        ),
        note=f"between them it rises in {_share(_between(table)['slope'] > 0):.0%} of the cells",
    )


def _between(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(pl.col("target").is_between(pl.col("critical"), _BOTTLENECK * pl.col("critical")))


def _share(right: pl.Series) -> float:
    return float(np.mean(right.to_numpy())) if len(right) else 0.0


_NAMES = {"output": "θ₁ = 0, θ₂ = K", "aligned": "θ₁ = √(-2K), θ₂ = 0", "anti-aligned": "θ₁ = -√(-2K), θ₂ = 0"}


def _maps(data: pl.DataFrame) -> Figure:
    """A column a branch of starts: time above, its slope in λ below."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    figure, axes = panels(
        len(_BRANCHES),
        2,
        titles=[_NAMES[name] for name in _BRANCHES],
        xlabels=["invariant K"],
        ylabels=["λ"] * 2,
        height=2.9,
    )
    finite = data["time"].filter(data["time"].is_finite()).to_numpy()
    # Next to λ_c the time grows without bound: one cell there would take all colours.
    norm = LogNorm(float(finite.min()), min(float(finite.max()), 50.0))
    signs = LinearSegmentedColormap.from_list("order", [COLOURS[0], "#f4f4f2", COLOURS[1]])
    rows = axes[: len(_BRANCHES)], axes[len(_BRANCHES) :]
    for above, below, (branch, runs) in zip(*rows, each_of(data, "branch", _BRANCHES), strict=True):
        K, λ, time, slope = _tables(runs)
        shown = {"shading": "nearest", "rasterized": True}
        times = above.pcolormesh(K, λ, time.T, norm=norm, cmap="viridis_r", **shown)
        slopes = below.pcolormesh(K, λ, slope.T, vmin=-1, vmax=1, cmap=signs, **shown)
        for panel in (above, below):
            panel.grid(visible=False)
            if branch == "anti-aligned":
                law(panel, K, critical_target(K).numpy(), "λ_c(K)")
            panel.set_ylim(λ[0], λ[-1])
            logarithmic(panel, "y")
        if branch == _BRANCHES[-1]:
            figure.colorbar(times, ax=rows[0], label="time to 90 %", pad=0.01)
            figure.colorbar(slopes, ax=rows[1], label="d ln time / d ln λ", pad=0.01, extend="both")
            below.legend(loc="lower left", fontsize=8)
    return figure


def _tables(cells: pl.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """K, λ, and times and slopes as tables [K λ]."""
    rows = cells.sort("invariant", "target")
    K, λ = (np.unique(rows[name].to_numpy()) for name in ("invariant", "target"))
    time, slope = (rows[name].to_numpy().reshape(len(K), len(λ)) for name in ("time", "slope"))
    return K, λ, time, slope


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(pl.col("feedback") == 1).select("branch", "invariant", "target", "time", "slope")


CHART = Experiment(
    name="girotti2021.chart",
    title="Where feedback alignment regularises, and where it anti-regularises",
    source="Beyond the paper: the map of its two cases, derived",
    revision=1,
    grid={"smoke": _points(16), "quick": _points(60), "paper": _points(400)},
    seeds={"smoke": 1, "quick": 1, "paper": 1},
    run=_run,
    together=("branch", "feedback"),
    pictures=(
        Picture(
            name="chart",
            caption="Time to 90 % of a component over its invariant K and its size λ, from three kinds of start "
            "(above), and how it changes with λ, the start held (below): blue where larger components are learned "
            "first, white where all are learned together, orange where smaller ones are; m = 1. Dashed: λ_c(K).",
            data=_picture_data,
            draw=_maps,
        ),
    ),
    claims=(
        Claim(
            name="chart-regularises",
            statement="Without a hidden weight against its feedback path the larger component is always learned first.",
            reference="Abstract: “initialization schemes where the components are approximately learned by decreasing "
            "order”; which starts these are is derived",
            method="Share of the cells of the map in which the learning time falls with λ, the start held.",
            tolerance_reason="1: every cell.",
            read=_falls,
            scope=pl.col("branch").is_in(["output", "aligned"]),
        ),
        Claim(
            name="chart-anti-regularises",
            statement="With a hidden weight against its feedback path the smaller component is learned first where λ < "
            "λ_c(K), the larger well above.",
            reference="Abstract: implicit anti-regularisation; the line λ_c(K) = (2/3)^(3/2) √m |K|^(3/2) is derived",
            method="Share of the cells in which the learning time rises with λ, below the line, and falls, above twice "
            "the line; between them is the bottleneck of the vanished fixed points.",
            tolerance_reason="1: every cell.",
            read=_turns,
            scope=pl.col("branch") == "anti-aligned",
        ),
    ),
)
