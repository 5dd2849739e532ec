"""What is done with an answer, whatever executor it comes from: kept, tried again, halved or given up."""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from examples import do, experiment, table

from falign.lab.config import ConfigError
from falign.lab.experiment.execution import Answer, Block, Finished, compute
from falign.lab.experiment.specification import Setting
from falign.lab.experiment.store import Store

LOST = Answer(error="its worker died", lost=True)


class Scripted:
    """An executor that answers as it is told, and notes what it was given.

    Args:
        answer: Block, number of the call -> its answer; None computes it.
        slots: How many blocks it takes at once.
    """

    def __init__(self, answer: Callable[[Block, int], Answer | None], slots: int = 1) -> None:
        self.slots = slots
        self.given: list[list[int]] = []
        self._answer = answer
        self._blocks: deque[tuple[Block, int]] = deque()

    def submit(self, block: Block) -> None:
        assert len(self._blocks) < self.slots, "no more than it has slots for"
        self._blocks.append((block, len(self.given)))
        self.given.append([task.seed for task in block.tasks])

    def wait(self, timeout: float | None = None) -> list[Finished]:
        block, number = self._blocks.popleft()
        answer = self._answer(block, number) or compute(block.experiment.run, block.tasks, Setting())
        return [Finished(block=block, answer=answer)]

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *_) -> None:
        assert not self._blocks, "every block was waited for"


def seeds(block: Block) -> set[int]:
    return {task.seed for task in block.tasks}


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        (lambda block, call: None, [[0, 1, 2, 3]]),
        (lambda block, call: LOST if call == 0 else None, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (
            lambda block, call: LOST if call < 2 else None,
            [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1], [2, 3]],
        ),
        (
            lambda block, call: Answer(error="MemoryError") if len(block.tasks) > 2 else None,
            [[0, 1, 2, 3], [0, 1], [2, 3]],
        ),
    ],
    ids=["well", "lost once", "lost twice", "too large"],
)
def test_what_is_tried_again(answer: Callable, given: list, tmp_path: Path) -> None:
    selected, executor = experiment(rates=(0.1,), seeds=4), Scripted(answer)
    assert do(selected, tmp_path / "out", executor=executor)[0] == 0
    assert executor.given == given
    do(selected, tmp_path / "undisturbed")
    assert table(selected, tmp_path / "out").equals(table(selected, tmp_path / "undisturbed"))


@pytest.mark.parametrize("lost", [True, False])
def test_bad_runs_are_found_among_good_ones(lost: bool, tmp_path: Path) -> None:
    bad = {0, 5, 6}
    selected = experiment(rates=(0.1,), seeds=9)
    executor = Scripted(lambda block, call: Answer(error="bad", lost=lost) if seeds(block) & bad else None, slots=3)
    assert do(selected, tmp_path, executor=executor)[0] == 1
    runs = Store(folder=tmp_path).results(selected, "smoke").runs
    assert {row["seed"] for row in runs.to_dicts() if row["status"] == "failed"} == bad
    assert set(runs["message"].drop_nulls()) == {"bad"}
    assert set(table(selected, tmp_path)["seed"]) == set(range(9)) - bad


def test_a_single_run_that_kills_its_worker_is_given_up_the_second_time(tmp_path: Path) -> None:
    executor = Scripted(lambda block, call: LOST)
    assert do(experiment(rates=(0.1,), seeds=1), tmp_path, executor=executor)[0] == 1
    assert executor.given == [[0], [0]]


def test_an_executor_is_not_entered_for_nothing(tmp_path: Path) -> None:
    do(experiment(), tmp_path)

    class Unreachable(Scripted):
        def __enter__(self) -> Scripted:
            raise AssertionError

    assert do(experiment(), tmp_path, executor=Unreachable(lambda block, call: None))[0] == 0


def test_an_executor_that_cannot_be_reached_leaves_no_folder(tmp_path: Path) -> None:
    class Unreachable(Scripted):
        def __enter__(self) -> Scripted:
            raise ConfigError("nothing answers")

    with pytest.raises(ConfigError, match="nothing answers"):
        do(experiment(), tmp_path / "out", executor=Unreachable(lambda block, call: None))
    assert not (tmp_path / "out").exists()
