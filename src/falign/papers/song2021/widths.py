"""Figure 2 continued: linear networks of every width, up to a thousand million neurons, and the time they need."""

from collections.abc import Sequence
from math import log

import polars as pl
import torch

from falign.lab.experiment import Check, Claim, Experiment, Missing, Outcome, Picture, Reading, Setting, Task, grid
from falign.lab.experiment.statistics import final, mean, slope, summary
from falign.papers.song2021.blocks import batch, outcomes
from falign.papers.song2021.drawing import cosine_by_width, time_by_width
from falign.theory.two_layer import WidthFree, bytes_needed, simulate, spaced

_REACHED = 0.5
"""The cosine that "time to alignment" waits for."""
_RATE = 1e-4


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Draw the Gram matrices of all widths and seeds of a block, and run them together."""
    rows, penalties = batch(tasks)
    point = tasks[0].point
    engine = WidthFree.sample(
        [seed for seed, _ in rows],
        n=int(point["n"]),
        d=int(point["d"]),
        p=[p for _, p in rows],
        rate=float(point["rate"]),
        penalties=penalties,
        device=setting.device,
    )
    at = spaced(int(point["steps"]), int(point["records"]))
    return outcomes(tasks, simulate(engine, at, ("loss", "cosine", "b_dot_beta")))


def memory(tasks: Sequence[Task]) -> int:
    """Bytes of a block."""
    rows, penalties = batch(tasks)
    point = tasks[0].point
    return bytes_needed(
        engine="width-free",
        n=int(point["n"]),
        d=int(point["d"]),
        p=max(p for _, p in rows),
        seeds=len(rows),
        penalties=len(penalties),
        dtype=torch.float64,
    )


def _gained(table: pl.DataFrame) -> pl.DataFrame:
    """``(<b, β(T)> - <b, β(0)>)/(|b||β(T)|)`` of each run without a ridge: the cosine less what chance gave it."""
    plain = table.filter(pl.col("strength") == 0)
    begun = plain.filter(pl.col("step") == 0).select("p", "seed", start="b_dot_beta")
    ends = final(plain, by=["p", "n"]).join(begun, on=["p", "seed"])
    return ends.with_columns(gained=pl.col("cosine") * (1 - pl.col("start") / pl.col("b_dot_beta")))


def _data(table: pl.DataFrame) -> pl.DataFrame:
    ends = summary(final(table, by=["p", "strength"]), "cosine", by=["p", "strength"])
    gained = summary(_gained(table), "gained", by=["p", "n"])
    return pl.concat(
        [ends.with_columns(shown=pl.lit("cosine")), gained.with_columns(shown=pl.lit("gained"))], how="diagonal"
    )


def _law(table: pl.DataFrame) -> Reading:
    gained = _gained(table)
    checks = []
    for p in sorted(gained["p"].unique().to_list()):
        runs = gained.filter(pl.col("p") == p)
        found = mean(runs["gained"] * p / runs["n"], of=f"cosine gained at p = {p}")
        width = 3 * found.error + runs["n"][0] / p
        checks.append(Check(label=f"p = {p:.3g}", measured=found.value, low=1 - width, high=1 + width))
    return Reading(checks=tuple(checks), note=f"{gained['seed'].n_unique()} runs a width")


def _times(table: pl.DataFrame) -> pl.DataFrame:
    """The step at which the cosine of each run reached 0.5, between records in log t; runs that did not are absent."""
    order = table.filter((pl.col("strength") > 0) & (pl.col("step") > 0)).sort("step")
    keys = ["p", "strength", "seed"]
    crossing = (
        order.with_columns(
            before=pl.col("cosine").shift().over(keys), earlier=pl.col("step").shift().over(keys).cast(pl.Float64)
        )
        .filter((pl.col("cosine") >= _REACHED) & (pl.col("before") < _REACHED))
        .group_by(keys, maintain_order=True)
        .first()
    )
    share = (_REACHED - pl.col("before")) / (pl.col("cosine") - pl.col("before"))
    return crossing.with_columns(
        time=(pl.col("earlier").log() + share * (pl.col("step").log() - pl.col("earlier").log())).exp()
    )


def _time_data(table: pl.DataFrame) -> pl.DataFrame:
    return summary(_times(table), "time", by=["p", "strength"])


def _growth(table: pl.DataFrame) -> Reading:
    times = _times(table)
    runs = table.select("p", "strength", "seed").unique().filter(pl.col("strength") > 0)
    checks = []
    for strength in sorted(times["strength"].unique().to_list()):
        wide = sorted(times.filter(pl.col("strength") == strength)["p"].unique().to_list())[-3:]
        if len(wide) < 2:
            raise Missing(f"λ = {strength:g}: the cosine reached {_REACHED} at fewer than two widths")
        logs = []
        for p in wide:
            own = times.filter((pl.col("strength") == strength) & (pl.col("p") == p))
            if own.height < runs.filter((pl.col("strength") == strength) & (pl.col("p") == p)).height:
                raise Missing(f"λ = {strength:g}, p = {p}: not every run reached a cosine of {_REACHED}")
            logs.append(mean(own["time"].log(), of=f"time at p = {p}"))
        found = slope([log(p) for p in wide], [each.value for each in logs], [each.error for each in logs])
        width = 3 * found.error + 1 / wide[0] ** 0.5
        checks.append(
            Check(
                label=f"λ = {strength:g}: exponent between p = {wide[0]:.3g} and {wide[-1]:.3g}",
                measured=found.value,
                low=0.5 - width,
                high=0.5 + width,
            )
        )
    return Reading(checks=tuple(checks))


WIDTHS = Experiment(
    name="song2021.widths",
    title="Linear networks of any width",
    source="Song, Xu and Lafferty 2021, figure 2a, carried on to p = 10⁹",
    revision=1,
    grid={
        preset: grid(p=widths, strength=(0.0, 1.0, 3.0, 10.0, 30.0), n=n, d=d, rate=_RATE, steps=steps, records=60)
        for preset, widths, n, d, steps in (
            ("smoke", (100, 10**4, 10**9), 10, 30, 10000),
            ("quick", (200, 800, 3200, 12800, 10**5, 10**6, 10**7, 10**8, 10**9), 50, 150, 5000),
            ("paper", (*(100 * 2**k for k in range(1, 8)), *(10**k for k in range(5, 10))), 50, 150, 20000),
        )
    },
    seeds={"smoke": 2, "quick": 10, "paper": 50},
    run=run,
    together=("p", "strength"),
    memory=memory,
    pictures=(
        Picture(
            name="figure-2-continued",
            caption="Left: figure 2a carried on to a thousand million neurons, exact in law; mean ± standard "
            "deviation. After a fixed number of steps with a constant ridge alignment vanishes too, only at larger "
            "widths. Right: the cosine that training without a ridge adds to that of the start, with standard errors, "
            "and the law n/p.",
            data=_data,
            draw=cosine_by_width,
        ),
    ),
    claims=(
        Claim(
            name="n-over-p",
            statement="Without regularization cos∠(b, β) = O(n/√p); for linear networks the cosine that training adds "
            "is n/p, to leading order.",
            place="Section 4.1; the sharper law is derived here: <b, β> grows by ½(|W(t)|² - |W(0)|²), n in the mean",
            how="Mean of (<b, β(T)> - <b, β(0)>)/(|b||β(T)|), times p/n, at every width.",
            because="1 ± 3 standard errors, ± n/p for the next order of the expansion in n/p.",
            read=_law,
        ),
    ),
)

TIME = Experiment(
    name="song2021.time",
    title="Time to alignment against width",
    source="Song, Xu and Lafferty 2021, sections 4 and 5, with a constant ridge",
    revision=1,
    grid={
        preset: grid(p=widths, strength=strengths, n=n, d=d, rate=_RATE, steps=steps, records=400)
        for preset, widths, strengths, n, d, steps in (
            ("smoke", (100, 400), (100.0,), 10, 30, 20000),
            ("quick", (1600, 6400, 25600, 102400), (30.0,), 50, 150, 30000),
            ("paper", (3200, 12800, 10**5, 10**6, 10**7), (10.0, 30.0), 50, 150, 300000),
        )
    },
    seeds={"smoke": 2, "quick": 6, "paper": 50},
    run=run,
    together=("p", "strength"),
    memory=memory,
    pictures=(
        Picture(
            name="time-to-alignment",
            caption="Steps until the cosine reaches 0.5 with constant ridges, mean ± standard deviation, and √p.",
            data=_time_data,
            draw=time_by_width,
        ),
    ),
    claims=(
        Claim(
            name="time-sqrt-p",
            statement="With a constant ridge every width aligns in the end; the time it takes grows as √p.",
            place="Derived here from the scalar reduction of section 6; the paper states no time",
            how="Slope of log(steps until the cosine is 0.5) against log p, over the three widest networks.",
            because="½ ± 3 standard errors, ± 1/√p of the narrowest of them for the next order.",
            read=_growth,
        ),
    ),
)
