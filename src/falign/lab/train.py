"""Training by a rule, with everything written into a run folder from which it can go on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from falign.feedback import generator
from falign.lab import checkpoints
from falign.lab.checkpoints import Course
from falign.lab.completion import completed
from falign.lab.config import ConfigError, TrainConfig
from falign.lab.display import Display
from falign.lab.divergence import Diverged
from falign.lab.ending import Outcome, end
from falign.lab.events import events
from falign.lab.interrupt import Interrupt
from falign.lab.loop import Loop
from falign.lab.provenance import provenance
from falign.lab.runs import Run
from falign.lab.setting import Setting, settle
from falign.lab.writing import RunError, WriteError


def train(
    config: TrainConfig,
    out: Path | None = None,
    *,
    data: Path | None = None,
    replaces: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Train a network and write the run folder.

    Args:
        config: What to train; missing defaults are filled in.
        out: The run folder; None is ``runs/DATASET-MODEL-RULE-SEED`` in the working folder.
        data: Folder of the data sets; see :func:`falign.lab.data.load`.
        replaces: Whether a run that is there already is replaced.
        console: Where to show progress; None is standard output.

    Returns:
        How it ended.

    Raises:
        ConfigError: The configuration is impossible, or does not fit the data.
        DataError: The data are missing or damaged.
        RunError: The folder holds a run, or nothing can be written there.
        WriteError: The disk is full; the checkpoints written before are intact.
    """
    console = console or Console()
    config = completed(config)
    run = Run(default_folder(config) if out is None else out)
    run.refuse_existing(replaces=replaces)
    setting = _settled(config, data, console)
    run.begin(replaces=replaces)
    origin = {**provenance(config.device), "data_sha256": setting.data_sha256}
    return _carry_out(run, setting, None, origin, console)


def resume(
    folder: Path, *, epochs: int | None = None, data: Path | None = None, console: Console | None = None
) -> Outcome:
    """Go on with a run, to the same numbers as if it had not been interrupted.

    That holds for the same versions on the same kind of machine with the same number of threads.

    Args:
        folder: The run folder.
        epochs: A new number of epochs, not below those done; None keeps it.
        data: Folder of the data sets.
        console: Where to show progress; None is standard output.

    Returns:
        How it ended.

    Raises:
        ConfigError: The new number of epochs is below those done.
        DataError: The data are missing or damaged.
        RunError: This is no run, it diverged, a file of it is damaged, or its data are other ones.
        WriteError: The disk is full; the checkpoints written before are intact.
    """
    console = console or Console()
    run = Run(folder)
    config, origin = run.read_config()
    status = run.read_status()
    if status["status"] == "diverged":
        raise RunError(f"{folder} cannot go on: {status.get('message', 'it diverged')}")
    config = completed(replace(config, epochs=config.epochs if epochs is None else epochs))
    setting = _settled(config, data, console)
    if origin.get("data_sha256") != setting.data_sha256:
        raise RunError(f"{config.dataset} is not the data that {folder} began with: give those, by --data if need be")
    found = run.checkpoints()
    if not found and status["status"] in ("done", "interrupted"):
        raise RunError(f"{folder} has no checkpoint left to go on from: restore one, or begin anew with --force")
    changed = {key: value for key, value in provenance(config.device).items() if origin.get(key) != value}
    origin["resumed"] = [*origin.get("resumed", []), changed]
    if loose := [key for key in ("packages", "device", "threads") if key in changed]:
        console.print(f"{' and '.join(loose)} changed since the run began: last digits may differ", markup=False)
    return _carry_out(run, setting, found[-1] if found else None, origin, console)


def default_folder(config: TrainConfig) -> Path:
    """``runs/DATASET-MODEL-RULE-SEED``."""
    name = "-".join((Path(config.dataset).resolve().name, config.model, config.rule, str(config.seed)))
    return Path("runs") / "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


def _settled(config: TrainConfig, data: Path | None, console: Console) -> Setting:
    setting = settle(config, data=data, progress=console.is_terminal)
    for line in setting.description:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return setting


def _carry_out(
    run: Run, setting: Setting, checkpoint: Path | None, origin: dict[str, Any], console: Console
) -> Outcome:
    config = setting.learner.config
    with _own_randomness(config), Interrupt() as interrupt:
        course = Course() if checkpoint is None else checkpoints.restore(checkpoint, setting.learner)
        _check_epochs(run, config, course)
        run.write_config(config, origin)
        run.write_status("running")
        steps = -(-len(setting.train) // config.batch_size)
        display = Display(console, epochs=config.epochs, steps=steps, done=course.step)
        display.say(f"writing to {run.folder}" + (f", going on after step {course.step}" if checkpoint else ""))
        first = course.step
        ended = partial(end, run, setting.learner, course, console)
        try:
            with display, events(run, course, wanted=config.tensorboard) as written:
                loop = Loop(
                    setting=setting, run=run, course=course, display=display, interrupt=interrupt, events=written
                )
                reached = loop.go()
        except Diverged as error:
            message = f"{error}: {_advice(config)}"
            return ended("diverged", error.step, message, layer=error.layer, what=error.what)
        except WriteError as error:
            raise WriteError(f"{error}; what was written before is intact, go on with --resume {run.folder}") from None
    if not reached:
        message = f"interrupted after step {course.step}: go on with falign train --resume {run.folder}"
        return ended("interrupted", course.step, message)
    message = f"done after step {course.step}: records and pictures are in {run.folder}"
    if checkpoint is not None and course.step == first:
        message = f"{run.folder} has done its {config.epochs} epochs: give more with --epochs to go on"
    return ended("done", course.step, message)


def _advice(config: TrainConfig) -> str:
    """What to try where a run diverged."""
    things = [f"a learning rate below {config.learning_rate:g} (--learning-rate)"]
    if config.rule != "bp":
        now = "" if config.scale is None else f" below {config.scale:g}"
        things.append(f"a smaller --scale of the feedback{now}")
    if config.activation in ("relu", "gelu", "identity"):
        things.append(f"a bounded --activation such as tanh, it is {config.activation}")
    return f"try {', '.join(things)}, or another --rule"


def _check_epochs(run: Run, config: TrainConfig, course: Course) -> None:
    done = course.epoch + (course.position > 0)
    if config.epochs < done:
        raise ConfigError(f"--epochs is {config.epochs}, but {run.folder} is in epoch {done}: give {done} or more")


@contextmanager
def _own_randomness(config: TrainConfig) -> Iterator[None]:
    """Dropout and the like draw from a generator of the run; the process's own are left as they are."""
    device = torch.device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(generator(config.seed, "", "noise").initial_seed())
        yield
