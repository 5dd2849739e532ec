"""Proposition 3.3, definition 4.4, proposition 4.5."""

from itertools import pairwise
from math import log

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chi2

from falign.theory.two_layer.theorems import (
    is_isometric,
    isometry,
    proposition_3_3,
    proposition_4_5,
    sufficient_dimension,
)
from falign.theory.two_layer.theorems._data import clopper_pearson


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_smallest_eigenvalue_stays_away_from_zero(activation, ratio):
    check = proposition_3_3((10, 20, 40, 80), ratio=ratio, activation=activation, seeds=range(6))
    assert check.verdict == "holds", check.sentence
    assert check.measured.shape == (6, 4)


def test_it_approaches_the_limit_that_is_derived():
    check = proposition_3_3((40, 160), ratio=3.0, activation="tanh", seeds=range(4))
    weight = lambda u: np.exp(-u * u / 2) / np.sqrt(2 * np.pi)  # noqa: E731
    square = quad(lambda u: weight(u) * np.tanh(u) ** 2, -9, 9)[0]
    first = quad(lambda u: weight(u) * np.tanh(u) * u, -9, 9)[0]
    limit = square - first**2 + first**2 * (1 - 3**-0.5) ** 2
    assert check.constants["limit"] == pytest.approx(limit, abs=1e-9)
    assert check.constants["least at the largest n"] == pytest.approx(limit, rel=0.1)


def test_an_affine_activation_has_no_floor_at_ratio_one():
    check = proposition_3_3((10, 40), ratio=1.0, activation="identity", seeds=range(4))
    assert check.verdict == "assumption fails"
    assert "not affine" in [assumption.name for assumption in check.failing]
    assert check.constants["slope in log n"] < -0.5


def test_isometry_is_read_off_the_singular_values():
    X = torch.diag(torch.tensor([1.0, 2.0, 1.5])).double()
    gamma, epsilon = isometry(X)
    assert (float(gamma), float(epsilon)) == pytest.approx((1.0, 3.0))
    assert bool(is_isometric(X, 1.0, 3.0))
    assert not bool(is_isometric(X, 1.01, 3.0))
    assert not bool(is_isometric(X, 1.0, 2.9))
    assert not bool(is_isometric(X, 0.5, 3.0)), "γ below λ_min asks for more: λ_max ≤ (1 + ε)γ"
    tall = torch.cat([X, torch.zeros(2, 3).double()])
    assert float(isometry(tall)[0]) == pytest.approx(1.0)
    assert isometry(torch.ones(2, 3))[1] == float("inf")
    with pytest.raises(ValueError, match="positive"):
        is_isometric(X, 0.0, 1.0)


def test_frequency_at_one_point_is_a_chi_square_probability():
    found = proposition_4_5((20, 80, 320), n=1, epsilon=0.2, delta=0.1, seeds=range(300))
    for d, low, high in zip(found.dimensions, found.low, found.high, strict=True):
        exact = chi2.cdf(1.8 * 0.8 * d, d) - chi2.cdf(0.8 * d, d)
        assert low - 0.02 <= exact <= high + 0.02


def test_frequency_rises_with_the_dimension_and_names_its_constant():
    found = proposition_4_5((10, 40, 160, 320, 640), n=10, epsilon=0.4, delta=0.1, seeds=range(40))
    assert found.frequency[0] == 0
    assert found.frequency[-1] == 1
    unit = log(10 / 0.1) / 0.4 + 10 / 0.4 * log(1 / 0.4)
    assert found.constant[3] == pytest.approx(320 / unit)
    assert found.sufficient == found.constant[3]
    assert found.proven == found.constant[3]
    assert proposition_4_5((10, 20), n=10, epsilon=0.4, delta=0.1, seeds=range(4)).sufficient is None


def test_no_constant_serves_every_epsilon_in_the_printed_form():
    """n = 1, exactly: the least d for P(χ²_d ≥ (1-ε)d) ≥ 1-δ over the printed unit grows like 1/(ε log 1/ε)."""
    constants = []
    for epsilon in (0.1, 0.03, 0.01, 0.003):
        d = 1
        while chi2.sf((1 - epsilon) * d, d) < 0.9:
            d = int(d * 1.02) + 1
        constants.append(d / (log(10) / epsilon + log(1 / epsilon) / epsilon))
    assert all(later > 2 * earlier for earlier, later in pairwise(constants))


@pytest.mark.parametrize(("n", "epsilon"), [(1, 0.1), (10, 0.2), (10, 0.45), (30, 0.4)])
def test_the_corrected_dimension_suffices(n, epsilon):
    d = sufficient_dimension(n, epsilon=epsilon, delta=0.1)
    assert proposition_4_5((d,), n=n, epsilon=epsilon, delta=0.1, seeds=range(20)).frequency[0] == 1


def test_clopper_pearson_covers():
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 0.30849711), abs=1e-7)
    assert clopper_pearson(10, 10) == pytest.approx((0.69150289, 1.0), abs=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimensions": (10, 10), "n": 5, "epsilon": 0.2, "delta": 0.1, "seeds": [0]}, "increasing"),
        ({"dimensions": (10,), "n": 5, "epsilon": 0.7, "delta": 0.1, "seeds": [0]}, "ε < 1/2"),
        ({"dimensions": (10,), "n": 5, "epsilon": 0.2, "delta": 0.1, "seeds": []}, "one draw"),
    ],
)
def test_bad_requests_to_proposition_4_5_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        proposition_4_5(arguments.pop("dimensions"), **arguments)


def test_bad_requests_to_proposition_3_3_are_refused():
    with pytest.raises(ValueError, match="two sample sizes"):
        proposition_3_3((10,), ratio=1.0, activation="tanh", seeds=[0])
