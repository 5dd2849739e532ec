"""Examples of the README and of the docs run as they are printed."""

import re
from pathlib import Path

import pytest

from forks import run_each

README = Path(__file__).parents[1] / "README.md"
PAGES = (
    "two_layer.md",
    "deep_linear.md",
    "factorisation.md",
    "laboratory.md",
    "measuring.md",
    "architectures.md",
    "reach.md",
    "transformers.md",
)


def examples(path: Path) -> list[str]:
    """Code of a page."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests")
def test_examples_run_as_they_are_printed(tmp_path):
    """The README's first one, and of every page of the docs all in a row."""
    pages = [path for path in (README.parent / "docs" / name for name in PAGES) if path.exists()]
    scripts = [examples(README)[0], *("\n".join(examples(path)) for path in pages)]
    first, *others = run_each(scripts, tmp_path)
    assert first.returncode == 0, first.stderr
    accuracy = {rule: float(value) for rule, value in re.findall(r"(\w+): test accuracy ([\d.]+)", first.stdout)}
    assert accuracy.keys() == {"bp", "fa"}
    assert min(accuracy.values()) > 0.88
    assert "rule fa: loss" in first.stdout
    for path, done in zip(pages, others, strict=True):
        assert done.returncode == 0, f"{path}: {done.stderr}"
        if path.name == "measuring.md":
            assert "holds (2 layers of 2 checked" in done.stdout


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests")
def test_example_of_the_theory(capsys):
    (example,) = (each for each in examples(README) if "learning_time" in each)
    exec(example, {})
    assert re.findall(r"\d+\.\d{2}", capsys.readouterr().out)[:3] == ["20.82", "9.33", "7.12"]


def test_every_rule_stands_in_the_table():
    import falign

    assert all(f"| `{name}` |" in README.read_text() for name in falign.ALL_RULES)
