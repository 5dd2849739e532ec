"""How what is stated of the order of learning in networks is read off its runs."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from falign.lab.experiment import Check, Missing, Reading
from falign.lab.experiment.statistics import mean, paired, slope
from falign.papers.girotti2021.learned import orders
from falign.papers.girotti2021.starts import AGAINST
from falign.theory.deep_linear import depth_slope, limit, modes

_KIND = ["dataset", "task", "rule", "depth", "scheme", "basis"]
MOSTLY = 0.85
"""Share of the pairs that is "approximately" in order."""
_GROWING = 1e-13, 1e-4
"""Where the weights on unused inputs are above rounding and too small to be noticed."""


def modes_of(table: pl.DataFrame) -> pl.DataFrame:
    """One row a component of a run: when it was learned and begun."""
    columns = [*_KIND, "seed", "mode", "component", "learned", "begun"]
    return table.filter(pl.col("time") == 0).select(columns).sort(columns[:8])


def _orders(table: pl.DataFrame) -> pl.DataFrame:
    return orders(modes_of(table), by=[*_KIND, "seed"], size="component")


def _named(values: Sequence[object]) -> str:
    """Such as "digits, pixels, fa, 2 layers, small, random"."""
    dataset, task, rule, depth, *rest = values
    return ", ".join(map(str, (dataset, task, rule, f"{depth} layers", *rest)))


def _kinds(runs: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    return [(_named(values), own) for values, own in runs.sort(_KIND).group_by(_KIND, maintain_order=True)]


def decreasing(table: pl.DataFrame, sign: int) -> Reading:
    """Mean share of the pairs in order, above most for sign 1, below what is left for sign -1."""
    kinds, checks = _kinds(_orders(table)), []
    for label, own in kinds:
        found = mean(own["in_order"], of=label)
        half = found.half(len(kinds))
        far = max(MOSTLY, 0.5 + half)
        end = {"low": far} if sign > 0 else {"high": 1 - far}
        checks.append(Check(label=label, measured=found.value, **end))
    return Reading(checks=tuple(checks), note=f"{table['seed'].n_unique()} runs a kind")


def differs(table: pl.DataFrame, axis: str, low: str, high: str) -> Reading:
    """Shares of the pairs in order, at one point of an axis less at another, paired by seed."""
    groups = list(_orders(table).group_by(["dataset", "task"], maintain_order=True))
    checks = []
    for (dataset, task), own in groups:
        found = paired(own, "in_order", axis=axis, low=low, high=high, by=["dataset", "task"])
        checks.append(
            Check(label=f"{dataset}, {task}: {high} less {low}", measured=found.value, low=found.above(len(groups)))
        )
    return Reading(checks=tuple(checks))


def slopes(table: pl.DataFrame) -> Reading:
    """Mean exponent of the time in λ over the seeds, beside that of the depth."""
    logs = modes_of(table).with_columns(pl.col("component").log(), pl.col("learned").log())
    kinds, checks = _kinds(logs), []
    for label, own in kinds:
        found = slope(own, "component", "learned")
        law, name = depth_slope(int(own["depth"][0])), f"{label}: exponent (standard error {found.error:.2g})"
        checks.append(Check(label=name, measured=found.value, low=law - 0.1, high=law + 0.1))
    return Reading(checks=tuple(checks))


def gradient_slopes(table: pl.DataFrame) -> Reading:
    """Differences of the slopes of log time on log λ, paired by seed."""
    keys = ["dataset", "task", "rule", "seed"]
    rows = [
        {**dict(zip(keys, values, strict=True)), "slope": _log_slope(own)}
        for values, own in modes_of(table).sort(keys).group_by(keys, maintain_order=True)
    ]
    groups = list(pl.DataFrame(rows).group_by(["dataset", "task"], maintain_order=True))
    checks = []
    for (dataset, task), own in groups:
        found = paired(own, "slope", axis="rule", low="fa", high="bp", by=["dataset", "task"])
        checks.append(
            Check(label=f"{dataset}, {task}: bp less fa", measured=found.value, high=-found.above(len(groups)))
        )
    return Reading(checks=tuple(checks))


def _log_slope(own: pl.DataFrame) -> float:
    x, y = (own[name].cast(pl.Float64).log().to_numpy() for name in ("component", "learned"))
    return float(np.polyfit(x, y, 1)[0])


def waits(table: pl.DataFrame) -> Reading:
    """Mean over the components of the part of its time in which a component has not begun, by seed."""
    keys = ["dataset", "task", "rule", "seed"]
    runs = modes_of(table).group_by(keys).agg(wait=(pl.col("begun") / pl.col("learned")).mean()).sort(keys)
    groups = list(runs.group_by(["dataset", "task"], maintain_order=True))
    checks = []
    for (dataset, task), own in groups:
        found = paired(own, "wait", axis="rule", low="fa", high="bp", by=["dataset", "task"])
        checks.append(Check(label=f"{dataset}, {task}: bp less fa", measured=found.value, low=found.above(len(groups))))
    return Reading(checks=tuple(checks))


def leaves(table: pl.DataFrame) -> Reading:
    """Rate at which the weights on unused inputs grow, fitted between rounding and the size at which others notice."""
    checks = []
    for label, own in _kinds(table.filter((pl.col("mode") == 0) & pl.col("outside").is_not_null())):
        predicted = _growth(float(own["rate"][0]))
        rates = [_log_growth(run) for _, run in own.group_by("seed", maintain_order=True)]
        for kind, value in (("least", min(rates)), ("most", max(rates))):
            checks.append(Check(label=f"{label}: {kind}", measured=value / predicted, low=0.95, high=1.05))
    if not checks:
        raise Missing("every input direction is used by a component")
    return Reading(checks=tuple(checks))


def _log_growth(run: pl.DataFrame) -> float:
    late = run.filter(pl.col("outside").is_between(*_GROWING))
    return float(np.polyfit(late["time"].to_numpy(), late["outside"].log().to_numpy(), 1)[0])


def _growth(rate: float) -> float:
    """``m |θ_2*|`` of the largest component, λ = 1, from the anti-aligned start; as steps of size η see it."""
    rest = float(1 / limit(modes([1.0], [[-AGAINST], [0.0]]))[0])
    return float(np.log1p(-rate * rest) / rate)


def same(table: pl.DataFrame) -> Reading:
    """Most difference between PyTorch's product of weights and the matrix dynamics' own."""
    return Reading(
        checks=tuple(
            Check(
                label=f"{label}: most of {own['seed'].n_unique()}",
                measured=float(own["apart"].to_numpy().max()),
                high=1e-9,
            )
            for label, own in _kinds(table)
        )
    )


def exactly(table: pl.DataFrame) -> Reading:
    """Least and most share of the pairs in order, 1 from zero and 0 from anti-aligned weights."""
    checks = []
    for label, own in _kinds(_orders(table)):
        wanted = 0.0 if own["scheme"][0] == "anti-aligned" else 1.0
        found = own["in_order"].to_numpy()
        for kind, value in (("least", found.min()), ("most", found.max())):
            checks.append(Check(label=f"{label}: {kind}", measured=float(value), low=wanted, high=wanted))
    return Reading(checks=tuple(checks))
