"""What is stated of the predicted loss curves, and how it is judged."""

from collections.abc import Sequence

import polars as pl

from falign.lab.experiment import Check, Claim, Reading
from falign.lab.experiment.statistics import mean

WHOLE = -1
"""The number of the whole among the modes."""
_KIND = ["dataset", "activation", "rule", "depth", "size"]
_LINEAR, _RELU = 0.05, 0.1
"""Largest error as a share of the initial loss that counts as predicted."""
_EPOCHS = 2
"""First epochs of a ReLU network."""
_EPOCH = pl.col("step") * pl.col("batch") / pl.col("points")


def errors(table: pl.DataFrame) -> pl.DataFrame:
    """One row a run: the most that the predicted whole is from the trained, as a share of the trained's first.

    "mode": the same of the parts, the most of all modes, as a share of the whole's first. "reached": the trained loss
    at the end over its first.
    """
    keys = [*_KIND, "seed"]
    first = (pl.col("trained").filter((pl.col("mode") == WHOLE) & (pl.col("step") == 0)).first()).over(keys)
    far = (pl.col("predicted") - pl.col("trained")).abs() / first
    whole = pl.col("mode") == WHOLE
    return (
        table.with_columns(far=far, left=pl.col("trained") / first)
        .sort("step")
        .group_by(keys, maintain_order=True)
        .agg(
            far=pl.col("far").filter(whole).max(),
            mode=pl.col("far").filter(~whole).max(),
            reached=pl.col("left").filter(whole).last(),
        )
        .sort(keys)
    )


def _named(values: Sequence[object]) -> str:
    dataset, activation, rule, depth, size = values
    return f"{dataset}, {activation}, {rule}, {depth} layers, weights × {size:g}"


def _kinds(runs: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    return [(_named(values), own) for values, own in runs.group_by(_KIND, maintain_order=True)]


def _near(table: pl.DataFrame, column: str, most: float) -> Reading:
    runs = errors(table)
    checks = tuple(
        Check(label=f"{label}: most of {own.height}", measured=float(own[column].to_numpy().max()), high=most)
        for label, own in _kinds(runs)
    )
    return Reading(checks=checks, note=f"the loss fell to {runs['reached'].to_numpy().mean():.2f} of the first")


def _exact(table: pl.DataFrame) -> Reading:
    whole = table.filter(pl.col("mode") == WHOLE)
    far = float((whole["exact"] / whole["trained"] - 1).abs().to_numpy().max())
    return Reading(checks=(Check(label=f"most of {whole.height} records", measured=far, high=1e-9),))


def _passed(table: pl.DataFrame) -> Reading:
    last = table.filter((pl.col("mode") == WHOLE) & (pl.col("step") == pl.col("steps")))
    first = table.filter((pl.col("mode") == WHOLE) & (pl.col("step") == 0)).select(*_KIND, "seed", begun="trained")
    runs = last.join(first, on=[*_KIND, "seed"])
    kinds = _kinds(runs.with_columns(less=(pl.col("predicted") - pl.col("trained")) / pl.col("begun")).sort(_KIND))
    checks = []
    for label, own in kinds:
        found = mean(own["less"], of=label)
        checks.append(Check(label=label, measured=found.value, low=found.above(len(kinds))))
    return Reading(checks=tuple(checks))


_LINES = pl.col("activation") == "linear"
_BEYOND = "Beyond the paper; the tolerance is ours"

CLAIMS = (
    Claim(
        name="prediction-linear",
        statement="The loss curve of a linear network is predicted from its initial weights, feedback and data, mode "
        "by mode, though nothing in it is in spectral form.",
        place=_BEYOND,
        how="Largest difference between predicted and trained loss, as a share of the initial loss; the most of all "
        "runs.",
        because=f"At most {_LINEAR:g}.",
        read=lambda table: _near(table, "far", _LINEAR),
        scope=_LINES,
    ),
    Claim(
        name="prediction-modes",
        statement="The part of the loss that is each component's is predicted.",
        place=_BEYOND,
        how="As for the whole; the most of all components and runs.",
        because=f"At most {_LINEAR:g}.",
        read=lambda table: _near(table, "mode", _LINEAR),
        scope=_LINES,
    ),
    Claim(
        name="prediction-exact",
        statement="The matrix dynamics, at most as many points as inputs in place of all data, are the trained "
        "network.",
        place="Derived",
        how="Largest relative difference of their loss from that of the PyTorch network.",
        because="At most 1e-9: rounding.",
        read=_exact,
        scope=_LINES,
    ),
    Claim(
        name="prediction-relu",
        statement="The first epochs of a ReLU network are predicted as those of a linear one.",
        place=_BEYOND,
        how=f"As for linear networks, over the first {_EPOCHS} epochs of training in mini-batches.",
        because=f"At most {_RELU:g}.",
        read=lambda table: _near(table.filter(_EPOCH <= _EPOCHS), "far", _RELU),
        scope=~_LINES,
    ),
    Claim(
        name="prediction-relu-passed",
        statement="Later the ReLU network learns more than its prediction, what no linear map can.",
        place="Derived: the prediction ends at the loss of the best linear map",
        how="Predicted less trained loss at the last epoch, as a share of the initial loss; mean over the seeds.",
        because="Above 0 by half the 99 % interval over the seeds (Student's t, all together).",
        read=_passed,
        scope=~_LINES,
    ),
)
