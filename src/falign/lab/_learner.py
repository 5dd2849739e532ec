"""A network that learns by a rule: how it is made, its steps, its test, its alignment; optimizers and ridge."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from inspect import unwrap
from io import StringIO
from math import cos, pi
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import falign
from falign._preserve import seeded
from falign._wiring import preserve_state, untrained
from falign.feedback import generator
from falign.lab._batches import Samples, label_loss
from falign.lab._divergence import locate, running_order
from falign.lab._models import build
from falign.lab._own_models import (
    Shape,
    as_config_error,
    check_output,
    differing_tensors,
    is_reproducible,
    samples,
    try_single_image,
    try_training,
)
from falign.lab._python_state import Attributes, attribute_fingerprints, storable_attributes
from falign.lab._validate import is_built_in, make_rule
from falign.lab.config import ConfigError, TrainConfig
from falign.layers import kind_of
from falign.measure import Alignment, alignment
from falign.measure.law import ConservationLaw
from falign.theory.two_layer._schedules import SCHEDULES

_PARAMETER = "parameter"
"""Kind of the rows of the alignment that are of a parameter, such as those of recurrent layers."""
_Number = TypeVar("_Number", int, float)
_TEST_BATCH, _TEST_BYTES = 1000, 16 << 20
"""Images or texts of one forward pass of a test: this many, or as many as fit into so many bytes, and at least one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """A converted model with its optimizer.

    Attributes:
        config: The resolved configuration.
        model: The network, converted.
        optimizer: Optimizer of its parameters, learned feedback included.
        order: Names of the modules without children, in the order in which they run.
        layers: Those of them that are linear maps, and have feedback or could have.
        ridge: Penalty on the output layer's weights; None if there is none.
        law: Instrument that checks the steps by the conservation law; None if it is not wanted.
        attributes: Attributes of the model's modules, which checkpoints hold.
        notes: Remarks on the model to print before the first step, a line each.
    """

    config: TrainConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    order: tuple[str, ...]
    layers: tuple[str, ...]
    ridge: "Ridge | None"
    law: ConservationLaw | None
    attributes: Attributes = field(default_factory=lambda: Attributes(nn.Module()))
    notes: tuple[str, ...] = ()

    def step(self, x: Tensor, y: Tensor, done: int) -> tuple[float, int]:
        """Learn from one batch.

        Args:
            x: Images, ``(batch, channels, height, width)``, or texts, ``(batch, context)``.
            y: Labels, ``(batch,)``, or ``(batch, context)``.
            done: Steps done before this one.

        Returns:
            The batch's loss before the step, and the number of its labels that were right.

        Raises:
            Diverged: The loss is not finite; then the step was not made.
        """
        loss, output = self.propagate(x, y, done)
        correct = (output.argmax(-1) == y).sum()
        value, count = torch.stack([loss.double(), correct.double()]).tolist()  # one wait for the device
        if value - value != 0:  # infinite or not a number
            raise self.locate_fault(x, done)
        self.update(done)
        return value, int(count)

    def propagate(self, x: Tensor, y: Tensor, done: int) -> tuple[Tensor, Tensor]:
        """Make the gradients of one batch, after what the rule does between steps; nothing waits for the device.

        Args:
            x: Images, ``(batch, channels, height, width)``, or texts, ``(batch, context)``.
            y: Labels, ``(batch,)``, or ``(batch, context)``.
            done: Steps done before this one.

        Returns:
            The loss, a scalar, and the output, both detached.
        """
        if self.config.mirror_every and done % self.config.mirror_every == 0:
            falign.mirror(self.model)
        if self.config.follow_every and done % self.config.follow_every == 0:
            falign.follow(self.model, x)
        truly = self.config.calibrate and (done + 1) % self.config.calibrate == 0
        with falign.targets(self.model, y), falign.backprop(self.model) if truly else nullcontext(), self._casting():
            output = self.model(x)
            loss = label_loss(output, y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach(), output.detach()

    def update(self, done: int) -> None:
        """Make the optimizer's step with these gradients, and the ridge's."""
        if self.ridge is None:
            self.optimizer.step()
        else:
            self.ridge.around(self.optimizer.step, done, rate=self.optimizer.param_groups[0]["lr"])

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rate of an epoch, counted from 0."""
        rate = required(self.config.learning_rate) * _rate_factor(self.config, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def locate_fault(self, x: Tensor, done: int) -> Exception:
        """Make the exception for numbers that are not finite; it names the layer in which they came up first."""
        return locate(self.model, lambda: self._forward(x), steps=done)

    def test(self, data: Samples) -> tuple[float, float]:
        """Compute mean loss and accuracy, a share from 0 to 1, over the labels of a set, in evaluation mode."""
        self.model.eval()
        loss, correct = 0.0, 0
        try:
            with torch.no_grad():
                for x, y in data.pieces(self._test_batch(data)):
                    output = self._forward(x)
                    loss += label_loss(output.to(self.dtype), y, reduction="sum").item()
                    correct += int((output.argmax(-1) == y).sum())
        finally:
            self.model.train()
        labels = len(data) * data.labels_each
        return loss / labels, correct / labels

    def alignment(self, x: Tensor, y: Tensor) -> Alignment:
        """Measure rule and optimizer on a batch against its true gradient; nothing is left changed."""
        with self.attributes.kept(), self._casting():
            return alignment(self.model, label_loss, x, y, optimizer=self.optimizer)

    def in_running_order(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Move the rows of parameters, which follow those of layers, to where the modules run that they are of."""
        ordered = [row for row in rows if row["kind"] != _PARAMETER]
        for row in rows:
            if row["kind"] == _PARAMETER:
                behind = (at for at, other in enumerate(ordered) if self._place(other) > self._place(row))
                ordered.insert(next(behind, len(ordered)), row)
        return ordered

    def _place(self, row: Mapping[str, Any]) -> int:
        """Return the place in the running order of the module that a row is of, or of the first part of it to run."""
        module = row["layer"].rpartition(".")[0] if row["kind"] == _PARAMETER else row["layer"]
        inside = (at for at, name in enumerate(self.order) if f"{name}.".startswith(f"{module}."))
        return next(inside, -1)

    def has_finite_loss(self, x: Tensor, y: Tensor) -> bool:
        """Tell whether the loss of a batch is a finite number."""
        with torch.no_grad(), falign.targets(self.model, y):
            return bool(torch.isfinite(label_loss(self._forward(x), y)))

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and images."""
        return getattr(torch, self.config.dtype)

    def _test_batch(self, data: Samples) -> int:
        return max(1, min(_TEST_BATCH, _TEST_BYTES // max(1, data.numbers_each * self.dtype.itemsize)))

    def _forward(self, x: Tensor) -> Tensor:
        with self._casting():
            return self.model(x)

    def _casting(self) -> AbstractContextManager[object]:
        return _casting(self.config)


def _rate_factor(config: TrainConfig, epoch: int) -> float:
    """The part of the first learning rate that an epoch has."""
    done = epoch / max(1, config.epochs)
    factors = {"exponential": config.rate_decay**epoch, "linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}
    return factors[config.rate_schedule]


def _casting(config: TrainConfig) -> AbstractContextManager[object]:
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.autocast == "bf16")


def make_learner(
    config: TrainConfig, *, shape: Shape, classes: int, example: Tensor, sizes: Iterable[int] = ()
) -> Learner:
    """Build the network, convert it, and make its optimizer.

    A network of the user's own is made twice from the same seed: one of the two is tried on the example and thrown
    away, and differences between them are noted.

    Args:
        config: The resolved configuration.
        shape: Channels, height and width of the images; of texts, the characters of a context.
        classes: Number of classes; of texts, characters of the vocabulary.
        example: A few normalised images, or texts, on the training's device.
        sizes: Sizes of the batches that will come.

    Returns:
        The learner before its first step.

    Raises:
        ConfigError: The network does not fit the data, or the rule not the network.
    """
    if make_rule(config).targeted and shape == (classes,):  # targets (batch, context) fit both axes of the output then
        raise ConfigError(
            f"--context is {classes}, as many as the text has characters, and --rule {config.rule} could not tell "
            "positions from characters: use another context"
        )
    with seeded(generator(config.seed, "", "making").initial_seed(), [example.device]):
        model, attributes, notes = _network(config, shape, classes, example, single=1 in sizes)
        with preserve_state(model):
            order = _running_order(config, model, example, classes)
        layers = tuple(name for name in order if kind_of(model.get_submodule(name)) is not None)
        _convert(config, model, example)
        optimizer = _make_optimizer(model, config)
        ridge = None
        if config.ridge:
            if not layers:
                raise ConfigError(
                    f"--ridge is for the last nn.Linear or convolution, --model {config.model} has none: leave it out"
                )
            ridge = Ridge(
                model.get_parameter(f"{layers[-1]}.weight"),
                strength=config.ridge,
                schedule=config.ridge_schedule,
                steps=config.ridge_steps,
            )
        law = _law(config, model, optimizer, example) if config.check_law else None
    attributes.load({})  # modules may count their forward passes: the trials above do not count
    for name in untrained(model):
        model.get_parameter(name).requires_grad_(False)  # as the rule has it, which came after the attributes
    return Learner(
        config=config,
        model=model,
        optimizer=optimizer,
        order=order,
        layers=layers,
        ridge=ridge,
        law=law,
        attributes=attributes,
        notes=notes,
    )


def _network(
    config: TrainConfig, shape: Shape, classes: int, example: Tensor, *, single: bool
) -> tuple[nn.Module, Attributes, tuple[str, ...]]:
    """Return the network in training mode on its device, its attributes, and remarks on it."""
    name = config.model

    def placed(model: nn.Module) -> nn.Module:
        with as_config_error(f"--model {name} cannot be used as {config.dtype} on {config.device}"):
            return model.to(example.device, getattr(torch, config.dtype)).train()

    def built() -> nn.Module:
        room = _room(config) if example.device.type == "cpu" else 4
        with as_config_error(f"--model {name} cannot be made"):
            return build(name, shape=shape, classes=classes, seed=config.seed, activation=config.activation, room=room)

    model = built()
    if is_built_in(name):
        model = placed(model)
        if single:
            try_single_image(name, deepcopy(model), example)
        return model, Attributes(model), ()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        twin = built()
    notes, tensors = [], {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    if any(id(tensor) in tensors for tensor in (*twin.parameters(), *twin.buffers())):
        notes.append(f"{name} returns the same weights at every call: --seed has no part in them, a copy is trained")
        with as_config_error(f"--model {name} returns the same weights at every call, and they cannot be copied"):
            model, twin = deepcopy(model), deepcopy(model)
    model, twin = placed(model), placed(twin)
    if unalike := differing_tensors(model, twin):
        notes.append(
            f"{name} draws {_listed(unalike)} by other generators than the global ones of torch, NumPy and Python: "
            "another run with this seed begins with others"
        )
    package = name.partition(".")[0].partition(":")[0]
    here, there = attribute_fingerprints(model, package), attribute_fingerprints(twin, package)
    varying = [key for key in here if here[key] != there.get(key)]
    with as_config_error(f"--model {name} does not run"):
        changing = [
            *try_training(name, twin, example.clone(), classes, single=single),
            *(set(varying) - storable_attributes(model).keys()),
        ]
        reproducible = is_reproducible(name, twin, example, classes)
    if changing:
        notes.append(
            f"{name} keeps {_listed(sorted(set(changing)))} in Python, where no checkpoint holds it: if its numbers "
            "depend on it, --resume does not reach those of a run that was not interrupted (buffers are held)"
        )
    if not reproducible:
        notes.append(
            f"{name} does not give the same numbers again: they depend on something that neither --seed nor a "
            "checkpoint holds, so another run with this seed, and --resume, may come to others"
        )
    return model, Attributes(model, varying), tuple(notes)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _room(config: TrainConfig) -> int:
    """Return the bytes that a run needs for each weight: three times those of weight, gradient, feedback and optimizer.

    Three times, because measuring and saving work on copies: a perceptron of 9 million weights in float32 needed 44 to
    53 bytes for each.
    """
    feedback = make_rule(config).wiring == "layerwise" and config.feedback != "shared"
    return 3 * (2 + feedback + optimizer_slots(config)) * getattr(torch, config.dtype).itemsize


def optimizer_slots(config: TrainConfig) -> int:
    """Return how many numbers the optimizer keeps for each weight."""
    return 2 if config.optimizer != "sgd" else int(bool(config.momentum))


def _convert(config: TrainConfig, model: nn.Module, example: Tensor) -> None:
    what = f"--model {config.model} with --rule {config.rule}"
    with as_config_error(f"{what} cannot be converted"):
        try:
            falign.convert(
                model,
                make_rule(config),
                seed=config.seed,
                feedback=config.feedback,
                scale=config.scale,
                transform=tuple(config.transform.split(",")) if config.transform else None,
                example=example,
            )
        except falign.ConversionError as error:  # its message lists every reason on a line of its own
            raise ConfigError(f"{what}: {error}") from None


def _law(config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, example: Tensor) -> ConservationLaw:
    try:
        with _casting(config):  # the law's tolerance follows the type that the forward passes round to
            return ConservationLaw(model, optimizer, example=example)
    except ValueError as error:
        raise ConfigError(f"--check-law: {error}") from None


def _running_order(config: TrainConfig, model: nn.Module, example: Tensor, classes: int) -> tuple[str, ...]:
    """Run the network once, and name its modules without children in the order in which they ran."""
    output: list[object] = []
    model.eval()
    with as_config_error(f"--model {config.model} does not run on {samples(example)} of shape {tuple(example.shape)}"):
        order = running_order(model, lambda: output.append(model(example)))
    model.train()
    check_output(config.model, output[0], example, classes, "in evaluation")
    return tuple(order)


# The optimizers of ``--optimizer``.


def _without_dynamo(kind: type[torch.optim.Optimizer]) -> Any:
    """Take the decorators off that import Dynamo: nothing is compiled around a step, and importing it takes seconds."""
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        setattr(kind, name, unwrap(getattr(kind, name)))
    kind.step = torch.no_grad()(unwrap(kind.step))
    return kind


@_without_dynamo
class SGD(torch.optim.SGD):
    """PyTorch's SGD, also where some parameters get their first gradient after the first step.

    PyTorch's fused step takes the momenta of all parameters or of none, and fails on a mixture; parameters that come
    later begin with a momentum of zero.
    """

    def _init_group(self, group: Any, params: Any, grads: Any, momentum_buffer_list: Any) -> Any:
        sparse = super()._init_group(group, params, grads, momentum_buffer_list)
        if any(buffer is not None for buffer in momentum_buffer_list):
            for at, buffer in enumerate(momentum_buffer_list):
                if buffer is None:
                    momentum_buffer_list[at] = torch.zeros_like(params[at])
        return sparse


@_without_dynamo
class Adam(torch.optim.Adam):
    """PyTorch's Adam."""


@_without_dynamo
class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW."""


def _make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimizer of all parameters of a model, learned feedback included.

    It is fused where PyTorch can fuse it, one pass over the parameters in place of several: on a CPU that takes a
    quarter of the time for Adam.

    Args:
        model: The model, converted.
        config: A resolved configuration.

    Returns:
        The optimizer.
    """
    rate, decay = required(config.learning_rate), required(config.weight_decay)
    fused = True if torch.device(config.device).type in ("cpu", "cuda") else None
    if config.optimizer == "sgd":
        momentum = required(config.momentum)
        return SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay, fused=fused)
    kind = {"adam": Adam, "adamw": AdamW}[config.optimizer]
    return kind(model.parameters(), lr=rate, weight_decay=decay, fused=fused)


def required(value: _Number | None) -> _Number:
    """Return a number that a resolved configuration has."""
    assert value is not None, "the configuration is not resolved"
    return value


# The ridge penalty on the output layer's weights.


class Ridge:
    """Ridge penalty ``W(t+1) = (1 - ηλ(t)) W(t) - …``, where the dots are the update of any optimizer.

    The penalty is taken from the weights before the step and apart from the gradient, so no momentum, no
    adaptive rate and no weight decay of the optimizer sees it. With plain SGD it equals adding ``λ(t) W`` to
    the gradient.

    Args:
        weight: The output layer's weights.
        strength: λ.
        schedule: A name of ``SCHEDULES``.
        steps: T, in steps; None for a schedule without one.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), theorem 4.6 and the schedules named with it.
    """

    def __init__(self, weight: Tensor, *, strength: float, schedule: str, steps: float | None) -> None:
        self._weight = weight
        self._strength = strength
        self._schedule = SCHEDULES[schedule]
        self._steps = 1.0 if steps is None else steps

    def around(self, update: Callable[[], object], t: int, *, rate: float) -> None:
        """Make the optimizer's update and the ridge's, both from W(t).

        Args:
            update: Makes the optimizer's step.
            t: Steps done before this one.
            rate: η, the learning rate of this step.
        """
        shrink = rate * self._schedule(self._strength, self._steps, t)
        old = self._weight.detach().clone() if shrink else None
        update()
        if old is not None:
            with torch.no_grad():
                self._weight.sub_(old, alpha=shrink)
