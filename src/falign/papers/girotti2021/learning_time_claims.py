"""What is stated of the time that a component takes, and how it is judged."""

import numpy as np
import polars as pl

from falign.lab.experiment import Check, Claim, Missing, Reading
from falign.theory.deep_linear import critical_target, depth_slope

CONSTANT = 2.0107
"""Time to 90 % of a component of size 1 from zero weights, two layers, m = 1."""
_BELOW = float(critical_target(-0.5, 1.0))
_FA = pl.col("rule") == "fa"
_ZERO = _FA & (pl.col("scheme") == "zero")


def _slopes(table: pl.DataFrame) -> Reading:
    checks = []
    for (depth,), own in table.sort("depth", "target").group_by(["depth"], maintain_order=True):
        found = float(np.polyfit(own["target"].log().to_numpy(), own["learned"].log().to_numpy(), 1)[0])
        law = depth_slope(int(str(depth)))
        checks.append(Check(label=f"{depth} layers: exponent of λ", measured=found, low=law - 1e-3, high=law + 1e-3))
    return Reading(checks=tuple(checks), note=f"{table['target'].n_unique()} sizes from 0.01 to 30")


def _constant(table: pl.DataFrame) -> Reading:
    scaled = (table["learned"] * table["target"] ** (2 / 3)).to_numpy()
    return Reading(
        checks=tuple(
            Check(label=label, measured=float(value), low=CONSTANT - 1e-3, high=CONSTANT + 1e-3)
            for label, value in (("least", scaled.min()), ("most", scaled.max()))
        )
    )


def _small(table: pl.DataFrame, most: float) -> pl.DataFrame:
    small = table.filter(pl.col("target") <= most).sort("target")
    if small.height < 2:
        raise Missing(f"{small.height} components are at most {most:g}, expected at least 2")
    return small


def _simultaneous(table: pl.DataFrame) -> Reading:
    own = _small(table, 0.1)
    found = float(own["learned"].to_numpy().max() / own["learned"].to_numpy().min())
    return Reading(checks=(Check(label="longest over shortest time", measured=found, high=1.02),))


def _logarithmic(table: pl.DataFrame) -> Reading:
    own = _small(table, 0.1)
    found = float(np.polyfit(-own["target"].log().to_numpy(), own["learned"].to_numpy(), 1)[0])
    return Reading(checks=(Check(label="time per unit of ln 1/λ", measured=found, low=1.4, high=1.6),))


def _turns(table: pl.DataFrame) -> Reading:
    """Steps of the logarithm of the time between neighbouring sizes, below λ_c and above twice λ_c."""
    below = _small(table, _BELOW)["learned"].log().diff().drop_nulls().to_numpy()
    above = table.filter(pl.col("target") > 2 * _BELOW).sort("target")["learned"].log().diff().drop_nulls().to_numpy()
    tiny = float(np.finfo(float).tiny)
    return Reading(
        checks=(
            Check(label=f"least rise of {len(below)}, λ < λ_c", measured=float(below.min()), low=tiny),
            Check(label=f"least fall of {len(above)}, λ > 2λ_c", measured=float(-above.max()), low=tiny),
        )
    )


def _exact(table: pl.DataFrame) -> Reading:
    far = table.with_columns(far=(pl.col("learned") / pl.col("predicted") - 1).abs().fill_null(1.0))
    return Reading(
        checks=tuple(
            Check(
                label=f"{rule}, {depth} layers, {scheme}: farthest of {own.height}",
                measured=float(own["far"].to_numpy().max()),
                high=1e-3,
            )
            for (rule, depth, scheme), own in far.sort("rule", "depth", "scheme").group_by(
                ["rule", "depth", "scheme"], maintain_order=True
            )
        )
    )


def _gradient(table: pl.DataFrame) -> Reading:
    """Slope of log time on log λ of gradient descent, where the start is small beside the component."""
    own = table.filter(pl.col("target") >= 0.1).sort("target")
    found = float(np.polyfit(own["target"].log().to_numpy(), own["learned"].log().to_numpy(), 1)[0])
    return Reading(checks=(Check(label="exponent of λ", measured=found, high=-0.75),))


CLAIMS = (
    Claim(
        name="power-law",
        statement="From zero weights the time falls with the size of the component as a power, λ^(-(2^L-2)/(2^L-1)): "
        "-2/3, -6/7, -14/15 for two, three and four layers.",
        place="Abstract: “approximately learned by decreasing order of importance”; the law is derived",
        how="Slope of the logarithm of the time to 90 %, read off the flow, against log λ.",
        because="The law ± 0.001.",
        read=_slopes,
        scope=_ZERO,
    ),
    Claim(
        name="constant",
        statement="Of two layers from zero weights the time to 90 % is 2.0107 (mλ)^(-2/3).",
        place="Derived: closed form",
        how="Time × λ^(2/3), least and most of all sizes.",
        because="± 0.001.",
        read=_constant,
        scope=_ZERO & (pl.col("depth") == 2),
    ),
    Claim(
        name="times-exact",
        statement="The times are those of the closed form and the quadrature, from every start and at every depth.",
        place="Derived",
        how="Time read off the flow over the predicted one; the farthest from 1. A time that is not reached counts as "
        "1.",
        because="0.001: the records lie so close that a straight line between two is right to that.",
        read=_exact,
    ),
    Claim(
        name="turns-at-the-critical-size",
        statement="From the anti-aligned start the time rises with the component's size below λ_c and falls above.",
        place="Abstract: negligible components before the principal ones; λ_c = c³/(3√3m) is derived",
        how="Steps of the logarithm of the time between neighbouring sizes. Between λ_c and 2λ_c the bottleneck of the "
        "vanished fixed points is left out.",
        because="Every step has its sign.",
        read=_turns,
        scope=_FA & (pl.col("scheme") == "anti-aligned"),
    ),
    Claim(
        name="simultaneous",
        statement="From a large output weight along its feedback, small components take the same time.",
        place="Derived: neutral",
        how="Longest over shortest time of the components up to 0.1, K = 1.",
        because="At most 1.02, the next order in λ.",
        read=_simultaneous,
        scope=_FA & (pl.col("scheme") == "positive"),
    ),
    Claim(
        name="logarithmic",
        statement="From an output weight against its feedback the time rises with 3/2 ln(1/λ)/(m|K|) as λ falls.",
        place="Derived",
        how="Slope of the time against ln(1/λ) of the components up to 0.1, K = -1.",
        because="1.5 ± 0.1, the next order in λ.",
        read=_logarithmic,
        scope=_FA & (pl.col("scheme") == "negative"),
    ),
    Claim(
        name="gradient-parts-more",
        statement="Gradient descent parts the components more than feedback alignment of two layers does.",
        place="Derived: ln(1/ε)/λ against λ^(-2/3)",
        how="Slope of the logarithm of the time against log λ, from small weights, for components of 0.1 and more.",
        because="Below -0.75: -1 but for the logarithm, where feedback alignment has -2/3.",
        read=_gradient,
        scope=pl.col("rule") == "bp",
    ),
)
