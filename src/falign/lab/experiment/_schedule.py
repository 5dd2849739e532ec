"""The loop that brings all runs into the store: takes what is missing, has it computed, keeps what comes back."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import sleep

import polars as pl

from falign.lab._signals import ImmediateStop
from falign.lab.experiment._execution import Answer, Block, Executor, Finished, blocks, refusal
from falign.lab.experiment._leases import Owner, taken
from falign.lab.experiment._progress import Progress, Tally
from falign.lab.experiment._run_file import RETRIED, Entry
from falign.lab.experiment._specification import Task
from falign.lab.experiment._store import Store

_POLL = 0.5
"""Seconds between two looks at what other processes have done."""
_LONGEST = 60.0
"""Seconds that a block should take at most, once it is known how long runs take: so much is lost at the worst. The
first blocks of an experiment, of whose runs nothing is known yet, are not cut, and may take any time."""


@dataclass(kw_only=True, eq=False)
class Schedule:
    """What is left to do, on one store and by one executor.

    Args:
        store: Where runs are kept.
        owner: This process, as an owner of runs.
        executor: Computes blocks.
        memory: Bytes that a block may need.
        tallies: {name of the experiment: its count}.
        before: What was kept of runs that had failed earlier: they are tried once more.
        progress: Shows how it goes.
        stop: Defers signals while runs are written.
    """

    store: Store
    owner: Owner
    executor: Executor
    memory: int
    tallies: dict[str, Tally]
    before: dict[str, Entry]
    progress: Progress
    stop: ImmediateStop

    def __post_init__(self) -> None:
        self._pending = deque[Block]()
        self._at_work = 0
        self._elsewhere: dict[str, Task] = {}
        for tally in self.tallies.values():
            self._cut(tally, tuple(tally.left.values()))

    def run(self) -> None:
        """Go on until every run is there, also those that other processes have taken."""
        while self._pending or self._at_work or self._elsewhere:
            self._fill()
            self.progress.update()
            if self._at_work:
                with self.stop.immediate():
                    finished = self.executor.wait(_POLL)
                self._at_work -= len(finished)
                for each in finished:
                    self._learn(each)
                self._fill()  # so that workers compute while this process writes
                for each in finished:
                    self._end(each)
            elif self._elsewhere and not self._pending:
                with self.stop.immediate():
                    sleep(_POLL)
            if self._elsewhere and not self._pending:
                self._look_elsewhere()
        self.progress.update()

    def _fill(self) -> None:
        while self._pending and self._at_work < max(1, self.executor.slots):
            self._begin(self._pending.popleft())

    def _cut(self, tally: Tally, tasks: Sequence[Task]) -> None:
        self._pending.extend(blocks(tally.experiment, tasks, memory=self.memory, slots=self.executor.slots))

    def _begin(self, block: Block) -> None:
        """Have a block computed, less what others have taken or finished by now."""
        tally = self.tallies[block.experiment.name]
        if len(block.tasks) > 1 and (tally.seconds(block) or 0.0) > _LONGEST:
            self._pending.extendleft(reversed(block.halves()))
            return
        granted = self.owner.take([task.key for task in block.tasks])
        for task in block.tasks:
            if task.key not in granted:
                self._elsewhere[task.key] = task
                tally.elsewhere += 1
        ours = [task for task in block.tasks if task.key in granted]
        finished = {task.key for task in ours if self._settled(tally, task)}
        if finished:
            self.owner.release(finished)
        tasks = tuple(task for task in ours if task.key not in finished)
        if not tasks:
            return
        block = replace(block, tasks=tasks, watch=lambda share: self._seen(tally, block, share))
        too_large = refusal(block, self.memory)
        if too_large is not None:
            self._fail(block, Answer(error=too_large))
            return
        self.progress.begun(tally.experiment.name, len(block.tasks))
        tally.begin(block)
        self.executor.submit(block)
        self._at_work += 1

    def _seen(self, tally: Tally, block: Block, share: float) -> None:
        """Show how far a block is."""
        tally.seen(block, share)
        self.progress.update()

    def _learn(self, finished: Finished) -> None:
        """Learn from a block how long runs take."""
        block, answer = finished.block, finished.answer
        self.tallies[block.experiment.name].end(block, None if answer.outcomes is None else answer.seconds)

    def _end(self, finished: Finished) -> None:
        """Keep what a block left, or try it again, whole or in halves, or give it up."""
        block, answer = finished.block, finished.answer
        if answer.outcomes is not None:
            self._keep(block, answer)
        elif answer.lost and block.deaths == 0:
            self._pending.appendleft(replace(block, deaths=1))
        elif len(block.tasks) > 1 and not answer.absent:
            self._pending.extendleft(reversed(block.halves()))
        else:
            self._fail(block, answer)

    def _keep(self, block: Block, answer: Answer) -> None:
        share = answer.seconds / len(block.tasks)
        for task, left in zip(block.tasks, answer.outcomes or (), strict=True):
            details = {"message": left.message, "seconds": share, "provenance": answer.provenance}
            self._put(Entry.of(task, left.status, **details), left.records, task)
        self.owner.release([task.key for task in block.tasks])

    def _fail(self, block: Block, answer: Answer) -> None:
        for task in block.tasks:
            details = {"message": answer.error, "seconds": answer.seconds, "provenance": answer.provenance}
            self._put(Entry.of(task, "no data" if answer.absent else "failed", **details), pl.DataFrame(), task)
        self.owner.release([task.key for task in block.tasks])

    def _put(self, entry: Entry, records: pl.DataFrame, task: Task) -> None:
        self.store.put(entry, records)
        tally = self.tallies[entry.experiment]
        tally.settle(task, entry.status)
        if entry.status in RETRIED and tally.status[entry.status] == 1:
            what = "a run failed" if entry.status == "failed" else "no data"
            self.progress.say(f"{entry.experiment}: {what}: {entry.message}")

    def _settled(self, tally: Tally, task: Task) -> bool:
        """Whether a run is there by now, be it failed again since this process began; if so it is counted."""
        entry = self.store.entry(task)
        if entry is None or (entry.status in RETRIED and entry == self.before.get(task.key)):
            return False
        tally.settle(task, entry.status)
        return True

    def _look_elsewhere(self) -> None:
        """See which runs of other processes are there by now, and which their dead owners have left behind."""
        claimed = taken(self.store)
        for tally in self.tallies.values():
            theirs = [task for task in self._elsewhere.values() if task.experiment == tally.experiment.name]
            free = [task for task in theirs if not self._settled(tally, task) and task.key not in claimed]
            waiting = [task for task in theirs if task.key in tally.left and task.key in claimed]
            tally.elsewhere = len(waiting)
            for task in theirs:
                if task.key not in claimed or task.key not in tally.left:
                    del self._elsewhere[task.key]
            if free:
                self._cut(tally, free)
