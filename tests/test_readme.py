"""Examples of the README and of the docs run as they are printed."""

import ast
import re
from pathlib import Path

import pytest

from forks import run_each

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if "```python" in path.read_text(encoding="utf-8"))

IMPORTS = ("torch", "sklearn.datasets", "falign.measure", "falign.init", "falign.theory.two_layer")
"""Imported once, before any of them runs: most of their time."""


def examples(path: Path) -> list[str]:
    """Code of a page."""
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests")
def test_examples_run_as_they_are_printed(tmp_path):
    """Of the README and of every page of the docs all in a row."""
    scripts = ["\n".join(examples(path)) for path in (README, *PAGES)]
    first, *others = run_each(scripts, tmp_path, imports=IMPORTS)
    assert first.returncode == 0, first.stderr
    accuracy = {rule: float(value) for rule, value in re.findall(r"(\w+): test accuracy ([\d.]+)", first.stdout)}
    assert accuracy.keys() == {"bp", "fa"}
    assert min(accuracy.values()) > 0.88
    assert "rule fa: loss" in first.stdout
    for path, done in zip(PAGES, others, strict=True):
        assert done.returncode == 0, f"{path}: {done.stderr}"


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests")
def test_no_block_of_code_is_left_out():
    """What is Python is marked as such, in a page that is run: no other fence holds any."""
    pages = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")) if path.parent.name != "_generated"]
    blocks = [
        (path, language, text)
        for path in pages
        for language, text in re.findall(
            r"^ *```(\S*)[^\n]*\n(.*?)^ *```", path.read_text(encoding="utf-8"), re.M | re.S
        )
    ]
    run = sum(len(examples(path)) for path in (README, *PAGES))
    assert run == sum(language == "python" for _, language, _ in blocks) >= 40
    assert {language for _, language, _ in blocks} & {"py", "py3", "python3", "pycon", "ipython", "ipython3"} == set()
    hidden = [f"{path.name}: {text}" for path, language, text in blocks if not language and is_python(text)]
    assert hidden == []


def is_python(text: str) -> bool:
    """Whether a text without a language is code all the same: more than a name or a number, and it parses."""
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return False
    return any(not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call) for node in body)


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests")
def test_example_of_the_theory(capsys):
    (example,) = (each for each in examples(README) if "learning_time" in each)
    exec(example, {})
    assert re.findall(r"\d+\.\d{2}", capsys.readouterr().out)[:3] == ["20.82", "9.33", "7.12"]


def test_every_rule_stands_in_the_table():
    import falign

    assert all(f"| `{name}` |" in README.read_text() for name in falign.ALL_RULES)
