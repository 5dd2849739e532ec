"""An executor on many machines: blocks of runs as tasks of a Ray cluster."""

import math
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from types import TracebackType
from typing import Any

import torch

import falign
from falign.lab.config import ConfigError
from falign.lab.experiment import connection
from falign.lab.experiment.execution import Answer, Block, Finished, compute
from falign.lab.experiment.share import Node, Share
from falign.lab.experiment.specification import Setting
from falign.lab.writing import RunError

NODES = 4
"""How many nodes may die under a block before it is reported as lost."""
_LOOK, _PATIENCE = 2.0, 60.0
"""Seconds between two looks at which nodes there are, and without one for a block until that is an error."""


class ClusterError(RunError):
    """A cluster that was lost, or became useless, while runs went on; what was finished is kept."""

    code = 1


class RayExecutor:
    """Computes blocks as tasks of a Ray cluster, as many at once as its nodes have room for.

    A block whose worker process died is reported as lost, as by every executor. A block whose whole node died is
    hardly to blame, so that it is given to another node first. Ray itself tries nothing again: it would try a
    block that is too large for the memory for ever.

    Args:
        address: "local", "auto", "HOST:PORT" or "ray://HOST:PORT".
        setting: Device and data; with a share of a GPU the device is "cuda", the one that Ray assigns. The
            data's folder is looked for on the node.
        cpus_per_run: Cores that a block takes, which is its number of threads as well.
        gpus_per_run: GPUs that a block takes; 0.25 puts four blocks on each, in the memory of one.

    Raises:
        ConfigError: An argument that cannot be meant, or Ray is not installed.
    """

    def __init__(self, address: str, setting: Setting, *, cpus_per_run: float = 1.0, gpus_per_run: float = 0.0) -> None:
        self._share = Share(cpus=cpus_per_run, gpus=gpus_per_run)
        if gpus_per_run == 0 and torch.device(setting.device).type == "cuda":
            raise ConfigError(f"--device is {setting.device}, but Ray is asked for no GPU: add --gpus-per-run 1")
        connection.check_address(address)
        self._address = address
        self._setting = replace(
            setting,
            device="cuda" if gpus_per_run else setting.device,
            data=None if setting.data is None else setting.data.absolute(),
        )
        self._work: Any = None
        self._at_work: dict[Any, Block] = {}
        self._nodes: list[Node] = []
        self._nodes_died: Counter[Block] = Counter()
        self._looked = self._roomy = -math.inf

    @property
    def slots(self) -> int:
        """How many blocks the living nodes have room for; 1 as long as no cluster is joined."""
        if self._work is None:
            return 1
        if monotonic() - self._looked > _LOOK:
            self._look()
        return sum(self._share.room(node) for node in self._nodes)

    def submit(self, block: Block) -> None:
        """Give a block to the cluster."""
        # As bytes, so that what a worker cannot import is an answer like any other.
        payload = pickle.dumps((block.experiment.run, block.tasks, self._setting))
        memory = self._share.memory(block, self._nodes)
        with _cluster():
            task = self._work.options(memory=memory).remote(payload, self._share.threads)
        self._at_work[task] = block

    def wait(self, timeout: float | None = None) -> list[Finished]:
        """Wait until a block is finished, or its worker has died.

        Args:
            timeout: Seconds after which to return in any case; None waits as long as it takes.

        Returns:
            All blocks that have finished since the last call, each once.

        Raises:
            ClusterError: The cluster is gone, has had no node for a block for a minute, or a node has joined that
                has another falign.
        """
        import ray

        end = math.inf if timeout is None else monotonic() + timeout
        finished: list[Finished] = []
        while self._at_work and not finished:
            with _cluster():
                patience = min(_LOOK, max(0.0, end - monotonic()))
                ready, _ = ray.wait(list(self._at_work), num_returns=1, timeout=patience)
                if ready:
                    ready, _ = ray.wait(list(self._at_work), num_returns=len(self._at_work), timeout=0)
            finished = [each for task in ready if (each := self._collect(task)) is not None]
            if not finished and self.slots == 0 and monotonic() - self._roomy > _PATIENCE:
                raise ClusterError(f"{self._share.refusal(self._nodes)}: start nodes again, and call again")
            if monotonic() >= end:
                break
        return finished

    def __enter__(self) -> "RayExecutor":
        connection.connect(self._address)
        import ray  # not before: Ray reads its switches when it is imported

        try:
            self._work = ray.remote(num_cpus=self._share.cpus, num_gpus=self._share.gpus, max_retries=0)(_work)
            if self.slots == 0:
                raise ConfigError(f"{self._share.refusal(self._nodes)}: ask for less, or start such a node")
            connection.check_versions([node for node in self._nodes if self._share.room(node)])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give up what is at work and leave the cluster; one that was started here ends."""
        import ray.exceptions

        for task in self._at_work:
            try:
                ray.cancel(task, force=True)
            except (ray.exceptions.RayError, ConnectionError):  # the cluster is gone, and its tasks with it
                break
        self._at_work.clear()
        self._work = None
        ray.shutdown()

    def _collect(self, task: Any) -> Finished | None:
        """The answer of a task that has ended; None if its block was given to another node."""
        import ray.exceptions

        block = self._at_work.pop(task)
        try:
            answer: Answer = ray.get(task)
        except (ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError):
            self._nodes_died[block] += 1
            if self._nodes_died[block] < NODES:
                self.submit(block)
                return None
            answer = Answer(error=f"{NODES} nodes of the cluster died of it, or with it", lost=True)
        except ray.exceptions.RayTaskError as error:  # raised around the experiment, not by it
            cause = getattr(error, "cause", None) or error
            answer = Answer(error=f"the worker failed: {type(cause).__name__}: {_line(cause)}")
        except ray.exceptions.RayError as error:
            answer = Answer(error=f"its worker process died, perhaps for want of memory ({_line(error)})", lost=True)
        there = answer.provenance.get("falign", falign.__version__)
        if there != falign.__version__:
            raise ClusterError(
                f"a node that joined the Ray cluster has falign {there}, but here it is {falign.__version__}: install "
                "the same version on it, and call again"
            )
        self._nodes_died.pop(block, None)
        return Finished(block=block, answer=answer)

    def _look(self) -> None:
        """See which nodes are alive."""
        import ray

        with _cluster():
            self._nodes = [node for node in ray.nodes() if node["Alive"]]
        self._looked = monotonic()
        if any(self._share.room(node) for node in self._nodes):
            self._roomy = self._looked


def _work(payload: bytes, threads: int) -> Answer:
    """What a task does."""
    torch.set_num_threads(threads)
    try:
        run, tasks, setting = pickle.loads(payload)
    except Exception as error:  # a module that is not installed on the node, say
        return Answer(error=f"the worker cannot read the block: {type(error).__name__}: {error}")
    return compute(run, tasks, setting)


@contextmanager
def _cluster() -> Iterator[None]:
    """What Ray raises in this context means that the cluster is gone."""
    import ray.exceptions

    try:
        yield
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise ClusterError(f"the Ray cluster is gone ({_line(error)}): start it again, and call again") from None


def _line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return str(error).strip().partition("\n")[0]
