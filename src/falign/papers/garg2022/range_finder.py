"""Beyond the paper: FA read as a randomised range finder, and what oversampling and power iteration would buy."""

from collections.abc import Sequence
from itertools import product

import polars as pl
from jaxtyping import Float
from torch import Tensor

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Picture, Point, Scalar, Setting
from falign.lab.experiment.statistics import above_zero, mean
from falign.lab.report.style import AXIS, Figure, band, each_of, facets, law, legend, sequence
from falign.papers.garg2022._shared import groups, largest_in_groups, matrix, quartiles
from falign.theory import factorisation
from falign.theory.factorisation import best_error, flat_tail, optimum, range_finder_ratios

__all__ = ["RANGE_FINDER"]


def _points(data: Sequence[tuple[str, int, int, float]], **sizes: Scalar) -> tuple[Point, ...]:
    """(name, n, m, share of the tail) each; share is 0 where the name says what the matrix is."""
    return tuple({"data": name, "n": n, "m": m, "share": share, "rate": 0.25, **sizes} for name, n, m, share in data)


_OVERSAMPLING = (0, 1, 2, 5, 10)
_POWERS = (0, 1, 2)


def _run(
    *, seeds: Sequence[int], setting: Setting, data: str, n: int, m: int, share: float, r: int, rate: float, steps: int
) -> list[Outcome]:
    """Range finders of the draws of a block together, and for each oversampling FA trained so wide and cut to r."""
    Y = (flat_tail(r, n - r, share) if share else matrix(data, n, m, setting)).to(setting.device)
    # One B for all oversamplings, of which the smaller ones use the first rows: they are compared draw by draw.
    B = factorisation.feedback(n, r + max(_OVERSAMPLING), seeds=seeds).to(Y)
    ratios = range_finder_ratios(Y, B, rank=r, oversampling=_OVERSAMPLING, power=_POWERS)
    trained = []
    for p in _OVERSAMPLING:
        trained.append(_cut(B[:, : r + p], Y, r=r, rate=rate, steps=steps))
        setting.report(len(trained) / len(_OVERSAMPLING))
    kinds = list(product(range(len(_OVERSAMPLING)), range(len(_POWERS))))
    return [
        Outcome(
            records={
                "oversampling": [_OVERSAMPLING[p] for p, _ in kinds],
                "power": [_POWERS[q] for _, q in kinds],
                "ratio": [float(ratios[run, p, q]) for p, q in kinds],
                "trained": [None if q else float(trained[p][run]) for p, q in kinds],
            }
        )
        for run in range(len(seeds))
    ]


def _cut(
    B: Float[Tensor, "runs rows n"], Y: Float[Tensor, "n m"], *, r: int, rate: float, steps: int
) -> Float[Tensor, " runs"]:
    """``|Y - [ZW]_r|/optimum``: FA is trained from zero with as many hidden units as B has rows, and cut to rank r."""
    start = factorisation.zero(Y, B)
    trajectory = factorisation.gradient_descent("fa", Y, B, start, rate=rate, steps=steps, names=["error"], at=[steps])
    cut = optimum(trajectory.end.Z @ trajectory.end.W, r)
    return (Y - cut).square().sum((1, 2)).sqrt() / best_error(Y, r)


_KIND = ["data", "oversampling"]
_ENOUGH = 5
"""Oversampling that Halko, Martinsson and Tropp recommend."""


def _one_pass(table: pl.DataFrame) -> Evidence:
    rows = table.filter(pl.col("power") == 0)
    return largest_in_groups(rows, (pl.col("trained") / pl.col("ratio") - 1).abs(), _KIND, 1e-6)


def _bound(table: pl.DataFrame) -> Evidence:
    rows = table.filter((pl.col("power") == 0) & (pl.col("oversampling") >= 2))
    checks = []
    for label, runs in groups(rows, _KIND):
        r, p = int(runs["r"][0]), int(runs["oversampling"][0])
        square = float((runs["ratio"] ** 2).to_numpy().mean())
        checks.append(Check(label=f"{label}: mean ratio²", measured=square, high=1 + r / (p - 1)))
    return Evidence(checks=tuple(checks), note=f"{table['seed'].n_unique()} draws")


def _buys(table: pl.DataFrame, p: int, q: int) -> Evidence:
    """Share of FA's ratio - 1 that p and q take away, with the same B; mean over the draws."""
    keys = ["data", "seed"]
    plain, better = (
        table.filter(oversampling=a, power=b).select(*keys, excess=pl.col("ratio") - 1) for a, b in ((0, 0), (p, q))
    )
    both = better.join(plain, on=keys, suffix="_fa").with_columns(taken=1 - pl.col("excess") / pl.col("excess_fa"))
    return above_zero(
        [
            (
                f"{label}: share of FA's excess (median {runs['excess_fa'].median():.2g}) that is taken away",
                mean(runs["taken"], of=label),
            )
            for label, runs in groups(both, ["data"])
        ]
    )


_CLAIMS = (
    Claim(
        name="one-pass-of-a-range-finder",
        statement="FA computes what one pass of a randomised range finder computes; with p more hidden units, cut to "
        "rank r at the end, what one with oversampling p computes.",
        origin="beyond",
        reference="Derived, beyond the paper",
        method="Largest relative difference between the trained error and that of the range finder with the same B.",
        tolerance_reason="At most 1e-6.",
        read=_one_pass,
    ),
    Claim(
        name="oversampling-bounds-the-ratio",
        statement="With oversampling p ≥ 2 the mean squared ratio to the optimum is at most 1 + r/(p - 1); without it "
        "it has no bound.",
        origin="beyond",
        reference="Halko, Martinsson and Tropp 2011, theorem 10.5; that cutting to rank r keeps the bound is derived",
        method="Mean of ratio² over the draws, q = 0.",
        tolerance_reason="At most 1 + r/(p - 1).",
        read=_bound,
    ),
    Claim(
        name="what-oversampling-buys",
        statement=f"{_ENOUGH} more hidden units, cut to rank r at the end, take away a part of FA's excess over the "
        "optimum.",
        origin="beyond",
        reference="Beyond the paper; Halko, Martinsson and Tropp 2011 recommend that oversampling",
        method="1 less ratio - 1 over that of FA with the same B; mean over the draws.",
        tolerance_reason="Above 0 with 99 % confidence (Student's t over the draws, all together).",
        read=lambda table: _buys(table, _ENOUGH, 0),
    ),
    Claim(
        name="what-power-buys",
        statement="One power iteration, feedback BYYᵀ in place of B, takes away a part of FA's excess.",
        origin="beyond",
        reference="Beyond the paper",
        method="1 less ratio - 1 over that of FA with the same B; mean over the draws.",
        tolerance_reason="Above 0 with 99 % confidence (Student's t over the draws, all together).",
        read=lambda table: _buys(table, 0, 1),
    ),
)


def _ratios_by_oversampling(data: pl.DataFrame) -> Figure:
    """A column a matrix, a line a number of power iterations."""
    figure, matrices = facets(data, "data", xlabels=["oversampling p"], ylabels=["error / optimum"], height=3.2)
    for _, whole, (panel,) in matrices:
        powers = each_of(whole, "power")
        for colour, (q, rows) in zip(sequence(len(powers)), powers, strict=True):
            runs = rows.sort("oversampling")
            band(
                panel,
                runs["oversampling"],
                runs["median"],
                runs["low"],
                runs["high"],
                label=f"q = {q}",
                colour=colour,
                marker="o",
            )
            if q == 0:
                open_ = {"marker": "s", "markersize": 8, "fillstyle": "none", "linestyle": "none"}
                panel.plot(runs["oversampling"], runs["trained"], color=colour, label="FA of width r + p, cut", **open_)
        top = panel.get_ylim()[1]
        wide = [p for p in sorted(whole["oversampling"].unique().to_list()) if p >= 2]
        law(panel, wide, [(1 + whole["r"][0] / (p - 1)) ** 0.5 for p in wide], "√(1 + r/(p - 1))")
        panel.axhline(1, color=AXIS, linewidth=0.8)
        panel.set_ylim(1 - (top - 1) / 20, top)
    legend(figure)
    return figure


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    """Median and quartiles over the draws."""
    keys = ["data", "r", "power", "oversampling"]
    return (
        table.group_by(keys)
        .agg(
            **quartiles("ratio"),
            trained=pl.col("trained").median(),
        )
        .sort(keys)
    )


RANGE_FINDER = Experiment(
    name="garg2022.range-finder",
    title="What oversampling and power iteration would buy",
    source="Beyond the paper: Halko, Martinsson and Tropp 2011",
    revision=1,
    grid={
        "smoke": _points((("power law", 30, 30, 0.0), ("flat tail", 30, 30, 0.01)), r=5, steps=1000),
        "quick": _points(
            (("power law", 100, 100, 0.0), ("flat tail", 100, 100, 0.01), ("digits", 100, 64, 0.0)), r=10, steps=2000
        ),
        "paper": _points(
            (
                ("power law", 400, 400, 0.0),
                ("flat tail", 400, 400, 0.0025),
                ("digits", 400, 64, 0.0),
                ("mnist", 400, 784, 0.0),
                ("fashion-mnist", 400, 784, 0.0),
            ),
            r=20,
            steps=50000,
        ),
    },
    seeds={"smoke": 5, "quick": 20, "paper": 200},
    run=_run,
    agreement=1e-12,
    memory=lambda *, seeds, n, m: 8 * 6 * (len(seeds) + 1) * n * m,
    pictures=(
        Picture(
            name="range-finder",
            caption="Error of a randomised range finder over the optimum, against its oversampling p, for q power "
            "iterations; median and quartiles of the draws. FA is the point p = q = 0. Open: FA trained with r + p "
            "hidden units, its product then cut to rank r. Dashed: the bound √(1 + r/(p - 1)) on the root mean square "
            "for q = 0.",
            data=_picture_data,
            draw=_ratios_by_oversampling,
        ),
    ),
    claims=_CLAIMS,
)
