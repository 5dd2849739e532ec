"""Every command on words that nobody would write: an exit code that is documented, one sentence, nothing outside."""

import contextlib
import io
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from falign import papers
from falign.cli import main
from falign.lab import _ending
from falign.lab._files import RunError
from falign.lab._streams import plain
from falign.lab.config import TrainConfig, option
from falign.lab.data import DataError, _loading
from falign.lab.experiment import Experiment, Outcome, Paper, Setting, Task, _ray, grid

LAST = 20.0
"""Seconds that a command may take here at most; nearly all take less than a tenth of one."""

NUMBERS = (
    *("0", "-0", "1", "2", "-1", "0.5", "1e-320", "1e39", "1e308", "1e999", "nan", "-nan", "inf", "-inf", "Infinity"),
    *("9" * 400, f"-{'9' * 400}", f"0.{'0' * 400}1", "1" * 5000, "2147483648", "9223372036854775808", "0x10", "1_000"),
    *("1,5", "٣", "½", "1e", "+1", "1.0", "1.5", "None", "True", " 1", "1 "),
)
TEXTS = (
    *(
        "",
        " ",
        "-",
        "--",
        "---",
        "=",
        "a=b",
        "@file",
        "[red]x[/red]",
        "[/x]",
        ":smile:",
        "%s",
        "{}",
        "\\",
        "'",
        '"',
        "`",
    ),
    *(
        "\x1b[31m",
        "\x1b]0;t\x07",
        "\r\n",
        "\n",
        "\t",
        "\x7f",
        "\x85",
        "\u202e",
        "\u2028",
        "\ufeff",
        "λ",
        "💥",
        "é" * 200,
    ),
    *("\udcff", "M\udcfcller", "\ud800", "\0", "a\0b", "a" * 256, "a" * 5000, "b" * 100_000, "a/" * 3000, "语" * 90),
    *(
        ".",
        "..",
        "nothing",
        "file",
        "file/x",
        "folder",
        "loop",
        "loop/x",
        "dangling",
        "fifo",
        "/dev/null",
        "/dev/null/x",
    ),
    *("/proc/self/mem/x", "~", "~nobody/x", "a.png", "x.PNG", ".png", "file.png/x", "run", "run/config.json", "store"),
    *(
        "digits",
        "mnist",
        "lenet",
        "resnet20",
        "mlp:64-8-10",
        "mlp:",
        "mlp:64--10",
        "mlp:64-99999999999999-10",
        "mlp:-1",
    ),
    *(
        f"mlp:64-{'9' * 400}-10",
        "mlp:64-0-10",
        "mlp:64-٣-10",
        "os:abort",
        "sys:exit",
        "json:loads",
        ":",
        "a:",
        ":b",
        "a.b:c",
    ),
    *(
        "..:x",
        "torch.nn:Linear",
        "toy",
        "toy.one",
        "toy.two",
        "TOY",
        "smoke",
        "quick",
        "paper",
        "cpu",
        "cuda",
        "cuda:99",
    ),
    *(
        "cuda:-1",
        "meta",
        "mps",
        "auto",
        "sgd",
        "adam",
        "dfa",
        "bp",
        "drtp",
        "adafa",
        "normal",
        "low-rank(0)",
        "low-rank(1e9)",
    ),
    *(f"low-rank({'9' * 400})", "sparse(-1)", "sparse()", "low-rank", "softmax", "float64", "bf16", "cutoff", "tanh"),
)
NAMED = {
    "train": [
        "--data",
        "--out",
        "--resume",
        "--trust",
        "--force",
        *(option(each.name) for each in fields(TrainConfig)),
    ],
    "compare": ["--out", "--csv"],
    "list": ["--csv"],
    "reproduce": [
        "--preset",
        "--only",
        "--seeds",
        "--out",
        "--data",
        "--workers",
        "--memory",
        "--device",
        "--cpus-per-run",
        "--gpus-per-run",
    ],
    "status": ["--preset", "--out", "--csv"],
    "report": ["--preset", "--out"],
    "doctor": ["--data", "--out", "--json"],
}
BEGUN: dict[str, list[str]] = {
    "train": ["digits", "--model", "mlp:64-8-10", "--epochs", "0"],
    "compare": ["run"],
    "list": [],
    "reproduce": ["toy.one", "--preset", "smoke", "--out", "store"],
    "status": ["--out", "store"],
    "report": ["--out", "store"],
    "doctor": [],
}


def words(draw: random.Random) -> list[str]:
    """A command that would be right, and one to four changes of its words."""
    command = draw.choice([*NAMED, "train", "train", "reproduce"])
    made = [command, *BEGUN[command]]
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4))):
        value = draw.choice(draw.choice((NUMBERS, TEXTS)))
        known = draw.choice(NAMED[command] or ["--help"])
        name = draw.choice(
            (known, known, known, known[: draw.randrange(2, len(known))], f"--no-{known[2:]}", f"--{value}")
        )
        at = draw.randrange(len(made) + 1)
        kind = draw.randrange(8)
        if kind == 0:
            made.append(f"{name}={value}")
        elif kind == 1:
            made.append(name)
        elif kind == 2 and at < len(made):
            made[at] = value
        elif kind == 3:
            made.insert(at, value)
        elif kind == 4 and at < len(made):
            made.pop(at)
        elif kind == 5:
            made.append(
                draw.choice(("-h", "--help", "--version", "--", "--config", "-x", "-vvv", "--help=1", "@nothing"))
            )
        else:
            made += [name, value]
    return made


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder inside a folder, with all that may stand in the way; no network, no cluster, no other process."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FALIGN_DATA", raising=False)
    monkeypatch.setattr(_ending, "draw", lambda *_: None)
    monkeypatch.setattr(_loading, "fetch", _no_network)
    monkeypatch.setattr(_ray.RayExecutor, "__enter__", _no_cluster)
    monkeypatch.setattr(papers, "PAPERS", {"toy": _toy()})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["train", "digits", "--model", "mlp:64-8-10", "--epochs", "1", "--out", "run"]) == 0
    assert main(["reproduce", "toy.one", "--preset", "smoke", "--out", "store"]) == 0
    Path("folder").mkdir()
    Path("folder/mine").touch()
    Path("file").touch()
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("gone/too")
    if hasattr(os, "mkfifo"):
        os.mkfifo("fifo")
    yield tmp_path
    torch.set_num_threads(threads)


def _no_network(*_: Any, **__: Any) -> Path:
    raise DataError("mnist could not be downloaded, expected a network: connect to it")


def _no_cluster(*_: Any) -> None:
    raise RunError("--ray is an address where no cluster is: start one")


def _run(tasks: list[Task], setting: Setting) -> list[Outcome]:
    return [Outcome(records={"x": [1.0]}) for _ in tasks]


def _toy() -> Paper:
    sizes = dict.fromkeys(("smoke", "quick", "paper"), grid(rate=(0.1, 0.2)))
    one = Experiment(
        name="toy.one",
        title="ones",
        source="here",
        grid=sizes,
        seeds=dict.fromkeys(sizes, 1),
        run=_run,  # pyright: ignore[reportArgumentType]
        together=(),
        claims=(),
        revision=1,
    )
    return Paper(name="toy", title="Toys", authors="A", venue="V", address="https://example.org", experiments=(one,))


def verdict(tokens: list[str]) -> str | None:
    """What is wrong with how a command ended; None if nothing."""
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(tokens)
        except BaseException as error:
            return f"raised {type(error).__name__}: {str(error)[:300]}"
    said = err.getvalue()
    if time.monotonic() - began > LAST:
        return f"took {time.monotonic() - began:.0f} s"
    if code not in (0, 1, 2):
        return f"ended with {code}"
    if "Traceback" in said + out.getvalue():
        return "printed a traceback"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202e]", said + out.getvalue()):
        return f"printed a control character: {said[-300:]!r}"
    if code != 2:
        return None
    if not said.startswith("falign: ") or len(said) > 4000:
        return f"said {said[:300]!r}, {len(said)} letters"
    if len(said.strip().splitlines()) > 1 and "cannot be converted" not in said:
        return f"said more than a line: {said[:300]!r}"
    named = re.search(r"--[a-z]|NAME|RUNS|DATASET|command|argument|run folders|feedback family|data folder", said)
    if not named and not any(_echo(word) in said for word in tokens if word):
        return f"named nothing: {said!r}"
    return None


def _echo(word: str) -> str:
    """How the beginning of a word is shown."""
    return plain(word)[:90].replace("\r", "\\r").replace("\n", "\\n")


@pytest.mark.parametrize("count", [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_no_words_end_a_command_badly(place: Path, count: int) -> None:
    @settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(st.randoms(use_true_random=False).map(words))
    def every(tokens: list[str]) -> None:
        assert verdict(tokens) is None

    every()
    outside = {path.name for path in (*place.iterdir(), *(place / "outer").iterdir())}
    assert outside <= {"outer", "inner", "cache", "a.png"}, "nothing is written where nobody asked for it"
    assert sorted(path.name for path in Path("folder").iterdir()) == ["mine"]


NO_PATHS = st.text(st.characters(exclude_characters="/"))
"""The tests may run as one who may write anywhere."""
WORDS = NO_PATHS | st.sampled_from([*TEXTS, *NUMBERS, *NAMED, *(name for names in NAMED.values() for name in names)])


@pytest.mark.parametrize("count", [100, pytest.param(4000, marks=pytest.mark.slow)])
def test_nor_do_words_of_any_letters(place: Path, count: int) -> None:
    @settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(st.sampled_from(list(NAMED)), st.lists(WORDS, max_size=6), st.booleans())
    def every(command: str, rest: list[str], begun: bool) -> None:
        assert verdict([command, *(BEGUN[command] if begun else ()), *rest]) is None

    every()
