"""Two-layer linear feedback alignment and the interpolant of least norm."""

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


@pytest.mark.parametrize("wrong", [{"sizes": []}, {"sizes": [-1.0]}, {"seeds": []}, {"hidden": 1}])
def test_what_makes_no_run_is_refused(wrong):
    X, Y = _data()
    with pytest.raises(ValueError, match="sizes of at least 0, a seed and a width of at least 2"):
        minimum_norm(X, Y, **{"hidden": 16, "sizes": [0.0], "seeds": [0], **wrong})
