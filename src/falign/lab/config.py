"""The configuration of a training run as a value; its fields are the options of ``falign train``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter, Token

__all__ = [
    "ADDED",
    "CONTEXT",
    "LEARNING_RATES",
    "MOMENTUM",
    "TEXTS",
    "WEIGHT_DECAYS",
    "Activation",
    "Autocast",
    "ConfigError",
    "DType",
    "DrtpOutput",
    "Optimizer",
    "Positions",
    "RateSchedule",
    "Schedule",
    "TrainConfig",
    "is_text",
    "option",
    "rule_title",
]

# The help of the command needs this module, so nothing here may import torch: it would take a second.

Activation = Literal["relu", "tanh", "sigmoid", "identity", "gelu"]
Optimizer = Literal["sgd", "adam", "adamw"]
RateSchedule = Literal["exponential", "linear", "cosine"]
Schedule = Literal["constant", "cutoff", "inverse-square", "exponential"]
DType = Literal["float32", "float64"]
DrtpOutput = Literal["softmax", "sigmoid", "linear"]
Positions = Literal["each", "all"]
Autocast = Literal["none", "bf16"]

LEARNING_RATES = {"sgd": 0.01, "adam": 0.001, "adamw": 0.001}
"""{optimizer: default of ``learning_rate``}."""
MOMENTUM = 0.9
"""Default of ``momentum`` for sgd."""
WEIGHT_DECAYS = {"sgd": 0.0, "adam": 0.0, "adamw": 0.01}
"""{optimizer: default of ``weight_decay``}."""
CONTEXT = 64
"""Default of ``context`` for texts."""
ADDED = {"rule_option": (), "context": None, "positions": None, "rate_schedule": "exponential"}
"""{field that earlier versions lacked: its default}: a configuration that leaves them at it is stored as by these."""
TEXTS = ("pydoc",)
"""Texts that are known by name; a file is ``text:FILE``."""

_RULE = Group("Rule", sort_key=1)
_OPTIMIZER = Group("Optimizer", sort_key=2)
_RIDGE = Group("Ridge on the output layer's weights", sort_key=3)
_MACHINE = Group("Numbers and machine", sort_key=4)
_MEASURING = Group("Measuring", sort_key=5)


class ConfigError(ValueError):
    """An impossible option; the message says what came, what was expected, and what to do."""


def _whole(kind: type, tokens: Sequence[Token]) -> int:
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"it is {tokens[0].value}, expected a whole number") from None


_Whole = Annotated[int, Parameter(converter=_whole)]
"""Type of whole numbers with a converter of its own: cyclopts would round 1.5."""


def _depends(text: str) -> Any:
    return lambda _: text


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines the numbers of a run, apart from the data themselves.

    Attributes:
        dataset: Images: digits, mnist, fashion-mnist, cifar10, cifar100, tiny-imagenet, mnist-10k, or the path of a
            folder of IDX files or of images by class. Text, whose next character is learned: pydoc, the reference of
            the Python language that Python brings along, or text:FILE, a file in UTF-8.
        model: For images mlp:SIZES (mlp:784-1000-10), lenet, lenet-average (pooling), lenet-norm (batch normalisation),
            resnet8, resnet20, residual (residual:width=256,blocks=4), or vit (vit:patch=4,width=64,blocks=4,heads=4);
            for text gpt (gpt:width=64,blocks=4,heads=4); for both gru and lstm (gru:hidden=64,layers=1), which read
            images row by row, and package.module:factory; the package is looked for in the working folder first.
        activation: Between the layers of mlp and the kinds of lenet, and in the blocks of residual, vit and gpt.
        rule: bp, fa, dfa, usf, frsf, brsf, drtp, kp, adafa, eprop, dkp, pfa, probe, wm, fdfa, grape, ebd, ldfa, afa,
            frozen or shallow, or package.module:Rule, a rule of your own.
        rule_option: NAME=VALUE, an option of the rule's own: a field of its class; may be given several times.
        feedback: Family of the feedback: normal, uniform, orthogonal, low-rank(RANK), sparse(ENTRIES) or
            shared.
        scale: Size of the feedback; 1 keeps the norm of the error that it carries.
        transform: Of the error that is carried on: centred, signs, ternary(THRESHOLD), quantised(BITS), noisy(SIZE),
            whitened(RIDGE); several with a comma between them, applied in that order.
        mirror_every: wm: one mirroring pass, of 256 samples of noise, before every so many steps.
        follow_every: fdfa, grape, afa: one forward-mode pass before every so many steps.
        calibrate: One step in so many is backpropagated truly, by the weights (0: none).
        adafa_rate: adafa: the part of W - B by which B moves to W at every step.
        drtp_output: drtp: what the output stands for, softmax, sigmoid or linear.
        positions: Direct rules: positions of a layer that the output lacks get one error each alike, or all of them
            one full map.
        optimizer: The optimizer.
        learning_rate: Of the first epoch.
        rate_decay: Factor on the learning rate after every epoch; 1 keeps it constant.
        rate_schedule: Learning rate of epoch k of E, from 0: exponential: η decay^k; linear: η (1 - k/E); cosine:
            η (1 + cos(πk/E))/2. More epochs at --resume make E larger from there on.
        momentum: sgd: its momentum.
        weight_decay: Of all parameters: with sgd and adam part of the gradient, with adamw apart from it.
        context: Text: characters that a model sees at once.
        batch_size: Images a step, or pieces of text.
        epochs: Passes through the training set.
        ridge: Strength λ: the output layer's W ← (1 - ηλ(t)) W - …, η the learning rate, t the step from 0.
        ridge_schedule: λ(t): constant: λ; cutoff: λ for t ≤ T, then 0; inverse-square: λ/(1 + t/T)²;
            exponential: λ exp(-t/T).
        ridge_steps: T of the schedule, in steps.
        seed: Of weights, feedback, batches and dropout, each by a generator of its own: all rules start from
            the same weights and see the same batches.
        device: cpu, cuda, cuda:N, mps, or auto: cuda where there is one.
        dtype: Of weights and images.
        autocast: bf16: forward passes in bfloat16 where it is safe.
        measure_every: Measure loss and alignment every so many steps too, not at the ends of epochs only (0).
        probe_size: Training images on which the alignment is measured, the same ones throughout.
        check_law: Check every step by the conservation law of feedback alignment: exact under --momentum 0.
        tensorboard: Write events for TensorBoard too.
    """

    dataset: str = field(kw_only=False)
    model: str
    activation: Annotated[Activation | None, Parameter(show_default=_depends("relu, for vit and gpt gelu"))] = None
    context: Annotated[_Whole | None, Parameter(show_default=_depends(f"{CONTEXT} for text"))] = None
    epochs: _Whole = 10
    rule: Annotated[str, Parameter(group=_RULE)] = "fa"
    rule_option: Annotated[tuple[str, ...], Parameter(group=_RULE, negative="")] = ()
    feedback: Annotated[str | None, Parameter(group=_RULE, show_default=_depends("normal"))] = None
    scale: Annotated[float | None, Parameter(group=_RULE, show_default=_depends("the rule's"))] = None
    transform: Annotated[str | None, Parameter(group=_RULE, show_default=_depends("none"))] = None
    mirror_every: Annotated[_Whole | None, Parameter(group=_RULE, show_default=_depends("20 for wm"))] = None
    follow_every: Annotated[_Whole | None, Parameter(group=_RULE, show_default=_depends("10 for fdfa, grape, afa"))] = (
        None
    )
    calibrate: Annotated[int, Parameter(group=_RULE)] = 0
    adafa_rate: Annotated[float | None, Parameter(group=_RULE, show_default=_depends("the rule's"))] = None
    drtp_output: Annotated[DrtpOutput | None, Parameter(group=_RULE, show_default=_depends("softmax"))] = None
    positions: Annotated[Positions | None, Parameter(group=_RULE, show_default=_depends("each"))] = None
    optimizer: Annotated[Optimizer, Parameter(group=_OPTIMIZER)] = "sgd"
    learning_rate: Annotated[
        float | None,
        Parameter(
            name=["--learning-rate", "--lr"],
            group=_OPTIMIZER,
            show_default=_depends(", ".join(f"{value} for {name}" for name, value in LEARNING_RATES.items())),
        ),
    ] = None
    rate_decay: Annotated[float, Parameter(group=_OPTIMIZER)] = 1.0
    rate_schedule: Annotated[RateSchedule, Parameter(group=_OPTIMIZER)] = "exponential"
    momentum: Annotated[float | None, Parameter(group=_OPTIMIZER, show_default=_depends(str(MOMENTUM)))] = None
    weight_decay: Annotated[float | None, Parameter(group=_OPTIMIZER, show_default=_depends("0, for adamw 0.01"))] = (
        None
    )
    batch_size: Annotated[_Whole, Parameter(group=_OPTIMIZER)] = 64
    ridge: Annotated[float, Parameter(group=_RIDGE)] = 0.0
    ridge_schedule: Annotated[Schedule, Parameter(group=_RIDGE)] = "constant"
    ridge_steps: Annotated[float | None, Parameter(group=_RIDGE)] = None
    seed: Annotated[_Whole, Parameter(group=_MACHINE)] = 0
    device: Annotated[str, Parameter(group=_MACHINE)] = "auto"
    dtype: Annotated[DType, Parameter(group=_MACHINE)] = "float32"
    autocast: Annotated[Autocast, Parameter(group=_MACHINE)] = "none"
    measure_every: Annotated[_Whole, Parameter(group=_MEASURING)] = 0
    probe_size: Annotated[_Whole, Parameter(group=_MEASURING)] = 256
    check_law: Annotated[bool, Parameter(group=_MEASURING, negative="")] = False
    tensorboard: Annotated[bool, Parameter(group=_MEASURING, negative="")] = False

    def reference(self, rule: str) -> "TrainConfig":
        """Return the configuration of a reference to compare with: all the same, but for the rule and its options."""
        plain = TrainConfig(self.dataset, model=self.model)
        return replace(self, rule=rule, check_law=False, **{name: getattr(plain, name) for name in _OF_RULE})

    def differences(self, other: "TrainConfig") -> dict[str, tuple[Any, Any]]:
        """Return {field: (value here, value there)} of the fields that differ."""
        there = asdict(other)
        return {key: (value, there[key]) for key, value in asdict(self).items() if value != there[key]}

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON, without those that earlier versions lacked where nothing is said by them."""
        return {key: value for key, value in asdict(self).items() if key not in ADDED or value != ADDED[key]}


_OF_RULE = (
    "rule_option", "feedback", "scale", "transform", "mirror_every", "follow_every", "calibrate", "adafa_rate",
    "drtp_output", "positions",
)  # fmt: skip
"""Fields that say something of the rule beside its name."""


def is_text(dataset: str) -> bool:
    """Tell whether a data set is a text, and not one of images."""
    return dataset in TEXTS or dataset.startswith("text:")


def rule_title(config: TrainConfig) -> str:
    """Return the rule as tables and pictures name it: with what is done to its error, and with true steps."""
    transform = f" + {config.transform}" if config.transform else ""
    return config.rule + transform + (f" + a true step in {config.calibrate}" if config.calibrate else "")


def option(name: str) -> str:
    """Return the name of a field as an option of the command."""
    return "DATASET" if name == "dataset" else f"--{name.replace('_', '-')}"
