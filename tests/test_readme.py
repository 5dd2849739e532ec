"""The README's first example runs as it is printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests")
def test_first_example(tmp_path):
    text = README.read_text()
    example = tmp_path / "example.py"
    example.write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    clean = {name: value for name, value in os.environ.items() if name != "FALIGN_TYPECHECK"}
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, env=clean, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"test accuracy ([\d.]+)", done.stdout)[1])
    assert accuracy > 0.88
    assert "rule fa: loss" in done.stdout
    assert "holds (2 layers of 2 checked" in done.stdout


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests")
def test_example_of_the_theory(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "learning_time" in block)
    exec(example, {})
    assert re.findall(r"\d+\.\d{2}", capsys.readouterr().out)[:3] == ["20.82", "9.33", "7.12"]


def test_every_rule_stands_in_the_table():
    import falign

    assert all(f"| `{name}` |" in README.read_text() for name in falign.ALL_RULES)


@pytest.mark.parametrize(
    "page", ["two_layer.md", "deep_linear.md", "factorisation.md", "laboratory.md", "measuring.md"]
)
def test_examples_of_the_docs(page, tmp_path):
    path = README.parent / "docs" / page
    if not path.exists():
        pytest.skip("the docs are not beside the tests")
    example = tmp_path / "example.py"
    example.write_text("\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)))
    clean = {name: value for name, value in os.environ.items() if name != "FALIGN_TYPECHECK"}
    done = subprocess.run(
        [sys.executable, "-W", "error", example], capture_output=True, text=True, env=clean, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
