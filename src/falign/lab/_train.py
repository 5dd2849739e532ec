"""Training by a rule, with everything written into a run folder from which it can go on."""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from falign._preserve import repeatable, seeded
from falign.feedback import generator
from falign.lab import _checkpoints
from falign.lab._batches import Images, prepare, probe
from falign.lab._checkpoints import Course
from falign.lab._divergence import Diverged, Start, norms
from falign.lab._ending import Outcome, end, fail, forewarning
from falign.lab._files import Lost, RunError, WriteError
from falign.lab._interrupt import Interrupt
from falign.lab._learner import Learner, make
from falign.lab._loop import Display, Loop, events
from falign.lab._provenance import fingerprint, provenance
from falign.lab._run_folder import TRACEBACK, Run
from falign.lab._text import print_plain, standard_console
from falign.lab._validate import completed
from falign.lab.config import ConfigError, TrainConfig
from falign.lab.data import NAMES, load

# What a run works with: the learner, the images, and the images on which angles are measured.


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """Everything that a configuration stands for.

    Attributes:
        learner: The network before its first step.
        train: Training images.
        test: Test images.
        x: Images on which the angles are measured.
        y: Their labels.
        start: What a run that runs away is told by.
        data_sha256: Checksum of all images and labels.
        description: Data, network and rule in a few words, one line each.
    """

    learner: Learner
    train: Images
    test: Images
    x: Tensor
    y: Tensor
    start: Start
    data_sha256: str
    description: tuple[str, ...]


def settle(config: TrainConfig, *, data: Path | None, progress: bool) -> Setting:
    """Load the data and make the network.

    Args:
        config: The completed configuration.
        data: Folder of the data sets; None is what ``FALIGN_DATA`` names, then the cache.
        progress: Whether to show bars while loading.

    Returns:
        The setting.

    Raises:
        DataError: The data are missing or damaged.
        ConfigError: Data, network and rule do not fit each other.
    """
    loaded = load(config.dataset, folder=data, progress=progress)
    device = torch.device(config.device)
    train, test = prepare(loaded, device=device, dtype=getattr(torch, config.dtype))
    x, y = train.take(probe(config.seed, len(train), config.probe_size).to(device))
    learner = make(
        config,
        shape=loaded.shape,
        classes=len(loaded.classes),
        example=x[:2],
        sizes=_sizes(len(train), config.batch_size),
    )
    size = "×".join(map(str, loaded.shape))
    return Setting(
        learner=learner,
        train=train,
        test=test,
        x=x,
        y=y,
        start=Start(classes=len(loaded.classes), norms=norms(learner.model, learner.layers)),
        data_sha256=fingerprint(loaded),
        description=(
            f"{loaded.name}: {len(train):,} training and {len(test):,} test images of {size}, "
            f"{len(loaded.classes)} classes",
            *loaded.notes,
            *_described(learner),
        ),
    )


def _sizes(images: int, batch: int) -> set[int]:
    """Of the batches of an epoch."""
    return {min(batch, images), images % batch or min(batch, images)}


def _described(learner: Learner) -> list[str]:
    config = learner.config
    weights = sum(part.numel() for name, part in learner.model.named_parameters() if "feedback" not in name.split("."))
    momentum = f", momentum {config.momentum:g}" if config.momentum is not None else ""
    lines = [
        f"{config.model}: {weights:,} parameters; rule {config.rule}; {config.optimizer}, learning rate "
        f"{config.learning_rate:g}{momentum}, batches of {config.batch_size}; {config.device}, {config.dtype}"
    ]
    lines += learner.notes
    if config.rule == "kp" and not config.weight_decay:
        lines.append("kp without --weight-decay: the feedback moves, but never meets the weights")
    if config.check_law and (warning := forewarning(config)):
        lines.append(warning)
    return lines


_NAME = 200
"""So many letters the name of a run folder may have."""


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
        out: The run folder; None is ``default_folder(config)``.
        data: Folder of the data sets; see :func:`falign.lab.data.load`.
        replaces: Whether a run that is there already is replaced.
        console: Where to show progress; None is standard output.

    Returns:
        How it ended.

    Raises:
        ConfigError: The configuration is impossible, or does not fit the data.
        DataError: The data are missing or damaged.
        RunError: The folder holds a run, another process is at work in it, or nothing can be written there.
        WriteError: The disk is full, or the folder was deleted; the checkpoints written before are intact.
        KeyboardInterrupt: A second Ctrl-C, TERM or HUP came, or one before there was anything to save.
    """
    console = console or standard_console()
    config = completed(config)
    run = Run(default_folder(config) if out is None else out)
    run.refuse_existing(replaces=replaces)
    with Interrupt() as interrupt:
        setting = _settled(config, data, console)
        with interrupt.patient(), run.held():
            run.begin(replaces=replaces)
            origin = {**provenance(config.device, config.model, config.rule), "data_sha256": setting.data_sha256}
            return _carry_out(run, setting, None, origin, console, interrupt)


def resume(
    folder: Path, *, epochs: int | None = None, data: Path | None = None, console: Console | None = None
) -> Outcome:
    """Go on with a run, to the same numbers as if it had not been interrupted.

    That holds for the same versions on the same kind of machine with the same number of threads, and for a model of
    one's own if its numbers depend on nothing but images, weights, buffers, the global generators and what its modules
    have in attributes that a checkpoint holds: lines say before the first step where it is seen to be otherwise.

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
        RunError: This is no run, it diverged, a file of it is damaged, its data are other ones, or another process is
            at work in it.
        WriteError: The disk is full, or the folder was deleted; the checkpoints written before are intact.
        KeyboardInterrupt: A second Ctrl-C, TERM or HUP came, or one before there was anything to save.
    """
    console = console or standard_console()
    run = Run(folder)
    run.require()
    with Interrupt() as interrupt, run.held():
        before, origin = run.read_config()
        status = run.read_status()
        if status["status"] == "diverged":
            raise RunError(f"{folder} cannot go on: {status.get('message') or 'it diverged'}")
        config = completed(replace(before, epochs=before.epochs if epochs is None else epochs))
        config = replace(config, dataset=before.dataset)  # its path may lead over other links now, to the same data
        setting = _settled(config, data, console)
        if origin.get("data_sha256") != setting.data_sha256:
            raise RunError(
                f"{config.dataset} is not the data that {folder} began with: give those, by --data if need be"
            )
        found = run.checkpoints()
        if not found and status.get("saved", 0) > 0:
            raise RunError(f"{folder} has no checkpoint left to go on from: restore one, or begin anew with --force")
        _note_changes(origin, config, console)
        with interrupt.patient():
            return _carry_out(run, setting, found[-1] if found else None, origin, console, interrupt)


def _note_changes(origin: dict[str, Any], config: TrainConfig, console: Console) -> None:
    """Add to the provenance what is no longer as it was when the run began, and say what may change its numbers."""
    changed = {
        key: now for key, now in provenance(config.device, config.model, config.rule).items() if origin.get(key) != now
    }
    earlier = origin.get("resumed")
    origin["resumed"] = [*(earlier if isinstance(earlier, list) else []), changed]
    if loose := [key for key in ("packages", "device", "threads") if key in changed]:
        print_plain(console, f"{' and '.join(loose)} changed since the run began: last digits may differ")
    if (code := changed.get("code")) is not None:
        named = " and ".join(f"--{key} {text}" for key in ("model", "rule") if ":" in (text := getattr(config, key)))
        print_plain(console, f"the code of {named} in {', '.join(code)} changed since the run began")


def default_folder(config: TrainConfig) -> Path:
    """``runs/DATASET-MODEL-RULE-SEED`` and every option that is not the default, ``-OPTION=VALUE``.

    Where that leaves something out, eight digits of a hash of the whole configuration follow: what no file name can
    hold, the path of a folder of images, the capitals and colons of an own model, what is too long. So two
    configurations never have one name, also where names in capitals are the same names.

    Args:
        config: The configuration.

    Returns:
        The folder, in the working folder.
    """
    config = completed(config)
    default = completed(
        TrainConfig(
            config.dataset,
            model=config.model,
            rule=config.rule,
            rule_option=config.rule_option,
            optimizer=config.optimizer,
            seed=config.seed,
        )
    )
    dataset = config.dataset if config.dataset in NAMES else Path(config.dataset).name
    model = config.model.replace(":", "-", 1) if config.model.startswith("mlp:") else config.model
    words = [dataset, model, config.rule, str(config.seed)]
    for name, (value, _) in config.differences(replace(default, optimizer="sgd", rule_option=())).items():
        word = "lr" if name == "learning_rate" else name.replace("_", "-")
        words.append(word if value is True else f"{word}={_shortest(value)}")
    wanted = "-".join(words)
    name = re.sub(r"[^A-Za-z0-9._+=-]+", "-", wanted).strip(".-")
    if name != wanted or name != name.lower() or len(name) > _NAME or config.dataset not in NAMES:
        digits = sha256(json.dumps(config.to_json(), sort_keys=True).encode()).hexdigest()[:8]
        name = f"{name[: _NAME - 1 - len(digits)]}-{digits}"
    return Path("runs") / name


def _shortest(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _settled(config: TrainConfig, data: Path | None, console: Console) -> Setting:
    with _repeatable(config):  # lazy layers, and whatever else a model draws when it is made
        setting = settle(config, data=data, progress=console.is_terminal)
    _checkpoints.check(setting.learner)
    for line in setting.description:
        print_plain(console, line)
    return setting


def _carry_out(
    run: Run, setting: Setting, checkpoint: Path | None, origin: dict[str, Any], console: Console, interrupt: Interrupt
) -> Outcome:
    """Train, and see to it that the status says how it ended, whatever ends it."""
    learner, config = setting.learner, setting.learner.config
    with _repeatable(config), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rule 'kp' without weight_decay")  # the description has said it
        course = Course()
        if checkpoint is not None:
            course = _checkpoints.restore(checkpoint, learner, identity=run.identity)
            _check_place(checkpoint, setting, course)
        _check_epochs(run, config, course)
        run.write_config(config, origin)
        with suppress(OSError):
            (run.folder / TRACEBACK).unlink(missing_ok=True)
        print_plain(
            console, f"writing to {run.folder}" + (f", going on after step {course.step}" if checkpoint else "")
        )
        try:
            run.write_status("running", step=course.step, epoch=course.epoch)
            return _trained(run, setting, course, console, interrupt)
        except Lost:
            raise
        except WriteError as error:
            message = f"{error}; what was written before is intact, go on with --resume {run.folder}"
            with interrupt.deaf(), suppress(WriteError):
                run.write_status("failed", step=course.step, epoch=course.epoch, message=message)
            raise WriteError(message) from None
        except BaseException as error:
            unread = isinstance(error, SystemExit) and console.quiet  # so a console of rich ends whose pipe is closed
            if isinstance(error, Exception | SystemExit) and not unread:  # SystemExit: a model may call sys.exit
                with interrupt.deaf():
                    return fail(run, course, error)
            message = f"stopped at once, saved up to step {run.saved}: go on with falign train --resume {run.folder}"
            with interrupt.deaf(), suppress(WriteError):
                run.write_status("interrupted", step=run.saved, message=message)
            raise


def _trained(run: Run, setting: Setting, course: Course, console: Console, interrupt: Interrupt) -> Outcome:
    learner, config = setting.learner, setting.learner.config
    first = course.step
    display = Display(console, epochs=config.epochs, steps=_steps(setting), done=first)
    ended = partial(end, run, learner, course, console)
    try:
        with display, events(run, course, wanted=config.tensorboard) as written:
            loop = Loop(setting=setting, run=run, course=course, display=display, interrupt=interrupt, events=written)
            reached = loop.go()
    except Diverged as error:
        message = f"{error}: {_advice(config)}"
        return ended("diverged", error.step, message, layer=error.layer, what=error.what)
    if not reached:
        message = f"interrupted after step {course.step}: go on with falign train --resume {run.folder}"
        return replace(ended("interrupted", course.step, message), signal=interrupt.requested)
    message = f"done after step {course.step}: records and pictures are in {run.folder}"
    if first and course.step == first:
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


def _steps(setting: Setting) -> int:
    """Of an epoch."""
    return -(-len(setting.train) // setting.learner.config.batch_size)


def _check_place(path: Path, setting: Setting, course: Course) -> None:
    """A place that no training comes to would be trained on from, or for ever."""
    steps, size = _steps(setting), setting.learner.config.batch_size
    place = (course.epoch * steps + course.position, min(course.position * size, len(setting.train)))
    if place != (course.step, course.seen) or not 0 <= course.position < steps or not course.rows:
        raise RunError(
            f"{path} cannot be read (step {course.step} is not batch {course.position} of epoch {course.epoch}): "
            "delete it to go on from the checkpoint before it"
        )


@contextmanager
def _repeatable(config: TrainConfig) -> Iterator[None]:
    """Dropout and the like draw from generators of the run, and sums have one order; the process is left as it was."""
    device = torch.device(config.device)
    seed = generator(config.seed, "", "noise").initial_seed()
    with seeded(seed, [device]), repeatable(device):
        yield
