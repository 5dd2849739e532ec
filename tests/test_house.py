"""The house: sizes of files, what is public, and that all that is public is explained."""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

import falign

SOURCES = Path(falign.__file__).parent
FROZEN = Path(__file__).with_name("public_names.txt")
QUESTIONS = ("What", "Whether", "How", "Where", "Which", "That", "Why", "Who", "When", "If")
"""Words that open no docstring: it begins with what a thing is or does."""
FILES, LINES = 270, 600
MANY = 5
"""Arguments of a function, from which on each is explained by itself."""


def modules() -> dict[str, Path]:
    """Every module of the package, by its name."""
    named = {}
    for path in sorted(SOURCES.rglob("*.py")):
        parts = [SOURCES.name, *path.relative_to(SOURCES).with_suffix("").parts]
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


MODULES = modules()
PUBLIC = [name for name in MODULES if not any(part.startswith("_") for part in name.split("."))]


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def exported(name: str) -> list[str]:
    return sorted(getattr(importlib.import_module(name), "__all__", ()))


def surface() -> str:
    return "".join(f"{name}: {' '.join(exported(name))}\n" for name in PUBLIC if exported(name))


def functions_of(value: object) -> list[tuple[str, object]]:
    """A public function, or the public methods of a public class that are its own."""
    if inspect.isfunction(value):
        return [("", value)]
    if inspect.isclass(value) and value.__module__.startswith("falign"):
        return [
            (f".{name}", member)
            for name, member in vars(value).items()
            if inspect.isfunction(member)
            and not name.startswith("_")
            and member.__qualname__ == f"{value.__qualname__}.{name}"
            if not any(name in vars(base) for base in value.__mro__[1:])  # explained where it comes from
        ]
    return []


def documented() -> list[tuple[str, object]]:
    """Every public function, method and class, once, by the first public path to it."""
    seen: dict[int, tuple[str, object]] = {}
    for name in PUBLIC:
        for each in exported(name):
            value = getattr(importlib.import_module(name), each)
            if not callable(value) or not getattr(value, "__module__", "").startswith("falign"):
                continue
            value = inspect.unwrap(value)
            if inspect.isclass(value):
                seen.setdefault(id(value), (f"{name}.{each}", value))
            for suffix, function in functions_of(value):
                seen.setdefault(id(function), (f"{name}.{each}{suffix}", inspect.unwrap(function)))
    return list(seen.values())


def test_files_are_few_and_of_a_size_to_read():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert len(lines) <= FILES
    assert {name: count for name, count in lines.items() if count > LINES} == {}


def test_what_is_public_is_in_all_and_the_rest_has_an_underscore():
    """Of a module without an underscore: a name that it defines is in ``__all__``, or begins with an underscore."""
    neither = {}
    for name in PUBLIC:
        defined = set()
        for node in tree(name).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                defined |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        neither[name] = {each for each in defined if not each.startswith("_")} - set(exported(name))
    assert {name: names for name, names in neither.items() if names} == {}


def test_the_public_names_are_the_frozen_ones():
    """A name that comes or goes is a decision: ``python tests/test_house.py`` writes the list anew."""
    assert surface() == FROZEN.read_text(encoding="utf-8")


def test_docstrings_open_with_a_verb_or_a_noun():
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    asking = []
    for name in MODULES:
        for node in ast.walk(tree(name)):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and re.match(rf"({'|'.join(QUESTIONS)})\b", text):
                asking.append(f"{name}: {text.splitlines()[0]}")
    assert asking == []


@pytest.mark.parametrize(("path", "value"), documented(), ids=lambda each: each if isinstance(each, str) else "")
def test_all_that_is_public_is_explained(path, value):
    """A sentence; many arguments one by one; the shape of every tensor; what is raised and, for theory, the source."""
    text = inspect.getdoc(value)
    assert text, f"{path} has no docstring"
    assert text.split("\n\n")[0].rstrip().endswith((".", ":")), f"{path}: it begins with no sentence"
    source = "Source" in text or "Source" in (sys.modules[value.__module__].__doc__ or "")
    if inspect.isclass(value):
        assert source or not issubclass(value, falign.Rule) or value is falign.Rule, f"{path}: no source"
        return
    signature = inspect.signature(value)
    parameters = [each for name, each in signature.parameters.items() if name not in ("self", "cls")]
    if len(parameters) >= MANY:
        assert "Args:" in text, f"{path}: its {len(parameters)} arguments are not explained"
    bare = [each.name for each in parameters if re.fullmatch(r"(torch\.)?Tensor( \| None)?", str(each.annotation))]
    said = all(re.search(rf"\b{name}\b[^.]*(\([\w.*, …]+\)|shape|scalar|size)", text) for name in bare)
    assert said, f"{path}: neither the annotation nor the docstring says the shapes of {bare}"
    body = ast.parse(textwrap.dedent(inspect.getsource(value)))
    if any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(body)):
        assert "Raises:" in text, f"{path}: it does not say what it raises"
    if "TheoremCheck" in str(signature.return_annotation):
        assert source, f"{path}: no source"


@pytest.mark.xdist_group("house")
def test_groups_are_seen_where_tests_are_spread_over_processes(request: pytest.FixtureRequest):
    """Where they are not, nothing fails, but every process makes what a group's tests should share."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@house")


if __name__ == "__main__":
    FROZEN.write_text(surface(), encoding="utf-8")
