"""Checking a configuration, and filling in the defaults that depend on other options."""

from dataclasses import fields, replace
from importlib.util import find_spec
from math import inf, isfinite
from pathlib import Path
from typing import Any, get_args

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
            raise ConfigError(f"{option(name)} is {value!r}, expected one of {', '.join(get_args(allowed))}")


def _check_numbers(config: TrainConfig) -> None:
    for name, (low, high, words) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not (isfinite(value) and low <= value <= high):
            raise ConfigError(f"{option(name)} is {value}, expected {words}")


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
        raise ConfigError(f"--rule is {config.rule!r}, expected one of {', '.join(ALL_RULES)}")
    for name in ALL_RULES:
        foreign = [key for key in _rule_options(config, name) if name != config.rule]
        if foreign:
            raise ConfigError(f"{option(f'{name}_{foreign[0]}')} is for rule {name}, the rule is {config.rule}")
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
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"--device is {config.device!r}, expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = f"PyTorch sees {torch.cuda.device_count()} CUDA devices here"
        raise ConfigError(f"--device is {config.device}, but {seen}: use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device is mps, but PyTorch sees none here: use --device cpu")
    if device.type == "mps" and config.dtype == "float64":
        raise ConfigError("--dtype is float64, which --device mps does not have: use --device cpu")
    return config.device


_TINY = 1e-300
_RANGES: dict[str, tuple[float, float, str]] = {
    "scale": (_TINY, inf, "a positive number"),
    "learning_rate": (_TINY, inf, "a positive number"),
    "rate_decay": (_TINY, 1, "a number above 0, at most 1"),
    "momentum": (0, 1 - 1e-12, "a number from 0 to below 1"),
    "weight_decay": (0, inf, "a number of at least 0"),
    "batch_size": (1, inf, "at least 1"),
    "epochs": (0, inf, "at least 0"),
    "ridge": (0, inf, "a number of at least 0"),
    "ridge_steps": (_TINY, inf, "a positive number"),
    "measure_every": (0, inf, "at least 0"),
    "probe_size": (2, inf, "at least 2"),
}


def located(dataset: str) -> str:
    """The name of a data set as it is, the path of a folder in full, so that a run finds it from anywhere."""
    path = Path(dataset).expanduser()
    return str(path.resolve()) if dataset and dataset not in NAMES and path.is_dir() else dataset


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
