"""What is stated of multi-class tasks, and how it is judged."""

from collections.abc import Sequence
from math import atanh, tanh

import polars as pl

from falign.lab.experiment import Check, Claim, Missing, Reading
from falign.lab.experiment.statistics import Estimate, mean, paired

KEYS = ["dataset", "rule", "tracking", "classes", "seed"]
RANDOM = ("fa", "dfa")
"""Rules whose feedback never hears of the weights."""


def ends(table: pl.DataFrame) -> pl.DataFrame:
    """One row a run: the cosine's mean over the records of its training, and test accuracy and error at its end."""
    found = table.group_by(KEYS, maintain_order=True).agg(
        pl.col("cosine").mean(), pl.col("accuracy").drop_nulls().last()
    )
    return found.with_columns(error=1 - pl.col("accuracy")).sort(KEYS)


def compared(table: pl.DataFrame) -> pl.DataFrame:
    """The runs of :func:`ends` that compare rules: adafa with the one tracking rate that is run at every number."""
    found = ends(table)
    counts = found.group_by("dataset", "rule", "tracking").agg(numbers=pl.col("classes").n_unique())
    everywhere = counts.filter(pl.col("numbers") == pl.col("numbers").max().over("dataset")).drop("numbers")
    return found.join(everywhere, on=["dataset", "rule", "tracking"], how="semi").sort(KEYS)


def correlations(runs: pl.DataFrame) -> pl.DataFrame:
    """Pearson's correlation of cosine and accuracy over the rules, one for each data set, number of classes and seed.

    Null where all rules are equally accurate.
    """
    found = runs.group_by("dataset", "classes", "seed").agg(
        correlation=pl.corr("cosine", "accuracy"),
        slope=pl.cov("cosine", "accuracy") / pl.col("cosine").var(),
    )
    return found.with_columns(pl.col("correlation").fill_nan(None)).sort("dataset", "classes", "seed")


def interval(correlation: Sequence[float], comparisons: int = 1) -> tuple[float, float, float]:
    """Mean of correlations over seeds and its 99 % interval, by Fisher's z and Student's t.

    Args:
        correlation: One a seed; at least two.
        comparisons: How many such intervals are judged together.

    Returns:
        The mean and the ends of the interval.
    """
    bounded = [max(-1 + 1e-12, min(1 - 1e-12, each)) for each in correlation]
    found = mean([atanh(each) for each in bounded], of="correlation")
    half = found.half(comparisons)
    return tanh(found.value), tanh(found.value - half), tanh(found.value + half)


def _extremes(table: pl.DataFrame) -> list[tuple[str, pl.DataFrame, int, int]]:
    """[(data set, its runs that compare rules, least and largest number of classes)]."""
    runs = compared(table)
    found = []
    for (name,), own in runs.group_by(["dataset"], maintain_order=True):
        counts = own["classes"].unique().sort()
        found.append((str(name), own, counts[0], counts[-1]))
    return found


def _helps(table: pl.DataFrame) -> Reading:
    checks = []
    cases = [
        (f"{name}, {most} classes, {words}", own.filter((pl.col("classes") == most) & kept))
        for name, own, _, most in _extremes(table)
        for words, kept in (("all rules", pl.lit(True)), ("without bp", pl.col("rule") != "bp"))
    ]
    for label, runs in cases:
        found = correlations(runs)["correlation"]
        if found.null_count():
            raise Missing(f"{label}: in {found.null_count()} seeds all rules are equally accurate")
        value, low, high = interval(found.to_list(), len(cases))
        # the check is on the lower end of the interval: the mean would have to clear a bound that z bends
        checks.append(Check(label=f"{label}: lower end of {value:.3f} [{low:.3f}, {high:.3f}]", measured=low, low=1e-9))
    return Reading(checks=tuple(checks), note=f"{table['seed'].n_unique()} seeds; one correlation a seed")


def _helps_more(table: pl.DataFrame) -> Reading:
    found = []
    for name, own, least, most in _extremes(table):
        slopes = correlations(own)
        label = f"{name}: accuracy per unit of cosine, {most} classes less {least}"
        found.append((label, paired(slopes, "slope", axis="classes", low=least, high=most, by=["dataset"])))
    return _above(found)


def _grows(table: pl.DataFrame) -> Reading:
    found = []
    for name, own, least, most in _extremes(table):
        for rule in own["rule"].unique().sort().to_list():
            runs = own.filter(pl.col("rule") == rule)
            label = f"{name}, {rule}: test error, {most} classes less {least}"
            found.append((label, paired(runs, "error", axis="classes", low=least, high=most, by=["dataset"])))
    return _above(found)


def _gap(table: pl.DataFrame) -> Reading:
    keys = ["dataset", "classes", "seed"]
    found = []
    for name, own, least, most in _extremes(table):
        best = own.filter(pl.col("rule") == "bp").select(*keys, than="accuracy")
        for rule in RANDOM:
            behind = own.filter(pl.col("rule") == rule).join(best, on=keys)
            behind = behind.with_columns(behind=pl.col("than") - pl.col("accuracy"))
            label = f"{name}, {rule}: accuracy behind bp, {most} classes less {least}"
            found.append((label, paired(behind, "behind", axis="classes", low=least, high=most, by=["dataset"])))
    return _above(found)


def _misaligned(table: pl.DataFrame) -> Reading:
    found = []
    for name, own, least, most in _extremes(table):
        for rule in RANDOM:
            runs = own.filter(pl.col("rule") == rule)
            label = f"{name}, {rule}: cosine, {least} classes less {most}"
            found.append((label, paired(runs, "cosine", axis="classes", low=most, high=least, by=["dataset"])))
    return _above(found)


def dial(table: pl.DataFrame) -> pl.DataFrame:
    """Runs of fa (tracking 0), of adafa by tracking rate, and of bp (1), at the largest number of classes."""
    found = ends(table).filter(pl.col("classes") == pl.col("classes").max().over("dataset"))
    ends_of_dial = pl.col("rule").replace_strict({"fa": 0.0, "bp": 1.0}, default=pl.col("tracking"))
    return found.filter(pl.col("rule").is_in(["fa", "adafa", "bp"])).with_columns(alpha=ends_of_dial)


def _turned(table: pl.DataFrame, far: bool) -> Reading:
    found = []
    for (name,), own in dial(table).group_by(["dataset"], maintain_order=True):
        alphas = own.filter(pl.col("rule") == "adafa")["alpha"].unique().sort()
        alpha = alphas[-1] if far else alphas[0]
        for value in ("cosine", "accuracy"):
            label = f"{name}: {value}, α = {alpha:g} less α = 0"
            found.append((label, paired(own, value, axis="alpha", low=0.0, high=alpha, by=["dataset"])))
    return _above(found)


def _above(found: Sequence[tuple[str, Estimate]]) -> Reading:
    """All means above 0 with 99 % confidence together."""
    checks = (Check(label=label, measured=each.value, low=each.above(len(found))) for label, each in found)
    return Reading(checks=tuple(checks), note=f"{found[0][1].runs} runs a point")


_T = "Above 0 with 99 % confidence (Student's t over the seeds, all together)."
_COSINE = (
    "Cosine: mean over the layers below the output and over training of cos∠(gradient taken, true gradient) on 256 "
    "training images. "
)

CLAIMS = (
    Claim(
        name="alignment-helps",
        statement="“Better alignment can enhance FA performance on complex multi-class tasks”: rules whose gradients "
        "are better aligned are more accurate.",
        place="Abstract; the second hypothesis that the paper tests, by an index of papers (no numbers are readable)",
        how=_COSINE
        + "Pearson's correlation with the test accuracy over the rules at the largest number of classes, one "
        "a seed; with backpropagation, whose cosine is 1 by definition, and without.",
        because="The lower end of the 99 % interval of the mean over the seeds (Fisher's z, Student's t, all together) "
        "is above 0. The rules are these, not a sample of rules.",
        read=_helps,
    ),
    Claim(
        name="alignment-matters-more",
        statement="It is on tasks of many classes that alignment matters: accuracy gained per unit of cosine is larger "
        "there than with the fewest classes.",
        place="Abstract (“complex multi-class tasks”); the comparison is ours",
        how="Slope of accuracy against cosine over the rules (least squares), paired by seed.",
        because=_T,
        read=_helps_more,
    ),
    Claim(
        name="alignment-dial",
        statement="Turned far, the dial between feedback alignment (α = 0) and backpropagation (α = 1), "
        "B ← (1-α)B + αW, raises alignment and accuracy.",
        place="Abstract, as an intervention; that adaFA is this dial is a choice",
        how=_COSINE
        + "Cosine and test accuracy at the largest number of classes with the largest tracking rate against "
        "feedback alignment, paired by seed: the same weights, first feedback and batches.",
        because=_T,
        read=lambda table: _turned(table, True),
    ),
    Claim(
        name="alignment-dial-little",
        statement="Turned a little, the dial B ← (1-α)B + αW raises alignment and accuracy too.",
        place="Not in what is readable of the paper: whether every gain in alignment helps",
        how="As for alignment-dial, with the smallest tracking rate.",
        because=_T,
        read=lambda table: _turned(table, False),
    ),
    Claim(
        name="difficulty-grows",
        statement="Tasks of more classes are harder, for every rule.",
        place="Implied by the sweep over random n-class subsets, which an index of papers names",
        how="Test error at the largest number of classes less that at the smallest, paired by seed; equal numbers of "
        "steps.",
        because=_T,
        read=_grows,
    ),
    Claim(
        name="gap-grows",
        statement="The accuracy that random feedback (fa, dfa) lacks against backpropagation grows with the classes.",
        place="Derived: with one output, aligned neurons descend; with several, ⟨B,W⟩ > 0 does not make every error "
        "delivered agree with the true one",
        how="Accuracy behind bp at the largest number of classes less that at the smallest, paired by seed.",
        because=_T,
        read=_gap,
    ),
    Claim(
        name="alignment-falls",
        statement="Gradients of random feedback (fa, dfa) are less aligned with more classes.",
        place="Derived, as for gap-grows",
        how=_COSINE + "At the smallest number of classes less that at the largest, paired by seed.",
        because=_T,
        read=_misaligned,
    ),
)
