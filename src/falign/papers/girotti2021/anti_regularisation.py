"""Implicit anti-regularisation: from an anti-aligned hidden weight a larger component is learned more slowly."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Picture, Point, Setting
from falign.lab.report.style import AXIS, COLOURS, Axes, Figure, law, logarithmic, panels
from falign.papers.girotti2021._modes import CRITICAL, TINY, paced
from falign.theory.deep_linear import asymptotic_rate, gradient_flow, learning_time, limit, modes

__all__ = ["ANTI_REGULARISATION"]


def _points(shares: Sequence[float], records: int) -> tuple[Point, ...]:
    """Components at shares of λ_c, and the two on either side of it, for unit start and feedback."""
    targets = sorted({*(round(share * CRITICAL, 8) for share in shares), 0.19, 0.195})
    return tuple({"size": 1.0, "feedback": 1.0, "target": target, "records": records} for target in targets)


_FITTED = 1e-4, 1e-8
"""The rate is fitted to the errors between these shares of the component."""


def _run(
    *,
    seeds: Sequence[int],
    setting: Setting,
    size: Sequence[float],
    feedback: Sequence[float],
    target: Sequence[float],
    records: int,
) -> list[Outcome]:
    """Integrate all runs together, each in units of its learning time, and fit their rates."""
    sizes, m, targets = (torch.tensor(values).double() for values in (size, feedback, target))
    initial = modes(targets, [-sizes, torch.zeros_like(sizes)], feedback=m)
    # Each run ends when its error should be the lower end of the fit: it spends its records where the rate is read.
    moments = torch.linspace(0, 1, records, dtype=torch.float64)
    units = learning_time(initial, _FITTED[1])
    trajectory = gradient_flow(paced(initial, units), times=moments, tolerance=1e-12)
    missing = (1 - trajectory.share).abs()
    columns = {
        "rate": asymptotic_rate(initial),
        "fitted": torch.stack([_slope(moments, runs) for runs in missing.mT]) / units,
        "limit": limit(initial),
        "hidden": trajectory.weights[-1, 0] / units.sqrt(),  # back from the weights of the paced modes
        "learned": learning_time(initial),
    }
    return [
        Outcome(records={name: [float(values[at])] for name, values in columns.items()}) for at in range(len(seeds))
    ]


def _slope(moments: Tensor, missing: Tensor) -> Tensor:
    """``-d ln|e|/dt`` of the last records between the two sizes of error."""
    # The error may cross the upper end more than once: only what follows the last crossing is the end.
    late = (missing <= _FITTED[0]) & (moments > moments[missing > _FITTED[0]].max())
    return -torch.tensor(np.polyfit(moments[late], missing[late].log(), 1)[0])


_RATES = {0.2: 0.880, 0.5: 0.674, 0.9: 0.279, 0.99: 0.084}
"""λ/λ_c -> ρ*."""
_BELOW = pl.col("target") < CRITICAL
_TABLE = pl.any_horizontal(*((pl.col("target") / CRITICAL - share).abs() < 1e-6 for share in _RATES))
_SIDES = pl.col("target").is_in([0.19, 0.195])


def _falls(table: pl.DataFrame) -> Evidence:
    runs = table.sort("target")
    steps = runs["fitted"].diff().drop_nulls().to_numpy()
    times = runs["learned"].diff().drop_nulls().to_numpy()
    return Evidence(
        checks=(
            Check(label=f"least fall of the rate in {len(steps)} steps", measured=float(-steps.max()), low=TINY),
            Check(label=f"least rise of the time in {len(times)} steps", measured=float(times.min()), low=TINY),
        )
    )


def _values(table: pl.DataFrame) -> Evidence:
    checks = []
    for row in table.sort("target").to_dicts():
        share = min(_RATES, key=lambda each: abs(row["target"] / CRITICAL - each))
        near = {"low": _RATES[share] - 5e-4, "high": _RATES[share] + 5e-4}
        checks.append(Check(label=f"λ = {share:g} λ_c: closed form", measured=row["rate"], **near))
        checks.append(Check(label="fitted over closed form", measured=row["fitted"] / row["rate"], low=0.99, high=1.01))
    return Evidence(checks=tuple(checks))


def _sides(table: pl.DataFrame) -> Evidence:
    checks = []
    for row in table.sort("target").to_dicts():
        sign = {"high": -TINY} if row["target"] < CRITICAL else {"low": TINY}
        checks.append(Check(label=f"λ = {row['target']:g}: θ_1 at the end", measured=row["hidden"], **sign))
    return Evidence(checks=tuple(checks), note=f"λ_c = {CRITICAL:.5f}")


def _vanishes(table: pl.DataFrame) -> Evidence:
    """ρ*² is a straight line in λ next to λ_c: where the one through the two largest components crosses zero."""
    near = table.sort("target").tail(2)
    (first, last), (low, high) = near["target"].to_list(), near["fitted"].pow(2).to_list()
    crossing = last + (last - first) * high / (low - high)
    return Evidence(checks=(Check(label="zero of ρ*²", measured=crossing, low=CRITICAL - 1e-3, high=CRITICAL + 1e-3),))


_CLAIMS = (
    Claim(
        name="slower-with-size",
        statement="Negligible components are learned before the principal ones: the larger the component below λ_c, "
        "the slower it is learned.",
        reference="Abstract: “implicit anti-regularization”; that θ_1 = -c, θ_2 = 0 shows it is derived",
        quotation="negligible components are learned before the principal ones … a phenomenon we classify as "
        "implicit anti-regularization",
        headline="fall of the rate towards λ_c",
        method="Rate fitted to the flow, and time to 90 %, from each component below λ_c to the next.",
        tolerance_reason="Every step has its sign.",
        read=_falls,
        scope=_BELOW,
    ),
    Claim(
        name="rates",
        statement="The rates are ρ* = mK + 3/2 θ_1*², at 0.2, 0.5, 0.9 and 0.99 λ_c: 0.880, 0.674, 0.279, 0.084.",
        origin="theory",
        reference="Derived",
        method="The closed form; and the slope of ln|e| of the flow over it.",
        tolerance_reason="Three digits; 1 ± 0.01 for the fit, to errors between 1e-4 and 1e-8 of the component.",
        read=_values,
        scope=_TABLE,
    ),
    Claim(
        name="critical-size",
        statement="λ_c = c³/(3√3m) = 0.19245 parts them: for λ = 0.19 the hidden weight ends negative, for 0.195 "
        "positive.",
        origin="theory",
        reference="Derived",
        headline="hidden weight just below λ_c",
        method="θ_1 at the end of the flow.",
        tolerance_reason="Its sign.",
        read=_sides,
        scope=_SIDES,
    ),
    Claim(
        name="rate-vanishes",
        statement="The rate falls to zero at λ_c, as the square root of the distance.",
        origin="theory",
        reference="Derived: a stable and an unstable point meet",
        method="Zero of the straight line through ρ*² of the two largest components below λ_c, fitted to the flow.",
        tolerance_reason="λ_c ± 0.001, the next order.",
        read=_vanishes,
        scope=_BELOW,
    ),
)


def _rates_and_limits(data: pl.DataFrame) -> Figure:
    """Three panels over λ, those below λ_c in orange."""
    figure, (rate, hidden, time) = panels(
        3, titles=["Rate ρ*", "Hidden weight at the end", "Time to 90 %"], xlabels=["λ"], height=3.0
    )
    for panel, shown, closed in ((rate, "fitted", "rate"), (hidden, "hidden", "limit"), (time, "learned", "")):
        for below, colour in ((True, COLOURS[1]), (False, COLOURS[0])):
            runs = data.filter((pl.col("target") < CRITICAL) == below)
            panel.plot(runs["target"], runs[shown], "o", color=colour, markersize=4)
            if closed:
                law(panel, runs["target"], runs[closed], "")
        _critical(panel)
    hidden.axhline(0, color=AXIS, linewidth=0.8)
    logarithmic(time, "y")
    return figure


def _critical(panel: Axes) -> None:
    panel.axvline(CRITICAL, color=AXIS, linestyle=":", linewidth=1.2)
    panel.annotate("λ_c", (CRITICAL, 0), xycoords=("data", "axes fraction"), xytext=(4, 5), textcoords="offset points")


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    return table.select("target", "rate", "fitted", "limit", "hidden", "learned").sort("target")


ANTI_REGULARISATION = Experiment(
    name="girotti2021.anti-regularisation",
    title="Implicit anti-regularisation",
    source="Girotti, Mitliagkas and Gidel 2021, abstract (“implicit anti-regularization”); the rates are derived",
    revision=1,
    grid={
        "smoke": _points((0.2, 0.5, 0.9, 0.99, 2.0), 401),
        "quick": _points((0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96, 0.99, 1.05, 1.2, 1.5, 2.0, 3.0), 401),
        "paper": _points((*(k / 50 for k in range(1, 50)), 0.99, 0.995, 1.005, 1.05, 1.2, 1.5, 2.0, 3.0, 5.0), 1001),
    },
    seeds={"smoke": 1, "quick": 1, "paper": 1},
    run=_run,
    agreement=1e-4,
    together=("target",),
    pictures=(
        Picture(
            name="anti-regularisation",
            caption="From θ_1 = -1, θ_2 = 0: rate ρ* at which the error of a component vanishes in the end, where its "
            "hidden weight goes, and when it is learned, against its size. Points: the flow, the rate fitted to it; "
            "lines: closed form. Below λ_c = 0.19245 (dotted) small components are the faster ones, and θ_1 stays "
            "negative.",
            data=_picture_data,
            draw=_rates_and_limits,
        ),
    ),
    claims=_CLAIMS,
)
