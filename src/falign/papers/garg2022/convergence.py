"""Error against iteration where the inner dimension suffices: gradient descent, FA and FA*."""

from collections.abc import Sequence

import polars as pl
import torch

from falign.lab.experiment import Claim, Evidence, Experiment, Missing, Outcome, Picture, Point, Scalar, Setting
from falign.lab.experiment.statistics import around, final, slope
from falign.lab.report.style import Figure, facets, legend, logarithmic
from falign.papers.garg2022._shared import (
    above_gradient_descent,
    groups,
    initial_state,
    largest_in_groups,
    matrix,
    methods,
    outcomes,
    sample_feedback,
    train,
)
from falign.theory import factorisation
from falign.theory.two_layer import spaced

__all__ = ["CONVERGENCE"]


def _points(data: str, *, rank: int, steps: int, few: int, scale: float, **sizes: Scalar) -> tuple[Point, ...]:
    """All methods and starts for r = rank Y and half as much again, in steps; and for few of them beside the flow.

    Args:
        data: What is factored.
        rank: Of Y.
        steps: Length for the slowest, FA* with r = rank Y; a fifth of it is enough from zero, half of it else.
        few: Length of what is compared with continuous time.
        scale: Of the entries of a random start.
        sizes: Further values of every point.
    """
    same = {"data": data, "rank": rank, "rate": 0.4, **sizes}
    starts = (("fa", 0.0), ("fa", scale), ("fa*", 1.0), ("gd", scale))
    long = [
        {**same, "r": r, "method": method, "scale": start, "fine": 1, "steps": steps // share}
        for r, shares in ((rank, (5, 2, 1, 2)), (rank + rank // 2, (5, 2, 2, 2)))
        for (method, start), share in zip(starts, shares, strict=True)
    ]
    short = [
        {**same, "r": rank + rank // 2, "method": method, "scale": start, "fine": fine, "steps": few}
        for method, start in starts
        for fine in (0, 4, 16)  # 0 is the flow: two step sizes are enough for an exponent
    ]
    return (*long, *short)


_RECORDS = 50


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
    fine: int,
    steps: int,
) -> list[Outcome]:
    """Train the draws of a block together: in steps of η/fine, or, where fine is 0, in continuous time."""
    Y = matrix(data, n, m, setting, rank=rank).to(setting.device)
    B, at = sample_feedback(seeds, Y, r), spaced(steps, _RECORDS)
    if fine:
        finely = [fine * step for step in at]
        trajectory = train(
            seeds,
            Y,
            B,
            method=method,
            scale=scale,
            rate=rate / fine,
            at=finely,
            names=["error"],
            progress=setting.report,
        )
    else:
        times = rate * torch.tensor(at, dtype=torch.float64)
        state = initial_state(seeds, Y, B, method=method, scale=scale)
        trajectory = factorisation.gradient_flow(
            method, Y, B, state, times=times, names=["error"], progress=setting.report
        )
    return outcomes(at, {"error": trajectory.values["error"] / Y.norm()})


_LONG = pl.col("fine") == 1
"""The runs that are to converge; the others are short, beside the flow."""
_ZERO = pl.col("scale") == 0
_METHOD = pl.col("method")
_KIND = ["data", "method", "scale", "r"]
_REACHED, _NEAR = 1e-6, 0.01


def _ends(table: pl.DataFrame, high: float) -> Evidence:
    ends = final(table, by=_KIND)
    note = f"{table['seed'].n_unique()} draws a point, of all of them the median is {ends['error'].median():.1g}"
    return largest_in_groups(ends, pl.col("error"), _KIND, high, note)


def _first_below(table: pl.DataFrame, error: float) -> pl.DataFrame:
    """The first recorded step of each run at which the error is at most so much; null where it never is."""
    keys = [*_KIND, "seed"]
    return table.group_by(keys).agg(step=pl.col("step").filter(pl.col("error") <= error).min()).sort(keys)


def _slower(table: pl.DataFrame) -> Evidence:
    steps = _first_below(table, _NEAR)
    if steps["step"].has_nulls():
        raise Missing(f"{steps['step'].null_count()} runs did not come to an error of {_NEAR:g} in their steps")
    return above_gradient_descent(steps, "step", ["data", "r"])


def _order(table: pl.DataFrame) -> Evidence:
    """Slope of the logarithm of the largest gap to the flow against that of the step size."""
    keys = [*_KIND, "seed", "step"]
    flow = table.filter(pl.col("fine") == 0).select(*keys, limit="error")
    both = table.filter(pl.col("fine") > 0).join(flow, on=keys)
    gap = (pl.col("error") - pl.col("limit")).abs().max().log()
    gaps = both.group_by([*_KIND, "seed", "fine"]).agg(gap=gap).with_columns(rate=-pl.col("fine").log())
    kinds = groups(gaps, ["data", "method", "scale"])
    return around([(f"{label}: exponent of η", slope(runs, "rate", "gap")) for label, runs in kinds], 1, 0.1)


_ERROR_AT_END = "|ZW - Y|/|Y| at the end of a run; the most of all draws of B and of the start."

_SLOW = (
    f"At most {_NEAR:g}, which stands for 0: convergence is exponential, but for unlucky draws so slow that the length "
    "of the runs decides how small the error gets. "
)

_CLAIMS = (
    Claim(
        name="fa-reaches-the-optimum",
        statement="FA converges to the optimal solution when r ≥ rank(Y).",
        reference="Abstract. Its initialisation is not readable: taken is the zero start, from which this can be "
        "derived",
        quotation="We show that FA converges to the optimal solution when r ≥ rank(Y).",
        method=_ERROR_AT_END,
        tolerance_reason=f"At most {_REACHED:g}, which stands for 0.",
        read=lambda table: _ends(table, _REACHED),
        scope=_LONG & (_METHOD == "fa") & _ZERO,
    ),
    Claim(
        name="fa-reaches-it-from-random-starts",
        statement="FA converges to the optimal solution when r ≥ rank(Y), from a random start as well.",
        reference="Abstract, read for a start with small normal entries",
        quotation="We show that FA converges to the optimal solution when r ≥ rank(Y).",
        method=_ERROR_AT_END,
        tolerance_reason=_SLOW
        + "What Z(0) has outside the columns of Y decays at the rate λ_min(WWᵀ) only, and a direction of "
        "W(0) against its feedback has to turn.",
        read=lambda table: _ends(table, _NEAR),
        scope=_LONG & (_METHOD == "fa") & ~_ZERO,
    ),
    Claim(
        name="fa-star-reaches-the-optimum",
        statement="FA* converges, which forward and feedback matrices coming closer makes easy; when r ≥ rank(Y), to "
        "the optimum.",
        reference="Abstract; that FA* has the best output layer for its hidden one is a choice",
        quotation="convergence of FA*, a closely related variant of FA",
        method=_ERROR_AT_END,
        tolerance_reason=_SLOW + "Its rate is set by the least singular value of BY.",
        read=lambda table: _ends(table, _NEAR),
        scope=_LONG & (_METHOD == "fa*"),
    ),
    Claim(
        name="gd-reaches-the-optimum",
        statement="Gradient descent solves the problem optimally: r ≥ rank(Y).",
        reference="Abstract",
        quotation="Gradient descent solves this problem optimally.",
        method=_ERROR_AT_END,
        tolerance_reason=_SLOW + "Where r > rank(Y), what the start has in the surplus directions decays slowly.",
        read=lambda table: _ends(table, _NEAR),
        scope=_LONG & (_METHOD == "gd"),
    ),
    Claim(
        name="slower-than-gradient-descent",
        statement="FA converges more slowly than gradient descent.",
        reference="As Bordelon and Pehlevan cite the paper; not in its abstract",
        method=f"Recorded steps to an error of {_NEAR:g}|Y| over those of gradient descent, from the same random start "
        "at the same η; logarithm of the ratio.",
        tolerance_reason="Above 0 with 99 % confidence (Student's t over the draws, all together). The scale of B sets "
        "FA's unit of time: N(0, 1/n) is a choice.",
        read=_slower,
        scope=_LONG & _METHOD.is_in(["fa", "gd"]) & ~_ZERO,
    ),
    Claim(
        name="steps-follow-the-flow",
        statement="In small steps all three methods follow their continuous forms, to first order in η.",
        origin="theory",
        reference="Derived",
        method="Slope of the logarithm of the largest difference between the errors of steps and of gradient flow at "
        "the same times, against log η; one a draw, η = 0.1 and 0.025.",
        tolerance_reason="1 ± 0.1 for the next order, and half the 99 % interval over the draws (Student's t, all "
        "together) on top.",
        read=_order,
        scope=~_LONG,
    ),
)

_LEAST = 1e-16
"""Below it errors are rounding."""


def _errors_by_step(data: pl.DataFrame) -> Figure:
    """A column a matrix; above r = rank(Y), below more."""
    figure, matrices = facets(
        data,
        "data",
        2,
        titles=["{}, r = rank(Y)", "{}, r > rank(Y)"],
        xlabels=["step"],
        ylabels=["|ZW - Y| / |Y|"] * 2,
        share="all",
        height=2.9,
    )
    surplus = (pl.col("r") == pl.col("rank"), pl.col("r") > pl.col("rank"))
    for _, whole, axes in matrices:
        for panel, kept in zip(axes, surplus, strict=True):
            for style, runs in methods(whole.filter(kept & (pl.col("step") > 0))):
                steps, flow = (runs.filter(pl.col("fine") == fine).sort("step") for fine in (1, 0))
                panel.plot(steps["step"], steps["median"], color=style.colour, label=style.label)
                panel.plot(steps["step"], steps["most"], color=style.colour, linestyle=":", linewidth=1.2)
                dots = {"marker": "o", "markersize": 3.5, "linestyle": "none", "markevery": 3}
                panel.plot(flow["step"], flow["median"], color=style.colour, **dots)
            logarithmic(panel, "both")
            panel.set_ylim(_LEAST, 3)
    legend(figure)
    return figure


_KEYS = ["data", "method", "scale", "r", "rank", "fine", "step"]


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    """Median and largest error of the draws at every record."""
    shown = table.filter(_LONG | (pl.col("fine") == 0))
    return shown.group_by(_KEYS).agg(median=pl.col("error").median(), most=pl.col("error").max()).sort(_KEYS)


CONVERGENCE = Experiment(
    name="garg2022.convergence",
    title="Error against iteration, r ≥ rank(Y)",
    source="Garg and Vempala 2022; abstract",
    revision=1,
    grid={
        preset: (
            *_points("power law", n=n, m=n, rank=rank, steps=steps, few=few, scale=0.02),
            *(
                point
                for name, m in images
                for point in _points(name, n=n, m=m, rank=rank, steps=steps, few=few, scale=0.02 if m < 100 else 0.005)
            ),
        )
        for preset, n, rank, steps, few, images in (
            ("smoke", 12, 3, 1500, 10, (("digits", 64),)),
            ("quick", 40, 6, 10000, 50, (("digits", 64),)),
            ("paper", 100, 20, 200000, 200, (("digits", 64), ("mnist", 784), ("fashion-mnist", 784))),
        )
    },
    seeds={"smoke": 2, "quick": 10, "paper": 50},
    run=_run,
    agreement=1e-10,
    cost=lambda *, steps, fine: float(steps * max(fine, 10)),
    pictures=(
        Picture(
            name="convergence",
            caption="Error |ZW - Y|/|Y| against iteration, η = 0.4, singular values of Y at most 1: median of the "
            "draws of B and of the starts, dotted the largest. Dots: gradient flow at t = η × step. Above r is the "
            "rank of Y, below half as much again.",
            data=_picture_data,
            draw=_errors_by_step,
        ),
    ),
    claims=_CLAIMS,
)
