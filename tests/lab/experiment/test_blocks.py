"""Blocks: what may be computed together, and how they are cut to the memory and to the workers."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from examples import do, experiment, table

from falign.lab._memory import GIB, available
from falign.lab.experiment import Task
from falign.lab.experiment._execution import Block, block_cost, make_blocks, memory_refusal


def sizes(cut: Sequence[Block]) -> list[int]:
    return [len(block.tasks) for block in cut]


def whole(**options) -> list[Block]:
    selected = experiment(**{"rates": (0.1, 0.2, 0.3), "seeds": 8, **options})
    return make_blocks(selected, selected.tasks("smoke"), memory=GIB, slots=1)


def hundred_mib_a_run(tasks: Sequence[Task]) -> int:
    return len(tasks) * 100 * 2**20


def longer_with_rate(task: Task) -> float:
    return float(task.point["rate"])


def test_runs_differ_only_along_the_axes_that_go_together() -> None:
    assert sizes(whole(together=("rate",))) == [24]
    assert sizes(whole(together=("steps",))) == [8, 8, 8]
    for block in whole(together=()):
        assert len({task.point["rate"] for task in block.tasks}) == 1
        assert [task.seed for task in block.tasks] == list(range(8))


def test_a_block_has_at_most_so_many_runs() -> None:
    assert sizes(whole(at_most=24)) == [24]
    assert sizes(whole(at_most=23)) == [12, 12]
    assert sizes(whole(at_most=1)) == [1] * 24


def test_a_block_fits_the_memory() -> None:
    cut = whole(memory=hundred_mib_a_run)
    assert sizes(cut) == [6, 6, 6, 6]
    assert all(memory_refusal(block, GIB) is None for block in cut)


def test_the_longest_come_first() -> None:
    cut = whole(together=(), cost=longer_with_rate)
    assert [block.tasks[0].point["rate"] for block in cut] == [0.3, 0.2, 0.1]
    assert block_cost(cut[0]) == pytest.approx(8 * 0.3)


@pytest.mark.parametrize(("slots", "expected"), [(2, [12, 12]), (3, [12, 6, 6]), (4, [6] * 4), (100, [1] * 24)])
def test_all_workers_have_work(slots: int, expected: list[int]) -> None:
    selected = experiment(rates=(0.1, 0.2, 0.3), seeds=8)
    tasks = selected.tasks("smoke")
    cut = make_blocks(selected, tasks, memory=GIB, slots=slots)
    assert sizes(cut) == expected
    assert {task.key for block in cut for task in block.tasks} == {task.key for task in tasks}


def test_a_run_that_is_too_large_is_recorded_with_both_numbers(tmp_path: Path) -> None:
    selected = experiment(memory=lambda tasks: GIB * sum(1 + 3 * (task.seed == 1) for task in tasks))
    code, said = do(selected, tmp_path, memory=2 * GIB)
    assert code == 1
    assert "it needs 4 GiB of memory, but a block may have 2: raise --memory" in said
    assert set(table(selected, tmp_path)["seed"]) == {0, 2, 3, 4}
    assert do(selected, tmp_path, memory=4 * GIB)[0] == 0


def test_what_a_run_leaves_does_not_depend_on_its_block(tmp_path: Path) -> None:
    for number, options in enumerate([{}, {"at_most": 1}, {"at_most": 3}, {"together": ()}]):
        do(experiment(**options), tmp_path / str(number))
        assert table(experiment(), tmp_path / str(number)).equals(table(experiment(), tmp_path / "0"))


def test_the_memory_of_this_machine() -> None:
    assert GIB // 4 < available() < 2**46
