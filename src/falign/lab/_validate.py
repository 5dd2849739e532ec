"""Checks of a configuration, and the defaults that depend on other options.

What needs PyTorch (rules, devices, data) is imported where it is asked: :func:`check_options` needs none of it, so that
a wrong option is refused at once.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from importlib.util import find_spec
from math import inf, isfinite
from numbers import Real
from operator import index
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from falign.lab._streams import suggestion
from falign.lab.config import (
    CONTEXT,
    LEARNING_RATES,
    MOMENTUM,
    WEIGHT_DECAYS,
    Activation,
    Autocast,
    ConfigError,
    DrtpOutput,
    DType,
    Optimizer,
    Positions,
    RateSchedule,
    Schedule,
    TrainConfig,
    is_text,
    option,
)

if TYPE_CHECKING:
    from falign.rules import Rule


_LENGTH = 60
"""Letters of a value that a message shows."""
DIGITS = 12
"""Digits that a size of a model may have: no memory holds larger ones."""
_RANK = 5
"""Digits that the number of a family of feedback may have."""
_TINY, _LARGE = 1.2e-38, 3.4e38
"""Smallest and largest positive normal number of float32, rounded."""
_LARGEST = 10**12
_RANGES: dict[str, tuple[float, float, str]] = {
    "scale": (_TINY, _LARGE, f"a positive number, from {_TINY} to {_LARGE}"),
    "mirror_every": (1, _LARGEST, f"at least 1 and at most {_LARGEST:,}"),
    "follow_every": (1, _LARGEST, f"at least 1 and at most {_LARGEST:,}"),
    "calibrate": (0, _LARGEST, f"a number of steps, at least 0 and at most {_LARGEST:,}"),
    "adafa_rate": (0, 1, "a number from 0 (fa) to 1 (bp)"),
    "learning_rate": (_TINY, inf, f"a positive number, of at least {_TINY}"),
    "rate_decay": (_TINY, 1, f"a number above 0, of at least {_TINY}, at most 1"),
    "momentum": (0, 1 - 1e-7, "a number from 0 to below 1, at most 0.9999999"),
    "weight_decay": (0, inf, "a number of at least 0"),
    "context": (1, _LARGEST, f"at least 1 and at most {_LARGEST:,}"),
    "batch_size": (1, _LARGEST, f"at least 1 and at most {_LARGEST:,}"),
    "epochs": (0, _LARGEST, f"at least 0 and at most {_LARGEST:,}"),
    "ridge": (0, inf, "a number of at least 0"),
    "ridge_steps": (1e-100, inf, "a positive number, of at least 1e-100"),
    "seed": (-(2**63), 2**64 - 1, "a whole number from -2^63 to 2^64 - 1"),
    "measure_every": (0, _LARGEST, f"at least 0 and at most {_LARGEST:,}"),
    "probe_size": (2, _LARGEST, f"at least 2 and at most {_LARGEST:,}"),
}


def resolve(config: TrainConfig) -> TrainConfig:
    """Check a configuration and fill in the defaults that depend on other options.

    Args:
        config: A configuration as it was given.

    Returns:
        A configuration that says everything; resolving it again changes nothing.

    Raises:
        ConfigError: An option is impossible, contradicts another one, or would have no effect.
    """
    config = _resolve_rule(check_options(config))
    return replace(
        config,
        dataset=resolve_dataset(config.dataset),
        activation=config.activation or default_activation(config.model),
        context=(config.context or CONTEXT) if is_text(config.dataset) else None,
        learning_rate=_or(config.learning_rate, LEARNING_RATES[config.optimizer]),
        momentum=_or(config.momentum, MOMENTUM) if config.optimizer == "sgd" else None,
        weight_decay=_or(config.weight_decay, WEIGHT_DECAYS[config.optimizer]),
        device=_resolve_device(config),
    )


def check_options(config: TrainConfig) -> TrainConfig:
    """Check all that can be checked without rules, devices and data.

    Args:
        config: A configuration as it was given.

    Returns:
        The same configuration in Python's own types.

    Raises:
        ConfigError: An option is of another type, out of range, contradicts another one, or would have no effect.
    """
    config = _convert_types(config)
    named = {name: as_module(getattr(config, name), option(name)) for name in ("dataset", "model", "rule")}
    config = replace(config, **named)
    check_model(config.model)
    _check_choices(config)
    _check_ranges(config)
    _check_effects(config)
    return config


BUILT_IN: dict[str, dict[str, int | None]] = {
    "lenet": {},
    "lenet-average": {},
    "lenet-norm": {},
    "resnet8": {},
    "resnet20": {},
    "residual": {"width": 256, "blocks": 4},
    "gru": {"hidden": 64, "layers": 1},
    "lstm": {"hidden": 64, "layers": 1},
    "vit": {"patch": None, "width": 64, "blocks": 4, "heads": 4},
    "gpt": {"width": 64, "blocks": 4, "heads": 4},
}
"""{model of falign's own: its sizes and their defaults}, apart from mlp; None follows from the data."""
RULES = (
    *("bp", "fa", "dfa", "usf", "frsf", "brsf", "drtp", "kp", "adafa", "eprop", "dkp", "pfa", "probe", "wm", "fdfa"),
    *("grape", "ebd", "ldfa", "afa", "frozen", "shallow"),
)
DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "mnist-10k")
"""Names of ``falign.ALL_RULES`` and ``falign.lab.data.NAMES``, which take seconds to import; a test compares them."""
_MODELS = f"mlp:SIZES, {', '.join(BUILT_IN)} or package.module:factory"


def is_built_in(model: str) -> bool:
    """Tell whether a text names a network of falign's own, rightly or wrongly written, and none of the user's.

    ``gpt:width=32`` does, but ``gpt:make`` names a factory in a module gpt.
    """
    name, _, rest = model.partition(":")
    return name == "mlp" or model in BUILT_IN or bool(BUILT_IN.get(name) and not _is_path(rest))


def is_code(dataset: str) -> bool:
    """Tell whether a text names a function that makes a data set, ``package.module:factory``, and no folder or text."""
    module, _, path = dataset.partition(":")
    return not is_text(dataset) and _is_path(module) and _is_path(path)


def as_module(text: str, name: str) -> str:
    """Return code in a file, ``./mine.py:make``, as an import finds it, ``mine:make``; other texts as they are.

    Args:
        text: The text.
        name: The option that it was given by.

    Raises:
        ConfigError: The file is not in the working folder or below.
    """
    file, _, path = text.rpartition(".py:")
    if not file or not _is_path(path) or is_text(text):
        return text
    place = Path(os.path.normpath(Path.cwd() / f"{file}.py"))
    parts = place.with_suffix("").relative_to(Path.cwd()).parts if place.is_relative_to(Path.cwd()) else ()
    if not parts or not all(part.isidentifier() for part in parts):
        raise ConfigError(
            f"{name} is {_shorten(text)}, expected a file in the working folder or below, each name of letters, digits "
            "and underscores, as an import finds it: go to its folder, or give package.module:name"
        )
    return f"{'.'.join(parts)}:{path}"


def check_model(model: str) -> None:
    """Refuse a text that names no network by its form; whether there is such a factory is seen when it is imported.

    Raises:
        ConfigError: The text is none of mlp:SIZES, the other models of falign, and package.module:factory.
    """
    if model.partition(":")[0] == "mlp":
        if not re.fullmatch(r"mlp:[1-9][0-9]*(-[1-9][0-9]*)+", model):
            expected = "sizes like mlp:784-1000-10: inputs, hidden layers, classes"
            raise ConfigError(f"--model is {_shorten(model)}, expected {expected}")
    elif is_built_in(model):
        sizes(model)
    else:
        module, _, path = model.partition(":")
        if not (_is_path(module) and _is_path(path)):
            close = suggestion(model, ("mlp", *BUILT_IN))
            raise ConfigError(f"--model is {_shorten(model)}, expected {_MODELS}{close}: see falign train --help")


def _is_path(text: str) -> bool:
    return all(name.isidentifier() for name in text.split("."))


def sizes(model: str) -> dict[str, int | None]:
    """Read the sizes of a model, ``vit:width=32,blocks=2``; those that are not given are the defaults.

    Args:
        model: A model of ``BUILT_IN``, with or without sizes.

    Raises:
        ConfigError: A size is unknown, given twice or no whole number of at least 1, or heads do not divide the width.
    """
    name, colon, text = model.partition(":")
    known, given = BUILT_IN[name], {}
    for part in text.split(",") if colon else ():
        key, _, value = part.partition("=")
        if key not in known or key in given or not re.fullmatch("[1-9][0-9]*", value):
            example = ",".join(f"{key}={value or 4}" for key, value in known.items())
            raise ConfigError(
                f"--model is {_shorten(model)}, expected {name}, or sizes like {name}:{example}, each a whole number "
                "of at least 1, given once or left out"
            )
        if len(value) > DIGITS:
            raise ConfigError(f"--model {model[:40]}… has a {key} of {value[:DIGITS]}…: no memory holds that, use less")
        given[key] = int(value)
    read = known | given
    width, heads = read.get("width"), read.get("heads")
    if width and heads and width % heads:
        raise ConfigError(
            f"--model {model} has a width of {width} for {heads} heads, which share it: use a multiple of {heads}"
        )
    return read


def _convert_types(config: TrainConfig) -> TrainConfig:
    """Convert to Python's own types; NumPy's numbers are numbers, but texts and truth values are not."""
    kinds, converted = get_type_hints(TrainConfig), {}
    for part in fields(config):
        value, kind = getattr(config, part.name), kinds[part.name]
        needed = part.default is not None  # what is None by default may be None
        convert, words = _KINDS.get(
            next((each for each in _KINDS if each in (kind, get_origin(kind), *get_args(kind))), None), (None, "")
        )
        if convert is None or (value is None and not needed):
            continue
        try:
            converted[part.name] = convert(value)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{option(part.name)} is {_shorten(value)}, expected {words}") from None
    return replace(config, **converted)


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


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)):
        raise TypeError
    return tuple(map(_text, value))


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


_KINDS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (_truth, "True or False"),
    int: (_whole, "a whole number"),
    float: (_real, "a number"),
    tuple: (_texts, "texts NAME=VALUE"),
    str: (_text, "a text"),
}


def _shorten(value: object) -> str:
    """Return a value as it stands in a message."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print numbers of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"


def _check_choices(config: TrainConfig) -> None:
    choices = {
        "activation": Activation,
        "drtp_output": DrtpOutput,
        "positions": Positions,
        "optimizer": Optimizer,
        "rate_schedule": RateSchedule,
        "ridge_schedule": Schedule,
        "dtype": DType,
        "autocast": Autocast,
    }
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in get_args(allowed) and not (value is None and getattr(TrainConfig, name) is None):
            raise ConfigError(f"{option(name)} is {_shorten(value)}, expected one of {', '.join(get_args(allowed))}")


def _check_ranges(config: TrainConfig) -> None:
    for name, (low, high, words) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not (low <= value <= high and isfinite(value)):
            raise ConfigError(f"{option(name)} is {_shorten(value)}, expected {words}")
    rate = _or(config.learning_rate, LEARNING_RATES[config.optimizer])
    if rate * config.ridge > _LARGE:
        raise ConfigError(
            f"--ridge is {config.ridge}, which times the learning rate {rate} is more than float32 holds: use less"
        )


def _check_effects(config: TrainConfig) -> None:
    """Refuse options that would have no effect: whoever gave one expects it to have."""
    ineffective = (
        ("momentum", config.optimizer != "sgd", f"for sgd, the optimizer is {config.optimizer}"),
        (
            "activation",
            default_activation(config.model) is None,
            f"for {', '.join(_ACTIVATIONS)}, the model is {config.model[:_LENGTH]}",
        ),
        ("context", not is_text(config.dataset), f"for text, the data set is {_shorten(config.dataset)}"),
        ("ridge_steps", config.ridge_schedule == "constant", "for schedules other than constant"),
    )
    for name, without_effect, why in ineffective:
        if getattr(config, name) is not None and without_effect:
            raise ConfigError(f"{option(name)} is {why}: leave it out")
    if config.rate_schedule != "exponential" and config.rate_decay != 1:
        raise ConfigError(
            f"--rate-decay {config.rate_decay} has no effect under --rate-schedule {config.rate_schedule}: "
            "leave one of them out"
        )
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


_ACTIVATIONS: dict[str, Activation] = {
    "mlp": "relu",
    "lenet": "relu",
    "lenet-average": "relu",
    "lenet-norm": "relu",
    "residual": "relu",
    "vit": "gelu",
    "gpt": "gelu",
}
"""{model of which ``--activation`` chooses the activation: the one that it has by default}."""


def default_activation(model: str) -> Activation | None:
    """Return the activation of a model of which ``--activation`` chooses it; None for others."""
    return _ACTIVATIONS.get(model.partition(":")[0]) if is_built_in(model) else None


def _resolve_rule(config: TrainConfig) -> TrainConfig:
    """Check rule and feedback, and move options of the rule to fields of their own, where there are such.

    Returns:
        The configuration.

    Raises:
        ConfigError: There is no such rule or feedback, or an option is not for it.
    """
    from falign.feedback import family
    from falign.rules import ALL_RULES, Rule
    from falign.transforms import transforms

    for name in ALL_RULES:
        for part in fields(ALL_RULES[name]) if name != config.rule else ():
            if getattr(config, f"{name}_{part.name}", None) is not None:
                raise ConfigError(f"{option(f'{name}_{part.name}')} is for rule {name}, the rule is {config.rule}")
    if len(config.feedback or "") > _LENGTH or any(len(n) > _RANK for n in re.findall(r"\d+", config.feedback or "")):
        raise ConfigError(f"--feedback is {_shorten(config.feedback)}, expected a number below {10**_RANK:,}")
    options = _rule_options(config)
    if config.positions is not None and "positions" not in options:
        raise ConfigError(f"--positions is for direct rules, the rule is {config.rule}: leave it out")
    rule = make_rule(config)
    try:
        if config.feedback is not None:
            family(config.feedback)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        transforms(tuple(config.transform.split(",")) if config.transform is not None else None)
    except ValueError as error:
        raise ConfigError(f"--transform is {_shorten(config.transform)}: {error}") from None
    if config.feedback is not None and not rule.draws:
        raise ConfigError(f"--feedback is for rules with random feedback, rule {config.rule} has none: leave it out")
    for name in ("scale", "transform", "calibrate"):
        if getattr(config, name) not in (None, 0) and rule.wiring == "none":
            raise ConfigError(f"--{name} is for rules with feedback, rule {config.rule} has none: leave it out")
    if config.mirror_every is not None and not rule.answers_noise:
        raise ConfigError(f"--mirror-every is for rule wm, the rule is {config.rule}: leave it out")
    follows = type(rule).follow is not Rule.follow
    if config.follow_every is not None and not follows:
        raise ConfigError(f"--follow-every is for rules fdfa, grape and afa, the rule is {config.rule}: leave it out")
    if rule.answers_noise:
        config = replace(config, mirror_every=config.mirror_every or 20)
    if follows:
        config = replace(config, follow_every=config.follow_every or 10)
    named = {key: name for name in options if hasattr(config, key := _field(config.rule, name))}
    rest = tuple(f"{name}={value}" for name, value in options.items() if name not in named.values())
    return replace(config, rule_option=rest, **{key: options[name] for key, name in named.items()})


def _field(rule: str, name: str) -> str:
    """Return the field of a configuration for an option of a rule, where there is one; rules share ``positions``."""
    return name if name == "positions" else f"{rule}_{name}"


def _rule_options(config: TrainConfig) -> dict[str, Any]:
    """Return {field of the rule: value} of the options given by ``--rule-option`` or by ``--adafa-rate`` and the like.

    Raises:
        ConfigError: The rule has no such option, it is given twice, or its value is of another kind.
    """
    from falign.lab._own_models import as_config_error, rule_class

    rule = rule_class(config.rule)
    with as_config_error(f"the options of --rule {config.rule} cannot be read"):
        hints = get_type_hints(rule)
        kinds = {part.name: hints[part.name] for part in fields(rule) if part.init}
    given: dict[str, Any] = {}
    for text in config.rule_option:
        name, equals, value = text.partition("=")
        if not equals or name not in kinds:
            takes = ", ".join(f"{name}=…" for name in kinds) or "none: leave it out"
            raise ConfigError(f"--rule-option is {_shorten(text)}, but the options of rule {config.rule} are {takes}")
        if name in given:
            raise ConfigError(f"--rule-option {name} is given twice: leave one of them out")
        given[name] = _value(name, value, kinds[name])
    for name in kinds:
        value = getattr(config, _field(config.rule, name), None)
        if value is not None and given.setdefault(name, value) != value:
            raise ConfigError(
                f"{option(_field(config.rule, name))} and --rule-option {name} differ: leave one of them out"
            )
    return {name: given[name] for name in kinds if name in given}


def _value(name: str, text: str, kind: Any) -> Any:
    """Convert a text of the command line to a field's type.

    Raises:
        ConfigError: It is no such value.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    allowed = [value for each in kinds for value in (get_args(each) if get_origin(each) is Literal else (each,))]
    for each in allowed:
        if not isinstance(each, type):  # a value of Literal
            if text == str(each):
                return each
        elif each in (bool, NoneType):
            words: dict[str, Any] = {"none": None} if each is NoneType else {"true": True, "false": False}
            if text.lower() in words:
                return words[text.lower()]
        elif each in (int, float, str):
            with suppress(ValueError):
                return each(text)
    expectations = {bool: "true or false", int: "a whole number", float: "a number", NoneType: "none"}
    expected = (expectations.get(each, "a text" if isinstance(each, type) else str(each)) for each in allowed)
    raise ConfigError(f"--rule-option {name} is {_shorten(text)}, expected {' or '.join(expected)}")


def make_rule(config: TrainConfig) -> "Rule":
    """Make the rule with the options given for it.

    Raises:
        ConfigError: It does not take them.
    """
    from falign.lab._own_models import as_config_error, rule_class
    from falign.rules import ALL_RULES

    make, options = rule_class(config.rule), _rule_options(config)
    if config.rule not in ALL_RULES:
        with as_config_error(f"--rule {config.rule} cannot be made"):
            return make(**options)
    try:
        return make(**options)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _resolve_device(config: TrainConfig) -> str:
    import torch

    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(config.device)
    except (RuntimeError, ValueError, OverflowError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps") or (device.type != "cuda" and device.index):
        raise ConfigError(f"--device is {_shorten(config.device)}, expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = f"PyTorch sees {torch.cuda.device_count()} CUDA devices here"
        raise ConfigError(f"--device is {config.device}, but {seen}: use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device is mps, but PyTorch sees none here: use --device cpu")
    if device.type == "mps" and config.dtype == "float64":
        raise ConfigError("--dtype is float64, which --device mps does not have: use --device cpu")
    return config.device


def resolve_dataset(dataset: str) -> str:
    """Return the name of a data set as it is, and a path in full: a run shall find folder or text from anywhere."""
    from falign.lab.data import NAMES

    try:
        if dataset.startswith("text:"):
            path = Path(dataset.removeprefix("text:")).expanduser()
            return f"text:{path.resolve()}" if path.is_file() else dataset
        path = Path(dataset).expanduser()
        return str(path.resolve()) if dataset and dataset not in NAMES and path.is_dir() else dataset
    except (OSError, RuntimeError, ValueError):  # no path at all, too long for one, or the home of a user who is none
        return dataset


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
