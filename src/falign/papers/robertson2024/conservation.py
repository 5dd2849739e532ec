"""The conservation law under practical training: plain descent, and what departs from it."""

from collections.abc import Iterator, Sequence
from math import ceil, inf

import polars as pl

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Picture, Point, Scalar, Setting
from falign.lab.experiment.statistics import around, mean, slope, sorted_groups, summary
from falign.lab.report.style import COLOURS, INK, Axes, Figure, each_of, error_bars, law, logarithmic, panels, sequence
from falign.measure import ConservationLaw
from falign.papers._images import load_images
from falign.papers.robertson2024._training import (
    STYLES,
    Record,
    Training,
    start_training,
    train_and_measure,
    with_images,
)

__all__ = ["CONSERVATION"]

_NETWORKS = "falign.papers.robertson2024.networks"
_TIME = 8.0
"""Length of a training in η × steps."""


def _points(mlp: str, rates: Sequence[float], *, rest: int, **sizes: Scalar) -> tuple[Point, ...]:
    """Plain descent by four rules, the departures from it by feedback alignment, and decay until it is at rest.

    Args:
        mlp: The perceptron.
        rates: η of plain feedback alignment, falling; the others have the first and the last of them. All train for as
            long, 8/η steps.
        rest: Steps of the training with decay that comes to rest, at the first rate and in batches of 128.
        sizes: Further values of every point.
    """
    conv = f"{_NETWORKS}:pooled"
    kinds = (
        *(("plain", rule, model) for rule in ("fa", "usf", "kp", "adafa") for model in (mlp, conv)),
        *((case, "fa", model) for case in ("momentum", "Adam", "decay") for model in (mlp, conv)),
        ("tanh", "fa", mlp),
        ("residual", "fa", f"{_NETWORKS}:residual"),
        ("batch norm", "fa", f"{_NETWORKS}:normalised"),
    )
    points = [
        {"case": case, "rule": rule, "model": model, "rate": rate, "steps": round(_TIME / rate), "batch": 32}
        for case, rule, model in kinds
        for rate in (rates if (case, rule) == ("plain", "fa") else (rates[0], rates[-1]))
    ]
    points.append({"case": "equilibrium", "rule": "fa", "model": mlp, "rate": rates[0], "steps": rest, "batch": 128})
    return tuple({**point, "scale": 0.6, **sizes} for point in points)


_MOMENTUM = 0.9
_SHOWN_CASES = ("plain", "momentum", "Adam", "decay", "tanh", "residual", "batch norm")
_RULES = ("fa", "usf", "kp", "adafa")
_COLOUR: dict[str, str] = dict(zip(_SHOWN_CASES, (INK, *COLOURS), strict=True))


def _shown_kinds(data: pl.DataFrame) -> list[tuple[str, str]]:
    """[(case, rule)]: the rules under plain descent, then feedback alignment under the others."""
    there = set(data.select("case", "rule").unique().rows())
    return [(case, rule) for case in _SHOWN_CASES for rule in _RULES if (case, rule) in there]


def _convolutional(model: str) -> bool:
    return model.endswith((":pooled", ":normalised"))


def _draw_drifts(data: pl.DataFrame) -> Figure:
    """Drift against the rate: rules under plain descent on the left, departures from it on the right."""
    sets = each_of(data, "dataset")
    figure, axes = panels(
        2,
        len(sets),
        titles=[title for name, _ in sets for title in (f"{name}: plain descent", "feedback alignment otherwise")],
        xlabels=["η"],
        ylabels=["Σ|C(T) - C(0)|"] * len(sets),
        share="all",
        height=3.4,
    )
    rates = sorted(data["rate"].unique().to_list())
    for row, (_, rows) in enumerate(sets):
        left, right = axes[2 * row : 2 * row + 2]
        for case, rule in _shown_kinds(rows):
            for model, runs in each_of(rows.filter((pl.col("case") == case) & (pl.col("rule") == rule)), "model"):
                plain = case == "plain"
                colour = STYLES[rule].colour if plain else _COLOUR[case]
                _drift(left if plain else right, runs.sort("rate"), colour, str(model), rule if plain else case)
        base = rows["mean"].to_numpy().min() / 3
        for panel in (left, right):
            law(panel, rates, [base * rate / rates[0] for rate in rates], "∝ η")
            logarithmic(panel, "both")
            logarithmic(panel, "x", ticks=rates)
            handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
            panel.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _drift(panel: Axes, data: pl.DataFrame, colour: str, model: str, label: str) -> None:
    panel.errorbar(
        data["rate"],
        data["mean"],
        yerr=error_bars(data["mean"], data["sd"]),
        color=colour,
        marker="o",
        fillstyle="none" if _convolutional(model) else "full",
        linewidth=1.2,
        elinewidth=0.9,
        label=label,
    )


_CASES: dict[str, dict[str, Scalar]] = {
    "plain": {},
    "momentum": {"momentum": _MOMENTUM},
    "Adam": {"optimizer": "adam"},
    "decay": {"weight_decay": 0.01},
    "equilibrium": {"weight_decay": 0.05},
    "tanh": {"activation": "tanh"},
    "residual": {},
    "batch norm": {},
}
"""Case -> options of training."""

_RATES = {"momentum": 1 - _MOMENTUM, "Adam": 0.02}
"""η of a case over that of plain descent. Momentum: the same effective rate η/(1-μ). Adam: about the same progress."""
_TRACKING = 0.1
"""adafa: α/η, so that there is a limit of small steps."""
_RECORDS = 4


def _run(
    *,
    seed: int,
    setting: Setting,
    dataset: str,
    images: int,
    model: str,
    case: str,
    rule: str,
    scale: float,
    rate: float,
    batch: int,
    steps: int,
) -> Outcome:
    """Train a network in float64, and record both sides of the law on the way."""
    # float64: the drift is a small difference of large sums, which float32 would drown.
    options = {"dtype": "float64", "scale": scale, **_CASES[case]}
    if rule == "adafa":
        options["adafa_rate"] = _TRACKING * rate
    training = start_training(
        with_images(load_images(dataset, setting), images, seed),
        seed,
        setting,
        dataset=dataset,
        model=model,
        rule=rule,
        rate=rate * _RATES.get(case, 1.0),
        batch=batch,
        **options,
    )
    law = ConservationLaw(training.learner.model, training.learner.optimizer, example=training.x[:2])
    at = [round(steps * k / _RECORDS) for k in range(1, _RECORDS + 1)]
    return train_and_measure(training, at, lambda done: list(_rows(training, law)))


def _rows(training: Training, law: ConservationLaw) -> Iterator[Record]:
    """A record a layer that feeds another."""
    changes, values, drifts = law.changes(), law.value(), law.drift()
    for depth, row in enumerate(law.report().laws):
        incoming, outgoing = (float(change.sum()) for change in changes[row.layer])
        parameters = training.learner.model.get_submodule(row.layer).named_parameters()
        weights = [part for name, part in parameters if "feedback" not in name.split(".")]
        size = sum(float(part.detach().square().sum()) for part in weights) / 2
        value = values[row.layer]
        yield {
            "layer": row.layer,
            "depth": depth,
            "law": row.status,
            "order": row.order,
            "incoming_change": incoming,
            "outgoing_change": outgoing,
            "incoming": size,
            "value": float(value.sum()),
            "negative": float((value < 0).double().mean()),
            "apart": float(drifts[row.layer].abs().sum()),
            "drift": row.drift,
            "residual": row.residual,
        }


_POINT = ["dataset", "case", "rule", "model", "rate"]
_KIND = _POINT[:-1]
_NEAR = 5.0
"""Degrees from the diagonal that count as on it."""
_KEPT = (pl.col("case") == "plain") & (pl.col("rule") != "adafa")


def _off_diagonal(table: pl.DataFrame) -> pl.DataFrame:
    """One row a run, at its end.

    ``apart``: ``Σ_k |C_k(T) - C_k(0)|`` over the neurons of all layers. ``degrees``: the angle between the diagonal and
    the layers' changes, ``arctan(Σ|x - y| / Σ(|x| + |y|))`` with x that of ½|W|² + ½|b|² and y that of ⟨B, W⟩.
    """
    last = table.filter(pl.col("step") == pl.col("steps"))
    difference = pl.col("incoming_change") - pl.col("outgoing_change")
    sizes = pl.col("incoming_change").abs() + pl.col("outgoing_change").abs()
    return (
        last.group_by([*_POINT, "seed"])
        .agg(
            apart=pl.col("apart").sum(),
            degrees=(difference.abs().sum() / sizes.sum()).arctan().degrees(),
            incoming=pl.col("incoming").sum(),
            value=pl.col("value").sum(),
            negative=pl.col("negative").mean(),
            residual=pl.col("residual").max(),
        )
        .sort([*_POINT, "seed"])
    )


def _kinds(runs: pl.DataFrame, by: list[str]) -> list[tuple[str, pl.DataFrame]]:
    """Runs by the values of some columns, labelled such as "digits, plain, fa, pooled"."""
    return [
        (", ".join(str(value).rpartition("networks:")[2] for value in values), rows)
        for values, rows in sorted_groups(runs, by)
    ]


def _exponents(table: pl.DataFrame, low: float, high: float) -> Evidence:
    """Slope of log drift against log η: within the bounds by half its interval, or around 1 with it on top."""
    logs = _off_diagonal(table).with_columns(pl.col("rate").log(), pl.col("apart").log())
    kinds = _kinds(logs, _KIND)
    checks = []
    for label, runs in kinds:
        estimate = slope(runs, "rate", "apart")
        # Around 1 the law is to be met, within its interval; of one-sided bounds the whole interval is to be beyond.
        half = estimate.half(len(kinds)) * (1 if low < 1 < high < inf else -1)
        checks.append(Check(label=f"{label}: exponent of η", measured=estimate.value, low=low - half, high=high + half))
    return Evidence(checks=tuple(checks), note=f"{table['seed'].n_unique()} runs a point")


def _near(table: pl.DataFrame) -> Evidence:
    runs = _off_diagonal(table)
    kinds = _kinds(runs.filter(pl.col("rate") == pl.col("rate").min().over(_KIND)), _POINT)
    checks = []
    for label, rows in kinds:
        estimate = mean(rows["degrees"], of=label)
        checks.append(Check(label=f"{label}: degrees", measured=estimate.value, high=_NEAR - estimate.half(len(kinds))))
    return Evidence(checks=tuple(checks))


def _momentum(table: pl.DataFrame) -> Evidence:
    runs = _off_diagonal(table)
    keys = ["dataset", "rule", "model", "rate", "seed"]
    plain = runs.filter(pl.col("case") == "plain").select(*keys, than="apart")
    both = runs.filter(pl.col("case") == "momentum").join(plain, on=keys)
    both = both.with_columns(ratio=pl.col("apart") / pl.col("than"))
    kinds, most = _kinds(both, _POINT), (1 + _MOMENTUM) / (1 - _MOMENTUM)
    checks = []
    for label, rows in kinds:
        estimate = mean(rows["ratio"], of=label)
        half = estimate.above(len(kinds))
        checks.append(
            Check(label=f"{label}: times, less 1", measured=estimate.value - 1, low=half, high=most - 1 - half)
        )
    return Evidence(checks=tuple(checks))


def _rests(table: pl.DataFrame) -> Evidence:
    runs = _off_diagonal(table).with_columns(ratio=(pl.col("incoming") - pl.col("value")) / (2 * pl.col("incoming")))
    return around(
        [(label, mean(rows["ratio"], of=label)) for label, rows in _kinds(runs, _POINT)],
        1,
        0.1,
        note=f"C < 0 for {runs['negative'].to_numpy().mean():.0%} of the neurons",
    )


_LAW = (
    "Abstract: “a novel conservation law linking changes in synaptic weights to implicit regularization that maintains "
    "alignment”, “with support from experiments”. "
)

_DRIFT = (
    "Slope of log Σ|C(T) - C(0)|, over the neurons of all layers, against log η for trainings of the same length in "
    "η × steps; one a seed. "
)

_HALF = "Half the 99 % interval over the seeds (Student's t, all together) on top."
_BY_HALF = " by half the 99 % interval over the seeds (Student's t, all together)"

_CLAIMS = (
    Claim(
        name="on-the-diagonal",
        statement="Under plain descent the change of ½|W_l|² + ½|b_l|² of a layer is that of ⟨B, W_l+1⟩.",
        reference=_LAW + "Its layerwise form; the paper's figure is not readable",
        quotation="a novel conservation law linking changes in synaptic weights to implicit regularization that "
        "maintains alignment with the gradient, with support from experiments",
        headline="angle to the law’s diagonal",
        method="Angle between the diagonal and the point that both changes make, sizes summed over the layers, at the "
        "smallest rate.",
        tolerance_reason=f"Below {_NEAR:g}°" + _BY_HALF + ": ½Ση²|g|², which is of first order in η, is left.",
        read=_near,
        scope=_KEPT,
    ),
    Claim(
        name="on-the-diagonal-adafa",
        statement="Under plain descent the change of ½|W_l|² + ½|b_l|² is that of ⟨B, W_l+1⟩ for adaFA as well.",
        reference="A summary of the paper names adaFA among the rules that converge; that it is the tracking "
        "B ← (1-α)B + αW is a choice",
        method="As for on-the-diagonal, adafa.",
        tolerance_reason="As for on-the-diagonal. For moving feedback Ċ = -⟨Ḃ, W⟩, so that there is no reason why it "
        "should be.",
        read=_near,
        scope=(pl.col("case") == "plain") & (pl.col("rule") == "adafa"),
    ),
    Claim(
        name="drift-of-first-order",
        statement="The law is that of gradient flow: what plain descent drifts from it is of first order in η.",
        origin="theory",
        reference="Derived: the drift is ½Ση²|g|²",
        method=_DRIFT + "Feedback alignment.",
        tolerance_reason="1 ± 0.1. " + _HALF,
        read=lambda table: _exponents(table, 0.9, 1.1),
        scope=_KEPT & (pl.col("rule") == "fa"),
    ),
    Claim(
        name="drift-of-other-rules",
        statement="The drift vanishes with η for sign feedback, Kolen-Pollack and batch normalization as well.",
        origin="theory",
        reference="Derived: sign feedback drifts at changes of sign besides, Kolen-Pollack by a difference of squares",
        method=_DRIFT,
        tolerance_reason="Above ½, halfway between first order and none," + _BY_HALF + ".",
        read=lambda table: _exponents(table, 0.5, inf),
        scope=(_KEPT & (pl.col("rule") != "fa")) | (pl.col("case") == "batch norm"),
    ),
    Claim(
        name="momentum-drifts-more",
        statement="Momentum drifts more than plain descent at the same effective rate η/(1-μ), up to (1+μ)/(1-μ) "
        "times.",
        origin="theory",
        reference="Derived: (1+μ)/(1-μ) times for gradients that change slowly, once for those that are noise",
        method="Drift over that of plain descent, paired by seed: the same weights and batches.",
        tolerance_reason=f"Between 1 and {(1 + _MOMENTUM) / (1 - _MOMENTUM):.0f}," + _BY_HALF + ".",
        read=_momentum,
        scope=pl.col("case").is_in(["plain", "momentum"]) & (pl.col("rule") == "fa"),
    ),
    Claim(
        name="momentum-vanishes",
        statement="With momentum the law still holds in the limit of small steps.",
        origin="theory",
        reference="Derived",
        method=_DRIFT,
        tolerance_reason="Above ½" + _BY_HALF + ".",
        read=lambda table: _exponents(table, 0.5, inf),
        scope=pl.col("case") == "momentum",
    ),
    Claim(
        name="broken-at-any-rate",
        statement="With Adam, tanh, and around a shortcut the law does not hold, however small the steps.",
        origin="theory",
        reference="Derived",
        method=_DRIFT,
        tolerance_reason="Below ½" + _BY_HALF + ".",
        read=lambda table: _exponents(table, -inf, 0.5),
        scope=pl.col("case").is_in(["Adam", "tanh", "residual"]),
    ),
    Claim(
        name="decay-aligns",
        statement="Weight decay drives ⟨B, w_out⟩ to |w_in|² + b²: in the end it aligns every neuron that is alive.",
        origin="theory",
        reference="Derived: at rest 0 = λ(⟨B, w_out⟩ - |w_in|² - b²)",
        method="Σ⟨B, w_out⟩ over Σ(|w_in|² + b²) of all hidden neurons at the end of a training with decay.",
        tolerance_reason="1 ± 0.1, for the noise of the batches and what is left of the start. " + _HALF,
        read=_rests,
        scope=pl.col("case") == "equilibrium",
    ),
)

_COLUMNS = 5


def _diagonals(data: pl.DataFrame) -> Figure:
    """Change of ½|W|² + ½|b|² against that of ⟨B, W⟩: a panel a rule, then a panel a departure; in rows by data set."""
    from matplotlib.lines import Line2D

    sets, kinds = each_of(data, "dataset"), _shown_kinds(data)
    rows = ceil(len(kinds) / _COLUMNS)
    left_over = [""] * (rows * _COLUMNS - len(kinds))
    titles = [
        title
        for name, _ in sets
        for title in (*(f"{rule}, {name}" if case == "plain" else case for case, rule in kinds), *left_over)
    ]
    figure, axes = panels(
        _COLUMNS,
        rows * len(sets),
        titles=titles,
        xlabels=["change of ⟨B, W⟩"],
        ylabels=["change of ½|W|² + ½|b|²"] * rows * len(sets),
        height=2.2,
    )
    deepest = int(data["depth"].to_numpy().max())
    colours = sequence(deepest + 1)
    for index, (_, whole) in enumerate(sets):
        for panel, (case, rule) in zip(axes[index * rows * _COLUMNS :], kinds, strict=False):
            runs = whole.filter((pl.col("case") == case) & (pl.col("rule") == rule)).sort("step")
            _draw_diagonal(panel, runs, colours)
    for panel in axes:
        panel.set_visible(panel.has_data())
    handles = [Line2D([], [], color=colour, marker="o", label=f"layer {k + 1}") for k, colour in enumerate(colours)]
    handles.append(Line2D([], [], color=INK, linestyle=(0, (4, 2.5)), linewidth=1.2, label="the law"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _draw_diagonal(panel: Axes, data: pl.DataFrame, colours: list[str]) -> None:
    """One line a network and layer, from no change to the end of training."""
    low, high = 0.0, 0.0
    for (model, _, depth), layer in data.group_by(["model", "layer", "depth"], maintain_order=True):
        x, y = [0.0, *layer["outgoing_change"]], [0.0, *layer["incoming_change"]]
        open_ = "none" if _convolutional(str(model)) else "full"
        panel.plot(x, y, color=colours[int(str(depth))], marker="o", markersize=4, fillstyle=open_, linewidth=1.0)
        low, high = min(low, *x, *y), max(high, *x, *y)
    law(panel, [low, high], [low, high], "the law")


def _diagonal(table: pl.DataFrame) -> pl.DataFrame:
    """Changes of both sides along the training of the first seed at the smallest rate, a row a record and layer."""
    shown = (pl.col("seed") == 0) & (pl.col("case") != "equilibrium") & (pl.col("rate") == pl.col("rate").min())
    keys = [*_KIND, "layer", "depth", "step"]
    return table.filter(shown).select(*keys, "incoming_change", "outgoing_change").sort(keys)


def _drifts(table: pl.DataFrame) -> pl.DataFrame:
    """Σ|C(T) - C(0)| over all neurons at the end, by rate."""
    runs = _off_diagonal(table.filter(pl.col("case") != "equilibrium"))
    return summary(runs, "apart", by=_POINT)


CONSERVATION = Experiment(
    name="robertson2024.conservation",
    title="The conservation law under practical training",
    source="Robertson and Koyejo 2024, abstract (“a novel conservation law”); the discrete identity is derived",
    revision=1,
    grid={
        "smoke": _points("mlp:16-16", (0.8, 0.4), rest=20, dataset="digits", images=200),
        "quick": _points("mlp:64-64", (0.1, 0.05, 0.025), rest=1000, dataset="digits", images=1437),
        "paper": tuple(
            point
            for name, images in (("mnist", 60000), ("fashion-mnist", 60000), ("mnist-10k", 9000))
            for point in _points("mlp:256-256", (0.1, 0.05, 0.025, 0.0125), rest=5000, dataset=name, images=images)
        ),
    },
    seeds={"smoke": 2, "quick": 5, "paper": 5},
    run=_run,
    agreement=1e-9,
    together=("case", "rule", "model", "rate", "steps", "batch"),
    at_most=8,
    cost=lambda *, steps: float(steps),
    pictures=(
        Picture(
            name="conservation",
            caption="Change of ½|W|² + ½|b|² of each layer against that of ⟨B, W⟩ of the layer that it feeds, along "
            "training at the smallest rate; one seed. Under plain descent the law puts them on the diagonal but for "
            "½Ση²|g|². Filled: perceptron; open: convolutions. usf has Σ|B||W|, kp ⟨B, W⟩ - ½|W|² in place of ⟨B, W⟩; "
            "adafa's own motion of B takes it off the diagonal.",
            data=_diagonal,
            draw=_diagonals,
        ),
        Picture(
            name="conservation-rates",
            caption="What the neurons drift from the law, Σ|C(T) - C(0)|, against η for trainings of the same length "
            "in η × steps (momentum and Adam: the η of plain descent beside which they are put); mean ± standard "
            "deviation. Where the law holds in the limit it falls as η. Filled: perceptron; open: convolutions.",
            data=_drifts,
            draw=_draw_drifts,
        ),
    ),
    claims=_CLAIMS,
)
