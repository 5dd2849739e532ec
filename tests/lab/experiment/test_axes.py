"""Binding of a grid's axes to the keywords of an experiment's functions."""

from collections.abc import Sequence

import pytest

from falign.lab.experiment import Experiment, Outcome, Point, Setting, Task, grid
from falign.lab.experiment._axes import call_cost, call_memory, call_run, mismatch


def one(*, seed: int, setting: Setting, rate: float, name: str, steps: int = 3) -> Outcome:
    return Outcome(records={"told": [f"{seed} {rate} {name} {steps}"]})


def block(*, seeds: Sequence[int], setting: Setting, rate: Sequence[float], name: str) -> list[Outcome]:
    return [Outcome(records={"told": [f"{seed} {each} {name}"]}) for seed, each in zip(seeds, rate, strict=True)]


def tasks(*points: Point) -> list[Task]:
    return [Task("toy.axes", 1, point, seed) for seed, point in enumerate(points)]


def told(outcomes: Sequence[Outcome]) -> list:
    return [outcome.records["told"][0] for outcome in outcomes]


def test_a_run_gets_its_axes_and_its_block_tells_how_far_it_is() -> None:
    shares: list[float] = []
    block = tasks({"rate": 1, "name": "a"}, {"rate": 0.5, "name": "b", "steps": 7})
    assert told(call_run(one, block, Setting(report=shares.append))) == ["0 1.0 a 3", "1 0.5 b 7"]
    assert shares == [0.5, 1.0]


def test_a_block_gets_a_value_for_each_run_where_it_asks_for_them() -> None:
    same = tasks({"rate": 1, "name": "a"}, {"rate": 0.5, "name": "a"})
    assert told(call_run(block, same, Setting())) == ["0 1.0 a", "1 0.5 a"]


def test_a_function_of_tasks_gets_them_as_they_are() -> None:
    given = tasks({"rate": 1, "name": "a"})
    assert call_run(lambda tasks, setting: tasks, given, Setting()) is given
    assert call_memory(lambda tasks: len(tasks), given) == 1
    assert call_cost(lambda task: task.seed, given[0]) == 0


def test_memory_and_cost_get_the_axes_that_they_name() -> None:
    def memory(*, seeds: Sequence[int], rate: Sequence[float]) -> int:
        return len(seeds) + int(sum(rate))

    given = tasks({"rate": 1, "name": "a"}, {"rate": 4.0, "name": "a"})
    assert call_memory(memory, given) == 7
    assert call_memory(lambda *, name: len(name), given) == 1
    assert call_cost(lambda *, rate: 2 * rate, given[1]) == 8


@pytest.mark.parametrize(
    ("run", "points", "together", "message"),
    [
        (one, grid(rate=1.0, name="a", width=3), (), "its run takes no axis 'width'"),
        (one, grid(rate=1.0), (), "its run takes 'name', which is no axis of its grid"),
        (one, grid(rate="fast", name="a"), (), "axis 'rate' has 'fast', expected float"),
        (one, grid(rate=True, name="a"), (), "axis 'rate' has True, expected float"),
        (one, grid(rate=1.0, name="a", steps=2.5), (), "axis 'steps' has 2.5, expected int"),
        (block, grid(rate=1.0, name="a"), ("name",), "its blocks differ in 'name'"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(
    run, points: Sequence[Point], together: Sequence[str], message: str
) -> None:
    assert message in (mismatch(run, points, together) or "")
    with pytest.raises(ValueError, match=r"experiment 'toy.axes': "):
        Experiment(
            name="toy.axes",
            title="axes",
            source="a toy",
            revision=1,
            grid={"smoke": points},
            seeds={"smoke": 1},
            run=run,
            together=tuple(together),
        )


@pytest.mark.parametrize(("run", "together"), [(one, ()), (one, ("rate", "name")), (block, ("rate",))])
def test_a_grid_that_fits_is_taken(run, together: Sequence[str]) -> None:
    assert mismatch(run, grid(rate=(1, 0.5), name="a"), together) is None
