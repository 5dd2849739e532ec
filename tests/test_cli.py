"""The command: its help, its exit codes, and one sentence for every wrong argument."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import falign
from falign import _commands
from falign.cli import main
from falign.lab import _ending, _requirements
from falign.lab._learner import SCHEDULES
from falign.lab._models import ACTIVATIONS
from falign.lab._run_folder import RunFolder
from falign.lab._validate import make_rule, resolve
from falign.lab.config import TrainConfig, option
from falign.lab.experiment._store import Store

TRAIN = ["train", "digits", "--model", "mlp:64-16-10"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FALIGN_DATA", raising=False)
    yield
    torch.set_num_threads(before)


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(words)
    said = capsys.readouterr()
    return code, said.out, said.err


WRONG: dict[str, tuple[list[str], list[str]]] = {
    "no command": (["tarin"], ["tarin", "train", "compare", "reproduce"]),
    "no data set": (["train", "--model", "lenet"], ["dataset", "requires an argument"]),
    "no model": (["train", "digits"], ["--model", "requires an argument"]),
    "data set": (["train", "digit", "--model", "lenet"], ["'digit'", "digits", "a path"]),
    "rule": ([*TRAIN, "--rule", "fba"], ["--rule is 'fba'", "bp, fa, dfa, usf, frsf, brsf, drtp, kp, adafa"]),
    "family": ([*TRAIN, "--feedback", "gauss"], ["'gauss'", "normal, uniform, orthogonal, low-rank(RANK)"]),
    "family's number": ([*TRAIN, "--feedback", "sparse"], ["'sparse' needs a number"]),
    "family without effect": (
        [*TRAIN, "--rule", "usf", "--feedback", "normal"],
        ["--feedback", "usf", "leave it out"],
    ),
    "family for bp": ([*TRAIN, "--rule", "bp", "--feedback", "normal"], ["--feedback", "bp", "leave it out"]),
    "scale for bp": ([*TRAIN, "--rule", "bp", "--scale", "2"], ["--scale", "bp", "leave it out"]),
    "scale": ([*TRAIN, "--scale", "0"], ["--scale is 0.0", "positive"]),
    "another rule's option": ([*TRAIN, "--adafa-rate", "0.1"], ["--adafa-rate is for rule adafa", "fa"]),
    "rule's option": (
        [*TRAIN, "--rule", "adafa", "--adafa-rate", "2"],
        ["rate is 2.0", "from 0 (fa) to 1 (bp)"],
    ),
    "rule's word": ([*TRAIN, "--rule", "drtp", "--drtp-output", "x"], ["x", "softmax", "sigmoid", "linear"]),
    "shared family": ([*TRAIN, "--rule", "kp", "--feedback", "shared"], ["--rule kp", "shared"]),
    "model": (["train", "digits", "--model", "alexnet"], ["'alexnet'", "mlp:SIZES, lenet, lenet-average"]),
    "sizes": (["train", "digits", "--model", "mlp:784-16-10"], ["784", "1×8×8 = 64", "use mlp:64-16-10"]),
    "size": (["train", "digits", "--model", "lenet"], ["12×12", "8×8", "use mlp"]),
    "activation": ([*TRAIN, "--activation", "elu"], ["elu", *ACTIVATIONS]),
    "activation without effect": (
        ["train", "digits", "--model", "resnet20", "--activation", "tanh"],
        ["--activation", "resnet20", "leave it out"],
    ),
    "optimizer": ([*TRAIN, "--optimizer", "sdg"], ["sdg", "sgd", "adam", "adamw"]),
    "learning rate": ([*TRAIN, "--lr", "-0.1"], ["--learning-rate is -0.1", "positive"]),
    "infinite learning rate": ([*TRAIN, "--lr", "inf"], ["--learning-rate is inf", "positive"]),
    "learning rate's word": ([*TRAIN, "--lr", "fast"], ["fast", "float"]),
    "rate decay": ([*TRAIN, "--rate-decay", "1.5"], ["--rate-decay is 1.5", "at most 1"]),
    "momentum": ([*TRAIN, "--momentum", "1"], ["--momentum is 1.0", "below 1"]),
    "momentum without effect": ([*TRAIN, "--optimizer", "adam", "--momentum", "0.9"], ["--momentum", "adam"]),
    "weight decay": ([*TRAIN, "--weight-decay", "-1"], ["--weight-decay is -1.0", "at least 0"]),
    "batch size": ([*TRAIN, "--batch-size", "0"], ["--batch-size is 0", "at least 1"]),
    "epochs": ([*TRAIN, "--epochs", "-1"], ["--epochs is -1", "at least 0"]),
    "epochs' word": ([*TRAIN, "--epochs", "1.5"], ["--epochs", "1.5", "a whole number"]),
    "ridge": ([*TRAIN, "--ridge", "-1"], ["--ridge is -1.0", "at least 0"]),
    "ridge schedule": ([*TRAIN, "--ridge", "1", "--ridge-schedule", "linear"], ["linear", *SCHEDULES]),
    "ridge time": (
        [*TRAIN, "--ridge", "1", "--ridge-schedule", "cutoff"],
        ["cutoff", "give --ridge-steps T"],
    ),
    "ridge time without effect": (
        [*TRAIN, "--ridge", "1", "--ridge-steps", "5"],
        ["--ridge-steps", "leave it out"],
    ),
    "schedule without ridge": (
        [*TRAIN, "--ridge-schedule", "cutoff", "--ridge-steps", "5"],
        ["--ridge is 0"],
    ),
    "device": ([*TRAIN, "--device", "gpu"], ["--device is 'gpu'", "cpu, cuda"]),
    "dtype": ([*TRAIN, "--dtype", "float16"], ["float16", "float32", "float64"]),
    "autocast": (
        [*TRAIN, "--dtype", "float64", "--autocast", "bf16"],
        ["--autocast bf16", "float32", "float64"],
    ),
    "measuring": ([*TRAIN, "--measure-every", "-1"], ["--measure-every is -1", "at least 0"]),
    "probe of one": ([*TRAIN, "--probe-size", "1"], ["--probe-size is 1", "at least 2"]),
    "law and ridge": ([*TRAIN, "--check-law", "--ridge", "1"], ["--check-law", "--ridge", "leave one of them out"]),
    "option": ([*TRAIN, "--colour", "red"], ["--colour"]),
    "word too many": ([*TRAIN, "mnist"], ["mnist"]),
    "trust without resume": ([*TRAIN, "--trust"], ["--trust is for --resume", "leave it out"]),
    "long name": (["status", "--out", "a" * 300], ["--out is ", "File name too long"]),
    "long name of what is not there": (["train", "--resume", f"a/{'b' * 256}"], ["--resume is a/", "255 bytes"]),
    "long name of letters of three bytes": (["compare", "语" * 86], ["RUNS is ", "File name too long"]),
    "folder below a file": ([*TRAIN, "--out", "/dev/null/a"], ["--out is /dev/null/a", "Not a directory"]),
    "NUL": (["status", "--out", "a\0b"], ["'a\\x00b' holds a character that no argument can"]),
    "half a letter": (["compare", "\ud800"], ["'\\ud800' holds a character that no argument can"]),
    "line break": (["train", "no\nsuch\r", "--model", "lenet"], ["no\\nsuch\\r"]),
    "escapes": (["\x1b]0;title\x07"], ['"\\x1b]0;title\\x07"', "train"]),
    "no UTF-8": (["report", "--out", "M\udcfcller"], ["in M\\xfcller"]),
    "very long word": (["report", "x" * 100_000 + "y"], ["xxx…xxx", "xy'"]),
    "empty word": ([""], ["an argument is empty: give a value, or leave it out"]),
    "empty value": ([*TRAIN, "--out", ""], ["--out is empty: give a value"]),
    "empty value behind a sign": (["status", "--out="], ["--out= is empty"]),
    "resume of no run": (["train", "--resume", "nothing"], ["nothing is not a run folder", "config.json"]),
    "data folder": (
        ["train", "mnist", "--model", "lenet", "--data", "nothing"],
        ["the data folder nothing is not a folder"],
    ),
    "reproduce a name": (["reproduce", "sing2021"], ["NAME is 'sing2021'", "did you mean song2021"]),
    "status of a name": (["status", "sing2021"], ["NAME is 'sing2021'", "did you mean song2021"]),
    "report of a name": (["report", "sing2021"], ["NAME is 'sing2021'", "did you mean song2021"]),
    "preset": (["reproduce", "--preset", "large"], ["large", "smoke", "quick", "paper"]),
    "workers": (["reproduce", "--workers", "0"], ["--workers is 0, expected at least 1"]),
    "workers' word": (["reproduce", "--workers", "many"], ["--workers", "many"]),
    "a part": (["reproduce", "song2021.figure2", "--only", "width"], ["--only is 'width', expected AXIS=VALUE"]),
    "no seeds": (["reproduce", "song2021.figure2", "--seeds", "0"], ["--seeds is 0, expected at least 1"]),
    "memory": (["reproduce", "--memory", "-1"], ["--memory is -1, expected a positive number of GiB"]),
    "infinite memory": (["reproduce", "--memory", "inf"], ["--memory is inf, expected a positive number of GiB"]),
    "reproduce's device": (["reproduce", "--device", "gpu"], ["--device is 'gpu', expected cpu, cuda or cuda:N"]),
    "reproduce's data": (["reproduce", "--data", "nothing"], ["the data folder nothing is not a folder"]),
    "cores without Ray": (["reproduce", "--cpus-per-run", "2"], ["--cpus-per-run is 2, but it is for --ray", "leave"]),
    "GPUs without Ray": (["reproduce", "--gpus-per-run", "1"], ["--gpus-per-run is 1, but it is for --ray"]),
    "workers with Ray": (
        ["reproduce", "--ray", "local", "--workers", "2"],
        ["--workers is 2", "--ray", "leave it out"],
    ),
    "status of nothing": (["status"], ["there are no results in results", "--out"]),
    "report of nothing": (["report"], ["there are no results in results", "--out"]),
    "compare nothing": (["compare"], ["no run folders given"]),
    "compare no run": (["compare", "nothing"], ["nothing is not a run folder"]),
    "compare to no picture": (["compare", "nothing", "--out", "a.pdf"], ["--out is a.pdf", ".png"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_every_wrong_argument_gets_one_sentence(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = WRONG[case]
    code, _, said = run(words, capsys)
    assert code == 2
    for part in expected:
        assert part in said
    assert "Traceback" not in said
    assert said.startswith("falign: ")
    listed = 2 if "cannot be converted" in said else 1
    assert len(said.strip().splitlines()) == listed
    assert not Path("runs").exists()
    assert not Path("results").exists(), "nothing is written before the arguments are known to be right"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = run([*TRAIN, "--device", "cuda"], capsys)
    assert code == 2
    assert "--device is cuda, but PyTorch sees 0 CUDA devices here: use --device cpu" in said


def test_from_the_first_epoch_to_the_comparison(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said, _ = run([*TRAIN, "--epochs", "2"], capsys)
    folder = "runs/digits-mlp-64-16-10-fa-0-epochs=2"
    assert code == 0
    assert f"done after step 46: records and pictures are in {folder}" in said
    code, _, wrong = run([*TRAIN, "--epochs", "2"], capsys)
    assert code == 2
    assert f"{folder} holds a run already: continue it with --resume {folder}, replace it with --force" in wrong
    assert run(["train", "--resume", folder, "--epochs", "3"], capsys)[0] == 0
    assert run([*TRAIN, "--resume", folder, "--epochs", "3"], capsys)[0] == 0, "the same options may be repeated"
    monkeypatch.setattr(_ending, "draw", lambda *_: None)  # of two runs' pictures is enough
    assert run([*TRAIN, "--rule", "bp", "--out", "bp", "--epochs", "1"], capsys)[0] == 0
    assert run([*TRAIN, "--rule", "bp", "--out", "bp", "--epochs", "2", "--force"], capsys)[0] == 0
    code, said, _ = run(["compare", folder, "bp", "--out", "both.png"], capsys)
    assert code == 0
    assert "digits · mlp:64-16-10" in said
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_pictures")
def test_references_are_trained_beside_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        "digits",
        "--model",
        "mlp:64-16-16-10",
        "--epochs",
        "1",
        "--rule",
        "dfa",
        "--transform",
        "centred",
    ]
    code, said, _ = run([*words, "--out", "one", "--references"], capsys)
    assert code == 0
    assert all(f"records and pictures are in {folder}" in said for folder in ("one", "one-frozen", "one-shallow"))
    assert said.rindex("frozen") > said.rindex("records and pictures"), "a table"
    assert RunFolder(Path("one-shallow")).read_config()[0].transform is None
    code, _, wrong = run([*words, "--out", "one-frozen", "--references"], capsys)
    assert code == 2
    assert "one-frozen holds a run already" in wrong
    assert not Path("one-frozen-frozen").exists()
    code, _, wrong = run(["train", "--resume", "one", "--references"], capsys)
    assert code == 2
    assert "--references is for a new run" in wrong


def test_options_without_a_value_are_those_of_the_run_that_goes_on(
    capsys: pytest.CaptureFixture[str], no_pictures: None
) -> None:
    words = [*TRAIN, "--check-law", "--tensorboard", "--momentum", "0", "--out", "one", "--epochs"]
    assert run([*words, "1"], capsys)[0] == 0
    code, said, _ = run(["train", "--resume", "one", "--epochs", "2"], capsys)
    assert code == 0
    assert "conservation law after 46 steps: holds" in said
    assert len(list(Path("one/tensorboard").iterdir())) == 2
    assert run([*TRAIN, "--out", "two", "--epochs", "1"], capsys)[0] == 0
    code, _, said = run(["train", "--resume", "two", "--check-law"], capsys)
    assert code == 2
    assert "--check-law is True, but the run in two has False: leave it out, or begin a new run" in said


@pytest.mark.usefixtures("no_pictures")
def test_resume_refuses_other_options_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TRAIN, "--epochs", "1", "--out", "one"], capsys)[0] == 0
    for words, expected in [
        (["--lr", "0.5"], "--learning-rate is 0.5, but the run in one has 0.01"),
        (["--optimizer", "adam"], "--optimizer is adam, but the run in one has sgd"),
        (["--rule", "bp"], "--rule is bp, but the run in one has fa"),
        (["mnist"], "DATASET is mnist, but the run in one has digits"),
        (["--ridge", "1"], "--ridge is 1.0, but the run in one has 0.0"),
        (["--out", "two"], "leave out --out"),
        (["--force"], "leave out --force"),
    ]:
        code, _, said = run(["train", *words, "--resume", "one"], capsys)
        assert code == 2
        assert expected in said


@pytest.mark.usefixtures("no_pictures")
def test_a_diverged_run_ends_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = run([*TRAIN, "--lr", "1e12", "--epochs", "1"], capsys)
    assert code == 1
    assert re.search(r"the run diverged at step \d+: the \w+ of layer 'fc\d' stopped being finite", said)
    assert len(said.strip().splitlines()) == 1


COMMANDS = ("train", "tune", "compare", "list", "reproduce", "status", "report", "query", "explore", "demo", "doctor")
RUNNING = ("--workers", "--ray")
OPTIONS = [option(part.name) for part in fields(TrainConfig) if part.name != "dataset"]


def test_the_help_of_train_is_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run(["train", "--help"], capsys)
    assert code == 0
    rows = re.findall(r"^│ \*? *((?:DATASET )?--[a-z -]+)", said, re.M)
    names = {name for row in rows for name in re.findall(r"--[a-z-]+", row)}
    files = {"--data", "--out", "--resume", "--trust", "--force", "--references"}
    assert names == {*OPTIONS, "--dataset", "--lr", *files, *RUNNING}
    assert set(OPTIONS) == {
        *(
            "--model",
            "--activation",
            "--context",
            "--epochs",
            "--rule",
            "--rule-option",
            "--feedback",
            "--scale",
            "--transform",
            "--mirror-every",
            "--follow-every",
            "--calibrate",
            "--adafa-rate",
            "--drtp-output",
            "--positions",
        ),
        *("--optimizer", "--learning-rate", "--rate-decay", "--momentum", "--weight-decay", "--batch-size"),
        *("--ridge", "--ridge-schedule", "--ridge-steps", "--seed", "--device", "--dtype", "--autocast"),
        *("--measure-every", "--probe-size", "--check-law", "--tensorboard"),
    }
    for group in (
        "Rule",
        "Optimizer",
        "Ridge on the output layer's weights",
        "Numbers and machine",
        "Measuring",
        "Files",
    ):
        assert f"─ {group} ─" in said
    words = " ".join(said.replace("│", " ").split())
    *rules, last = falign.ALL_RULES
    assert f"{', '.join(rules)} or {last}, or package.module:Rule" in words
    for default in ("[default: 10]", "[default: fa]", "0.01 for sgd", "[default: 64]", "[default: auto]"):
        assert default in words


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("list", {"NAME", "--paper", "--csv"}),
        (
            "reproduce",
            {
                *(
                    "NAME",
                    "--paper",
                    "--preset",
                    "--only",
                    "--seeds",
                    "--out",
                    "--data",
                    "--workers",
                    "--memory",
                    "--device",
                ),
                *("--ray", "--cpus-per-run", "--gpus-per-run"),
            },
        ),
        ("status", {"NAME", "--paper", "--preset", "--out", "--against", "--csv"}),
        ("report", {"NAME", "--paper", "--preset", "--out"}),
        ("query", {"SQL", "--store", "--csv", "--rows"}),
        ("explore", {"--runs", "--store", "--port", "--browser"}),
        ("demo", {"--preset", "--runs", "--out", "--workers"}),
        ("doctor", {"--data", "--out", "--json"}),
    ],
)
def test_the_help_of_the_laboratory_is_frozen(
    command: str, options: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = run([command, "--help"], capsys)
    assert code == 0
    assert {row.split()[0] for row in re.findall(r"^│ \*? *((?:NAME|SQL|--)[A-Z a-z-]*)", said, re.M)} == options
    words = " ".join(said.replace("│", " ").split())
    preset = "quick" if command in ("reproduce", "demo") else "of each experiment the one of which most runs are there"
    choices = f"[choices: smoke, quick, paper] [default: {preset}]"
    for name, default in {"--preset": choices, "--out": "[default: results]"}.items():
        assert (default in words) == (name in options or (name, command) == ("--out", "explore"))


@pytest.mark.parametrize("name", falign.ALL_RULES)
def test_every_option_of_a_rule_can_be_given_to_the_command(name: str) -> None:
    rule = falign.ALL_RULES[name]()
    for part in fields(rule):
        value = getattr(rule, part.name)
        config = resolve(TrainConfig("digits", model="mlp:64-10", rule=name, rule_option=(f"{part.name}={value}",)))
        assert getattr(make_rule(config), part.name) == value


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run(["--help"], capsys)
    assert code == 0
    assert all(word in said for word in (*COMMANDS, "--version", "--help"))
    assert run([], capsys)[1] == said
    assert run(["--version"], capsys)[:2] == (0, f"{falign.__version__}\n")
    assert all(word in run(["compare", "--help"], capsys)[1] for word in ("RUNS", "--out", "comparison.png"))


def _speechless(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode(stream.encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_that_is_not_utf8_gets_replacements(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ending, "draw", lambda *_: None)
    commands: dict[str, tuple[list[str], int, str]] = {
        "help": (["train", "--help"], 0, "cutoff: ? for t ? T"),
        "list": (["list"], 0, "song2021.figure2"),
        "law": (
            [*TRAIN, "--check-law", "--momentum", "0", "--epochs", "1", "--out", "λ"],
            0,
            "law after 23 steps: holds",
        ),
        "comparison": (["compare", "λ"], 0, "digits"),
        "doctor": (["doctor", "--out", "λ2"], 0, "PYTHONUTF8=1"),
        "error": (["status", "--out", "λ"], 2, "output folder that is not ours"),
        "wrong word": (["λ"], 2, 'Unknown command "?"'),
    }
    for name, (words, expected, part) in commands.items():
        out, err = _speechless(encoding), _speechless(encoding)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            patched.setattr(sys, "stderr", err)
            code = main(words)
        said = _written(err if expected else out)
        assert code == expected, (name, _written(err))
        assert part in said, name
        assert "?" in said or name in ("list", "doctor"), name


COMMAND = "import sys; from falign.cli import main; sys.exit(main())"


def _shell(words: str, **env: str) -> tuple[int, str]:
    """The command in a shell, such as ``falign --help > /dev/full``: its own exit code, and what it said."""
    command = shlex.join([sys.executable, "-c", COMMAND])
    script = ["bash", "-c", f"{words.replace('falign', command, 1)}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, env={**os.environ, **env})
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
def test_what_cannot_be_printed_is_said_once_and_ends_with_one() -> None:
    full = (1, "falign: the output cannot be written: No space left on device\n")
    assert _shell("falign train --help > /dev/full") == full
    assert _shell("falign --version > /dev/full") == full
    assert _shell("falign train --help > /dev/full", PYTHONUNBUFFERED="1") == full
    assert _shell("falign train --help > /dev/full 2> /dev/full") == (1, "")


@pytest.mark.skipif(os.name != "posix", reason="of POSIX shells")
def test_a_closed_pipe_ends_a_command_without_a_word() -> None:
    assert _shell("falign train --help | exit") == (1, "")
    assert _shell("falign train --help | exit", PYTHONUNBUFFERED="1") == (1, "")
    assert _shell("falign --version | exit") == (1, "")


@pytest.mark.skipif(os.name != "posix", reason="of POSIX shells")
def test_closed_standard_streams_are_silent_and_their_places_are_not_given_to_files() -> None:
    assert _shell("falign train --help <&- >&- 2>&-") == (0, "")
    number = "import os; number = (main(), os.open('file', os.O_CREAT | os.O_WRONLY))[1]; os.write(1, b'no'); "
    code = COMMAND.replace("sys.exit(main())", f"{number}sys.exit(number)")
    line = shlex.join([sys.executable, "-c", code, "--version"])
    done = subprocess.run(["bash", "-c", f"{line} <&- >&- 2>&-"], timeout=120)
    assert done.returncode > 2, "the first file that is opened has not the number of standard output"
    assert Path("file").read_bytes() == b""


LACKING = """
import importlib, sys
from importlib.abc import MetaPathFinder

class Lacking(MetaPathFinder):
    package, error = "", None
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise self.error or ModuleNotFoundError(f"No module named {name!r}", name=name)

lacking = Lacking()
sys.meta_path.insert(0, lacking)
from falign.cli import main
before = set(sys.modules)
for package, words in (line.split("=") for line in sys.argv[1:]):
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("falign", package):
            del sys.modules[name]
    lacking.package = package
    print(package, main(words.split()), file=sys.stderr)
    lacking.error = ImportError("cannot import name 'New'", name=package)
    print(package, main(words.split()), file=sys.stderr)
    lacking.error = None
"""


def test_a_package_that_is_missing_or_broken_is_named() -> None:
    words = {"cyclopts": "list", "rich": "train --help", "polars": "status", "jinja2": "report", "pooch": "list mnist"}
    words |= {
        "sklearn": "train digits --model mlp:64-8-10",
        "safetensors": "train digits --model lenet",
        "matplotlib": "compare a",
    }
    Store(folder=Path("results")).open(create=True)
    Path("a").mkdir()
    Path("a/config.json").touch()
    lines = [f"{package}={line}" for package, line in words.items()]
    done = subprocess.run([sys.executable, "-c", LACKING, *lines], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = iter(done.stderr.splitlines())
    for package in words:
        name = {"sklearn": "scikit-learn"}.get(package, package)
        missing = f'falign: the package {name} is missing, which this command needs: pip install "falign[lab]"'
        assert next(said) == missing
        assert next(said) == f"{package} 1"
        assert next(said).startswith(
            f"falign: the package {name} cannot be used (cannot import name 'New'): it is damag"
        )
        assert next(said) == f"{package} 1"


def test_errors_of_the_system_and_of_memory_are_sentences_and_faults_of_falign_are_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: dict[BaseException, tuple[int, str]] = {
        PermissionError(13, "Permission denied", "a/\udcffb"): (1, "falign: a/\\xffb: Permission denied\n"),
        OSError(36, "File name too long", b"c"): (2, "falign: c: File name too long\n"),
        TimeoutError("timed out"): (1, "falign: timed out\n"),
        MemoryError(): (1, "falign: there is not enough memory: make what is computed smaller\n"),
        torch.OutOfMemoryError("CUDA out of memory.\nTried"): (
            1,
            "falign: there is not enough memory (CUDA out of mem",
        ),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't"): (1, "falign: there is not enough memory ([enforce"),
        KeyboardInterrupt(): (130, "falign: interrupted\n"),
        SystemExit(0): (1, "falign: the code that was run asked to end (0): the command was not done\n"),
    }

    def fail(error: BaseException) -> None:
        raise error

    for error, (code, said) in raised.items():
        monkeypatch.setattr(_commands, "run", lambda words, error=error: fail(error))
        assert main(["list"]) == code
        assert capsys.readouterr().err.startswith(said)
    for error in (TypeError("ours"), ImportError("cannot import", name="falign.lab"), RecursionError("deep")):
        monkeypatch.setattr(_commands, "run", lambda words, error=error: fail(error))
        with pytest.raises(type(error)):
            main(["list"])


def test_a_package_that_is_too_old_is_named_whatever_it_makes_go_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _requirements.Requirement(package="rich", extra="lab", wanted=">=13.7", installed="9.1", fits=False)
    monkeypatch.setattr(_requirements, "requirements", lambda: (found,))
    monkeypatch.setattr(_commands, "run", lambda words: [].missing)  # pyright: ignore
    assert main(["list"]) == 1
    expected = 'falign: rich 9.1 is installed, expected >=13.7: pip install --upgrade "falign[lab]"\n'
    assert capsys.readouterr().err == expected


def test_the_module_is_the_command() -> None:
    words = [sys.executable, "-m", "falign", "--version"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{falign.__version__}\n"


HEAVY = ("jax", "matplotlib", "numpy", "polars", "ray", "scipy", "sklearn", "torch")
"""Packages that take long to import: together some seconds."""
LIGHT = [
    *(["--help"], ["--version"], [], *([command, "--help"] for command in COMMANDS)),
    *(["tarin"], ["train", "digits", "mnist"], ["train", "--model", "lenet"], ["train", "digits"], ["status", ""]),
    *([*TRAIN, "--colour", "red"], [*TRAIN, "--lr", "fast"], [*TRAIN, "--epochs", "1.5"], [*TRAIN, "--dtype", "x"]),
    *([*TRAIN, "--trust"], [*TRAIN, "--out", "a" * 300], [*TRAIN, "--out", "/dev/null/a"], ["compare"]),
    *(["compare", "a", "--out", "a.pdf"], ["reproduce", "--preset", "large"], ["status", "--out="], ["doctor", "x"]),
    *(["reproduce", "--workers", "many"], ["reproduce", "--workers", "0"], ["reproduce", "--memory", "-1"]),
    *(["reproduce", "--device", "gpu"], ["reproduce", "--data", "nothing"], ["reproduce", "--cpus-per-run", "2"]),
    *(["train", "digits", "--model", "lenett"], ["train", "digits", "--model", "mlp:64"]),
    *([*TRAIN, "--epochs", "-1"], [*TRAIN, "--momentum", "2"], [*TRAIN, "--ridge-schedule", "cutoff"]),
    *(["train", "--resume", "nowhere"], ["train", "--resume", "nowhere", "--out", "a"], ["compare", "nowhere"]),
    *(["reproduce", "--ray", "local", "--workers", "2"], ["reproduce", "--ray", "local", "--cpus-per-run", "0"]),
    *(["reproduce", "--ray", "nowhere"], [*TRAIN, "--epochs", "-1"], [*TRAIN, "--momentum", "1"]),
]
"""Words that ask for help, or that are a mistake which can be seen before anything is done."""


def test_help_and_usage_errors_come_at_once() -> None:
    """They import nothing that takes long, in one process: what a command has imported the next one would have."""
    code = (
        "import json, sys; from falign.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    code = main(words)\n"
        "    heavy = set(json.loads(sys.argv[2])) & set(sys.modules)\n"
        "    print(json.dumps([words, code, sorted(heavy)]), file=sys.stderr)\n"
    )
    words = [sys.executable, "-c", code, json.dumps(LIGHT), json.dumps(HEAVY)]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=120)
    answers = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]
    expected = [[words, 0 if not words or words[-1] in ("--help", "--version") else 2, []] for words in LIGHT]
    assert answers == expected


def test_the_package_imports_what_is_asked_of_it() -> None:
    code = (
        "import sys, falign; assert 'torch' not in sys.modules;"
        "assert set(falign.__all__) <= set(dir(falign));"
        "assert falign.measure.alignment and falign.init and falign.rules and falign.layers and falign.feedback;"
        "from falign import *; assert verify.__module__ == 'falign._verify' and convert is falign.convert;"
        "assert not hasattr(falign, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
