"""A run folder names code: what the run began with here is run, all else must be allowed."""

import io
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from falign.cli import main
from falign.lab import _ending
from falign.lab._run_folder import RunFolder
from falign.lab._trust import RECORDED, foreign

MODEL = """
from pathlib import Path
from torch import nn

Path("ran").touch()

def net(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, classes))
"""


def record(*files: Path) -> dict[str, str]:
    return {str(file.resolve()): sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_ending, "draw", lambda *_: None)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("shapes_of_"):
            del sys.modules[name]


def begun(model: str, *files: Path) -> Path:
    """A run folder that was begun with an own model, as it is on the disk after the process has ended."""
    assert main(["train", "digits", "--model", model, "--epochs", "1", "--out", "run"]) == 0
    origin = RunFolder(Path("run")).read_config()[1]
    assert origin[RECORDED] == record(*files)
    for name in [name for name in sys.modules if name.startswith("shapes_of_")]:
        del sys.modules[name]
    Path("ran").unlink()
    return Path("run")


def go_on(capsys: pytest.CaptureFixture[str], *words: str, folder: str = "run") -> tuple[int, str]:
    capsys.readouterr()
    code = main(["train", "--resume", folder, *words])
    return code, capsys.readouterr().err


def test_what_a_run_began_with_here_is_run_without_a_question(capsys: pytest.CaptureFixture[str]) -> None:
    Path("shapes_of_one.py").write_text(MODEL)
    begun("shapes_of_one:net", Path("shapes_of_one.py"))
    assert go_on(capsys, "--epochs", "2") == (0, "")
    assert Path("ran").exists()


def test_a_package_whose_factory_stands_in_a_file_inside(capsys: pytest.CaptureFixture[str]) -> None:
    inner = Path("shapes_of_two/nets/flat.py")
    inner.parent.mkdir(parents=True)
    inner.write_text(MODEL)
    packages = Path("shapes_of_two/__init__.py"), Path("shapes_of_two/nets/__init__.py")
    packages[0].touch()
    packages[1].write_text("from shapes_of_two.nets.flat import net\n")
    begun("shapes_of_two.nets:net", *packages, inner)
    assert go_on(capsys, "--epochs", "2") == (0, "")
    Path("ran").unlink()
    for package in packages:
        before = package.read_text()
        package.write_text(f"{before}\n# runs before the factory is there\n")
        assert f"{package} is not what it was when the run began" in go_on(capsys)[1]
        package.write_text(before)
    assert not Path("ran").exists()


def test_a_module_that_takes_its_factory_from_another(capsys: pytest.CaptureFixture[str]) -> None:
    Path("shapes_of_eight.py").write_text(MODEL)
    Path("shapes_of_nine.py").write_text("from shapes_of_eight import net\n")
    begun("shapes_of_nine:net", Path("shapes_of_nine.py"), Path("shapes_of_eight.py"))
    assert go_on(capsys, "--epochs", "2") == (0, "")
    Path("shapes_of_nine.py").write_text("from shapes_of_eight import net  # and more\n")
    assert "shapes_of_nine.py is not what it was" in go_on(capsys)[1]


def test_code_from_elsewhere_is_not_run_unless_it_is_allowed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine").mkdir()
    monkeypatch.chdir("mine")
    Path("shapes_of_three.py").write_text(MODEL)
    begun("shapes_of_three:net", Path("shapes_of_three.py"))
    monkeypatch.chdir("..")
    shutil.move("mine", "theirs")  # as an archive is unpacked on another machine
    monkeypatch.chdir("theirs")
    code, said = go_on(capsys)
    assert code == 2
    assert "run names code to run, shapes_of_three:net, but the file that the run began with, " in said
    assert "/mine/shapes_of_three.py, is not here: read it, and if it may run add --trust" in said
    assert len(said.splitlines()) == 1
    assert not Path("ran").exists()
    assert go_on(capsys, "--trust", "--epochs", "2") == (0, "")
    assert Path("ran").exists()


def test_code_that_was_changed_is_asked_for_at_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path("shapes_of_four.py")
    file.write_text(MODEL)
    begun("shapes_of_four:net", file)
    file.write_text(f"{MODEL}\n# mended\n")
    assert "shapes_of_four.py is not what it was when the run began" in go_on(capsys)[1]
    for answer, expected in (("\n", 2), ("", 2), ("no\n", 2), ("y\n", 0)):
        stdin = io.StringIO(answer)
        stdin.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", stdin)
        code, said = go_on(capsys)
        assert code == expected, said
        assert "Run it? [y/N] " in said
        assert Path("ran").exists() == (expected == 0)


def test_a_forged_record_does_not_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever makes a folder can seal it, and knows files that are on every machine."""
    Path("shapes_of_five.py").write_text(MODEL)
    folder = begun("shapes_of_five:net", Path("shapes_of_five.py"))
    run = RunFolder(folder)
    config, origin = run.read_config()
    library = Path(os.__file__)
    run.write_config(config, {**origin, RECORDED: record(library)})
    code, said = go_on(capsys)
    assert (code, Path("ran").exists()) == (2, False)
    assert "shapes_of_five.py, with which the run did not begin" in said
    run.write_config(replace(config, model="os:abort"), {**origin, RECORDED: record(Path("shapes_of_five.py"))})
    assert go_on(capsys)[0] == 2
    run.write_config(replace(config, model="shapes\nof:five"), {**origin, RECORDED: record(Path("shapes_of_five.py"))})
    assert r"names code to run, shapes\nof:five, but" in go_on(capsys)[1]
    for wrong in (None, [], "file", {}, {"shapes_of_five.py": 3}, {"a\0b": "a"}, {str(library): "a"}):
        run.write_config(config, {**origin, RECORDED: wrong})
        assert go_on(capsys)[0] == 2
        assert not Path("ran").exists()


@pytest.mark.parametrize(
    "model", ["sys:exit", "posix:abort", "nothing_here:net", "os.path.x:y", "__main__:main", "a.b.c:d"]
)
def test_what_no_file_holds_is_foreign(model: str) -> None:
    assert "an import finds" in (foreign(model, record(Path(__file__))) or "")


def test_finding_a_module_runs_nothing() -> None:
    package = Path("shapes_of_six")
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemError('run')")
    (package / "net.py").write_text("raise SystemError('run')")
    assert foreign("shapes_of_six.net:net", record(package / "net.py", package / "__init__.py")) is None
    assert "__init__.py, with which" in (foreign("shapes_of_six.net:net", record(package / "net.py")) or "")
    other = Path("shapes_of_seven/inner")
    other.mkdir(parents=True)
    (other / "net.py").write_text(MODEL)
    assert foreign("shapes_of_seven.inner.net:net", record(other / "net.py")) in (
        None,
        "an import finds another module, with which the run did not begin",
    )
    assert not [name for name in sys.modules if name.startswith("shapes_of_")]


def test_networks_of_falign_are_never_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", "--model", "mlp:64-8-10", "--epochs", "1", "--out", "run"]) == 0
    assert go_on(capsys, "--epochs", "2") == (0, "")
