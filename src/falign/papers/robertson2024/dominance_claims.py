"""What is stated of alignment dominance, and how it is judged."""

import polars as pl
import torch

from falign.lab.experiment import Check, Claim, Missing, Reading
from falign.lab.experiment.statistics import Estimate, mean
from falign.theory.dominance import largest_kappa, lojasiewicz_constant, predicted_loss

_POINT = ["dataset", "model", "rule", "start"]
_RUN = [*_POINT, "seed"]
_DEEP = pl.col("model").str.contains("-")


def predicted(table: pl.DataFrame) -> pl.DataFrame:
    """Records with the loss that the split of its descent sums up to, and the most that dominance allows.

    ``integrated``: ``L(0) - Σ η Σ_l ⟨g_l, f_l⟩``. ``bound``: the lower of ``L(0) exp(-κμ₁t)`` and
    ``L(0)/(1 + κμ₂L(0)t)`` with the run's own ``κ = 1 + min D`` and ``μ_a = min |g_L|²/Lᵃ``; null where κ ≤ 0.
    ``rise``: what the next step adds to the loss, null at the end.
    """
    steps = (pl.col("rate") * pl.col("descent")).shift(1, fill_value=0.0).cum_sum()
    found = table.sort("step").with_columns(
        integrated=(pl.col("loss").first() - steps).over(_RUN, order_by="step"),
        rise=(pl.col("loss").shift(-1) - pl.col("loss")).over(_RUN, order_by="step"),
    )
    runs = [_bounded(run) for _, run in found.group_by(_RUN, maintain_order=True)]
    return pl.concat(runs).sort([*_RUN, "step"])


def _bounded(run: pl.DataFrame) -> pl.DataFrame:
    loss, dominance, gradient, step = (
        torch.from_numpy(run[name].to_numpy().copy()).double().unsqueeze(0)
        for name in ("loss", "dominance", "output_gradient", "step")
    )
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
    groups = table.sort(_POINT).group_by(_POINT, maintain_order=True)
    return [(", ".join(str(value) for value in values), own) for values, own in groups]


def _never_rises(table: pl.DataFrame) -> Reading:
    checks = []
    for label, own in _by_point(predicted(table)):
        rises = own["rise"].drop_nulls().to_numpy() > 0
        checks.append(Check(label=f"{label}: share of {rises.size} steps", measured=float(rises.mean()), high=0.0))
    return Reading(checks=tuple(checks))


def _dominates(table: pl.DataFrame) -> Reading:
    checks = (
        Check(label=f"{label}: least D of all steps", measured=float(own["dominance"].to_numpy().min()), low=-1.0)
        for label, own in _by_point(table)
    )
    return Reading(checks=tuple(checks))


def _suffices(table: pl.DataFrame) -> Reading:
    checks = []
    for label, own in _by_point(predicted(table)):
        rises = own.filter(pl.col("dominance") > -1)["rise"].drop_nulls().to_numpy() > 0
        if not rises.size:
            raise Missing(f"{label}: D is never above -1")
        checks.append(Check(label=f"{label}: share of {rises.size} steps", measured=float(rises.mean()), high=0.0))
    return Reading(checks=tuple(checks))


def _recovers(table: pl.DataFrame) -> Reading:
    groups = _by_point(table.sort("step"))
    checks = []
    for label, own in groups:
        loss = own.group_by("seed").agg(
            rise=pl.col("loss").max() / pl.col("loss").first() - 1,
            fall=1 - pl.col("loss").last() / pl.col("loss").first(),
        )
        for value, words in (("rise", "highest loss over the first, less 1"), ("fall", "1 less last loss over first")):
            found = mean(loss[value], of=f"{label}: {words}")
            checks.append(Check(label=f"{label}: {words}", measured=found.value, low=found.above(2 * len(groups))))
    return Reading(checks=tuple(checks))


def _integrates(table: pl.DataFrame) -> Reading:
    checks = []
    for label, own in _by_point(predicted(table)):
        ends = own.group_by("seed").agg(
            ratio=(pl.col("loss").first() - pl.col("integrated").last())
            / (pl.col("loss").first() - pl.col("loss").last())
        )
        found: Estimate = mean(ends["ratio"], of=label)
        checks.append(Check(label=label, measured=found.value, low=0.9, high=1.1))
    return Reading(checks=tuple(checks))


def _bounds(table: pl.DataFrame) -> Reading:
    checks = []
    for label, own in _by_point(predicted(table)):
        there = own.filter(pl.col("bound").is_not_null())
        if there.is_empty():
            continue
        over = (there["loss"] / there["bound"]).to_numpy()
        runs = f"{there['seed'].n_unique()} of {own['seed'].n_unique()} runs with κ > 0"
        checks.append(Check(label=f"{label}: most loss over bound, {runs}", measured=float(over.max()), high=1.001))
    if not checks:
        raise Missing("no run has κ > 0")
    return Reading(checks=tuple(checks))


def _kept(table: pl.DataFrame) -> Reading:
    checks = []
    for label, own in _by_point(table):
        promised = own.filter(pl.col("step") == 0)["promised"].to_numpy().mean()
        if promised:
            words = f"{label}: most that is broken at a step ({promised:.0%} are promised)"
            checks.append(Check(label=words, measured=float(own["broken"].to_numpy().max()), high=0.0))
    if not checks:
        raise Missing("no neuron is promised to stay aligned")
    return Reading(checks=tuple(checks))


_ABSTRACT = "Abstract: “sufficient conditions for convergence based on the concept of alignment dominance”. "

CLAIMS = (
    Claim(
        name="dominance-suffices",
        statement="Where alignment dominates, D = Σ_(l<L) ⟨g_l, f_l⟩/|g_L|² > -1, the loss falls.",
        place=_ABSTRACT + "The definition is a reconstruction",
        how="Share of the steps with D > -1 before them that raise the loss; full batches, one step after the other.",
        because="None: -dL/dt = (1 + D)|g_L|² in gradient flow. Steps that are not small can break it.",
        read=_suffices,
    ),
    Claim(
        name="dominance-bounds-the-loss",
        statement="Alignment dominance with κ and a gradient inequality |g_L|² ≥ μLᵃ bound the loss: "
        "L(t) ≤ L(0) exp(-κμt) for a = 1, L(0)/(1 + κμL(0)t) for a = 2.",
        place=_ABSTRACT + "“Exponential or generalized decay” by a summary of the paper; the constants are measured",
        how="Most loss over the lower of the two bounds, each run's own κ = 1 + min D and μ = min |g_L|²/Lᵃ; runs with "
        "κ > 0.",
        because="At most 1 in gradient flow; 0.001 for the curvature that a step meets.",
        read=_bounds,
    ),
    Claim(
        name="split-predicts-the-loss",
        statement="The decrease of the loss is the sum of the layers' alignment × gradient × feedback components.",
        place="The components by a summary of the paper; the formula -dL/dt = Σ cos∠(g_l, f_l)|g_l||f_l| is derived",
        how="Σ η Σ_l ⟨g_l, f_l⟩ over all steps, over the decrease of the loss; mean over the seeds.",
        because="1 ± 0.1: exact in gradient flow, and of first order in η for steps; at half the rate the differences "
        "are halved.",
        read=_integrates,
    ),
    Claim(
        name="dominant-start-descends",
        statement="From the dominant start, where the law keeps every neuron aligned for ever, the loss never rises.",
        place="Derived; “certain initialization schemes” by a summary of the paper",
        how="Share of the steps that raise the loss.",
        because="None.",
        read=_never_rises,
        scope=pl.col("start") == "dominant",
    ),
    Claim(
        name="starts-dominate",
        statement="Alignment dominates throughout from the dominant and from the small start.",
        place="Derived: C is at most, or nearly, 0 for every neuron, so that ⟨B, W⟩ is at least, or nearly, 0",
        how="Least D of all steps and runs.",
        because="Above -1.",
        read=_dominates,
        scope=pl.col("start").is_in(["dominant", "small"]),
    ),
    Claim(
        name="anti-rises-and-recovers",
        statement="From W = -B the loss rises at first and recovers later.",
        place="Derived, and seen in two-layer networks; not in what is readable of the paper",
        how="Highest and last loss against the first; networks with one hidden layer.",
        because="Above 0 with 99 % confidence (Student's t over the seeds, both together).",
        read=_recovers,
        scope=(pl.col("start") == "anti") & ~_DEEP,
    ),
    Claim(
        name="anti-rises-deep",
        statement="From W = -B the loss rises at first and recovers later with two hidden layers as well.",
        place="Not in the paper: how far the statement goes. Two reversals in a row are none for the first layer",
        how="As for anti-rises-and-recovers.",
        because="As for anti-rises-and-recovers.",
        read=_recovers,
        scope=(pl.col("start") == "anti") & _DEEP,
    ),
    Claim(
        name="aligned-for-ever",
        statement="The law maintains alignment: a neuron with ½|w_in|² + ½b² ≤ ⟨B, w_out⟩ at the start stays aligned, "
        "⟨B, w_out⟩ > 0.",
        place="Abstract: a conservation law “linking changes in synaptic weights to implicit regularization that "
        "maintains alignment”; the bound is derived",
        how="Of the neurons that the start promises to stay aligned, the share that is not, at the worst step.",
        because="None.",
        read=_kept,
    ),
)
