"""Section 3's account of convergence: G stays at Ḡ, H stays near 0, and the error is what infinite width predicts."""

from collections.abc import Sequence

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from falign.lab.experiment import Claim, Evidence, Experiment, Outcome, Picture, Point, Setting, grid
from falign.lab.experiment.statistics import Estimate, around, share_at_least, slope, sorted_groups, summary
from falign.lab.report.style import COLOURS, MARKERS, Figure, each_of, error_bars, law, logarithmic, panels, sequence
from falign.papers.song2021._drawing import NAMES
from falign.papers.song2021._shared import DELTA, Batch
from falign.theory.two_layer import Dual, Trajectory, draw_reduced, spaced
from falign.theory.two_layer import activation as named_activation
from falign.theory.two_layer.kernels import kernels_of_engine, limiting_kernel, predicted_error

__all__ = ["KERNELS"]

_RATE = 0.1
_RIDGE = 0.1


def _points(widths: Sequence[int], *, n: int, d: int, steps: int) -> tuple[Point, ...]:
    return grid(activation=("tanh", "relu"), strength=(0.0, _RIDGE), p=widths, n=n, d=d, rate=_RATE, steps=steps)


_RECORDS = 20


def _run(
    *,
    seeds: Sequence[int],
    setting: Setting,
    activation: str,
    strength: Sequence[float],
    p: int,
    n: int,
    d: int,
    rate: float,
    steps: int,
) -> list[Outcome]:
    """Train all seeds and ridges of a block, and record kernels and errors on the way."""
    batch = Batch(seeds, p, strength)
    start = draw_reduced(batch.row_seeds, n=n, d=d, p=p, activation=activation, inputs="scaled", device=setting.device)
    engine = Dual(start, activation=activation, rate=rate, penalties=batch.penalties)
    limit = limiting_kernel(start.X, named_activation(activation)).unsqueeze(1)
    predicted = predicted_error(
        limit,
        engine.error(),
        start.y.unsqueeze(1),
        rate=rate,
        strengths=torch.stack([penalty.values(steps) for penalty in batch.penalties]).to(limit),
    )
    at = spaced(steps, min(_RECORDS, steps + 1))
    columns = _followed(engine, at, predicted, torch.linalg.eigvalsh(limit)[..., 0], setting)
    # None is marked: a number that is not finite is refused with its record.
    diverged = torch.full((len(batch.rows), len(batch.penalties)), -1)
    return batch.outcomes(Trajectory(steps=torch.tensor(at), values=columns, diverged=diverged))


def _followed(
    engine: Dual,
    at: Sequence[int],
    predicted: Float[Tensor, "runs ridges steps n"],
    gamma: Float[Tensor, "runs 1"],
    setting: Setting,
) -> dict[str, Float[Tensor, "runs ridges times"]]:
    """Records at each of those steps; the kernels in units of γ = λ_min(Ḡ)."""
    y = engine.start.y.norm(dim=-1, keepdim=True)
    columns: dict[str, list[Tensor]] = {}
    first = kernels_of_engine(engine)
    last, e = engine.t, engine.error().norm(dim=-1)
    for step in at:
        engine.advance(step - engine.t)
        now = kernels_of_engine(engine)
        before, error = e, engine.error()
        e = error.norm(dim=-1)
        measured = {
            **now.extremes(),
            "gamma": gamma.expand_as(e),
            "H_norm": _norm(now.H) / gamma,
            "G_change": _norm(now.G - first.G) / gamma,
            "H_change": _norm(now.H - first.H) / gamma,
            "error": e,
            "contraction": (e / before) ** (1 / max(1, step - last)),
            "discrepancy": (error - predicted[:, :, step]).norm(dim=-1) / y,
        }
        last = step
        for name, value in measured.items():
            columns.setdefault(name, []).append(value)
        setting.report(step / at[-1] if at[-1] else 1.0)
    return {name: torch.stack(values, -1).cpu() for name, values in columns.items()}


def _norm(kernel: Float[Tensor, "*runs n n"]) -> Float[Tensor, "*runs"]:
    """The spectral norm of a symmetric matrix."""
    return torch.linalg.eigvalsh(kernel).abs().amax(-1)


def _memory(*, seeds: Sequence[int], strength: Sequence[float], p: int, n: int, d: int, steps: int) -> int:
    """Bytes of a block: the engine's, and the arrays [n p] of all runs that its kernels are made of."""
    batch = Batch(seeds, p, strength)
    engine = batch.bytes_needed("dual", n=n, d=d, dtype=torch.float64)
    runs = len(batch.rows) * len(batch.penalties)
    return engine + 8 * runs * n * (6 * p + steps + 8 * n) + (128 << 20)


def _worst(table: pl.DataFrame, column: str) -> pl.DataFrame:
    """The largest value of each run."""
    return table.group_by("activation", "strength", "p", "n", "seed").agg(pl.col(column).max())


def _exponent(runs: pl.DataFrame, column: str) -> Estimate:
    """Mean over the seeds of the slope of log column against log p."""
    return slope(runs.with_columns(pl.col("p").log(), pl.col(column).log()), "p", column)


def _feedback_kernel(table: pl.DataFrame) -> Evidence:
    """Exponent of |H(0)|."""
    groups = sorted_groups(table.filter((pl.col("step") == 0) & (pl.col("strength") == 0)), ["activation"])
    exponents = [(f"{name}: exponent of p in |H(0)|", _exponent(runs, "H_norm")) for (name,), runs in groups]
    return around(exponents, -0.5, note=f"{table['seed'].n_unique()} seeds")


def _constancy(table: pl.DataFrame) -> Evidence:
    """Exponents of the largest changes of G and H."""
    exponents = [
        (f"{name}: exponent of p in max |{kernel}(t) - {kernel}(0)|", _exponent(_worst(runs, column), column))
        for (name,), runs in sorted_groups(table.filter(pl.col("strength") == 0), ["activation"])
        for column, kernel in (("G_change", "G"), ("H_change", "H"))
    ]
    return around(exponents, -0.5, side="at most", note=f"{table['seed'].n_unique()} seeds")


def _prediction(table: pl.DataFrame) -> Evidence:
    """Exponent of the largest distance to the prediction."""
    exponents = [
        (
            f"{name}, λ = {strength:g}: exponent of p in max |e(t) - e∞(t)|/|y|",
            _exponent(_worst(runs, "discrepancy"), "discrepancy"),
        )
        for (name, strength), runs in sorted_groups(table, ["activation", "strength"])
    ]
    return around(exponents, -0.5, note=f"{table['seed'].n_unique()} seeds")


def _contraction(table: pl.DataFrame) -> Evidence:
    """Share of runs whose error falls as the theorem says between all recordings."""
    plain = table.filter((pl.col("strength") == 0) & (pl.col("step") > 0))
    unit = pl.col("rate") * pl.col("gamma")
    runs = plain.group_by("activation", "p", "seed").agg(slowest=((1 - pl.col("contraction")) / unit).min())
    shares = []
    for (name, p), rows in sorted_groups(runs, ["activation", "p"]):
        slowest = rows["slowest"].to_numpy()
        label = f"{name}, p = {p}: share of {rows.height} runs (slowest: 1 - {slowest.min():.2f}ηγ)"
        shares.append((label, float((slowest >= 0.25).mean()), rows.height))
    return share_at_least(shares, 1 - DELTA)


_CLAIMS = (
    Claim(
        name="feedback-kernel-vanishes",
        statement="H is close to 0 at initialization if the network is over-parameterized.",
        reference="Section 3, after the equation for e(t+1)",
        quotation="no longer positive semi-definite and close to 0 at initialization if the network is over- "
        "parameterized",
        method="Slope of log |H(0)|, the spectral norm, against log p: one a seed, and their mean.",
        tolerance_reason="-½, the order of a mean of p independent matrices whose mean is 0; ± half of the slope's 99 "
        "% interval by Student's t over the seeds, for both activations together (Bonferroni).",
        read=_feedback_kernel,
    ),
    Claim(
        name="kernels-stay",
        statement="The entries of both matrices remain close to their initial values.",
        reference="Section 3, after the equation for e(t+1)",
        quotation="the entries of both matrices remain close to their initial values, due to over-parameterization",
        method="Slope, as before, of the largest spectral norm of G(t) - G(0), and of H(t) - H(0), along runs without "
        "a ridge. No entry of a matrix is larger than that norm.",
        tolerance_reason="At most -½, the rate at which single weights move in theorem 3.2, plus half of the slope's "
        "99 % interval. Less agrees with it: what b multiplies averages out over the neurons, which makes it -1.",
        read=_constancy,
    ),
    Claim(
        name="infinite-width",
        statement="The error follows e(t+1) = (I - ηḠ)e(t) up to 1/√p; with a ridge, "
        "e(t+1) = ((1 - ηλ)I - ηḠ)e(t) + ηλy.",
        reference="Section 3, G + H ≈ Ḡ made exact in the limit; the order and the ridge's term are derived here",
        method="Slope, as before, of the largest |e(t) - e∞(t)|/|y| of a run, e∞ begun at e(0) of the run.",
        tolerance_reason="-½: G(0) - Ḡ and H(0) are means of p independent matrices; ± half of the slope's 99 % "
        "interval.",
        read=_prediction,
    ),
    Claim(
        name="empirical-rate",
        statement="The error falls by at least the factor 1 - ηγ/4 a step.",
        reference="Theorem 3.2, equation 3.1; for ReLU, which its assumptions exclude, section 3's account",
        method="Share of runs without a ridge in which it does so in the mean of every interval between recordings, "
        "γ = λ_min(Ḡ) of the run's inputs. Single steps are the matter of song2021.convergence.",
        tolerance_reason=f"The least share of so many runs that does not contradict 1 - δ = {1 - DELTA:g} at 99 %, by "
        "the binomial law.",
        read=_contraction,
    ),
)

_SHOWN = {"H_norm": ("|H(0)|", "-"), "G_change": ("max |G(t) - G(0)|", ":")}
"""Column -> its name and its line."""


def _kernels_by_width(data: pl.DataFrame) -> Figure:
    """|H(0)| and the largest change of G against the width; how far the error is from its prediction along training."""
    figure, (left, right) = panels(
        2,
        titles=["Kernels against the width", f"{NAMES['tanh']}: error, less its limit"],
        ylabels=["spectral norm / λ_min(Ḡ)"],
        height=3.4,
    )
    left.set_xlabel("width p")
    ends = data.filter(pl.col("shown").is_in(list(_SHOWN))).sort("p")
    for colour, marker, (activated, runs) in zip(COLOURS, MARKERS, each_of(ends, "activation"), strict=False):
        for column, (name, style) in _SHOWN.items():
            each = runs.filter(pl.col("shown") == column)
            left.errorbar(
                each["p"],
                each["mean"],
                yerr=error_bars(each["mean"], each["sd"]),
                color=colour,
                marker=marker,
                linestyle=style,
                capsize=2,
                label=f"{NAMES[activated]}: {name}",
            )
    first = ends.filter(pl.col("shown") == "H_norm").group_by("p").agg(pl.col("mean").max()).sort("p")
    # Above the points, so that they do not hide the line.
    law(left, first["p"], 1.6 * first["mean"][0] * (first["p"][0] / first["p"]).sqrt(), "∝ 1/√p")
    logarithmic(left, "both")
    left.legend(fontsize=8)
    right.set(xlabel="step", ylabel="|e(t) - e∞(t)| / |y|")
    along = data.filter((pl.col("shown") == "discrepancy") & (pl.col("step") > 0)).sort("step")
    for colour, (p, runs) in zip(sequence(along["p"].n_unique()), each_of(along, "p"), strict=True):
        for strength, style in zip(sorted(runs["strength"].unique().to_list()), ("-", ":"), strict=False):
            each = runs.filter(pl.col("strength") == strength)
            label = f"p = {p}" if strength == 0 else None
            right.plot(each["step"], each["mean"], color=colour, linestyle=style, label=label)
    logarithmic(right, "both")
    right.legend(fontsize=8, ncols=2)
    return figure


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    """Means and standard deviations over the seeds, of what is shown against the width and along training."""
    plain = table.filter(pl.col("strength") == 0)
    start = plain.filter(pl.col("step") == 0)
    along = table.filter(pl.col("activation") == "tanh")
    parts = (
        (start, "H_norm", ["activation", "p"]),
        (_worst(plain, "G_change"), "G_change", ["activation", "p"]),
        (along, "discrepancy", ["strength", "p", "step"]),
    )
    collected = [summary(runs, column, by=by).with_columns(shown=pl.lit(column)) for runs, column, by in parts]
    return pl.concat(collected, how="diagonal_relaxed")


KERNELS = Experiment(
    name="song2021.kernels",
    title="Kernels along training",
    source="Song, Xu and Lafferty 2021, section 3",
    revision=1,
    grid={
        "smoke": _points((50, 3200), n=4, d=8, steps=20),
        "quick": _points((100, 400, 1600, 6400), n=10, d=20, steps=200),
        # below p = 16n a relative discrepancy of 0.2 is no longer small: its exponent there is above -½
        "paper": _points((800, 1600, 3200, 6400, 12800), n=50, d=150, steps=500),
    },
    seeds={"smoke": 8, "quick": 8, "paper": 50},
    run=_run,
    agreement=1e-10,
    together=("strength",),
    at_most=20,
    memory=_memory,
    cost=lambda *, p, n, steps: float(p * n * steps),
    pictures=(
        Picture(
            name="kernels",
            caption="Left: the feedback's kernel H at the start and the largest change of G in a run without a ridge, "
            "spectral norms relative to λ_min(Ḡ), mean ± standard deviation. Right: how far the error of tanh networks "
            "is from e∞(t), what infinite width makes of the same e(0); dotted with a ridge.",
            data=_picture_data,
            draw=_kernels_by_width,
        ),
    ),
    claims=_CLAIMS,
)
