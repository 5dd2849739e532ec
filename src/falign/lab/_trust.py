"""Permission to run the code that a run folder names: code that the run began with here, or that a person allows."""

import sys
from collections.abc import Mapping
from hashlib import file_digest
from importlib import invalidate_caches
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from pathlib import Path

from falign.lab._files import RunError
from falign.lab._text import plain
from falign.lab._validate import is_built_in
from falign.lab.config import is_text

RECORDED = "code"
"""Entry of a run's provenance: {file: SHA-256} of the code of its own model and its own rule."""


def ask(code: str, recorded: object, folder: Path) -> None:
    """Ask the person at the terminal before a run goes on by code that it did not begin with on this machine.

    ``config.json`` names the modules that make network and rule, and anybody may have written it. No question is asked
    if the files are where they were when the run began, have the same content, and are those that an import finds.

    Args:
        code: Model, rule or data set of the configuration; nothing is asked for those of falign itself.
        recorded: Entry ``RECORDED`` of the run's provenance.
        folder: The run folder.

    Raises:
        RunError: The code is not the run's, and nobody allows it.
    """
    if ":" not in code or is_built_in(code) or is_text(code) or (why := foreign(code, recorded)) is None:
        return
    shown = plain(code).replace("\n", "\\n")
    named = f"{folder} names code to run, {shown}, but {why}"
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr is not None:
        print(f"{plain(named)}.\nRun it? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
        raise RunError(f"{folder} was left as it is: its code {code} was not allowed to run")
    raise RunError(f"{named}: read it, and if it may run add --trust")


def foreign(code: str, recorded: object) -> str | None:
    """Describe how code differs from what a run began with; None if it does not. Nothing of it is run or imported.

    Args:
        code: ``package.module:factory``.
        recorded: Entry ``RECORDED`` of the run's provenance.
    """
    if not (
        isinstance(recorded, Mapping) and recorded and all(isinstance(digest, str) for digest in recorded.values())
    ):
        return "it does not say which files that was"
    files = {Path(file): digest for file, digest in recorded.items()}
    for file, digest in files.items():
        try:
            if not (file.is_absolute() and file.is_file()):  # reading a device might never end
                raise FileNotFoundError
            with file.open("rb") as stream:
                now = file_digest(stream, "sha256").hexdigest()
        except (OSError, ValueError):
            return f"the file that the run began with, {file}, is not here"
        if now != digest:
            return f"{file} is not what it was when the run began"
    parts = code.partition(":")[0].split(".")
    for end in range(1, len(parts) + 1):
        origin = _origin(".".join(parts[:end]))
        if origin is None and end < len(parts):  # a folder without code, or the next part is not found either
            continue
        if origin is None or not origin.exists() or not any(origin.samefile(file) for file in files):
            return f"an import finds {origin or 'another module'}, with which the run did not begin"
    return None


def _origin(module: str) -> Path | None:
    """Find the file that importing a module would run, in the working folder first; None if that is not certain."""
    invalidate_caches()  # modules may have been written since the last import
    path: list[str] | None = [str(Path.cwd()), *sys.path]
    spec, name = None, ""
    try:
        for part in module.split("."):
            if path is None:  # the part before is no package
                return None
            name = f"{name}.{part}" if name else part
            spec = getattr(sys.modules.get(name), "__spec__", None) or _spec(name, path)
            if spec is None:
                return None
            path = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    except Exception:  # namespace packages, or import hooks of somebody else
        return None
    return None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin)


def _spec(name: str, path: list[str]) -> ModuleSpec | None:
    """Find a module without running the packages above it, as ``importlib.util.find_spec`` would."""
    first = (BuiltinImporter, FrozenImporter) if "." not in name else ()
    specs = (importer.find_spec(name) for importer in first)
    return next(filter(None, specs), None) or PathFinder.find_spec(name, path)
