"""Recording steps."""

import pytest
import torch

from falign.theory.two_layer import Dual, Engine, WeightSpace, WidthFree, draw, simulate, spaced


@pytest.mark.parametrize(("steps", "points"), [(0, 2), (3, 9), (1000, 20), (10**6, 50)])
def test_spaced_runs_from_nothing_to_the_end(steps, points):
    at = spaced(steps, points)
    assert at[0] == 0
    assert at[-1] == steps
    assert len(at) <= points
    assert at == sorted(set(at))
    assert steps < 1000 or at[1] == 1


def test_spaced_refuses_what_it_cannot():
    with pytest.raises(ValueError, match="2 points"):
        spaced(10, 1)


def test_recording_steps_must_increase():
    engine = WeightSpace(draw([0], n=2, d=2, p=2), rate=1e-3)
    trajectory = simulate(engine, [0, 5])
    assert trajectory.steps.tolist() == [0, 5]
    assert engine.t == 5
    assert simulate(engine, [5, 6]).values["loss"].shape == (1, 1, 2)
    for at in ([], [3], [9, 9], [8, 7]):
        with pytest.raises(ValueError, match="must increase"):
            simulate(engine, at)


@pytest.mark.parametrize("kind", [WeightSpace, Dual, WidthFree.from_start])
def test_only_what_is_named_is_recorded(kind):
    s = draw([0, 1], n=6, d=7, p=9, test=3)
    at, names = [0, 3, 20], ("weight_growth", "loss", "test_loss")
    some, whole = simulate(kind(s, rate=1e-3), at, names), simulate(kind(s, rate=1e-3), at)
    assert set(some.values) == set(names)
    assert all(torch.equal(values, whole.values[name]) for name, values in some.values.items())
    with pytest.raises(ValueError, match="unknown measurement 'speed'"):
        simulate(kind(s, rate=1e-3), at, ["speed"])


def test_outputs_have_a_measurement_more():
    engine = WeightSpace(draw([0], n=6, d=7, p=9, outputs=3), rate=1e-3)
    whole = engine.measure()
    assert all(torch.equal(engine.measure([name])[name], value) for name, value in whole.items())
    assert "error_cosine" in whole


def test_an_engine_that_takes_no_names_is_asked_for_none():
    class Plain:
        t = 0

        def advance(self, steps):
            self.t += steps

        def error(self):
            return torch.zeros(1, 1, 2)

        def measure(self):
            return {"loss": torch.full((1, 1), float(self.t))}

    assert isinstance(Plain(), Engine)
    assert simulate(Plain(), [0, 7]).values["loss"].tolist() == [[[0, 7]]]
