"""Joining a Ray cluster, or starting one on this machine: all that can be wrong with an address is said at once."""

import importlib.metadata
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from urllib.parse import urlsplit

from falign.lab.config import ConfigError
from falign.lab.experiment.share import Node

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
"""Seconds to wait for an answer of the address, for joining, and for the nodes to tell their version."""

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


def check_address(address: str) -> None:
    """Refuse what is no address of a Ray cluster, without asking the network.

    Args:
        address: "local", "auto", "HOST:PORT" or "ray://HOST:PORT".

    Raises:
        ConfigError: It is something else, or what it needs is not installed.
    """
    if find_spec("ray") is None:
        raise ConfigError('--ray needs Ray, which is not installed: pip install "falign[ray]"')
    if address not in ("local", "auto"):
        _endpoint(address)
    if address.startswith("ray://") and find_spec("grpc") is None:
        raise ConfigError(f'--ray is {address}, a client\'s address, which needs: pip install "ray[client]"')


def switch(*, alone: bool = False) -> None:
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
    switch(alone=address == "local")
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
    for answer in ready:
        try:
            there = ray.get(answer)
        except importlib.metadata.PackageNotFoundError:
            there = "none"
        except ray.exceptions.RayError:  # the node has died since: it is found to be gone later on
            continue
        if there != here:
            others[answers[answer]] = there
    if others:
        listed = ", ".join(f"{node} has {version}" for node, version in sorted(others.items()))
        raise ConfigError(
            f"falign is {here} here, but of the cluster's nodes {listed}: install the same version on all of them, "
            f'pip install "falign[ray]=={here}"'
        )


def _installed() -> str:
    return importlib.metadata.version("falign")


def _endpoint(address: str) -> tuple[str, int]:
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number, or out of range
        host, port = None, None
    if not host or not port or parts.scheme not in ("", "ray"):
        raise ConfigError(f"--ray is {address!r}, expected local, auto, HOST:PORT or ray://HOST:PORT")
    return host, port


def _probe(address: str) -> None:
    """Have another process join first, within a time limit."""
    if address != "auto":
        try:
            socket.create_connection(_endpoint(address), timeout=_REACH).close()
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
