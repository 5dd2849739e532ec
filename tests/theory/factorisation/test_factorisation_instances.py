"""Hard instances with their laws, representations, and the range finder."""

import factorisation_oracle as oracle
import numpy as np
import pytest
import torch
from factorisation_cases import matrix
from scipy.integrate import quad
from scipy.stats import kstest

from falign.theory.factorisation import (
    RatioLaw,
    best_error,
    expected_bound,
    feedback,
    flat_spectrum,
    flat_tail,
    flat_tail_error,
    gradient_descent,
    last_direction,
    near_orthogonality,
    optimal_rows,
    overlap,
    range_finder,
    range_finder_ratios,
    sampling_bound,
    separation,
    stationary,
    stationary_error,
    zero,
)

QUANTILES = {1: [1.03, 2.1, 34.0], 5: [2.1, 12.0, 190.0], 20: [6.4, 53.0, 829.0], 50: [18.0, 119.0, 5321.0]}
"""r -> of simulations with ε = 10⁻³, at 10, 50 and 90 %: of finitely many draws, so that the law is near."""


@pytest.mark.parametrize("r", QUANTILES)
def test_law_of_the_ratio(r):
    law = RatioLaw(r=r, epsilon=1e-3)
    found = law.quantile([0.1, 0.5, 0.9])
    np.testing.assert_allclose(law.cdf(QUANTILES[r]), [0.1, 0.5, 0.9], atol=0.05)
    np.testing.assert_allclose(law.cdf(found), [0.1, 0.5, 0.9], atol=1e-10)
    assert law.cdf([0.5, 2e6]).tolist() == [0.0, 1.0]
    draws = 300
    Y, B = last_direction(r, 1e-3), feedback(r + 1, r, seeds=range(draws))
    ratio = (stationary_error(Y, B) / 1e-3).square()
    assert kstest(ratio.numpy(), law.cdf).pvalue > 0.01
    null = torch.linalg.svd(B[0]).Vh[-1]
    exact = 1 / (null.square() / Y.diagonal().square()).sum()
    assert float(ratio[0] * 1e-6) == pytest.approx(float(exact), rel=1e-9)


def test_typical_ratios_grow_with_r_and_their_mean_with_one_over_epsilon():
    medians = [float(RatioLaw(r=r, epsilon=1e-6).quantile(0.5)) / r for r in (50, 200, 800)]
    np.testing.assert_allclose(medians, 1 / 0.4549, rtol=0.03)
    for r, epsilon in ((1, 0.3), (5, 1e-2), (50, 1e-3)):
        law = RatioLaw(r=r, epsilon=epsilon)
        known = quad(law.quantile, 0, 1, limit=2000, epsabs=0, epsrel=1e-8)[0]
        assert law.mean == pytest.approx(known, rel=1e-5)
    assert RatioLaw(r=400, epsilon=1e-4).mean == pytest.approx((np.pi * 400 / 2) ** 0.5 / 1e-4, rel=0.01)


def test_separation_is_a_statement_about_draws():
    for r in (1, 5, 20):
        check = separation(r, 1e-3, seeds=range(200))
        assert check.verdict == "holds", check.sentence
        assert check.constants["median of the law"] > 1.9 * r
    often = separation(5, 1e-3, seeds=range(200), delta=0.1)
    assert often.share > 0.8
    assert f"(a share of {often.share_needed:.3g} is needed; least slack" in often.sentence
    assert separation(3, 1e-12, seeds=range(50), delta=0.1).verdict == "holds"


@pytest.mark.parametrize(
    ("r", "tail", "share", "error", "ratio"),
    [(20, 380, 0.0025, 0.062, 25), (20, 380, 0.05, 0.25, 5), (50, 550, 0.0004, 0.0245, 62)],
)
def test_flat_tails(r, tail, share, error, ratio):
    Y = flat_tail(r, tail, share)
    assert float(best_error(Y, r).square() / Y.square().sum()) == pytest.approx(share, rel=1e-9)
    B = feedback(r + tail, r, seeds=range(20))
    found = stationary_error(Y, B).square() / Y.square().sum()
    assert float(found.mean()) == pytest.approx(error, rel=0.15)
    assert float(found.mean()) / share == pytest.approx(ratio, rel=0.15)
    nearly = flat_tail_error(B[:, :, :r] * (r + tail) ** 0.5, r * share / (1 - share)).square() / Y.square().sum()
    assert float(nearly.mean()) == pytest.approx(float(found.mean()), rel=0.15)


def test_relative_error_goes_as_the_root_of_the_optimum():
    r, share = 200, 1e-3
    top = feedback(r, r, seeds=range(20)) * r**0.5
    tau = r * share / (1 - share)
    relative = flat_tail_error(top, tau).square().mean() / (r + tau)
    assert float(relative) == pytest.approx(share**0.5, rel=0.06)


@pytest.mark.parametrize(
    ("m", "kind", "ratio", "shared"),
    [(400, "flat", 1.0013, 0.014), (400, "normal", 1.012, 0.046), (100, "normal", 1.042, 0.16)],
)
def test_equal_errors_with_other_representations(m, kind, ratio, shared):
    Y = flat_spectrum(m, 5) if kind == "flat" else matrix(m, m, seed=m)
    B = feedback(m, 5, seeds=range(40))
    check = near_orthogonality(Y, B)
    assert check.constants["error ratio"] == pytest.approx(ratio, abs=0.1 * (ratio - 1) + 5e-5)
    assert check.constants["overlap"] == pytest.approx(shared, rel=0.2)
    if kind == "flat":
        assert check.verdict == "holds", check.sentence
        assert check.constants["r/m"] == 0.0125
    else:
        assert [assumption.name for assumption in check.failing] == ["flat spectrum"]


def test_a_trained_factorisation_has_the_representation_of_the_closed_form():
    Y, B = flat_spectrum(12, 2), feedback(12, 2, seeds=range(2))
    trajectory = gradient_descent("fa", Y, B, zero(Y, B), rate=0.1, steps=3000, names=["distance", "overlap"])
    assert trajectory["distance"][:, -1].max() < 1e-10
    torch.testing.assert_close(overlap(trajectory.end.W, B @ Y), torch.ones(2).double())
    known = overlap(B @ Y, optimal_rows(Y, 2).expand(2, 2, 12))
    torch.testing.assert_close(trajectory["overlap"][:, -1], known)


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("oversampling", [0, 4])
def test_range_finder_is_the_textbooks(oversampling, power):
    Y, B = matrix(14, 11), feedback(14, 3 + oversampling, seeds=range(3))
    found = range_finder(Y, B, rank=3, power=power)
    for run in range(3):
        expected = oracle.range_finder(Y.numpy(), B[run].numpy(), 3, power)
        np.testing.assert_allclose(found[run], expected, atol=1e-9)
    if not oversampling and not power:
        torch.testing.assert_close(found, stationary(Y, B))
        trajectory = gradient_descent("fa", Y, B, zero(Y, B), rate=0.05, steps=4000, names=["error"], at=[4000])
        torch.testing.assert_close(trajectory.end.Z @ trajectory.end.W, found, rtol=0, atol=1e-8)


def test_oversampling_and_power_buy_the_optimum():
    Y, B = matrix(60, 60), feedback(60, 30, seeds=range(20))
    ratios = range_finder_ratios(Y, B, rank=10, oversampling=[0, 5, 20], power=[0, 1, 4]).mean(0)
    assert (ratios >= 1).all()
    assert (ratios.diff(dim=0) < 0).all()
    assert (ratios.diff(dim=1) < 0).all()
    assert ratios[-1, -1] < 1.005
    without = stationary_error(Y, B[:, :10]).mean() / best_error(Y, 10)
    assert float(ratios[0, 0]) == pytest.approx(float(without), rel=1e-12)


def test_mean_error_is_below_the_range_finders_bound():
    for Y in (matrix(40, 40), torch.diag(0.7 ** torch.arange(40).double())):
        check = sampling_bound(Y, feedback(40, 8, seeds=range(100)))
        assert check.verdict == "holds", check.sentence
        assert check.constants["optimum"] < float(check.measured) < check.constants["bound"]
    values = np.sort(np.abs(np.random.default_rng(0).normal(size=9)))[::-1].copy()
    expected = min(((1 + k / (5 - k - 1)) * (values[k:] ** 2).sum()) ** 0.5 for k in range(4))
    assert expected_bound(torch.from_numpy(values), 5) == pytest.approx(expected, rel=1e-12)
