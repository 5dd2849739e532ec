"""The ridge's schedules, their sums in closed form, and that the laboratory's are the same."""

from math import inf

import pytest
import torch
import two_layer_oracle as oracle

from falign.lab._learner import SCHEDULES as LABORATORY
from falign.theory.two_layer import SCHEDULES, Penalty
from falign.theory.two_layer._schedules import shrinkage

PENALTIES = [
    Penalty(),
    Penalty(0.7),
    Penalty(0.7, "cutoff", 12.0),
    Penalty(0.7, "cutoff", 12.5),
    Penalty(0.7, "inverse-square", 9.5),
    Penalty(0.7, "exponential", 9.5),
]


def test_the_laboratory_has_the_same_schedules():
    assert LABORATORY is SCHEDULES


@pytest.mark.parametrize("penalty", PENALTIES)
def test_values_and_sums(penalty):
    values = penalty.values(40)
    expected = [oracle.ridge(penalty.strength, penalty.schedule, penalty.steps, t) for t in range(40)]
    assert values.tolist() == pytest.approx(expected, abs=1e-15)
    assert torch.equal(penalty.values(10, start=30), values[30:])
    assert penalty.values(3, torch.float32).dtype == torch.float32
    for steps in (0, 1, 13, 40):
        assert penalty.total(steps) == pytest.approx(sum(expected[:steps]), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_sum_of_an_endless_run(penalty):
    if penalty.schedule == "constant":
        assert penalty.total() == (inf if penalty.strength else 0.0)
        return
    tail = 0.7 * 9.5**2 / 20_009 if penalty.schedule == "inverse-square" else 0.0
    assert penalty.total() == pytest.approx(penalty.values(20_000).sum().item() + tail, rel=1e-6)


def test_cutoff_keeps_its_last_step():
    assert Penalty(1.0, "cutoff", 3).values(6).tolist() == [1, 1, 1, 1, 0, 0]


def test_shrinkage_of_several_penalties():
    kept = torch.stack(list(shrinkage(PENALTIES, 0.1, 5, 20, torch.empty(0, dtype=torch.float64))))
    assert kept.shape == (20, len(PENALTIES))
    for column, penalty in zip(kept.T, PENALTIES, strict=True):
        assert torch.equal(column, 1 - 0.1 * penalty.values(20, start=5))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((-1.0,), "strength of at least 0, got -1.0"),
        ((inf,), "finite strength"),
        ((1.0, "linear"), "unknown schedule 'linear': choose one of constant, cutoff"),
        ((1.0, "constant", 5.0), "takes no time"),
        ((1.0, "cutoff"), "needs a finite time T above 0, got steps=None"),
        ((1.0, "exponential", 0.0), "needs a finite time T above 0"),
    ],
)
def test_wrong_penalties_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Penalty(*given)
