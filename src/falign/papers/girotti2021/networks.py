"""The order of learning in PyTorch networks that falign trains, from starts that differ and nothing else."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Missing, Outcome, Picture, Point, Scalar, Setting
from falign.lab.experiment.statistics import Estimate, above_zero, below_zero, mean, paired, slope, sorted_groups
from falign.lab.report.style import (
    AXIS,
    COLOURS,
    INK,
    MARKERS,
    Axes,
    Figure,
    law,
    legend,
    logarithmic,
    panels,
    sequence,
)
from falign.papers._images import load_images
from falign.papers.girotti2021._linear_networks import (
    AGAINST,
    Problem,
    converted,
    gradient_descent,
    one_thread,
    problem,
    product,
    start,
)
from falign.papers.girotti2021._modes import TOLERANCE, crossing, exponent, orders
from falign.theory.deep_linear import depth_slope, limit, matrix_gradient_descent, modes, network

__all__ = ["NETWORKS"]

_KINDS: tuple[tuple[str, int, str, str], ...] = (
    ("fa", 2, "small", "random"),
    ("fa", 2, "anti-aligned", "random"),
    ("fa", 2, "zero", "spectral"),
    ("fa", 2, "anti-aligned", "spectral"),
    ("fa", 3, "small", "random"),
    ("dfa", 3, "small", "random"),
    ("bp", 2, "small", "random"),
    ("bp", 2, "anti-aligned", "random"),
)
"""Rule, depth, scheme and basis. Of two layers fa and dfa are the same."""

_SPANS = {
    "map": {("fa", "zero"): 9.0, ("fa", "small"): 9.0, 3: 14.0, ("bp", "small"): 35.0},
    "images": {("fa", "zero"): 7.0, ("fa", "small"): 7.0, 3: 11.0, ("bp", "small"): 22.0},
}
"""Length of a training in η × steps, by rule and scheme, or by depth. The smallest component of the random map is a
sixth of the largest, those of images are a fifth and more."""

_OTHERS, _RESTING = 8.0, 30.0
"""The same of the other starts, and of those that rest long enough for the end of their rest to be seen coming."""


def _points(
    problems: Sequence[tuple[str, str]], *, rate: float, points: int, hidden: int, **sizes: Scalar
) -> tuple[Point, ...]:
    return tuple(
        {"dataset": name, "task": task, "rule": rule, "depth": depth, "scheme": scheme, "basis": basis}
        | {"rate": rate, "steps": round(_span(task, rule, depth, scheme, basis) / rate), **sizes}
        | {
            "points": 2 * int(sizes["inputs"]) if task == "map" else points,
            "hidden": hidden // 2 if depth > 2 else hidden,
        }
        for name, task in problems
        for rule, depth, scheme, basis in _KINDS
    )


def _span(task: str, rule: str, depth: int, scheme: str, basis: str) -> float:
    """Of anti-aligned spectral starts so long that the end of their rest is seen coming; pixels use all inputs."""
    if scheme == "anti-aligned" and basis == "spectral" and task != "pixels":
        return _RESTING
    spans = _SPANS.get(task, _SPANS["images"])
    return spans[depth] if depth in spans else spans.get((rule, scheme), _OTHERS)


_SMALL = (("teacher", "map"), ("digits", "pixels"), ("digits", "classes"))

_COMPARED = 100
"""Steps over which the matrix dynamics are run beside the network."""


@one_thread()
def _run(
    *,
    seed: int,
    setting: Setting,
    dataset: str,
    task: str,
    rule: str,
    depth: int,
    scheme: str,
    basis: str,
    points: int,
    inputs: int,
    hidden: int,
    rate: float,
    steps: int,
    records: int,
) -> Outcome:
    """Train a network in float64 on the CPU, beside the matrix dynamics over its first steps."""
    images = None if dataset == "teacher" else load_images(dataset, setting)
    learned = problem(images, task, points=points, inputs=inputs, seed=seed)
    W, B = start(learned, rule=rule, depth=depth, hidden=hidden, scheme=scheme, basis=basis, seed=seed)
    model = converted(W, B, rule)
    everything = [slice(None)] * steps
    products = torch.stack([product(each) for each in gradient_descent(model, learned.X, learned.Y, rate, everything)])
    shares = learned.shares(products)
    if not shares[-1].isfinite().all():
        return Outcome(records={}, diverged="the weights were not finite at the end: lower the rate")
    state = network(W, B, rule=rule)  # pyright: ignore[reportArgumentType]  # it checks
    trajectory = matrix_gradient_descent(
        state,
        learned.X,
        learned.Y,
        rule=rule,  # pyright: ignore[reportArgumentType]  # it checks
        rate=rate,
        steps=(compared := min(steps, _COMPARED)),
        names=["map"],
        at=list(range(compared + 1)),
    )
    apart = float((learned.shares(trajectory["map"][0]) - shares[: compared + 1]).abs().max())
    outside = learned.outside(products) if len(learned.λ) < learned.X.shape[1] else None
    return _outcome(learned, rate, shares, outside, records=records, apart=apart)


def _outcome(
    learned: Problem, rate: float, shares: Tensor, outside: Tensor | None, *, records: int, apart: float
) -> Outcome:
    """A record a component and recorded step, with the times at which it was learned and begun."""
    times = rate * torch.arange(len(shares), dtype=torch.float64)
    kept = torch.linspace(0, len(shares) - 1, records).round().long()
    parts = [
        {
            "mode": [mode] * records,
            "component": [float(learned.λ[mode])] * records,
            "time": times[kept].tolist(),
            "share": runs[kept].tolist(),
            "outside": [None] * records if outside is None else outside[kept].tolist(),
            "learned": [crossing(times, runs)] * records,
            "begun": [crossing(times, runs, 1 - TOLERANCE)] * records,
            "apart": [apart] * records,
        }
        for mode, runs in enumerate(shares.mT)
    ]
    columns: dict[str, list[Scalar | None]] = {
        name: [value for part in parts for value in part[name]] for name in parts[0]
    }
    return Outcome(records=columns)


_KIND = ["dataset", "task", "rule", "depth", "scheme", "basis"]
_MOSTLY = 0.85
"""Share of the pairs that is "approximately" in order."""
_GROWING = 1e-13, 1e-4
"""Sizes at which the weights on unused inputs are above rounding and too small to be noticed."""


def _modes_of(table: pl.DataFrame) -> pl.DataFrame:
    """One row a component of a run: when it was learned and begun."""
    keys = [*_KIND, "seed", "mode"]
    return table.filter(pl.col("time") == 0).select(*keys, "component", "learned", "begun").sort(keys)


def _orders(table: pl.DataFrame) -> pl.DataFrame:
    return orders(_modes_of(table), by=[*_KIND, "seed"], size="component")


def _kinds(runs: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """Runs by kind, labelled such as "digits, pixels, fa, 2 layers, small, random"."""
    return [
        (f"{dataset}, {task}, {rule}, {depth} layers, {scheme}, {basis}", rows)
        for (dataset, task, rule, depth, scheme, basis), rows in sorted_groups(runs, _KIND)
    ]


def _decreasing(table: pl.DataFrame, sign: int) -> Evidence:
    """Mean share of the pairs in order, above most for sign 1, below what is left for sign -1."""
    kinds, checks = _kinds(_orders(table)), []
    for label, runs in kinds:
        estimate = mean(runs["in_order"], of=label)
        half = estimate.half(len(kinds))
        far = max(_MOSTLY, 0.5 + half)
        end = {"low": far} if sign > 0 else {"high": 1 - far}
        checks.append(Check(label=label, measured=estimate.value, **end))
    return Evidence(checks=tuple(checks), note=f"{table['seed'].n_unique()} runs a kind")


def _differs(table: pl.DataFrame, axis: str, low: str, high: str) -> Evidence:
    """Shares of the pairs in order, at one point of an axis less at another, paired by seed."""
    return above_zero(_differences(_orders(table), "in_order", axis, low, high))


def _differences(runs: pl.DataFrame, value: str, axis: str, low: str, high: str) -> list[tuple[str, Estimate]]:
    """Paired differences of every data set and task."""
    return [
        (
            f"{dataset}, {task}: {high} less {low}",
            paired(rows, value, axis=axis, low=low, high=high, by=["dataset", "task"]),
        )
        for (dataset, task), rows in runs.group_by(["dataset", "task"], maintain_order=True)
    ]


def _slopes(table: pl.DataFrame) -> Evidence:
    """Mean exponent of the time in λ over the seeds, beside that of the depth."""
    logs = _modes_of(table).with_columns(pl.col("component").log(), pl.col("learned").log())
    kinds, checks = _kinds(logs), []
    for label, runs in kinds:
        estimate = slope(runs, "component", "learned")
        law, name = depth_slope(int(runs["depth"][0])), f"{label}: exponent (standard error {estimate.error:.2g})"
        checks.append(Check(label=name, measured=estimate.value, low=law - 0.1, high=law + 0.1))
    return Evidence(checks=tuple(checks))


def _gradient_slopes(table: pl.DataFrame) -> Evidence:
    """Differences of the slopes of log time on log λ, paired by seed."""
    keys = ["dataset", "task", "rule", "seed"]
    rows = [
        {**dict(zip(keys, values, strict=True)), "slope": exponent(run["component"], run["learned"])}
        for values, run in sorted_groups(_modes_of(table), keys)
    ]
    return below_zero(_differences(pl.DataFrame(rows), "slope", "rule", "fa", "bp"))


def _waits(table: pl.DataFrame) -> Evidence:
    """Mean over the components of the part of its time in which a component has not begun, by seed."""
    keys = ["dataset", "task", "rule", "seed"]
    runs = _modes_of(table).group_by(keys).agg(wait=(pl.col("begun") / pl.col("learned")).mean()).sort(keys)
    return above_zero(_differences(runs, "wait", "rule", "fa", "bp"))


def _leaves(table: pl.DataFrame) -> Evidence:
    """Rate at which the weights on unused inputs grow, fitted between rounding and the size at which others notice."""
    checks = []
    for label, runs in _kinds(table.filter((pl.col("mode") == 0) & pl.col("outside").is_not_null())):
        predicted = _growth(float(runs["rate"][0]))
        rates = [_log_growth(run) for _, run in runs.group_by("seed", maintain_order=True)]
        for kind, value in (("least", min(rates)), ("most", max(rates))):
            checks.append(Check(label=f"{label}: {kind}", measured=value / predicted, low=0.95, high=1.05))
    if not checks:
        raise Missing("every input direction is used by a component")
    return Evidence(checks=tuple(checks))


def _log_growth(run: pl.DataFrame) -> float:
    late = run.filter(pl.col("outside").is_between(*_GROWING))
    return float(np.polyfit(late["time"].to_numpy(), late["outside"].log().to_numpy(), 1)[0])


def _growth(rate: float) -> float:
    """``m |θ_2*|`` of the largest component, λ = 1, from the anti-aligned start; as steps of size η see it."""
    rest = float(1 / limit(modes([1.0], [[-AGAINST], [0.0]]))[0])
    return float(np.log1p(-rate * rest) / rate)


def _exactly(table: pl.DataFrame) -> Evidence:
    """Least and most share of the pairs in order, 1 from zero and 0 from anti-aligned weights."""
    checks = []
    for label, runs in _kinds(_orders(table)):
        wanted = 0.0 if runs["scheme"][0] == "anti-aligned" else 1.0
        shares = runs["in_order"].to_numpy()
        for kind, value in (("least", shares.min()), ("most", shares.max())):
            checks.append(Check(label=f"{label}: {kind}", measured=float(value), low=wanted, high=wanted))
    return Evidence(checks=tuple(checks))


_RANDOM, _FEEDBACK = pl.col("basis") == "random", pl.col("rule") != "bp"
_AGAINST = pl.col("scheme") == "anti-aligned"
_PAIRS = "Share of the pairs of components of which the larger reaches 90 % first, mean over the seeds."
_STUDENT = "half the 99 % interval over the seeds (Student's t, all together)"

_CLAIMS = (
    Claim(
        name="networks-regularise",
        statement="Trained from small weights, networks learn the components approximately in decreasing order.",
        reference="Abstract; that random weights and feedback do it, at depth 3 and for dfa too, is tried here",
        quotation="the components of the problem are approximately learned by decreasing order of importance",
        method=_PAIRS,
        tolerance_reason=f"At least {_MOSTLY:g}, and above ½ by {_STUDENT}. “Approximately” is ours: "
        "neighbours of nearly the same size may change places, as random feedback carries them unequally.",
        read=lambda table: _decreasing(table, 1),
        scope=_FEEDBACK & _RANDOM & (pl.col("scheme") == "small"),
    ),
    Claim(
        name="networks-anti-regularise",
        statement="Trained from hidden weights against their feedback path, networks learn negligible components "
        "before principal ones.",
        reference="Abstract; that this is such a start is derived, and tried on random feedback here",
        quotation="certain specific initializations imply that negligible components are learned before the "
        "principal ones",
        method=_PAIRS,
        tolerance_reason=f"At most {1 - _MOSTLY:.2g}, and below ½ by {_STUDENT}.",
        read=lambda table: _decreasing(table, -1),
        scope=_FEEDBACK & _RANDOM & _AGAINST,
    ),
    Claim(
        name="networks-only-the-start-differs",
        statement="Which of the two it is depends on the initial weights alone.",
        reference="Abstract: “certain specific initializations imply …”, “we also provide initialization schemes where "
        "…”",
        method="Difference of the shares between both starts, paired by seed: the same data, feedback and steps.",
        tolerance_reason="Above 0 by " + _STUDENT + ".",
        read=lambda table: _differs(table, "scheme", "anti-aligned", "small"),
        scope=(pl.col("rule") == "fa") & (pl.col("depth") == 2) & _RANDOM,
    ),
    Claim(
        name="networks-spectral",
        statement="With orthogonal feedback and zero or anti-aligned weights the order has no exception.",
        origin="theory",
        reference="Derived: the components are uncoupled",
        method="Share of the pairs in order, least and most of the seeds.",
        tolerance_reason="1 from zero, 0 from anti-aligned weights.",
        read=_exactly,
        scope=pl.col("basis") == "spectral",
    ),
    Claim(
        name="networks-power-law",
        statement="The times follow the powers of the spectral theory without its assumption: -2/3 of two layers, -6/7 "
        "of three.",
        origin="theory",
        reference="Derived for uncoupled components; tried on random weights and feedback here",
        method="Slope of the logarithm of the time against log λ over the components, one a seed; their mean.",
        tolerance_reason="± 0.1, for the coupling of the components by random feedback and for the size of the steps.",
        read=_slopes,
        scope=_FEEDBACK & _RANDOM & (pl.col("scheme") == "small"),
    ),
    Claim(
        name="networks-gradient-parts-more",
        statement="Gradient descent parts the components more than feedback alignment does.",
        origin="theory",
        reference="Derived: ln(1/ε)/λ against λ^(-2/3)",
        method="Difference of the slopes of the logarithm of the time against log λ, two layers, paired by seed: the "
        "same small weights.",
        tolerance_reason="Below 0 by " + _STUDENT + ".",
        read=_gradient_slopes,
        scope=_RANDOM & (pl.col("scheme") == "small") & (pl.col("depth") == 2),
    ),
    Claim(
        name="networks-gradient",
        statement="Gradient descent from the same start is not anti-regularised.",
        origin="theory",
        reference="Derived: its error returns by the weights, which cannot be against themselves",
        method="Difference of the shares between gradient descent and feedback alignment, paired by seed: the same "
        "weights.",
        tolerance_reason="Above 0 by " + _STUDENT + ".",
        read=lambda table: _differs(table, "rule", "fa", "bp"),
        scope=_RANDOM & _AGAINST,
    ),
    Claim(
        name="networks-no-staircase",
        statement="Gradient descent waits at a plateau before it learns a component, feedback alignment does not.",
        origin="theory",
        reference="Derived",
        method="Time of the first 10 % of a component over that of 90 %, mean over the components; the difference, "
        "paired by seed: the same small weights.",
        tolerance_reason="Above 0 by " + _STUDENT + ".",
        read=_waits,
        scope=_RANDOM & (pl.col("scheme") == "small") & (pl.col("depth") == 2),
    ),
    Claim(
        name="networks-rest-unstable",
        statement="Where an input direction is used by no component, the rest against the feedback does not last: what "
        "the weights have on that direction grows at the rate m|θ_2*|.",
        origin="theory",
        reference="Derived: e_ij' = -(mθ_2i + θ_1j²) e_ij next to a rest, and θ_1j = 0 there. Of single components the "
        "rest is stable",
        method="Slope of the logarithm of the largest |u_iᵀ W_2W_1 v| on unused directions v over time, from the exact "
        "spectral start, where it grows out of rounding; over m|θ_2*| of the largest component.",
        tolerance_reason="1 ± 0.05: other components grow beside it.",
        read=_leaves,
        scope=_FEEDBACK & _AGAINST & (pl.col("basis") == "spectral") & (pl.col("task") != "pixels"),
    ),
)

_PANELS = (
    ("fa", 2, "small", "random"),
    ("fa", 2, "anti-aligned", "random"),
    ("fa", 3, "small", "random"),
    ("dfa", 3, "small", "random"),
    ("bp", 2, "small", "random"),
    ("bp", 2, "anti-aligned", "random"),
)

_LINES = 6
"""Components drawn of a problem that has more: evenly among them, the largest and the smallest with them."""


def _problems(data: pl.DataFrame) -> list[tuple[str, str]]:
    return sorted(data.select("dataset", "task").unique().rows(), key=lambda pair: (pair[0] != "teacher", pair))


def _of(data: pl.DataFrame, kind: tuple[str, int, str, str]) -> pl.DataFrame:
    rule, depth, scheme, basis = kind
    return data.filter(
        (pl.col("rule") == rule)
        & (pl.col("depth") == depth)
        & (pl.col("scheme") == scheme)
        & (pl.col("basis") == basis)
    )


def _shares_over_time(data: pl.DataFrame) -> Figure:
    """A column a rule and start, a row a problem; the larger the component, the darker."""
    problems = _problems(data)
    figure, axes = panels(
        len(_PANELS),
        len(problems),
        titles=[
            f"{rule}, {depth} layers\n{scheme}" if row == 0 else ""
            for row in range(len(problems))
            for rule, depth, scheme, _ in _PANELS
        ],
        xlabels=["time"],
        ylabels=[f"{name}, {task}" for name, task in problems],
        share="all",
        width=10.5,
        height=1.9,
    )
    for row, (name, task) in enumerate(problems):
        whole = data.filter((pl.col("dataset") == name) & (pl.col("task") == task))
        count = whole["mode"].n_unique()
        kept = sorted({round(k * (count - 1) / (min(_LINES, count) - 1)) for k in range(min(_LINES, count))})
        for panel, kind in zip(axes[row * len(_PANELS) :], _PANELS, strict=False):
            runs = _of(whole, kind).filter(pl.col("time") > 0)
            for colour, mode in zip(reversed(sequence(len(kept))), kept, strict=True):
                line = runs.filter(pl.col("mode") == mode).sort("time")
                panel.plot(line["time"], line["share"], color=colour, linewidth=1.3)
            panel.axhline(0.9, color=INK, linewidth=0.8, linestyle=(0, (4, 2.5)))
            panel.axhline(0.0, color=AXIS, linewidth=0.8)
            panel.set_xlim(0.09, 60)
            panel.set_ylim(-0.1, 1.1)
            logarithmic(panel, "x", ticks=(0.1, 1, 10))
    return figure


def _components(data: pl.DataFrame) -> Figure:
    """A column a problem, a line a rule and start."""
    problems = _problems(data)
    figure, axes = panels(
        len(problems),
        titles=[f"{name}, {task}" for name, task in problems],
        xlabels=["λ"],
        ylabels=["time to 90 %"],
        share="all",
        height=3.6,
    )
    styles = dict(zip(_PANELS, zip((*COLOURS[:5], INK), MARKERS, strict=True), strict=True))
    for panel, (name, task) in zip(axes, problems, strict=True):
        whole = data.filter((pl.col("dataset") == name) & (pl.col("task") == task))
        for kind, (colour, marker) in styles.items():
            rule, depth, scheme, _ = kind
            _draw_points(panel, _of(whole, kind), colour, marker, f"{rule}, {depth} layers, {scheme}")
        for kind, scheme in (("small", "zero"), ("anti-aligned", "anti-aligned")):
            spectral = _of(whole, ("fa", 2, scheme, "spectral"))
            _draw_points(panel, spectral, styles["fa", 2, kind, "random"][0], "o", "", open_=True)
        for kind, power in ((_PANELS[0], -2 / 3), (_PANELS[2], -6 / 7), (_PANELS[4], -1.0)):
            runs = _of(whole, kind).drop_nulls("learned")
            components, times = runs["component"].to_numpy(), runs["learned"].to_numpy()
            # The law has one free constant: its line goes through the mean of the points in logarithms.
            constant = np.exp(np.mean(np.log(times) - power * np.log(components)))
            sizes = np.array([components.min(), components.max()])
            law(panel, sizes, constant * sizes**power, "")
        logarithmic(panel, "both")
    legend(figure, columns=3)
    return figure


def _draw_points(panel: Axes, runs: pl.DataFrame, colour: str, marker: str, label: str, *, open_: bool = False) -> None:
    panel.plot(
        runs["component"],
        runs["learned"],
        marker,
        color=colour,
        fillstyle="none" if open_ else "full",
        markersize=6 if open_ else 3.2,
        label=label or None,
    )


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    return (
        table.filter((pl.col("seed") == 0) & (pl.col("basis") == "random"))
        .select(*_KIND, "mode", "component", "time", "share")
        .sort(*_KIND, "mode", "time")
    )


NETWORKS = Experiment(
    name="girotti2021.networks",
    title="The order of learning in networks",
    source="Girotti, Mitliagkas and Gidel 2021, abstract; the networks and what they learn are choices",
    revision=1,
    grid={
        "smoke": _points(_SMALL[::2], rate=0.2, points=80, inputs=12, hidden=64, records=21),
        "quick": _points(_SMALL, rate=0.1, points=120, inputs=12, hidden=200, records=51),
        "paper": _points(
            (
                *_SMALL,
                *((name, task) for name in ("fashion-mnist", "mnist", "mnist-10k") for task in ("pixels", "classes")),
            ),
            rate=0.02,
            points=1400,
            inputs=16,
            hidden=800,
            records=161,
        ),
    },
    seeds={"smoke": 2, "quick": 4, "paper": 10},
    run=_run,
    together=("rule", "depth", "scheme", "basis", "steps"),
    at_most=4,
    cost=lambda *, steps: float(steps),
    pictures=(
        Picture(
            name="networks",
            caption="Share of each component of Σ_yx that a linear PyTorch network under falign has learned, over "
            "time; first seed. From small weights the principal components come first, from hidden weights against "
            "their feedback path the negligible ones, at the same data, feedback and steps; where random feedback "
            "couples the components, they do not rest there and are lost again. Dashed: 90 %.",
            data=_picture_data,
            draw=_shares_over_time,
        ),
        Picture(
            name="networks-times",
            caption="When each component was learned, 90 %, against its size; all seeds. Filled: random weights and "
            "feedback; open: orthogonal feedback, with which the components are exactly uncoupled. Dashed: the "
            "slopes -2/3, -6/7 and -1.",
            data=_modes_of,
            draw=_components,
        ),
    ),
    claims=_CLAIMS,
)
