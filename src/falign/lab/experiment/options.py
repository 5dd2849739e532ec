"""From the words of ``falign reproduce`` to where and with how much memory it computes."""

from math import isfinite
from pathlib import Path

import torch

from falign.lab.config import ConfigError
from falign.lab.data import DataError
from falign.lab.experiment.blocks import GIB, available
from falign.lab.experiment.execution import Executor
from falign.lab.experiment.local import local
from falign.lab.experiment.specification import Setting


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
    if data is not None and not data.is_dir():
        raise DataError(f"the data folder {data} is not a folder, expected an existing one: correct its path")
    setting = Setting(device=device, data=None if data is None else data.resolve())
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
        ConfigError: It is not positive.
    """
    if gib is None:
        cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
        whole = torch.cuda.get_device_properties(device).total_memory if cuda else available()
        return int(whole) // 2 // (workers or 1)
    if not (isfinite(gib) and gib > 0):
        raise ConfigError(f"--memory is {gib:g}, expected a positive number of GiB")
    return int(gib * GIB)


def _check_device(name: str, *, here: bool) -> None:
    """Raise ``ConfigError`` if there is no such device; on a cluster only its kind can be checked."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {name!r}, expected cpu, cuda or cuda:N")
    if here and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = f"PyTorch sees {torch.cuda.device_count()} CUDA devices here"
        raise ConfigError(f"--device is {name}, but {seen}: use --device cpu")
