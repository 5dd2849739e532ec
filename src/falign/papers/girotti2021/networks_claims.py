"""What is stated of the order of learning in networks."""

import polars as pl

from falign.lab.experiment import Claim
from falign.papers.girotti2021.networks_readings import (
    MOSTLY,
    decreasing,
    differs,
    exactly,
    gradient_slopes,
    leaves,
    same,
    slopes,
    waits,
)

_RANDOM, _FEEDBACK = pl.col("basis") == "random", pl.col("rule") != "bp"
_AGAINST = pl.col("scheme") == "anti-aligned"
_PAIRS = "Share of the pairs of components of which the larger reaches 90 % first, mean over the seeds."
_STUDENT = "half the 99 % interval over the seeds (Student's t, all together)"

CLAIMS = (
    Claim(
        name="networks-regularise",
        statement="Trained from small weights, networks learn the components approximately in decreasing order.",
        place="Abstract; that random weights and feedback do it, at depth 3 and for dfa too, is tried here",
        how=_PAIRS,
        because=f"At least {MOSTLY:g}, and above ½ by {_STUDENT}. “Approximately” is ours: "
        "neighbours of nearly the same size may change places, as random feedback carries them unequally.",
        read=lambda table: decreasing(table, 1),
        scope=_FEEDBACK & _RANDOM & (pl.col("scheme") == "small"),
    ),
    Claim(
        name="networks-anti-regularise",
        statement="Trained from hidden weights against their feedback path, networks learn negligible components "
        "before principal ones.",
        place="Abstract; that this is such a start is derived, and tried on random feedback here",
        how=_PAIRS,
        because=f"At most {1 - MOSTLY:.2g}, and below ½ by {_STUDENT}.",
        read=lambda table: decreasing(table, -1),
        scope=_FEEDBACK & _RANDOM & _AGAINST,
    ),
    Claim(
        name="networks-only-the-start-differs",
        statement="Which of the two it is depends on the initial weights alone.",
        place="Abstract: “certain specific initializations imply …”, “we also provide initialization schemes where …”",
        how="Difference of the shares between both starts, paired by seed: the same data, feedback and steps.",
        because="Above 0 by " + _STUDENT + ".",
        read=lambda table: differs(table, "scheme", "anti-aligned", "small"),
        scope=(pl.col("rule") == "fa") & (pl.col("depth") == 2) & _RANDOM,
    ),
    Claim(
        name="networks-spectral",
        statement="With orthogonal feedback and zero or anti-aligned weights the order has no exception.",
        place="Derived: the components are uncoupled",
        how="Share of the pairs in order, least and most of the seeds.",
        because="1 from zero, 0 from anti-aligned weights.",
        read=exactly,
        scope=pl.col("basis") == "spectral",
    ),
    Claim(
        name="networks-power-law",
        statement="The times follow the powers of the spectral theory without its assumption: -2/3 of two layers, -6/7 "
        "of three.",
        place="Derived for uncoupled components; tried on random weights and feedback here",
        how="Slope of the logarithm of the time against log λ over the components, one a seed; their mean.",
        because="± 0.1, for the coupling of the components by random feedback and for the size of the steps.",
        read=slopes,
        scope=_FEEDBACK & _RANDOM & (pl.col("scheme") == "small"),
    ),
    Claim(
        name="networks-gradient-parts-more",
        statement="Gradient descent parts the components more than feedback alignment does.",
        place="Derived: ln(1/ε)/λ against λ^(-2/3)",
        how="Difference of the slopes of the logarithm of the time against log λ, two layers, paired by seed: the same "
        "small weights.",
        because="Below 0 by " + _STUDENT + ".",
        read=gradient_slopes,
        scope=_RANDOM & (pl.col("scheme") == "small") & (pl.col("depth") == 2),
    ),
    Claim(
        name="networks-gradient",
        statement="Gradient descent from the same start is not anti-regularised.",
        place="Derived: its error returns by the weights, which cannot be against themselves",
        how="Difference of the shares between gradient descent and feedback alignment, paired by seed: the same "
        "weights.",
        because="Above 0 by " + _STUDENT + ".",
        read=lambda table: differs(table, "rule", "fa", "bp"),
        scope=_RANDOM & _AGAINST,
    ),
    Claim(
        name="networks-no-staircase",
        statement="Gradient descent waits at a plateau before it learns a component, feedback alignment does not.",
        place="Derived",
        how="Time of the first 10 % of a component over that of 90 %, mean over the components; the difference, paired "
        "by seed: the same small weights.",
        because="Above 0 by " + _STUDENT + ".",
        read=waits,
        scope=_RANDOM & (pl.col("scheme") == "small") & (pl.col("depth") == 2),
    ),
    Claim(
        name="networks-rest-unstable",
        statement="Where an input direction is used by no component, the rest against the feedback does not last: what "
        "the weights have on that direction grows at the rate m|θ_2*|.",
        place="Derived: e_ij' = -(mθ_2i + θ_1j²) e_ij next to a rest, and θ_1j = 0 there. Of single components the "
        "rest is stable",
        how="Slope of the logarithm of the largest |u_iᵀ W_2W_1 v| on unused directions v over time, from the exact "
        "spectral start, where it grows out of rounding; over m|θ_2*| of the largest component.",
        because="1 ± 0.05: other components grow beside it.",
        read=leaves,
        scope=_FEEDBACK & _AGAINST & (pl.col("basis") == "spectral") & (pl.col("task") != "pixels"),
    ),
    Claim(
        name="networks-exact",
        statement="What falign trains is the dynamics that the theory is about.",
        place="Derived",
        how="Difference of the learned shares between the PyTorch network and the matrix dynamics on compressed data, "
        "the most of all components over the first 100 steps.",
        because="At most 1e-9: rounding.",
        read=same,
    ),
)
