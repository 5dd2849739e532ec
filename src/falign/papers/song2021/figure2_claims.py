"""What section 5 states of figure 2, and how it is judged."""

from functools import partial
from itertools import pairwise
from math import sqrt

import polars as pl

from falign.lab.experiment import Check, Claim, Missing, Reading
from falign.lab.experiment.statistics import Estimate, final, mean, paired
from falign.papers.song2021.sizes import shown_width

_RUN = ["activation", "p", "strength"]


def _activations(table: pl.DataFrame) -> list[str]:
    return sorted(table["activation"].unique().to_list())


def _ends(table: pl.DataFrame, activation: str) -> pl.DataFrame:
    """The last record of each run of an activation."""
    return final(table.filter(pl.col("activation") == activation), by=_RUN)


def _cosine(ends: pl.DataFrame, p: int) -> Estimate:
    return mean(ends.filter((pl.col("strength") == 0) & (pl.col("p") == p))["cosine"], of=f"cosine at p = {p}, λ = 0")


def _vanishes(table: pl.DataFrame) -> Reading:
    checks = []
    for activation in _activations(table):
        ends = _ends(table, activation)
        low, high = min(ends["p"]), max(ends["p"])
        if low == high:
            raise Missing(f"{activation}: only the width {low} is done, expected at least two")
        narrow, wide = _cosine(ends, low), _cosine(ends, high)
        shrink = sqrt(low / high)
        noise = 3 * sqrt(wide.error**2 + (shrink * narrow.error) ** 2)
        checks.append(
            Check(
                label=f"{activation}: mean cosine at p = {high}, where {narrow.value:.3f} at p = {low}",
                measured=wide.value,
                low=-noise,
                high=max(0.0, narrow.value) * shrink + noise,
            )
        )
    return Reading(checks=tuple(checks))


def _grows(table: pl.DataFrame) -> Reading:
    checks = []
    for activation in _activations(table):
        ends = _ends(table, activation)
        strengths = sorted(ends["strength"].unique().to_list())
        steps = {
            (p, low, high): paired(
                ends.filter(pl.col("p") == p), "cosine", axis="strength", low=low, high=high, by=["p"]
            ).significance
            for p in sorted(ends["p"].unique().to_list())
            for low, high in pairwise(strengths)
        }
        p, low, high = min(steps, key=lambda key: steps[key])
        checks.append(
            Check(
                label=f"{activation}: least growth between neighbouring λ, in standard errors "
                f"(p = {p}, λ = {low:g} to {high:g})",
                measured=steps[p, low, high],
                low=-3.0,
            )
        )
        wide = ends.filter(pl.col("p") == ends["p"].max())
        whole = paired(wide, "cosine", axis="strength", low=strengths[0], high=strengths[-1], by=["p"])
        checks.append(
            Check(
                label=f"{activation}: growth from λ = {strengths[0]:g} to {strengths[-1]:g} at p = {max(ends['p'])}, "
                "in standard errors",
                measured=whole.significance,
                low=3.0,
            )
        )
    return Reading(checks=tuple(checks))


def _shown(table: pl.DataFrame, activation: str) -> pl.DataFrame:
    """Records of an activation at the width whose trajectories are shown."""
    return table.filter((pl.col("activation") == activation) & (pl.col("p") == shown_width(table)))


def _slower(table: pl.DataFrame, share: int) -> Reading:
    checks = []
    for activation in _activations(table):
        records = _shown(table, activation)
        plain = records.filter(pl.col("strength") == 0).group_by("step").agg(pl.col("loss").mean()).sort("step")
        below = plain.filter(pl.col("loss") <= plain["loss"][0] / share)
        if below.is_empty():
            raise Missing(f"{activation}: without a ridge the loss does not fall to 1/{share} within the run")
        step = below["step"][0]
        then = records.filter(pl.col("step") == step).with_columns(logarithm=pl.col("loss").log())
        strengths = sorted(then["strength"].unique().to_list())
        for high in strengths[1:]:
            ratio = paired(then, "logarithm", axis="strength", low=0.0, high=high, by=["p"])
            checks.append(
                Check(
                    label=f"{activation}: log(loss at λ = {high:g} / loss at 0) at step {step}, in standard errors",
                    measured=ratio.significance,
                    low=-3.0 if high < strengths[-1] else 3.0,
                )
            )
    return Reading(checks=tuple(checks))


def _plateau(table: pl.DataFrame) -> Reading:
    checks = []
    for activation in _activations(table):
        ends = final(_shown(table, activation), by=_RUN)
        for strength in sorted(set(ends["strength"].to_list()) - {0.0}):
            losses = ends.filter(pl.col("strength") == strength)["loss"]
            measured = mean(losses, of=f"loss of {activation} at λ = {strength:g}").value / strength
            checks.append(
                Check(label=f"{activation}, λ = {strength:g}: final loss / λ", measured=measured, low=0.1, high=10.0)
            )
    return Reading(checks=tuple(checks))


VANISHES = Claim(
    name="alignment-vanishes",
    statement="For all three types of networks, as p increases, alignment vanishes if there is no regularization.",
    place="Section 5, figure 2a-c; cos∠(b, β) = O(n/√p), section 4.1",
    how="Mean final cosine at λ = 0, at the widest network against the narrowest.",
    because="O(n/√p) lets the cosine shrink at least by √(p_narrow/p_wide) between two widths; 3 standard errors of "
    "both means are allowed on top. Below, it may lie under 0 by no more than that noise.",
    read=_vanishes,
)
GROWS = Claim(
    name="alignment-grows",
    statement="Alignment grows with the level of regularization λ for the same network.",
    place="Section 5, figure 2a-c",
    how="Differences of final cosines between values of λ, paired by seed, at every width, in standard errors.",
    because="No neighbouring pair may fall by more than 3 standard errors; from no ridge to the largest it must rise "
    "by more than 3.",
    read=_grows,
)
SLOWER = Claim(
    name="loss-slower",
    statement="The training loss converges slower with larger regularization.",
    place="Section 5, figure 2d-f",
    how="Logarithm of the loss against λ = 0, paired by seed, at the step where the mean loss at λ = 0 first is a "
    "hundredth of what it was at the start.",
    because="The largest λ must be behind by more than 3 standard errors; the smaller ones may not be ahead by more "
    "than 3.",
    read=partial(_slower, share=100),
)
EARLY = Claim(
    name="loss-slower-early",
    statement="The same, early in training.",
    place="Not stated: whether the loss falls slower from the beginning, or only once it nears its plateau",
    how="As above, where the mean loss at λ = 0 first is a tenth of what it was at the start.",
    because="As above. A ridge also shrinks the random output that the network starts with, which lowers the loss.",
    read=partial(_slower, share=10),
)
PLATEAU = Claim(
    name="loss-of-order-lambda",
    statement="Due to the regularization, the loss converges to a positive number that is of the same order as λ.",
    place="Section 5",
    how="Mean loss at the end of the run, divided by λ.",
    because="Of the same order is read as within a factor of 10.",
    read=_plateau,
)
