"""Every public function of the theory answers hostile arguments with the right numbers or with one sentence."""

import dataclasses
import random
import warnings
from typing import Any

import pytest
import torch
from good_calls import GOOD

from falign.theory import (
    attention,
    conservation,
    deep_linear,
    dominance,
    factorisation,
    minimum_norm,
    separability,
    two_layer,
)
from falign.theory.two_layer import kernels, theorems
from hostile import anything, fault, other, same

pytestmark = pytest.mark.unchecked

#: What only hands back what it holds.
HANDS_BACK = {"deep.Modes", "deep.Modes.at"}

#: What says in its docstring where its answer is nan.
DOCUMENTED = {
    "deep.phase_diagram",
    "deep.fixed_points",
    "deep.learning_slope",
    "deep.learning_time_and_slope",
    "fac.best_output",
}


def calls(name: str) -> list[tuple[str, dict[str, Any], bool]]:
    """(which, arguments, whether the answer must be the good one) with each argument in turn hostile."""
    found = []
    good = GOOD[name][1]()
    for argument, value in good.items():
        for kind, make, equal in (
            ("", anything(), False),
            ("same ", same(value), True),
            ("other ", other(value), False),
        ):
            found += [
                (f"{argument} {kind}{which}", {**good, argument: bad}, equal)
                for which, bad in make
                if not (callable(value) and callable(bad))  # a function of the user's fails by itself
                and not (name in HANDS_BACK and "nan" in which)
            ]
    return found


def faults(name: str, count: int | None) -> tuple[int, list[str]]:
    call, good = GOOD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = call(**good())
    chosen = calls(name)
    if count is not None and len(chosen) > count:
        chosen = random.Random(name).sample(chosen, count)
    told = [
        f"{name}: {which}: {wrong}"
        for which, arguments, equal in chosen
        if (wrong := fault(call, arguments, expected, equal=equal, documented=name in DOCUMENTED))
    ]
    return len(chosen), told


@pytest.mark.parametrize("name", GOOD)
def test_a_hostile_argument_is_answered_right_or_in_a_sentence(name):
    assert faults(name, 3)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_every_hostile_argument_is_answered_right_or_in_a_sentence(name):
    assert faults(name, None)[1] == []


def test_the_table_has_every_public_function():
    rooms = {
        "two": two_layer, "kernels": kernels, "theorems": theorems, "deep": deep_linear, "fac": factorisation,
        "law": conservation, "dom": dominance, "att": attention,
    }  # fmt: skip
    public = {f"{short}.{name}" for short, room in rooms.items() for name in room.__all__}
    for room in (separability, minimum_norm):
        short = room.__name__.rpartition(".")[2]
        public |= {
            f"{short}.{name}"
            for name, value in vars(room).items()
            if getattr(value, "__module__", "") == room.__name__ and not name.startswith("_")
        }
    functions = {name for name in public if name.rpartition(".")[2][0].islower()}
    assert functions - GOOD.keys() == {"dom.rising_example"}  # which takes nothing


@pytest.mark.parametrize("kind", [two_layer.WeightSpace, two_layer.Dual, two_layer.WidthFree.from_start])
def test_a_run_that_goes_to_nan_says_so(kind):
    start = two_layer.draw([0, 1, 2], n=4, d=6, p=8)
    with pytest.warns(UserWarning, match="3 of 3 runs are no longer finite, the first at step 400: "):
        two_layer.simulate(kind(start, rate=3.0), [0, 1, 400])
    engine = kind(start, rate=3.0)
    engine.advance(400)
    with pytest.warns(UserWarning, match="3 of 3 runs are no longer finite, the first at step 400: "):
        engine.measure()
    with pytest.warns(UserWarning, match="1 of 3 runs are no longer finite"):
        two_layer.theorems.theorem_3_2(one_wild(start), activation="identity", rate=1e-3, steps=400)


def one_wild(start):
    scale = torch.tensor([1.0, 1.0, 1e3], dtype=torch.float64)[:, None, None]
    return dataclasses.replace(start, X=start.X * scale)


def test_a_trajectory_of_the_law_that_diverges_says_so():
    dynamics = conservation.Dynamics(activation=conservation.activation("linear"))
    state = conservation.draw([4, 5, 3], seeds=[0, 1], dynamics=dynamics)
    X, y = torch.ones(6, 4, dtype=torch.float64), torch.ones(6, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="2 of 2 runs are no longer finite, the first at step"):
        conservation.gradient_descent(state, dynamics, X * 100, y, rate=5.0, steps=100, names=["loss"])
