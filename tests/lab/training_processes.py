"""The command in processes of its own: forked from one that has imported everything, so that each starts at once."""

import os
import signal
import sys
from pathlib import Path
from time import monotonic, sleep

from forks import FORKSERVER

PATIENCE = 120


class Worker:
    """``falign`` in a process of its own, which waits before one of its steps, or before it takes its folder.

    Args:
        words: Of the command.
        said: File for what it says on standard error.
        step: Before this step, counted from 1, it waits; 0: before it takes its folder; -1: while the data load.
        ignored: Signals that it ignores from the beginning.
    """

    def __init__(self, *words: str, said: Path, step: int = 3, ignored: tuple[int, ...] = ()) -> None:
        self._said = said
        self._there, self._free = (said.with_name(f"{said.name}-{word}") for word in ("there", "free"))
        self.process = FORKSERVER.Process(target=_work, args=(words, said, step, ignored), daemon=True)
        self.process.start()

    def wait(self) -> None:
        """Until it waits itself."""
        until = monotonic() + PATIENCE
        while not self._there.exists():
            assert monotonic() < until, self.said
            sleep(0.005)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def release(self) -> None:
        """Let it go on."""
        self._free.touch()

    def end(self) -> int | None:
        """Let it go on to its end; its exit code, that of a killed one is negative."""
        self.release()
        self.process.join(PATIENCE)
        code = self.process.exitcode
        self.process.close()
        return code

    @property
    def said(self) -> str:
        return self._said.read_text()


def _work(words: tuple[str, ...], said: Path, step: int, ignored: tuple[int, ...]) -> None:
    import torch

    from falign.cli import main
    from falign.lab import _ending, _train
    from falign.lab._learner import Learner

    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    _ending.draw = lambda *_: None
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # as long as the process
    sys.stderr = said.open("w", buffering=1)
    make, prepare_run = Learner.step, _train.prepare_run

    def wait() -> None:
        said.with_name(f"{said.name}-there").touch()
        while not said.with_name(f"{said.name}-free").exists():
            sleep(0.005)

    def stepping(learner, x, y, done: int):
        if done + 1 == step:
            wait()
        return make(learner, x, y, done)

    def settling(*parts, **options):
        if step == -1:
            wait()
        found = prepare_run(*parts, **options)
        if step == 0:
            wait()
        return found

    Learner.step, _train.prepare_run = stepping, settling
    code = main(list(words))
    sys.stderr.flush()
    sys.exit(code)
