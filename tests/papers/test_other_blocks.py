"""Runs that are computed again in another block, by another number of threads: equal to the declared digits."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from falign.lab.experiment import Experiment, Setting, Task
from falign.lab.experiment._execution import GIB, RunResult, compute, make_blocks
from falign.lab.experiment._run_file import relative_difference
from falign.papers import PAPERS

pytestmark = pytest.mark.unchecked  # many steps: checking annotations would take most of the time

EXPERIMENTS = {each.name: each for paper in PAPERS.values() for each in paper.experiments}
QUICK = ("song2021.figure2", "song2021.dropout", "girotti2021.order", "garg2022.ranks", "robertson2024.overfitting")
"""One of each engine; the others are among the slow ones."""
SIZES = {"song2021.dropout": 8, "garg2022.ranks": 12, "benchmark.table": 10}
"""So many runs of these are enough."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def computed(experiment: Experiment, tasks: tuple[Task, ...], threads: int, folder: Path) -> tuple[RunResult, ...]:
    torch.set_num_threads(threads)
    result = compute(experiment.run, tasks, Setting(data=folder))
    assert result.run_results is not None, result.error
    return result.run_results


@pytest.mark.filterwarnings("ignore:rule 'kp' without:UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EXPERIMENTS]
)
def test_runs_of_another_block_agree_to_the_declared_digits(name: str, data_folder: Path) -> None:
    experiment = EXPERIMENTS[name]
    tasks = experiment.tasks("smoke")[: SIZES.get(name)]
    worst, compared = 0.0, 0
    for block in make_blocks(experiment, tasks, memory=GIB, slots=1):
        whole = computed(experiment, block.tasks, 1, data_folder)
        some = random.Random(name).sample(range(len(block.tasks)), min(3, len(block.tasks)))
        alone = [computed(experiment, (block.tasks[place],), 1, data_folder)[0] for place in some]
        half = -(-len(block.tasks) // 2)
        parts = computed(experiment, block.tasks[:half], 2, data_folder)
        for one, other in [
            *zip((whole[place] for place in some), alone, strict=True),
            *zip(whole, parts, strict=False),
        ]:
            assert (one.status, one.message) == (other.status, other.message)
            worst = max(
                worst,
                relative_difference(*(each.records.drop(experiment.timed, strict=False) for each in (one, other))),
            )
            compared += 1
    assert compared >= min(2, len(tasks))
    assert worst <= experiment.agreement


def test_what_is_to_the_bit_is_said_to_be_so() -> None:
    assert all(0 <= experiment.agreement <= 1e-3 for experiment in EXPERIMENTS.values())
    assert EXPERIMENTS["girotti2021.networks"].agreement == 0.0
