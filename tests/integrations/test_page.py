"""Every block of docs/integrations.md runs as it is printed, section by section."""

import importlib
import re
from pathlib import Path

import pytest

from forks import run_each

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
NEEDS = {
    "Lightning": ("lightning", "polars"),
    "Transformers": ("transformers", "accelerate"),
    "Accelerate": ("accelerate",),
    "Loggers": ("tensorboard", "mlflow", "wandb"),
}

pytestmark = [
    pytest.mark.unchecked,
    pytest.mark.xdist_group("transformers"),
    pytest.mark.filterwarnings(
        "ignore:The 'train_dataloader' does not have many workers",
        "ignore:The number of training batches",
        "ignore:.*LeafSpec.*is deprecated",
        "ignore:Checkpoint directory .* exists",
    ),
]


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.skipif(not PAGE.exists(), reason="the docs are not beside the tests")
@pytest.mark.parametrize("section", NEEDS)
def test_a_section_runs_as_it_is_printed(section, tmp_path, monkeypatch, capsys):
    for package in NEEDS[section]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    for name, value in {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_SILENT", "true")
    if section == "Loggers":
        importlib.import_module("wandb").teardown()  # it keeps the working folder of another test
    head, *sections = PAGE.read_text().split("\n## ")
    (text,) = (each for each in sections if each.startswith(f"{section}\n"))
    assert blocks(text)
    names: dict[str, object] = {"__name__": "page"}
    for code in (*blocks(head), *blocks(text)):
        exec(compile(code, str(PAGE), "exec"), names)
    written = {path.name for path in tmp_path.iterdir()}
    expected = {
        "Lightning": {"digits.ckpt"},
        "Transformers": {"usf", "ln_f", "logits", "bert"},
        "Accelerate": {"accelerated"},
        "Loggers": {"events", "mlruns", "wandb"},
    }
    assert expected[section] <= written


def test_nothing_is_imported_before_it_is_asked_for_and_what_lacks_is_named(tmp_path):
    script = """
import sys
import falign
import falign.integrations as integrations

for package in ("lightning", "transformers", "accelerate", "mlflow", "wandb", "duckdb", "nicegui", "tensorboard"):
    assert package not in sys.modules, package
    sys.modules[package] = None
for make, extra in ((integrations.lightning_callback, "lightning"), (integrations.transformers_callback, "hf")):
    try:
        make()
    except ImportError as error:
        print(error)
"""
    (done,) = run_each([script], tmp_path)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        'the package lightning is not installed: pip install "falign[lightning]"',
        'the package transformers is not installed: pip install "falign[hf]"',
    ]


@pytest.mark.skipif(not PAGE.exists(), reason="the docs are not beside the tests")
def test_no_section_with_code_is_forgotten():
    sections = PAGE.read_text().split("\n## ")[1:]
    assert {each.partition("\n")[0] for each in sections if blocks(each)} == set(NEEDS)
