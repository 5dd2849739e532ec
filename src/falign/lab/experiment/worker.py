"""What a worker process of this machine does: see :mod:`falign.lab.experiment.local`."""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from time import monotonic

import torch

from falign.lab.experiment.execution import Answer, compute

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
