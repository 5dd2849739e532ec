"""Alignment dominance along training from four starts, and the loss that it predicts."""

from collections.abc import Sequence

import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from falign import init
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
from falign.lab.experiment.statistics import above_zero, mean, sorted_groups, summary
from falign.lab.report.style import AXIS, COLOURS, INK, Axes, Figure, band, each_of, legend, logarithmic, panels
from falign.measure import Alignment, alignment
from falign.papers._images import load_images
from falign.papers.robertson2024._training import Record, Training, start_training, train_and_measure, with_images
from falign.theory.dominance import largest_kappa, lojasiewicz_constant, predicted_loss

__all__ = ["DOMINANCE"]

_STARTS = ("dominant", "small", "generic", "anti")
_RULE_STARTS = {"fa": _STARTS, "usf": _STARTS[:-1]}
"""Of each rule; feedback with the signs of the weights has no start against it."""


def _points(dataset: str, models: Sequence[str], **sizes: Scalar) -> tuple[Point, ...]:
    """All starts of feedback alignment for every network, and those of sign feedback for the first."""
    return tuple(
        point
        for model in models
        for rule, starts in _RULE_STARTS.items()
        if rule == "fa" or model == models[0]
        for point in grid(dataset=dataset, model=model, rule=rule, start=starts, scale=1.0, **sizes)
    )


def _run(
    *,
    seed: int,
    setting: Setting,
    dataset: str,
    images: int,
    model: str,
    rule: str,
    start: str,
    scale: float,
    rate: float,
    steps: int,
) -> Outcome:
    """Train a network from a named start in full-batch steps, and record alignment and loss at every step."""
    training = start_training(
        with_images(load_images(dataset, setting), images, seed),
        seed,
        setting,
        dataset=dataset,
        model=model,
        rule=rule,
        rate=rate,
        batch=images,
        scale=scale,
    )
    network = training.learner.model
    x, y = training.train.take(slice(None))
    # The learner's weights are replaced: only these starts follow from the conservation law.
    init.SCHEMES[start](network, example=x[:2], seed=seed)
    promised = init.aligned_forever(network, example=x[:2])

    def measure(done: int) -> list[Record]:
        measured = alignment(network, cross_entropy, x, y)
        return [
            {
                "loss": measured.loss,
                "descent": measured.descent,
                "dominance": measured.dominance,
                "output_gradient": measured.layers[-1].gradient_norm,
                **_neurons(training, measured, promised),
            }
        ]

    return train_and_measure(training, range(steps + 1), measure)


def _neurons(training: Training, measured: Alignment, promised: dict[str, Tensor]) -> dict[str, float]:
    """Shares of the hidden neurons: aligned; aligned for ever by the law; of these, not aligned all the same."""
    follower = dict(zip(training.learner.layers, training.learner.layers[1:], strict=False))
    products = torch.cat([measured.neurons[follower[name]].cpu() for name in promised])
    forever = torch.cat([each.cpu() for each in promised.values()])
    broken = (forever & (products < 0)).sum() / forever.sum().clamp(min=1)
    shares = {"aligned": (products > 0).double().mean(), "promised": forever.double().mean(), "broken": broken}
    return {name: float(share) for name, share in shares.items()}


_POINT = ["dataset", "model", "rule", "start"]
_RUN = [*_POINT, "seed"]
_DEEP = pl.col("model").str.contains("-")


def _predicted(table: pl.DataFrame) -> pl.DataFrame:
    """Records with the loss that the split of its descent sums up to, and the most that dominance allows.

    ``integrated``: ``L(0) - Σ η Σ_l ⟨g_l, f_l⟩``. ``bound``: the lower of ``L(0) exp(-κμ₁t)`` and
    ``L(0)/(1 + κμ₂L(0)t)`` with the run's ``κ = 1 + min D`` and ``μ_a = min |g_L|²/Lᵃ``; null where κ ≤ 0.
    ``rise``: what the next step adds to the loss, null at the end.
    """
    steps = (pl.col("rate") * pl.col("descent")).shift(1, fill_value=0.0).cum_sum()
    rows = table.sort("step").with_columns(
        integrated=(pl.col("loss").first() - steps).over(_RUN, order_by="step"),
        rise=(pl.col("loss").shift(-1) - pl.col("loss")).over(_RUN, order_by="step"),
    )
    runs = [_bounded(run) for _, run in rows.group_by(_RUN, maintain_order=True)]
    return pl.concat(runs).sort([*_RUN, "step"])


def _bounded(run: pl.DataFrame) -> pl.DataFrame:
    loss, dominance, gradient, step = (
        torch.from_numpy(run[name].to_numpy().copy()).double().unsqueeze(0)
        for name in ("loss", "dominance", "output_gradient", "step")
    )
    # Neither bound is the lower one throughout: which inequality is the tighter one changes along the run.
    kappa, time = largest_kappa(dominance), run["rate"][0] * step[0]
    shown: list[float | None] = [None] * step.shape[1]
    if kappa > 0:
        bounds = [
            predicted_loss(loss[:, 0], time, kappa=kappa, mu=lojasiewicz_constant(loss, gradient, a), exponent=a)[0]
            for a in (1.0, 2.0)
        ]
        shown = torch.minimum(*bounds).tolist()
    return run.with_columns(pl.Series("bound", shown, dtype=pl.Float64), kappa=float(kappa))


def _by_point(table: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """[("digits, mlp:100, fa, small", its records)]."""
    return [(", ".join(str(value) for value in values), runs) for values, runs in sorted_groups(table, _POINT)]


def _never_rises(table: pl.DataFrame, where: pl.Expr | bool = True) -> Evidence:
    """Share of the steps, of those where something holds before them, that raise the loss."""
    checks = []
    for label, runs in _by_point(_predicted(table)):
        rises = runs.filter(where)["rise"].drop_nulls().to_numpy() > 0
        if not rises.size:
            raise Missing(f"{label}: D is never above -1")
        checks.append(Check(label=f"{label}: share of {rises.size} steps", measured=float(rises.mean()), high=0.0))
    return Evidence(checks=tuple(checks))


def _dominates(table: pl.DataFrame) -> Evidence:
    checks = (
        Check(label=f"{label}: least D of all steps", measured=float(runs["dominance"].to_numpy().min()), low=-1.0)
        for label, runs in _by_point(table)
    )
    return Evidence(checks=tuple(checks))


def _recovers(table: pl.DataFrame) -> Evidence:
    estimates = []
    for label, runs in _by_point(table.sort("step")):
        loss = runs.group_by("seed").agg(
            rise=pl.col("loss").max() / pl.col("loss").first() - 1,
            fall=1 - pl.col("loss").last() / pl.col("loss").first(),
        )
        for value, words in (("rise", "highest loss over the first, less 1"), ("fall", "1 less last loss over first")):
            estimates.append((f"{label}: {words}", mean(loss[value], of=f"{label}: {words}")))
    return above_zero(estimates)


def _integrates(table: pl.DataFrame) -> Evidence:
    checks = []
    for label, runs in _by_point(_predicted(table)):
        ends = runs.group_by("seed").agg(
            ratio=(pl.col("loss").first() - pl.col("integrated").last())
            / (pl.col("loss").first() - pl.col("loss").last())
        )
        checks.append(Check(label=label, measured=mean(ends["ratio"], of=label).value, low=0.9, high=1.1))
    return Evidence(checks=tuple(checks))


def _bounds(table: pl.DataFrame) -> Evidence:
    checks = []
    for label, rows in _by_point(_predicted(table)):
        there = rows.filter(pl.col("bound").is_not_null())
        if there.is_empty():
            continue
        over = (there["loss"] / there["bound"]).to_numpy()
        runs = f"{there['seed'].n_unique()} of {rows['seed'].n_unique()} runs with κ > 0"
        checks.append(Check(label=f"{label}: most loss over bound, {runs}", measured=float(over.max()), high=1.001))
    if not checks:
        raise Missing("no run has κ > 0")
    return Evidence(checks=tuple(checks))


def _kept(table: pl.DataFrame) -> Evidence:
    checks = []
    for label, runs in _by_point(table):
        promised = runs.filter(pl.col("step") == 0)["promised"].to_numpy().mean()
        if promised:
            words = f"{label}: most that is broken at a step ({promised:.0%} are promised)"
            checks.append(Check(label=words, measured=float(runs["broken"].to_numpy().max()), high=0.0))
    if not checks:
        raise Missing("no neuron is promised to stay aligned")
    return Evidence(checks=tuple(checks))


_ABSTRACT = "Abstract: “sufficient conditions for convergence based on the concept of alignment dominance”. "

_CLAIMS = (
    Claim(
        name="dominance-suffices",
        statement="Where alignment dominates, D = Σ_(l<L) ⟨g_l, f_l⟩/|g_L|² > -1, the loss falls.",
        reference=_ABSTRACT + "The definition is a reconstruction",
        quotation="sufficient conditions for convergence based on the concept of alignment dominance",
        method="Share of the steps with D > -1 before them that raise the loss; full batches, one step after the "
        "other.",
        tolerance_reason="None: -dL/dt = (1 + D)|g_L|² in gradient flow. Steps that are not small can break it.",
        read=lambda table: _never_rises(table, pl.col("dominance") > -1),
    ),
    Claim(
        name="dominance-bounds-the-loss",
        statement="Alignment dominance with κ and a gradient inequality |g_L|² ≥ μLᵃ bound the loss: "
        "L(t) ≤ L(0) exp(-κμt) for a = 1, L(0)/(1 + κμL(0)t) for a = 2.",
        reference=_ABSTRACT
        + "“Exponential or generalized decay” by a summary of the paper; the constants are measured",
        quotation="sufficient conditions for convergence based on the concept of alignment dominance",
        method="Most loss over the lower of the two bounds, each run's own κ = 1 + min D and μ = min |g_L|²/Lᵃ; runs "
        "with κ > 0.",
        tolerance_reason="At most 1 in gradient flow; 0.001 for the curvature that a step meets.",
        read=_bounds,
    ),
    Claim(
        name="split-predicts-the-loss",
        statement="The decrease of the loss is the sum of the layers' alignment × gradient × feedback components.",
        reference="The components by a summary of the paper; the formula -dL/dt = Σ cos∠(g_l, f_l)|g_l||f_l| is "
        "derived",
        headline="decrease of the loss over its prediction",
        method="Σ η Σ_l ⟨g_l, f_l⟩ over all steps, over the decrease of the loss; mean over the seeds.",
        tolerance_reason="1 ± 0.1: exact in gradient flow, and of first order in η for steps; at half the rate the "
        "differences are halved.",
        read=_integrates,
    ),
    Claim(
        name="dominant-start-descends",
        statement="From the dominant start, where the law keeps every neuron aligned for ever, the loss never rises.",
        origin="theory",
        reference="Derived; “certain initialization schemes” by a summary of the paper",
        method="Share of the steps that raise the loss.",
        tolerance_reason="None.",
        read=_never_rises,
        scope=pl.col("start") == "dominant",
    ),
    Claim(
        name="starts-dominate",
        statement="Alignment dominates throughout from the dominant and from the small start.",
        origin="theory",
        reference="Derived: C is at most, or nearly, 0 for every neuron, so that ⟨B, W⟩ is at least, or nearly, 0",
        method="Least D of all steps and runs.",
        tolerance_reason="Above -1.",
        read=_dominates,
        scope=pl.col("start").is_in(["dominant", "small"]),
    ),
    Claim(
        name="anti-rises-and-recovers",
        statement="From W = -B the loss rises at first and recovers later.",
        origin="theory",
        reference="Derived, and seen in two-layer networks; not in what is readable of the paper",
        method="Highest and last loss against the first; networks with one hidden layer.",
        tolerance_reason="Above 0 with 99 % confidence (Student's t over the seeds, both together).",
        read=_recovers,
        scope=(pl.col("start") == "anti") & ~_DEEP,
    ),
    Claim(
        name="anti-rises-deep",
        statement="From W = -B the loss rises at first and recovers later with two hidden layers as well.",
        origin="beyond",
        reference="Not in the paper: how far the statement goes. Two reversals in a row are none for the first layer",
        method="As for anti-rises-and-recovers.",
        tolerance_reason="As for anti-rises-and-recovers.",
        read=_recovers,
        scope=(pl.col("start") == "anti") & _DEEP,
    ),
    Claim(
        name="aligned-for-ever",
        statement="The law maintains alignment: a neuron with ½|w_in|² + ½b² ≤ ⟨B, w_out⟩ at the start stays aligned, "
        "⟨B, w_out⟩ > 0.",
        reference="Abstract: a conservation law “linking changes in synaptic weights to implicit regularization that "
        "maintains alignment”; the bound is derived",
        quotation="a novel conservation law linking changes in synaptic weights to implicit regularization that "
        "maintains alignment with the gradient",
        method="Of the neurons that the start promises to stay aligned, the share that is not, at the worst step.",
        tolerance_reason="None.",
        read=_kept,
    ),
)

_COLOUR: dict[str, str] = dict(zip(_STARTS, (COLOURS[2], COLOURS[0], COLOURS[5], COLOURS[1]), strict=True))


def _dominance_and_loss(data: pl.DataFrame) -> Figure:
    """D above, losses below, by step; a column a network and rule, a pair of rows a data set."""
    sets = each_of(data, "dataset")
    cases = sorted(data.select("rule", "model").unique().rows())
    figure, axes = panels(
        len(cases),
        2 * len(sets),
        titles=[
            text
            for name, _ in sets
            for text in (
                *(f"{name}, {rule}, {model.removeprefix('mlp:')}" for rule, model in cases),
                *("" for _ in cases),
            )
        ],
        xlabels=["step"],
        ylabels=["dominance D", "loss"] * len(sets),
        share="row",
        height=2.6,
    )
    for row, (_, whole) in enumerate(sets):
        for column, (rule, model) in enumerate(cases):
            runs = whole.filter((pl.col("rule") == rule) & (pl.col("model") == model)).sort("step")
            above, below = (axes[(2 * row + part) * len(cases) + column] for part in (0, 1))
            _dominance(above, runs.filter(pl.col("shown") == "dominance"))
            _losses(below, runs)
    for style, label in (("--", "Σ η ⟨g, f⟩ predicts"), (":", "bound")):
        axes[-1].plot([], [], color=INK, linestyle=style, linewidth=1.1, label=label)
    legend(figure)
    return figure


def _dominance(panel: Axes, data: pl.DataFrame) -> None:
    for name, runs in each_of(data, "start", _STARTS):
        spread = runs["sd"].fill_null(0)
        band(
            panel,
            runs["step"],
            runs["mean"],
            runs["mean"] - spread,
            runs["mean"] + spread,
            label=name,
            colour=_COLOUR[name],
        )
    panel.set_yscale("symlog", linthresh=1)
    panel.axhspan(-1e3, -1, color=AXIS, alpha=0.2, linewidth=0, zorder=0)
    panel.set_ylim(-4, 15)
    panel.set_yticks([-3, -1, 0, 1, 3, 10], labels=["-3", "-1", "0", "1", "3", "10"])
    panel.minorticks_off()


def _losses(panel: Axes, data: pl.DataFrame) -> None:
    for name, runs in each_of(data, "start", _STARTS):
        colour = _COLOUR[name]
        for shown, style in (("bound", ":"), ("integrated", "--"), ("loss", "-")):
            line = runs.filter((pl.col("shown") == shown) & (pl.col("mean") > 0))
            panel.plot(
                line["step"], line["mean"], color=colour, linestyle=style, linewidth=1.7 if style == "-" else 1.1
            )
    logarithmic(panel, "y")


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    runs = _predicted(table)
    shown = ("dominance", "loss", "integrated", "bound")
    parts = [summary(runs, value, by=[*_POINT, "step"]).with_columns(shown=pl.lit(value)) for value in shown]
    return pl.concat(parts).filter(pl.col("mean").is_not_null())


DOMINANCE = Experiment(
    name="robertson2024.dominance",
    title="Alignment dominance from four starts",
    source="Robertson and Koyejo 2024, abstract (“alignment dominance”); its definition is a reconstruction",
    revision=1,
    grid={
        "smoke": _points("digits", ("mlp:30", "mlp:30-30"), images=60, rate=0.1, steps=10),
        "quick": _points("digits", ("mlp:100", "mlp:100-100"), images=300, rate=0.1, steps=120),
        "paper": tuple(
            point
            for dataset in ("mnist", "fashion-mnist", "mnist-10k")
            for point in _points(dataset, ("mlp:500", "mlp:500-500"), images=1000, rate=0.05, steps=1000)
        ),
    },
    seeds={"smoke": 2, "quick": 5, "paper": 10},
    run=_run,
    agreement=1e-4,
    together=("model", "rule", "start"),
    at_most=8,
    cost=lambda *, steps, images: float(steps * images),
    pictures=(
        Picture(
            name="dominance",
            caption="Alignment dominance D = Σ ⟨g_l, f_l⟩/|g_L|² of the hidden layers along training; below -1 (grey) "
            "the loss rises. Under it the loss, what the sum of η Σ ⟨g_l, f_l⟩ predicts (dashed), and the lower of the "
            "bounds L(0) exp(-κμt) and L(0)/(1 + κμL(0)t) with the run's own constants (dotted, where κ > 0). Mean ± "
            "standard deviation.",
            data=_picture_data,
            draw=_dominance_and_loss,
        ),
    ),
    claims=_CLAIMS,
)
