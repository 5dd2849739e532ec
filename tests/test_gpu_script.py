"""``benchmarks/gpu.py``, which is for a GPU that is lent for minutes, runs on a CPU at a small size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("correctness", "speed", "theory")

pytestmark = pytest.mark.compiled


def _run(*arguments: object, data: str | None = None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("FALIGN_TYPECHECK", "FALIGN_DATA")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | ({"FALIGN_DATA": data} if data else {})
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)


def _rows(folder: Path) -> dict[str, list[dict]]:
    return {stage: json.loads((folder / f"{stage}.json").read_text())["rows"] for stage in STAGES}


def test_a_small_run_holds_and_gives_its_page(tmp_path):
    done = _run("--device", "cpu", "--small", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = _rows(tmp_path / "out")
    every = [row for stage in STAGES for row in rows[stage]]
    assert not [row for row in every if "error" in row or "left_out" in row]
    assert all(row["holds"] for row in rows["correctness"])
    assert all(row.get("holds", True) for row in rows["speed"])
    assert {row["group"] for row in rows["speed"]} == {"ceilings", "mlp", "transformer", "resnet18"}
    assert all(row["finite"] for row in rows["theory"])
    page = tmp_path / "docs" / "gpu.md"
    assert _run("--out", tmp_path / "out", "--page", page).returncode == 0
    text = page.read_text()
    assert text.startswith("# On a GPU\n")
    assert all(f"\n## {part}\n" in text for part in ("Correctness", "Time and memory of a step"))
    assert "fails" not in text
    assert _run("--out", tmp_path / "out", "--page", page).returncode == 0
    assert page.read_text() == text


def test_without_time_all_is_left_out_and_said_so(tmp_path):
    done = _run("--device", "cpu", "--small", "--budget", 0, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = _rows(tmp_path)
    assert all(rows.values())
    assert all(row["left_out"] for own in rows.values() for row in own)
    page = tmp_path / "gpu.md"
    assert _run("--out", tmp_path, "--page", page).returncode == 0
    assert "## What failed or was left out" in page.read_text()


@pytest.mark.slow
@pytest.mark.skipif("FALIGN_DATA" not in os.environ, reason="FALIGN_DATA names no folder with mnist-10k")
def test_trainings_and_a_paper_are_the_same_again(tmp_path):
    done = _run("--device", "cpu", "--small", "--stages", 4, "--out", tmp_path, data=os.environ.get("FALIGN_DATA"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "laboratory.json").read_text())["rows"]
    assert {row["group"] for row in rows} == {"training", "papers"}
    assert all(row["holds"] for row in rows)
    page = tmp_path / "gpu.md"
    assert _run("--out", tmp_path, "--stages", 4, "--page", page).returncode == 0
    assert "\n## The laboratory\n" in page.read_text()
