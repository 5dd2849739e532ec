"""Whether the code that a run folder names may be run: only what the run began with here, or what a person allows."""

import sys
from collections.abc import Mapping
from hashlib import file_digest
from importlib import invalidate_caches
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from pathlib import Path

from falign.lab._files import RunError
from falign.lab._text import plain

RECORDED = "code"
"""Of a run's provenance: file -> SHA-256 of the code of its own model and its own rule."""


def ask(code: str, recorded: object, folder: Path) -> None:
    """Before a run goes on, make sure that a person wants the code that its folder names.

    A run folder says in ``config.json`` which modules make its network and its rule. What the run began with on this
    machine is run without a question: the files are where they were, what they were, and what an import finds.
    Otherwise the folder, or the code, came from elsewhere, and whoever sits at the terminal is asked.

    Args:
        code: The model or the rule of the configuration; those that falign brings along are no code to ask for.
        recorded: What the provenance beside it has under ``RECORDED``.
        folder: The run folder.

    Raises:
        RunError: The code is not the run's own, and nobody allows it.
    """
    if ":" not in code or code.startswith("mlp:") or (why := foreign(code, recorded)) is None:
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
    """Why the code of a model or a rule is not what a run began with; None if it is. Nothing of it is run or imported.

    Args:
        code: ``package.module:factory``.
        recorded: What the run's provenance says of it.
    """
    if not (isinstance(recorded, Mapping) and recorded and all(isinstance(text, str) for text in recorded.values())):
        return "it does not say which files that was"
    files = {Path(file): digest for file, digest in recorded.items()}
    for file, digest in files.items():
        try:
            if not (file.is_absolute() and file.is_file()):  # a device may have no end
                raise FileNotFoundError
            with file.open("rb") as stream:
                now = file_digest(stream, "sha256").hexdigest()
        except (OSError, ValueError):
            return f"the file that the run began with, {file}, is not here"
        if now != digest:
            return f"{file} is not what it was when the run began"
    parts = code.partition(":")[0].split(".")
    for end in range(1, len(parts) + 1):
        found = _found(".".join(parts[:end]))
        if found is None and end < len(parts):  # a folder without code of its own, or what is below is not found either
            continue
        if found is None or not found.exists() or not any(found.samefile(file) for file in files):
            return f"an import finds {found or 'another module'}, with which the run did not begin"
    return None


def _found(module: str) -> Path | None:
    """The file that an import of a module would run, from the working folder first; None if that cannot be told."""
    invalidate_caches()  # of folders that have just been written
    path: list[str] | None = [str(Path.cwd()), *sys.path]
    spec, name = None, ""
    try:
        for part in module.split("."):
            if path is None:  # of a module that is no package
                return None
            name = f"{name}.{part}" if name else part
            spec = getattr(sys.modules.get(name), "__spec__", None) or _spec(name, path)
            if spec is None:
                return None
            path = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    except Exception:  # of a package in several folders, or of a finder that somebody installed
        return None
    return None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin)


def _spec(name: str, path: list[str]) -> ModuleSpec | None:
    """What the import system finds, without running the packages above it as ``importlib.util.find_spec`` does."""
    above = (BuiltinImporter, FrozenImporter) if "." not in name else ()
    return next((found for each in above if (found := each.find_spec(name))), None) or PathFinder.find_spec(name, path)
