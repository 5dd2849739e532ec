"""What measures and trains uses the core by its functions: it reads and writes none of the core's private state."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import falign

SOURCE = Path(falign.__file__).parent
OUTER = [*(SOURCE / "measure").rglob("*.py"), *(SOURCE / "lab").rglob("*.py"), *(SOURCE / "init").rglob("*.py")]
CORE = [*SOURCE.glob("*.py"), *(SOURCE / "rules").glob("*.py")]
CORE = [file for file in CORE if file.name not in ("cli.py", "_commands.py", "_commands_of_results.py")]
SHARED = {"_modules", "_parameters", "_buffers", "_apply"}
"""PyTorch's own, which the core overrides or reads as everybody does."""


def attributes(file: Path) -> Iterator[ast.Attribute]:
    return (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute))


def is_self(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id in ("self", "cls")) or (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    )


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@cache
def private_names_of_the_core() -> set[str]:
    names = {node.attr for file in CORE for node in attributes(file) if is_self(node.value)}
    for file in CORE:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                names |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    return {name for name in names if private(name)} - SHARED


def state_names_of_the_core() -> set[str]:
    """Attributes of what a thread's passes keep: ``wiring.state``."""
    from falign._wiring import ThreadState

    return set(vars(ThreadState()))


@pytest.mark.parametrize("file", OUTER, ids=lambda file: file.relative_to(SOURCE).as_posix())
def test_no_module_above_the_core_touches_its_private_state(file: Path) -> None:
    names = private_names_of_the_core()
    assert {"_advances", "_uncut", "_note_backwards"} <= names, "the test sees what is private"
    touched = [node.attr for node in attributes(file) if node.attr in names and not is_self(node.value)]
    assert not touched
    states = [node for node in attributes(file) if isinstance(node.value, ast.Attribute) and node.value.attr == "state"]
    assert not [node.attr for node in states if node.attr in state_names_of_the_core()]
    assert not [node.attr for node in attributes(file) if node.attr == "state" and ast.unparse(node.value) == "wiring"]
    texts = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
    assert "_falign" not in texts, "where the core keeps the wiring of a model"
    written = [
        target
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute)
        and not is_self(target.value)
        and ("wiring" in ast.unparse(target) or "part." in ast.unparse(target))
    ]
    assert not written


def test_rules_stand_below_what_delivers() -> None:
    """Also in annotations: a rule sees a layer by the protocol ``LayerState``."""
    below = {"falign._scratch", "falign.rules"}
    for file in (SOURCE / "rules").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("falign"):
                assert node.module in below or node.module.startswith("falign.rules."), (file, node.module)
