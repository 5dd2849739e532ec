"""Recording steps."""

import pytest

from falign.theory.two_layer import Literal, draw, simulate, spaced


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
    engine = Literal(draw([0], n=2, d=2, p=2), rate=1e-3)
    trajectory = simulate(engine, [0, 5])
    assert trajectory.steps.tolist() == [0, 5]
    assert engine.t == 5
    assert simulate(engine, [5, 6]).values["loss"].shape == (1, 1, 2)
    for at in ([], [3], [9, 9], [8, 7]):
        with pytest.raises(ValueError, match="must increase"):
            simulate(engine, at)
