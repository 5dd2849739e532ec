"""Two-layer linear feedback alignment and the interpolant of least norm."""

from math import inf, nan

import numpy as np
import pytest
import torch

from falign.theory.minimum_norm import least_norm, minimum_norm


def _data(n=8, d=24, k=2):
    random = torch.Generator().manual_seed(3)
    return torch.randn(n, d, generator=random).double(), torch.randn(n, k, generator=random).double()


def test_least_norm_interpolates_and_is_the_shortest():
    X, Y = _data()
    M = least_norm(X, Y)
    torch.testing.assert_close(X @ M.mT, Y)
    expected = np.linalg.lstsq(X.numpy(), Y.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(M.numpy(), expected, atol=1e-12)


def test_deviation_is_proportional_to_the_first_layer_and_zero_for_none():
    X, Y = _data()
    check = minimum_norm(X, Y, hidden=16, sizes=[0.0, 1e-3, 1e-2, 0.1, 1.0], seeds=range(3))
    assert check.verdict == "holds", check.sentence
    deviation = check.series["relative deviation"]
    assert float(deviation[:, 0].max()) < 1e-12
    assert ((deviation[:, 1] > 1e-5) & (deviation[:, 1] < 3e-3)).all()
    assert (deviation[:, -1] > 0.1).all()
    assert check.constants["slope"] == pytest.approx(1, abs=0.03)


def test_too_few_steps_and_too_many_points_are_assumptions_that_fail():
    X, Y = _data()
    early = minimum_norm(X, Y, hidden=16, sizes=[0.0], seeds=[0], steps=10)
    assert [assumption.name for assumption in early.failing] == ["converged"]
    assert early.constants == {}
    X, Y = _data(n=30, d=10)
    check = minimum_norm(X, Y, hidden=16, sizes=[0.0], seeds=[0], steps=10)
    assert "overparameterised" in [assumption.name for assumption in check.failing]


@pytest.mark.parametrize(
    "wrong", [{"sizes": []}, {"sizes": [-1.0]}, {"sizes": [1.0, 0.0]}, {"sizes": [nan]}, {"seeds": []}, {"hidden": 1}]
)
def test_what_makes_no_run_is_refused(wrong):
    X, Y = _data()
    with pytest.raises(ValueError, match=r"sizes of at least 0, a seed and a width of at least 2|sizes\[0\] is nan"):
        minimum_norm(X, Y, **{"hidden": 16, "sizes": [0.0], "seeds": [0], **wrong})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"X": torch.full((8, 24), nan)}, "192 numbers of the inputs are not finite"),
        ({"X": torch.zeros(8, 24)}, "the inputs are all 0"),
        ({"X": torch.ones(8, 24).double() * 1e200}, "scale the data first"),
        ({"Y": torch.zeros(8, 2)}, "the targets are all 0"),
        ({"Y": torch.ones(8)}, r"targets have shape \(8,\)"),
        ({"Y": torch.ones(7, 2)}, "8 inputs and 7 targets"),
        ({"rate": nan}, "rate is nan, expected a finite number"),
        ({"rate": inf}, "rate is inf"),
        ({"rate": -1.0}, "rate is -1.0"),
        ({"steps": -1}, "steps is -1, expected a whole number from 1 on"),
        ({"converged": nan}, "converged is nan"),
    ],
)
def test_data_and_numbers_of_no_use_are_refused_in_a_sentence(wrong, named):
    X, Y = _data()
    given = {"X": X, "Y": Y, "hidden": 4, "sizes": [0.0], "seeds": [0], **wrong}
    with pytest.raises(ValueError, match=named):
        minimum_norm(given.pop("X"), given.pop("Y"), **given)


@pytest.mark.parametrize("rate", [5.0, 1e300])
def test_runs_that_diverge_fail_without_an_error(rate):
    check = minimum_norm(*_data(), hidden=4, sizes=[0.1], seeds=[0], rate=rate)
    assert [assumption.name for assumption in check.failing] == ["converged"]
    assert not check.series["relative deviation"].isfinite().any()


def test_least_norm_takes_any_types_and_lists():
    X, Y = _data()
    expected = least_norm(X.float().double(), Y)
    torch.testing.assert_close(least_norm(X.float(), Y), expected)
    torch.testing.assert_close(least_norm(X.float().tolist(), Y.numpy()), expected)
    with pytest.raises(ValueError, match="8 inputs and 3 targets"):
        least_norm(X, Y[:3])
