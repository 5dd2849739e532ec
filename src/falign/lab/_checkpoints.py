"""Checkpoints: one file that holds everything a run needs to go on as if it had not been interrupted.

A checkpoint is one safetensors file, so that its tensors and its numbers cannot come from two moments.

Tensors:
    ``model.*``: the model's ``state_dict``; with fixed feedback it loads into the plain network.
    ``feedback.*``: the buffers of the feedback outside it.
    ``optimizer.I.*``: what the optimizer keeps for parameter I.
    ``generator.*``: states of PyTorch's random generators.
    ``law.*``: the sums of the conservation law.
    ``extra.*``: tensors in what modules return from ``get_extra_state``.
    ``python.*``: tensors and arrays in attributes of modules.
    ``table.*``: the bytes of the Parquet files of the measurements.

Metadata:
    ``checksum``: of the whole file (:mod:`falign.lab._files`).
    ``falign``: as JSON, the run's identity, the training state, the rest of the law and of the extra states, the states
    of the generators of Python and NumPy, attributes of modules, and the memory formats of tensors that are not
    contiguous.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load as deserialised
from safetensors.torch import save as serialised
from torch import Tensor

from falign._preserve import GENERATOR_MODULES, generator_states, restore_generator_states
from falign.lab import _files, _tables
from falign.lab._files import RunError, TooLarge, Unreadable, WriteError, read_bounded
from falign.lab._learner import Learner, optimizer_slots
from falign.lab._memory import available
from falign.lab._packing import JSON_LIMIT, axes_by_stride, pack, table_to_tensor, tensor_to_table, unpack, with_layout
from falign.lab._python_state import storable_attributes
from falign.lab._run_folder import RunFolder, checkpoint_name
from falign.lab._tables import Tables
from falign.lab._text import one_line
from falign.lab.config import ConfigError

_KEEP_LAST = 2
"""Checkpoints of a run that are kept: should the last one be damaged, the one before it is intact."""
_NUMBERS = {
    **dict.fromkeys(("step", "epoch", "batch", "correct", "seen", "far_steps"), int),
    **dict.fromkeys(("loss_sum", "seconds", "level", "far_level"), float),
}
"""Fields of a training state that are stored as JSON; the others are tables."""
_TABLES = ("records", "alignment", "neurons")
_EXTRA = 16 << 20
"""Letters that the JSON of what modules keep beside tensors may have before the first step."""
_TENSOR_HEADER = 200
"""Letters of JSON that safetensors writes for a tensor at most, without its name."""


@dataclass(kw_only=True)
class TrainingState:
    """Progress of a run, with everything that it has measured.

    Attributes:
        step: Steps done.
        epoch: Epochs done.
        batch: Batches of the running epoch done.
        loss_sum: Sum of the losses of the images or texts of the running epoch, each in its own batch.
        correct: Labels of the running epoch that were right: one an image, one a character of a text.
        seen: Images or texts of the running epoch that were trained on.
        seconds: Time spent training and measuring.
        level: Running mean of log(loss / initial loss).
        far_steps: Steps in a row with a level above that at which a run is stopped, without halving.
        far_level: The level when these steps began.
        records: The records, one for each measured step.
        layer_rows: The alignment, one row for each measured step and layer.
        neurons: The alignment of every neuron at the last measured step.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    level: float = 0.0
    far_steps: int = 0
    far_level: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)
    layer_rows: list[dict[str, Any]] = field(default_factory=list)
    neurons: pl.DataFrame = field(default_factory=lambda: _tables.neuron_table(None))

    def tables(self, law: pl.DataFrame | None = None) -> Tables:
        """Return the measurements, and what the conservation law says of each neuron, as tables."""
        return Tables(
            records=_tables.record_table(self.records),
            alignment=_tables.alignment_table(self.layer_rows),
            neurons=self.neurons,
            law=law,
        )

    def end_step(self, *, loss: float, correct: int, size: int) -> None:
        """Count one batch of ``size`` images or texts."""
        self.step += 1
        self.batch += 1
        self.loss_sum += loss * size
        self.correct += correct
        self.seen += size

    def end_epoch(self) -> None:
        """Count an epoch, and start the sums of the next one at zero."""
        self.epoch += 1
        self.batch = self.correct = self.seen = 0
        self.loss_sum = 0.0


def check_storable(learner: Learner) -> None:
    """Refuse, before the first step, a model whose state a checkpoint could not hold, or not within the memory.

    Raises:
        ConfigError: The part of the state that cannot be stored.
    """
    try:
        learner.model.state_dict()
    except Exception as error:  # get_extra_state is code of the user
        raise ConfigError(f"--model {learner.config.model}: its state_dict() failed: {one_line(error)}") from None
    tensors: dict[str, Tensor] = {}
    extra = _extra(learner, tensors)
    length = len(json.dumps([extra, pack(learner.attributes.state(), "attributes", tensors)]))
    if length > _EXTRA:
        raise ConfigError(
            f"--model {learner.config.model} keeps {length:,} letters of state that is no tensor, a checkpoint holds "
            f"{_EXTRA:,}: make it tensors"
        )
    parts = {**_model_tensors(learner), **_unsaved_buffers(learner), **tensors}
    attribute_tensors: dict[str, Tensor] = {}
    pack(storable_attributes(learner.model), "attribute", attribute_tensors)
    moments = optimizer_slots(learner.config) * _size(*learner.model.parameters())
    if (size := _size(*parts.values(), *attribute_tensors.values()) + moments) > (limit := _size_limit()):
        raise ConfigError(
            f"--model {learner.config.model}: a checkpoint would have {size:,} bytes, and with more than {limit:,}, "
            "half the memory that there is, it could not be read again: make the network, or what it keeps, smaller"
        )
    for name, tensor in parts.items():
        try:
            serialised({"tensor": torch.empty_like(tensor[..., :0] if tensor.dim() else tensor, device="cpu")})
            if tensor.is_meta or tensor.layout != torch.strided:
                raise TypeError("a tensor without strided memory")
        except Exception as error:  # tensors that safetensors does not know raise errors of many kinds
            raise ConfigError(
                f"--model {learner.config.model}: state {name!r} is a tensor ({tensor.dtype}, {tensor.layout}) that a "
                f"checkpoint cannot hold: {one_line(error)}"
            ) from None


def save(run: RunFolder, learner: Learner, state: TrainingState) -> Path:
    """Write a checkpoint, then delete all but the last ones.

    Args:
        run: Folder of the run.
        learner: Model and optimizer.
        state: How far the run is.

    Returns:
        The file.

    Raises:
        WriteError: It cannot be written, or could not be read again; the earlier checkpoints are untouched.
    """
    path = run.folder / checkpoint_name(state.step)
    tensors, tables = _tensors(learner), state.tables()
    tensors |= {f"table.{name}": table_to_tensor(getattr(tables, name)) for name in _TABLES}
    metadata = {
        "run": run.identity,
        "training": {name: getattr(state, name) for name in _NUMBERS},
        "law": None if learner.law is None else pack(learner.law.state_dict(), "law", tensors),
        "extra": _extra(learner, tensors),
        "python": pack({"drawn": generator_states(), "attributes": learner.attributes.state()}, "python", tensors),
    }
    if (size := _size(*tensors.values())) > (limit := _size_limit()):
        raise WriteError(
            f"cannot write {path}: it would have {size:,} bytes, and with more than {limit:,}, half the memory that "
            f"there is, it could not be read again{_name_largest(learner)}"
        )
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    # safetensors takes contiguous tensors only. Memory formats are kept beside them, because kernels may sum in another
    # order for another format: without them a resumed run would not come to the same bits.
    axes = {name: axes_by_stride(tensor) for name, tensor in tensors.items()}
    metadata["axes"] = {name: order for name, order in axes.items() if order is not None}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps(metadata)
    if (letters := len(json.dumps(text)) + sum(len(name) + _TENSOR_HEADER for name in tensors)) > JSON_LIMIT:
        raise WriteError(
            f"cannot write {path}: what is no tensor has {letters:,} letters, and a checkpoint holds "
            f"{JSON_LIMIT:,}{_name_largest(learner)}: let it be a tensor or an array"
        )
    content = serialised(tensors, {"checksum": _files.BLANK, "falign": text})
    run.write(path.name, _files.sealed(content))
    for old in run.checkpoints()[:-_KEEP_LAST]:  # only now: until here they were what the run could go on from
        with suppress(OSError):
            old.unlink(missing_ok=True)
    return path


def restore(path: Path, learner: Learner, *, identity: str | None = None) -> TrainingState:
    """Put a checkpoint's content into a learner made from the same configuration.

    Args:
        path: The file.
        learner: A learner before its first step.
        identity: The identity that the run folder's configuration gives; None accepts a checkpoint of any run.

    Returns:
        The training state.

    Raises:
        RunError: The file is damaged or belongs to another run or network.
    """
    config = learner.config
    try:
        content = read_bounded(path, _size_limit() + JSON_LIMIT)
        _files.verify_seal(content)
        metadata, tensors = _metadata(content), deserialised(content)
        if identity is not None and metadata["run"] != identity:
            raise RunError(
                f"{path} is of another run, or of another configuration, than the config.json beside it: delete it to "
                "go on from the checkpoint before it"
            )
        axes = metadata["axes"]
        tensors = {name: with_layout(tensor, axes.get(name)) for name, tensor in tensors.items()}
        state = _training_state(metadata["training"], tensors)
        if not isinstance(metadata["extra"], dict) or (metadata["law"] is None) != (learner.law is None):
            raise ValueError("it does not hold what this run keeps")
    except (TooLarge, MemoryError) as error:
        why = f"{error}, half the memory that there is" if isinstance(error, TooLarge) else "memory is too small"
        raise RunError(
            f"{path} cannot be read ({why}): go on where there is more memory, or delete it to go on from the "
            "checkpoint before it"
        ) from None
    except (OSError, Unreadable, _files.Unsealed) as error:
        raise _unreadable(path, str(error)) from None
    except RunError:
        raise
    except (Exception, pl.exceptions.PanicException) as error:  # the checksum vouches for the bytes, not their meaning
        raise _unreadable(path, one_line(error)) from None
    try:
        _load(metadata, tensors, learner)
        if learner.law is not None:
            learner.law.load_state_dict(unpack(metadata["law"], tensors))
    except Exception as error:  # set_extra_state is code of the user
        raise RunError(
            f"{path} does not fit --model {config.model}, was its code changed? ({one_line(error)})"
        ) from None
    return state


def _unreadable(path: Path, why: str) -> RunError:
    return RunError(f"{path} cannot be read ({why}): delete it to go on from the checkpoint before it")


def _metadata(content: bytes) -> dict[str, Any]:
    """Read the metadata from the header of a safetensors file: its length in 8 bytes, then JSON."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["falign"])
    if not isinstance(metadata, dict) or not isinstance(metadata["axes"], dict):
        raise ValueError("its metadata are no object")
    return metadata


def _training_state(numbers: Any, tensors: dict[str, Tensor]) -> TrainingState:
    """Make a training state of what a file holds, which may be anything.

    Raises:
        ValueError: A number or a table is none that a run leaves.
    """
    for name, kind in _NUMBERS.items():
        value = numbers[name]
        whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        if not (whole if kind is int else whole or (isinstance(value, float) and isfinite(value))):
            raise ValueError(f"{name} is {str(value)[:60]}")
    records, alignment, neurons = (tensor_to_table(tensors[f"table.{name}"]) for name in _TABLES)
    _tables.check_records(records)
    state = TrainingState(
        **{name: numbers[name] for name in _NUMBERS}, records=records.to_dicts(), layer_rows=alignment.to_dicts()
    )
    expected = state.tables()
    if records.height and (records["step"][0] != 0 or records["step"][-1] > state.step):
        raise ValueError(f"its records do not go from step 0 to {state.step}")
    if not records.equals(expected.records) or not alignment.equals(expected.alignment):
        raise ValueError("its tables have other columns than a run's")
    if neurons.schema != state.neurons.schema:
        raise ValueError("its table of neurons has other columns than a run's")
    state.neurons = neurons
    return state


def _size_limit() -> int:
    """Return how many bytes a checkpoint may have: reading it takes memory for its bytes and for its tensors."""
    return available() // 2


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _name_largest(learner: Learner) -> str:
    """Name the attribute or extra state that takes most of a checkpoint, for the end of a sentence."""
    sizes = {}
    for name, value in {**_extra(learner, {}), **learner.attributes.state()}.items():
        tensors: dict[str, Tensor] = {}
        sizes[name] = len(json.dumps(pack(value, "part", tensors))) + _size(*tensors.values())
    name = max(sizes, key=sizes.__getitem__, default="")
    return f"; what --model {learner.config.model} keeps most in is {name!r}" if name else ""


def _model_tensors(learner: Learner) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in learner.model.state_dict().items() if isinstance(value, Tensor)}


def _extra(learner: Learner, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return what modules give as extra state, as JSON; tensors in it are put into ``tensors``.

    Raises:
        ConfigError: Something in it cannot be stored.
    """
    extra = {}
    for name, value in learner.model.state_dict().items():
        if isinstance(value, Tensor):
            continue
        try:
            extra[name] = pack(value, "extra", tensors)
            json.dumps(extra[name])
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"--model {learner.config.model}: state {name!r} cannot be held by a checkpoint ({error}): let "
                "get_extra_state return tensors, numbers, texts, and lists and dicts of them"
            ) from None
    return extra


def _tensors(learner: Learner) -> dict[str, Tensor]:
    tensors = _model_tensors(learner)
    tensors |= {f"feedback.{name}": buffer for name, buffer in _unsaved_buffers(learner).items()}
    for index, parts in learner.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in parts.items() if value is not None}
    tensors["generator.cpu"] = torch.get_rng_state()
    kind = torch.device(learner.config.device).type
    if kind in GENERATOR_MODULES:
        tensors[f"generator.{kind}"] = GENERATOR_MODULES[kind].get_rng_state(learner.config.device)
    return tensors


def _unsaved_buffers(learner: Learner) -> dict[str, Tensor]:
    """Return the buffers outside ``state_dict``: fixed feedback and its counters."""
    state = learner.model.state_dict()
    return {name: buffer for name, buffer in learner.model.named_buffers() if name not in state}


def _load(metadata: dict[str, Any], tensors: dict[str, Tensor], learner: Learner) -> None:
    """Put what ``save`` took from model, optimizer and generators back into them."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    extra = {name: unpack(value, tensors) for name, value in metadata["extra"].items()}
    _check_kinds(part("model."), dict(learner.model.named_parameters()))
    learner.model.load_state_dict({**part("model."), **extra})
    feedback = part("feedback.")
    _check_kinds(feedback, _unsaved_buffers(learner))
    if unknown := feedback.keys() - _unsaved_buffers(learner).keys():
        raise ValueError(f"the model has no buffer {min(unknown)!r}")
    with torch.no_grad():
        for name, buffer in _unsaved_buffers(learner).items():
            buffer.copy_(feedback[name])
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    parameters = [each for group in learner.optimizer.param_groups for each in group["params"]]
    for name, value in part("optimizer.").items():
        index, _, key = name.partition(".")
        if value.dim() and value.shape != parameters[int(index)].shape:
            raise ValueError(f"the optimizer's {key} of parameter {index} has shape {tuple(value.shape)}")
        optimizer_state.setdefault(int(index), {})[key] = value
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    torch.set_rng_state(tensors["generator.cpu"])
    kind = torch.device(learner.config.device).type
    if kind in GENERATOR_MODULES:
        GENERATOR_MODULES[kind].set_rng_state(tensors[f"generator.{kind}"], learner.config.device)
    python = unpack(metadata["python"], tensors)
    learner.attributes.load(python["attributes"])
    restore_generator_states(python["drawn"])


def _check_kinds(came: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse other shapes and dtypes: copying would broadcast and convert silently."""
    for name, tensor in expected.items():
        here, there = ((tuple(each.shape), each.dtype) for each in (tensor, came[name]))
        if here != there:
            raise ValueError(f"{name} is {there}, expected {here}")
