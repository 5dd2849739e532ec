"""How long a mode takes: tables, laws, closed forms, and the event of a solver."""

import modes_oracle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falign.theory.deep_linear import (
    critical_target,
    depth_slope,
    gradient_flow,
    learning_slope,
    learning_time,
    learning_time_and_slope,
    modes,
)

_TARGETS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
_TABLE = {
    (0.0, 0.0): ["43.32", "20.83", "9.333", "4.487", "2.011", ".967", ".433", ".208"],
    (0.0, 1.0): ["2.302", "2.301", "2.288", "2.183", "1.636", ".921", ".429", ".208"],
    (0.0, -1.0): ["8.550", "6.864", "4.991", "3.330", "1.824", ".941", ".431", ".208"],
    (1.0, 0.0): ["2.262", "2.186", "1.972", "1.594", "1.062", ".640", ".334", ".175"],
    (-1.0, 0.0): ["2.346", "2.441", "2.906", "10.35", "3.101", "1.308", ".534", ".242"],
    (-2.0, 0.0): [".577", ".580", ".589", ".620", ".790", "1.935", ".647", ".276"],
}


@pytest.mark.parametrize("start", _TABLE)
def test_the_table_of_learning_times_to_its_last_digit(start):
    for time, printed in zip(learning_time(modes(_TARGETS, start)).tolist(), _TABLE[start], strict=True):
        last = 10.0 ** -len(printed.split(".")[1])
        assert abs(time - float(printed)) <= 0.53 * last  # one of them, 8.5495, is printed as 8.550


def test_gradient_descent_from_small_weights_is_the_closed_form_and_from_zero_never_starts():
    λ, ε = torch.tensor([0.1, 1.0, 10.0]).double(), 1e-3
    time = learning_time(modes(λ, [ε, ε], rule="bp"))
    np.testing.assert_allclose(time.numpy(), [68.55, 8.006, 0.916], rtol=6e-4)
    closed = (0.9 * λ * (λ - ε**2) / (0.1 * λ * ε**2)).log() / (2 * λ)
    torch.testing.assert_close(time, closed, rtol=1e-9, atol=0)
    assert (learning_time(modes(λ, [0.0, 0.0], rule="bp")) == torch.inf).all()
    assert (learning_time(modes(λ, [-0.5, 0.5], rule="bp")) == torch.inf).all()


def test_gradient_descent_from_any_start_of_two_layers_is_the_closed_form():
    random = np.random.default_rng(0)
    a, b, λ, s = *random.normal(size=(2, 50)), random.uniform(0.1, 3, 50), random.uniform(0.3, 2, 50)
    K, p = np.abs(b**2 - a**2) / 2, a * b
    R = np.sqrt(λ**2 + (s * K) ** 2)
    end = np.where(s * p < λ, 0.9, 1.1) * λ / s

    def clock(product):
        z = (product + np.sqrt(product**2 + K**2)) / K
        return np.log(np.abs((z - (λ - R) / (s * K)) / (z - (λ + R) / (s * K)))) / (2 * R)

    expected = np.where(np.abs(λ - s * p) <= 0.1 * λ, 0, clock(end) - clock(p))
    np.testing.assert_allclose(learning_time(modes(λ, [a, b], variance=s, rule="bp")).numpy(), expected, rtol=1e-8)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), rule=st.sampled_from(["fa", "dfa", "bp"]), depth=st.integers(2, 4))
@pytest.mark.unchecked
def test_the_time_is_that_of_the_event_of_a_solver(data, rule, depth):
    number = st.floats(-1.5, 1.5).map(lambda x: round(x, 3))
    θ = data.draw(st.lists(number, min_size=depth, max_size=depth))
    m = data.draw(st.lists(st.sampled_from([-0.8, 0.5, 1.0, 1.3]), min_size=depth - 1, max_size=depth - 1))
    λ, s = data.draw(st.sampled_from([0.05, 0.3, 1.0, 2.5])), data.draw(st.sampled_from([0.6, 1.0]))
    found = float(learning_time(modes(λ, θ, feedback=m, variance=s, rule=rule)))
    expected = modes_oracle.learning_time(rule, θ, m, λ, s, 0.1, 6.0)
    if expected < np.inf or found < 5.9:
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6])
def test_the_slope_from_zero_is_that_of_the_depth(rule, depth):
    λ = torch.logspace(-2, 1, 7).double()
    mode = modes(λ, [0.0] * depth, feedback=0.7, rule=rule)
    assert depth_slope(depth) == -(2**depth - 2) / (2**depth - 1)
    fitted = np.polyfit(λ.log().numpy(), learning_time(mode).log().numpy(), 1)[0]
    assert fitted == pytest.approx(depth_slope(depth), abs=1e-8)
    torch.testing.assert_close(learning_slope(mode), torch.full_like(λ, depth_slope(depth)), rtol=0, atol=1e-8)


def test_the_slopes_by_number():
    assert [depth_slope(depth) for depth in (2, 3, 4)] == pytest.approx([-2 / 3, -6 / 7, -14 / 15])


@pytest.mark.parametrize("rule", ["fa", "bp"])
@pytest.mark.parametrize("start", [(0.4, 0.9), (-1.0, 0.2), (0.3, 1.2, 0.8), (-0.6, 0.5, 1.1)])
def test_the_slope_is_the_derivative_of_the_time(rule, start):
    λ, h = torch.tensor([0.05, 0.9, 4.0]).double(), 1e-5
    times = [learning_time(modes(λ * np.exp(step), start, rule=rule, variance=0.7)) for step in (-h, h)]
    expected = (times[1] / times[0]).log() / (2 * h)
    torch.testing.assert_close(learning_slope(modes(λ, start, rule=rule, variance=0.7)), expected, rtol=1e-5, atol=1e-5)


def test_a_positive_invariant_makes_small_components_take_one_time():
    for m, K in ((1.0, 1.0), (0.5, 3.0), (-0.5, -3.0)):
        time = float(learning_time(modes(1e-5, [0.0, K], feedback=m)))
        assert time == pytest.approx(np.log(10) / (m * K), rel=1e-6)


def test_a_negative_invariant_makes_them_take_three_halves_of_the_logarithm():
    m, K = 0.8, -1.5
    λ = torch.tensor([1e-6, 1e-7, 1e-8]).double()
    step = learning_time(modes(λ, [0.0, K], feedback=m)).diff()
    torch.testing.assert_close(step, torch.full_like(step, 1.5 * np.log(10) / (m * -K)), rtol=1e-3, atol=0)


def test_against_their_feedback_small_components_are_learned_first_up_to_the_critical_size():
    for m, K in ((1.0, -0.5), (0.7, -1.2)):
        critical = float(critical_target(K, m))
        start = [-((-2 * m * K) ** 0.5), 0.0]
        slope = learning_slope(modes(critical * np.linspace(0.01, 0.999, 40), start, feedback=m))
        assert (slope > 0).all()
        assert (learning_slope(modes(critical * np.linspace(1.2, 30, 40), start, feedback=m)) < 0).all()


def test_the_first_time_counts_where_the_error_comes_close_and_leaves_again():
    λ = float(critical_target(-0.5)) * 1.02
    mode = modes(λ, [-1.0, 0.0])
    times = torch.linspace(0, 120, 12_001)
    share = (gradient_flow(mode, times=times).error / λ).abs()
    first = float(times[(share <= 0.1).nonzero()[0, 0]])
    assert share.max() > 0.5
    assert (share[times > first + 5] > 0.1).any()
    assert first - 0.011 <= float(learning_time(mode)) <= first


@pytest.mark.parametrize("share", [1 - 1e-6, 1 - 1e-10, 1 + 1e-10, 1 + 1e-6])
def test_close_to_a_double_root_the_time_is_that_of_the_passage(share):
    """Past the double root the passage takes ``π/√(h_min h''/2)``, before it a mode arrives at a rate near 0."""
    λ = float(critical_target(-0.5)) * share
    found = float(learning_time(modes(λ, [-1.0, 0.0]), 1e-12))
    gap, curvature = abs(λ - 3**-1.5), 3 / 3**0.5
    if share > 1:
        assert found == pytest.approx(np.pi / np.sqrt(gap * curvature / 2), rel=0.02)
    else:
        rate = np.sqrt(2 * gap * curvature)
        width = 2 * rate / curvature
        assert found == pytest.approx(np.log(width * rate / (1e-12 * λ)) / rate, rel=0.1)


@pytest.mark.parametrize(
    ("m", "start", "exact"),
    [
        (1.0, (1.0, 0.0), 2.302585050916494),
        (1.0, (-1.0, 0.0), 2.3025851350715996),
        (1.0, (3.0, 0.0), 0.25584278793729086),
        (0.01, (-3.0, 0.5), 2.350062665035297),
    ],
)
def test_what_rounding_leaves_of_a_small_component_of_large_weights_is_as_stated(m, start, exact):
    """Exact: partial fractions over the three roots with fifty digits."""
    mode = modes(1e-8, start, feedback=m)
    K, θ = abs(float(mode.invariants[0])), abs(start[0])
    stated = 2e-16 * (K + θ**2) * θ / m / (0.1 * 1e-8)
    assert float(learning_time(mode)) == pytest.approx(exact, rel=stated)


def test_far_apart_scales_are_no_trouble():
    λ = torch.from_numpy(np.logspace(-60, 60, 13))
    torch.testing.assert_close(
        learning_time(modes(λ, [0.0, 0.0])) * λ ** (2 / 3), torch.full_like(λ, 2.010742), rtol=1e-6, atol=0
    )
    from_afar = learning_time(modes([1.0, 1e-3], [1e6, -1e6]))
    assert ((from_afar > 0) & (from_afar < 1e3)).all()


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_signs_of_feedback_that_are_symmetric_make_no_difference(depth):
    random = torch.Generator().manual_seed(0)
    λ, θ = torch.rand(200, generator=random).double(), torch.randn(depth, 200, generator=random).double()
    there = learning_time(modes(λ, list(θ), feedback=0.7))
    flipped = [-θ[0], *θ[1:-1], -θ[-1]]
    m = [0.7] * (depth - 1) if depth == 2 else [0.7, *[0.7] * (depth - 3), -0.7]
    if depth == 2:
        m = [-0.7]
    elsewhere = learning_time(modes(λ, flipped, feedback=m))
    torch.testing.assert_close(there, elsewhere)


def test_what_is_learned_or_never_will_be():
    mode = modes([1.0, 1.0, 0.0, 0.0], [[1.0, 0.95, 0.5, 0.0], [1.0, 1.0, 0.5, 0.0]])
    time, slope = learning_time_and_slope(mode)
    assert time.tolist() == [0, 0, torch.inf, 0]
    assert slope.isnan().all()
    assert learning_time(modes(torch.ones(2, 3), [0.0, 0.5])).shape == (2, 3)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -0.1, float("nan")])
def test_a_tolerance_of_no_use_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance is"):
        learning_time(modes(1.0, [0.0, 0.0]), tolerance)


@pytest.mark.parametrize("depth", [1, 0, 2.0])
@pytest.mark.unchecked
def test_a_depth_of_no_use_is_refused(depth):
    with pytest.raises(ValueError, match=r"depth (must be an integer|is \d, expected a whole number from 2 on)"):
        depth_slope(depth)
