"""Blocks of runs: how the missing runs are cut into them, what computes one, and what an executor gives back."""

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
from falign.lab.experiment._run_file import InvalidOutcome, records_frame
from falign.lab.experiment._specification import Experiment, Outcome, Setting, Task, nobody

RunFunction = Callable[..., Outcome | Sequence[Outcome]]
_MAX_MESSAGE = 2000
"""Characters that are kept of a message."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Runs that are computed in one call.

    Args:
        experiment: Their experiment. It holds figures and claims, so only ``experiment.run`` is sent to workers.
        tasks: The runs.
        worker_deaths: How many workers have died while they computed it.
        on_progress: Called with the share of it that is over, in the process that submitted it; an executor may
            leave that out.
    """

    experiment: Experiment
    tasks: tuple[Task, ...]
    worker_deaths: int = 0
    on_progress: Callable[[float], None] = nobody

    def split(self) -> tuple["Block", "Block"]:
        """Split the block, which has at least two runs, in two."""
        middle = len(self.tasks) // 2
        return replace(self, tasks=self.tasks[:middle]), replace(self, tasks=self.tasks[middle:])


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Checked records of a run, or the reason why there are none.

    Args:
        status: How the run ended.
        message: How it diverged or failed; None if done.
        records: Its records; none if it failed.
    """

    status: Literal["done", "diverged", "failed"]
    message: str | None
    records: pl.DataFrame


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """Results of a block's runs, or the error that ended it: plain values that any process can send to any other.

    Args:
        run_results: One a run, in the order of the runs; None if the block ended by an error.
        error: Type and text of the exception, or how the worker died; None if there are results.
        data_missing: Whether the error is that a data set is not on this machine.
        worker_died: Whether the worker process died meanwhile, so that the block is worth another try.
        seconds: Time that the block took.
        provenance: Machine and versions, see :func:`falign.lab._provenance.block_provenance`; empty if the worker died.
    """

    run_results: tuple[RunResult, ...] | None = None
    error: str | None = None
    data_missing: bool = False
    worker_died: bool = False
    seconds: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedBlock:
    """A submitted block with its result."""

    block: Block
    result: BlockResult


@runtime_checkable
class Executor(Protocol):
    """Computes blocks somewhere, some at a time; a context manager that ends its workers when it is left.

    An executor reports what happened and decides nothing: what is tried again, split or given up is decided by
    :mod:`falign.lab.experiment._schedule`, the same for all executors. A worker calls
    ``compute(block.experiment.run, block.tasks, setting)``; if it dies, the executor itself makes the
    ``BlockResult(error=..., worker_died=True)``.
    """

    @property
    def slots(self) -> int:
        """Number of blocks that it can compute at once; may change."""
        ...

    def submit(self, block: Block) -> None:
        """Take a block, without waiting for it."""
        ...

    def wait(self, timeout: float | None = None) -> list[FinishedBlock]:
        """Wait until a submitted block is finished.

        Args:
            timeout: Seconds after which to return in any case; None waits as long as it takes.

        Returns:
            All blocks that have finished since the last call, each once; none after the timeout, or if no block is
            being computed.
        """
        ...

    def __enter__(self) -> "Executor": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all workers; at once and without waiting for their blocks if ``kind`` is given."""
        ...


def compute(run: RunFunction, tasks: Sequence[Task], setting: Setting) -> BlockResult:
    """Compute a block in this process; whatever the experiment raises or returns becomes its result.

    Whatever it changes in this process (folder, threads, default dtype and device, gradients, generators of random
    numbers) is put back, and it begins with global generators that depend on nothing but its runs: the numbers are the
    same whichever process computes them, and whatever that process computed before.

    Args:
        run: The function of the experiment.
        tasks: The runs.
        setting: Device and data.

    Raises:
        Stopped: A signal came.
    """
    origin = {**block_provenance(setting.device), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    start, process = perf_counter(), os.getpid()
    run_results, error, data_missing = None, None, False
    with _process_state_restored(tasks), deterministic(torch.device(setting.device)):
        try:
            run_results = _run_results(tasks, call_run(run, tasks, setting))
        except Stopped:
            raise
        except DataError as exception:
            error, data_missing = message_of(exception), True
        except InvalidOutcome as exception:
            error = str(exception)
        except BaseException as exception:  # sys.exit() and the like: whatever an experiment raises is its result
            error = f"{type(exception).__name__}: {message_of(exception)}".removesuffix(": ")
        if os.getpid() != process:  # a copy of this process that the run has forked must not return a result, too
            os._exit(0)
    seconds = perf_counter() - start
    return BlockResult(
        run_results=run_results, error=error, data_missing=data_missing, seconds=seconds, provenance=origin
    )


def _run_results(tasks: Sequence[Task], outcomes: object) -> tuple[RunResult, ...]:
    if not isinstance(outcomes, Iterable):
        raise InvalidOutcome(f"the runs left a {type(outcomes).__name__}, expected a list with an Outcome for each")
    outcomes = list(islice(outcomes, len(tasks) + 1))  # a generator may never end
    if len(outcomes) != len(tasks) or not all(isinstance(outcome, Outcome) for outcome in outcomes):
        number = len(outcomes) if len(outcomes) <= len(tasks) else f"more than {len(tasks)}"
        raise InvalidOutcome(f"{number} outcomes came back for {len(tasks)} runs, expected an Outcome for each")
    return tuple(_run_result(task, outcome) for task, outcome in zip(tasks, outcomes, strict=True))


def _run_result(task: Task, outcome: Outcome) -> RunResult:
    try:
        records = records_frame(task, outcome)
    except InvalidOutcome as error:
        return RunResult(status="failed", message=message_of(error), records=pl.DataFrame())
    except Exception as error:  # records whose own methods raise, tensors that cannot be copied
        message = f"what it left cannot be read: {type(error).__name__}: {message_of(error)}"
        return RunResult(status="failed", message=message, records=pl.DataFrame())
    if outcome.diverged is None:
        return RunResult(status="done", message=None, records=records)
    return RunResult(status="diverged", message=message_of(outcome.diverged), records=records)


def message_of(message: object) -> str:
    """Text of a message or an exception, short and without control characters, as the store keeps it."""
    try:
        return plain(str(message)[:_MAX_MESSAGE]).strip()[:_MAX_MESSAGE]
    except Exception:  # an exception of the experiment's own may fail even at this
        return "it has a message that cannot be shown"


@contextmanager
def _process_state_restored(tasks: Sequence[Task]) -> Iterator[None]:
    """Put back what a block changes in its process, and seed the global generators by its runs alone."""
    folder = None
    with suppress(OSError):
        folder = os.getcwd()
    threads, dtype, device = torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device()
    grad, state, torch_state = torch.is_grad_enabled(), random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002  # the generator that is meant here is the global one
    seed = int(tasks[0].key[:8], 16)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        if torch.get_default_device() != device:  # once a default is set, every call of torch takes longer
            torch.set_default_device(None if device.type == "cpu" else device)
        if folder is not None:
            with suppress(OSError):
                os.chdir(folder)


# Cutting the missing runs of an experiment into blocks that fit into memory and keep all workers busy.


def make_blocks(experiment: Experiment, tasks: Iterable[Task], *, memory: int, slots: int) -> list[Block]:
    """Cut runs into blocks.

    Runs of a block have the same values on all axes that ``experiment.together`` does not name. A block has at
    most ``experiment.at_most`` runs and needs at most ``memory`` bytes, unless it is a single run: see
    :func:`memory_refusal`. If that leaves fewer blocks than there are slots, the longest blocks are halved.

    Args:
        experiment: The experiment.
        tasks: Its missing runs.
        memory: Bytes that a block may need.
        slots: Number of blocks that can be computed at once.

    Returns:
        The blocks, the most expensive first: a long one that begins last would be waited for alone.
    """
    groups: dict[tuple, list[Task]] = {}
    for task in tasks:
        fixed = tuple((axis, value) for axis, value in sorted(task.point.items()) if axis not in experiment.together)
        groups.setdefault(fixed, []).append(task)
    whole = [Block(experiment=experiment, tasks=tuple(group)) for group in groups.values()]
    fitting = [part for block in whole for part in _split_to_fit(block, memory)]
    return sorted(_split_for_slots(fitting, slots), key=block_cost, reverse=True)


def block_cost(block: Block) -> float:
    """Cost of a block, in the unit of its experiment."""
    return sum(run_cost(block.experiment, task) for task in block.tasks)


def run_cost(experiment: Experiment, task: Task) -> float:
    """Cost of a run, in the unit of its experiment; 1 if that has none, or if its ``cost`` gives no positive number."""
    if experiment.cost is None:
        return 1.0
    try:
        cost = float(call_cost(experiment.cost, task))
    except Exception:  # nothing depends on it but the order of the runs and the estimate of the time left
        return 1.0
    return cost if isfinite(cost) and cost > 0 else 1.0


def memory_refusal(block: Block, memory: int) -> str | None:
    """Reason why a block is not computed: the memory it needs and what there is; None if it fits."""
    try:
        needed = memory_needed(block)
    except UnknownMemory as error:
        return str(error)
    if needed <= memory:
        return None
    return f"it needs {needed / GIB:.3g} GiB of memory, but a block may have {memory / GIB:.3g}: raise --memory"


class UnknownMemory(ValueError):  # noqa: N818  # a verdict on the experiment, which is recorded
    """Reason why an experiment does not tell how much memory a block needs."""


def memory_needed(block: Block) -> int:
    """Bytes of memory that a block needs; 0 if its experiment does not say.

    Raises:
        UnknownMemory: The experiment's ``memory`` raises, or tells what is no number of bytes.
    """
    if block.experiment.memory is None:
        return 0
    try:
        answer = call_memory(block.experiment.memory, block.tasks)
        needed = int(answer)
    except Exception as error:
        raise UnknownMemory(
            f"how much memory it needs cannot be told: {type(error).__name__}: {message_of(error)}"
        ) from None
    if needed < 0 or isinstance(answer, (str, bytes)):
        raise UnknownMemory(f"how much memory it needs cannot be told: {message_of(answer)[:80]} is no number of bytes")
    return needed


def _split_to_fit(block: Block, memory: int) -> list[Block]:
    """Halve a block until every part is small enough."""
    if len(block.tasks) > 1 and (
        len(block.tasks) > block.experiment.at_most or memory_refusal(block, memory) is not None
    ):
        return [part for half in block.split() for part in _split_to_fit(half, memory)]
    return [block]


def _split_for_slots(blocks: Sequence[Block], slots: int) -> list[Block]:
    """Halve the most expensive blocks until there is one for each slot, or each is a single run."""
    single = [block for block in blocks if len(block.tasks) == 1]
    order = count()  # no two entries of the heap may be equal: blocks cannot be compared
    heap = [(-block_cost(block), next(order), block) for block in blocks if len(block.tasks) > 1]
    heapify(heap)
    while heap and len(single) + len(heap) < slots:
        *_, longest = heappop(heap)
        for half in longest.split():
            if len(half.tasks) == 1:
                single.append(half)
            else:
                heappush(heap, (-block_cost(half), next(order), half))
    return [*single, *(block for *_, block in heap)]
