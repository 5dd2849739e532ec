"""Forward and feedback matrices that come closer, step by step: FA and FA*."""

from collections.abc import Sequence

import polars as pl
import torch

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Picture, Point, Scalar, Setting
from falign.lab.experiment.statistics import around, final, mean, slope
from falign.lab.report.style import AXIS, Figure, band, each_of, legend, logarithmic, panels
from falign.papers.garg2022._shared import (
    groups,
    largest_in_groups,
    matrix,
    methods,
    outcomes,
    quartiles,
    sample_feedback,
    train,
)
from falign.theory.two_layer import spaced

__all__ = ["ALIGNMENT"]

_RATE = 0.2


def _points(data: str, *, time: float, scale: float, **sizes: Scalar) -> tuple[Point, ...]:
    """FA from zero and from a random start, FA* from orthonormal rows, at three step sizes, as long in η × steps."""
    return tuple(
        {"data": data, "method": method, "scale": start, "rate": rate, "steps": round(time / rate), **sizes}
        for method, start in (("fa", 0.0), ("fa", scale), ("fa*", 1.0))
        for rate in (_RATE, _RATE / 2, _RATE / 4)
    )


_NAMES = ("error", "alignment", "cosine", "weighted", "lyapunov", "account", "gram drift")


def _run(
    *,
    seeds: Sequence[int],
    setting: Setting,
    data: str,
    n: int,
    m: int,
    rank: int,
    r: int,
    method: str,
    scale: float,
    rate: float,
    steps: int,
) -> list[Outcome]:
    """Train the draws of a block together and record every step."""
    Y = matrix(data, n, m, setting, rank=rank).to(setting.device)
    B, at = sample_feedback(seeds, Y, r), list(range(steps + 1))
    trajectory = train(seeds, Y, B, method=method, scale=scale, rate=rate, at=at, names=_NAMES, progress=setting.report)
    columns = {name.replace(" ", "_"): trajectory.values[name] for name in _NAMES}
    nuclear = torch.linalg.svdvals(B @ Y).sum(-1)[:, None].expand(-1, len(at))
    return outcomes(at, {**columns, "error": columns["error"] / Y.norm(), "nuclear": nuclear})


_RUN = ["data", "method", "scale", "rate"]
_KIND = _RUN[:-1]
_TOLERANCE = 1e-8
"""Fall of tr(BZ) in a step that steps of finite size may cause: WWᵀ, constant in the flow, drifts with η."""
_VISIBLE = 1e-6
"""A rise or fall by that share counts."""
_STAR, _FA = (pl.col("method") == method for method in ("fa*", "fa"))
_ZERO = pl.col("scale") == 0


def _steps(table: pl.DataFrame) -> pl.DataFrame:
    """The records, with what each column gains in the next step as ``column_gain``; the last record has none."""
    gains = (
        (pl.col(name).shift(-1) - pl.col(name)).over([*_RUN, "seed"], order_by="step").alias(f"{name}_gain")
        for name in ("alignment", "weighted", "lyapunov", "error", "cosine")
    )
    return table.with_columns(*gains).filter(pl.col("step") < pl.col("steps"))


def _closer(table: pl.DataFrame) -> Evidence:
    """Gains of alignment and its cosine from start to end; at Z = 0 they are 0."""
    keys = [*_RUN, "seed"]
    finest = table.filter(pl.col("rate") == pl.col("rate").min()).sort("step")
    ends = finest.group_by(keys, maintain_order=True).agg(
        gain=pl.col("cosine").last() - pl.col("cosine").first().fill_null(0),
        end=pl.col("cosine").last(),
        least=pl.col("alignment").last() - pl.col("alignment").first(),
    )
    kinds = list(groups(ends, _KIND))
    checks = []
    for label, runs in kinds:
        estimate = mean(runs["gain"], of=label)
        name = f"{label}: cosine gained, to {runs['end'].to_numpy().mean():.2f}"
        checks.append(Check(label=name, measured=estimate.value, low=estimate.above(len(kinds))))
        checks.append(
            Check(label=f"{label}: least gain of tr(BZ)", measured=float(runs["least"].to_numpy().min()), low=0.0)
        )
    return Evidence(checks=tuple(checks))


def _monotone(table: pl.DataFrame) -> Evidence:
    return largest_in_groups(_steps(table), -pl.col("alignment_gain"), _RUN, _TOLERANCE)


def _facilitates(table: pl.DataFrame) -> Evidence:
    """Least |BR|² so far, over ``(|W(0)| + |W(t)|) |BY|_*/(η(t + 1))``."""
    # The rows of W(0) are orthonormal, so that |W(0)| = 1, and |W(t)|² is at most 1 + |W(t)W(t)ᵀ - I|.
    size = 1 + (1 + pl.col("gram_drift")).sqrt()
    bound = size * pl.col("nuclear") / (pl.col("rate") * pl.col("step"))
    # The bound at step t is on the steps before it, of which the record of t itself is not one.
    least = pl.col("lyapunov").shift().cum_min().over([*_RUN, "seed"], order_by="step")
    return largest_in_groups(
        table.with_columns(so_far=least).filter(pl.col("step") > 0), pl.col("so_far") / bound, _RUN, 1.0
    )


def _drift(table: pl.DataFrame) -> Evidence:
    ends = final(table, by=_RUN).with_columns(pl.col("rate").log(), drift=pl.col("gram_drift").log())
    exponents = [(f"{label}: exponent of η", slope(runs, "rate", "drift")) for label, runs in groups(ends, ["data"])]
    return around(exponents, 1, 0.1)


def _falls(table: pl.DataFrame) -> Evidence:
    initial = pl.col("lyapunov").first().over([*_RUN, "seed"], order_by="step")
    rows = _steps(table.with_columns(initial=initial))
    return largest_in_groups(rows, pl.col("lyapunov_gain") / pl.col("initial"), _RUN, 1e-12)


def _wavers(table: pl.DataFrame) -> Evidence:
    """Numbers of runs in which the error rises, and in which the cosine falls, in some step."""
    finest = _steps(table).filter(pl.col("rate") == pl.col("rate").min())
    runs = finest.group_by([*_KIND, "seed"]).agg(
        error=(pl.col("error_gain") > _VISIBLE).any(), cosine=(pl.col("cosine_gain") < -_VISIBLE).any()
    )
    return Evidence(
        checks=tuple(
            Check(label=f"runs in which the {what}", measured=float(runs[name].to_numpy().sum()), low=1.0)
            for name, what in (("error", "error rises"), ("cosine", "cosine falls"))
        ),
        note=f"of {runs.height} runs",
    )


_CLAIMS = (
    Claim(
        name="matrices-come-closer",
        statement="The forward weight matrices and the random feedback matrices come closer during FA updates.",
        reference="Abstract; in what measure is not readable",
        quotation="It is observed empirically that the forward weight matrices and (random) feedback matrices come "
        "closer during FA updates.",
        headline="cosine gained by forward and feedback matrices",
        method="Cosine of Z and Bᵀ at the end less that at the start, 0 for Z = 0; and what tr(BZ) gains, least over "
        "the draws. At the smallest η.",
        tolerance_reason="Above 0 with 99 % confidence (Student's t over the draws, all together); tr(BZ) in every "
        "draw.",
        read=_closer,
    ),
    Claim(
        name="feedback-error-falls",
        statement="From a zero start |BR|² never rises under FA, which makes it converge.",
        origin="theory",
        reference="Derived for the flow: V̇ = -2|BRWᵀ|² - |WᵀBR|² + tr(C BR(BR)ᵀ), C = 0",
        method="Largest rise of |BR|² in a step, as a share of its start.",
        tolerance_reason="At most 1e-12: rounding. Steps make C positive, of first order in η, which is not enough "
        "here.",
        read=_falls,
        scope=_FA & _ZERO,
    ),
    Claim(
        name="alignment-never-falls",
        statement="Under FA* from orthonormal rows of W alignment tr(BZ) never falls.",
        origin="theory",
        reference="Derived, for “rigorously derives this phenomenon” of the abstract: d tr(BZWWᵀ)/dt = |BR|², WWᵀ "
        "constant",
        method="Largest fall of tr(BZ) in a step.",
        tolerance_reason="At most 1e-8: in steps WWᵀ is constant up to first order in η only.",
        read=_monotone,
        scope=_STAR,
    ),
    Claim(
        name="alignment-facilitates-convergence",
        statement="That forward and feedback matrices come closer facilitates the convergence of FA*.",
        reference="Abstract; in this form derived: tr(BYWᵀ) grows by η|BR|² a step and is at most |W||BY|_*, so that "
        "min |BR|² = O(1/t)",
        quotation="Our analysis rigorously derives this phenomenon and shows how it facilitates convergence of FA*",
        method="min |BR|² of all steps so far over (|W(0)| + |W(t)|)|BY|_*/(ηt), |·|_* the sum of the singular values; "
        "the most over all steps.",
        tolerance_reason="At most 1.",
        read=_facilitates,
        scope=_STAR,
    ),
    Claim(
        name="gram-drift",
        statement="FA* conserves WWᵀ in the flow; steps make it drift to first order in η.",
        origin="theory",
        reference="Derived: a step adds η² BR(BR)ᵀ",
        method="Slope of log |WWᵀ - I| at the end against log η for runs as long in η × steps; one a draw.",
        tolerance_reason="1 ± 0.1. Half the 99 % interval over the draws (Student's t, all together) on top.",
        read=_drift,
        scope=_STAR,
    ),
    Claim(
        name="neither-error-nor-cosine-is-monotone",
        statement="Under FA* the error may rise and the cosine of Z and Bᵀ may fall: what never falls is tr(BZ) alone.",
        origin="theory",
        reference="Derived: no such law, and examples",
        method=f"Runs in which a step raises |R|/|Y|, or lowers the cosine, by more than {_VISIBLE:g}; smallest η.",
        tolerance_reason="At least one.",
        read=_wavers,
        scope=_STAR,
    ),
)

_DRAWN = {"alignment": "tr(BZ)", "cosine": "cos∠(Z, Bᵀ)", "lyapunov": "|BR|²", "error": "|R| / |Y|"}
"""Column -> its title in the picture."""


def _alignment_by_time(data: pl.DataFrame) -> Figure:
    """A row a matrix, a column a quantity."""
    sets = each_of(data, "data")
    titles = [
        f"{name}: {title}" if not column else title for name, _ in sets for column, title in enumerate(_DRAWN.values())
    ]
    figure, axes = panels(len(_DRAWN), len(sets), titles=titles, xlabels=["η × steps"], height=2.6)
    for row, (_, whole) in enumerate(sets):
        for panel, shown in zip(axes[len(_DRAWN) * row :], _DRAWN, strict=False):
            rows = whole.filter((pl.col("shown") == shown) & pl.col("median").is_not_null())
            timed = rows.with_columns(time=pl.col("rate") * pl.col("step")).filter(pl.col("time") > 0).sort("time")
            for style, runs in methods(timed):
                band(
                    panel,
                    runs["time"],
                    runs["median"],
                    runs["low"],
                    runs["high"],
                    label=style.label,
                    colour=style.colour,
                )
            logarithmic(panel, "x")
            if shown == "lyapunov":
                logarithmic(panel, "y")
            else:
                panel.axhline(0, color=AXIS, linewidth=0.8)
    legend(figure)
    return figure


_RECORDS = 50
"""Points of a line in the picture."""


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    """Median and quartiles of the draws at the smallest step size, at records dense early."""
    finest = table.filter(pl.col("rate") == pl.col("rate").min())
    kept = finest.filter(pl.col("step").is_in(spaced(int(finest["steps"][0]), _RECORDS)))
    keys = ["data", "method", "scale", "rate", "step"]
    return pl.concat(
        [
            kept.group_by(keys)
            .agg(
                shown=pl.lit(name),
                **quartiles(name),
            )
            .sort(keys)
            for name in _DRAWN
        ]
    )


ALIGNMENT = Experiment(
    name="garg2022.alignment",
    title="Forward and feedback matrices come closer",
    source="Garg and Vempala 2022; abstract",
    revision=1,
    grid={
        preset: tuple(
            point
            for name, m, scale in data
            for point in _points(name, n=n, m=m or n, rank=rank, r=r, time=time, scale=scale)
        )
        for preset, n, rank, r, time, data in (
            ("smoke", 12, 3, 5, 6.0, (("power law", 0, 0.02), ("digits", 64, 0.02))),
            ("quick", 60, 8, 12, 30.0, (("power law", 0, 0.02), ("digits", 64, 0.02))),
            (
                "paper",
                100,
                20,
                30,
                100.0,
                (("power law", 0, 0.02), ("digits", 64, 0.02), ("mnist", 784, 0.005), ("fashion-mnist", 784, 0.005)),
            ),
        )
    },
    seeds={"smoke": 2, "quick": 12, "paper": 50},
    run=_run,
    agreement=1e-7,
    cost=lambda *, steps: float(steps),
    pictures=(
        Picture(
            name="alignment",
            caption="tr(BZ) = ⟨Bᵀ, Z⟩, the cosine of Bᵀ and Z, |BR|² and the error over time η × steps, r > rank(Y): "
            "median and quartiles of the draws. From a zero start tr(BZ) = ½|W|², and |BR|² falls; under FA* from "
            "orthonormal rows tr(BZ) never falls, while the cosine and the error go up and down.",
            data=_picture_data,
            draw=_alignment_by_time,
        ),
    ),
    claims=_CLAIMS,
)
