"""Lasting alignment from initial values, and the equilibrium of decay."""

from dataclasses import replace

import pytest
import torch
from conservation_cases import batches, data, made, start

from falign.theory.conservation import (
    RULES,
    aligned_forever,
    alignment,
    alignment_bound,
    alignment_term,
    anti,
    decay_equilibrium,
    dominant,
    gradient_descent,
    gradient_flow,
    invariant,
    lasting_alignment,
    small,
)

pytestmark = pytest.mark.unchecked  # many steps: checking annotations would take most of the time

NAMES = ["loss", "incoming", "alignment_term", "invariant", "expected_change"]
TIMES = torch.linspace(0, 5, 11, dtype=torch.float64)


@pytest.mark.parametrize("rule_name", RULES)
def test_alignment_never_falls_below_its_bound(rule_name):
    dynamics, (X, y) = made("relu", rule_name), data()
    trajectory = gradient_descent(start(dynamics), dynamics, X, y, rate=0.05, steps=batches(steps=300), names=NAMES)
    check = alignment_bound(trajectory)
    assert check.verdict == "holds", check.sentence
    assert check.slack > 0


@pytest.mark.parametrize("rule_name", RULES)
def test_from_a_dominant_start_every_neuron_stays_aligned(rule_name):
    dynamics, (X, y) = made("relu", rule_name), data()
    state = dominant(start(dynamics), dynamics, share=0.9)
    assert aligned_forever(state, dynamics).all()
    trajectory = gradient_descent(
        state, dynamics, X, y, rate=0.01, steps=batches(steps=300), names=[*NAMES, "alignment"]
    )
    check = lasting_alignment(trajectory)
    assert check.verdict == "holds", check.sentence
    assert check.constants["share aligned for ever"] == 1
    assert (trajectory["alignment"] > 0).all()


def test_in_flow_the_initial_values_alone_decide():
    dynamics, (X, y) = made("linear"), data()
    state = dominant(start(dynamics), dynamics)
    check = lasting_alignment(gradient_flow(state, dynamics, X, y, times=TIMES, names=NAMES))
    assert check.verdict == "holds", check.sentence
    torch.testing.assert_close(check.bound, check.measured.minimum(check.bound), rtol=1e-6, atol=1e-6)
    assert alignment_bound(gradient_flow(start(dynamics), dynamics, X, y, times=TIMES, names=NAMES)).verdict == "holds"


def test_decay_keeps_neurons_aligned():
    dynamics, (X, y) = made("linear", decays=0.2), data()
    state = dominant(start(dynamics), dynamics)
    trajectory = gradient_flow(state, dynamics, X, y, times=TIMES, names=NAMES)
    assert (trajectory["invariant"] <= trajectory["invariant"][:, :1] * torch.exp(-0.2 * TIMES)[:, None] + 1e-6).all()
    assert lasting_alignment(trajectory).verdict == "holds"


def test_a_small_start_is_bounded_near_zero_and_ends_aligned():
    dynamics, (X, y) = made("leaky"), data()
    state = small(start(dynamics), 0.01)
    assert float(invariant(state, dynamics)[:, -7:].max()) < 1e-3
    assert float(invariant(state, dynamics).max()) < 0.01 * float(invariant(start(dynamics), dynamics).max())
    trajectory = gradient_descent(state, dynamics, X, y, rate=0.05, steps=1500, names=[*NAMES, "alignment"])
    assert float(trajectory["alignment"][:, -1].min()) > 0
    assert float(trajectory["alignment_term"].min()) > -float(trajectory["expected_change"].max()) - 1e-2


def test_an_anti_start_is_against_its_feedback():
    dynamics, (X, y) = made(), data()
    state = anti(start(dynamics), dynamics)
    assert (alignment(state, dynamics) < 0).all()
    assert not aligned_forever(state, dynamics).any()
    with pytest.raises(ValueError, match="start from dominant"):
        lasting_alignment(gradient_descent(state, dynamics, X, y, rate=0.05, steps=5, names=NAMES))


def test_a_bound_that_is_too_high_fails():
    dynamics, (X, y) = made(), data()
    trajectory = gradient_descent(start(dynamics), dynamics, X, y, rate=0.05, steps=50, names=NAMES)
    wrong = replace(trajectory, values={**trajectory.values, "invariant": trajectory["invariant"] - 10})
    assert alignment_bound(wrong).verdict == "fails"


REST = ["incoming", "invariant", "alignment"]


@pytest.mark.parametrize(("activation_name", "last", "tolerance"), [("linear", 0.2, 1e-5), ("relu", 0.01, 1e-3)])
def test_with_decay_alignment_ends_at_the_size_of_the_incoming_weights(activation_name, last, tolerance):
    """Relus slide along their kinks, which leaves an error of order η: a smaller rate at the end."""
    dynamics, (X, y) = made(activation_name, decays=0.1), data(n=12)
    first = trajectory = gradient_descent(
        start(dynamics), dynamics, X, y, rate=0.2, steps=600, names=REST, at=[0, 100, 600]
    )
    for rate in (0.04, last):
        trajectory = gradient_descent(
            trajectory.end, dynamics, X, y, rate=rate, steps=1500, names=REST, at=[0, 1200, 1500]
        )
    check = decay_equilibrium(trajectory, tolerance=tolerance)
    assert check.verdict == "holds", check.sentence
    assert check.constants["least alignment"] > -1e-6
    assert check.constants["alive"] > 0.5
    early = replace(first, times=first.times[:2], values={name: value[:, :2] for name, value in first.values.items()})
    assert decay_equilibrium(early).verdict == "assumption fails"


@pytest.mark.parametrize(("decays", "named"), [(0.0, "one decay"), ((0.1, 0.2, 0.1), "one decay")])
def test_the_equilibrium_needs_one_decay(decays, named):
    dynamics, (X, y) = made(decays=decays), data()
    check = decay_equilibrium(gradient_descent(start(dynamics), dynamics, X, y, rate=0.1, steps=3, names=REST))
    assert check.verdict == "assumption fails"
    assert named in check.sentence


def test_kp_starts_within_twice_its_feedback():
    dynamics = made("relu", "kp")
    state = dominant(start(dynamics, scale=10.0), dynamics)
    assert (alignment_term(state, dynamics) > 0).all()
