"""Accuracy and alignment against the number of classes, for seven rules and a dial between two of them."""

from collections.abc import Sequence
from math import atanh, tanh

import polars as pl

from falign.lab.experiment import (
    Check,
    Claim,
    Evidence,
    Experiment,
    Missing,
    Outcome,
    Picture,
    Point,
    Scalar,
    Setting,
    grid,
)
from falign.lab.experiment.statistics import above_zero, mean, paired, summary
from falign.lab.report.style import AXIS, INK, Axes, Figure, each_of, legend, logarithmic, panels, thinned
from falign.papers._images import load_images
from falign.papers.robertson2024._training import (
    STYLES,
    Record,
    points,
    start_training,
    train_and_measure,
    with_classes,
)

__all__ = ["CLASSES"]

_RULES = ("bp", "usf", "frsf", "kp", "fa", "dfa")
"""All that are compared but adafa, which has a tracking rate as well."""
_TRACKING = 0.01
_DIAL = (0.001, 0.1)
"""Tracking rates of adafa: where rules are compared, and those that the dial has beside it."""


def _points(dataset: str, counts: Sequence[int], **sizes: Scalar) -> tuple[Point, ...]:
    """All rules at all numbers of classes, and the dial at the largest."""
    return (
        *grid(dataset=dataset, rule=_RULES, tracking=0.0, classes=counts, **sizes),
        *grid(dataset=dataset, rule="adafa", tracking=_TRACKING, classes=counts, **sizes),
        *grid(dataset=dataset, rule="adafa", tracking=_DIAL, classes=max(counts), **sizes),
    )


_SMALL = {"model": "mlp:128-128-128", "scale": 0.6, "rate": 0.01, "momentum": 0.9, "batch": 32}
"""Feedback of all rules is of the size of the weights that PyTorch draws: its norm is no difference between them."""
_PAPER = {**_SMALL, "model": "mlp:512-512-512", "batch": 128, "steps": 10000}
_CONVOLUTIONAL = {**_PAPER, "model": "lenet", "steps": 40000}

_RECORDS = 10


def _run(
    *,
    seed: int,
    setting: Setting,
    dataset: str,
    model: str,
    rule: str,
    tracking: float,
    classes: int,
    scale: float,
    rate: float,
    momentum: float,
    batch: int,
    steps: int,
) -> Outcome:
    """Train a network on some of the classes; alignment along the way, accuracy at the end."""
    training = start_training(
        with_classes(load_images(dataset, setting), classes, seed),
        seed,
        setting,
        dataset=dataset,
        model=model,
        rule=rule,
        rate=rate,
        batch=batch,
        adafa_rate=tracking or None,
        momentum=momentum,
        scale=None if rule == "bp" else scale,
    )
    learner = training.learner

    def measure(done: int) -> list[Record]:
        accuracy = learner.test(training.test)[1] if done == steps else None
        return [{"cosine": training.cosine(), "accuracy": accuracy}]

    return train_and_measure(training, sorted({round(steps * k / _RECORDS) for k in range(_RECORDS + 1)}), measure)


_KEYS = ["dataset", "rule", "tracking", "classes", "seed"]
_RANDOM = ("fa", "dfa")
"""Rules whose feedback never hears of the weights."""


def _one_row_a_run(table: pl.DataFrame) -> pl.DataFrame:
    """One row a run: the cosine's mean over the records of its training, and test accuracy and error at its end."""
    runs = table.group_by(_KEYS, maintain_order=True).agg(
        pl.col("cosine").mean(), pl.col("accuracy").drop_nulls().last()
    )
    return runs.with_columns(error=1 - pl.col("accuracy")).sort(_KEYS)


def _compared(table: pl.DataFrame) -> pl.DataFrame:
    """Final records that compare rules: those of adafa with the one tracking rate that is run at every number."""
    runs = _one_row_a_run(table)
    # The other tracking rates are of the dial, which is run at the largest number of classes only.
    counts = runs.group_by("dataset", "rule", "tracking").agg(numbers=pl.col("classes").n_unique())
    everywhere = counts.filter(pl.col("numbers") == pl.col("numbers").max().over("dataset")).drop("numbers")
    return runs.join(everywhere, on=["dataset", "rule", "tracking"], how="semi").sort(_KEYS)


def _correlations(runs: pl.DataFrame) -> pl.DataFrame:
    """Pearson's correlation of cosine and accuracy over the rules, one for each data set, number of classes and seed.

    Null where all rules are equally accurate.
    """
    rows = runs.group_by("dataset", "classes", "seed").agg(
        correlation=pl.corr("cosine", "accuracy"), slope=pl.cov("cosine", "accuracy") / pl.col("cosine").var()
    )
    return rows.with_columns(pl.col("correlation").fill_nan(None)).sort("dataset", "classes", "seed")


def _mean_with_interval(correlation: Sequence[float], comparisons: int = 1) -> tuple[float, float, float]:
    """Mean of correlations over seeds and its 99 % interval, by Fisher's z and Student's t.

    Args:
        correlation: One a seed; at least two.
        comparisons: How many such intervals are judged together.

    Returns:
        The mean and the ends of the interval.
    """
    # Fisher's z of a perfect correlation is infinite: two classes and few rules may give one.
    bounded = [max(-1 + 1e-12, min(1 - 1e-12, each)) for each in correlation]
    estimate = mean([atanh(each) for each in bounded], of="correlation")
    half = estimate.half(comparisons)
    return tanh(estimate.value), tanh(estimate.value - half), tanh(estimate.value + half)


def _extremes(runs: pl.DataFrame) -> list[tuple[str, pl.DataFrame, int, int]]:
    """[(data set, its runs, least and largest number of classes)]."""
    collected = []
    for (name,), rows in runs.group_by(["dataset"], maintain_order=True):
        counts = rows["classes"].unique().sort()
        collected.append((str(name), rows, counts[0], counts[-1]))
    return collected


def _helps(table: pl.DataFrame) -> Evidence:
    checks = []
    cases = [
        (f"{name}, {most} classes, {words}", rows.filter((pl.col("classes") == most) & kept))
        for name, rows, _, most in _extremes(_compared(table))
        for words, kept in (("all rules", pl.lit(True)), ("without bp", pl.col("rule") != "bp"))
    ]
    for label, runs in cases:
        correlations = _correlations(runs)["correlation"]
        if correlations.null_count():
            raise Missing(f"{label}: in {correlations.null_count()} seeds all rules are equally accurate")
        value, low, high = _mean_with_interval(correlations.to_list(), len(cases))
        # the check is on the lower end of the interval: the mean would have to clear a bound that z bends
        checks.append(Check(label=f"{label}: lower end of {value:.3f} [{low:.3f}, {high:.3f}]", measured=low, low=1e-9))
    return Evidence(checks=tuple(checks), note=f"{table['seed'].n_unique()} seeds; one correlation a seed")


def _helps_more(table: pl.DataFrame) -> Evidence:
    estimates = []
    for name, runs, least, most in _extremes(_compared(table)):
        slopes = _correlations(runs)
        label = f"{name}: accuracy per unit of cosine, {most} classes less {least}"
        estimates.append((label, paired(slopes, "slope", axis="classes", low=least, high=most, by=["dataset"])))
    return above_zero(estimates, note=f"{estimates[0][1].runs} runs a point")


def _change(runs: pl.DataFrame, value: str, words: str, *, rules: Sequence[str] = (), falls: bool = False) -> Evidence:
    """Gain, or loss, in a column from the least to the largest number of classes, rule by rule, paired by seed."""
    estimates = []
    for name, rows, least, most in _extremes(runs):
        low, high = (most, least) if falls else (least, most)
        for rule in rules or rows["rule"].unique().sort().to_list():
            one = rows.filter(pl.col("rule") == rule).drop_nulls(value)
            label = f"{name}, {rule}: {words}, {high} classes less {low}"
            estimates.append((label, paired(one, value, axis="classes", low=low, high=high, by=["dataset"])))
    return above_zero(estimates, note=f"{estimates[0][1].runs} runs a point")


def _gap(table: pl.DataFrame) -> Evidence:
    runs, keys = _compared(table), ["dataset", "classes", "seed"]
    best = runs.filter(pl.col("rule") == "bp").select(*keys, best="accuracy")
    behind = runs.join(best, on=keys, how="left").with_columns(behind=pl.col("best") - pl.col("accuracy"))
    return _change(behind, "behind", "accuracy behind bp", rules=_RANDOM)


def _dial(table: pl.DataFrame) -> pl.DataFrame:
    """Runs of fa (tracking 0), of adafa by tracking rate, and of bp (1), at the largest number of classes."""
    runs = _one_row_a_run(table).filter(pl.col("classes") == pl.col("classes").max().over("dataset"))
    ends_of_dial = pl.col("rule").replace_strict({"fa": 0.0, "bp": 1.0}, default=pl.col("tracking"))
    return runs.filter(pl.col("rule").is_in(["fa", "adafa", "bp"])).with_columns(alpha=ends_of_dial)


def _turned(table: pl.DataFrame, far: bool) -> Evidence:
    estimates = []
    for (name,), runs in _dial(table).group_by(["dataset"], maintain_order=True):
        alphas = runs.filter(pl.col("rule") == "adafa")["alpha"].unique().sort()
        alpha = alphas[-1] if far else alphas[0]
        for value in ("cosine", "accuracy"):
            label = f"{name}: {value}, α = {alpha:g} less α = 0"
            estimates.append((label, paired(runs, value, axis="alpha", low=0.0, high=alpha, by=["dataset"])))
    return above_zero(estimates, note=f"{estimates[0][1].runs} runs a point")


_T = "Above 0 with 99 % confidence (Student's t over the seeds, all together)."

_COSINE = (
    "Cosine: mean over the layers below the output and over training of cos∠(gradient taken, true gradient) on 256 "
    "training images. "
)

_CLAIMS = (
    Claim(
        name="alignment-helps",
        statement="“Better alignment can enhance FA performance on complex multi-class tasks”: rules whose gradients "
        "are better aligned are more accurate.",
        reference="Abstract; the second hypothesis that the paper tests, by an index of papers (no numbers are "
        "readable)",
        quotation="better alignment can enhance FA performance on complex multi-class tasks",
        method=_COSINE
        + "Pearson's correlation with the test accuracy over the rules at the largest number of classes, one "
        "a seed; with backpropagation, whose cosine is 1 by definition, and without.",
        tolerance_reason="The lower end of the 99 % interval of the mean over the seeds (Fisher's z, Student's t, all "
        "together) is above 0. The rules are these, not a sample of rules.",
        read=_helps,
    ),
    Claim(
        name="alignment-matters-more",
        statement="It is on tasks of many classes that alignment matters: accuracy gained per unit of cosine is larger "
        "there than with the fewest classes.",
        reference="Abstract (“complex multi-class tasks”); the comparison is ours",
        method="Slope of accuracy against cosine over the rules (least squares), paired by seed.",
        tolerance_reason=_T,
        read=_helps_more,
    ),
    Claim(
        name="alignment-dial",
        statement="Turned far, the dial between feedback alignment (α = 0) and backpropagation (α = 1), "
        "B ← (1-α)B + αW, raises alignment and accuracy.",
        reference="Abstract, as an intervention; that adaFA is this dial is a choice",
        quotation="better alignment can enhance FA performance on complex multi-class tasks",
        headline="cosine gained by turning the dial",
        method=_COSINE
        + "Cosine and test accuracy at the largest number of classes with the largest tracking rate against "
        "feedback alignment, paired by seed: the same weights, first feedback and batches.",
        tolerance_reason=_T,
        read=lambda table: _turned(table, True),
    ),
    Claim(
        name="alignment-dial-little",
        statement="Turned a little, the dial B ← (1-α)B + αW raises alignment and accuracy too.",
        origin="beyond",
        reference="Not in what is readable of the paper: whether every gain in alignment helps",
        method="As for alignment-dial, with the smallest tracking rate.",
        tolerance_reason=_T,
        read=lambda table: _turned(table, False),
    ),
    Claim(
        name="difficulty-grows",
        statement="Tasks of more classes are harder, for every rule.",
        reference="Implied by the sweep over random n-class subsets, which an index of papers names",
        method="Test error at the largest number of classes less that at the smallest, paired by seed; equal numbers "
        "of steps.",
        tolerance_reason=_T,
        read=lambda table: _change(_compared(table), "error", "test error"),
    ),
    Claim(
        name="gap-grows",
        statement="The accuracy that random feedback (fa, dfa) lacks against backpropagation grows with the classes.",
        origin="theory",
        reference="Derived: with one output, aligned neurons descend; with several, ⟨B,W⟩ > 0 does not make every "
        "error delivered agree with the true one",
        method="Accuracy behind bp at the largest number of classes less that at the smallest, paired by seed.",
        tolerance_reason=_T,
        read=_gap,
    ),
    Claim(
        name="alignment-falls",
        statement="Gradients of random feedback (fa, dfa) are less aligned with more classes.",
        origin="theory",
        reference="Derived, as for gap-grows",
        method=_COSINE + "At the smallest number of classes less that at the largest, paired by seed.",
        tolerance_reason=_T,
        read=lambda table: _change(_compared(table), "cosine", "cosine", rules=_RANDOM, falls=True),
    ),
)


def _draw_by_classes(data: pl.DataFrame) -> Figure:
    """Test accuracy, cosine and their correlation against the number of classes; a row a data set."""
    sets = each_of(data, "dataset")
    figure, axes = panels(
        3,
        len(sets),
        titles=[title for name, _ in sets for title in (f"{name}: test accuracy", "Alignment", "Correlation of both")],
        xlabels=["classes"],
        ylabels=["test accuracy"] * len(sets),
        height=3.0,
    )
    for row, (_, rows) in enumerate(sets):
        left, middle, right = axes[3 * row : 3 * row + 3]
        for panel, shown in ((left, "accuracy"), (middle, "cosine")):
            for rule, runs in each_of(rows.filter(pl.col("shown") == shown), "rule", tuple(STYLES)):
                points(panel, runs.sort("classes"), "classes", str(rule))
        middle.set_ylabel("cos∠(taken, true gradient)")
        _correlation(right, rows.filter(pl.col("shown") == "correlation").sort("classes"))
        counts = sorted(rows["classes"].unique().to_list())
        for panel in (left, middle, right):
            logarithmic(panel, "x", ticks=thinned(counts, 6))
            panel.set_xlim(counts[0] * 0.9, counts[-1] * 1.1)
    legend(figure, columns=9)
    return figure


def _correlation(panel: Axes, data: pl.DataFrame) -> None:
    panel.axhline(0, color=AXIS, linewidth=0.8)
    for shift, (words, runs) in zip((1.0, 1.04), each_of(data, "of"), strict=False):
        hollow = words != "all rules"
        panel.errorbar(
            runs["classes"] * shift,
            runs["mean"],
            yerr=[runs["mean"] - runs["low"], runs["high"] - runs["mean"]],
            color=AXIS if hollow else INK,
            marker="o",
            fillstyle="none" if hollow else "full",
            linestyle="none",
            label=str(words),
        )
    panel.set_ylim(-1.05, 1.05)
    panel.set_ylabel("Pearson's r over the rules")


def _draw_by_alignment(data: pl.DataFrame) -> Figure:
    """Test accuracy against cosine at the largest number of classes, the dial as a line; a panel a data set."""
    sets = each_of(data, "dataset")
    figure, axes = panels(
        len(sets),
        titles=[f"{name}, {runs['classes'][0]} classes" for name, runs in sets],
        xlabels=["cos∠(taken, true gradient)"],
        ylabels=["test accuracy"],
        width=max(5.5, 3.2 * len(sets)),
        height=3.4,
    )
    for panel, (_, runs) in zip(axes, sets, strict=True):
        turned = runs.filter(pl.col("alpha").is_not_null()).sort("alpha")
        panel.plot(turned["cosine"], turned["accuracy"], color=AXIS, linewidth=1.2, label="the dial α", zorder=1)
        for row in runs.sort(pl.col("rule").replace_strict({rule: k for k, rule in enumerate(STYLES)})).to_dicts():
            colour, marker = STYLES[row["rule"]]
            panel.errorbar(
                row["cosine"],
                row["accuracy"],
                xerr=row["cosine_sd"] or 0,
                yerr=row["accuracy_sd"] or 0,
                color=colour,
                marker=marker,
                markersize=5,
                elinewidth=0.9,
                linestyle="none",
                label=row["rule"],
            )
        for row in turned.filter(pl.col("rule") == "adafa").to_dicts():
            panel.annotate(
                f"{row['alpha']:g}",
                (row["cosine"], row["accuracy"]),
                xytext=(4, -11),
                textcoords="offset points",
                fontsize=8,
                color=STYLES["adafa"].colour,
            )
    legend(figure, columns=4)
    return figure


def _by_classes(table: pl.DataFrame) -> pl.DataFrame:
    runs = _compared(table)
    keys = ["dataset", "rule", "classes"]
    parts = [summary(runs, value, by=keys).with_columns(shown=pl.lit(value)) for value in ("accuracy", "cosine")]
    rows = [
        {"dataset": name, "classes": count, "of": words, "shown": "correlation", **interval}
        for words, kept in (("all rules", pl.lit(True)), ("without bp", pl.col("rule") != "bp"))
        for (name, count), part in _correlations(runs.filter(kept)).group_by(
            ["dataset", "classes"], maintain_order=True
        )
        if (interval := _interval(part["correlation"]))
    ]
    return pl.concat([*parts, pl.DataFrame(rows)], how="diagonal")


def _interval(correlation: pl.Series) -> dict[str, float] | None:
    """Mean and interval of correlations over seeds; None where a seed has none, all rules being equally accurate."""
    if correlation.null_count():
        return None
    try:
        value, low, high = _mean_with_interval(correlation.to_list())
    except Missing:
        return None
    return {"mean": value, "low": low, "high": high}


def _by_alignment(table: pl.DataFrame) -> pl.DataFrame:
    runs = _one_row_a_run(table).filter(pl.col("classes") == pl.col("classes").max().over("dataset"))
    keys = ["dataset", "rule", "tracking"]
    alphas = _dial(table).select(*keys, "alpha").unique()
    rows = runs.group_by([*keys, "classes"]).agg(
        pl.col("cosine").mean(),
        pl.col("accuracy").mean(),
        cosine_sd=pl.col("cosine").std(),
        accuracy_sd=pl.col("accuracy").std(),
        runs=pl.len(),
    )
    return rows.join(alphas, on=keys, how="left").sort(keys)


CLASSES = Experiment(
    name="robertson2024.classes",
    title="Difficulty of multi-class tasks",
    source="Robertson and Koyejo 2024, abstract; the sweep over random n-class subsets by an index of papers",
    revision=1,
    grid={
        "smoke": _points("digits", (2, 10), **{**_SMALL, "model": "mlp:32-32", "steps": 20}),
        "quick": _points("digits", (2, 3, 5, 10), **{**_SMALL, "steps": 400}),
        "paper": (
            *(
                point
                for dataset in ("mnist", "fashion-mnist", "mnist-10k")
                for point in _points(dataset, tuple(range(2, 11)), **_PAPER)
            ),
            *_points("cifar100", (2, 5, 10, 20, 50, 100), **_CONVOLUTIONAL),
            *_points("tiny-imagenet", (2, 5, 10, 20, 50, 100, 200), **_CONVOLUTIONAL),
        ),
    },
    seeds={"smoke": 2, "quick": 8, "paper": 10},
    run=_run,
    agreement=1e-4,
    together=("rule", "tracking", "classes"),
    at_most=20,
    cost=lambda *, steps: float(steps),
    pictures=(
        Picture(
            name="classes",
            caption="Test accuracy and alignment of the gradients against the number of classes, a fresh random subset "
            "a seed; mean ± standard deviation. Right: their correlation over the rules, one a seed, mean and 99 % "
            "interval (Fisher's z); none where in some seed all rules are equally accurate.",
            data=_by_classes,
            draw=_draw_by_classes,
        ),
        Picture(
            name="classes-alignment",
            caption="Test accuracy against alignment at the largest number of classes, mean ± standard deviation. The "
            "line is the dial B ← (1-α)B + αW from feedback alignment (α = 0) to backpropagation (α = 1).",
            data=_by_alignment,
            draw=_draw_by_alignment,
        ),
    ),
    claims=_CLAIMS,
)
