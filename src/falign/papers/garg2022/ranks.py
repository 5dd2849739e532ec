"""Error against the inner dimension on a fixed Y: where FA rests in closed form, and the optimum."""

from collections.abc import Sequence

import polars as pl

from falign.lab.experiment import Claim, Evidence, Experiment, Outcome, Picture, Point, Scalar, Setting
from falign.lab.report.style import AXIS, Figure, facets, law, legend, logarithmic
from falign.papers.garg2022._shared import (
    above_gradient_descent,
    largest_in_groups,
    matrix,
    methods,
    outcomes,
    quartiles,
    sample_feedback,
    train,
)
from falign.theory.factorisation import best_error, stationary_error

__all__ = ["RANKS"]


def _points(
    data: str, ranks: Sequence[int], starts_at: int, *, small: float = 0.02, **sizes: Scalar
) -> tuple[Point, ...]:
    """FA from zero and gradient descent, which cannot leave it, at all ranks; at one FA from other starts, and FA*."""
    kinds = [(r, *kind) for r in ranks for kind in (("fa", 0.0), ("gd", small))]
    others = [(starts_at, *kind) for kind in (("fa", small), ("fa", 3 * small), ("fa*", 1.0))]
    same = {"data": data, "rank": 0, "rate": 0.3, **sizes}
    return tuple({**same, "r": r, "method": method, "scale": scale} for r, method, scale in (*kinds, *others))


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
    """Train the draws of a block together, and record the end beside the closed forms."""
    Y = matrix(data, n, m, setting, rank=rank).to(setting.device)
    B, at, names = sample_feedback(seeds, Y, r), [steps], ["error", "distance"]
    trajectory = train(seeds, Y, B, method=method, scale=scale, rate=rate, at=at, names=names, progress=setting.report)
    columns = {
        "error": trajectory.values["error"],
        "distance": trajectory.values["distance"],
        "stationary": stationary_error(Y, B)[:, None],
        "best": best_error(Y, B.shape[1]).expand(len(B), 1),
    }
    return outcomes(at, {name: values / Y.norm() for name, values in columns.items()})


_METHOD = pl.col("method")
_ZERO_OR_GD = (_METHOD == "gd") | (pl.col("scale") == 0)
_KIND = ["data", "r"]


def _closed_form(table: pl.DataFrame) -> Evidence:
    return largest_in_groups(table, pl.col("distance"), _KIND, 1e-8)


def _optimal(table: pl.DataFrame) -> Evidence:
    return largest_in_groups(table, pl.col("error") / pl.col("best") - 1, _KIND, 0.02)


def _starts(table: pl.DataFrame) -> Evidence:
    return largest_in_groups(table, pl.col("distance"), ["data", "method", "scale"], 1e-8)


def _above(table: pl.DataFrame) -> Evidence:
    return above_gradient_descent(table, "error", _KIND, note=f"{table['seed'].n_unique()} draws a point")


_CLAIMS = (
    Claim(
        name="gd-is-optimal-at-every-rank",
        statement="Gradient descent solves the problem optimally.",
        reference="Abstract",
        quotation="Gradient descent solves this problem optimally.",
        method="Its error at the end over the optimum by singular values, less 1; the most of all starts.",
        tolerance_reason="At most 2 %: where σ_r and σ_(r+1) are close it takes long to tell them apart, and their "
        "order costs least.",
        read=_optimal,
        scope=_METHOD == "gd",
    ),
    Claim(
        name="above-the-optimum",
        statement="FA is not optimal when r < rank(Y): already on matrices that were not made against it.",
        reference="Abstract: “FA can be far from optimal when r < rank(Y)”; on these matrices it is not stated there",
        quotation="We also show that FA can be far from optimal when r < rank(Y).",
        method="Logarithm of FA's error over that of gradient descent, of the same draw.",
        tolerance_reason="Above 0 with 99 % confidence (Student's t over the draws, all together).",
        read=_above,
        scope=_ZERO_OR_GD,
    ),
    Claim(
        name="closed-form",
        statement="FA ends at Y(BY)⁺BY, Y projected onto the rows of BY.",
        origin="theory",
        reference="Derived: BR = 0 and RWᵀ = 0 leave nothing else",
        method="|ZW - Y(BY)⁺BY|/|Y| at the end, from a zero start; the most of all draws.",
        tolerance_reason="At most 1e-8.",
        read=_closed_form,
        scope=(_METHOD == "fa") & (pl.col("scale") == 0),
    ),
    Claim(
        name="same-function-from-every-start",
        statement="Where it ends depends neither on the start nor on the method: FA from three starts, and FA*.",
        origin="theory",
        reference="Derived",
        method="|ZW - Y(BY)⁺BY|/|Y| at the end; the most of all draws.",
        tolerance_reason="At most 1e-8.",
        read=_starts,
        scope=_METHOD != "gd",
    ),
)


def _errors_by_rank(data: pl.DataFrame) -> Figure:
    """Errors above, ratio to the optimum below; a column a matrix."""
    figure, matrices = facets(
        data,
        "data",
        2,
        xlabels=["inner dimension r"],
        ylabels=["|ZW - Y| / |Y|", "error / optimum"],
        share="row",
        height=2.9,
    )
    for _, whole, (above, below) in matrices:
        for style, runs in methods(whole):
            rows = runs.sort("r")
            spread = [rows["median"] - rows["low"], rows["high"] - rows["median"]]
            colour, marker = style.colour, style.marker
            above.errorbar(rows["r"], rows["median"], spread, color=colour, marker=marker, ls="none", label=style.label)
            below.plot(rows["r"], rows["ratio"], color=colour, marker=marker, linewidth=1.2)
            fa = style.label.startswith("FA")
            law(above, rows["r"], rows["stationary" if fa else "best"], "closed form")
        below.axhline(1, color=AXIS, linewidth=0.8)
        ticks = sorted(whole["r"].unique().to_list())
        for panel in (above, below):
            logarithmic(panel, "x", ticks=ticks)
        logarithmic(above, "y")
    legend(figure)
    return figure


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    """Median and quartiles of the trained errors, median of the closed form, and the optimum."""
    keys = ["data", "method", "scale", "r"]
    main = table.filter((pl.col("method") == "gd") | ((pl.col("method") == "fa") & (pl.col("scale") == 0)))
    return (
        main.group_by(keys)
        .agg(
            **quartiles("error"),
            stationary=pl.col("stationary").median(),
            best=pl.col("best").first(),
            ratio=(pl.col("error") / pl.col("best")).median(),
        )
        .sort(keys)
    )


RANKS = Experiment(
    name="garg2022.ranks",
    title="Error against the inner dimension",
    source="Garg and Vempala 2022; abstract",
    revision=1,
    grid={
        "smoke": (
            *_points("power law", (1, 4), 4, n=12, m=12, steps=2000),
            *_points("digits", (1, 4), 4, n=12, m=64, steps=2000),
        ),
        "quick": (
            *_points("power law", (1, 2, 5, 10, 20), 5, n=40, m=40, steps=2000),
            *_points("digits", (1, 2, 5, 10, 20), 5, n=40, m=64, steps=2000),
        ),
        "paper": (
            *_points("power law", (1, 2, 5, 10, 20, 50, 80), 5, n=100, m=100, steps=50000),
            *_points("digits", (1, 2, 5, 10, 20, 50), 5, n=100, m=64, steps=50000),
            *_points("mnist", (1, 2, 5, 10, 20, 50, 80), 5, n=100, m=784, small=0.005, steps=50000),
            *_points("fashion-mnist", (1, 2, 5, 10, 20, 50, 80), 5, n=100, m=784, small=0.005, steps=50000),
        ),
    },
    seeds={"smoke": 3, "quick": 10, "paper": 100},
    run=_run,
    agreement=1e-7,
    cost=lambda *, steps, method: float(steps * (3 if method == "gd" else 1)),
    pictures=(
        Picture(
            name="ranks",
            caption="Error at the end against the inner dimension r; median and quartiles of the draws of B. Dashed: "
            "the closed form |Y - Y(BY)⁺BY|, median of the same draws, and the optimum by singular values.",
            data=_picture_data,
            draw=_errors_by_rank,
        ),
    ),
    claims=_CLAIMS,
)
