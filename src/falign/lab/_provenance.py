"""Provenance of a run's numbers: versions, commits, code, machine, threads, data."""

import hashlib
import inspect
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import falign
from falign.lab._files import Unreadable, read_bounded
from falign.lab.data import Dataset

_PACKAGES = ("torch", "numpy", "polars", "matplotlib", "safetensors", "scikit-learn")
_CODE = 64 << 20
"""Bytes that a file of code may have."""


def provenance(device: str, *code: str) -> dict[str, Any]:
    """Collect versions, the commit of the working folder, the code of model and rule, machine, threads and time.

    Args:
        device: The device that is trained on.
        code: What ``--model`` and ``--rule`` say; what is of the user's own among them was imported.

    Returns:
        Values that JSON can hold.
    """
    return {
        "falign": falign.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": sys.argv,
        "git": _commit(),
        "code": {file: digest for each in code for file, digest in (_code(each) or {}).items()} or None,
        "platform": platform.platform(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def block_provenance(device: str) -> dict[str, Any]:
    """Collect versions, the commit of falign itself, machine, device and threads for a block of an experiment.

    Slow parts, such as asking git, are done once a process.

    Args:
        device: The device that is computed on.

    Returns:
        Values that JSON can hold, the same for all blocks of a process.
    """
    return {**_place(device), "threads": torch.get_num_threads()}


@cache
def _place(device: str) -> dict[str, Any]:
    return {
        "falign": falign.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", "polars")},
        "git": _source(),
        "platform": platform.platform(),
        "device": _device_name(device),
    }


def _source() -> dict[str, Any] | None:
    """Return the commit of falign's source and whether its files differ from it; None outside of a repository."""
    folder = str(Path(falign.__file__).parent)
    if _git("-C", folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = _git("-C", folder, "rev-parse", "HEAD"), _git("-C", folder, "status", "--porcelain", "--", ".")
    return None if commit is None else {"commit": commit, "changed": bool(changes)}


def _code(named: str) -> dict[str, str] | None:
    """Return {file: SHA-256} of the code that importing the user's own model or rule runs; None if there is none.

    The files of the module that is named, of the packages that it is in, and the one in which the factory or rule
    stands; not what these import in turn.
    """
    name, _, path = named.partition(":")
    module = sys.modules.get(name)
    if module is None or not path:
        return None
    parts = name.split(".")
    packages = [sys.modules.get(".".join(parts[: end + 1])) for end in range(len(parts))]
    files = [getattr(each, "__file__", None) for each in packages]
    with suppress(AttributeError, TypeError, ValueError):  # an object that is called, a function of another language
        factory: Any = module
        for part in path.split("."):
            factory = getattr(factory, part)
        files.append(inspect.getsourcefile(inspect.unwrap(factory)))
    try:
        return {file: hashlib.sha256(read_bounded(Path(file), _CODE)).hexdigest() for file in files if file} or None
    except Unreadable:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """Return the commit of the working folder and whether files differ from it; None outside of a repository."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return None if commit is None else {"commit": commit, "changed": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        words = [
            "git",
            "-c",
            "core.fsmonitor=false",
            *arguments,
        ]  # a repository may name a program as monitor, which git would run
        result = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}: {platform.processor() or platform.machine()}"


def fingerprint(data: Dataset) -> str:
    """Compute a checksum of all images and labels, so that a resumed run cannot go on with other data."""
    digest = hashlib.sha256()
    for tensor in (data.train_images, data.train_labels, data.test_images, data.test_labels):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
