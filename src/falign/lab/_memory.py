"""Memory and cores that this process may use."""

import os
import sys
from contextlib import suppress
from pathlib import Path

GIB = 2**30
_GROUPS, _MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available() -> int:
    """Return the smallest of: memory of this machine, limit of its container, limit of this process, in bytes."""
    return min([_physical(), *_contained(), *_limited()])


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _physical() -> int:
    if sys.platform == "win32":  # Windows does not overcommit: an allocation fails at once
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _contained() -> list[int]:
    """Return the limits of the control groups that the process is in, of those above them, and of the container."""
    first, second = (_GROUPS / "memory", "memory.limit_in_bytes"), (_GROUPS, "memory.max")  # by version
    places = {first, second}
    with suppress(OSError, ValueError):
        for line in _MINE.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds or "memory" in kinds.split(","):  # version 2 has one group of all kinds, without a name
                root, name = first if kinds else second
                inside = root / path.strip("/")
                places |= {(place, name) for place in (inside, *inside.parents) if place.is_relative_to(root)}
    limits = []
    for place, name in places:
        with suppress(OSError, ValueError):  # "max", or there is no such file
            limits.append(int((place / name).read_text()))
    return limits


def _limited() -> list[int]:
    """Return the limit of the process (``ulimit -v``), if any."""
    if sys.platform == "win32":
        return []
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if soft == resource.RLIM_INFINITY else [soft]
