"""The numbers that claims are read off, against NumPy and SciPy."""

import numpy as np
import polars as pl
import pytest
from scipy import stats

from falign.lab.experiment import Missing
from falign.lab.experiment.statistics import final, least_share, mean, paired, slope, summary

RUNS = pl.DataFrame(
    {
        "p": [1, 1, 1, 1, 2, 2, 2, 2],
        "strength": [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0],
        "seed": [0, 1, 1, 0, 0, 1, 0, 1],
        "cosine": [0.1, 0.2, 0.5, 0.3, 0.0, 0.1, 0.4, 0.2],
    }
)


def test_the_last_record_of_each_run() -> None:
    table = pl.DataFrame({"p": [1, 1, 2, 2], "seed": [0, 0, 0, 0], "step": [5, 0, 0, 7], "loss": [1.0, 2.0, 3.0, 4.0]})
    assert final(table, by=["p"])["loss"].to_list() == [1.0, 4.0]


def test_a_summary_of_groups() -> None:
    row = summary(RUNS, "cosine", by=["p", "strength"]).row(0, named=True)
    values = np.array([0.1, 0.2])
    assert row["runs"] == 2
    np.testing.assert_allclose([row["mean"], row["sd"], row["error"]], [0.15, values.std(ddof=1), stats.sem(values)])


def test_a_mean_with_its_standard_error() -> None:
    values = [1.0, 2.0, 4.0]
    found = mean(values, of="x")
    np.testing.assert_allclose([found.value, found.error], [np.mean(values), stats.sem(values)])
    with pytest.raises(Missing, match="x: 1 runs are done, expected at least 2"):
        mean([1.0], of="x")


def test_pairs_are_runs_of_one_seed() -> None:
    found = paired(RUNS.filter(pl.col("p") == 1), "cosine", axis="strength", low=0.0, high=1.0, by=["p"])
    np.testing.assert_allclose([found.value, found.error], [0.25, stats.sem([0.2, 0.3])])


def test_a_confidence_interval_is_students() -> None:
    values = [1.0, 2.0, 4.0, 3.5]
    found = mean(values, of="x")
    low, high = stats.t.interval(0.99, 3, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose([found.value - found.half(), found.value + found.half()], [low, high])
    np.testing.assert_allclose(found.half(5), stats.t.ppf(1 - 0.001, 3) * stats.sem(values))
    assert mean([0.0, 0.0], of="x").above() > 0, "equal numbers are no reason to call a mean of 0 positive"


def test_a_slope_is_taken_seed_by_seed() -> None:
    table = pl.DataFrame({"seed": [0, 0, 0, 1, 1, 1], "x": [0.0, 1.0, 3.0] * 2, "y": [1.0, 2.5, 4.0, 11.0, 13.0, 14.0]})
    slopes = [stats.linregress([0, 1, 3], y).slope for y in ([1, 2.5, 4], [11, 13, 14])]
    found = slope(table, "x", "y")
    np.testing.assert_allclose([found.value, found.error], [np.mean(slopes), stats.sem(slopes)])
    with pytest.raises(Missing, match="at least 2 values of x, got 1"):
        slope(table.filter(pl.col("x") == 0), "x", "y")


def test_the_least_share_is_binomial() -> None:
    assert least_share(8, 0.9) == 5 / 8
    assert stats.binom.cdf(4, 8, 0.9) < 0.01 <= stats.binom.cdf(5, 8, 0.9)
    with pytest.raises(Missing, match="1 runs are too few"):
        least_share(1, 0.9)
