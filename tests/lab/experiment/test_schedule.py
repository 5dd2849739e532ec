"""What is done with a result, whatever executor it comes from: kept, tried again, halved or given up."""

import heapq
from collections import deque
from collections.abc import Callable
from pathlib import Path

import examples
import pytest
from examples import do, experiment, notes, table

from falign.lab.config import ConfigError
from falign.lab.experiment import _local, _progress
from falign.lab.experiment._axes import call_cost
from falign.lab.experiment._execution import GIB, Block, BlockResult, FinishedBlock, compute, make_blocks
from falign.lab.experiment._progress import RunCounts
from falign.lab.experiment._specification import Experiment, Setting, Task
from falign.lab.experiment._store import Store
from falign.papers.song2021 import SONG2021

LOST = BlockResult(error="its worker died", worker_died=True)


class Scripted:
    """An executor that answers as it is told, and notes what it was given.

    Args:
        result: Block, number of the call -> its result; None computes it.
        slots: How many blocks it takes at once.
    """

    def __init__(self, result: Callable[[Block, int], BlockResult | None], slots: int = 1) -> None:
        self.slots = slots
        self.given: list[list[int]] = []
        self._result = result
        self._blocks: deque[tuple[Block, int]] = deque()

    def submit(self, block: Block) -> None:
        assert len(self._blocks) < self.slots, "no more than it has slots for"
        self._blocks.append((block, len(self.given)))
        self.given.append([task.seed for task in block.tasks])

    def wait(self, timeout: float | None = None) -> list[FinishedBlock]:
        block, number = self._blocks.popleft()
        result = self._result(block, number) or compute(block.experiment.run, block.tasks, Setting())
        return [FinishedBlock(block=block, result=result)]

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *_) -> None:
        assert not self._blocks, "every block was waited for"


def seeds(block: Block) -> set[int]:
    return {task.seed for task in block.tasks}


@pytest.mark.parametrize(
    ("result", "given"),
    [
        (lambda block, call: None, [[0, 1, 2, 3]]),
        (lambda block, call: LOST if call == 0 else None, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (
            lambda block, call: LOST if call < 2 else None,
            [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1], [2, 3]],
        ),
        (
            lambda block, call: BlockResult(error="MemoryError") if len(block.tasks) > 2 else None,
            [[0, 1, 2, 3], [0, 1], [2, 3]],
        ),
    ],
    ids=["well", "lost once", "lost twice", "too large"],
)
def test_what_is_tried_again(result: Callable, given: list, tmp_path: Path) -> None:
    selected, executor = experiment(rates=(0.1,), seeds=4), Scripted(result)
    assert do(selected, tmp_path / "out", executor=executor)[0] == 0
    assert executor.given == given
    do(selected, tmp_path / "undisturbed")
    assert table(selected, tmp_path / "out").equals(table(selected, tmp_path / "undisturbed"))


@pytest.mark.parametrize("lost", [True, False])
def test_bad_runs_are_found_among_good_ones(lost: bool, tmp_path: Path) -> None:
    bad = {0, 5, 6}
    selected = experiment(rates=(0.1,), seeds=9)
    executor = Scripted(
        lambda block, call: BlockResult(error="bad", worker_died=lost) if seeds(block) & bad else None, slots=3
    )
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


def test_blocks_are_cut_once_it_is_known_that_they_would_take_long(tmp_path: Path) -> None:
    """What is computed is lost if the command is killed in the midst of a block."""
    selected = experiment(rates=(0.1, 0.2), seeds=4, together=())

    def result(block: Block, call: int) -> BlockResult:
        found = compute(block.experiment.run, block.tasks, Setting())
        return BlockResult(run_results=found.run_results, seconds=35.0 * len(block.tasks), provenance=found.provenance)

    executor = Scripted(result)
    assert do(selected, tmp_path, executor=executor)[0] == 0
    assert executor.given == [[0, 1, 2, 3], [0], [1], [2], [3]], "nothing is known of the first one"


def truth(experiment: Experiment, tasks: tuple[Task, ...], slow: float) -> float:
    """Seconds that a block takes in the simulation: unlike its cost, by kind and size, and never quite the same."""
    assert experiment.cost is not None
    factor = {"identity": 3.0, "relu": 1.0, "tanh": slow}[str(tasks[0].point["activation"])]
    wobble = 0.85 + 0.3 * int(tasks[0].key[:4], 16) / 0xFFFF
    return 1.5 + wobble * factor * 1e-9 * sum(call_cost(experiment.cost, task) for task in tasks)


@pytest.mark.parametrize("slots", [1, 2, 8])
@pytest.mark.parametrize("slow", [0.75, 1.0, 1.33])
@pytest.mark.unchecked
def test_the_time_left_is_told_within_a_quarter(slots: int, slow: float) -> None:
    """The paper's figure 2, 4,550 runs of 7 widths, in simulated time: after a fifth of it, and from then on."""
    selected = next(each for each in SONG2021.experiments if each.name == "song2021.figure2")
    tasks, now = selected.tasks("paper"), 0.0
    counts = RunCounts(
        experiment=selected, total=len(tasks), missing={task.key: task for task in tasks}, status={}, clock=lambda: now
    )
    assert counts.estimate(slots) is None
    pending = deque(make_blocks(selected, tasks, memory=4 * GIB, slots=slots))
    at_work: list[tuple[float, int, Block, float]] = []
    told: list[tuple[float, float]] = []
    number = 0
    while pending or at_work:
        while pending and len(at_work) < slots:
            block = pending.popleft()
            if len(block.tasks) > 1 and (counts.seconds(block) or 0.0) > 60:
                pending.extendleft(reversed(block.split()))
                continue
            counts.start(block)
            number += 1
            heapq.heappush(at_work, (now + truth(selected, block.tasks, slow), number, block, now))
        now = min(now + 5.0, at_work[0][0])
        while at_work and at_work[0][0] <= now:
            _, _, block, begun = heapq.heappop(at_work)
            counts.end(block, now - begun)
            for task in block.tasks:
                counts.add(task, "done")
        for end, _, block, begun in at_work:
            counts.report(block, (now - begun) / (end - begun))
        estimate = counts.estimate(slots)
        if estimate is not None:
            told.append((now, estimate))
    assert told[-1] == (now, 0.0)
    assert told[0][0] <= 10.0, "it is told from the second report of the first block on"
    errors = {moment / now: estimate / (now - moment) - 1 for moment, estimate in told if moment < 0.9 * now}
    assert len(errors) > 10
    assert max(abs(error) for share, error in errors.items() if share > 0.2) < 0.25


def halfway(tasks, setting: Setting) -> list:
    """Tells how far it is, twice; and what no share is, which is passed over."""
    for share in (0.25, float("nan"), 0.5, 0.125):
        setting.report(share)
    return examples.run(tasks, setting)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_block_tells_how_far_it_is(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "_PAUSE", 0.0)
    monkeypatch.setattr(_local, "_PAUSE", 0.0)
    if workers == 2:  # a worker has the pause of its own process: the second report comes after it
        monkeypatch.setenv("FALIGN_TEST_NOTES", str(tmp_path / "notes"))
        selected = experiment(examples.slowly, seeds=1, at_most=1)
        _, said = do(selected, tmp_path / "out", workers=2)
        assert "(25 % done)" in said or "(50 % done)" in said
        assert len(notes(tmp_path / "notes", "computed")) == 2
    else:
        _, said = do(experiment(halfway, seeds=1), tmp_path)
        assert "toy.decay: 0 of 2 runs there, 2 running (25 % done)\n" in said
        assert "toy.decay: 0 of 2 runs there, 2 running (50 % done), about " in said
        assert "(12 % done)" not in said
        assert "nan" not in said


def test_what_cannot_be_shown_is_no_fault_of_a_run(tmp_path: Path) -> None:
    selected = experiment(halfway, seeds=1)

    def watch(share: float) -> None:
        raise BrokenPipeError

    with examples.local_executor(1, Setting()) as executor:
        executor.submit(Block(experiment=selected, tasks=selected.tasks("smoke"), on_progress=watch))
        (finished,) = executor.wait()
    assert finished.result.error is None
