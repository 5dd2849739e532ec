"""From the words of ``falign reproduce`` to where and with how much memory it computes."""

import os
from math import isfinite
from pathlib import Path

import torch

from falign.lab.config import ConfigError
from falign.lab.data import DataError
from falign.lab.experiment.execution import Executor
from falign.lab.experiment.local import cores, local
from falign.lab.experiment.specification import Setting
from falign.lab.memory import GIB, available

_WORKERS = 32
"""So many workers are taken on a machine of few cores as well; each is a process of a quarter of a GiB."""
_LEAST, _MOST = 1e-6, 1e9
"""GiB that a block may have: a kilobyte, and more than there is anywhere."""


def executor(
    *,
    workers: int | None,
    device: str,
    data: Path | None,
    ray: str | None,
    cpus_per_run: float | None,
    gpus_per_run: float | None,
) -> Executor:
    """The executor that options ask for.

    Args:
        workers: Processes of this machine; None is one, or what a Ray cluster has.
        device: A torch device.
        data: Folder of the data sets; None is what ``FALIGN_DATA`` names, then the cache.
        ray: Address of a Ray cluster, or "local"; None is this machine without Ray.
        cpus_per_run: Cores that Ray gives to a block; None is 1.
        gpus_per_run: GPUs that Ray gives to a block; None is 0.

    Returns:
        The executor, not yet entered.

    Raises:
        ConfigError: An option is wrong, or has no effect beside another.
        DataError: The data folder is not a folder.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers is {workers}, expected at least 1")
    most = max(_WORKERS, 4 * cores())
    if workers is not None and workers > most and ray is None:
        raise ConfigError(f"--workers is {workers}, expected at most {most} on this machine, which has {cores()} cores")
    if data is not None and not os.path.isdir(data):  # Path's own raises for names that are too long
        raise DataError(f"the data folder {data} is not a folder, expected an existing one: correct its path")
    setting = Setting(device=device, data=None if data is None else data.absolute())
    if ray is None:
        for name, value in (("--cpus-per-run", cpus_per_run), ("--gpus-per-run", gpus_per_run)):
            if value is not None:
                raise ConfigError(f"{name} is {value:g}, but it is for --ray: leave it out")
        _check_device(device, here=True)
        return local(1 if workers is None else workers, setting)
    _check_device(device, here=False)
    if workers is not None:
        raise ConfigError(f"--workers is {workers}, but with --ray the cluster's size counts: leave it out")
    cpus, gpus = 1.0 if cpus_per_run is None else cpus_per_run, gpus_per_run or 0.0
    if not (isfinite(cpus) and cpus > 0 and isfinite(gpus) and gpus >= 0):
        raise ConfigError(f"--cpus-per-run is {cpus:g} and --gpus-per-run {gpus:g}, expected above 0 and at least 0")
    from falign.lab.experiment.cluster import RayExecutor  # Ray is an extra of its own

    return RayExecutor(ray, setting, cpus_per_run=cpus, gpus_per_run=gpus)


def memory(gib: float | None, *, workers: int | None, device: str) -> int:
    """Bytes that a block may need.

    Args:
        gib: What was asked for, in GiB; None is half of what there is, shared among the workers.
        workers: Their number; None is one.
        device: A torch device; of a CUDA device its own memory counts.

    Raises:
        ConfigError: It is no number of GiB that a block could have.
    """
    if gib is None:
        cuda = _check_device(device, here=False).type == "cuda" and torch.cuda.is_available()
        whole = torch.cuda.get_device_properties(device).total_memory if cuda else available()
        return max(1, int(whole) // 2 // max(1, workers or 1))
    if not _LEAST <= gib <= _MOST:  # which NaN is not
        raise ConfigError(f"--memory is {gib:g}, expected a positive number of GiB, from {_LEAST:g} to {_MOST:g}")
    return int(gib * GIB)


def _check_device(name: str, *, here: bool) -> torch.device:
    """The device of a name; raise ``ConfigError`` if there is none. On a cluster only its kind can be checked."""
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        device = None
    # torch keeps a number in a byte, so that cuda:256 would be cuda:0; and there is one cpu.
    if device is None or device.type not in ("cpu", "cuda") or name not in ("cpu", "cuda", f"cuda:{device.index}"):
        raise ConfigError(f"--device is {name!r}, expected cpu, cuda or cuda:N")
    if here and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = f"PyTorch sees {torch.cuda.device_count()} CUDA devices here"
        raise ConfigError(f"--device is {name}, but {seen}: use --device cpu")
    return device
