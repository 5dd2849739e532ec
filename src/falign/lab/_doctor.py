"""Checks of the installation: packages, machine, data, folders, leftovers of killed processes. Nothing is changed."""

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from falign.lab._files import is_locked
from falign.lab._memory import GIB, available, cores
from falign.lab._requirements import PACKAGES, install, lacking, requirements
from falign.lab._text import plain_cell, print_plain

_MOST_FILES = 200_000
"""Files of a folder that are counted: a home folder would take minutes."""
_LISTED = 5
"""Leftovers of a kind that are named."""
_LEFTOVERS = {
    ".partial": "half-written by a process that was killed: harmless, taken away by the next run there",
    ".corrupt": "damaged files that were set aside: harmless, delete them once you have looked at them",
    ".lock": "locks of processes that are gone: harmless, they hold nothing back",
}
_OPTIONAL = {
    "ray": "for --ray",
    "tensorboard": "for --tensorboard",
    "query": "for falign query",
    "explore": "for falign explore",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result of one check.

    Attributes:
        topic: Group of checks that it belongs to.
        name: Name of the package, device, data set or folder.
        text: Its state, and what to do if something is wrong.
        broken: Whether something that falign needs is wrong.
    """

    topic: str
    name: str
    text: str
    broken: bool = False


def examine(*, data: Path | None, out: Path) -> list[Finding]:
    """Check everything that a command may need.

    Args:
        data: Folder of the data sets; None is what ``FALIGN_DATA`` names.
        out: Folder of the results.

    Returns:
        The findings, topic by topic.
    """
    checks = {
        "Packages": _packages,
        "Machine": _machine,
        "Data sets": lambda: _data(data),
        "Folders": lambda: _folders(data, out),
        "Left behind": lambda: _leftovers(out),
    }
    return [Finding(topic=topic, **values) for topic, check in checks.items() for values in _run_check(check)]


def show(findings: list[Finding], console: Console) -> None:
    """Print the findings, topic by topic; broken ones are marked, and named in a sentence at the end."""
    for topic in dict.fromkeys(finding.topic for finding in findings):
        print_plain(console, topic)
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(overflow="fold", max_width=console.width // 3)
        table.add_column(overflow="fold")
        for finding in findings:
            if finding.topic == topic:
                mark = "!" if finding.broken else " "
                table.add_row(plain_cell(f"{mark} {finding.name}"), plain_cell(finding.text))
        console.print(table)
    broken = [finding.name for finding in findings if finding.broken]
    print_plain(console, f"broken: {', '.join(broken)}" if broken else "all that is needed is here")


def as_json(findings: list[Finding]) -> str:
    """Return the findings as JSON, for programs and for bug reports."""
    healthy = not any(finding.broken for finding in findings)
    return json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}, indent=2)


def _run_check(check: Callable[[], Iterator[dict]]) -> list[dict]:
    """Collect the findings of a check; an error of the check itself is a finding, too."""
    findings = []
    try:
        for finding in check():
            findings.append(finding)
    except Exception as error:  # the command is there to find what is broken
        text = lacking(error) or f"cannot be looked at: {type(error).__name__}: {error}"
        findings.append({"name": "error", "text": text, "broken": True})
    return findings


def _packages() -> Iterator[dict]:
    import falign

    yield {"name": "falign", "text": f"{falign.__version__}, {Path(falign.__file__).parent}"}
    yield {"name": "python", "text": f"{platform.python_version()}, {sys.executable}"}
    needed = requirements()
    if not needed:
        yield {"name": "versions", "text": f"falign is not installed, so nothing can be checked: {install('lab')}"}
    for requirement in needed:
        if requirement.installed is None:
            why = f", only needed {_OPTIONAL[requirement.extra]}" if requirement.extra in _OPTIONAL else ""
            yield {"name": requirement.package, "text": f"missing{why}: {requirement.remedy}", "broken": not why}
        elif not requirement.fits:
            text = f"{requirement.installed}, expected {requirement.wanted}: {requirement.remedy}"
            yield {"name": requirement.package, "text": text, "broken": True}
        elif requirement.extra in _OPTIONAL or (fault := _fault(requirement.package)) is None:
            yield {"name": requirement.package, "text": requirement.installed}
        else:
            yield {
                "name": requirement.package,
                "text": f"{requirement.installed} {fault}: {requirement.remedy}",
                "broken": True,
            }


def _fault(package: str) -> str | None:
    """Describe why an installed package cannot be imported; None if it can."""
    names = {installed: imported for imported, installed in PACKAGES.items()}
    try:
        import_module(names.get(package, package))
    except Exception as error:  # packages that do not fit together raise errors of all kinds
        return f"cannot be imported ({type(error).__name__}: {error})"
    return None


def _machine() -> Iterator[dict]:
    import torch

    yield {"name": "system", "text": platform.platform()}
    yield {"name": "cores", "text": f"{cores()} of {os.cpu_count()}"}
    yield {"name": "memory", "text": f"{available() / GIB:.1f} GiB"}
    settings = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    yield {"name": "threads", "text": ", ".join([f"PyTorch computes with {torch.get_num_threads()}", *settings])}
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(number):
        properties = torch.cuda.get_device_properties(index)
        yield {"name": f"cuda:{index}", "text": f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"}
    if not number:
        built = "" if torch.version.cuda else ", and this PyTorch was built without it"
        yield {"name": "cuda", "text": f"no device{built}"}
    yield {"name": "mps", "text": "there" if torch.backends.mps.is_available() else "no device"}
    encoding = str(getattr(sys.stdout, "encoding", None) or "none")
    lossy = not encoding.lower().replace("-", "").startswith("utf")
    text = ", letters that it lacks are shown as question marks: PYTHONUTF8=1 shows them" if lossy else ""
    yield {"name": "output", "text": f"{encoding}{text}"}


def _data(folder: Path | None) -> Iterator[dict]:
    from falign.lab.config import TEXTS
    from falign.lab.data._loading import NAMES, locate

    for name in (*NAMES, *TEXTS):
        location = locate(name, folder)
        path = location.paths[0] if len(location.paths) == 1 else location.paths[0].parent if location.paths else None
        yield {"name": name, "text": location.remedy if path is None else f"{path}, {_bytes(location.bytes)}"}


def _folders(data: Path | None, out: Path) -> Iterator[dict]:
    import pooch

    from falign.lab._files import RunError
    from falign.lab.experiment import _store

    named = data or (Path(os.environ["FALIGN_DATA"]).expanduser() if os.environ.get("FALIGN_DATA") else None)
    if named is None:
        yield {"name": "FALIGN_DATA", "text": "not set: data sets are looked for in the cache"}
    else:
        there = named.is_dir()
        text = _measured(named) if there else "is no folder: correct its path"
        yield {"name": "FALIGN_DATA" if data is None else "--data", "text": f"{named}, {text}", "broken": not there}
    yield _writable("cache", Path(pooch.os_cache("falign")))
    try:
        version = _store.store_format(out)
    except RunError as error:
        yield {"name": "results", "text": str(error), "broken": True}
    else:
        results = _writable("results", out)
        yield results if version else {**results, "text": f"{results['text']}, no results yet"}
    yield _writable("runs", Path("runs"))


def _writable(name: str, folder: Path) -> dict:
    """Check a folder that falign writes into, or will make: its size, and the free space of its disk."""
    place = next((each for each in (folder, *folder.absolute().parents) if os.path.lexists(each)), Path("/"))
    text = f"{folder}, " + (_measured(folder) if folder.is_dir() else "not there yet")
    if not place.is_dir():
        return {"name": name, "text": f"{folder} cannot be made: {place} is no folder", "broken": True}
    if not os.access(place, os.W_OK | os.X_OK):
        return {"name": name, "text": f"{text}, cannot be written: make {place} writable", "broken": True}
    with suppress(OSError):
        text = f"{text}, {_bytes(shutil.disk_usage(place).free)} free"
    return {"name": name, "text": text}


def _measured(folder: Path) -> str:
    number = total = 0
    for path in _files(folder):
        number += 1
        with suppress(OSError):
            total += os.lstat(path).st_size
    more = "more than " if number >= _MOST_FILES else ""
    return f"{more}{number:,} {'file' if number == 1 else 'files'}, {more}{_bytes(total)}"


def _files(folder: Path) -> Iterator[str]:
    """List the first files below a folder; links are not followed."""
    left = _MOST_FILES
    for parent, _, names in os.walk(folder):
        for name in names[:left]:
            yield os.path.join(parent, name)
        left -= min(left, len(names))
        if not left:
            return


def _leftovers(out: Path) -> Iterator[dict]:
    import pooch

    leftovers: dict[str, list[Path]] = {kind: [] for kind in _LEFTOVERS}
    in_use: set[Path] = set()
    for folder in (out, Path("runs"), Path(pooch.os_cache("falign"))):
        for path in map(Path, _files(folder)):
            if any(part.startswith(".") and ".partial-" in part for part in path.relative_to(folder).parts):
                leftovers[".partial"].append(path)
            elif ".corrupt" in path.name:
                leftovers[".corrupt"].append(path)
            elif path.name.endswith(".lock") and not is_locked(path):
                leftovers[".lock"].append(path)
            elif path.name.endswith(".lock"):
                in_use.add(path.parent.parent if path.parent.name == "leases" else path.parent)
    leftovers[".partial"] = [path for path in leftovers[".partial"] if in_use.isdisjoint(path.parents)]
    for kind, paths in leftovers.items():
        for path in paths[:_LISTED]:
            yield {"name": kind, "text": str(path)}
        if paths:
            more = f"and {len(paths) - _LISTED} more; " if len(paths) > _LISTED else ""
            yield {"name": "", "text": f"{more}{_LEFTOVERS[kind]}"}
    if not any(leftovers.values()):
        yield {"name": "nothing", "text": "no half-written file, no damaged one, no lock of a process that is gone"}


def _bytes(number: int | float) -> str:
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{number:.0f} {units[0]}" if number >= 100 or units[0] == "bytes" else f"{number:.1f} {units[0]}"
