"""The linear engine against the one in weight space: number by number from a start, and in law from a sample."""

import numpy as np
import pytest
import torch
from scipy import stats
from two_layer_cases import PENALTIES, agree

from falign.theory.two_layer import Penalty, Start, WeightSpace, WidthFree, draw, simulate
from falign.theory.two_layer._start import inputs_of

AT = [0, 1, 40, 300]
UNKNOWN = ("beta_change", "weight_change")


@pytest.mark.parametrize("shape", [(6, 7, 9), (12, 5, 9), (6, 7, 3), (1, 1, 1)])
def test_equals_the_engine_in_weight_space(shape):
    """Also with more points than dimensions or neurons; the part of y outside X's column space stays."""
    n, d, p = shape
    s = draw((3, 8, 4), n=n, d=d, p=p, test=5)
    s = Start(**{**vars(s), "y": s.y + 0.5})
    weight_space = WeightSpace(s, rate=2e-3, penalties=PENALTIES)
    free = WidthFree.from_start(s, rate=2e-3, penalties=PENALTIES)
    agree(simulate(free, AT), simulate(weight_space, AT), 1e-10, without=UNKNOWN)
    assert torch.allclose(free.error(), weight_space.error(), rtol=0, atol=1e-10)


def test_a_width_does_not_depend_on_its_block():
    """Seeds and widths of a block may differ run by run."""
    options = {"n": 6, "d": 7, "rate": 2e-3, "test": 3, "penalties": PENALTIES}
    block = simulate(WidthFree.sample((1, 5, 9), p=(50, 10**6, 4), **options), AT)
    alone = simulate(WidthFree.sample((5,), p=10**6, **options), AT)
    for name, values in alone.values.items():
        assert torch.allclose(values[0], block.values[name][1], rtol=1e-12, atol=1e-13), name


def test_inputs_are_those_of_a_draw():
    free = WidthFree.sample((1, 5), n=6, d=7, p=30, rate=1e-3)
    K = free.gram.basis @ (free.gram.K[..., None] * free.gram.basis.mT)
    for place, seed in enumerate((1, 5)):
        X = inputs_of(seed, 6, 7, "standard")
        assert torch.allclose(K[place], X @ X.mT, rtol=1e-12)


@pytest.mark.parametrize(("n", "d", "p"), [(4, 5, 400), (4, 5, 5), (6, 3, 60)])
def test_sample_is_the_draw_in_law(n, d, p):
    """Two-sample tests and means over 400 runs each of other seeds; few neurons are drawn one by one."""
    options = {"rate": 1e-2, "penalties": [Penalty(), Penalty(3.0)]}
    drawn = draw(range(400), n=n, d=d, p=p, test=3)
    weight_space = simulate(WidthFree.from_start(drawn, **options), [150])
    free = simulate(WidthFree.sample(range(1000, 1400), n=n, d=d, p=p, test=3, **options), [150])
    assert set(free.values) == set(weight_space.values)
    for name, values in free.values.items():
        for run in range(2):
            one, other = values[:, run, 0].numpy(), weight_space.values[name][:, run, 0].numpy()
            assert stats.ks_2samp(one, other).pvalue > 1e-3, (name, run)
            assert stats.ttest_ind(one, other, equal_var=False).pvalue > 1e-3, (name, run)


@pytest.mark.parametrize("p", [200, 800, 3200])
def test_alignment_without_ridge_is_points_over_width(p):
    """``E cos∠(b, β(∞)) ≈ n/p``."""
    runs = 100
    engine = WidthFree.sample(range(runs), n=50, d=150, p=p, rate=1e-4)
    engine.advance(4000)
    found = engine.measure()["cosine"].mean().item()
    assert abs(found - 50 / p) <= 3 / (p * runs) ** 0.5 + 0.2 * 50 / p


def test_a_vast_width_is_well_conditioned():
    """At p = 10¹² the network stays at its kernel limit: e(t) = (1 - ηK)ᵗ e(0), and nothing is lost to rounding."""
    s = WidthFree.sample((1, 2), n=10, d=30, p=10**12, rate=1e-3)
    e = s._e.clone()
    s.advance(200)
    expected = (1 - 1e-3 * s.gram.K.unsqueeze(1)) ** 200 * e
    assert torch.allclose(s._e, expected, rtol=0, atol=1e-4)
    assert torch.allclose(s._e, expected, rtol=0, atol=1e-4)


def test_divergence_is_recorded():
    engine = WidthFree.sample((0, 1), n=5, d=9, p=50, rate=1.0)
    with pytest.warns(UserWarning, match="2 of 2 runs are no longer finite, the first at step 10"):
        trajectory = simulate(engine, [0, 10, 1000])
    with pytest.warns(UserWarning, match="2 of 2 runs are no longer finite, the first at step 1000"):
        engine.measure()
    assert (trajectory.diverged > 0).all()
    assert trajectory.values["loss"][..., -1].isnan().all()


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="2 widths were given for 3 seeds"):
        WidthFree.sample((0, 1, 2), n=2, d=2, p=(5, 6), rate=0.1)
    for wrong in ({"n": 0}, {"d": 0}, {"p": 0}, {"test": -1}):
        with pytest.raises(ValueError, match="sizes must be at least 1"):
            WidthFree.sample((0,), **{"n": 2, "d": 2, "p": 5, "rate": 0.1, **wrong})
    with pytest.raises(ValueError, match="only a scalar output"):
        WidthFree.from_start(draw([0], n=2, d=2, p=2, outputs=2), rate=0.1)


def test_widths_are_integers_of_any_type():
    options = {"n": 3, "d": 4, "rate": 0.1}
    plain = WidthFree.sample((0, 1), p=50, **options).gram
    for p in (np.int64(50), [np.int32(50), 50]):
        assert torch.equal(WidthFree.sample((0, 1), p=p, **options).gram.Z_Z, plain.Z_Z)
    with pytest.raises(ValueError, match=r"p must be below 2⁶³, got 9223372036854775808"):
        WidthFree.sample((0,), p=2**63, **options)
    assert torch.isfinite(WidthFree.sample((0,), p=2**63 - 1, **options).gram.Z_Z).all()


@pytest.mark.unchecked
def test_widths_that_are_no_integers_are_refused():
    for p in (1e9, [50, 50.0]):
        with pytest.raises(ValueError, match=r"p must be an integer, got .* of type float: write int\(p\)"):
            WidthFree.sample((0, 1), n=3, d=4, p=p, rate=0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="n must be an integer"):
        draw((0,), n=3.0, d=4, p=5)  # pyright: ignore[reportArgumentType]
