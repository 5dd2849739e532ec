"""Checking a configuration, and filling in the defaults that depend on other options."""

import re
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.util import find_spec
from math import inf, isfinite
from numbers import Real
from operator import index
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from falign.feedback import family
from falign.lab.config import (
    LEARNING_RATES,
    MOMENTUM,
    WEIGHT_DECAYS,
    Activation,
    Autocast,
    ConfigError,
    DrtpOutput,
    DType,
    Optimizer,
    Schedule,
    TrainConfig,
    option,
)
from falign.lab.data import NAMES
from falign.rules import ALL_RULES, Rule


def completed(config: TrainConfig) -> TrainConfig:
    """The same configuration, checked, with the defaults that depend on other options filled in.

    Args:
        config: A configuration as it was given.

    Returns:
        A configuration that says everything; completing it again changes nothing.

    Raises:
        ConfigError: An option is impossible, contradicts another one, or would have no effect.
    """
    config = _of_their_kinds(config)
    _check_choices(config)
    _check_numbers(config)
    _check_idle(config)
    _check_rule(config)
    return replace(
        config,
        dataset=located(config.dataset),
        activation=(config.activation or "relu") if _has_activation(config) else None,
        learning_rate=_or(config.learning_rate, LEARNING_RATES[config.optimizer]),
        momentum=_or(config.momentum, MOMENTUM) if config.optimizer == "sgd" else None,
        weight_decay=_or(config.weight_decay, WEIGHT_DECAYS[config.optimizer]),
        device=_found_device(config),
    )


def _of_their_kinds(config: TrainConfig) -> TrainConfig:
    """The same configuration in Python's own types: NumPy's numbers are numbers, texts and truth values are none."""
    kinds, found = get_type_hints(TrainConfig), {}
    for part in fields(config):
        value, kind = getattr(config, part.name), kinds[part.name]
        needed = part.default is not None  # what is None by default may be None
        convert, words = _KINDS.get(
            next((each for each in _KINDS if each in (kind, *get_args(kind))), None), (None, "")
        )
        if convert is None or (value is None and not needed):
            continue
        try:
            found[part.name] = convert(value)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{option(part.name)} is {_shown(value)}, expected {words}") from None
    return replace(config, **found)


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return index(value)


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return str(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


_KINDS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (_truth, "True or False"),
    int: (_whole, "a whole number"),
    float: (_real, "a number"),
    str: (_text, "a text"),
}


def _shown(value: object) -> str:
    """A value as it stands in a message."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no number of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"


def _check_choices(config: TrainConfig) -> None:
    choices = {
        "activation": Activation,
        "drtp_output": DrtpOutput,
        "optimizer": Optimizer,
        "ridge_schedule": Schedule,
        "dtype": DType,
        "autocast": Autocast,
    }
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in get_args(allowed) and not (value is None and getattr(TrainConfig, name) is None):
            raise ConfigError(f"{option(name)} is {_shown(value)}, expected one of {', '.join(get_args(allowed))}")


def _check_numbers(config: TrainConfig) -> None:
    for name, (low, high, words) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not (low <= value <= high and isfinite(value)):
            raise ConfigError(f"{option(name)} is {_shown(value)}, expected {words}")
    rate = _or(config.learning_rate, LEARNING_RATES[config.optimizer])
    if rate * config.ridge > _LARGE:
        raise ConfigError(
            f"--ridge is {config.ridge}, which times the learning rate {rate} is more than float32 holds: use less"
        )


def _check_idle(config: TrainConfig) -> None:
    """Refuse what would have no effect: whoever gave it expects one."""
    idle = (
        ("momentum", config.optimizer != "sgd", f"for sgd, the optimizer is {config.optimizer}"),
        ("activation", not _has_activation(config), f"for mlp and lenet, the model is {config.model}"),
        ("ridge_steps", config.ridge_schedule == "constant", "for schedules other than constant"),
    )
    for name, without_effect, why in idle:
        if getattr(config, name) is not None and without_effect:
            raise ConfigError(f"{option(name)} is {why}: leave it out")
    schedule = f"--ridge-schedule {config.ridge_schedule}"
    if config.ridge_schedule != "constant" and config.ridge_steps is None:
        raise ConfigError(f"{schedule} needs its time T: give --ridge-steps T")
    if config.ridge_schedule != "constant" and config.ridge == 0:
        raise ConfigError(f"{schedule} has no effect while --ridge is 0: give --ridge, or leave it out")
    if config.check_law and config.ridge:
        raise ConfigError(
            "--check-law sees what the optimizer does, and --ridge is apart from it: leave one of them out"
        )
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError('--tensorboard needs the package tensorboard: pip install "falign[tensorboard]"')
    if config.autocast != "none" and config.dtype != "float32":
        raise ConfigError(f"--autocast {config.autocast} works from --dtype float32, got {config.dtype}")


def _has_activation(config: TrainConfig) -> bool:
    return config.model.startswith("mlp:") or config.model == "lenet"


def _check_rule(config: TrainConfig) -> None:
    if config.rule not in ALL_RULES:
        raise ConfigError(f"--rule is {_shown(config.rule)}, expected one of {', '.join(ALL_RULES)}")
    for name in ALL_RULES:
        foreign = [key for key in _rule_options(config, name) if name != config.rule]
        if foreign:
            raise ConfigError(f"{option(f'{name}_{foreign[0]}')} is for rule {name}, the rule is {config.rule}")
    if len(config.feedback or "") > _LENGTH or any(len(n) > _RANK for n in re.findall(r"\d+", config.feedback or "")):
        raise ConfigError(f"--feedback is {_shown(config.feedback)}, expected a number below {10**_RANK:,}")
    try:
        rule = made_rule(config)
        if config.feedback is not None:
            family(config.feedback)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.feedback is not None and not rule.draws:
        raise ConfigError(f"--feedback is for rules with random feedback, rule {config.rule} has none: leave it out")
    if config.scale is not None and rule.wiring == "none":
        raise ConfigError(f"--scale is for rules with feedback, rule {config.rule} has none: leave it out")


def _rule_options(config: TrainConfig, name: str) -> dict[str, Any]:
    """The options of a rule that were given; its field ``rate`` is the option ``adafa_rate``."""
    given = {part.name: getattr(config, f"{name}_{part.name}", None) for part in fields(ALL_RULES[name])}
    return {key: value for key, value in given.items() if value is not None}


def made_rule(config: TrainConfig) -> Rule:
    """The ``falign.Rule`` with the options given for it."""
    return ALL_RULES[config.rule](**_rule_options(config, config.rule))


def _found_device(config: TrainConfig) -> str:
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(config.device)
    except (RuntimeError, ValueError, OverflowError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps") or (device.type != "cuda" and device.index):
        raise ConfigError(f"--device is {_shown(config.device)}, expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = f"PyTorch sees {torch.cuda.device_count()} CUDA devices here"
        raise ConfigError(f"--device is {config.device}, but {seen}: use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device is mps, but PyTorch sees none here: use --device cpu")
    if device.type == "mps" and config.dtype == "float64":
        raise ConfigError("--dtype is float64, which --device mps does not have: use --device cpu")
    return config.device


_LENGTH = 60
"""So many letters of a value are shown."""
_RANK = 5
"""So many digits the number of a family of feedback may have."""
_TINY, _LARGE = 1.2e-38, 3.4e38
"""What float32 holds."""
_MOST = 10**12
_RANGES: dict[str, tuple[float, float, str]] = {
    "scale": (_TINY, _LARGE, f"a positive number, from {_TINY} to {_LARGE}"),
    "adafa_rate": (0, 1, "a number from 0 (fa) to 1 (bp)"),
    "learning_rate": (_TINY, inf, f"a positive number, of at least {_TINY}"),
    "rate_decay": (_TINY, 1, f"a number above 0, of at least {_TINY}, at most 1"),
    "momentum": (0, 1 - 1e-7, "a number from 0 to below 1, at most 0.9999999"),
    "weight_decay": (0, inf, "a number of at least 0"),
    "batch_size": (1, _MOST, f"at least 1 and at most {_MOST:,}"),
    "epochs": (0, _MOST, f"at least 0 and at most {_MOST:,}"),
    "ridge": (0, inf, "a number of at least 0"),
    "ridge_steps": (1e-100, inf, "a positive number, of at least 1e-100"),
    "seed": (-(2**63), 2**64 - 1, "a whole number from -2^63 to 2^64 - 1"),
    "measure_every": (0, _MOST, f"at least 0 and at most {_MOST:,}"),
    "probe_size": (2, _MOST, f"at least 2 and at most {_MOST:,}"),
}


def located(dataset: str) -> str:
    """The name of a data set as it is, the path of a folder in full, so that a run finds it from anywhere."""
    try:
        path = Path(dataset).expanduser()
        return str(path.resolve()) if dataset and dataset not in NAMES and path.is_dir() else dataset
    except (OSError, RuntimeError, ValueError):  # no path at all, too long for one, or the home of a user who is none
        return dataset


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
