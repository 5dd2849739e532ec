"""What is derived of the phase portrait, and how it is judged."""

import numpy as np
import polars as pl

from falign.lab.experiment import Check, Claim, Reading
from falign.theory.deep_linear import fixed_points

_WIDE = 3.2
"""θ_1 is drawn from minus so much to so much."""


def field(*, target: float, feedback: float, share: float, invariant: float) -> pl.DataFrame:
    """``h(θ_1) = mλ - mKθ_1 - θ_1³/2`` on a grid."""
    hidden = np.linspace(-_WIDE, _WIDE, 241)
    velocity = feedback * target - feedback * invariant * hidden - hidden**3 / 2
    return pl.DataFrame({"share": share, "hidden": hidden, "velocity": velocity})


def roots(*, target: float, feedback: float, share: float, invariant: float) -> pl.DataFrame:
    """The fixed points and which of them are stable, by the closed form."""
    found = fixed_points(invariant, target, feedback)
    there = found.weights.isfinite()
    hidden, stable = found.weights[there].tolist(), found.stable[there].tolist()
    return pl.DataFrame({"hidden": hidden, "stable": stable}).with_columns(share=pl.lit(share), velocity=pl.lit(0.0))


def ends(table: pl.DataFrame) -> pl.DataFrame:
    """One row a trajectory, at its last record."""
    return table.filter(pl.col("time") == pl.col("time").max())


def _learned(table: pl.DataFrame) -> Reading:
    found = ends(table).with_columns(left=(pl.col("error") / pl.col("target")).abs())
    return Reading(
        checks=tuple(
            Check(
                label=f"K = {share:+g} |K_c|: most of {own.height}",
                measured=float(own["left"].to_numpy().max()),
                high=1e-4,
            )
            for (share,), own in found.sort("share").group_by(["share"], maintain_order=True)
        )
    )


def _counted(table: pl.DataFrame) -> Reading:
    """Distinct ends of the trajectories: stable fixed points that are reached."""
    checks = []
    for (share,), own in ends(table).sort("share").group_by(["share"], maintain_order=True):
        places = np.sort(own["hidden"].to_numpy())
        wanted = 2.0 if float(str(share)) < -1 else 1.0
        reached = 1.0 + float((np.diff(places) > 0.1).sum())
        checks.append(Check(label=f"K = {share:+g} |K_c|", measured=reached, low=wanted, high=wanted))
    return Reading(checks=tuple(checks))


def _limits(table: pl.DataFrame) -> Reading:
    far = ends(table).with_columns(far=(pl.col("hidden") - pl.col("limit")).abs())
    return Reading(
        checks=(Check(label=f"farthest of {far.height}", measured=float(far["far"].to_numpy().max()), high=1e-3),)
    )


def _parted(table: pl.DataFrame) -> Reading:
    """Where each trajectory of K below K_c ends, beside which side of the unstable point it began on."""
    found, wrong = ends(table), 0
    for row in found.to_dicts():
        points = roots(**{name: row[name] for name in ("target", "feedback", "share", "invariant")})
        (unstable,) = points.filter(~pl.col("stable"))["hidden"].to_list()
        wrong += (row["start"] > unstable) != (row["hidden"] > 0)
    return Reading(checks=(Check(label=f"of {found.height} on the other side", measured=float(wrong), high=0.0),))


CLAIMS = (
    Claim(
        name="always-learns",
        statement="In continuous time every component converges, and every fixed point has zero loss.",
        place="Abstract: convergence guarantees for continuous dynamics; that it holds from every start is derived",
        how="|e|/λ at the end of each trajectory; the most.",
        because="At most 1e-4: the flow next to K_c is slow.",
        read=_learned,
    ),
    Claim(
        name="fixed-points",
        statement="Above K_c = -3/2 (λ²/m)^(1/3) there is one stable fixed point, below there are two.",
        place="Derived",
        how="Number of places at which the trajectories end, more than 0.1 apart.",
        because="Exact.",
        read=_counted,
    ),
    Claim(
        name="limits",
        statement="Each trajectory ends at the root of h(θ_1) that the cubic's closed form names.",
        place="Derived",
        how="|θ_1 - θ_1*| at the end; the most.",
        because="At most 0.001: the flow next to K_c is slow.",
        read=_limits,
    ),
    Claim(
        name="unstable-point-parts",
        statement="Below K_c the unstable fixed point parts the starts: under it the hidden weight stays negative, "
        "against its feedback path.",
        place="Derived: what makes a start anti-regularise",
        how="Trajectories that end on the other side of 0 than their start lies of the unstable point.",
        because="None.",
        read=_parted,
        scope=pl.col("share") < -1,
    ),
)
