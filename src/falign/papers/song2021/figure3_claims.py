"""What section 5 states of figure 3, and how it is judged."""

from collections.abc import Sequence

import polars as pl

from falign.lab.experiment import Check, Claim, Reading
from falign.lab.experiment.statistics import Estimate, final, paired

_RUN = ["dataset", "weights", "p", "strength"]
_WORDS = {"error_cosine": "cosine", "accuracy": "test accuracy", "logarithm": "logarithm of the loss"}


def _compared(
    table: pl.DataFrame, value: str, pairs: Sequence[tuple[float, float]], *, falls: bool = False
) -> list[tuple[str, Estimate, bool]]:
    """Differences between pairs of ridges, data set by data set: label, estimate, whether it should fall."""
    ends = final(table.with_columns(logarithm=pl.col("loss").log()), by=_RUN)
    return [
        (
            f"{name}: {_WORDS[value]}, λ = {high:g} less λ = {low:g}",
            paired(ends.filter(pl.col("dataset") == name), value, axis="strength", low=low, high=high, by=["dataset"]),
            falls,
        )
        for name in sorted(ends["dataset"].unique().to_list())
        for low, high in pairs
    ]


def _judged(table: pl.DataFrame, found: list[tuple[str, Estimate, bool]]) -> Reading:
    """All differences above 0 (below, where they should fall) with 99 % confidence together."""
    checks = (
        Check(label=label, measured=each.value, high=-each.above(len(found)))
        if falls
        else Check(label=label, measured=each.value, low=each.above(len(found)))
        for label, each, falls in found
    )
    return Reading(checks=tuple(checks), note=f"{table['seed'].n_unique()} runs a point")


def _aligns(table: pl.DataFrame) -> Reading:
    early = table.filter(pl.col("step") == (pl.col("epochs") / 4).round())
    cosines = _compared(table, "error_cosine", ((0.0, 0.1), (0.0, 0.3), (0.1, 0.3)))
    accuracies = [
        (f"{label}, after a quarter of the epochs", *rest)
        for label, *rest in _compared(early, "accuracy", ((0.0, 0.1), (0.0, 0.3)))
    ]
    return _judged(table, [*cosines, *accuracies])  # pyright: ignore[reportArgumentType]  # three parts each


def _fits(table: pl.DataFrame) -> Reading:
    return _judged(table, _compared(table, "logarithm", ((0.0, 0.1), (0.0, 0.3)), falls=True))


def _gains(table: pl.DataFrame) -> Reading:
    return _judged(table, _compared(table, "accuracy", ((0.0, 0.1), (0.0, 0.3))))


CLAIMS = (
    Claim(
        name="images-align",
        statement="Both alignment and convergence are improved by adding regularization, and increasing λ can "
        "further facilitate alignment.",
        place="Section 5, figure 3, left",
        how="Mean cosine of the error signals at the end; figure 3 shows no loss, so that convergence is read off the "
        "test accuracy after a quarter of the epochs. Differences between ridges are paired by seed; weights N(0, 1).",
        because="Above 0 with 99 % confidence (Student's t over the seeds, all together).",
        read=_aligns,
        scope=pl.col("weights") == "standard",
    ),
    Claim(
        name="images-accuracy",
        statement="Increasing the regularization level facilitates alignment with a small gain in test accuracy.",
        place="Section 5, figure 3, right",
        how="Test accuracy at the end, differences paired by seed; weights N(0, 1).",
        because="Above 0 with 99 % confidence (Student's t over the seeds, all together).",
        read=_gains,
        scope=pl.col("weights") == "standard",
    ),
    Claim(
        name="images-loss",
        statement="At the end of training the training loss is lower with a ridge.",
        place="Not in the paper, which shows no loss: whether “convergence” could mean it",
        how="Logarithm of the training loss at the end, differences paired by seed; weights N(0, 1).",
        because="Below 0 with 99 % confidence (Student's t over the seeds, all together).",
        read=_fits,
        scope=pl.col("weights") == "standard",
    ),
    Claim(
        name="images-accuracy-scaled",
        statement="There is a gain in test accuracy also if the initial weights are N(0, 1/d).",
        place="Not in the paper: how far figure 3, right, depends on the size of the initial weights",
        how="As for images-accuracy, weights N(0, 1/d).",
        because="As for images-accuracy.",
        read=_gains,
        scope=pl.col("weights") == "scaled",
    ),
)
