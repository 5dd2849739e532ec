"""``falign doctor``: what is here, what is not, and what to do about it."""

import json
import os
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import falign
from falign.cli import main
from falign.lab import _doctor, _requirements
from falign.lab._requirements import Requirement
from falign.lab.experiment._store import Store


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FALIGN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[tuple[str, str], dict]]:
    """The exit code, and {(topic, name): finding}."""
    code = main(["doctor", "--json", *words])
    said = json.loads(capsys.readouterr().out)
    assert said["healthy"] == (code == 0)
    return code, {(each["topic"], each["name"]): each for each in said["findings"]}


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = asked(capsys)
    assert code == 0, found
    assert found["Packages", "falign"]["text"].startswith(falign.__version__)
    assert found["Packages", "torch"]["text"].startswith("2.")
    for name in ("numpy", "polars", "cyclopts", "pillow", "scikit-learn", "safetensors", "filelock"):
        assert found["Packages", name]["text"][0].isdigit()
    assert found["Machine", "memory"]["text"].endswith(" GiB")
    assert "PyTorch computes with" in found["Machine", "threads"]["text"]
    assert "digits.csv.gz" in found["Data sets", "digits"]["text"]
    assert "on first use" in found["Data sets", "mnist"]["text"]
    assert "never downloaded" in found["Data sets", "mnist-10k"]["text"]
    assert "not set" in found["Folders", "FALIGN_DATA"]["text"]
    assert "free, no results yet" in found["Folders", "results"]["text"]
    assert list(Path.cwd().iterdir()) == [], "nothing is made"
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert said.endswith("all that is needed is here\n")


def test_data_that_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        Path(f"data/mnist/{name}-ubyte").parent.mkdir(parents=True, exist_ok=True)
        Path(f"data/mnist/{name}-ubyte").write_bytes(bytes(1024))
    code, found = asked(capsys, "--data", "data")
    assert code == 0
    assert found["Data sets", "mnist"]["text"] == "data/mnist, 4.0 KiB"
    assert found["Folders", "--data"]["text"] == "data, 4 files, 4.0 KiB"


def test_packages_that_are_missing_too_old_or_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for = [("rich", "lab", ">=99", "13.9", False), ("polars", "lab", ">=1", None, False)]
    asked_for += [
        ("ray", "ray", ">=2", None, False),
        ("numpy", "", ">=1", "2.0", True),
        ("tomllib2", "lab", "", "1", True),
    ]
    made = tuple(Requirement(package=a, extra=b, wanted=c, installed=d, fits=e) for a, b, c, d, e in asked_for)
    monkeypatch.setattr(_doctor, "requirements", lambda: made)
    code, found = asked(capsys)
    assert code == 1
    upgrade = 'pip install --upgrade "falign[lab]"'
    assert found["Packages", "rich"]["text"] == f"13.9, expected >=99: {upgrade}"
    assert found["Packages", "polars"]["text"] == f"missing: {upgrade}"
    assert found["Packages", "ray"]["text"] == 'missing, only needed for --ray: pip install --upgrade "falign[ray]"'
    assert (
        "cannot be imported (ModuleNotFoundError: No module named 'tomllib2')" in found["Packages", "tomllib2"]["text"]
    )
    broken = {name for (_, name), each in found.items() if each["broken"]}
    assert broken == {"rich", "polars", "tomllib2"}
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "! rich" in said
    assert said.endswith("broken: rich, polars, tomllib2\n")


def test_folders_that_cannot_be_used(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("thesis").mkdir()
    Path("thesis/thesis.tex").touch()
    Path("file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setenv("FALIGN_DATA", "nowhere")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "shut")
    Path("shut").mkdir()
    Path("runs").symlink_to("shut")
    code, found = asked(capsys, "--out", "thesis")
    assert code == 1
    assert found["Folders", "cache"]["text"] == "/dev/null/falign cannot be made: /dev/null is no folder"
    assert found["Folders", "FALIGN_DATA"]["text"] == "nowhere, is no folder: correct its path"
    assert "thesis is an output folder that is not ours" in found["Folders", "results"]["text"]
    assert not found["Folders", "runs"]["broken"]
    Path("runs").unlink()
    Path("shut").rename("runs")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "runs")
    assert "cannot be written: make runs writable" in asked(capsys)[1]["Folders", "runs"]["text"]


def test_what_killed_processes_left_and_what_living_ones_hold(capsys: pytest.CaptureFixture[str]) -> None:
    Store(folder=Path("results")).open(create=True)
    for path in ("results/leases/1-a.lock", "results/toy.one/a.parquet.corrupt", "runs/a/.config.json.partial-12"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    for number in range(7):
        Path(f"results/toy.one/.b.partial-{number}").touch()
    Path("cache/falign/mnist/.partial-x").mkdir(parents=True)
    Path("cache/falign/mnist/.partial-x/mnist.gz").write_bytes(bytes(1500))
    Path("runs/b").mkdir()
    with FileLock("runs/b/.lock"):
        Path("runs/b/.status.json.partial-1").touch()
        assert main(["doctor"]) == 0
        said = capsys.readouterr().out
    left = said[said.index("Left behind") :]
    for part in ("1-a.lock", "a.parquet.corrupt", "hold nothing back", "and 4 more; half-written by a process"):
        assert part in " ".join(left.split())
    assert "runs/b" not in left, "a living process is at work there"
    for path in Path("results/toy.one").glob(".*"):
        path.unlink()
    assert main(["doctor"]) == 0
    assert "runs/b/.status.json.partial-1" in capsys.readouterr().out, "that process has ended"


def test_a_look_that_fails_is_a_finding(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    code, found = asked(capsys)
    assert code == 1
    assert (
        "the package pooch is missing" in found["Folders", "error"]["text"]
        or "pooch" in found["Folders", "error"]["text"]
    )
    assert found["Machine", "cores"]["text"], "the others go on"


def test_names_are_shown_literally(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.fsdecode(b"[red]M\xfcller\x1b[31m"))
    assert main(["doctor", "--data", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "[red]M\\xfcller\\x1b[31m, is no folder" in " ".join(said.split())
    assert main(["doctor", "--json", "--data", str(folder)]) == 1
    assert json.loads(capsys.readouterr().out)["healthy"] is False


def test_requirements_are_those_of_the_installed_package() -> None:
    found = {each.package: each for each in _requirements.requirements()}
    if not found:
        pytest.skip("falign is not installed")
    assert [found[name].extra for name in ("torch", "polars", "ray")] == ["", "lab", "ray"]
    assert all(each.fits for each in found.values() if each.installed)
    assert "pytest" not in found
