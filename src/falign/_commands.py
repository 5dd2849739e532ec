"""Commands of ``falign``: one function a command, whose annotations and docstring are its options and its help.

Each function checks its options first and imports what it needs after that: PyTorch takes seconds to import, polars and
Matplotlib some tenths, and neither the help nor a mistyped option shall wait for them.
"""

import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter, Token

from falign.lab._grid import Axis, Point, points, read_axes
from falign.lab._text import echo, standard_console
from falign.lab.config import ConfigError, TrainConfig, option

if TYPE_CHECKING:
    from falign.lab._ending import TrainingOutcome

_FILES = Group("Files", sort_key=6)
_WHERE = Group("Where it is computed", sort_key=7)
_STUDY = Group("Study", sort_key=8)
_RESULTS = Path("results")
_Preset = Literal["smoke", "quick", "paper"]
_ShownPreset = Annotated[
    _Preset | None, Parameter(show_default=lambda _: "of each experiment the one of which most runs are there")
]
_MAX_NAME = 255
"""Bytes of a file's name on all usual file systems."""
_FOLDER = "runs/DATASET-MODEL-RULE-SEED, then -OPTION=VALUE for each that is not the default"
_CHANGEABLE = ("epochs",)
"""Options that may differ when a run is resumed."""

_Folder = Annotated[Path, Parameter(group=_FILES)]
_CSV = Annotated[bool, Parameter(negative="")]
_SomeFolder = Annotated[Path | None, Parameter(group=_FILES)]
_Names = Annotated[str, Parameter(name="NAME")]
_Own = Annotated[tuple[str, ...], Parameter(negative="", show_default=False)]
_Data = Annotated[
    Path | None,
    Parameter(group=_FILES, show_default=lambda _: "FALIGN_DATA, then the cache"),
]


def _options_of_run(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Take options that are not given from the run, with --resume; cyclopts calls it with the parsed arguments."""
    given = next((part for part in arguments if part.name == "--resume" and part.tokens), None)
    if given is None:
        return
    from falign.lab._run_folder import RunFolder

    folder = Path(given.tokens[-1].value)
    _check_path(folder, "--resume")
    config, _ = RunFolder(folder).read_config()
    values = asdict(config)
    for part in arguments:
        value = values.get(part.keys[-1]) if part.keys else None
        if value is not None and not part.tokens:
            for each in value if isinstance(value, tuple) else (value,):
                part.append(Token(keyword=part.name, value=str(each), source=str(folder)))


def _version() -> str:
    from falign import __version__

    return __version__


app = App(
    name="falign",
    help="Train networks without weight transport, and see how well the errors align with the true gradient.",
    version=_version,
    config=_options_of_run,
)


@app.command
def train(
    config: Annotated[TrainConfig, Parameter(name="*")],
    *,
    data: _Data = None,
    out: Annotated[_SomeFolder, Parameter(show_default=lambda _: _FOLDER)] = None,
    resume: _SomeFolder = None,
    trust: Annotated[bool, Parameter(group=_FILES, negative="")] = False,
    force: Annotated[bool, Parameter(group=_FILES, negative="")] = False,
    references: Annotated[bool, Parameter(group=_FILES, negative="")] = False,
    workers: Annotated[int | None, Parameter(group=_WHERE, show_default=lambda _: "1")] = None,
    ray: Annotated[str | None, Parameter(group=_WHERE)] = None,
) -> int:
    """Train a network on real data by a rule, and write configuration, records, pictures and checkpoints.

    falign train digits --model mlp:64-128-10 --rule dfa

    Options with several values train a grid of runs, and the same command again goes on with what is missing of it:

    falign train digits --model mlp:64-128-10 --rule fa,dfa --seed 0..4 --lr 0.01,0.03

    Ctrl-C, TERM and HUP leave a run that --resume continues, to the same numbers; a second one stops it at once. Models
    of your own are tried before the first step: a line says what they are seen to keep in Python that no checkpoint
    holds, and whether the same seed and state give other numbers when they run a second time.

    Args:
        config: What to train.
        data: Folder that holds the data sets; what is not there is downloaded. Or package.module:factory in place of
            DATASET.
        out: The run folder; of a grid the folder of its run folders.
        resume: Go on with the run in this folder; of its options only --epochs may be raised.
        trust: Run the code that the configuration of --resume names, though the run did not begin with it here.
        force: Replace the run that the folder holds.
        references: Train frozen and shallow as well, into FOLDER-frozen and FOLDER-shallow, and compare: a rule of
            which deep layers learn is better than these.
        workers: Processes that train the runs of a grid; 1 is this one alone.
        ray: Train the runs of a grid on the Ray cluster at this address; local starts one here.
    """
    for name, value in (("--workers", workers), ("--ray", ray)):
        if value is not None:
            raise ConfigError(f"{name} is {value}, but it is for a grid of runs: give an option several values")
    if resume is not None and references:
        raise ConfigError("--references is for a new run: train them by --rule frozen and --rule shallow")
    if resume is None and trust:
        raise ConfigError("--trust is for --resume: leave it out")
    if resume is not None and (out is not None or force):
        raise ConfigError(f"--resume goes on in {resume}: leave out {'--out' if out is not None else '--force'}")
    from falign.lab._run_folder import RunFolder
    from falign.lab._validate import check_options

    if resume is None:
        check_options(config)
    from falign.lab._train import resume as go_on
    from falign.lab._train import train as begin
    from falign.lab._trust import RECORDED, ask
    from falign.lab._validate import resolve_dataset

    if references:
        return _train_beside(config, out, data=data, force=force)
    if resume is None:
        outcome = begin(config, out, data=data, replaces=force)
    else:
        before, origin = RunFolder(resume).read_config()
        config = replace(config, dataset=resolve_dataset(config.dataset))
        for name, (now, then) in config.differences(before).items():
            if name not in _CHANGEABLE:
                now, then = (" ".join(each) if isinstance(each, tuple) else each for each in (now, then))
                raise ConfigError(
                    f"{option(name)} is {now}, but the run in {resume} has {then}: leave it out, or begin a new run"
                )
        if not trust:
            for code in (before.dataset, before.model, before.rule):
                ask(code, origin.get(RECORDED), resume)
        outcome = go_on(resume, epochs=config.epochs, data=data)
    return _say(outcome)


def _say(outcome: "TrainingOutcome") -> int:
    """Print how a training ended, and return the exit status."""
    echo(outcome.message, error=outcome.status != "done")
    if outcome.failure:
        echo(f"falign: {outcome.failure}", error=True)
    if outcome.status == "interrupted":
        return 128 + (outcome.signal or signal.SIGINT)
    return 0 if outcome.status == "done" and not outcome.failure else 1


def _train_beside(config: TrainConfig, out: Path | None, *, data: Path | None, force: bool) -> int:
    """Train, and the references beside it; the folders are looked at before the first step."""
    from falign.lab import _compare as comparison
    from falign.lab._run_folder import RunFolder
    from falign.lab._train import default_folder, train

    first = default_folder(config) if out is None else out
    runs = {first: config} | {
        first.with_name(f"{first.name}-{rule}"): config.reference(rule)
        for rule in ("frozen", "shallow")
        if rule != config.rule
    }
    for folder in runs:
        RunFolder(folder).refuse_existing(replaces=force)
    for folder, each in runs.items():
        if (code := _say(train(each, folder, data=data, replaces=force))) != 0:
            return code
    comparison.show(comparison.read(list(runs)), standard_console())
    return 0


@app.command
def tune(
    config: Annotated[TrainConfig, Parameter(name="*")],
    *,
    trials: Annotated[int, Parameter(group=_STUDY)] = 20,
    data: _Data = None,
    out: Annotated[_SomeFolder, Parameter(show_default=lambda _: "runs/tune-…, named after the options")] = None,
    axes: Annotated[tuple[Axis, ...], Parameter(parse=False)] = (),
) -> int:
    """Search the learning rate, and any option given as a range, by images kept apart from the training set.

    falign tune digits --model mlp:64-128-10 --rule dfa --lr 0.001..0.3 --momentum 0..0.95 --trials 20

    Options with several values, --optimizer sgd,adam, are searched too. The test set is looked at once, at the end,
    with the best trial. The same command again goes on with what is missing. Needs pip install "falign[tune]".

    Args:
        config: What to train.
        trials: Trainings in all.
        data: Folder that holds the data sets; what is not there is downloaded. Or package.module:factory in place of
            DATASET.
        out: Folder in which the study is kept.
        axes: What is searched.
    """
    if trials < 1:
        raise ConfigError(f"--trials is {trials}, expected at least 1")
    if find_spec("optuna") is None:
        raise ConfigError('falign tune needs Optuna, which is not installed: pip install "falign[tune]"')
    from falign.lab._validate import check_options

    check_options(config)
    from falign.lab import _tune

    def make(words: Mapping[str, str]) -> TrainConfig:
        named = [Axis(field=field, values=(word,)) for field, word in words.items()]
        (point,) = points(_tune.words_of(config, without=words), named)
        return _parse(point.words)[1].arguments["config"]

    searched = _tune.searched(config, axes)
    study = _tune.Study(config=config, axes=searched, make=make, trials=trials, out=out, data=data)
    return _tune.tune(study, standard_console())


@app.command
def compare(*runs: Path, out: Path = Path("comparison.png"), csv: _CSV = False) -> int:
    """Print a table of several runs, and write one picture: accuracy, loss, angles and alignment dominance.

    falign compare runs/* --out digits.png

    Options in which the runs differ have columns; a second table sums up runs that differ in their seeds alone.

    Args:
        runs: Run folders that falign train wrote, folders of them, and Parquet files that falign.measure.Monitor saved.
        out: The picture, a PNG file.
        csv: Print the table for programs, with all digits, and draw nothing.
    """
    if not runs:
        raise ConfigError("no run folders given: give one or more that falign train wrote")
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out is {out}, expected a file name that ends in .png")
    from falign.lab._run_folder import find_runs

    found, others = find_runs(runs)
    from falign.lab import _compare as comparison

    compared = comparison.read(found)
    if csv:
        echo(comparison.frame(compared).write_csv().rstrip())
        return 0
    for path in others:
        echo(f"{path} is no run folder, and holds none: left out", error=True)
    from falign.lab._compare import comparison_figure
    from falign.lab._files import atomic_write
    from falign.lab.report._figures import png

    comparison.show(compared, standard_console())
    atomic_write(out, png(comparison_figure(compared)))
    echo(f"the picture is {out}")
    return 0


def run(words: Sequence[str]) -> int:
    """Run the command that the words of the command line name.

    Args:
        words: The words after ``falign``.

    Returns:
        The exit code.

    Raises:
        ConfigError: The words are no command with its options.
    """
    for before, word in pairwise(["", *words]):
        if not word or (
            word.startswith("--") and word.find("=") == len(word) - 1
        ):  # from a shell's variable that is not set
            option_name = word or (before if before.startswith("--") else "an argument")
            raise ConfigError(f"{option_name} is empty: give a value, or leave it out")
    words = _own_data(words)
    if words[:1] not in (["train"], ["tune"]) or {"--help", "-h"} & {*words}:
        command, bound = _parse(words)
        return command(*bound.args, **bound.kwargs) or 0
    common, axes = read_axes(words[1:], ranges=words[0] == "tune")
    if words[0] == "train" and axes:
        return _train_grid(points(["train", *common], axes), [axis.field for axis in axes])
    lists = [replace(axis, values=axis.values[:1]) for axis in axes if axis.values]
    command, bound = _parse(points([words[0], *common], lists)[0].words)
    if axes and "config" in bound.arguments:  # not with --version, say
        bound.arguments["axes"] = tuple(axes)
    return command(*bound.args, **bound.kwargs) or 0


def _own_data(words: Sequence[str]) -> list[str]:
    """Let ``--data package.module:factory`` stand for the data set, which it makes."""
    if words[:1] not in (["train"], ["tune"]):
        return list(words)
    code = r"[^:]*\w:[A-Za-z_][\w.]*"
    text = re.sub(rf"\0--data[\0=]({code})(?=\0|$)", r"\0--dataset\0\1", "\0".join(words))
    return text.split("\0")


def _parse(words: Sequence[str]) -> tuple[Any, Any]:
    """Find the command and its arguments.

    Raises:
        ConfigError: The words are none.
    """
    from falign import _commands_of_results  # noqa: F401  # which adds its commands to the app

    try:
        command, bound, _ = app.parse_args(words, console=standard_console(), exit_on_error=False, print_error=False)
    except CycloptsError as error:
        sentence = " ".join(str(error).split()).rstrip(" .?")
        raise ConfigError(f"{sentence}: see falign --help") from None
    for name, value in bound.arguments.items():
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path):
                _check_path(path, "RUNS" if name == "runs" else option(name))
    return command, bound


def _train_grid(grid: Sequence[Point], axes: Sequence[str]) -> int:
    """Train the runs of a grid, whose words are checked before any begins."""
    from falign.lab._validate import check_options

    if "--resume" in (word.partition("=")[0] for word in grid[0].words):
        raise ConfigError(f"--resume is for one run, and here are {len(grid)}: the same command goes on with a grid")
    configs = []
    given: dict[str, Any] = {}
    for point in grid:
        try:
            command, bound = _parse(point.words)
            if "config" not in bound.arguments:  # --version, say
                return command(*bound.args, **bound.kwargs) or 0
            given = dict(bound.arguments)
            configs.append((point.label, check_options(given["config"])))
        except ConfigError as error:
            raise ConfigError(f"{point.label}: {error}") from None
    for name in ("references", "trust"):
        if given.get(name):
            raise ConfigError(f"--{name} is for one run, and here are {len(grid)}: leave it out")
    from falign.lab._options import ExecutionOptions

    options = ExecutionOptions(workers=given.get("workers"), data=given.get("data"), ray=given.get("ray"))
    from falign.lab._sweep import members, sweep
    from falign.lab.experiment._reproduce import make_executor

    runs = members(configs, axes, given.get("out"))
    executor, data, force = make_executor(options), given.get("data"), given.get("force", False)
    return sweep(runs, data=data, replaces=force, executor=executor, console=standard_console())


def _check_path(path: Path, name: str) -> None:
    """Refuse impossible paths: a name that is too long, links in a circle, a file where a folder must be."""
    try:
        os.stat(path)
    except FileNotFoundError:
        too_long = next((part for part in path.parts if len(os.fsencode(part)) > _MAX_NAME), None)
        if too_long is None:
            return
        why = f"{too_long} is longer than the {_MAX_NAME} bytes that a name may have"
    except OSError as error:
        why = error.strerror or str(error)
    else:
        return
    raise ConfigError(f"{name} is {path}, which cannot be used: {why}")
