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


def vanishing(ends: pl.DataFrame, label: str, comparisons: int) -> Check:
    """Whether the cosine falls between the narrowest and the widest network at least as 1/√p does.

    Args:
        ends: One row a run: columns "p", "seed" and "cosine", two widths or more.
        label: What the runs are.
        comparisons: How many such checks are judged together.
    """
    widths = sorted(ends["p"].unique().to_list())
    if len(widths) < 2:
        raise Missing(f"{label}: there is only one width")
    shrink = sqrt(widths[0] / widths[-1])
    narrow, wide = (ends.filter(pl.col("p") == p).sort("seed") for p in (widths[0], widths[-1]))
    mean_narrow, mean_wide = (mean(rows["cosine"], of=label) for rows in (narrow, wide))
    excess = mean(wide["cosine"] - shrink * narrow["cosine"], of=label)
    return Check(
        label=f"{label}: mean cosine at p = {widths[-1]}, where {mean_narrow.value:.3f} at p = {widths[0]}",
        measured=mean_wide.value,
        low=-mean_wide.half(comparisons),
        high=shrink * mean_narrow.value + excess.half(comparisons),
    )


def _vanishes(table: pl.DataFrame) -> Reading:
    names = _activations(table)
    ends = {name: _ends(table, name).filter(pl.col("strength") == 0) for name in names}
    return Reading(checks=tuple(vanishing(ends[name], name, len(names)) for name in names))


def _growth(ends: pl.DataFrame, p: int, low: float, high: float) -> Estimate:
    return paired(ends.filter(pl.col("p") == p), "cosine", axis="strength", low=low, high=high, by=["p"])


def _grows(table: pl.DataFrame) -> Reading:
    checks, names = [], _activations(table)
    for name in names:
        ends = _ends(table, name)
        strengths, widths = (sorted(ends[axis].unique().to_list()) for axis in ("strength", "p"))
        steps = {(p, *pair): _growth(ends, p, *pair) for p in widths for pair in pairwise(strengths)}
        count = len(steps) * len(names)
        p, low, high = min(steps, key=lambda key: steps[key].value + steps[key].half(count))
        least = steps[p, low, high]
        whole = _growth(ends, widths[-1], strengths[0], strengths[-1])
        checks += [
            Check(
                label=f"{name}: least growth between neighbouring λ of {len(steps)} (p = {p}, λ = {low:g} to {high:g})",
                measured=least.value,
                low=-least.half(count),
            ),
            Check(
                label=f"{name}: growth from λ = {strengths[0]:g} to {strengths[-1]:g} at p = {widths[-1]}",
                measured=whole.value,
                low=whole.above(len(names)),
            ),
        ]
    return Reading(checks=tuple(checks))


def _shown(table: pl.DataFrame, activation: str) -> pl.DataFrame:
    """Records of an activation at the width whose trajectories are shown."""
    return table.filter((pl.col("activation") == activation) & (pl.col("p") == shown_width(table)))


def _slower(table: pl.DataFrame, share: int) -> Reading:
    found: list[tuple[str, bool, Estimate]] = []
    for name in _activations(table):
        records = _shown(table, name)
        plain = records.filter(pl.col("strength") == 0).group_by("step").agg(pl.col("loss").mean()).sort("step")
        below = plain.filter(pl.col("loss") <= plain["loss"][0] / share)
        if below.is_empty():
            raise Missing(f"{name}: without a ridge the loss does not fall to 1/{share} within the run")
        step = below["step"][0]
        then = records.filter(pl.col("step") == step).with_columns(logarithm=pl.col("loss").log())
        strengths = sorted(then["strength"].unique().to_list())
        found += [
            (
                f"{name}: log(loss at λ = {high:g} / loss at 0) at step {step}",
                high == strengths[-1],
                paired(then, "logarithm", axis="strength", low=0.0, high=high, by=["p"]),
            )
            for high in strengths[1:]
        ]
    leading = sum(largest for _, largest, _ in found)
    return Reading(
        checks=tuple(
            Check(
                label=label,
                measured=ratio.value,
                low=ratio.above(leading) if largest else -ratio.half(len(found) - leading),
            )
            for label, largest, ratio in found
        )
    )


def _plateau(table: pl.DataFrame) -> Reading:
    checks = []
    for name in _activations(table):
        ends = final(_shown(table, name), by=_RUN)
        for strength in sorted(set(ends["strength"].to_list()) - {0.0}):
            losses = ends.filter(pl.col("strength") == strength)["loss"]
            measured = mean(losses, of=f"loss of {name} at λ = {strength:g}").value / strength
            checks.append(
                Check(label=f"{name}, λ = {strength:g}: final loss / λ", measured=measured, low=0.1, high=10.0)
            )
    return Reading(checks=tuple(checks))


VANISHES = Claim(
    name="alignment-vanishes",
    statement="For all three types of networks, as p increases, alignment vanishes if there is no regularization.",
    place="Section 5, figure 2a-c; cos∠(b, β) = O(n/√p), section 4.1",
    how="Mean final cosine at λ = 0, at the widest network against the narrowest.",
    because="O(n/√p) is read as: between two widths the cosine shrinks at least by √(p_narrow/p_wide). On top half the "
    "99 % interval of the difference, runs of one seed paired; below 0 no more than half that of the mean.",
    read=_vanishes,
)
GROWS = Claim(
    name="alignment-grows",
    statement="Alignment grows with the level of regularization λ for the same network.",
    place="Section 5, figure 2a-c",
    how="Mean differences of final cosines between values of λ, paired by seed, at every width.",
    because="From no ridge to the largest it must rise with 99 % confidence (Student's t over the seeds), and between "
    "no neighbours may it fall with 99 % confidence, over all neighbours and widths together (Bonferroni).",
    read=_grows,
)
SLOWER = Claim(
    name="loss-slower",
    statement="The training loss converges slower with larger regularization.",
    place="Section 5, figure 2d-f",
    how="Logarithm of the loss against λ = 0, paired by seed, at the step where the mean loss at λ = 0 first is a "
    "hundredth of what it was at the start.",
    because="The largest λ must be behind with 99 % confidence (Student's t over the seeds, the activations together); "
    "the smaller ones may not be ahead with 99 % confidence, all together.",
    read=partial(_slower, share=100),
)
EARLY = Claim(
    name="loss-slower-early",
    statement="The training loss converges slower with larger regularization from the beginning.",
    place="Not stated: whether the loss falls slower from the beginning, or only once it nears its plateau",
    how="As for loss-slower, where the mean loss at λ = 0 first is a tenth of what it was at the start.",
    because="As for loss-slower. A ridge also shrinks the random output that the network starts with, which lowers the "
    "loss.",
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
