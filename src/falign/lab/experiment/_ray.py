"""An executor on many machines: blocks of runs as tasks of a Ray cluster."""

import importlib.metadata
import logging
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import monotonic
from types import TracebackType
from typing import Any

import torch

import falign
from falign.lab._files import RunError
from falign.lab._options import check_ray_address, check_ray_share, host_and_port
from falign.lab.config import ConfigError
from falign.lab.experiment._execution import Block, BlockResult, FinishedBlock, compute, memory_needed
from falign.lab.experiment._specification import Setting

# What a block takes of a node of a Ray cluster, and how many blocks a node has room for.

Node = Mapping[str, Any]
"""An entry of ``ray.nodes()``."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Cores and GPUs that a block takes.

    Ray gives out several whole ones, or a part of one in steps of 1/10000.

    Args:
        cpus: Cores.
        gpus: GPUs; 0.25 puts four blocks on each.

    Raises:
        ConfigError: Ray cannot give that out.
    """

    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        check_ray_share("--cpus-per-run", self.cpus)
        if self.gpus:
            check_ray_share("--gpus-per-run", self.gpus)

    @property
    def threads(self) -> int:
        """Threads of a block: one a core, and one for a part of a core."""
        return max(1, int(self.cpus))

    def room(self, node: Node) -> int:
        """How many blocks a node can have at work at once; no block gets its GPU in two parts."""
        by_cores = _whole(_has(node, "CPU") / self.cpus)
        if self.gpus == 0:
            return by_cores
        gpus = _has(node, "GPU")
        return min(by_cores, _whole(gpus / self.gpus) if self.gpus >= 1 else int(gpus) * _whole(1 / self.gpus))

    def memory(self, block: Block, nodes: Sequence[Node]) -> int | None:
        """Bytes to be set aside for a block, so that a node takes no more blocks than fit into its memory.

        Never more than the largest node has: such a block would wait for ever.

        Returns:
            The bytes; None if the block does not say, or needs them on a GPU.
        """
        if block.experiment.memory is None or self.gpus:
            return None
        largest = max((_has(node, "memory") for node in nodes), default=0.0)
        return min(memory_needed(block), int(largest)) or None

    def refusal(self, nodes: Sequence[Node]) -> str:
        """That no node has room for a block, and what nodes there are."""
        listed = "; ".join(
            f"{node['NodeManagerAddress']} has {_has(node, 'CPU'):g} and {_has(node, 'GPU'):g}" for node in nodes
        )
        return (
            f"no node of the Ray cluster has the cores and GPUs for one run, --cpus-per-run {self.cpus:g} and "
            f"--gpus-per-run {self.gpus:g} ({listed or 'no node is left'})"
        )


def _has(node: Node, kind: str) -> float:
    return node["Resources"].get(kind, 0.0)


def _whole(number: float) -> int:
    """Rounded down, but not for a rounding error: 0.7 / 0.1 is 7."""
    return int(number + 1e-6)


# Joining a Ray cluster, or starting one on this machine: all that can be wrong with an address is said at once.

# Ray takes half a second to import, and is an extra: it is imported where it is used.

_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what newer versions do anyway; others warn of the change
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # a node's last words, dozens of lines, would go to this process's output
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under "uv run" Ray would upload the working folder
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Ray's documented switches."""
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""The switch by which Ray keeps to the loopback address, for a cluster of this machine alone. It is named after the
systems where that is so from the start; without it Ray puts the machine's own address in the place of a loopback one,
and everything listens on all of them."""
_LOOPBACK = "127.0.0.1"
_OBJECTS = 2**28
"""Bytes of shared memory of a local cluster: records are small, and Ray would take 30 % of the memory."""
_REACH, _JOIN, _ASK = 5.0, 20.0, 60.0
"""Seconds to wait for an result of the address, for joining, and for the nodes to tell their version."""

# Where nothing that Ray knows answers, ray.init tries for minutes and may end the process: another one tries first.
_PROBE = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
except BaseException as error:
    print(f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    import os
    os._exit(1)
ray.shutdown()
"""


def set_ray_switches(*, alone: bool = False) -> None:
    """Set Ray's switches, where the user has not; Ray reads them when it is imported.

    Args:
        alone: Whether the cluster is to be of this machine alone.
    """
    for name, value in {**_ENVIRONMENT, **(_ALONE if alone else {})}.items():
        os.environ.setdefault(name, value)


def connect(address: str) -> None:
    """Join a cluster, or start one on this machine.

    Args:
        address: "local" starts one of all cores and GPUs of this machine, which only this machine can reach; "auto"
            joins the one that this machine belongs to, or that ``RAY_ADDRESS`` names.

    Raises:
        ConfigError: There is no cluster at the address, or it does not take this process.
    """
    set_ray_switches(alone=address == "local")
    if address != "local":
        _probe(address)
    import ray

    if ray.is_initialized():
        raise ConfigError("this process has joined a Ray cluster already: call ray.shutdown() first")
    options = {"include_dashboard": False, "object_store_memory": _OBJECTS, "_node_ip_address": _LOOPBACK}
    try:
        with _signals_kept():
            ray.init(
                address, log_to_driver=False, logging_level=logging.ERROR, **(options if address == "local" else {})
            )
        if address == "local":
            _check_alone(ray.nodes())
    except ConfigError:
        ray.shutdown()
        raise
    except Exception as error:
        ray.shutdown()
        raise ConfigError(f"--ray is {address}, but Ray fails there: {type(error).__name__}: {error}") from error


def _check_alone(nodes: Sequence[Node]) -> None:
    """Refuse a cluster of this machine alone that others can reach."""
    heard = [node["NodeManagerAddress"] for node in nodes]
    if set(heard) != {_LOOPBACK}:
        raise ConfigError(
            f"--ray is local, but Ray listens on {', '.join(heard)}, where other machines can reach it: unset "
            f"{next(iter(_ALONE))}, and do not import ray before falign"
        )


def check_versions(nodes: Sequence[Node]) -> None:
    """Refuse nodes that have another falign, or none.

    Args:
        nodes: Entries of ``ray.nodes()``, of nodes that are alive.

    Raises:
        ConfigError: Some have: which, and what to install.
    """
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # A function of the standard library can be called where falign is missing.
    ask = ray.remote(num_cpus=0, max_retries=0)(importlib.metadata.version)
    answers = {
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote("falign"): (
            node["NodeManagerAddress"]
        )
        for node in nodes
    }
    here, others = _installed(), {}
    ready, _ = ray.wait(list(answers), num_returns=len(answers), timeout=_ASK)
    for result in ready:
        try:
            there = ray.get(result)
        except importlib.metadata.PackageNotFoundError:
            there = "none"
        except ray.exceptions.RayError:  # the node has died since: it is found to be gone later on
            continue
        if there != here:
            others[answers[result]] = there
    if others:
        listed = ", ".join(f"{node} has {version}" for node, version in sorted(others.items()))
        raise ConfigError(
            f"falign is {here} here, but of the cluster's nodes {listed}: install the same version on all of them, "
            f'pip install "falign[ray]=={here}"'
        )


def _installed() -> str:
    return importlib.metadata.version("falign")


def _probe(address: str) -> None:
    """Have another process join first, within a time limit."""
    if address != "auto":
        try:
            socket.create_connection(host_and_port(address), timeout=_REACH).close()
        except OSError as error:
            raise ConfigError(
                f"--ray is {address}, where nothing answers ({error.strerror or error}): start a cluster there by "
                "ray start --head, or compute on this machine by --ray local"
            ) from None
    try:
        result = subprocess.run(
            [sys.executable, "-c", _PROBE, address], capture_output=True, text=True, timeout=_JOIN, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"--ray is {address}, and within {_JOIN:.0f} s no Ray cluster there took this process: HOST:PORT needs "
            "this machine to be a node of the cluster (ray start --address=HOST:PORT), ray://HOST:10001 does not, and "
            "a cluster that has a token needs the same one here"
        ) from None
    if result.returncode:
        said = result.stdout.strip() or result.stderr.strip().rpartition("\n")[2] or f"code {result.returncode}"
        raise ConfigError(f"--ray is {address}, and Ray cannot join a cluster there: {' '.join(said.split())}")


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts a handler of its own on SIGTERM; the one of the laboratory, which keeps what is done, stays."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


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
        self._share = Resources(cpus=cpus_per_run, gpus=gpus_per_run)
        if gpus_per_run == 0 and torch.device(setting.device).type == "cuda":
            raise ConfigError(f"--device is {setting.device}, but Ray is asked for no GPU: add --gpus-per-run 1")
        check_ray_address(address)
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
        # As bytes, so that what a worker cannot import is an result like any other.
        payload = pickle.dumps((block.experiment.run, block.tasks, self._setting))
        memory = self._share.memory(block, self._nodes)
        with _cluster():
            task = self._work.options(memory=memory).remote(payload, self._share.threads)
        self._at_work[task] = block

    def wait(self, timeout: float | None = None) -> list[FinishedBlock]:
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
        finished: list[FinishedBlock] = []
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
        connect(self._address)
        import ray  # not before: Ray reads its switches when it is imported

        try:
            self._work = ray.remote(num_cpus=self._share.cpus, num_gpus=self._share.gpus, max_retries=0)(_work)
            if self.slots == 0:
                raise ConfigError(f"{self._share.refusal(self._nodes)}: ask for less, or start such a node")
            check_versions([node for node in self._nodes if self._share.room(node)])
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

    def _collect(self, task: Any) -> FinishedBlock | None:
        """The result of a task that has ended; None if its block was given to another node."""
        import ray.exceptions

        block = self._at_work.pop(task)
        try:
            result: BlockResult = ray.get(task)
        except (ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError):
            self._nodes_died[block] += 1
            if self._nodes_died[block] < NODES:
                self.submit(block)
                return None
            result = BlockResult(error=f"{NODES} nodes of the cluster died of it, or with it", worker_died=True)
        except ray.exceptions.RayTaskError as error:  # raised around the experiment, not by it
            cause = getattr(error, "cause", None) or error
            result = BlockResult(error=f"the worker failed: {type(cause).__name__}: {_line(cause)}")
        except ray.exceptions.RayError as error:
            result = BlockResult(
                error=f"its worker process died, perhaps for want of memory ({_line(error)})", worker_died=True
            )
        there = result.provenance.get("falign", falign.__version__)
        if there != falign.__version__:
            raise ClusterError(
                f"a node that joined the Ray cluster has falign {there}, but here it is {falign.__version__}: install "
                "the same version on it, and call again"
            )
        self._nodes_died.pop(block, None)
        return FinishedBlock(block=block, result=result)

    def _look(self) -> None:
        """See which nodes are alive."""
        import ray

        with _cluster():
            self._nodes = [node for node in ray.nodes() if node["Alive"]]
        self._looked = monotonic()
        if any(self._share.room(node) for node in self._nodes):
            self._roomy = self._looked


def _work(payload: bytes, threads: int) -> BlockResult:
    """What a task does."""
    torch.set_num_threads(threads)
    try:
        run, tasks, setting = pickle.loads(payload)
    except Exception as error:  # a module that is not installed on the node, say
        return BlockResult(error=f"the worker cannot read the block: {type(error).__name__}: {error}")
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
