"""What the conservation law says of a run: a report, a table of every neuron, a verdict."""

from dataclasses import dataclass

import polars as pl

from falign.lab._divergence import finite
from falign.lab._learner import Learner
from falign.lab.config import TrainConfig
from falign.measure.law import ConservationLaw
from falign.measure.law._balance import STRETCH

_SCHEMA = {
    "layer": pl.String,
    "targets": pl.String,
    "form": pl.String,
    "status": pl.String,
    "neuron": pl.Int64,
    "weights": pl.Float64,
    "alignment": pl.Float64,
    "drift": pl.Float64,
    "residual": pl.Float64,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """What was found.

    Attributes:
        verdict: "holds", "too little moved" (to tell), "fails", "drift" (it is not exact here, and how far off was
            measured), "none" (no neuron obeys it) or "not checked".
        text: For the terminal, several lines.
        table: A row a neuron; None where nothing was checked.
        failure: What does not hold though it should, in a sentence; empty if nothing.
    """

    verdict: str
    text: str
    table: pl.DataFrame | None = None
    failure: str = ""


def judge(law: ConservationLaw, learner: Learner) -> Judgement:
    """Read the law off after a training.

    Args:
        law: What watched it.
        learner: What was trained.

    Returns:
        The judgement.
    """
    if not law.steps:
        return Judgement(verdict="not checked", text="the conservation law was not checked: no step was made")
    if not finite(learner.model):
        return Judgement(verdict="not checked", text="the conservation law was not checked: the run diverged")
    report = law.report()
    if report.holds:
        words = {each.status for each in law.laws}
        exact = "holds" if report.told else "too little moved"
        verdict = exact if report.checked else "drift" if "drift" in words else "none"
        return Judgement(verdict=verdict, text=str(report), table=_neurons(law))
    worst = max((row for row in report.laws if row.broken), key=lambda row: row.leap or 0.0)
    failure = (
        f"the conservation law does not hold for layer {worst.layer!r}, off by {worst.leap:.1e} of its size within "
        f"{STRETCH} steps, where rounding explains {worst.tolerance:.1e}: a gradient or an update was not the rule's"
    )
    return Judgement(verdict="fails", text=str(report), table=_neurons(law), failure=failure)


def forewarning(config: TrainConfig) -> str:
    """What to say before a training under which the law is not exact; empty if it is."""
    if config.optimizer != "sgd":
        return f"the conservation law is exact under plain SGD: with {config.optimizer} it is reported as a drift"
    if config.momentum:
        return (
            f"the conservation law is exact under plain SGD (--momentum 0): with momentum {config.momentum:g} it drifts"
        )
    return ""


def _neurons(law: ConservationLaw) -> pl.DataFrame:
    changes, drift, residual = law.changes(), law.drift(), law.residual()
    pieces = [
        pl.DataFrame(
            {
                "layer": each.name,
                "targets": ", ".join(each.targets),
                "form": each.form,
                "status": each.status,
                "neuron": range(each.neurons),
                "weights": changes[each.name][0].tolist(),
                "alignment": changes[each.name][1].tolist(),
                "drift": drift[each.name].tolist(),
                "residual": residual[each.name].tolist(),
            },
            schema=_SCHEMA,
        )
        for each in law.laws
        if each.name in changes
    ]
    return pl.concat(pieces) if pieces else pl.DataFrame(schema=_SCHEMA)
