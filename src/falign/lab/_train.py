"""Training by a rule, with everything written into a run folder from which it can go on."""

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

from falign._preserve import deterministic, seeded
from falign.feedback import generator
from falign.lab import _checkpoints
from falign.lab._checkpoints import TrainingState
from falign.lab._divergence import Diverged
from falign.lab._ending import TrainingOutcome, end, fail
from falign.lab._files import FolderLost, RunError, WriteError
from falign.lab._grid import short
from falign.lab._loop import Loop, open_events
from falign.lab._progress import TrainingProgress
from falign.lab._provenance import provenance
from falign.lab._run_folder import TRACEBACK, RunFolder
from falign.lab._setup import Setup, prepare_run
from falign.lab._signals import GracefulStop
from falign.lab._text import print_plain, standard_console
from falign.lab._validate import is_built_in, make_rule, resolve
from falign.lab.config import TEXTS, ConfigError, TrainConfig, is_text, option
from falign.lab.data import NAMES

_LONGEST_NAME = 200
"""Letters that the name of a run folder may have."""


def train(
    config: TrainConfig,
    out: Path | None = None,
    *,
    data: Path | None = None,
    replaces: bool = False,
    console: Console | None = None,
) -> TrainingOutcome:
    """Train a network and write the run folder.

    Args:
        config: The configuration; missing defaults are filled in.
        out: The run folder; None is ``default_folder(config)``.
        data: Folder of the data sets; see :func:`falign.lab.data.load`.
        replaces: Whether a run in the folder is replaced.
        console: Console for the progress; None is standard output.

    Returns:
        The outcome.

    Raises:
        ConfigError: The configuration is impossible, or does not fit the data.
        DataError: The data are missing or damaged.
        RunError: The folder holds a run, another process is at work in it, or nothing can be written there.
        WriteError: The disk is full, or the folder was deleted; the checkpoints written before are intact.
        KeyboardInterrupt: A second Ctrl-C, TERM or HUP came, or one before there was anything to save.
    """
    console = console or standard_console()
    config = resolve(config)
    run = RunFolder(default_folder(config) if out is None else out)
    run.refuse_existing(replaces=replaces)
    with GracefulStop() as stop:
        setup = _prepare(config, data, console)  # a signal ends it at once: there is nothing to save yet
        with stop.first_deferred(), run.locked():
            run.begin(replaces=replaces)
            origin = provenance(config.device, config.model, config.rule, config.dataset) | {
                "data_sha256": setup.data_sha256
            }
            return _carry_out(run, setup, None, origin, console, stop)


def resume(
    folder: Path, *, epochs: int | None = None, data: Path | None = None, console: Console | None = None
) -> TrainingOutcome:
    """Go on with a run, to the same numbers as if it had not been interrupted.

    That holds for the same versions on the same kind of machine with the same number of threads. A model of the user's
    own must depend on nothing but images, weights, buffers, the global generators and attributes that a checkpoint
    holds; where it is seen to depend on more, a line says so before the first step.

    Args:
        folder: The run folder.
        epochs: A new number of epochs, not below those done; None keeps it.
        data: Folder of the data sets.
        console: Console for the progress; None is standard output.

    Returns:
        The outcome.

    Raises:
        ConfigError: The new number of epochs is below those done.
        DataError: The data are missing or damaged.
        RunError: This is no run, it diverged, a file of it is damaged, its data are other ones, or another process is
            at work in it.
        WriteError: The disk is full, or the folder was deleted; the checkpoints written before are intact.
        KeyboardInterrupt: A second Ctrl-C, TERM or HUP came, or one before there was anything to save.
    """
    console = console or standard_console()
    run = RunFolder(folder)
    run.require()
    with GracefulStop() as stop, run.locked():
        before, origin = run.read_config()
        status = run.read_status()
        if status["status"] == "diverged":
            raise RunError(f"{folder} cannot go on: {status.get('message') or 'it diverged'}")
        config = resolve(replace(before, epochs=before.epochs if epochs is None else epochs))
        config = replace(config, dataset=before.dataset)  # symbolic links on its path may have changed
        setup = _prepare(config, data, console)
        if origin.get("data_sha256") != setup.data_sha256:
            raise RunError(
                f"{config.dataset} is not the data that {folder} began with: give those, by --data if need be"
            )
        checkpoints = run.checkpoints()
        if not checkpoints and status.get("saved", 0) > 0:
            raise RunError(f"{folder} has no checkpoint left to go on from: restore one, or begin anew with --force")
        _note_changes(origin, config, console)
        with stop.first_deferred():
            return _carry_out(run, setup, checkpoints[-1] if checkpoints else None, origin, console, stop)


def _note_changes(origin: dict[str, Any], config: TrainConfig, console: Console) -> None:
    """Add to the provenance what has changed since the run began, and print what may change its numbers."""
    now = provenance(config.device, config.model, config.rule, config.dataset)
    changed = {key: value for key, value in now.items() if origin.get(key) != value}
    earlier = origin.get("resumed")
    origin["resumed"] = [*(earlier if isinstance(earlier, list) else []), changed]
    if relevant := [key for key in ("packages", "device", "threads") if key in changed]:
        print_plain(console, f"{' and '.join(relevant)} changed since the run began: last digits may differ")
    if (code := changed.get("code")) is not None:
        texts = {option(key): getattr(config, key) for key in ("dataset", "model", "rule")}
        named = " and ".join(f"{key} {text}" for key, text in texts.items() if ":" in text and not is_text(text))
        print_plain(console, f"the code of {named} in {', '.join(code)} changed since the run began")


def default_folder(config: TrainConfig, axes: Sequence[str] = ()) -> Path:
    """Name the run folder: ``runs/DATASET-MODEL-RULE-SEED``, then ``-OPTION=VALUE`` for each that is not the default.

    The folder of a grid of runs lacks what they differ in, and ends with ``-by-OPTION``, an option for each axis: more
    values of an axis belong into the same one.

    Eight digits of a hash of the whole configuration follow where the name alone does not identify it: for the path of
    a folder of images or a text, for the capitals and colons of the user's own model, for characters that no file name
    can hold and for names that are too long. So no two configurations share a name, also on file systems that ignore
    case.

    Args:
        config: The configuration; of a grid that of any of its runs.
        axes: Fields in which the runs of a grid differ; none for a single run.

    Returns:
        The folder, in the working folder.
    """
    config = resolve(config)
    default = resolve(
        TrainConfig(
            config.dataset,
            model=config.model,
            rule=config.rule,
            rule_option=config.rule_option,
            optimizer=config.optimizer,
            seed=config.seed,
        )
    )
    named = config.dataset in (*NAMES, *TEXTS)
    model = re.sub("[:,]", "-", config.model) if is_built_in(config.model) else config.model
    places = {"model": model, "rule": config.rule, "seed": str(config.seed)}
    words = [config.dataset if named else Path(config.dataset).name]
    words += [word for name, word in places.items() if name not in axes]
    for name, (value, _) in config.differences(replace(default, optimizer="sgd", rule_option=())).items():
        if name not in axes:
            words.append(short(name) if value is True else f"{short(name)}={_shortest(value)}")
    full = "-".join([*words, *(["by", *map(short, axes)] if axes else [])])
    whole = json.dumps([full, config.dataset, config.model] if axes else config.to_json(), sort_keys=True)
    return Path("runs") / folder_name(full, whole, sufficient=named)


def folder_name(text: str, whole: str, *, sufficient: bool = True, kept: str = "") -> str:
    """Return a text as the name of a folder, with eight digits of a hash where it cannot say all.

    Args:
        text: The text.
        whole: What the name stands for.
        sufficient: Whether the text says all of that.
        kept: Letters that the name may have beside the usual ones.
    """
    name = re.sub(rf"[^A-Za-z0-9._+={kept}-]+", "-", text).strip(".-")
    if name != text or name != name.lower() or len(name) > _LONGEST_NAME or not sufficient:
        digits = sha256(whole.encode()).hexdigest()[:8]
        name = f"{name[: _LONGEST_NAME - 1 - len(digits)]}-{digits}"
    return name


def _shortest(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _prepare(config: TrainConfig, data: Path | None, console: Console) -> Setup:
    with repeatable(config):  # a model may draw random numbers while it is made
        setup = prepare_run(config, data=data, progress=console.is_terminal)
    _checkpoints.check_storable(setup.learner)  # better now than at the first save
    for line in setup.description:
        print_plain(console, line)
    return setup


def _carry_out(
    run: RunFolder, setup: Setup, checkpoint: Path | None, origin: dict[str, Any], console: Console, stop: GracefulStop
) -> TrainingOutcome:
    """Train, and have the status say how the run ended, whatever ends it."""
    learner, config = setup.learner, setup.learner.config
    with repeatable(config), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rule .* without weight_decay")  # the description has said it
        state = TrainingState()
        if checkpoint is not None:
            state = _checkpoints.restore(checkpoint, learner, identity=run.identity)
            _check_place(checkpoint, setup, state)
        _check_epochs(run, config, state)
        run.write_config(config, origin)
        with suppress(OSError):
            (run.folder / TRACEBACK).unlink(missing_ok=True)
        print_plain(console, f"writing to {run.folder}" + (f", going on after step {state.step}" if checkpoint else ""))
        try:
            run.write_status("running", step=state.step, epoch=state.epoch)
            return _run_loop(run, setup, state, console, stop)
        except FolderLost:  # the folder is another run's by now: write nothing there, not even the status
            raise
        except WriteError as error:
            message = f"{error}; what was written before is intact, go on with --resume {run.folder}"
            with stop.all_deferred(), suppress(WriteError):
                run.write_status("failed", step=state.step, epoch=state.epoch, message=message)
            raise WriteError(message) from None
        except BaseException as error:
            # SystemExit has two causes: a model that calls sys.exit(), which is a failure of the run, and a closed
            # pipe, upon which rich makes its console quiet and exits: that is an interruption.
            closed_pipe = isinstance(error, SystemExit) and console.quiet
            if isinstance(error, Exception | SystemExit) and not closed_pipe:
                with stop.all_deferred():
                    return fail(run, state, error)
            message = f"stopped at once, saved up to step {run.saved}: go on with falign train --resume {run.folder}"
            with stop.all_deferred(), suppress(WriteError):
                run.write_status("interrupted", step=run.saved, message=message)
            raise


def _run_loop(
    run: RunFolder, setup: Setup, state: TrainingState, console: Console, stop: GracefulStop
) -> TrainingOutcome:
    learner, config = setup.learner, setup.learner.config
    first_step = state.step
    progress = TrainingProgress(console, epochs=config.epochs, steps_per_epoch=setup.steps_per_epoch, step=first_step)
    finish = partial(end, run, learner, state, console)
    try:
        with progress, open_events(run, state, wanted=config.tensorboard) as events:
            loop = Loop(setup=setup, run=run, state=state, progress=progress, stop=stop, events=events)
            completed = loop.go()
    except Diverged as error:
        message = f"{error}: {_advice(config)}"
        return finish("diverged", error.step, message, layer=error.layer, what=error.what)
    if not completed:
        message = f"interrupted after step {state.step}: go on with falign train --resume {run.folder}"
        return replace(finish("interrupted", state.step, message), signal=stop.requested)
    message = f"done after step {state.step}: records and pictures are in {run.folder}"
    if first_step and state.step == first_step:
        message = f"{run.folder} has done its {config.epochs} epochs: give more with --epochs to go on"
    return finish("done", state.step, message)


def _advice(config: TrainConfig) -> str:
    """Name the options to change after a divergence."""
    things = [f"a learning rate below {config.learning_rate:g} (--learning-rate)"]
    if make_rule(config).wiring != "none":
        now = "" if config.scale is None else f" below {config.scale:g}"
        things.append(f"a smaller --scale of the feedback{now}")
    if config.activation in ("relu", "gelu", "identity"):
        things.append(f"a bounded --activation such as tanh, it is {config.activation}")
    return f"try {', '.join(things)}, or another --rule"


def _check_epochs(run: RunFolder, config: TrainConfig, state: TrainingState) -> None:
    epochs_begun = state.epoch + (state.batch > 0)
    if config.epochs < epochs_begun:
        raise ConfigError(
            f"--epochs is {config.epochs}, but {run.folder} is in epoch {epochs_begun}: give {epochs_begun} or more"
        )


def _check_place(path: Path, setup: Setup, state: TrainingState) -> None:
    """Refuse a checkpoint at a step that no training of this configuration comes to: it might go on for ever."""
    steps, size = setup.steps_per_epoch, setup.learner.config.batch_size
    expected = (state.epoch * steps + state.batch, min(state.batch * size, len(setup.train)))
    if expected != (state.step, state.seen) or not 0 <= state.batch < steps or not state.records:
        raise RunError(
            f"{path} cannot be read (step {state.step} is not batch {state.batch} of epoch {state.epoch}): "
            "delete it to go on from the checkpoint before it"
        )


@contextmanager
def repeatable(config: TrainConfig) -> Iterator[None]:
    """Seed the global generators, which dropout and the like draw from, and let PyTorch choose repeatable kernels.

    cuDNN would otherwise pick its kernels by timing them, and some add in another order each time, as CUDA's fused
    kernels of attention do: then neither a second run nor a resumed one would come to the same bits. Afterwards the
    process is as it was.
    """
    device = torch.device(config.device)
    seed = generator(config.seed, "", "noise").initial_seed()
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()
    with seeded(seed, [device]), deterministic(device), attention:
        yield
