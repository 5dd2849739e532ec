"""What a worker process of this machine does: see :mod:`falign.lab.experiment.local`."""

import os
import threading
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pickle import PicklingError

import torch

from falign.lab.experiment.execution import Answer, compute


def work(pipe: Connection, threads: int) -> None:
    """Say that it has started, then answer one block after the other, until the pipe's other end is closed.

    Args:
        pipe: Brings ``(run, tasks, setting)``; takes None once, and an ``Answer`` for each block.
        threads: How many threads torch may have.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    pipe.send(None)  # it has started
    while True:
        try:
            run, tasks, setting = pipe.recv()
        except EOFError:
            return
        except Exception as error:  # a function that cannot be imported here, say
            pipe.send(Answer(error=f"the worker cannot read the block: {type(error).__name__}: {error}"))
            continue
        answer = compute(run, tasks, setting)
        try:
            pipe.send(answer)
        except (PicklingError, TypeError, AttributeError, ValueError) as error:  # values that cannot be pickled
            pipe.send(Answer(error=f"the outcomes cannot be sent back: {type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """End at once when the process that started this one has died, be it in the midst of a block."""
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
