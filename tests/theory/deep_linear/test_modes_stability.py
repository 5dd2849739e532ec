"""Step sizes: one that suffices, the largest, and what scaling says of it."""

import numpy as np
import pytest
import torch

from falign.theory.deep_linear import asymptotic_rate, gradient_descent, limit, modes, stable_rate, sufficient_rate
from falign.theory.deep_linear._steps import Recursion

pytestmark = pytest.mark.unchecked  # many steps: checking annotations would take most of the time


def _converges(mode, rates, steps=4000):
    """A plain loop over all rates at once, two layers, m = s = 1."""
    λ = float(mode.target)
    one, two = (np.full_like(rates, float(θ)) for θ in mode.weights)
    with np.errstate(all="ignore"):
        for _ in range(steps):
            e = λ - one * two
            one, two = one + rates * e, two + rates * one * e
        return np.abs(λ - one * two) < 1e-6


def test_from_zero_weights_the_largest_rate_is_one_share_of_the_local_one():
    mode = modes([0.5, 1.0, 5.0], [0.0, 0.0])
    local = 2 / asymptotic_rate(mode)
    np.testing.assert_allclose(local.numpy(), [1.333, 0.840, 0.287], atol=6e-4)
    share = stable_rate(mode) / local
    np.testing.assert_allclose(share.numpy(), 0.769, atol=5e-4)
    other = modes([0.3, 2.0], [0.0, 0.0], feedback=-0.4, variance=[0.5, 3.0])
    np.testing.assert_allclose((stable_rate(other) * asymptotic_rate(other) / 2).numpy(), 0.769, atol=5e-4)


@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6])
def test_at_any_depth_from_zero_it_is_one_share_for_the_depth(depth):
    mode = modes([0.2, 1.0], [0.0] * depth, feedback=0.8, variance=1.5)
    share = stable_rate(mode) * asymptotic_rate(mode) / 2
    assert float(share[0]) == pytest.approx(float(share[1]))
    tiny = modes(0.7, [1e-9] * depth)  # no short cut from this start
    assert float(stable_rate(tiny) * asymptotic_rate(tiny) / 2) == pytest.approx(float(share[0]), rel=1e-3)


@pytest.mark.parametrize(("λ", "start"), [(1.0, (0.0, 0.0)), (0.1, (-1.0, 0.0)), (0.5, (0.3, -0.8)), (2.0, (1.5, 1.0))])
def test_all_smaller_rates_converge_and_one_just_above_does_not(λ, start):
    mode = modes(λ, start)
    largest = float(stable_rate(mode))
    below = _converges(mode, largest * np.linspace(0.05, 0.998, 150))
    above = _converges(mode, largest * np.linspace(1.001, 1.01, 40))
    assert below.all()
    assert not above.all()


def test_the_sufficient_rate_of_two_layers_is_the_formula():
    random = torch.Generator().manual_seed(0)
    λ, m, s = (torch.rand(3, 100, generator=random) * 2 + 0.2).double()
    θ = torch.randn(2, 100, generator=random).double()
    mode = modes(λ, list(θ), feedback=m, variance=s)
    mK = m * θ[1] - θ[0].square() / 2
    largest = s * (mK + 1.5 * torch.maximum(θ[0].square(), limit(mode).square()))
    torch.testing.assert_close(sufficient_rate(mode), 1 / largest)


@pytest.mark.parametrize(("rule", "depth", "count"), [("fa", 2, 3000), ("fa", 3, 400), ("dfa", 4, 400), ("bp", 3, 400)])
def test_every_random_draw_converges_at_the_sufficient_rate(rule, depth, count):
    random = np.random.default_rng(depth)
    mode = modes(
        random.uniform(0.05, 3, count),
        list(random.normal(size=(depth, count))),
        feedback=list(random.uniform(0.2, 2, size=(depth - 1, count))),
        rule=rule,
    )
    θ, m, λ = mode.weights.numpy(), mode.feedback.numpy(), mode.target.numpy()
    rate = sufficient_rate(mode).numpy()
    for _ in range(6000):
        below = np.concatenate([np.ones((1, count)), np.cumprod(θ, 0)])
        e = λ - below[-1]
        ones = np.ones((1, count))
        above = np.concatenate([np.cumprod((θ if rule == "bp" else np.r_[ones, m])[:0:-1], 0)[::-1], ones])
        c = np.concatenate([m, ones]) if rule == "dfa" else above
        θ = θ + rate * c * below[:-1] * e
    converged = np.abs(λ - θ.prod(0)) < 1e-6 * np.maximum(λ, 1)
    held = (asymptotic_rate(mode) * torch.from_numpy(rate)).numpy() < 5e-3  # so slow that 6,000 steps are too few
    assert (converged | held).all()
    assert held.mean() < 0.02


def test_the_largest_rate_is_above_the_sufficient_one():
    random = torch.Generator().manual_seed(2)
    mode = modes(torch.rand(30, generator=random) + 0.1, list(torch.randn(2, 30, generator=random)), feedback=0.9)
    ratio = stable_rate(mode) / sufficient_rate(mode)
    assert (ratio > 1).all()


def test_a_mode_without_error_takes_any_rate_and_one_that_never_converges_none():
    assert float(stable_rate(modes(1.0, [1.0, 1.0]))) == torch.inf
    assert stable_rate(modes([1.0, 1.0], [[0.0, -0.5], [0.0, 0.5]], rule="bp")).isnan().all()


_GAPPED = [
    modes(1.0, [0.0] * 5),
    modes(
        0.03704102411107308,
        [-0.951423587052559, 0.8557310738309898, 0.1836219514220139, 0.7318939007358146],
        feedback=[2.0503955016939757, 1.3637417544875714, 1.9145772370984744],
        variance=0.27669806724306634,
        rule="dfa",
    ),
    modes(
        0.0421563868327225,
        [0.6540498914708279, -1.876203324360475, -1.1271763004833995],
        variance=9.99806999725251,
        rule="bp",
    ),
]


@pytest.mark.parametrize("mode", _GAPPED)
def test_a_band_of_rates_that_fail_below_others_that_do_not_is_found(mode):
    largest = float(stable_rate(mode))
    shares = np.array([0.7, 0.9, 0.98, 0.985, 0.99, 0.995, 0.999, *np.linspace(1.0002, 1.005, 10)])
    recursion = Recursion(mode.flat().take(torch.zeros(len(shares), dtype=torch.int64)), shares * largest)
    recursion.take(1000)
    error = float(mode.target) - float(mode.variance) * recursion.weights.prod(0)
    converges = np.abs(error) < 1e-3 * float(mode.target)
    assert converges[shares < 1].all()
    assert not converges[shares > 1].all()


def test_most_of_a_thousand_random_starts_have_a_stable_rate():
    random = torch.Generator().manual_seed(1)
    mode = modes(torch.rand(1000, generator=random) * 2 + 0.1, list(torch.randn(3, 1000, generator=random)))
    assert (stable_rate(mode) > 0).sum() > 900


@pytest.mark.filterwarnings("ignore:the rate")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_below_the_largest_rate_a_descent_ends_at_no_error(share):
    mode = modes([0.2, 1.0, 4.0], [-0.7, 0.1])
    for one, largest in enumerate(stable_rate(mode).tolist()):
        trajectory = gradient_descent(mode.take(slice(one, one + 1)), rate=share * largest, steps=4000)
        assert float(trajectory.error[-1].abs().max()) < 1e-6
