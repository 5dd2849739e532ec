"""Where the numbers of a run come from."""

import hashlib
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import falign
from falign.lab.data import Dataset

_PACKAGES = ("torch", "numpy", "polars", "matplotlib", "safetensors", "scikit-learn")


def provenance(device: str) -> dict[str, Any]:
    """Versions, the commit of the working folder, machine, threads and time.

    Args:
        device: The device that is trained on.

    Returns:
        Values that JSON can hold.
    """
    return {
        "falign": falign.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": sys.argv,
        "git": _commit(),
        "platform": platform.platform(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """The commit of the working folder and whether files differ from it; None outside a repository."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return None if commit is None else {"commit": commit, "changed": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}: {platform.processor() or platform.machine()}"


def fingerprint(data: Dataset) -> str:
    """A checksum of all images and labels, so that a resumed run cannot go on with other data."""
    digest = hashlib.sha256()
    for tensor in (data.train_images, data.train_labels, data.test_images, data.test_labels):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
