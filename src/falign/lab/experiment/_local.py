"""Executors of this machine: this process, or worker processes."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import current_process, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pickle import PicklingError, UnpicklingError
from time import monotonic
from types import TracebackType

import torch

from falign.lab._files import RunError
from falign.lab._memory import cores
from falign.lab.experiment._execution import Answer, Block, Finished, compute
from falign.lab.experiment._specification import Setting

# What a worker process of this machine does: see :mod:`falign.lab.experiment._local`.

HELD_BACK = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals that are blocked while a worker is started, by the process that starts it."""
_PAUSE = 0.5
"""Seconds between two reports of how far a block is."""


def seldom(report: Callable[[float], None]) -> Callable[[float], None]:
    """The same, but called twice a second at most."""
    last = monotonic()

    def told(share: float) -> None:
        nonlocal last
        if monotonic() - last >= _PAUSE:
            last = monotonic()
            report(float(share))

    return told


def work(pipe: Connection, threads: int) -> None:
    """Say that it has started, then answer one block after the other, until the pipe's other end is closed.

    Args:
        pipe: Brings ``(run, tasks, setting)``; takes None once, then for each block now and then the share of it that
            is over, and an ``Answer``.
        threads: How many threads torch may have.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if os.name == "posix":  # Ctrl-C is for the process that started this one, and ends it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {getattr(signal, name) for name in HELD_BACK} - {signal.SIGINT})
    torch.set_num_threads(threads)
    pipe.send(None)  # it has started
    report = seldom(pipe.send)
    while True:
        try:
            run, tasks, setting = pipe.recv()
        except EOFError:
            return
        except Exception as error:  # a function that cannot be imported here, say
            pipe.send(Answer(error=f"the worker cannot read the block: {type(error).__name__}: {error}"))
            continue
        pipe.send(compute(run, tasks, replace(setting, report=report)))


def _end_with_parent() -> None:
    """End at once when the process that started this one has died, be it in the midst of a block."""
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


_NAME = "falign worker"
_GRACE = 5.0
"""Seconds that a worker may take to end, so that its own exit code is seen."""


class InThisProcess:
    """Computes one block after the other, here.

    Args:
        setting: Device and data.
    """

    slots = 1

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._blocks: deque[Block] = deque()

    def submit(self, block: Block) -> None:
        """Take a block."""
        self._blocks.append(block)

    def wait(self, timeout: float | None = None) -> list[Finished]:
        """Compute the next block, however long it takes; none if there is none."""
        if not self._blocks:
            return []
        block = self._blocks.popleft()

        def report(share: float) -> None:
            with suppress(Exception):  # that it cannot be shown is no fault of the run
                block.watch(share)

        setting = replace(self._setting, report=seldom(report))
        return [Finished(block=block, answer=compute(block.experiment.run, block.tasks, setting))]

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is left to end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Worker:
    """A worker process and the pipe to it."""

    process: SpawnProcess
    pipe: Connection


class Workers:
    """Computes blocks in worker processes, which are started as they are needed.

    Each worker has a pipe of its own, so that when one dies it is known which block it had, and the other
    workers and their blocks are not touched. (``ProcessPoolExecutor`` gives up all blocks when one worker dies,
    and leaves its workers behind when its own process is killed.)

    Args:
        count: Number of workers; the cores of this machine are shared among them.
        setting: Device and data.
    """

    def __init__(self, count: int, setting: Setting) -> None:
        if current_process().name == _NAME:
            raise RuntimeError(
                'a worker would start workers: put what your script does under if __name__ == "__main__"'
            )
        self.slots = count
        self._setting = setting
        self._idle: list[_Worker] = []
        self._waiting: deque[Block] = deque()
        self._busy: dict[_Worker, Block] = {}
        self._started: set[_Worker] = set()
        self._refused: list[Finished] = []

    def submit(self, block: Block) -> None:
        """Take a block; if all workers are busy it waits for one."""
        self._waiting.append(block)
        self._distribute()

    def wait(self, timeout: float | None = None) -> list[Finished]:
        """Wait until a worker has answered or died, or has told how far it is."""
        if self._refused or not self._busy:
            refused, self._refused = self._refused, []
            return refused
        ready = wait([worker.pipe for worker in self._busy], timeout)
        collected = [self._collect(worker) for worker in list(self._busy) if worker.pipe in ready]
        finished = [each for each in collected if each is not None]
        self._distribute()
        return finished

    def _distribute(self) -> None:
        while self._waiting and len(self._busy) < self.slots:
            worker = self._idle.pop() if self._idle else self._start()
            block = self._waiting.popleft()
            try:
                worker.pipe.send((block.experiment.run, block.tasks, self._setting))
            except (PicklingError, AttributeError, TypeError) as error:
                self._idle.append(worker)
                answer = Answer(error=f"the runs cannot be sent to a worker: {type(error).__name__}: {error}")
                self._refused.append(Finished(block=block, answer=answer))
                continue
            except BrokenPipeError:
                pass  # it died while idle or starting: the next wait finds that its pipe has ended
            self._busy[worker] = block

    def _collect(self, worker: _Worker) -> Finished | None:
        """The answer of a worker whose pipe is ready; None if all it says is that it has started, or how far it is.

        If the pipe has ended, the worker has died. One that fails before it has started would do so with every
        block, so that is an error of its own.
        """
        try:
            answer: Answer | float | None = worker.pipe.recv()
            if answer is None:
                self._started.add(worker)
                return None
            if isinstance(answer, (int, float)):
                self._busy[worker].watch(answer)
                return None
            block = self._busy.pop(worker)
        except (EOFError, OSError, UnpicklingError):
            block = self._busy.pop(worker)
            worker.process.join(_GRACE)
            worker.process.kill()  # nothing, unless it has closed its pipe and lives on
            worker.process.join()
            worker.pipe.close()
            if worker not in self._started and (worker.process.exitcode or 0) > 0:
                code = worker.process.exitcode
                raise RunError(f"a worker process cannot start (exit code {code}): use --workers 1") from None
            return Finished(block=block, answer=Answer(error=_death(worker.process.exitcode), lost=True))
        self._idle.append(worker)
        return Finished(block=block, answer=answer)

    def _start(self) -> _Worker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        threads = max(1, cores() // self.slots)
        process = context.Process(target=work, args=(theirs, threads), name=_NAME, daemon=True)
        with _signals_held_back():
            process.start()
        theirs.close()
        return _Worker(process=process, pipe=ours)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        workers = [*self._idle, *self._busy]
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.pipe.close()


def local(workers: int, setting: Setting) -> InThisProcess | Workers:
    """The executor of this machine for a number of workers; one needs no process of its own."""
    return InThisProcess(setting) if workers == 1 else Workers(workers, setting)


@contextmanager
def _signals_held_back():
    """Processes started in this context never see Ctrl-C: the one that started them ends them.

    Nor does a signal come in the midst of a start, which would leave half a process behind.
    """
    if os.name != "posix":
        yield
        return
    resource_tracker.ensure_running()  # or the start would do so, and let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, name) for name in HELD_BACK})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _death(code: int | None) -> str:
    """How a worker died."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"its worker process was killed by {name}{hint}"
    return f"its worker process ended with exit code {code}"
