"""A grid of runs: each in a folder named by what differs, on any executor of experiments; those that are done stay."""

import io
import json
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from falign.lab import _compare
from falign.lab._files import RunError
from falign.lab._run_folder import RunFolder
from falign.lab._setup import Parts, load_parts, prepare_run
from falign.lab._signals import ImmediateStop, Stopped
from falign.lab._text import print_plain
from falign.lab._train import default_folder, folder_name, repeatable, resume, train
from falign.lab._validate import resolve
from falign.lab.config import ConfigError, TrainConfig, option
from falign.lab.data import DataError
from falign.lab.experiment import Experiment, Outcome, Setting, Task
from falign.lab.experiment._execution import Block, Executor

_NUMBERS = ("seed", "epochs", "learning_rate", "rate_decay", "weight_decay", "ridge")
"""Fields whose value decides on no combination: networks that differ in these alone are tried once."""
_ENDED = ("done", "diverged")


@dataclass(frozen=True, kw_only=True)
class Member:
    """A run of a grid.

    Attributes:
        label: What differs, ``rule=fa,seed=0``.
        config: Its configuration, resolved.
        folder: Its run folder.
        begun: Whether the folder holds it already, so that it goes on.
    """

    label: str
    config: TrainConfig
    folder: Path
    begun: bool = False


def members(configs: Sequence[tuple[str, TrainConfig]], axes: Sequence[str], out: Path | None) -> list[Member]:
    """Name the runs of a grid and resolve their configurations.

    Args:
        configs: Label and configuration of each.
        axes: Fields in which they differ.
        out: Folder of the run folders; None is ``default_folder`` of the grid.

    Raises:
        ConfigError: A combination is impossible, or two are the same.
    """
    found: dict[TrainConfig, Member] = {}
    for label, config in configs:
        try:
            config = resolve(config)
        except ConfigError as error:
            raise _impossible(label, error) from None
        if twin := found.get(config):
            raise ConfigError(f"{label} is the same run as {twin.label}: leave one of them out")
        parent = default_folder(config, axes) if out is None else out
        name = folder_name(label, json.dumps(config.to_json(), sort_keys=True), kept=",")
        found[config] = Member(label=label, config=config, folder=parent / name)
    return list(found.values())


def sweep(runs: Sequence[Member], *, data: Path | None, replaces: bool, executor: Executor, console: Console) -> int:
    """Train what is missing of a grid, and print the table of all its runs.

    Runs that are done or have diverged are left alone, all others go on from their last checkpoints. Every combination
    is tried before the first step.

    Args:
        runs: The runs.
        data: Folder of the data sets.
        replaces: Whether runs that are there are trained anew.
        executor: Where they are trained.
        console: Where progress and table are printed.

    Returns:
        0: all runs are done, or have diverged; 1: a run failed; 128 and a signal's number.

    Raises:
        ConfigError: A combination is impossible, or a folder holds another run.
        DataError: The data are missing or damaged.
        RunError: A folder is in use, or cannot be written.
    """
    waiting = [member for run in runs if (member := _missing(run, replaces=replaces)) is not None]
    _try_each([run for run in waiting if not run.begun], data)
    parent, left = runs[0].folder.parent, len(runs) - len(waiting)
    print_plain(console, f"{len(runs)} runs in {parent}" + (f", {left} of them there already" if left else ""))
    try:
        with ImmediateStop(), ExitStack() as stack:
            if waiting:
                stack.enter_context(executor)
                _give_away(waiting, executor, replaces=replaces)
            failed = _follow(runs, waiting, executor, console)
    except KeyboardInterrupt as error:
        print_plain(
            console, f"interrupted: what was trained is kept in {parent}, and the same command goes on from there"
        )
        return error.code if isinstance(error, Stopped) else 130
    there = [run.folder for run in runs if RunFolder(run.folder).exists]
    if there:
        _compare.show(_compare.read(there), console)
    return int(failed)


def _missing(run: Member, *, replaces: bool) -> Member | None:
    """Return a run as it has to be trained; None if it is there.

    Raises:
        ConfigError: Its folder holds another run.
        RunError: Its folder is in use, or damaged.
    """
    folder = RunFolder(run.folder)
    if replaces or not folder.exists:
        folder.refuse_existing(replaces=replaces)
        return run
    before, _ = folder.read_config()
    different = {name: pair for name, pair in run.config.differences(before).items() if name != "epochs"}
    for name, (now, then) in different.items():
        raise ConfigError(
            f"{run.folder} holds a run with {option(name)} {then}, and here it is {now}: give another folder with "
            "--out, or replace all runs with --force"
        )
    status = folder.read_status()["status"]
    if status == "running":  # another process is at work in it
        folder.refuse_existing(replaces=True)
    there = status == "diverged" or (status == "done" and before.epochs >= run.config.epochs)
    return None if there else replace(run, begun=True)


def _try_each(runs: Sequence[Member], data: Path | None) -> None:
    """Make the network of every combination once, so that one that is impossible is said before anything starts."""
    loaded: dict[tuple, Parts] = {}
    tried = set()
    for run in runs:
        config = run.config
        kind = replace(config, **{name: getattr(runs[0].config, name) for name in _NUMBERS})
        if kind in tried:
            continue
        tried.add(kind)
        source = (config.dataset, config.context, config.device, config.dtype)
        try:
            if source not in loaded:
                loaded = {source: load_parts(config, data, progress=False)}  # one at a time: it may be large
            with repeatable(config):
                prepare_run(config, data=data, progress=False, parts=loaded[source])
        except (ConfigError, DataError) as error:
            raise _impossible(run.label, error) from None


def _impossible(label: str, error: ValueError) -> ValueError:
    return type(error)(f"{label} is impossible, and nothing was begun: {error}")


def _give_away(runs: Sequence[Member], executor: Executor, *, replaces: bool) -> None:
    for run in runs:
        point = {
            "label": run.label,
            "config": json.dumps(run.config.to_json()),
            "folder": str(run.folder.absolute()),
            "begun": run.begun,
            "replaces": replaces,
        }
        executor.submit(Block(experiment=_TRAINING, tasks=(Task(_TRAINING.name, 1, point, 0),)))


def _train_one(
    *, seed: int, setting: Setting, label: str, config: str, folder: str, begun: bool, replaces: bool
) -> Outcome:
    """Train a run of a grid, in whichever process; its words are kept to itself."""
    read = json.loads(config)
    options = TrainConfig(**{**read, "rule_option": tuple(read.get("rule_option", ()))})
    console = Console(file=io.StringIO())
    try:
        if begun:
            outcome = resume(Path(folder), epochs=options.epochs, data=setting.data, console=console)
        else:
            outcome = train(options, Path(folder), data=setting.data, replaces=replaces, console=console)
    except (ConfigError, RunError) as error:
        return Outcome(records={"ending": ["failed"], "said": [str(error)]})
    if outcome.status == "interrupted":
        raise Stopped(outcome.signal or signal.SIGINT)
    return Outcome(records={"ending": [outcome.status], "said": [outcome.failure or outcome.message]})


_TRAINING = Experiment(name="train", title="", source="", revision=1, grid={}, seeds={}, run=_train_one)


def _follow(runs: Sequence[Member], waiting: Sequence[Member], executor: Executor, console: Console) -> bool:
    """Print a line about each run as it ends, and tell whether any failed."""
    failed, count = False, len(runs) - len(waiting)
    while count < len(runs):
        for each in executor.wait():
            count += 1
            label, folder = (str(each.block.tasks[0].point[key]) for key in ("label", "folder"))
            ending, said = "failed", each.result.error or "nothing is known of its end"
            if each.result.run_results is not None:
                (result,) = each.result.run_results
                row = result.records.row(0, named=True) if result.records.height else {}
                ending, said = row.get("ending", ending), row.get("said", result.message or said)
            failed = failed or ending not in _ENDED
            print_plain(console, f"[{count}/{len(runs)}] {label}: {_in_short(Path(folder), ending, said)}")
    return failed


def _in_short(folder: Path, ending: str, said: str) -> str:
    if ending != "done":
        return said
    (run,) = _compare.read([folder])
    accuracy = run.tested()["test_accuracy"].drop_nulls()
    return f"test {accuracy[-1]:.2%}, {run.records['seconds'][-1]:.1f} s" if len(accuracy) else ending
