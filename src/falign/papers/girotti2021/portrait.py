"""The phase portrait of a component: where its hidden weight goes, with K above and below its critical value."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Picture, Point, Setting, grid
from falign.lab.experiment.statistics import largest, sorted_groups
from falign.lab.report.style import AXIS, COLOURS, INK, Axes, Figure, each_of, panels
from falign.theory.deep_linear import critical_invariant, fixed_points, gradient_flow, limit, modes

__all__ = ["PORTRAIT"]


def _points(shares: Sequence[float], starts: Sequence[float], records: int) -> tuple[Point, ...]:
    return grid(target=1.0, feedback=1.0, share=shares, start=starts, records=records)


_SHOWN, _LONG = 12.0, 60.0
"""Time that is drawn, and by which the slowest of the trajectories has come to rest."""


def _run(
    *, seed: int, setting: Setting, target: float, feedback: float, share: float, start: float, records: int
) -> Outcome:
    """Integrate a trajectory by itself: to the last digit of a vanishing error it is the same in any block."""
    invariant = share * abs(float(critical_invariant(target, feedback)))
    initial = modes(target, [start, invariant + start**2 / (2 * feedback)], feedback=feedback)
    times = torch.tensor([*(_SHOWN * k / (records - 2) for k in range(records - 1)), _LONG], dtype=torch.float64)
    trajectory = gradient_flow(initial, times=times)
    return Outcome(
        records={
            "time": times.tolist(),
            "hidden": trajectory.weights[:, 0].tolist(),
            "error": trajectory.error.tolist(),
            "invariant": [invariant] * records,
            "limit": [float(limit(initial))] * records,
        }
    )


def _roots(*, target: float, feedback: float, share: float, invariant: float) -> pl.DataFrame:
    """The fixed points and which of them are stable, by the closed form."""
    points = fixed_points(invariant, target, feedback)
    real = points.weights.isfinite()  # above K_c two of the cubic's three roots are complex: nan
    hidden, stable = points.weights[real].tolist(), points.stable[real].tolist()
    return pl.DataFrame({"hidden": hidden, "stable": stable}).with_columns(share=pl.lit(share), velocity=pl.lit(0.0))


def _final_records(table: pl.DataFrame) -> pl.DataFrame:
    """One row a trajectory, at its last record."""
    return table.filter(pl.col("time") == pl.col("time").max())


def _learned(table: pl.DataFrame) -> Evidence:
    left = _final_records(table).with_columns(left=(pl.col("error") / pl.col("target")).abs())
    kinds = [(f"K = {share:+g} |K_c|", runs) for (share,), runs in sorted_groups(left, ["share"])]
    return largest(kinds, "left", 1e-4, label="{label}: most of {rows}")


def _counted(table: pl.DataFrame) -> Evidence:
    """Distinct ends of the trajectories: stable fixed points that are reached."""
    checks = []
    for (share,), runs in sorted_groups(_final_records(table), ["share"]):
        places = np.sort(runs["hidden"].to_numpy())
        wanted = 2.0 if float(str(share)) < -1 else 1.0
        reached = 1.0 + float((np.diff(places) > 0.1).sum())
        checks.append(Check(label=f"K = {share:+g} |K_c|", measured=reached, low=wanted, high=wanted))
    return Evidence(checks=tuple(checks))


def _limits(table: pl.DataFrame) -> Evidence:
    far = _final_records(table).with_columns(far=(pl.col("hidden") - pl.col("limit")).abs())
    return largest([("farthest", far)], "far", 1e-3, label="{label} of {rows}")


def _parted(table: pl.DataFrame) -> Evidence:
    """Number of trajectories, K below K_c, that end on another side than that of the unstable point they began on."""
    ends, wrong = _final_records(table), 0
    for row in ends.to_dicts():
        points = _roots(**{name: row[name] for name in ("target", "feedback", "share", "invariant")})
        (unstable,) = points.filter(~pl.col("stable"))["hidden"].to_list()
        wrong += (row["start"] > unstable) != (row["hidden"] > 0)
    return Evidence(checks=(Check(label=f"of {ends.height} on the other side", measured=float(wrong), high=0.0),))


_CLAIMS = (
    Claim(
        name="always-learns",
        statement="In continuous time every component converges, and every fixed point has zero loss.",
        reference="Abstract: convergence guarantees for continuous dynamics; that it holds from every start is derived",
        method="|e|/λ at the end of each trajectory; the most.",
        tolerance_reason="At most 1e-4: the flow next to K_c is slow.",
        read=_learned,
    ),
    Claim(
        name="fixed-points",
        statement="Above K_c = -3/2 (λ²/m)^(1/3) there is one stable fixed point, below there are two.",
        origin="theory",
        reference="Derived",
        method="Number of places at which the trajectories end, more than 0.1 apart.",
        tolerance_reason="Exact.",
        read=_counted,
    ),
    Claim(
        name="limits",
        statement="Each trajectory ends at the root of h(θ_1) that the cubic's closed form names.",
        origin="theory",
        reference="Derived",
        method="|θ_1 - θ_1*| at the end; the most.",
        tolerance_reason="At most 0.001: the flow next to K_c is slow.",
        read=_limits,
    ),
    Claim(
        name="unstable-point-parts",
        statement="Below K_c the unstable fixed point parts the starts: under it the hidden weight stays negative, "
        "against its feedback path.",
        origin="theory",
        reference="Derived: what makes a start anti-regularise",
        method="Trajectories that end on the other side of 0 than their start lies of the unstable point.",
        tolerance_reason="None.",
        read=_parted,
        scope=pl.col("share") < -1,
    ),
)

_WIDE = 3.2
"""θ_1 is drawn from minus so much to so much."""


def _velocity_field(*, target: float, feedback: float, share: float, invariant: float) -> pl.DataFrame:
    """``h(θ_1) = mλ - mKθ_1 - θ_1³/2`` on a grid."""
    hidden = np.linspace(-_WIDE, _WIDE, 241)
    velocity = feedback * target - feedback * invariant * hidden - hidden**3 / 2
    return pl.DataFrame({"share": share, "hidden": hidden, "velocity": velocity})


_MOST = 5
"""Columns: of more invariants, those that are nearest to K_c on both sides, and the outermost."""


def _portraits(data: pl.DataFrame) -> Figure:
    """A column an invariant, the largest first."""
    shares = _shown(sorted(data["share"].unique().to_list(), reverse=True))
    figure, axes = panels(
        len(shares),
        2,
        titles=[f"K = {share:+g} |K_c|" for share in shares],
        xlabels=["θ₁", "time"],
        ylabels=["h(θ₁)", "θ₁"],
        share="row",
        width=10.5,
        height=2.4,
    )
    for column, share in enumerate(shares):
        runs = data.filter(pl.col("share") == share)
        roots = runs.filter(pl.col("shown") == "root")
        above, below = axes[column], axes[len(shares) + column]
        _field(above, runs.filter(pl.col("shown") == "field"), roots)
        _trajectories(below, runs.filter(pl.col("shown") == "trajectory"), roots)
    return figure


def _shown(shares: list[float]) -> list[float]:
    if len(shares) <= _MOST:
        return shares
    near = sorted(shares, key=lambda share: abs(share + 1))[: _MOST - 2]
    return [share for share in shares if share in (*near, shares[0], shares[-1])]


def _field(panel: Axes, field: pl.DataFrame, roots: pl.DataFrame) -> None:
    panel.axhline(0, color=AXIS, linewidth=0.8)
    panel.plot(field["hidden"], field["velocity"], color=INK, linewidth=1.3)
    panel.set_ylim(-5, 5)
    for stable, runs in each_of(roots, "stable"):
        face = INK if stable else "white"
        panel.plot(runs["hidden"], runs["velocity"], "o", color=INK, markerfacecolor=face, markersize=6, zorder=4)


def _trajectories(panel: Axes, paths: pl.DataFrame, roots: pl.DataFrame) -> None:
    for stable, runs in each_of(roots, "stable"):
        for place in runs["hidden"]:
            panel.axhline(place, color=INK, linewidth=0.9, linestyle="-" if stable else ":")
    for _, path in each_of(paths, "start"):
        line = path.sort("time")
        colour = COLOURS[0] if line["hidden"][-1] > 0 else COLOURS[1]
        panel.plot(line["time"], line["hidden"], color=colour, linewidth=1.2)
    panel.set_xlim(0, _SHOWN)


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    """Trajectories, the field ``h(θ_1)`` and its roots, told apart by "shown"."""
    kinds = table.select("target", "feedback", "share", "invariant").unique().sort("share").to_dicts()
    drawn = table.filter(pl.col("time") <= _SHOWN)
    paths = drawn.select("share", "start", "time", "hidden").with_columns(shown=pl.lit("trajectory"))
    fields = [_velocity_field(**kind).with_columns(shown=pl.lit("field")) for kind in kinds]
    fixed = [_roots(**kind).with_columns(shown=pl.lit("root")) for kind in kinds]
    return pl.concat([paths, *fields, *fixed], how="diagonal")


PORTRAIT = Experiment(
    name="girotti2021.portrait",
    title="Phase portrait",
    source="Derived, for the dynamics of Girotti, Mitliagkas and Gidel 2021",
    revision=1,
    grid={
        "smoke": _points((0.5, -0.5, -1.5), (-3.0, -1.0, 0.0, 2.5), 60),
        "quick": _points(
            (0.5, -0.5, -0.95, -1.05, -1.5), (-3.0, -2.0, -1.3, -1.0, -0.7, -0.3, 0.0, 0.5, 1.5, 2.5), 120
        ),
        "paper": _points(
            (1.0, 0.5, 0.0, -0.5, -0.9, -0.95, -1.05, -1.1, -1.5, -2.0), tuple(k / 5 for k in range(-16, 17)), 240
        ),
    },
    seeds={"smoke": 1, "quick": 1, "paper": 1},
    run=_run,
    together=("share", "start"),
    pictures=(
        Picture(
            name="portrait",
            caption="Velocity of the hidden weight on the curve of its invariant, h(θ_1) = mλ - mKθ_1 - θ_1³/2 "
            "(above), and trajectories (below), for K above and below K_c = -3/2 (λ²/m)^(1/3). Filled: stable fixed "
            "points; open: unstable ones. Below K_c a second stable point appears, at which θ_1 and θ_2 are both "
            "negative.",
            data=_picture_data,
            draw=_portraits,
        ),
    ),
    claims=_CLAIMS,
)
