"""What section 3 states of the kernels along training, and how it is judged."""

import polars as pl

from falign.lab.experiment import Check, Claim, Reading
from falign.lab.experiment.statistics import Estimate, least_share, slope
from falign.papers.song2021.checks import DELTA


def worst(table: pl.DataFrame, column: str) -> pl.DataFrame:
    """The largest value of each run."""
    return table.group_by("activation", "strength", "p", "n", "seed").agg(pl.col(column).max())


def _exponent(runs: pl.DataFrame, column: str) -> Estimate:
    """Mean over the seeds of the slope of log column against log p."""
    return slope(runs.with_columns(pl.col("p").log(), pl.col(column).log()), "p", column)


def _groups(table: pl.DataFrame, *columns: str) -> list[tuple[tuple, pl.DataFrame]]:
    return list(table.sort(columns).group_by(columns, maintain_order=True))


def _feedback_kernel(table: pl.DataFrame) -> Reading:
    """Exponent of |H(0)|."""
    groups = _groups(table.filter((pl.col("step") == 0) & (pl.col("strength") == 0)), "activation")
    checks = []
    for (name,), runs in groups:
        found = _exponent(runs, "H_norm")
        half = found.half(len(groups))
        checks.append(
            Check(label=f"{name}: exponent of p in |H(0)|", measured=found.value, low=-0.5 - half, high=-0.5 + half)
        )
    return Reading(checks=tuple(checks), note=f"{table['seed'].n_unique()} seeds")


def _constancy(table: pl.DataFrame) -> Reading:
    """Exponents of the largest changes of G and H."""
    groups = _groups(table.filter(pl.col("strength") == 0), "activation")
    checks = []
    for (name,), own in groups:
        for column, kernel in (("G_change", "G"), ("H_change", "H")):
            found = _exponent(worst(own, column), column)
            label = f"{name}: exponent of p in max |{kernel}(t) - {kernel}(0)|"
            checks.append(Check(label=label, measured=found.value, high=-0.5 + found.half(2 * len(groups))))
    return Reading(checks=tuple(checks), note=f"{table['seed'].n_unique()} seeds")


def _prediction(table: pl.DataFrame) -> Reading:
    """Exponent of the largest distance to the prediction."""
    groups = _groups(table, "activation", "strength")
    checks = []
    for (name, strength), own in groups:
        found = _exponent(worst(own, "discrepancy"), "discrepancy")
        half = found.half(len(groups))
        label = f"{name}, λ = {strength:g}: exponent of p in max |e(t) - e∞(t)|/|y|"
        checks.append(Check(label=label, measured=found.value, low=-0.5 - half, high=-0.5 + half))
    return Reading(checks=tuple(checks), note=f"{table['seed'].n_unique()} seeds")


def _contraction(table: pl.DataFrame) -> Reading:
    """Share of runs whose error falls as the theorem says between all recordings."""
    plain = table.filter((pl.col("strength") == 0) & (pl.col("step") > 0))
    unit = pl.col("rate") * pl.col("gamma")
    runs = plain.group_by("activation", "p", "seed").agg(slowest=((1 - pl.col("contraction")) / unit).min())
    checks = []
    for (name, p), own in _groups(runs, "activation", "p"):
        slowest = own["slowest"].to_numpy()
        checks.append(
            Check(
                label=f"{name}, p = {p}: share of {own.height} runs (slowest: 1 - {slowest.min():.2f}ηγ)",
                measured=float((slowest >= 0.25).mean()),
                low=least_share(own.height, 1 - DELTA),
            )
        )
    return Reading(checks=tuple(checks))


CLAIMS = (
    Claim(
        name="feedback-kernel-vanishes",
        statement="H is close to 0 at initialization if the network is over-parameterized.",
        place="Section 3, after the equation for e(t+1)",
        how="Slope of log |H(0)|, the spectral norm, against log p: one a seed, and their mean.",
        because="-½, the order of a mean of p independent matrices whose mean is 0; ± half of the slope's 99 % "
        "interval by Student's t over the seeds, for both activations together (Bonferroni).",
        read=_feedback_kernel,
    ),
    Claim(
        name="kernels-stay",
        statement="The entries of both matrices remain close to their initial values.",
        place="Section 3, after the equation for e(t+1)",
        how="Slope, as before, of the largest spectral norm of G(t) - G(0), and of H(t) - H(0), along runs without "
        "a ridge. No entry of a matrix is larger than that norm.",
        because="At most -½, the rate at which single weights move in theorem 3.2, plus half of the slope's 99 % "
        "interval. Less agrees with it: what b multiplies averages out over the neurons, which makes it -1.",
        read=_constancy,
    ),
    Claim(
        name="infinite-width",
        statement="The error follows e(t+1) = (I - ηḠ)e(t) up to 1/√p; with a ridge, "
        "e(t+1) = ((1 - ηλ)I - ηḠ)e(t) + ηλy.",
        place="Section 3, G + H ≈ Ḡ made exact in the limit; the order and the ridge's term are derived here",
        how="Slope, as before, of the largest |e(t) - e∞(t)|/|y| of a run, e∞ begun at the run's own e(0).",
        because="-½: G(0) - Ḡ and H(0) are means of p independent matrices; ± half of the slope's 99 % interval.",
        read=_prediction,
    ),
    Claim(
        name="empirical-rate",
        statement="The error falls by at least the factor 1 - ηγ/4 a step.",
        place="Theorem 3.2, equation 3.1; for ReLU, which its assumptions exclude, section 3's account",
        how="Share of runs without a ridge in which it does so in the mean of every interval between recordings, "
        "γ = λ_min(Ḡ) of the run's inputs. Single steps are the matter of song2021.convergence.",
        because=f"The least share of so many runs that does not contradict 1 - δ = {1 - DELTA:g} at 99 %, by the "
        "binomial law.",
        read=_contraction,
    ),
)
