"""Search of options by validation images, with Optuna: a study that is kept, its table, and the test of its best."""

import json
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from math import exp, log
from pathlib import Path
from time import perf_counter
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from falign.lab._batches import order
from falign.lab._divergence import Diverged, is_finite
from falign.lab._files import FolderLock, RunError, atomic_write
from falign.lab._grid import Axis, short
from falign.lab._learner import Learner, required
from falign.lab._setup import Parts, load_parts, prepare_run
from falign.lab._text import plain_cell, print_plain, print_table, table_csv
from falign.lab._train import default_folder, repeatable
from falign.lab._validate import resolve
from falign.lab.config import ConfigError, TrainConfig, option

_RATES = {"sgd": (1e-3, 0.3), "adam": (1e-4, 0.03), "adamw": (1e-4, 0.03)}
"""{optimizer: between which its learning rate is searched if nothing is said}."""
_STARTS = (0.5, 0.25, 0.75)
"""Where on the range of the learning rate a study begins, 0 the lower end and 1 the upper one."""
_DECADE = 10
"""Ratio of the ends of a range from which on it is searched on a logarithmic scale."""
_STUDY, _TRIALS = "study.log", "trials.csv"


def optuna(what: str) -> Any:
    """Import Optuna.

    Args:
        what: What needs it.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f'{what} by Optuna, which is not installed: pip install "falign[tune]"') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def search(study: Any, trials: int, attempt: Callable[[Any], tuple[float, Any] | None]) -> tuple[int | None, Any]:
    """Make trials of a study.

    Args:
        study: An Optuna study that maximises.
        trials: How many.
        attempt: Trial -> the number to maximise, and what was made; None if it diverged.

    Returns:
        The number of the best of these trials, None if all diverged, and what it made.

    Source: Bergstra, Bardenet, Bengio and Kégl 2011 (NeurIPS), the tree-structured Parzen estimator, by Optuna.
    """
    pruned = optuna("a study is searched").trial.TrialState.PRUNED
    best, number, made = None, None, None
    for _ in range(trials):
        trial = study.ask()
        result = attempt(trial)
        if result is None:
            study.tell(trial, state=pruned)  # which the search takes for worse than any number
            continue
        study.tell(trial, result[0])
        if best is None or result[0] > best:
            best, number, made = result[0], trial.number, result[1]
    return number, made


@dataclass(frozen=True, kw_only=True)
class Study:
    """A search of options.

    Attributes:
        config: What all trials have in common.
        axes: The options that are searched: ranges, and lists of values.
        make: {field: value as a word} -> the configuration of a trial.
        trials: Trainings in all.
        out: Folder of the study; None names it after the options.
        data: Folder of the data sets.
    """

    config: TrainConfig
    axes: tuple[Axis, ...]
    make: Callable[[Mapping[str, str]], TrainConfig]
    trials: int
    out: Path | None
    data: Path | None

    @property
    def folder(self) -> Path:
        """Folder of the study."""
        if self.out is not None:
            return self.out
        named = default_folder(self.config, [axis.field for axis in self.axes])
        return named.with_name(f"tune-{named.name}")


def searched(config: TrainConfig, axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Return the axes of a study: those that were given, and the learning rate if nothing was said of it.

    Raises:
        ConfigError: Nothing is left to search.
    """
    if config.learning_rate is None and all(axis.field != "learning_rate" for axis in axes):
        low, high = _RATES[config.optimizer]
        axes = [*axes, Axis(field="learning_rate", low=low, high=high)]
    if not axes:
        raise ConfigError("nothing is left to search: give a range, as --lr 0.001..0.3, or leave --learning-rate out")
    return tuple(axes)


def tune(asked: Study, console: Console) -> int:
    """Make the trials of a study that are missing, print them, and look at the test set once, with the best.

    Args:
        asked: The study.
        console: Where it is printed.

    Returns:
        0: there is a best trial; 1: all have diverged.

    Raises:
        ConfigError: An option is impossible, or the folder holds another study.
        DataError: The data are missing or damaged.
        RunError: Another process is at work in the folder, or it cannot be written.
        ModuleNotFoundError: Optuna is not installed.
    """
    library = optuna("falign tune searches")
    first = resolve(asked.make(_ends(asked.axes, 0)))
    for place in (0.5, 1.0):
        resolve(asked.make(_ends(asked.axes, place)))
    parts = load_parts(first, asked.data, progress=console.is_terminal, apart=True)
    _prepared(first, parts)  # before there is a folder
    for line in parts.description:
        print_plain(console, line)
    try:
        asked.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write into {asked.folder}: {error.strerror}; give another folder with --out") from None
    with FolderLock(asked.folder):
        study = _open(asked, library)
        ended = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
        if ended:
            print_plain(console, f"{asked.folder} has {len(ended)} of {asked.trials} trials")
        made: dict[int, Learner] = {}

        def attempt(trial: Any) -> tuple[float, Any] | None:
            words = {axis.field: _suggest(trial, axis) for axis in asked.axes}
            trial.set_user_attr("words", words)
            start, result = perf_counter(), _train(resolve(asked.make(words)), parts)
            trial.set_user_attr("seconds", perf_counter() - start)
            said = "diverged" if result is None else f"validation {result[0]:.2%}"
            told = ", ".join(f"{short(name)}={value}" for name, value in words.items())
            print_plain(console, f"[{trial.number + 1}] {told}: {said}, {perf_counter() - start:.1f} s")
            return result

        number, learner = search(study, max(0, asked.trials - len(ended)), attempt)
        if number is not None:
            made[number] = learner
        return _conclude(asked, study, parts, made, console)


def _conclude(asked: Study, study: Any, parts: Parts, made: Mapping[int, Learner], console: Console) -> int:
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    ended = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    table = _table(asked.axes, ended)
    print_table(table, console)
    atomic_write(asked.folder / _TRIALS, f"{table_csv(table)}\n".encode())
    if not done:
        print_plain(console, "all trials have diverged: try smaller learning rates")
        return 1
    best = max(done, key=lambda trial: (trial.value, -trial.number))
    config = resolve(asked.make(best.user_attrs["words"]))
    tested = study.user_attrs.get("tested", {})
    if tested.get("trial") != best.number:
        learner = made.get(best.number)
        if learner is None:  # of an earlier call: it is trained again, to the same numbers
            learner = required(_train(config, parts))[1]  # pyright: ignore
        tested = {"trial": best.number, "accuracy": learner.test(parts.test)[1]}
        study.set_user_attr("tested", tested)
    print_plain(
        console,
        f"trial {best.number + 1} is the best: validation {best.value:.2%}, and on the test set, looked at once, "
        f"{tested['accuracy']:.2%}; the study is kept in {asked.folder}, more --trials go on with it",
    )
    words = ["falign", *words_of(asked.make(best.user_attrs["words"]))]
    print_plain(console, shlex.join(words if asked.data is None else [*words, "--data", str(asked.data)]))
    return 0


def _open(asked: Study, library: Any) -> Any:
    """Open the study, or make it.

    Raises:
        ConfigError: There is another one.
        RunError: It is damaged.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = asked.folder / _STUDY
    states = library.trial.TrialState
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        study = library.create_study(study_name="falign", storage=storage, direction="maximize", load_if_exists=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}): it is damaged, delete it to begin anew") from None
    ended = sum(trial.state in (states.COMPLETE, states.PRUNED) for trial in study.trials)
    study.sampler = library.samplers.TPESampler(seed=(asked.config.seed + ended) % 2**32, n_startup_trials=len(_STARTS))
    identity = json.dumps([asked.config.to_json(), [vars(axis) for axis in asked.axes]], sort_keys=True)
    if study.user_attrs.setdefault("falign", identity) != identity:
        raise ConfigError(f"{asked.folder} holds a study of other options or ranges: give another folder with --out")
    if not study.trials:
        study.set_user_attr("falign", identity)
        for axis in asked.axes:
            for place in _STARTS if axis.field == "learning_rate" and not axis.values else ():
                study.enqueue_trial({axis.field: _at(axis, place)})
    for trial in study.trials:
        if trial.state == states.RUNNING:  # the process that made it is gone: nobody else has the folder's lock
            study.tell(trial.number, state=states.FAIL)
            study.enqueue_trial(trial.params)
    return study


def _suggest(trial: Any, axis: Axis) -> str:
    """Return a trial's value of an axis as a word, of so few digits that it can be typed again."""
    if axis.values:
        return str(trial.suggest_categorical(axis.field, list(axis.values)))
    if axis.whole:
        return str(trial.suggest_int(axis.field, int(axis.low), int(axis.high), log=_is_logarithmic(axis)))
    return f"{trial.suggest_float(axis.field, axis.low, axis.high, log=_is_logarithmic(axis)):.4g}"


def _is_logarithmic(axis: Axis) -> bool:
    return axis.low > 0 and axis.high / axis.low >= _DECADE


def _at(axis: Axis, place: float) -> float:
    if _is_logarithmic(axis):
        return exp(log(axis.low) * (1 - place) + log(axis.high) * place)
    return axis.low * (1 - place) + axis.high * place


def _ends(axes: Sequence[Axis], place: float) -> dict[str, str]:
    """Return the words of a corner of what is searched, or of its middle."""
    words = {}
    for axis in axes:
        if axis.values:
            words[axis.field] = axis.values[round(place * (len(axis.values) - 1))]
        else:
            value = _at(axis, place)
            words[axis.field] = str(round(value)) if axis.whole else f"{value:.4g}"
    return words


def _prepared(config: TrainConfig, parts: Parts) -> Learner:
    with repeatable(config):
        return prepare_run(config, data=None, progress=False, parts=parts).learner


def _train(config: TrainConfig, parts: Parts) -> tuple[float, Learner] | None:
    """Train a network; its accuracy on the validation images, and the network, or None if it diverged."""
    learner, done = _prepared(config, parts), 0
    validation = required(parts.validation)  # pyright: ignore
    with repeatable(config):
        try:
            for epoch in range(config.epochs):
                learner.begin_epoch(epoch)
                places = order(config.seed, epoch, len(parts.train)).to(config.device)
                for batch in places.split(config.batch_size):
                    learner.step(*parts.train.take(batch), done)
                    done += 1
        except Diverged:
            return None
        return (learner.test(validation)[1], learner) if is_finite(learner.model) else None


def _table(axes: Sequence[Axis], trials: Sequence[Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("trial", *(short(axis.field) for axis in axes), "validation %", "seconds"):
        table.add_column(name, justify="right")
    for trial in trials:
        value = f"{100 * trial.value:.2f}" if trial.state.name == "COMPLETE" else "diverged"
        words = trial.user_attrs["words"].values()
        seconds = f"{trial.user_attrs.get('seconds', 0.0):.1f}"
        table.add_row(*map(plain_cell, (trial.number + 1, *words, value, seconds)))
    return table


def words_of(config: TrainConfig, *, without: Collection[str] = ()) -> list[str]:
    """Return the words behind ``falign`` that train by a configuration, without those of some fields."""
    words = ["train", config.dataset]
    for part in fields(TrainConfig):
        value = getattr(config, part.name)
        if part.name in ("dataset", *without) or value == part.default:
            continue
        name = "--lr" if part.name == "learning_rate" else option(part.name)
        if value is True:
            words.append(name)
        for each in value if isinstance(value, tuple) else () if value is True else (value,):
            words += [name, str(each)]
    return words
