"""Executor on many machines: blocks of runs as tasks of a Ray cluster.

Which node computes which block is left to Ray. What Ray does not do, or not in time, is done here: an address where
nothing answers is refused within seconds, nodes that have another falign or that no block fits on are refused before a
run is given away, and a block whose node died goes to another one.

Ray takes half a second to import and reads its switches when that happens, so it is imported where it is used.
"""

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
from dataclasses import replace
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

Node = Mapping[str, Any]
"""An entry of ``ray.nodes()``."""

# Joining a Ray cluster, or starting one on this machine.

_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default of newer versions; older ones warn of the change
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # a node's last words, dozens of lines, would go to this process's output
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under "uv run" Ray would upload the working folder
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Switches that Ray documents."""
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Switch by which Ray keeps to the loopback address, for a cluster of this machine alone. It is named after the systems
where that is the default; elsewhere Ray would replace a loopback address by the machine's own, and listen on all."""
_LOOPBACK = "127.0.0.1"
_OBJECTS = 2**28
"""Bytes of shared memory of a local cluster: records are small, and by default Ray takes 30 % of the memory."""
_REACH, _JOIN, _ASK = 5.0, 20.0, 60.0
"""Seconds to wait for an answer from the address, for joining, and for the nodes to tell their version."""

# Where no Ray cluster answers, ray.init tries for minutes and may end the process: so another process tries first.
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
        alone: Whether the cluster is one of this machine, which no other may reach.
    """
    for name, value in {**_ENVIRONMENT, **(_ALONE if alone else {})}.items():
        os.environ.setdefault(name, value)


def connect(address: str) -> None:
    """Join a cluster, or start one on this machine.

    Args:
        address: "local" starts one of all cores and GPUs of this machine, which only this machine can reach; "auto"
            joins the one that this machine belongs to, or that ``RAY_ADDRESS`` names.

    Raises:
        ConfigError: There is no cluster at the address, or it does not accept this process.
    """
    set_ray_switches(alone=address == "local")
    if address != "local":
        _probe(address)
    import ray

    if ray.is_initialized():
        raise ConfigError("this process has joined a Ray cluster already: call ray.shutdown() first")
    options = {"include_dashboard": False, "object_store_memory": _OBJECTS, "_node_ip_address": _LOOPBACK}
    try:
        with _signal_handler_kept():
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
    addresses = [node["NodeManagerAddress"] for node in nodes]
    if set(addresses) != {_LOOPBACK}:
        raise ConfigError(
            f"--ray is local, but Ray listens on {', '.join(addresses)}, where other machines can reach it: unset "
            f"{next(iter(_ALONE))}, and do not import ray before falign"
        )


def check_versions(nodes: Sequence[Node]) -> None:
    """Refuse nodes that have another falign, or none.

    Args:
        nodes: Entries of ``ray.nodes()``, of nodes that are alive.

    Raises:
        ConfigError: Some have another one: which, and what to install.
    """
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # A function of the standard library can be called even where falign is missing.
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
        except ray.exceptions.RayError:  # the node has died since, which is noticed later on
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
    """Have another process join the cluster first, within a time limit."""
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
        reason = result.stdout.strip() or result.stderr.strip().rpartition("\n")[2] or f"code {result.returncode}"
        raise ConfigError(f"--ray is {address}, and Ray cannot join a cluster there: {' '.join(reason.split())}")


@contextmanager
def _signal_handler_kept() -> Iterator[None]:
    """Put the handler of SIGTERM back, which stores finished runs: Ray installs one of its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


# The executor.

_MAX_NODE_DEATHS = 4
"""Nodes that may die under a block before it is reported as a block of which the worker died."""
_LOOK, _PATIENCE = 2.0, 60.0
"""Seconds between two looks at the nodes, and seconds without a node for a block until that is an error."""


class ClusterError(RunError):
    """A cluster that was lost or became unusable while runs were computed; finished runs are stored."""

    code = 1


class RayExecutor:
    """Computes blocks as tasks of a Ray cluster.

    A block whose worker process died is reported, as by every executor. A block whose whole node died is hardly to
    blame for that, so it is given to another node first. Ray's own retries are off: they would try a block that is too
    large for the memory for ever.

    Args:
        address: "local", "auto", "HOST:PORT" or "ray://HOST:PORT".
        setting: Device and data; with GPUs the device is "cuda", the one that Ray assigns. The folder of the data is
            looked for on the node.
        cpus_per_run: Cores that a block takes, and its number of threads.
        gpus_per_run: GPUs that a block takes; 0.25 puts four blocks on each, into the memory of one.
        modules: Names of modules that no node has to have: their functions are sent as code.

    Raises:
        ConfigError: An argument is wrong, or Ray is not installed.
    """

    def __init__(
        self,
        address: str,
        setting: Setting,
        *,
        cpus_per_run: float = 1.0,
        gpus_per_run: float = 0.0,
        modules: Sequence[str] = (),
    ) -> None:
        check_ray_share("--cpus-per-run", cpus_per_run)
        if gpus_per_run:
            check_ray_share("--gpus-per-run", gpus_per_run)
        self._asked = {"CPU": cpus_per_run, "GPU": gpus_per_run}
        self._threads = max(1, int(cpus_per_run))
        if gpus_per_run == 0 and torch.device(setting.device).type == "cuda":
            raise ConfigError(f"--device is {setting.device}, but Ray is asked for no GPU: add --gpus-per-run 1")
        check_ray_address(address)
        self._address = address
        self._setting = replace(
            setting,
            device="cuda" if gpus_per_run else setting.device,
            data=None if setting.data is None else setting.data.absolute(),
        )
        self._modules = modules
        self._work: Any = None
        self._at_work: dict[Any, Block] = {}
        self._nodes: list[Node] = []
        self._nodes_died: Counter[Block] = Counter()
        self._looked = self._usable = -math.inf

    @property
    def slots(self) -> int:
        """Number of blocks to give to Ray at once; 1 as long as no cluster is joined."""
        if self._work is None:
            return 1
        if monotonic() - self._looked > _LOOK:
            self._look()
        return capacity(self._asked, self._nodes)

    def submit(self, block: Block) -> None:
        """Give a block to the cluster."""
        from ray import cloudpickle

        # As bytes, so that what a worker cannot import becomes a result like any other error.
        payload = cloudpickle.dumps(  # pyright: ignore[reportPrivateImportUsage]
            (block.experiment.run, block.tasks, self._setting)
        )
        with _cluster():
            task = self._work.options(memory=self._memory(block)).remote(payload, self._threads)
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
            if not finished and self.slots == 0 and monotonic() - self._usable > _PATIENCE:
                raise ClusterError(f"{self._refusal()}: start nodes again, and call again")
            if monotonic() >= end:
                break
        return finished

    def __enter__(self) -> "RayExecutor":
        connect(self._address)
        import ray  # not before: Ray reads its switches when it is imported
        from ray import cloudpickle

        for name in self._modules:
            cloudpickle.register_pickle_by_value(sys.modules[name])
        try:
            self._work = ray.remote(num_cpus=self._asked["CPU"], num_gpus=self._asked["GPU"], max_retries=0)(_work)
            if self.slots == 0:
                raise ConfigError(f"{self._refusal()}: ask for less, or start such a node")
            check_versions([node for node in self._nodes if capacity(self._asked, [node])])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel the running blocks and leave the cluster; one that was started here ends."""
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
        """Result of a task that has ended; None if its node died and the block was given to another one."""
        import ray.exceptions

        block = self._at_work.pop(task)
        try:
            result: BlockResult = ray.get(task)
        except (ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError):
            self._nodes_died[block] += 1
            if self._nodes_died[block] < _MAX_NODE_DEATHS:
                self.submit(block)
                return None
            result = BlockResult(
                error=f"{_MAX_NODE_DEATHS} nodes of the cluster died of it, or with it", worker_died=True
            )
        except ray.exceptions.RayTaskError as error:  # raised by the worker, not by the experiment
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
        """Ask Ray which nodes are alive."""
        import ray

        with _cluster():
            self._nodes = [node for node in ray.nodes() if node["Alive"]]
        self._looked = monotonic()
        if capacity(self._asked, self._nodes):
            self._usable = self._looked

    def _memory(self, block: Block) -> int | None:
        """Bytes that Ray sets aside for a block, so that a node takes no more blocks than fit into its memory.

        Never more than the largest node has: Ray would let such a block wait for ever.

        Returns:
            The bytes; None if the block does not tell, or needs them on a GPU.
        """
        if block.experiment.memory is None or self._asked["GPU"]:
            return None
        largest = max((node["Resources"].get("memory", 0.0) for node in self._nodes), default=0.0)
        return min(memory_needed(block), int(largest)) or None

    def _refusal(self) -> str:
        """Message that no node can take a block, and which nodes there are."""
        nodes = [
            f"{node['NodeManagerAddress']} has {node['Resources'].get('CPU', 0.0):g} and "
            f"{node['Resources'].get('GPU', 0.0):g}"
            for node in self._nodes
        ]
        return (
            f"no node of the Ray cluster has the cores and GPUs for one run, --cpus-per-run {self._asked['CPU']:g} and "
            f"--gpus-per-run {self._asked['GPU']:g} ({'; '.join(nodes) or 'no node is left'})"
        )


def capacity(asked: Mapping[str, float], nodes: Sequence[Node]) -> int:
    """Number of blocks to give to a cluster at once, so that all nodes are busy.

    The nodes that can take a block at all are counted as one: Ray lets a block wait that none of them has room for.

    Args:
        asked: {"CPU": cores of a block, "GPU": its GPUs}.
        nodes: The living nodes.
    """
    fitting = [
        node["Resources"]
        for node in nodes
        if all(node["Resources"].get(kind, 0.0) >= amount for kind, amount in asked.items())
    ]
    blocks = (sum(has.get(kind, 0.0) for has in fitting) / amount for kind, amount in asked.items() if amount)
    return int(min(blocks) + 1e-6)  # 0.7 / 0.1 is 7


def _work(payload: bytes, threads: int) -> BlockResult:
    """Compute a block, in a worker process of a node."""
    torch.set_num_threads(threads)
    try:
        run, tasks, setting = pickle.loads(payload)
    except Exception as error:  # a module that is not installed on the node, say
        return BlockResult(error=f"the worker cannot read the block: {type(error).__name__}: {error}")
    return compute(run, tasks, setting)


@contextmanager
def _cluster() -> Iterator[None]:
    """Turn errors of Ray, which mean that the cluster is gone, into ``ClusterError``."""
    import ray.exceptions

    try:
        yield
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise ClusterError(f"the Ray cluster is gone ({_line(error)}): start it again, and call again") from None


def _line(error: BaseException) -> str:
    """First line of an exception's message."""
    return str(error).strip().partition("\n")[0]
