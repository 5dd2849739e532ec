"""Cutting the missing runs of an experiment into blocks that fit the memory and keep all workers at work."""

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from math import isfinite

from falign.lab.experiment.execution import Block, said
from falign.lab.experiment.specification import Experiment, Task
from falign.lab.memory import GIB


def blocks(experiment: Experiment, tasks: Iterable[Task], *, memory: int, slots: int) -> list[Block]:
    """Cut runs into blocks.

    Runs of a block have the same values on all axes that ``experiment.together`` does not name. A block has at
    most ``experiment.at_most`` runs and needs at most ``memory`` bytes, unless it is a single run: see
    :func:`refusal`. If that leaves fewer blocks than there are slots, the longest blocks are halved.

    Args:
        experiment: The experiment.
        tasks: Its missing runs.
        memory: Bytes that a block may need.
        slots: How many blocks can be at work at once.

    Returns:
        The blocks, the longest first.
    """
    alike: dict[tuple, list[Task]] = {}
    for task in tasks:
        fixed = tuple((axis, value) for axis, value in sorted(task.point.items()) if axis not in experiment.together)
        alike.setdefault(fixed, []).append(task)
    whole = [Block(experiment=experiment, tasks=tuple(group)) for group in alike.values()]
    cut = [part for block in whole for part in _fitting(block, memory)]
    return sorted(_spread(cut, slots), key=cost, reverse=True)


def cost(block: Block) -> float:
    """What a block costs, in the unit of its experiment."""
    return sum(price(block.experiment, task) for task in block.tasks)


def price(experiment: Experiment, task: Task) -> float:
    """What a run costs, in the unit of its experiment; 1 if that has none, or if ``cost`` tells no such number."""
    if experiment.cost is None:
        return 1.0
    try:
        found = float(experiment.cost(task))
    except Exception:  # all that depends on it is in which order runs are computed, and what is said of the time left
        return 1.0
    return found if isfinite(found) and found > 0 else 1.0


def refusal(block: Block, memory: int) -> str | None:
    """Why a block cannot be computed: the memory it needs and what there is; None if it fits."""
    try:
        found = needed(block)
    except Unknown as error:
        return str(error)
    if found <= memory:
        return None
    return f"it needs {found / GIB:.3g} GiB of memory, but a block may have {memory / GIB:.3g}: raise --memory"


class Unknown(ValueError):  # noqa: N818  # an answer of the experiment, which is recorded
    """An experiment that does not tell how much memory a block needs: why."""


def needed(block: Block) -> int:
    """Bytes of memory that a block needs; 0 if its experiment does not say.

    Raises:
        Unknown: The experiment's ``memory`` raises, or tells what is no number of bytes.
    """
    if block.experiment.memory is None:
        return 0
    try:
        found = block.experiment.memory(block.tasks)
        number = int(found)
    except Exception as error:
        raise Unknown(f"how much memory it needs cannot be told: {type(error).__name__}: {said(error)}") from None
    if number < 0 or isinstance(found, (str, bytes)):
        raise Unknown(f"how much memory it needs cannot be told: {said(found)[:80]} is no number of bytes")
    return number


def _fitting(block: Block, memory: int) -> list[Block]:
    """The block, halved until every part is small enough."""
    if len(block.tasks) > 1 and (len(block.tasks) > block.experiment.at_most or refusal(block, memory) is not None):
        return [part for half in block.halves() for part in _fitting(half, memory)]
    return [block]


def _spread(cut: Sequence[Block], slots: int) -> list[Block]:
    """The blocks, the longest of them halved until there is one for each slot, or each is a single run."""
    single = [block for block in cut if len(block.tasks) == 1]
    order = count()
    heap = [(-cost(block), next(order), block) for block in cut if len(block.tasks) > 1]
    heapify(heap)
    while heap and len(single) + len(heap) < slots:
        *_, longest = heappop(heap)
        for half in longest.halves():
            if len(half.tasks) == 1:
                single.append(half)
            else:
                heappush(heap, (-cost(half), next(order), half))
    return [*single, *(block for *_, block in heap)]
