"""Where blocks of runs are computed: what an executor takes, and what it gives back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from falign.lab.data import DataError
from falign.lab.experiment.specification import Experiment, Outcome, Setting, Task
from falign.lab.provenance import place

Run = Callable[[Sequence[Task], Setting], Sequence[Outcome]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Runs that are computed in one call.

    Args:
        experiment: Their experiment. It holds figures and claims, so it never travels: ``experiment.run`` does.
        tasks: The runs.
        deaths: How many workers have died of it.
    """

    experiment: Experiment
    tasks: tuple[Task, ...]
    deaths: int = 0

    def halves(self) -> tuple["Block", "Block"]:
        """The block in two; it has at least two runs."""
        middle = len(self.tasks) // 2
        return replace(self, tasks=self.tasks[:middle]), replace(self, tasks=self.tasks[middle:])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What computing a block came to: plain values, so that any process can send it to any other.

    Args:
        outcomes: One a run, in the order of the runs; None if there are none.
        error: Why there are none: type and text of an exception, or how the worker died; None if there are.
        absent: Whether the reason is that a data set is not here.
        lost: Whether the worker died of it, or with it, so that it is worth another try.
        seconds: How long it took.
        provenance: See :func:`falign.lab.provenance.place`; empty if the worker died.
    """

    outcomes: tuple[Outcome, ...] | None = None
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
    :mod:`falign.lab.experiment.reproduce`, the same for all executors. It is made with the
    :class:`~falign.lab.experiment.specification.Setting` in which everything is computed. What it sends to a
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
    """Compute a block here and now; every exception of the experiment becomes an answer.

    Args:
        run: The function of the experiment.
        tasks: The runs.
        setting: Device and data.

    Returns:
        The answer.
    """
    origin = {**place(setting.device), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    start = perf_counter()
    try:
        outcomes = tuple(run(tasks, setting))
    except DataError as error:
        return Answer(error=str(error), absent=True, seconds=perf_counter() - start, provenance=origin)
    except Exception as error:  # whatever an experiment raises is its result
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        return Answer(error=text, seconds=perf_counter() - start, provenance=origin)
    seconds = perf_counter() - start
    if len(outcomes) != len(tasks) or not all(isinstance(outcome, Outcome) for outcome in outcomes):
        text = f"{len(outcomes)} outcomes came back for {len(tasks)} runs, expected an Outcome for each"
        return Answer(error=text, seconds=seconds, provenance=origin)
    return Answer(outcomes=outcomes, seconds=seconds, provenance=origin)
