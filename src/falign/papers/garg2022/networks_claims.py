"""What is stated of two-layer linear networks, and how it is judged."""

import polars as pl

from falign.lab.experiment import Claim, Reading
from falign.lab.experiment.statistics import final
from falign.papers.garg2022.groups import most

_KIND = ["inputs", "method", "rank", "r"]
_ENOUGH = pl.col("r") >= pl.col("rank")
_FA = pl.col("method") == "fa"
_FRESH = pl.col("inputs") == "fresh"
_REACHED, _NEAR = 0.01, 0.05


def _ends(table: pl.DataFrame) -> pl.DataFrame:
    return final(table, by=_KIND)


def _reached(table: pl.DataFrame) -> Reading:
    return most(_ends(table), pl.col("error"), _KIND, _REACHED)


def _apart(table: pl.DataFrame, closed: str) -> Reading:
    return most(_ends(table), (pl.col("error") / pl.col(closed) - 1).abs(), _KIND, _NEAR)


CLAIMS = (
    Claim(
        name="networks-reach-the-optimum",
        statement="Two-layer linear networks on isotropic inputs with linear labels, trained by FA, reach the optimum "
        "when the hidden layer is as wide as the rank of what they learn.",
        place="Abstract, corollary",
        how="|W₂W₁ - Y|/|Y| at the end; the most of all networks.",
        because=f"At most {_REACHED:g}, which stands for 0: convergence is exponential, the length of a run decides.",
        read=_reached,
        scope=_FA & _ENOUGH,
    ),
    Claim(
        name="networks-end-above-the-optimum",
        statement="With a narrower hidden layer they end at Y(BY)⁺BY, above the optimum.",
        place="Abstract, corollary, for “can be far from optimal”; the closed form is derived",
        how="|W₂W₁ - Y| at the end over |Y - Y(BY)⁺BY|, B read from the network, less 1; the most of all networks.",
        because=f"At most {_NEAR:g}: on fresh inputs each step is noisy as long as there is an error.",
        read=lambda table: _apart(table, "stationary"),
        scope=_FA & ~_ENOUGH,
    ),
    Claim(
        name="backpropagation-reaches-the-best",
        statement="Backpropagation reaches the optimum of the hidden layer's rank.",
        place="Abstract, “gradient descent solves this problem optimally”, and its corollary",
        how="|W₂W₁ - Y| at the end over the least of that rank, less 1; the most of all networks.",
        because=f"At most {_NEAR:g}, as for networks-end-above-the-optimum.",
        read=lambda table: _apart(table, "best"),
        scope=~_FA & ~_ENOUGH,
    ),
    Claim(
        name="networks-are-the-factorisation",
        statement="On inputs that are isotropic on the training points each step of the network is a step of the "
        "factorisation, whitened images with their classes as labels included.",
        place="Derived, for the corollary: only the covariances of inputs and labels enter a gradient",
        how="Largest difference between the error |W₂W₁ - Y|/|Y| of the network and of the factorisation, over the "
        "whole training.",
        because="At most 1e-10: rounding.",
        read=lambda table: most(table, (pl.col("error") - pl.col("predicted")).abs(), _KIND, 1e-10),
        scope=~_FRESH,
    ),
)
