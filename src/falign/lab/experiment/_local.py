"""Executors of this machine: this process, or worker processes.

Worker processes are not those of ``concurrent.futures.ProcessPoolExecutor``, as four promises need more than it gives:
a worker that dies takes one block with it, of which the exit code or the signal is told (a broken pool gives up all its
tasks and keeps the exit codes to itself); a signal ends everything at once, in the midst of a block (a pool waits for
its tasks); workers end with the process that started them, even if that is killed; and they report how far a block is.
"""

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
from falign.lab.experiment._execution import Block, BlockResult, FinishedBlock, compute
from falign.lab.experiment._specification import Setting

# A worker process: it answers block after block, and ends with the process that started it.

_HELD_BACK = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals that are blocked while a worker is started, by the process that starts it."""
_PAUSE = 0.5
"""Seconds between two reports of the share of a block that is over."""


def throttled(report: Callable[[float], None]) -> Callable[[float], None]:
    """Wrap a function so that it is called twice a second at most."""
    last = monotonic()

    def report_sometimes(share: float) -> None:
        nonlocal last
        if monotonic() - last >= _PAUSE:
            last = monotonic()
            report(float(share))

    return report_sometimes


def worker_main(pipe: Connection, threads: int) -> None:
    """Compute one block after the other, until the pipe's other end is closed.

    Args:
        pipe: Brings ``(run, tasks, setting)``. Takes None once the worker has started; then for each block floats, the
            share of it that is over, and at its end a ``BlockResult``.
        threads: Number of threads that torch may use.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if os.name == "posix":  # Ctrl-C, which a terminal sends to all, is answered by the parent: it ends this process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {getattr(signal, name) for name in _HELD_BACK} - {signal.SIGINT})
    torch.set_num_threads(threads)
    pipe.send(None)
    report = throttled(pipe.send)
    while True:
        try:
            run, tasks, setting = pipe.recv()
        except EOFError:
            return
        except Exception as error:  # a function that cannot be imported here, say
            pipe.send(BlockResult(error=f"the worker cannot read the block: {type(error).__name__}: {error}"))
            continue
        pipe.send(compute(run, tasks, replace(setting, report=report)))


def _end_with_parent() -> None:
    """End this process at once when its parent has died, even in the midst of a block."""
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


_NAME = "falign worker"
_GRACE = 5.0
"""Seconds for a worker whose pipe has ended to end as well, so that its own exit code is seen."""


class InThisProcess:
    """Computes one block after the other in this process.

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

    def wait(self, timeout: float | None = None) -> list[FinishedBlock]:
        """Compute the next block, however long it takes; none if there is none."""
        if not self._blocks:
            return []
        block = self._blocks.popleft()

        def report(share: float) -> None:
            with suppress(Exception):  # a display that fails is no fault of the run
                block.on_progress(share)

        setting = replace(self._setting, report=throttled(report))
        return [FinishedBlock(block=block, result=compute(block.experiment.run, block.tasks, setting))]

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is left to end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Worker:
    """A worker process with the pipe to it."""

    process: SpawnProcess
    pipe: Connection


class Workers:
    """Computes blocks in worker processes, which are started as they are needed.

    Each worker has a pipe of its own, so that when one dies it is known which block it had, and the other workers go
    on.

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
        self._refused: list[FinishedBlock] = []

    def submit(self, block: Block) -> None:
        """Take a block; it waits until a worker is idle."""
        self._waiting.append(block)
        self._distribute()

    def wait(self, timeout: float | None = None) -> list[FinishedBlock]:
        """Wait until a worker has finished its block, has died or has reported its progress."""
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
                result = BlockResult(error=f"the runs cannot be sent to a worker: {type(error).__name__}: {error}")
                self._refused.append(FinishedBlock(block=block, result=result))
                continue
            except BrokenPipeError:
                pass  # it died while idle or starting: the next wait finds that its pipe has ended
            self._busy[worker] = block

    def _collect(self, worker: _Worker) -> FinishedBlock | None:
        """Read a worker's pipe: its finished block, or None if it has started or has reported its progress.

        If the pipe has ended, the worker has died. One that dies before it has started would do so with every block,
        so that is an error of the command and no verdict on the block.

        Raises:
            RunError: The worker could not start.
        """
        try:
            message: BlockResult | float | None = worker.pipe.recv()
            if message is None:
                self._started.add(worker)
                return None
            if isinstance(message, (int, float)):
                self._busy[worker].on_progress(message)
                return None
            block = self._busy.pop(worker)
        except (EOFError, OSError, UnpicklingError):
            block = self._busy.pop(worker)
            worker.process.join(_GRACE)
            worker.process.kill()  # in case it has closed its pipe and lives on
            worker.process.join()
            worker.pipe.close()
            if worker not in self._started and (worker.process.exitcode or 0) > 0:
                code = worker.process.exitcode
                raise RunError(f"a worker process cannot start (exit code {code}): use --workers 1") from None
            return FinishedBlock(
                block=block, result=BlockResult(error=_death(worker.process.exitcode), worker_died=True)
            )
        self._idle.append(worker)
        return FinishedBlock(block=block, result=message)

    def _start(self) -> _Worker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        threads = max(1, cores() // self.slots)
        process = context.Process(target=worker_main, args=(theirs, threads), name=_NAME, daemon=True)
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


def local_executor(workers: int, setting: Setting) -> InThisProcess | Workers:
    """Make the executor of this machine for a number of workers; one worker needs no process of its own."""
    return InThisProcess(setting) if workers == 1 else Workers(workers, setting)


@contextmanager
def _signals_held_back():
    """Block signals while a process is started, which inherits the blocked ones.

    The worker lets all but SIGINT through again: Ctrl-C is answered by the process that started it. And no signal can
    interrupt a start, which would leave half a process behind.
    """
    if os.name != "posix":
        yield
        return
    resource_tracker.ensure_running()  # a start would do it otherwise, and unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, name) for name in _HELD_BACK})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _death(code: int | None) -> str:
    """Message about how a worker died."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"its worker process was killed by {name}{hint}"
    return f"its worker process ended with exit code {code}"
