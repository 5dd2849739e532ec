"""The loop that brings all runs into a store: lease a block of missing runs, have it computed, keep its results.

Several processes may run this loop on one store. Which runs are theirs is settled by leases, see ``_leases.py``; that a
run may have been finished by another process since is found by looking into the store after the lease.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import sleep

import polars as pl

from falign.lab._signals import ImmediateStop
from falign.lab.experiment._execution import Block, BlockResult, Executor, FinishedBlock, make_blocks, memory_refusal
from falign.lab.experiment._leases import RunLeases, leased_runs
from falign.lab.experiment._progress import ProgressDisplay, RunCounts
from falign.lab.experiment._run_file import RETRIED, StoredRun
from falign.lab.experiment._specification import Task
from falign.lab.experiment._store import Store

_POLL = 0.5
"""Seconds between two looks at what the executor and other processes have done."""
_MAX_SECONDS = 60.0
"""Time that a block should take at most: so much is lost when the process is killed. The first blocks of an experiment,
of whose runs nothing was measured yet, may take longer."""


@dataclass(kw_only=True, eq=False)
class Schedule:
    """Missing runs of some experiments, on one store and by one executor.

    Args:
        store: Where runs are kept.
        leases: The leases of this process.
        executor: Computes blocks.
        memory: Bytes that a block may need.
        counts: {name of the experiment: counts of its runs}.
        failed_before: {key: stored run} of those that had failed earlier: they are tried once more.
        progress: Shows the counts.
        stop: Holds signals back while runs are written.
    """

    store: Store
    leases: RunLeases
    executor: Executor
    memory: int
    counts: dict[str, RunCounts]
    failed_before: dict[str, StoredRun]
    progress: ProgressDisplay
    stop: ImmediateStop

    def __post_init__(self) -> None:
        self._pending = deque[Block]()
        self._running = 0  # blocks that the executor has
        self._elsewhere: dict[str, Task] = {}  # runs that other processes have leased
        for counts in self.counts.values():
            self._enqueue(counts, tuple(counts.missing.values()))

    def run(self) -> None:
        """Go on until every run is in the store, those that other processes have leased included."""
        while self._pending or self._running or self._elsewhere:
            self._fill()
            self.progress.update()
            if self._running:
                with self.stop.immediate():
                    finished = self.executor.wait(_POLL)
                self._running -= len(finished)
                # The order of these three: the next blocks are cut by the times just measured, and are submitted before
                # anything is written, so that the workers compute while this process writes.
                for each in finished:
                    self._measure(each)
                self._fill()
                for each in finished:
                    self._handle(each)
            elif self._elsewhere and not self._pending:
                with self.stop.immediate():
                    sleep(_POLL)
            if self._elsewhere and not self._pending:
                self._look_elsewhere()
        self.progress.update()

    def _fill(self) -> None:
        while self._pending and self._running < max(1, self.executor.slots):
            self._start(self._pending.popleft())

    def _enqueue(self, counts: RunCounts, tasks: Sequence[Task]) -> None:
        self._pending.extend(make_blocks(counts.experiment, tasks, memory=self.memory, slots=self.executor.slots))

    def _start(self, block: Block) -> None:
        """Submit a block, without the runs that other processes have leased or finished by now."""
        counts = self.counts[block.experiment.name]
        if len(block.tasks) > 1 and (counts.seconds(block) or 0.0) > _MAX_SECONDS:
            self._pending.extendleft(reversed(block.split()))
            return
        granted = self.leases.acquire([task.key for task in block.tasks])
        for task in block.tasks:
            if task.key not in granted:
                self._elsewhere[task.key] = task
                counts.elsewhere += 1
        ours = [task for task in block.tasks if task.key in granted]
        # Whoever held the lease before may have finished the run since this process read the store.
        finished = {task.key for task in ours if self._is_stored(counts, task)}
        if finished:
            self.leases.release(finished)
        tasks = tuple(task for task in ours if task.key not in finished)
        if not tasks:
            return
        block = replace(block, tasks=tasks, on_progress=lambda share: self._report(counts, block, share))
        too_large = memory_refusal(block, self.memory)
        if too_large is not None:
            self._fail(block, BlockResult(error=too_large))
            return
        self.progress.started(counts.experiment.name, len(block.tasks))
        counts.start(block)
        self.executor.submit(block)
        self._running += 1

    def _report(self, counts: RunCounts, block: Block, share: float) -> None:
        counts.report(block, share)
        self.progress.update()

    def _measure(self, finished: FinishedBlock) -> None:
        """Learn from a block how long runs take."""
        block, result = finished.block, finished.result
        self.counts[block.experiment.name].end(block, None if result.run_results is None else result.seconds)

    def _handle(self, finished: FinishedBlock) -> None:
        """Store the results of a block, or try it again, whole or in halves, or give it up."""
        block, result = finished.block, finished.result
        if result.run_results is not None:
            self._store_results(block, result)
        elif result.worker_died and block.worker_deaths == 0:  # by chance, perhaps: once more before it is halved
            self._pending.appendleft(replace(block, worker_deaths=1))
        elif len(block.tasks) > 1 and not result.data_missing:  # the halves show which runs are at fault
            self._pending.extendleft(reversed(block.split()))
        else:
            self._fail(block, result)

    def _store_results(self, block: Block, result: BlockResult) -> None:
        seconds = result.seconds / len(block.tasks)
        for task, run in zip(block.tasks, result.run_results or (), strict=True):
            details = {"message": run.message, "seconds": seconds, "provenance": result.provenance}
            self._put(task, StoredRun.of(task, run.status, **details), run.records)
        self.leases.release([task.key for task in block.tasks])

    def _fail(self, block: Block, result: BlockResult) -> None:
        status = "no data" if result.data_missing else "failed"
        details = {"message": result.error, "seconds": result.seconds, "provenance": result.provenance}
        for task in block.tasks:
            self._put(task, StoredRun.of(task, status, **details), pl.DataFrame())
        self.leases.release([task.key for task in block.tasks])

    def _put(self, task: Task, run: StoredRun, records: pl.DataFrame) -> None:
        self.store.put(run, records)
        counts = self.counts[run.experiment]
        counts.add(task, run.status)
        if run.status in RETRIED and counts.status[run.status] == 1:  # the first of its kind: the others say the same
            what = "a run failed" if run.status == "failed" else "no data"
            self.progress.log(f"{run.experiment}: {what}: {run.message}")

    def _is_stored(self, counts: RunCounts, task: Task) -> bool:
        """Look for a run in the store, where it may have failed again meanwhile, and count it if it is there."""
        run = self.store.get(task)
        if run is None or (run.status in RETRIED and run == self.failed_before.get(task.key)):
            return False
        counts.add(task, run.status)
        return True

    def _look_elsewhere(self) -> None:
        """Count the runs that other processes have finished, and take over those of processes that have died."""
        leased = leased_runs(self.store)  # read before the store: what is finished after that is seen next time
        for counts in self.counts.values():
            theirs = [task for task in self._elsewhere.values() if task.experiment == counts.experiment.name]
            abandoned = [task for task in theirs if not self._is_stored(counts, task) and task.key not in leased]
            counts.elsewhere = sum(task.key in counts.missing and task.key in leased for task in theirs)
            for task in theirs:
                if task.key not in leased or task.key not in counts.missing:
                    del self._elsewhere[task.key]
            if abandoned:
                self._enqueue(counts, abandoned)
