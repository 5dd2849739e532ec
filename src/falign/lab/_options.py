"""The options of ``falign reproduce``, checked before PyTorch, polars or Ray are imported.

So a mistyped option costs no time. Outside of ``falign.lab.experiment``, which cannot be imported without polars.
"""

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from urllib.parse import urlsplit

from falign.lab._memory import cores
from falign.lab.config import ConfigError

_MAX_WORKERS = 32
"""So many workers are started on a machine of few cores as well; each is a process of a quarter of a GiB."""
_MIN_GIB, _MAX_GIB = 1e-6, 1e9
"""Memory of a block: a kilobyte, and more than there is anywhere."""
_DEVICE = re.compile(r"cpu|cuda(:(0|[1-9][0-9]?|1[01][0-9]|12[0-7]))?")
"""Devices that a run can be computed on: torch keeps the number in a byte, so that cuda:256 would be cuda:0."""


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """Options that say where runs are computed and with how much memory; None where the command was not asked.

    Args:
        workers: Processes of this machine; None is one, or what a Ray cluster has.
        device: cpu, cuda or cuda:N.
        data: Folder of the data sets; None is what ``FALIGN_DATA`` names, then the cache.
        memory: GiB that a block of runs may need; None is half of what there is, shared among the workers.
        ray: Address of a Ray cluster, or "local"; None is this machine without Ray.
        cpus_per_run: Cores that Ray gives to a block; None is 1.
        gpus_per_run: GPUs that Ray gives to a block; None is 0.

    Raises:
        ConfigError: An option is wrong, or has no effect beside another.
    """

    workers: int | None = None
    device: str = "cpu"
    data: Path | None = None
    memory: float | None = None
    ray: str | None = None
    cpus_per_run: float | None = None
    gpus_per_run: float | None = None

    def __post_init__(self) -> None:
        self._check_workers()
        if self.data is not None and not os.path.isdir(self.data):  # Path's own raises for names that are too long
            raise ConfigError(
                f"the data folder {self.data} is not a folder, expected an existing one: correct its path"
            )
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"--device is {self.device!r}, expected cpu, cuda or cuda:N")
        if self.memory is not None and not _MIN_GIB <= self.memory <= _MAX_GIB:  # which NaN is not
            raise ConfigError(
                f"--memory is {self.memory:g}, expected a positive number of GiB, from {_MIN_GIB:g} to {_MAX_GIB:g}"
            )
        if self.ray is None:
            for name, value in (("--cpus-per-run", self.cpus_per_run), ("--gpus-per-run", self.gpus_per_run)):
                if value is not None:
                    raise ConfigError(f"{name} is {value:g}, but it is for --ray: leave it out")
        else:
            check_ray_address(self.ray)
            check_ray_share("--cpus-per-run", self.cpus)
            if self.gpus:
                check_ray_share("--gpus-per-run", self.gpus)

    @property
    def cpus(self) -> float:
        """Cores that Ray gives to a block."""
        return 1.0 if self.cpus_per_run is None else self.cpus_per_run

    @property
    def gpus(self) -> float:
        """GPUs that Ray gives to a block."""
        return self.gpus_per_run or 0.0

    def _check_workers(self) -> None:
        if self.workers is None:
            return
        if self.workers < 1:
            raise ConfigError(f"--workers is {self.workers}, expected at least 1")
        if self.ray is not None:
            raise ConfigError(f"--workers is {self.workers}, but with --ray the cluster's size counts: leave it out")
        largest = max(_MAX_WORKERS, 4 * cores())
        if self.workers > largest:
            raise ConfigError(
                f"--workers is {self.workers}, expected at most {largest} on this machine, which has {cores()} cores"
            )


def check_ray_share(name: str, value: float) -> None:
    """Refuse a number of cores or GPUs that Ray does not give out: it knows several whole ones, or a part of one.

    Args:
        name: The option that asks for it.
        value: Cores or GPUs; a part is a multiple of 1/10000.

    Raises:
        ConfigError: It is neither.
    """
    if not (0.0001 <= value < 1 or (isfinite(value) and value >= 1 and value == int(value))):
        raise ConfigError(f"{name} is {value:g}, expected a part of 1, such as 0.5, or a whole number")


def check_ray_address(address: str) -> None:
    """Refuse what is no address of a Ray cluster, without asking the network.

    Args:
        address: "local", "auto", "HOST:PORT" or "ray://HOST:PORT".

    Raises:
        ConfigError: It is something else, or what it needs is not installed.
    """
    if find_spec("ray") is None:
        raise ConfigError('--ray needs Ray, which is not installed: pip install "falign[ray]"')
    if address not in ("local", "auto"):
        host_and_port(address)
    if address.startswith("ray://") and find_spec("grpc") is None:
        raise ConfigError(f'--ray is {address}, a client\'s address, which needs: pip install "ray[client]"')


def host_and_port(address: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "ray://HOST:PORT".

    Raises:
        ConfigError: The address has no such form.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number, or out of range
        host, port = None, None
    if not host or not port or parts.scheme not in ("", "ray"):
        raise ConfigError(f"--ray is {address!r}, expected local, auto, HOST:PORT or ray://HOST:PORT")
    return host, port
