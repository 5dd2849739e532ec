"""Pre-training on noise, which turns the weights towards the feedback before there are data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from falign._attached import Feedback, SharedSequence
from falign._convert import targets
from falign._preserve import seeded
from falign._show import Sheet, Shown
from falign._style import Points, dots, height_of, scale_degrees
from falign._survey import call, gradients_aside
from falign._validation import check_memory, describe, positive, step_count, whole_between, whole_number
from falign._wiring import converted, preserve_state, unwrapped
from falign.feedback import generator
from falign.measure._alignment import alignment, trained_parameters
from falign.measure._report import RIGHT_ANGLE, Alignment

_Loss = Callable[[Any, Generator], Tensor]

_LARGEST_RATE = 1e30


@dataclass(frozen=True, kw_only=True)
class NoiseRow:
    """One layer before and after the noise; angles in degrees, on noise that was not trained on.

    Attributes:
        layer: Its name.
        weight_before: ∠(B, W) before; None where B has another shape than W (direct rules) or carries nothing.
        weight_after: The same after.
        error_before: Mean over samples of the angle between the error that the layer hands to its input and the true
            one; None where its input wants none.
        error_after: The same after.
    """

    layer: str
    weight_before: float | None
    weight_after: float | None
    error_before: float | None
    error_after: float | None


@dataclass(frozen=True, kw_only=True)
class NoiseReport(Shown):
    """Pre-training on noise; prints as a table.

    Attributes:
        steps: How many there were.
        losses: Of each step.
        rows: A row a layer, in the order in which they run.
    """

    steps: int
    losses: tuple[float, ...]
    rows: tuple[NoiseRow, ...]

    def _sheet(self) -> Sheet:
        table = [["layer", "B to W", "after", "error", "after"]]
        for row in self.rows:
            angles = (row.weight_before, row.weight_after, row.error_before, row.error_after)
            table.append([row.layer, *("-" if angle is None else f"{angle:.1f}°" for angle in angles)])
        first, last = self.losses[0], self.losses[-1]
        head = f"{self.steps} steps on noise: loss {first:.4g} -> {last:.4g} (random labels: chance, unless by heart)"
        return Sheet(head=head, table=table)

    def _size(self) -> tuple[float, float]:
        return 7.0, height_of(len(self.rows))

    def _draw(self, axes: Any) -> None:
        columns = "weight_before", "weight_after", "error_before", "error_after"
        series = [
            Points(label=label, values=[getattr(row, column) for row in self.rows])
            for label, column in zip(("B to W", "B to W after", "error", "error after"), columns, strict=True)
        ]
        names = [row.layer for row in self.rows]
        dots(axes, names, series, xlabel="degrees", title=f"{self.steps} steps on noise", marked=RIGHT_ANGLE)
        scale_degrees(axes)


def noise(
    model: nn.Module,
    optimizer: Optimizer | float | int = 0.01,
    *,
    example: Any,
    steps: int = 1000,
    batch: int = 64,
    samples: int | None = None,
    loss_fn: _Loss | None = None,
    seed: int = 0,
) -> NoiseReport:
    """Train a converted model on inputs N(0, 1) with random labels, so that its weights turn towards the feedback.

    The law holds in these steps as in all others, whatever the data: ``ΔV = Δ(½|w_in|² + ½b²) - ½Ση²|∇|²`` for each
    neuron, so noise aligns as much as it makes incoming weights grow. C itself only rises, by the last term: a neuron
    that is not ``aligned_forever`` at the start is not afterwards, unless the optimizer has weight decay, which lowers
    C. Of noise that is drawn anew in every step, as the authors do, there is nothing to learn: the output goes to
    chance, the weights above shrink, and what is left of them turns slowly (784-100-10, SGD of rate .01: from 90° to
    84° in 12,000 steps; at a rate of .5 the noise of the steps turned weights away). A fixed set can be learned by
    heart, by which incoming weights do grow (``samples=512``, rate .05: 32° in 600 steps).

    The model runs in the mode that it is in. Weights, learned and moving feedback change; gradients, the random
    generators and all buffers outside the feedback (running statistics of batch normalisation, which have seen noise)
    are put back as they were.

    Args:
        model: A converted model, before it is trained on data.
        optimizer: One of its own, whose state goes with the noise; or the learning rate of plain SGD.
        example: An input of the model, for shapes and types: floating-point tensors become noise of ``batch`` samples
            along the first axis, whole numbers (tokens) are drawn from those of the example, truth values (masks) from
            its rows.
        steps: How many.
        batch: Samples a step, at least two.
        samples: Size of a fixed set from which the batches are drawn; None: new noise in every step.
        loss_fn: (output, random generator on the CPU) -> loss, which draws its own targets. Default, for an output
            (batch, classes): cross-entropy with labels drawn evenly; of one output a logistic loss with even odds.
        seed: Of all that is random, dropout and the like included.

    Returns:
        The losses, and the angles of each layer before and after.

    Raises:
        TypeError: The optimizer is none, and no learning rate.
        ValueError: The model is not converted, its rule has no feedback, it does not run on the example, its output is
            not (batch, classes) and there is no loss_fn, there is one that draws its own targets of a fixed set, a
            number is out of range, or the loss is no longer finite (the weights are then those of the last step).

    Source: Cheon, Lee and Paik 2024 (NeurIPS), Pretraining with random noise for fast and robust learning without
    weight transport. What the law says of it is derived here.
    """
    inner = unwrapped(model)
    if all(wiring.rule.wiring == "none" for wiring in converted(inner)):
        name = " + ".join(dict.fromkeys(wiring.rule.name for wiring in converted(inner)))
        raise ValueError(f"rule {name!r} has no feedback that the weights could turn to: convert with another rule")
    seed, steps = whole_number("seed", seed), step_count(steps, 1)
    batch = whole_between("batch", batch, 2)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn is {describe(loss_fn)}, expected a function of the output and a random generator")
    if samples is not None and whole_between("samples", samples, 1) and loss_fn is not None:
        raise ValueError(
            "loss_fn draws new targets in every step, which no fixed set has: leave out samples or loss_fn"
        )
    if not isinstance(optimizer, Optimizer):
        if isinstance(optimizer, bool) or not isinstance(optimizer, (int, float)):
            raise TypeError(f"optimizer is {describe(optimizer)}, expected a torch optimizer or a learning rate")
        if positive("optimizer", optimizer) > _LARGEST_RATE:
            raise ValueError(f"optimizer is {describe(optimizer)}, expected a learning rate that float32 can use")
        optimizer = SGD([p for p in inner.parameters() if p.requires_grad], lr=float(optimizer))
    trained_parameters(inner, optimizer)
    classes = 0 if loss_fn is not None else _classes(model, example)

    def drawn(random: Generator, count: int = batch) -> tuple[Any, Tensor | None]:
        x = tree_map(lambda leaf: _noise_like(leaf, count, random), example)
        if loss_fn is not None:
            return x, None
        labels = torch.randint(max(classes, 2), (count,), generator=random, device="cpu")
        return x, labels.to(next(inner.parameters()).device)

    def judged(output: Any, labels: Tensor | None, random: Generator) -> Tensor:
        return _default_loss(output, labels) if loss_fn is None else loss_fn(output, random)

    def measured() -> Alignment:
        x, labels = drawn(generator(seed, "", "noise to measure on"))
        return alignment(inner, lambda f, y: judged(f, y, generator(seed, "", "labels to measure on")), x, labels)

    random, losses, devices = generator(seed, "", "noise"), [], {p.device for p in inner.parameters()}
    fixed = None if samples is None else drawn(random, samples)
    with seeded(seed % 2**64, devices), gradients_aside(inner), _buffers_kept(inner), torch.enable_grad():
        before = measured()
        for step in range(steps):
            x, labels = drawn(random) if fixed is None else _picked(fixed, batch, random)
            with nullcontext() if labels is None else targets(model, labels):
                loss = judged(call(model, x), labels, random)
            losses.append(float(loss.detach()))
            if not abs(losses[-1]) < float("inf"):
                raise ValueError(f"the loss is {losses[-1]} after {step} steps on noise: lower the learning rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        after = {row.layer: row for row in measured().layers}
    rows = tuple(
        NoiseRow(
            layer=row.layer,
            weight_before=row.weight_angle,
            weight_after=after[row.layer].weight_angle,
            error_before=row.delivered_angle,
            error_after=after[row.layer].delivered_angle,
        )
        for row in before.layers
    )
    return NoiseReport(steps=steps, losses=tuple(losses), rows=rows)


def _noise_like(leaf: Any, batch: int, random: Generator) -> Any:
    """Draw what stands for one leaf of the example."""
    if not isinstance(leaf, Tensor) or leaf.dim() == 0:
        return leaf
    plain = {"generator": random, "device": "cpu"}
    check_memory("the noise", batch, *leaf.shape[1:])
    if leaf.is_floating_point():
        return torch.randn((batch, *leaf.shape[1:]), dtype=torch.float32, **plain).to(leaf)
    if leaf.is_complex() or not leaf.numel():
        raise ValueError(f"the example has {describe(leaf)}, of which there is no noise N(0, 1)")
    if leaf.dtype is torch.bool:
        return leaf[torch.randint(len(leaf), (batch,), **plain).to(leaf.device)]
    return leaf.flatten()[torch.randint(leaf.numel(), (batch, *leaf.shape[1:]), **plain).to(leaf.device)]


def _picked(fixed: Any, batch: int, random: Generator) -> Any:
    """Pick a batch of a set of samples."""
    count = next(len(leaf) for leaf in tree_leaves(fixed) if isinstance(leaf, Tensor) and leaf.dim())
    rows = torch.randint(count, (batch,), generator=random, device="cpu")
    return tree_map(lambda leaf: leaf[rows.to(leaf.device)] if isinstance(leaf, Tensor) and leaf.dim() else leaf, fixed)


def _classes(model: nn.Module, example: Any) -> int:
    """Give the number of classes of a model's output."""
    try:
        with torch.no_grad(), preserve_state(unwrapped(model)):
            output = call(unwrapped(model), example)
    except Exception as error:
        raise ValueError(f"the model does not run on the example: {type(error).__name__}: {error}") from error
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() not in (1, 2):
        raise ValueError(
            f"the model returns {describe(output)}, expected (batch, classes): give a loss_fn (output, generator) -> "
            "loss that draws the targets for it"
        )
    return 1 if output.dim() == 1 else output.shape[1]


def _default_loss(output: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    if output.dim() == 1 or output.shape[1] == 1:
        answers = labels.to(output.dtype).view(output.shape)
        return nn.functional.binary_cross_entropy_with_logits(output, answers)
    return nn.functional.cross_entropy(output, labels)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put all buffers back afterwards but those of the feedback."""
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        if not isinstance(module, (Feedback, SharedSequence))
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if buffer is not None and value is not None:
                    buffer.copy_(value)
