"""How much memory there is, before it is taken."""

import os
import sys
from pathlib import Path

GIB = 2**30
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def available() -> int:
    """Bytes of memory of this machine, of the container that this process is in, or of its limit (``ulimit -v``)."""
    return min([_physical(), *_contained(), *_limited()])


def _physical() -> int:
    if sys.platform == "win32":  # Windows refuses what it has not, at once
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _contained() -> list[int]:
    """Limits of the container, if any."""
    found = []
    for path in _LIMITS:
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):
            continue
    return found


def _limited() -> list[int]:
    """Limit of the process, if any."""
    if sys.platform == "win32":
        return []
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if soft == resource.RLIM_INFINITY else [soft]
