"""Starts by name: the order in which they let components be learned, gradient descent beside; and the map."""

import numpy as np
import pytest
import torch

from falign.theory.deep_linear import (
    INITIALISATIONS,
    critical_target,
    initialisation,
    learning_slope,
    learning_time,
    modes,
    phase_diagram,
    stable_rate,
)

_SIZES = np.logspace(-3, -1.2, 12)
_NEUTRAL = 0.05
"""Of a slope ``d ln t / d ln λ`` what counts as none."""


def _order(slope):
    if (slope > 0).all():
        return "anti-regularises"
    return "neutral" if (slope.abs() < _NEUTRAL).all() else "regularises" if (slope < 0).all() else "mixed"


def _size(name):
    return 1e-3 if name == "small" else 1.0


@pytest.mark.parametrize("name", INITIALISATIONS)
@pytest.mark.parametrize("depth", [2, 3, 4, 5])
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_each_scheme_does_what_it_says_to_the_order(name, depth, rule):
    start = INITIALISATIONS[name].start(_size(name), depth)
    slope = learning_slope(modes(_SIZES, start, rule=rule))
    found = _order(slope)
    if name == "aligned":  # mildly
        assert found in ("regularises", "neutral")
        assert (slope < 0).all()
    else:
        assert found == INITIALISATIONS[name].order


@pytest.mark.parametrize("name", INITIALISATIONS)
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_gradient_descent_beside_each_does_what_is_said(name, depth):
    mode = modes(_SIZES, INITIALISATIONS[name].start(_size(name), depth), rule="bp")
    times = learning_time(mode)
    if INITIALISATIONS[name].descent == "never learns":
        assert (times == torch.inf).all()
    else:
        assert _order(learning_slope(mode)) == INITIALISATIONS[name].descent
    if INITIALISATIONS[name].descent == "neutral":
        other = learning_time(modes(_SIZES, INITIALISATIONS["positive"].start(1.0, depth), rule="bp"))
        torch.testing.assert_close(times, other)
        assert float(times[0]) == pytest.approx(np.log(10), rel=1e-4)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_gradient_descent_is_sharper_than_feedback_alignment_from_small_weights(depth):
    start = INITIALISATIONS["small"].start(1e-3, depth)
    ratio = {rule: float(learning_time(modes([0.1, 1.0], start, rule=rule)).log().diff()) for rule in ("fa", "bp")}
    assert ratio["bp"] < ratio["fa"] < 0


def test_direct_feedback_is_the_same_chain_with_other_carriers():
    random = torch.Generator().manual_seed(0)
    λ, θ, m = (
        torch.rand(20, generator=random),
        torch.randn(3, 20, generator=random),
        torch.rand(2, 20, generator=random),
    )
    direct = modes(λ, list(θ), feedback=list(m), rule="dfa")
    through = modes(λ, list(θ), feedback=[m[0] / m[1], m[1]], rule="fa")
    torch.testing.assert_close(direct.feedback_factors, through.feedback_factors)
    torch.testing.assert_close(learning_time(direct), learning_time(through))


def test_starts_by_name_and_depth():
    assert INITIALISATIONS["zero"].start(2.0) == (0.0, 0.0)
    assert INITIALISATIONS["small"].start(0.1, 3) == (0.1, 0.1, 0.1)
    assert INITIALISATIONS["positive"].start(2.0) == (0.0, 2.0)
    assert INITIALISATIONS["negative"].start(2.0, 3) == (0.0, -2.0, 2.0)
    assert INITIALISATIONS["aligned"].start(depth=3) == (1.0, 0.0, 1.0)
    assert INITIALISATIONS["anti-aligned"].start() == (-1.0, 0.0)
    assert initialisation("small") is INITIALISATIONS["small"]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (
            lambda: initialisation("orthogonal"),
            "unknown initialisation 'orthogonal': choose one of zero, small, positive",
        ),
        (lambda: initialisation("small").start(0.0), "size is 0.0"),
        (lambda: initialisation("small").start(1.0, 1), "depth is 1, expected a whole number from 2 on"),
        (lambda: phase_diagram([0.5], [1.0], branch="input"), "branch is 'input', expected one of output, aligned"),
        (lambda: phase_diagram([0.5], [0.0]), "λ above 0"),
        (lambda: initialisation([]), "unknown initialisation \\[\\]: choose one of zero"),
        (lambda: phase_diagram([], [1.0]), "expected a list each"),
        (lambda: phase_diagram([1.0], []), "expected a list each"),
        (
            lambda: phase_diagram([-1.0], [0.1], feedback=[1.0, 2.0]),
            r"feedback is \[1\.0, 2\.0\], expected a finite number",
        ),
        (lambda: phase_diagram([[0.5]], [1.0]), "expected a list each"),
        (lambda: phase_diagram([float("nan")], [1.0]), "invariants holds nan"),
        (lambda: phase_diagram([0.5], [1.0], feedback=0.0), "m_2 is 0"),
    ],
)
@pytest.mark.unchecked
def test_schemes_and_charts_of_no_use_are_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize("m", [1.0, -0.7])
def test_the_map_holds_the_times_of_its_starts(m):
    K, λ = torch.tensor([-2.0, -0.5, 0.0, 1.0]).double() * np.sign(m), torch.tensor([0.01, 0.3, 2.0]).double()
    for branch, side in (("output", 0), ("aligned", 1), ("anti-aligned", -1)):
        found = phase_diagram(K, λ, feedback=m, branch=branch, tolerance=0.2)
        for row, k in enumerate(K.tolist()):
            if branch != "output" and m * k > 0:
                assert found.time[row].isnan().all()
                assert found.slope[row].isnan().all()
                continue
            start = [0.0, k] if branch == "output" else [side * np.sign(m) * (-2 * m * k) ** 0.5, 0.0]
            mode = modes(λ, start, feedback=m)
            torch.testing.assert_close(found.time[row], learning_time(mode, 0.2))
            torch.testing.assert_close(found.slope[row], learning_slope(mode, 0.2))
    torch.testing.assert_close(found.critical, critical_target(K, m))


def test_the_map_shows_where_feedback_alignment_anti_regularises():
    K, λ = np.linspace(-3, 3, 60), np.logspace(-2, 1.5, 70)
    assert (phase_diagram(K, λ).sign == -1).all()
    below = K < 0
    assert (phase_diagram(K, λ, branch="aligned").sign[below] == -1).all()
    against = phase_diagram(K, λ, branch="anti-aligned")
    expected = torch.where(against.targets < against.critical[:, None] / 0.9, 1.0, -1.0).double()
    assert torch.equal(against.sign[below], expected[below])
    assert against.sign[~below].isnan().all()


def test_small_components_bound_the_speed_and_large_ones_the_step():
    rates = stable_rate(modes([0.01, 0.1, 1.0, 10.0], INITIALISATIONS["zero"].start()))
    assert (rates.diff() < 0).all()
