"""Everything that a run needs to go on as if it had not been interrupted, in one file.

A checkpoint is one safetensors file, so that its tensors and its numbers cannot come from two moments.
Tensors: ``model.*``, the model's ``state_dict`` (with fixed feedback it loads into the plain network);
``feedback.*``, the buffers of the feedback outside it; ``optimizer.I.*``, what the optimizer keeps for
parameter I; ``generator.*``, states of random generators; ``law.*``, what the conservation law has added up;
``table.*``, the bytes of the Parquet files of what was measured of layers and neurons. Metadata, as JSON: where the
run is, all records so far, the law's numbers, the memory formats of tensors that are not contiguous, and a checksum of
the tensors.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from falign.lab import tables
from falign.lab.learner import Learner
from falign.lab.packing import as_table, as_tensor, axes_by_stride, laid_out, packed, unpacked
from falign.lab.runs import Run
from falign.lab.tables import Tables
from falign.lab.writing import RunError, leftovers, write

KEPT = 2
"""So many checkpoints of a run are kept."""
_NUMBERS = ("step", "epoch", "position", "loss", "right", "seen", "seconds", "rows")
"""Of a course, what is kept as JSON."""
_LATER = ("level", "far", "low")
"""The same, where falign 0.1 kept none."""


@dataclass(kw_only=True)
class Course:
    """Where a run is, and what it has measured.

    Attributes:
        step: Steps done.
        epoch: Epochs done.
        position: Batches of the running epoch done.
        loss: Sum over the images of the running epoch of the loss at their batch.
        right: How many of them were right.
        seen: How many they were.
        seconds: Time spent training and measuring.
        level: Running mean of log(loss / where it began).
        far: So many steps in a row it was above the level at which a run is stopped, and has not halved.
        low: The level when these steps began.
        rows: The records.
        layers: What was measured of every layer, a row a measured point and layer.
        neurons: What was measured of every neuron the last time.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    loss: float = 0.0
    right: int = 0
    seen: int = 0
    seconds: float = 0.0
    level: float = 0.0
    far: int = 0
    low: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    neurons: pl.DataFrame = field(default_factory=lambda: tables.neurons(None))

    def tables(self, law: pl.DataFrame | None = None) -> Tables:
        """What it has measured, and what the conservation law says, as tables."""
        return Tables(
            records=tables.records(self.rows),
            alignment=tables.alignments(self.layers),
            neurons=self.neurons,
            law=law,
        )

    def end_step(self, *, loss: float, right: int, size: int) -> None:
        """Count one batch of ``size`` images."""
        self.step += 1
        self.position += 1
        self.loss += loss * size
        self.right += right
        self.seen += size

    def end_epoch(self) -> None:
        """Begin to count anew."""
        self.epoch += 1
        self.position = self.right = self.seen = 0
        self.loss = 0.0


def save(run: Run, learner: Learner, course: Course) -> Path:
    """Write a checkpoint, then take away all but the last ones.

    Args:
        run: Where.
        learner: Model and optimizer.
        course: Where the run is.

    Returns:
        The file.

    Raises:
        WriteError: It cannot be written; the earlier checkpoints are untouched.
    """
    tensors, measured = _tensors(learner), course.tables()
    tensors |= {"table.alignment": as_tensor(measured.alignment), "table.neurons": as_tensor(measured.neurons)}
    law = None if learner.law is None else packed(learner.law.state_dict(), "law", tensors)
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    numbers = {name: getattr(course, name) for name in (*_NUMBERS, *_LATER)}
    orders = {name: order for name, tensor in tensors.items() if (order := axes_by_stride(tensor)) is not None}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # safetensors takes no others
    state = {"format": 1, "course": numbers, "law": law, "axes": orders, "sha256": _digest(tensors)}
    path = run.folder / f"checkpoint-{course.step:08d}.safetensors"
    write(path, serialised(tensors, {"falign": json.dumps(state)}))
    for old in (*run.checkpoints()[:-KEPT], *leftovers(run.folder)):
        with suppress(OSError):
            old.unlink(missing_ok=True)
    return path


def restore(path: Path, learner: Learner) -> Course:
    """Put a checkpoint's content into a learner made from the same configuration.

    Args:
        path: The file.
        learner: A learner before its first step.

    Returns:
        Where the run was.

    Raises:
        RunError: The file is damaged or belongs to another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            state = json.loads(file.metadata()["falign"])
        if state["sha256"] != _digest(tensors):
            raise ValueError("its checksum is wrong")
        orders = state.get("axes", {})
        tensors = {name: laid_out(tensor, orders.get(name)) for name, tensor in tensors.items()}
        numbers = state["course"]
        later = [name for name in _LATER if name in numbers]
        course = Course(**{name: numbers[name] for name in (*_NUMBERS, *later)})
        if "table.alignment" in tensors:  # falign 0.1 wrote none
            course.layers = as_table(tensors["table.alignment"]).to_dicts()
            course.neurons = as_table(tensors["table.neurons"])
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, pl.exceptions.PolarsError) as error:
        raise RunError(f"{path} cannot be read ({error}): delete it to go on from the checkpoint before it") from None
    try:
        _put(tensors, learner)
        if learner.law is not None:
            learner.law.load_state_dict(unpacked(state["law"], tensors))
    except (KeyError, ValueError, RuntimeError) as error:
        raise RunError(f"{path} does not fit --model {learner.config.model}, was its code changed? ({error})") from None
    return course


def _tensors(learner: Learner) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    state = learner.model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise RunError(f"state {name!r} of the model is a {type(value).__name__}: a checkpoint holds tensors only")
        tensors[f"model.{name}"] = value
    tensors |= {f"feedback.{name}": buffer for name, buffer in _left_out(learner).items()}
    for index, parts in learner.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in parts.items() if value is not None}
    tensors["generator.cpu"] = torch.get_rng_state()
    if torch.device(learner.config.device).type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(learner.config.device)
    return tensors


def _left_out(learner: Learner) -> dict[str, Tensor]:
    """Buffers outside ``state_dict``: fixed feedback and its counters."""
    state = learner.model.state_dict()
    return {name: buffer for name, buffer in learner.model.named_buffers() if name not in state}


def _put(tensors: dict[str, Tensor], learner: Learner) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    learner.model.load_state_dict(part("model."))
    feedback = part("feedback.")
    with torch.no_grad():
        for name, buffer in _left_out(learner).items():
            buffer.copy_(feedback[name])
    kept: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optimizer.").items():
        index, _, key = name.partition(".")
        kept.setdefault(int(index), {})[key] = value
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": kept, "param_groups": groups})
    torch.set_rng_state(tensors["generator.cpu"])
    if "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator.cuda"], learner.config.device)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
