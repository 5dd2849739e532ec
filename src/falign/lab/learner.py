"""A network that learns by a rule: its steps, its test, its alignment."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import falign
from falign.lab.batches import Images
from falign.lab.completion import made_rule
from falign.lab.config import ConfigError, TrainConfig
from falign.lab.divergence import locate, running_order
from falign.lab.models import Shape, build
from falign.lab.optimizers import make_optimizer, number
from falign.lab.ridge import Ridge
from falign.layers import kind_of
from falign.measure import Alignment, alignment
from falign.measure.law import ConservationLaw

_AT_ONCE = 1000
"""Images of one forward pass of a test."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """A converted model with its optimizer.

    Attributes:
        config: The completed configuration.
        model: The network, converted.
        optimizer: Made from its parameters, learned feedback included.
        layers: Names of the linear maps that have feedback or could have, in the order in which they run.
        ridge: What shrinks the output layer's weights, if anything does.
        law: What checks the steps by the conservation law, if it is wanted.
    """

    config: TrainConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    layers: tuple[str, ...]
    ridge: Ridge | None
    law: ConservationLaw | None

    def step(self, x: Tensor, y: Tensor, done: int) -> tuple[float, int]:
        """Learn from one batch.

        Args:
            x: Images, ``(batch, channels, height, width)``.
            y: Labels, ``(batch,)``.
            done: Steps done before this one.

        Returns:
            The batch's loss before the step, and how many of its images were right.

        Raises:
            Diverged: The loss is not finite; then the step was not made.
        """
        with falign.targets(self.model, y), self._casting():
            output = self.model(x)
            loss = cross_entropy(output, y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        right = (output.detach().argmax(1) == y).sum()
        value, count = torch.stack([loss.detach().double(), right.double()]).tolist()  # one wait for the device
        if value - value != 0:  # infinite or not a number
            raise self.fault(x, done)
        if self.ridge is None:
            self.optimizer.step()
        else:
            self.ridge.around(self.optimizer.step, done, rate=self.optimizer.param_groups[0]["lr"])
        return value, int(count)

    def begin(self, epoch: int) -> None:
        """Set the learning rate of an epoch, counted from 0: ``η rate_decay^epoch``."""
        for group in self.optimizer.param_groups:
            group["lr"] = number(self.config.learning_rate) * self.config.rate_decay**epoch

    def fault(self, x: Tensor, done: int) -> Exception:
        """What to raise when something is not finite: it says which layer was the first."""
        return locate(self.model, lambda: self._forward(x), done=done)

    def test(self, images: Images) -> tuple[float, float]:
        """Mean loss and share of right answers over a set, in evaluation mode."""
        self.model.eval()
        loss, right = 0.0, 0
        try:
            with torch.no_grad():
                for x, y in images.pieces(_AT_ONCE):
                    output = self._forward(x)
                    loss += cross_entropy(output.to(self.dtype), y, reduction="sum").item()
                    right += int((output.argmax(1) == y).sum())
        finally:
            self.model.train()
        return loss / len(images), right / len(images)

    def alignment(self, x: Tensor, y: Tensor) -> Alignment:
        """What the rule and the optimizer do with a batch, beside its true gradient; nothing is left changed."""
        with self._casting():
            return alignment(self.model, lambda output, y: cross_entropy(output, y), x, y, optimizer=self.optimizer)

    def is_finite(self, x: Tensor, y: Tensor) -> bool:
        """Whether the loss of a batch is a finite number."""
        with torch.no_grad(), falign.targets(self.model, y):
            return bool(torch.isfinite(cross_entropy(self._forward(x), y)))

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and images."""
        return getattr(torch, self.config.dtype)

    def _forward(self, x: Tensor) -> Tensor:
        with self._casting():
            return self.model(x)

    def _casting(self) -> AbstractContextManager[object]:
        return _casting(self.config)


def _casting(config: TrainConfig) -> AbstractContextManager[object]:
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.autocast == "bf16")


def make(config: TrainConfig, *, shape: Shape, classes: int, example: Tensor) -> Learner:
    """Build the network, convert it, and make its optimizer.

    Args:
        config: The completed configuration.
        shape: Channels, height and width of the images.
        classes: Number of classes.
        example: A few normalised images, on the training's device.

    Returns:
        The learner before its first step.

    Raises:
        ConfigError: The network does not fit the data, or the rule not the network.
    """
    model = build(config.model, shape=shape, classes=classes, seed=config.seed, activation=config.activation)
    model = model.to(example.device, example.dtype).train()
    layers = _layers(config, model, example, classes)
    try:
        falign.convert(
            model,
            made_rule(config),
            seed=config.seed,
            feedback=config.feedback,
            scale=config.scale,
            example=example,
        )
    except falign.ConversionError as error:
        raise ConfigError(f"--model {config.model} with --rule {config.rule}: {error}") from None
    optimizer = make_optimizer(model, config)
    ridge = None
    if config.ridge:
        ridge = Ridge(
            model.get_parameter(f"{layers[-1]}.weight"),
            strength=config.ridge,
            schedule=config.ridge_schedule,
            steps=config.ridge_steps,
        )
    law = _law(config, model, optimizer, example) if config.check_law else None
    return Learner(config=config, model=model, optimizer=optimizer, layers=layers, ridge=ridge, law=law)


def _law(config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, example: Tensor) -> ConservationLaw:
    try:
        with _casting(config):  # what the forward passes round to is what the residual is judged by
            return ConservationLaw(model, optimizer, example=example)
    except ValueError as error:
        raise ConfigError(f"--check-law: {error}") from None


def _layers(config: TrainConfig, model: nn.Module, example: Tensor, classes: int) -> tuple[str, ...]:
    output: list[object] = []
    model.eval()
    try:
        ran = running_order(model, lambda: output.append(model(example)))
    except Exception as error:
        raise ConfigError(
            f"--model {config.model} does not run on images of shape {tuple(example.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        model.train()
    (result,) = output
    came = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
    if came != (len(example), classes):
        raise ConfigError(
            f"--model {config.model} returned {came} for {len(example)} images, expected "
            f"{(len(example), classes)}: one number for each of the {classes} classes"
        )
    layers = tuple(name for name in ran if kind_of(model.get_submodule(name)) is not None)
    if not layers:
        raise ConfigError(f"--model {config.model} has no nn.Linear and no convolution: nothing in it can learn")
    return layers
