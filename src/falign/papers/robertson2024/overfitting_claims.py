"""What is stated of learning wrong labels by heart, and how it is judged."""

import polars as pl

from falign.lab.experiment import Check, Claim, Reading
from falign.lab.experiment.statistics import final, mean, paired

_RUN = ["dataset", "noise", "rule"]
_NOISY = pl.col("noise") > 0
_FITTED = 0.01


def _by_rule(runs: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """[("digits, fa", its runs)]."""
    groups = runs.sort("dataset", "rule").group_by(["dataset", "rule"], maintain_order=True)
    return [(f"{name}, {rule}", own) for (name, rule), own in groups]


def _interpolates(table: pl.DataFrame) -> Reading:
    groups = _by_rule(final(table, by=_RUN))
    return Reading(
        checks=tuple(
            Check(
                label=f"{label}: most of {own.height} runs",
                measured=float(own["train_error"].to_numpy().max()),
                high=_FITTED,
            )
            for label, own in groups
        )
    )


def _below_noise(table: pl.DataFrame) -> Reading:
    groups = _by_rule(final(table, by=_RUN))
    checks = []
    for label, own in groups:
        found = mean(own["test_error"], of=label)
        checks.append(Check(label=label, measured=found.value, high=own["noise"][0] - found.half(len(groups))))
    return Reading(checks=tuple(checks), note=f"{table['seed'].n_unique()} runs a rule")


def _as_clean(table: pl.DataFrame) -> Reading:
    groups = _by_rule(final(table, by=_RUN))
    noise = float(table["noise"].to_numpy().max())
    checks = []
    for label, own in groups:
        found = paired(own, "test_error", axis="noise", low=0.0, high=noise, by=["dataset", "rule"])
        checks.append(Check(label=label, measured=found.value, high=found.half(len(groups))))
    return Reading(checks=tuple(checks), note=f"{table['seed'].n_unique()} runs a rule")


def _no_worse(table: pl.DataFrame) -> Reading:
    ends = final(table, by=_RUN)
    found = [
        (
            f"{name}, {rule} less bp",
            paired(own, "test_error", axis="rule", low="bp", high=rule, by=["dataset"]),
        )
        for (name,), own in ends.group_by(["dataset"], maintain_order=True)
        for rule in own["rule"].unique().sort().to_list()
        if rule != "bp"
    ]
    return Reading(
        checks=tuple(Check(label=label, measured=each.value, high=each.half(len(found))) for label, each in found)
    )


_INDEX = (
    "A study of benign overfitting (4,000 images of MNIST, 20 % wrong labels), by an index of papers; its numbers are "
    "not readable"
)
_ZERO = "0 or less, and half the 99 % interval of the difference on top (Student's t over the seeds, all together)."

CLAIMS = (
    Claim(
        name="interpolates",
        statement="Each rule learns the training labels by heart, the wrong ones too.",
        place=_INDEX,
        how="Share of training labels, wrong ones included, that the network does not give at the end; the most of all "
        "runs of a rule.",
        because=f"At most {_FITTED:g}: a twentieth of the wrong labels.",
        read=_interpolates,
        scope=_NOISY,
    ),
    Claim(
        name="benign",
        statement="It still generalises: on right test labels it errs less often than its training labels were wrong.",
        place=_INDEX + ". “Benign” in the weakest sense, which is ours",
        how="Test error at the end, on right labels.",
        because="Below the share of wrong training labels by half the 99 % interval of the mean over the seeds "
        "(Student's t, all together). The nearest neighbour's label would be wrong that often.",
        read=_below_noise,
        scope=_NOISY,
    ),
    Claim(
        name="benign-strict",
        statement="Learning wrong labels by heart costs nothing: the test error is that of training on right labels.",
        place=_INDEX + ". “Benign” in the strict sense of theory, where the excess error vanishes",
        how="Test error at the end less that of the same network trained as long on right labels, paired by seed.",
        because=_ZERO,
        read=_as_clean,
    ),
    Claim(
        name="overfits-like-backpropagation",
        statement="Feedback alignment and sign feedback overfit no worse than backpropagation.",
        place="Not in what is readable of the paper: whether the rule matters",
        how="Test error at the end less backpropagation's, paired by seed: the same images, wrong labels and weights.",
        because=_ZERO,
        read=_no_worse,
        scope=_NOISY,
    ),
)
