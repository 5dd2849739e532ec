"""Pages that nobody writes: the reference, from ``__all__`` and docstrings, and files from beside the docs.

They are written into ``docs/_generated`` when a build begins; what has not changed is left as it is.
"""

import hashlib
import importlib
import inspect
import pkgutil
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jupytext
from numpy.typing import ArrayLike
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util.typing import stringify_annotation

import falign

FOLDER = "_generated"
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
_ARRAY_LIKE = stringify_annotation(ArrayLike, "smart")
_OPTIONS = {"class": ["   :members:"], "function": [], "data": ["   :no-value:"]}
DEPTH = {"theory": 3, "lab": 3, "papers": 3}
"""Parts of the package of which each part has a page of its own."""


def setup(app: Sphinx) -> dict[str, bool]:
    """Take part in a build."""
    app.connect("builder-inited", _write)
    app.connect("source-read", _read)
    app.connect("env-updated", _name_all)
    app.connect("autodoc-process-docstring", _escape, priority=400)  # before napoleon, which adds markup of its own
    app.connect("autodoc-process-docstring", _escape_types, priority=600)
    app.connect("autodoc-process-signature", _shorten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _write(app: Sphinx) -> None:
    folder = Path(app.srcdir, FOLDER)
    pages = {f"{page}.rst": _page(page, modules) for page, modules in _pages().items()}
    for name in BESIDE:
        text = Path(app.srcdir.parent, name).read_text(encoding="utf-8")
        text = re.sub(r"\]\((?:docs/)?(\w+\.md)", lambda found: f"]({_beside(found[1])}", text)
        pages[name.lower()] = text
    for path in Path(app.srcdir, "tutorials").glob("*.py"):
        pages[f"{path.stem}.ipynb"] = jupytext.writes(jupytext.read(path, fmt="py:percent"), fmt="ipynb")
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _beside(name: str) -> str:
    return name.lower() if name in BESIDE else "../index.md" if name == "README.md" else f"../{name}"


# Markdown that is read by others, too


def _read(app: Sphinx, docname: str, content: list[str]) -> None:
    """Lead links that leave the docs to what is on the site, and show diagrams as pictures that were made of them."""
    text = content[0].replace("](../README.md", "](index.md")
    for name in BESIDE:
        text = text.replace(f"](../{name}", f"]({FOLDER}/{name.lower()}")
    content[0] = re.sub(r"```mermaid\n(.*?)```", lambda found: _picture(app, docname, found[1]), text, flags=re.DOTALL)


def _picture(app: Sphinx, docname: str, source: str) -> str:
    """Name the picture of a diagram by its text: a diagram that has changed has none."""
    name = f"pictures/diagram-{hashlib.sha256(source.encode()).hexdigest()[:8]}.svg"
    if not Path(app.srcdir, name).exists():
        raise ExtensionError(
            f"{docname}: a diagram has changed, and docs/{name} is not there: draw it with Mermaid, with "
            "flowchart.htmlLabels false on a transparent background, and remove the picture that it replaces"
        )
    return f"![The steps above as a diagram]({name}){{.diagram}}"


# The reference


@cache
def _public() -> dict[str, ModuleType]:
    """Public modules that export names."""
    names = [part.name for part in pkgutil.walk_packages(falign.__path__, "falign.", onerror=None)]
    public = [name for name in names if not any(part.startswith("_") for part in name.split("."))]
    modules = {name: importlib.import_module(name) for name in ("falign", *sorted(public))}
    return {name: module for name, module in modules.items() if getattr(module, "__all__", ())}


@cache
def _aliases() -> dict[str, list[str]]:
    """Find where a name is shown (in its own module, if that is public), and the other public paths to it."""
    public = _public()
    paths: dict[Any, list[str]] = defaultdict(list)
    for module, value in public.items():
        for name in value.__all__:
            thing = getattr(value, name)
            if isinstance(thing, ModuleType):
                continue
            own = hasattr(thing, "__qualname__")  # a function or class; constants are what their module says
            paths[id(thing) if own else f"{module}.{name}"].append(f"{module}.{name}")
    shown = {}
    for each in paths.values():
        module, _, name = each[0].rpartition(".")
        own = f"{getattr(getattr(public[module], name), '__module__', '')}.{name}"
        first = own if own in each else each[0]
        shown[first] = [path for path in each if path != first]
    return shown


def _pages() -> dict[str, list[str]]:
    pages = defaultdict(list)
    for module in _public():
        parts = module.split(".")
        pages[".".join(parts[: DEPTH.get(parts[1], 2) if len(parts) > 1 else 1])].append(module)
    return dict(pages)


def _page(page: str, modules: list[str]) -> str:
    shown = defaultdict(list)
    for path in _aliases():
        shown[path.rpartition(".")[0]].append(path.rpartition(".")[2])
    text = [page, "=" * len(page), ""]
    for module in modules:
        if module != page:
            text += [module, "-" * len(module), ""]
        text += [f".. automodule:: {module}", ""]
        for name in sorted(shown[module], key=lambda name: (name.isupper(), name.lower())):
            thing = getattr(importlib.import_module(module), name)
            kind = "class" if inspect.isclass(thing) else "function" if inspect.isroutine(thing) else "data"
            text += [f".. auto{kind}:: {module}.{name}", *_OPTIONS[kind], ""]
    return "\n".join(text)


def _name_all(app: Sphinx, env: BuildEnvironment) -> None:
    """Let every public path to a name lead to where it is shown, in the inventory as well."""
    objects = env.domains.python_domain.objects
    for path, others in _aliases().items():
        for other in others:
            if path in objects:
                objects.setdefault(other, objects[path]._replace(aliased=True))


def _escape(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are formulas in plain text: outside of code, bars and stars are no markup."""
    if what == "data" and inspect.getdoc(value) == inspect.getdoc(type(value)):  # nothing is said of it alone
        lines[:] = [_constant(value), ""]
    block = False  # behind a double colon everything is code
    for index, line in enumerate(lines):
        block = line.startswith("    ") if block and line else block
        if not block:
            parts = re.split(r"(``.*?``|:\w+:`[^`]*`)", line)
            parts[::2] = [re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
            lines[index] = "".join(parts)
        block = block or line.endswith("::")


def _escape_types(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Likewise in the types of attributes, which napoleon reads off annotations: ``Float[Tensor, "*runs"]``."""
    for index, line in enumerate(lines):
        if line.startswith(":vartype"):
            lines[index] = re.sub(r"(?<!\\)\*", r"\\*", line)


def _shorten(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Call NumPy's ``ArrayLike`` by its name, and not by the eight types that it stands for."""
    return signature and signature.replace(_ARRAY_LIKE, "ArrayLike"), returns


def _constant(value: Any) -> str:
    """Say what a constant is: the words of a table, or what an experiment calls itself."""
    if isinstance(value, dict):
        return "A table with " + ", ".join(f"``{key}``" for key in value) + "."
    if isinstance(value, tuple | list | frozenset | str | float | int):
        return f"``{value!r}``."
    title = getattr(value, "title", None)
    return f"{title}." if isinstance(title, str) else f"A value of ``{type(value).__name__}``."
