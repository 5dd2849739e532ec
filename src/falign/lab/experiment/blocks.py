"""Cutting the missing runs of an experiment into blocks that fit the memory and keep all workers at work."""

import os
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from pathlib import Path

from falign.lab.experiment.execution import Block
from falign.lab.experiment.specification import Experiment, Task

GIB = 2**30
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


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
    """What a block costs, in the unit of its experiment; the number of its runs if that has none."""
    return block.experiment.price(block.tasks)


def refusal(block: Block, memory: int) -> str | None:
    """Why a block cannot be computed: the memory it needs and what there is; None if it fits."""
    needed = _needed(block)
    if needed <= memory:
        return None
    return f"it needs {needed / GIB:.3g} GiB of memory, but a block may have {memory / GIB:.3g}: raise --memory"


def available() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_contained()])


def _contained() -> Sequence[int]:
    """Limits of the container, if any."""
    found = []
    for path in _LIMITS:
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):
            continue
    return found


def _needed(block: Block) -> int:
    return 0 if block.experiment.memory is None else int(block.experiment.memory(block.tasks))


def _fitting(block: Block, memory: int) -> list[Block]:
    """The block, halved until every part is small enough."""
    if len(block.tasks) > 1 and (len(block.tasks) > block.experiment.at_most or _needed(block) > memory):
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
