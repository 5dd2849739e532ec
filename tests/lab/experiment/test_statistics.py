"""The numbers that claims are read off, against NumPy and SciPy."""

import numpy as np
import polars as pl
import pytest
from scipy import stats

from falign.lab.experiment import Missing
from falign.lab.experiment.statistics import final, mean, needed, paired, slope, summary

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
    np.testing.assert_allclose(found.significance, 0.25 / stats.sem([0.2, 0.3]))


def test_a_slope_is_that_of_weighted_least_squares() -> None:
    x, y, errors = np.array([0.0, 1.0, 3.0]), np.array([1.0, 2.5, 4.0]), np.array([0.1, 0.2, 0.4])
    found = slope(x.tolist(), y.tolist(), errors.tolist())
    fit, covariance = np.polyfit(x, y, 1, w=1 / errors, cov="unscaled")
    np.testing.assert_allclose([found.value, found.error], [fit[0], covariance[0, 0] ** 0.5])
    with pytest.raises(Missing):
        slope([1.0], [1.0], [1.0])


def test_what_a_claim_needs_is_named() -> None:
    needed(RUNS, "p", [1, 2])
    with pytest.raises(Missing, match="no run is done with p = 3, 4"):
        needed(RUNS, "p", [2, 3, 4])
