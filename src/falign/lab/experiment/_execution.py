"""Where blocks of runs are computed: what an executor takes, and what it gives back."""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from heapq import heapify, heappop, heappush
from itertools import count, islice
from math import isfinite
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import polars as pl
import torch

from falign._preserve import deterministic
from falign.lab._memory import GIB
from falign.lab._provenance import block_provenance
from falign.lab._signals import Stopped
from falign.lab._text import plain
from falign.lab.data import DataError
from falign.lab.experiment._axes import call_cost, call_memory, call_run
from falign.lab.experiment._run_file import Unfit, frame
from falign.lab.experiment._specification import Experiment, Outcome, Setting, Task, nobody

Run = Callable[..., Outcome | Sequence[Outcome]]
_LONGEST = 2000
"""Letters that are kept of a message."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Runs that are computed in one call.

    Args:
        experiment: Their experiment. It holds figures and claims, so it never travels: ``experiment.run`` does.
        tasks: The runs.
        deaths: How many workers have died of it.
        watch: Told which share of it is over, in the process that submitted it; an executor need not know.
    """

    experiment: Experiment
    tasks: tuple[Task, ...]
    deaths: int = 0
    watch: Callable[[float], None] = nobody

    def halves(self) -> tuple["Block", "Block"]:
        """The block in two; it has at least two runs."""
        middle = len(self.tasks) // 2
        return replace(self, tasks=self.tasks[:middle]), replace(self, tasks=self.tasks[middle:])


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a run left that is fit to be kept, or why it is not.

    Args:
        status: What became of the run.
        message: How it diverged or failed; None if done.
        records: Its records; none if it failed.
    """

    status: Literal["done", "diverged", "failed"]
    message: str | None
    records: pl.DataFrame


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What computing a block came to: plain values, so that any process can send it to any other.

    Args:
        outcomes: What each run left, in the order of the runs; None if the block left nothing.
        error: Why there are none: type and text of an exception, or how the worker died; None if there are.
        absent: Whether the reason is that a data set is not here.
        lost: Whether the worker died of it, or with it, so that it is worth another try.
        seconds: How long it took.
        provenance: See :func:`falign.lab._provenance.place`; empty if the worker died.
    """

    outcomes: tuple[Left, ...] | None = None
    error: str | None = None
    absent: bool = False
    lost: bool = False
    seconds: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """A block that was submitted, and its answer."""

    block: Block
    answer: Answer


@runtime_checkable
class Executor(Protocol):
    """Computes blocks somewhere, some at a time; a context manager that ends its workers when it is left.

    An executor reports what happened and decides nothing: what is tried again, split or given up is decided by
    :mod:`falign.lab.experiment._reproduce`, the same for all executors. It is made with the
    :class:`~falign.lab.experiment._specification.Setting` in which everything is computed. What it sends to a
    worker is ``compute(block.experiment.run, block.tasks, setting)``, and what comes back is an ``Answer``;
    only if no answer comes, because the worker died, it makes one itself: ``Answer(error="...", lost=True)``.
    """

    @property
    def slots(self) -> int:
        """How many blocks it can have at work at once; may change."""
        ...

    def submit(self, block: Block) -> None:
        """Take a block; returns at once."""
        ...

    def wait(self, timeout: float | None = None) -> list[Finished]:
        """Wait until a submitted block is finished.

        Args:
            timeout: Seconds after which to return in any case; None waits as long as it takes.

        Returns:
            All blocks that have finished since the last call, each once; none if the time was over, or if no
            block is at work.
        """
        ...

    def __enter__(self) -> "Executor": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all workers; at once and without waiting for their blocks if ``kind`` is given."""
        ...


def compute(run: Run, tasks: Sequence[Task], setting: Setting) -> Answer:
    """Compute a block here and now; whatever the experiment raises or leaves becomes an answer.

    What it changes in this process beside (folder, threads, default dtype and device, gradients, generators of random
    numbers) is put back, and it begins with generators that depend on nothing but its runs.

    Args:
        run: The function of the experiment.
        tasks: The runs.
        setting: Device and data.

    Returns:
        The answer.

    Raises:
        Stopped: A signal ends the command.
    """
    origin = {**block_provenance(setting.device), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    start, process = perf_counter(), os.getpid()
    left, error, absent = None, None, False
    with _kept(tasks), deterministic(torch.device(setting.device)):
        try:
            left = _all_left(tasks, call_run(run, tasks, setting))
        except Stopped:
            raise
        except DataError as found:
            error, absent = said(found), True
        except Unfit as found:
            error = str(found)
        except BaseException as found:  # sys.exit() and the like: whatever an experiment raises is its result
            error = f"{type(found).__name__}: {said(found)}".removesuffix(": ")
        if os.getpid() != process:  # a copy of this process that the run has made, which must not answer as well
            os._exit(0)
    return Answer(outcomes=left, error=error, absent=absent, seconds=perf_counter() - start, provenance=origin)


def _all_left(tasks: Sequence[Task], outcomes: object) -> tuple[Left, ...]:
    if not isinstance(outcomes, Iterable):
        raise Unfit(f"the runs left a {type(outcomes).__name__}, expected a list with an Outcome for each")
    found = list(islice(outcomes, len(tasks) + 1))
    if len(found) != len(tasks) or not all(isinstance(outcome, Outcome) for outcome in found):
        count = len(found) if len(found) <= len(tasks) else f"more than {len(tasks)}"
        raise Unfit(f"{count} outcomes came back for {len(tasks)} runs, expected an Outcome for each")
    return tuple(_left(task, outcome) for task, outcome in zip(tasks, found, strict=True))


def _left(task: Task, outcome: Outcome) -> Left:
    try:
        records = frame(task, outcome)
    except Unfit as error:
        return Left(status="failed", message=said(error), records=pl.DataFrame())
    except Exception as error:  # records whose own methods raise, tensors that cannot be copied
        message = f"what it left cannot be read: {type(error).__name__}: {said(error)}"
        return Left(status="failed", message=message, records=pl.DataFrame())
    if outcome.diverged is None:
        return Left(status="done", message=None, records=records)
    return Left(status="diverged", message=said(outcome.diverged), records=records)


def said(message: object) -> str:
    """What a message or an exception says, as it can be kept and shown."""
    try:
        return plain(str(message)[:_LONGEST]).strip()[:_LONGEST]
    except Exception:  # an exception of the experiment's own may fail even at this
        return "it has a message that cannot be shown"


@contextmanager
def _kept(tasks: Sequence[Task]) -> Iterator[None]:
    """What a block changes in its process is put back, and what it draws without a seed depends on its runs alone."""
    folder = None
    with suppress(OSError):
        folder = os.getcwd()
    threads, dtype, device = torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device()
    grad, state, torch_state = torch.is_grad_enabled(), random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002  # the generator that is meant here is the global one
    number = int(tasks[0].key[:8], 16)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        if torch.get_default_device() != device:  # not otherwise: it costs time at every call of torch
            torch.set_default_device(None if device.type == "cpu" else device)
        if folder is not None:
            with suppress(OSError):
                os.chdir(folder)


# Cutting the missing runs of an experiment into blocks that fit the memory and keep all workers at work.


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
        found = float(call_cost(experiment.cost, task))
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
        found = call_memory(block.experiment.memory, block.tasks)
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
