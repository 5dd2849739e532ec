"""What is stated of FA far from the optimum, and how it is judged."""

import polars as pl
import scipy

from falign.lab.experiment import Check, Claim, Reading
from falign.lab.experiment.statistics import CONFIDENCE, least_share, slope
from falign.papers.garg2022.groups import groups, most
from falign.theory.factorisation import RatioLaw

LAST = pl.col("tail") == 1
"""The instance diag(1, …, 1, ε)."""
_LEAST_R = 5
"""From where on the median ratio² is of the order of r."""


def _far(table: pl.DataFrame) -> Reading:
    """Share of the draws with ``ratio² ≥ 1/(1/(δ(r+1)) + ε²)``, which Markov's inequality promises with 1 - δ."""
    checks = []
    for label, own in groups(table, ["r"]):
        r, epsilon = int(own["r"][0]), float(own["epsilon"][0])
        for delta in (0.5, 0.1):
            least = (1 / (delta * (r + 1)) + epsilon**2) ** -0.5
            if least <= 1:
                continue
            share = float((own["ratio"] >= least).to_numpy().mean())
            name = f"{label}: share of {own.height} draws with a ratio of at least {least:.3g}"
            checks.append(Check(label=name, measured=share, low=least_share(own.height, 1 - delta)))
    return Reading(checks=tuple(checks))


def _law(table: pl.DataFrame) -> Reading:
    """Largest distance between the distribution of ratio² and its law (Kolmogorov and Smirnov)."""
    kinds = list(groups(table, ["r"]))
    checks = []
    for label, own in kinds:
        law, squares = RatioLaw(r=int(own["r"][0]), epsilon=float(own["epsilon"][0])), own["ratio"].to_numpy() ** 2
        low, middle, high = law.quantile([0.1, 0.5, 0.9])
        found = scipy.stats.kstest(squares, law.cdf).statistic
        limit = scipy.stats.kstwo.ppf(1 - (1 - CONFIDENCE) / len(kinds), len(squares))
        name = f"{label}: distance of distributions (10, 50, 90 %: {low:.3g}, {middle:.3g}, {high:.4g})"
        checks.append(Check(label=name, measured=float(found), high=float(limit)))
    return Reading(checks=tuple(checks))


def _grows(table: pl.DataFrame) -> Reading:
    medians = table.filter(pl.col("r") >= _LEAST_R).group_by("r", "seed").agg(square=pl.col("ratio").median() ** 2)
    found = slope(medians.select("seed", pl.col("r").log(), pl.col("square").log()), "r", "square")
    width = 0.1 + found.half()
    return Reading(checks=(Check(label="exponent of r", measured=found.value, low=1 - width, high=1 + width),))


def _reached(table: pl.DataFrame) -> Reading:
    fa = most(table.drop_nulls("fa"), (pl.col("fa") / pl.col("ratio") - 1).abs(), ["tail", "r", "share"], 0.01)
    gd = most(table.drop_nulls("gd"), (pl.col("gd") - 1).abs(), ["tail", "r", "share"], 0.01)
    named = [
        Check(label=f"{method}, {check.label}", measured=check.measured, high=check.high)
        for method, found in (("fa", fa), ("gd", gd))
        for check in found.checks
    ]
    return Reading(checks=tuple(named))


def _tails(table: pl.DataFrame) -> Reading:
    checks = []
    for label, own in groups(table, ["r", "tail", "share"]):
        squares = own["ratio"] ** 2
        name = f"{label}: median of error² over its estimate (error²/optimum²: median {squares.median():.3g})"
        measured = float(((own["ratio"] / own["estimate"]) ** 2).median())  # pyright: ignore[reportArgumentType]
        checks.append(Check(label=name, measured=measured, low=0.9, high=1.1))
    return Reading(checks=tuple(checks))


CLAIMS = (
    Claim(
        name="separation",
        statement="FA can be far from optimal when r < rank(Y), a provable separation from gradient descent: on "
        "diag(1, …, 1, ε) it is √(δ(r+1)) times worse with probability 1 - δ, for small ε.",
        place="Abstract, “the first provable separation result between gradient descent and FA”; its instance is not "
        "readable, this one and its bound are derived: E c² = 1/(r+1), and Markov's inequality",
        how="Share of the draws of B with error/optimum ≥ (1/(δ(r+1)) + ε²)^(-1/2), δ = 0.5 and 0.1.",
        because="The least share of so many draws that does not contradict 1 - δ at 99 % (binomial law).",
        read=_far,
        scope=LAST,
    ),
    Claim(
        name="law-of-the-ratio",
        statement="On diag(1, …, 1, ε) ratio² = 1/(c² + ε²(1 - c²)) with c² ~ Beta(½, r/2): its tail is heavy.",
        place="Derived: FA leaves out the one direction that B does not see, of which c is the last coordinate",
        how="Largest distance between the distribution of the draws and the law.",
        because="At most what so many draws of the law exceed in 1 % of the cases (Kolmogorov and Smirnov; all r "
        "together, Bonferroni).",
        read=_law,
        scope=LAST,
    ),
    Claim(
        name="worse-with-r",
        statement="The typical ratio² of errors grows in proportion to r.",
        place="Derived",
        how=f"Slope of log median ratio² against log r, r ≥ {_LEAST_R}; one a seed.",
        because="1 ± 0.1, and half the 99 % interval over the seeds (Student's t) on top.",
        read=_grows,
        scope=LAST,
    ),
    Claim(
        name="trained-errors",
        statement="Training gets there: FA to the error of its closed form, gradient descent to the optimum.",
        place="Derived; of gradient descent in the abstract",
        how="Largest relative deviation of the errors at the end of trainings.",
        because="At most 1 %: directions that B hardly sees are learned slowly.",
        read=_reached,
    ),
    Claim(
        name="far-in-every-draw",
        statement="With r ones and a long flat tail FA is far from optimal, without luck or misfortune: its error² is "
        "about τ + Σ τ/(s_i² + τ), τ the tail's energy, s_i the singular values of a square Gaussian matrix.",
        place="Derived",
        how="Median over the draws of error² over this estimate.",
        because="1 ± 0.1: the estimate is for infinitely long tails.",
        read=_tails,
        scope=~LAST,
    ),
)
