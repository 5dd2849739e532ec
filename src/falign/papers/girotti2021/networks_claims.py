"""What is stated of the order of learning in networks, and how it is judged."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from falign.lab.experiment import Check, Claim, Missing, Reading
from falign.lab.experiment.statistics import mean, paired, slope
from falign.papers.girotti2021.learned import orders
from falign.papers.girotti2021.starts import AGAINST
from falign.theory.deep_linear import depth_slope, limit, modes

_KIND = ["dataset", "task", "rule", "depth", "scheme", "basis"]
_MOSTLY = 0.85
"""Share of the pairs that is "approximately" in order."""
_GROWING = 1e-13, 1e-4
"""Where the weights on unused inputs are above rounding and too small to be noticed."""
_RANDOM, _FEEDBACK = pl.col("basis") == "random", pl.col("rule") != "bp"
_AGAINST = pl.col("scheme") == "anti-aligned"


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


def _decreasing(table: pl.DataFrame, sign: int) -> Reading:
    """Mean share of the pairs in order, above most for sign 1, below what is left for sign -1."""
    kinds, checks = _kinds(_orders(table)), []
    for label, own in kinds:
        found = mean(own["in_order"], of=label)
        half = found.half(len(kinds))
        far = max(_MOSTLY, 0.5 + half)
        end = {"low": far} if sign > 0 else {"high": 1 - far}
        checks.append(Check(label=label, measured=found.value, **end))
    return Reading(checks=tuple(checks), note=f"{table['seed'].n_unique()} runs a kind")


def _differs(table: pl.DataFrame, axis: str, low: str, high: str) -> Reading:
    """Shares of the pairs in order, at one point of an axis less at another, paired by seed."""
    groups = list(_orders(table).group_by(["dataset", "task"], maintain_order=True))
    checks = []
    for (dataset, task), own in groups:
        found = paired(own, "in_order", axis=axis, low=low, high=high, by=["dataset", "task"])
        checks.append(
            Check(label=f"{dataset}, {task}: {high} less {low}", measured=found.value, low=found.above(len(groups)))
        )
    return Reading(checks=tuple(checks))


def _slopes(table: pl.DataFrame) -> Reading:
    logs = modes_of(table).with_columns(pl.col("component").log(), pl.col("learned").log())
    kinds, checks = _kinds(logs), []
    for label, own in kinds:
        found = slope(own, "component", "learned")
        law, name = depth_slope(int(own["depth"][0])), f"{label}: exponent (standard error {found.error:.2g})"
        checks.append(Check(label=name, measured=found.value, low=law - 0.1, high=law + 0.1))
    return Reading(checks=tuple(checks))


def _gradient_slopes(table: pl.DataFrame) -> Reading:
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


def _waits(table: pl.DataFrame) -> Reading:
    """Mean over the components of the part of its time in which a component has not begun, by seed."""
    keys = ["dataset", "task", "rule", "seed"]
    runs = modes_of(table).group_by(keys).agg(wait=(pl.col("begun") / pl.col("learned")).mean()).sort(keys)
    groups = list(runs.group_by(["dataset", "task"], maintain_order=True))
    checks = []
    for (dataset, task), own in groups:
        found = paired(own, "wait", axis="rule", low="fa", high="bp", by=["dataset", "task"])
        checks.append(Check(label=f"{dataset}, {task}: bp less fa", measured=found.value, low=found.above(len(groups))))
    return Reading(checks=tuple(checks))


def _leaves(table: pl.DataFrame) -> Reading:
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


def _same(table: pl.DataFrame) -> Reading:
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


def _exactly(table: pl.DataFrame) -> Reading:
    checks = []
    for label, own in _kinds(_orders(table)):
        wanted = 0.0 if own["scheme"][0] == "anti-aligned" else 1.0
        found = own["in_order"].to_numpy()
        for kind, value in (("least", found.min()), ("most", found.max())):
            checks.append(Check(label=f"{label}: {kind}", measured=float(value), low=wanted, high=wanted))
    return Reading(checks=tuple(checks))


_PAIRS = "Share of the pairs of components of which the larger reaches 90 % first, mean over the seeds."
_STUDENT = "half the 99 % interval over the seeds (Student's t, all together)"

CLAIMS = (
    Claim(
        name="networks-regularise",
        statement="Trained from small weights, networks learn the components approximately in decreasing order.",
        place="Abstract; that random weights and feedback do it, at depth 3 and for dfa too, is tried here",
        how=_PAIRS,
        because=f"At least {_MOSTLY:g}, and above ½ by {_STUDENT}. “Approximately” is ours: "
        "neighbours of nearly the same size may change places, as random feedback carries them unequally.",
        read=lambda table: _decreasing(table, 1),
        scope=_FEEDBACK & _RANDOM & (pl.col("scheme") == "small"),
    ),
    Claim(
        name="networks-anti-regularise",
        statement="Trained from hidden weights against their feedback path, networks learn negligible components "
        "before principal ones.",
        place="Abstract; that this is such a start is derived, and tried on random feedback here",
        how=_PAIRS,
        because=f"At most {1 - _MOSTLY:.2g}, and below ½ by {_STUDENT}.",
        read=lambda table: _decreasing(table, -1),
        scope=_FEEDBACK & _RANDOM & _AGAINST,
    ),
    Claim(
        name="networks-only-the-start-differs",
        statement="Which of the two it is depends on the initial weights alone.",
        place="Abstract: “certain specific initializations imply …”, “we also provide initialization schemes where …”",
        how="Difference of the shares between both starts, paired by seed: the same data, feedback and steps.",
        because="Above 0 by " + _STUDENT + ".",
        read=lambda table: _differs(table, "scheme", "anti-aligned", "small"),
        scope=(pl.col("rule") == "fa") & (pl.col("depth") == 2) & _RANDOM,
    ),
    Claim(
        name="networks-spectral",
        statement="With orthogonal feedback and zero or anti-aligned weights the order has no exception.",
        place="Derived: the components are uncoupled",
        how="Share of the pairs in order, least and most of the seeds.",
        because="1 from zero, 0 from anti-aligned weights.",
        read=_exactly,
        scope=pl.col("basis") == "spectral",
    ),
    Claim(
        name="networks-power-law",
        statement="The times follow the powers of the spectral theory without its assumption: -2/3 of two layers, -6/7 "
        "of three.",
        place="Derived for uncoupled components; tried on random weights and feedback here",
        how="Slope of the logarithm of the time against log λ over the components, one a seed; their mean.",
        because="± 0.1, for the coupling of the components by random feedback and for the size of the steps.",
        read=_slopes,
        scope=_FEEDBACK & _RANDOM & (pl.col("scheme") == "small"),
    ),
    Claim(
        name="networks-gradient-parts-more",
        statement="Gradient descent parts the components more than feedback alignment does.",
        place="Derived: ln(1/ε)/λ against λ^(-2/3)",
        how="Difference of the slopes of the logarithm of the time against log λ, two layers, paired by seed: the same "
        "small weights.",
        because="Below 0 by " + _STUDENT + ".",
        read=_gradient_slopes,
        scope=_RANDOM & (pl.col("scheme") == "small") & (pl.col("depth") == 2),
    ),
    Claim(
        name="networks-gradient",
        statement="Gradient descent from the same start is not anti-regularised.",
        place="Derived: its error returns by the weights, which cannot be against themselves",
        how="Difference of the shares between gradient descent and feedback alignment, paired by seed: the same "
        "weights.",
        because="Above 0 by " + _STUDENT + ".",
        read=lambda table: _differs(table, "rule", "fa", "bp"),
        scope=_RANDOM & _AGAINST,
    ),
    Claim(
        name="networks-no-staircase",
        statement="Gradient descent waits at a plateau before it learns a component, feedback alignment does not.",
        place="Derived",
        how="Time of the first 10 % of a component over that of 90 %, mean over the components; the difference, paired "
        "by seed: the same small weights.",
        because="Above 0 by " + _STUDENT + ".",
        read=_waits,
        scope=_RANDOM & (pl.col("scheme") == "small") & (pl.col("depth") == 2),
    ),
    Claim(
        name="networks-rest-unstable",
        statement="Where an input direction is used by no component, the rest against the feedback does not last: what "
        "the weights have on that direction grows at the rate m|θ_2*|.",
        place="Derived: e_ij' = -(mθ_2i + θ_1j²) e_ij next to a rest, and θ_1j = 0 there. Of single components the "
        "rest is stable",
        how="Slope of the logarithm of the largest |u_iᵀ W_2W_1 v| on unused directions v over time, from the exact "
        "spectral start, where it grows out of rounding; over m|θ_2*| of the largest component.",
        because="1 ± 0.05: other components grow beside it.",
        read=_leaves,
        scope=_FEEDBACK & _AGAINST & (pl.col("basis") == "spectral") & (pl.col("task") != "pixels"),
    ),
    Claim(
        name="networks-exact",
        statement="What falign trains is the dynamics that the theory is about.",
        place="Derived",
        how="Difference of the learned shares between the PyTorch network and the matrix dynamics on compressed data, "
        "the most of all components over the first 100 steps.",
        because="At most 1e-9: rounding.",
        read=_same,
    ),
)
