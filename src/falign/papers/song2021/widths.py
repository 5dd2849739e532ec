"""Figure 2 continued: linear networks of every width, up to a thousand million neurons, and the time they need."""

from collections.abc import Sequence

import polars as pl
import torch

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Missing, Outcome, Picture, Setting, grid
from falign.lab.experiment.statistics import final, mean, slope, summary
from falign.papers.song2021._drawing import cosine_by_width, time_by_width
from falign.papers.song2021._shared import Batch, simulate_quietly
from falign.theory.two_layer import WidthFree, spaced

__all__ = ["TIME", "WIDTHS"]

_RATE = 1e-4


def _run(
    *,
    seeds: Sequence[int],
    setting: Setting,
    p: Sequence[int],
    strength: Sequence[float],
    n: int,
    d: int,
    rate: float,
    steps: int,
    records: int,
) -> list[Outcome]:
    """Draw the Gram matrices of all widths and seeds of a block, and run them together."""
    batch = Batch(seeds, p, strength)
    engine = WidthFree.sample(
        batch.row_seeds,
        n=n,
        d=d,
        p=[width for _, width in batch.rows],
        rate=rate,
        penalties=batch.penalties,
        device=setting.device,
    )
    names = ("loss", "cosine", "b_dot_beta")
    return batch.outcomes(simulate_quietly(engine, spaced(steps, records), names, progress=setting.report))


def _memory(*, seeds: Sequence[int], p: Sequence[int], strength: Sequence[float], n: int, d: int) -> int:
    """Bytes of a block."""
    return Batch(seeds, p, strength).bytes_needed("width-free", n=n, d=d, dtype=torch.float64)


_REACHED = 0.5
"""The cosine that "time to alignment" waits for."""


def _gained(table: pl.DataFrame) -> pl.DataFrame:
    """``(<b, β(T)> - <b, β(0)>)/(|b||β(T)|)`` of each run without a ridge: the cosine less what chance gave it."""
    plain = table.filter(pl.col("strength") == 0)
    initial = plain.filter(pl.col("step") == 0).select("p", "seed", start="b_dot_beta")
    ends = final(plain, by=["p", "n"]).join(initial, on=["p", "seed"])
    return ends.with_columns(gained=pl.col("cosine") * (1 - pl.col("start") / pl.col("b_dot_beta")))


def _law(table: pl.DataFrame) -> Evidence:
    gained = _gained(table)
    widths = sorted(gained["p"].unique().to_list())
    checks = []
    for p in widths:
        runs = gained.filter(pl.col("p") == p)
        estimate = mean(runs["gained"] * p / runs["n"], of=f"cosine gained at p = {p}")
        width = estimate.half(len(widths)) + runs["n"][0] / p
        checks.append(Check(label=f"p = {p:.3g}", measured=estimate.value, low=1 - width, high=1 + width))
    return Evidence(
        checks=tuple(checks),
        note=f"{gained['seed'].n_unique()} runs a width. The runs of one seed share inputs and normal numbers over the "
        "widths, so that the rows are far from independent.",
    )


def _times(table: pl.DataFrame) -> pl.DataFrame:
    """The step at which the cosine of each run reached 0.5, between records in log t; null where it did not."""
    keys = ["p", "strength", "seed"]
    before = pl.col("cosine").shift().over(keys, order_by="step")
    # Records are nearly evenly spaced in log t: there a straight line between two of them is the better guess.
    earlier = pl.col("step").shift().over(keys, order_by="step").cast(pl.Float64).log()
    share = (_REACHED - before) / (pl.col("cosine") - before)
    crossing = (
        table.filter(pl.col("step") > 0)
        .with_columns(time=(earlier + share * (pl.col("step").log() - earlier)).exp(), before=before)
        .filter((pl.col("cosine") >= _REACHED) & (pl.col("before") < _REACHED))
        .sort("step")
        .group_by(keys, maintain_order=True)
        .first()
    )
    return table.select(keys).unique().join(crossing.select(*keys, "time"), on=keys, how="left").sort(keys)


def _growth(table: pl.DataFrame) -> Evidence:
    times = _times(table)
    late = times.filter(pl.col("time").is_null())
    if not late.is_empty():
        raise Missing(f"p = {late['p'][0]}: {late.height} runs did not reach a cosine of {_REACHED} in their steps")
    narrow, wide = times["p"].unique().sort()[[0, -1]]
    estimate = slope(times.with_columns(pl.col("p").log(), pl.col("time").log()), "p", "time")
    width = estimate.half() + 1 / narrow**0.5
    return Evidence(
        checks=(
            Check(
                label=f"exponent between p = {narrow:.0f} and {wide:.0f}",
                measured=estimate.value,
                low=0.5 - width,
                high=0.5 + width,
            ),
        )
    )


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    ends = summary(final(table, by=["p", "strength"]), "cosine", by=["p", "strength"])
    gained = summary(_gained(table), "gained", by=["p", "n"])
    return pl.concat(
        [ends.with_columns(shown=pl.lit("cosine")), gained.with_columns(shown=pl.lit("gained"))], how="diagonal"
    )


def _time_data(table: pl.DataFrame) -> pl.DataFrame:
    """Mean times of the widths at which every run got there."""
    whole = pl.col("time").is_not_null().all().over("p", "strength")
    return summary(_times(table).filter(whole), "time", by=["p", "strength"])


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
    run=_run,
    agreement=1e-12,
    together=("p", "strength"),
    memory=_memory,
    pictures=(
        Picture(
            name="figure-2-continued",
            caption="Left: figure 2a carried on to a thousand million neurons, exact in law; mean ± standard "
            "deviation. After a fixed number of steps with a constant ridge alignment vanishes too, only at larger "
            "widths. Right: the cosine that training without a ridge adds to that of the start, with standard errors, "
            "and the law n/p.",
            data=_picture_data,
            draw=cosine_by_width,
        ),
    ),
    claims=(
        Claim(
            name="n-over-p",
            statement="Without regularization cos∠(b, β) = O(n/√p); for linear networks the cosine that training adds "
            "is n/p, to leading order.",
            reference="Section 4.1; the sharper law is derived here: <b, β> grows by ½(|W(t)|² - |W(0)|²), n in the "
            "mean",
            quotation="alignment between β(t) and b is not guaranteed for over-parameterized networks",
            method="Mean of (<b, β(T)> - <b, β(0)>)/(|b||β(T)|), times p/n, at every width.",
            tolerance_reason="1 ± half the 99 % interval (Student's t over the seeds, all widths together), ± n/p for "
            "the next order of the expansion in n/p.",
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
        preset: grid(p=widths, strength=30.0, n=n, d=d, rate=_RATE, steps=steps, records=400)
        for preset, widths, n, d, steps in (
            ("smoke", (100, 400), 10, 30, 20000),
            ("quick", (1600, 6400, 25600, 102400), 50, 150, 30000),
            ("paper", (3200, 12800, 10**5, 10**6, 10**7), 50, 150, 300000),
        )
    },
    seeds={"smoke": 2, "quick": 6, "paper": 50},
    run=_run,
    agreement=1e-12,
    together=("p", "strength"),
    memory=_memory,
    pictures=(
        Picture(
            name="time-to-alignment",
            caption="Steps until the cosine reaches 0.5 with a constant ridge, mean ± standard deviation, and √p. "
            "Widths at which a run did not get there are left out.",
            data=_time_data,
            draw=time_by_width,
        ),
    ),
    claims=(
        Claim(
            name="time-sqrt-p",
            statement="With a constant ridge every width aligns in the end; the time it takes grows as √p.",
            origin="theory",
            reference="Derived here from the scalar reduction of section 6; the paper states no time",
            headline="exponent of p in the time to alignment",
            method="Slope of log(steps until the cosine is 0.5) against log p, one a seed; λ = 30.",
            tolerance_reason="½ ± half the 99 % interval over the seeds (Student's t), ± 1/√p of the narrowest.",
            read=_growth,
        ),
    ),
)
