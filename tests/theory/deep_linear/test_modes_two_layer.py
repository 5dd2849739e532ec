"""Two layers in closed form: fixed points, where they meet, limits and rates, the start from zero."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq

from falign.theory.deep_linear import (
    asymptotic_rate,
    critical_invariant,
    critical_target,
    degenerate_error,
    fixed_points,
    gradient_flow,
    guaranteed_rate,
    learning_time,
    limit,
    modes,
    settled,
    zero_init,
    zero_init_time,
)

_CRITICAL = 3**-1.5  # λ_c of θ_1(0) = -1, θ_2(0) = 0, m = s = 1: .19245


@settings(max_examples=80, deadline=None)
@given(
    K=st.floats(-4, 4),
    λ=st.floats(0, 6),
    m=st.floats(0.2, 3) | st.floats(-3, -0.2),
    s=st.floats(0.3, 3),
)
def test_fixed_points_are_the_roots_of_the_cubic_and_stable_where_it_falls(K, λ, m, s):
    if abs(K - float(critical_invariant(λ, m, variance=s))) < 1e-3 or (λ < 1e-6 and abs(K) < 1e-2):
        return
    points = fixed_points(K, λ, m, variance=s)
    found = points.weights[~points.weights.isnan()]
    roots = np.roots([1, 0, 2 * m * K, -2 * m * λ / s])
    real = np.sort(roots[np.abs(roots.imag) < 1e-5 * np.abs(roots).max()].real)[::-1]
    np.testing.assert_allclose(found.numpy(), real, atol=1e-6)
    slope = m * K + 1.5 * real**2
    assert points.stable[: len(found)].tolist() == (slope > 0).tolist()
    assert len(found) == (3 if m * K < m * float(critical_invariant(λ, m, variance=s)) else 1)


def test_the_fixed_points_have_no_error_and_one_is_positive():
    K = torch.linspace(-2, 2, 41).double()
    points = fixed_points(K, 0.3, 0.7)
    product = points.weights * (K + points.weights.square() / 1.4)
    torch.testing.assert_close(product[~product.isnan()], torch.full((int((~product.isnan()).sum()),), 0.3).double())
    assert ((points.weights > 0).sum(0) == 1).all()
    three = ~points.weights[2].isnan()
    assert points.stable[:, three].T.tolist() == [[True, False, True]] * int(three.sum())
    assert torch.equal(three, critical_invariant(0.3, 0.7) > K)


def test_the_critical_values():
    assert float(critical_invariant(1.0)) == pytest.approx(-1.5)
    assert float(critical_invariant(2.0, 0.5)) == pytest.approx(-1.5 * (4 / 0.5) ** (1 / 3))
    assert float(critical_target(-0.5)) == pytest.approx(_CRITICAL)
    assert float(critical_target(-0.5)) == pytest.approx(0.19245, abs=5e-6)
    assert float(critical_target(-2.0)) == pytest.approx(1.54, abs=5e-3)
    assert float(critical_target(-1.0, 4.0)) == pytest.approx((2 / 3) ** 1.5 * 2)
    assert float(critical_target(1.0, -4.0)) == pytest.approx((2 / 3) ** 1.5 * 2)
    assert float(critical_target(1.0)) == 0
    K = torch.tensor([-0.3, -1.0, -2.5]).double()
    torch.testing.assert_close(critical_invariant(critical_target(K, 0.6, variance=2.0), 0.6, variance=2.0), K)
    for c in (0.5, 1.0, 2.0):
        assert float(critical_target(-(c**2) / 2 / 0.8, 0.8)) == pytest.approx(c**3 / (3 * 3**0.5 * 0.8))


def test_where_the_fixed_points_meet_two_are_one_and_not_stable():
    points = fixed_points(-0.5, _CRITICAL)
    torch.testing.assert_close(points.weights, torch.tensor([2.0, -1.0, -1.0]).double() / 3**0.5, rtol=0, atol=1e-7)
    assert points.stable.tolist() == [True, False, False]
    origin = fixed_points([0.0, 1.0, -1.0], 0.0)
    assert origin.stable.tolist() == [[True, True, True], [False, False, False], [False, False, True]]


def test_below_the_critical_size_the_first_weight_stays_negative_and_above_it_does_not():
    below, above = limit(modes([0.19, 0.195], [-1.0, 0.0]))
    assert below < 0 < above
    nearer = limit(modes([_CRITICAL * (1 - 1e-9), _CRITICAL * (1 + 1e-9)], [-1.0, 0.0]))
    assert nearer[0] < 0 < nearer[1]


def test_the_limit_is_the_first_fixed_point_on_the_way():
    random = np.random.default_rng(0)
    count = 2000
    m = random.uniform(0.2, 2, count) * random.choice([-1, 1], count)
    λ, K, θ = random.uniform(0, 3, count), random.uniform(-3, 3, count), random.normal(size=count) * 2
    found = limit(modes(λ, [θ, K + θ**2 / (2 * m)], feedback=[m])).numpy()
    for one in range(count):
        roots = np.roots([1, 0, 2 * m[one] * K[one], -2 * m[one] * λ[one]])
        real = roots[np.abs(roots.imag) < 1e-7].real
        up = m[one] * λ[one] - m[one] * K[one] * θ[one] - θ[one] ** 3 / 2 > 0
        expected = real[real > θ[one]].min() if up else real[real < θ[one]].max()
        assert found[one] == pytest.approx(expected, abs=1e-6)


def test_the_final_rate_falls_with_the_size_to_nothing_at_the_critical_one():
    shares = torch.tensor([0.2, 0.5, 0.9, 0.99]).double()
    rates = asymptotic_rate(modes(shares * _CRITICAL, [-1.0, 0.0]))
    np.testing.assert_allclose(rates.numpy(), [0.880, 0.674, 0.279, 0.084], atol=5e-4)
    assert float(asymptotic_rate(modes(_CRITICAL, [-1.0, 0.0]))) < 1e-6
    assert float(asymptotic_rate(modes(1e-12, [-1.3, 0.0]))) == pytest.approx(1.3**2)


def test_the_final_rate_in_its_known_forms():
    mode = modes([0.3, 1.0, 5.0], [0.2, 0.5], feedback=0.8)
    end = settled(mode)
    rate = asymptotic_rate(mode)
    torch.testing.assert_close(rate, 0.8 * mode.target / end.weights[0] + end.weights[0].square())
    torch.testing.assert_close(rate, 0.8 * end.weights[1] + end.weights[0].square())
    zero = modes([0.5, 1.0, 5.0], [0.0, 0.0], feedback=0.8)
    torch.testing.assert_close(asymptotic_rate(zero), 1.5 * (2 * 0.8 * zero.target) ** (2 / 3))
    assert float(asymptotic_rate(modes(1e-3, [0.0, -9.0], feedback=0.8))) == pytest.approx(2 * 0.8 * 9, rel=1e-3)
    assert float(asymptotic_rate(modes(1e-3, [0.0, 9.0], feedback=0.8))) == pytest.approx(0.8 * 9, rel=1e-3)


def test_the_final_rate_is_that_of_the_flow():
    mode = modes([0.1, 0.6, 2.0], [-0.8, 0.3], feedback=1.2)
    rate = asymptotic_rate(mode)
    for one in range(3):
        times = torch.tensor([14.0, 16.0]).double() / rate[one]
        early, late = gradient_flow(
            modes(mode.target[one], [-0.8, 0.3], feedback=1.2), times=times, tolerance=1e-13
        ).error
        assert float((early / late).log() / (times[1] - times[0])) == pytest.approx(float(rate[one]), rel=1e-3)


@pytest.mark.parametrize("rule", ["fa", "dfa", "bp"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_error_falls_at_least_at_the_rate_that_the_start_guarantees(rule, depth):
    random = torch.Generator().manual_seed(depth)
    draws = torch.rand(depth, 40, generator=random).double() + torch.arange(depth)[:, None]
    mode = modes(torch.rand(40, generator=random).double() * 3, list(draws), feedback=0.9, rule=rule, variance=0.6)
    rate = guaranteed_rate(mode)
    assert (rate > 0).any()
    trajectory = gradient_flow(mode, times=torch.linspace(0, 4, 30))
    bound = mode.error.abs() * torch.exp(-rate * trajectory.times[:, None])
    assert (trajectory.error.abs() <= bound + 1e-8).all()
    if rule != "bp":
        K = mode.invariants
        torch.testing.assert_close(rate, torch.where((K > 0).all(0), 0.6 * K.prod(0), 0.0))


def test_the_closed_form_from_zero_inverts_the_integral():
    for u in (1e-6, 0.01, 0.5, 0.965, 0.999999):
        clock = quad(lambda x: 1 / (1 - x**3), 0, u, epsabs=1e-14, epsrel=1e-13, limit=400)[0]
        printed = np.log((1 + u + u**2) / (1 - u) ** 2) / 6
        printed += (np.arctan((2 * u + 1) / 3**0.5) - np.pi / 6) / 3**0.5
        assert printed == pytest.approx(clock, rel=1e-6, abs=1e-12)
        λ, m, s = 0.7, 1.3, 2.0
        a = (2 * m * λ / s) ** (1 / 3)
        time = float(zero_init_time(λ, m, share=u**3, variance=s))
        assert time == pytest.approx(2 * clock / (a**2 * s), rel=1e-9)
        assert float(zero_init(λ, m, times=[time], variance=s)) == pytest.approx(λ / s * u**3, rel=1e-9)


def test_ninety_percent_from_zero_takes_a_universal_time():
    λ, m = torch.logspace(-3, 2, 20).double(), 0.6
    constant = zero_init_time(λ, m, share=0.9) * (m * λ) ** (2 / 3)
    torch.testing.assert_close(constant, torch.full_like(λ, 2.0107), rtol=0, atol=1e-4)
    torch.testing.assert_close(learning_time(modes(λ, [0.0, 0.0], feedback=m)), zero_init_time(λ, m, share=0.9))
    torch.testing.assert_close(zero_init_time(λ, -m, share=0.9), zero_init_time(λ, m, share=0.9))
    assert zero_init(1.0, times=[0.0, 1e6]).tolist() == [0.0, 1.0]


def test_where_fixed_points_meet_the_error_falls_as_a_power_of_time():
    times = torch.tensor([1e3, 4e3])
    for m, s in ((1.0, 1.0), (0.5, 2.0)):
        λ = float(critical_target(-0.5 / m, m, variance=s))
        measured = gradient_flow(modes(λ, [-1.0, 0.0], feedback=m, variance=s), times=times, tolerance=1e-12).error
        expected = degenerate_error(λ, m, times=times, variance=s)
        assert (measured / expected - 1).abs().tolist() == pytest.approx([0, 0], abs=0.02)
        torch.testing.assert_close(expected, 2 / (3 * m * s * (m * λ / s) ** (1 / 3) * times.double() ** 2))


def test_gradient_descent_is_held_by_the_saddle_or_goes_to_the_target():
    mode = modes(1.0, [[0.0, -1.0, -1.0, 0.3, 1.5], [0.0, 1.0, 2.0, 0.3, 1.5]], rule="bp")
    end = settled(mode)
    assert end.error.tolist() == pytest.approx([1, 1, 0, 0, 0], abs=1e-12)
    crossing = brentq(lambda x: x * np.sqrt(x**2 + 3) - 1, 0, 2, xtol=1e-14)
    assert end.weights[:, 2].tolist() == pytest.approx([crossing, np.sqrt(crossing**2 + 3)])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fixed_points(float("nan"), 1.0), "K holds nan"),
        (lambda: fixed_points("a", 1.0), "K is 'a', expected real numbers"),
        (lambda: critical_target(float("nan")), "K holds nan"),
        (lambda: degenerate_error(0.0, times=[1.0]), "expected t > 0 and λ > 0"),
        (lambda: degenerate_error(1.0, times=[0.0]), "expected t > 0 and λ > 0"),
        (lambda: fixed_points(0.0, -1.0), "λ is -1"),
        (lambda: critical_invariant(1.0, 0.0), "m_2 is 0"),
        (lambda: critical_target(1.0, variance=-1.0), "the variance is -1"),
        (lambda: zero_init(1.0, times=[-1.0]), "expected a list of numbers from 0 on"),
        (lambda: zero_init(1.0, times=[float("inf")]), "times holds inf"),
        (lambda: zero_init_time(1.0, share=1.0), "expected numbers from 0 to below 1"),
        (lambda: zero_init_time([1.0, 2.0], share=[0.1, 0.2, 0.3]), r"share has shape \(3,\) and the modes \(2,\)"),
    ],
)
def test_numbers_of_no_use_are_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()
