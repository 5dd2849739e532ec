"""Everything that a run needs to go on as if it had not been interrupted, in one file.

A checkpoint is one safetensors file, so that its tensors and its numbers cannot come from two moments.
Tensors: ``model.*``, the model's ``state_dict`` (with fixed feedback it loads into the plain network);
``feedback.*``, the buffers of the feedback outside it; ``optimizer.I.*``, what the optimizer keeps for
parameter I; ``generator.*``, states of random generators; ``law.*``, what the conservation law has added up;
``extra.*``, tensors in what modules return from ``get_extra_state``; ``table.*``, the bytes of the Parquet files of
what was measured. Metadata: ``checksum``, of the whole file (:mod:`falign.lab._files`), and ``falign``, as JSON: of
which run and configuration it is, where the run is, the rest of the law and of the extra states, what Python and NumPy
draw
from and what the model keeps in attributes, and the memory formats of tensors that are not contiguous.
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

from falign._preserve import DRAWING, draw_on, drawn
from falign.lab import _files, _run_folder
from falign.lab._files import RunError, TooLarge, Unreadable, WriteError, read_bounded
from falign.lab._learner import Learner, slots
from falign.lab._memory import available
from falign.lab._packing import LETTERS, as_table, as_tensor, axes_by_stride, laid_out, packed, unpacked
from falign.lab._python_state import held
from falign.lab._run_folder import Run, Tables, checkpoint_name
from falign.lab.config import ConfigError

KEPT = 2
"""So many checkpoints of a run are kept."""
_NUMBERS = {
    **dict.fromkeys(("step", "epoch", "position", "right", "seen", "far"), int),
    **dict.fromkeys(("loss", "seconds", "level", "low"), float),
}
"""Of a course, what is kept as JSON."""
_EXTRA = 16 << 20
"""So many letters the JSON of what modules keep beside tensors may have before the first step."""
_NAMED = 200
"""So many letters of JSON, and its name, a tensor takes at most."""


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
    neurons: pl.DataFrame = field(default_factory=lambda: _run_folder.neurons(None))

    def tables(self, law: pl.DataFrame | None = None) -> Tables:
        """What it has measured, and what the conservation law says, as tables."""
        return Tables(
            records=_run_folder.records(self.rows),
            alignment=_run_folder.alignments(self.layers),
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


def check(learner: Learner) -> None:
    """Make sure, before the first step, that a checkpoint can hold the model's state and be read again.

    Raises:
        ConfigError: It cannot: which part of it.
    """
    try:
        learner.model.state_dict()
    except Exception as error:  # get_extra_state is anyone's
        raise ConfigError(f"--model {learner.config.model}: its state_dict() failed: {_told(error)}") from None
    tensors: dict[str, Tensor] = {}
    extra = _extra(learner, tensors)
    length = len(json.dumps([extra, packed(learner.attributes.state(), "attributes", tensors)]))
    if length > _EXTRA:
        raise ConfigError(
            f"--model {learner.config.model} keeps {length:,} letters of state that is no tensor, a checkpoint holds "
            f"{_EXTRA:,}: make it tensors"
        )
    parts = {**_states(learner), **_left_out(learner), **tensors}
    kept: dict[str, Tensor] = {}
    packed(held(learner.model), "held", kept)
    moments = slots(learner.config) * _size(*learner.model.parameters())
    if (size := _size(*parts.values(), *kept.values()) + moments) > (most := _most()):
        raise ConfigError(
            f"--model {learner.config.model}: a checkpoint would have {size:,} bytes, and with more than {most:,}, "
            "half the memory that there is, it could not be read again: make the network, or what it keeps, smaller"
        )
    for name, tensor in parts.items():
        try:
            serialised({"tensor": torch.empty_like(tensor[..., :0] if tensor.dim() else tensor, device="cpu")})
            if tensor.is_meta or tensor.layout != torch.strided:
                raise TypeError("a tensor without strided memory")
        except Exception as error:  # whatever a kind of tensor that safetensors does not know raises
            raise ConfigError(
                f"--model {learner.config.model}: state {name!r} is a tensor ({tensor.dtype}, {tensor.layout}) that a "
                f"checkpoint cannot hold: {_told(error)}"
            ) from None


def save(run: Run, learner: Learner, course: Course) -> Path:
    """Write a checkpoint, then take away all but the last ones.

    Args:
        run: Where.
        learner: Model and optimizer.
        course: Where the run is.

    Returns:
        The file.

    Raises:
        WriteError: It cannot be written, or could not be read again; the earlier checkpoints are untouched.
    """
    path = run.folder / checkpoint_name(course.step)
    tensors, measured = _tensors(learner), course.tables()
    tensors |= {f"table.{name}": as_tensor(getattr(measured, name)) for name in _TABLES}
    state = {
        "run": run.identity,
        "course": {name: getattr(course, name) for name in _NUMBERS},
        "law": None if learner.law is None else packed(learner.law.state_dict(), "law", tensors),
        "extra": _extra(learner, tensors),
        "python": packed({"drawn": drawn(), "attributes": learner.attributes.state()}, "python", tensors),
    }
    if (size := _size(*tensors.values())) > (most := _most()):
        raise WriteError(
            f"cannot write {path}: it would have {size:,} bytes, and with more than {most:,}, half the memory that "
            f"there is, it could not be read again{_most_of_it(learner)}"
        )
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    state["axes"] = {name: order for name, tensor in tensors.items() if (order := axes_by_stride(tensor)) is not None}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # safetensors takes no others
    text = json.dumps(state)
    if (letters := len(json.dumps(text)) + sum(len(name) + _NAMED for name in tensors)) > LETTERS:
        raise WriteError(
            f"cannot write {path}: what is no tensor has {letters:,} letters, and a checkpoint holds "
            f"{LETTERS:,}{_most_of_it(learner)}: let it be a tensor or an array"
        )
    content = serialised(tensors, {"checksum": _files.BLANK, "falign": text})
    run.write(path.name, _files.sealed(content))
    for old in run.checkpoints()[:-KEPT]:
        with suppress(OSError):
            old.unlink(missing_ok=True)
    return path


def restore(path: Path, learner: Learner, *, identity: str | None = None) -> Course:
    """Put a checkpoint's content into a learner made from the same configuration.

    Args:
        path: The file.
        learner: A learner before its first step.
        identity: What the run folder's own configuration says of which run it is; None takes a checkpoint of any.

    Returns:
        Where the run was.

    Raises:
        RunError: The file is damaged or belongs to another run or network.
    """
    config = learner.config
    try:
        content = read_bounded(path, _most() + LETTERS)
        _files.verify_seal(content)
        state, tensors = _metadata(content), deserialised(content)
        if identity is not None and state["run"] != identity:
            raise RunError(
                f"{path} is of another run, or of another configuration, than the config.json beside it: delete it to "
                "go on from the checkpoint before it"
            )
        orders = state["axes"]
        tensors = {name: laid_out(tensor, orders.get(name)) for name, tensor in tensors.items()}
        course = _course(state["course"], tensors)
        if not isinstance(state["extra"], dict) or (state["law"] is None) != (learner.law is None):
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
    except (Exception, pl.exceptions.PanicException) as error:  # a seal vouches for the bytes, not for what they say
        raise _unreadable(path, _told(error)) from None
    try:
        _put(tensors, state, learner)
        if learner.law is not None:
            learner.law.load_state_dict(unpacked(state["law"], tensors))
    except Exception as error:  # set_extra_state is anyone's
        raise RunError(f"{path} does not fit --model {config.model}, was its code changed? ({_told(error)})") from None
    return course


_TABLES = ("records", "alignment", "neurons")


def _unreadable(path: Path, why: str) -> RunError:
    return RunError(f"{path} cannot be read ({why}): delete it to go on from the checkpoint before it")


def _told(error: BaseException) -> str:
    """Kind and first line of an error."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _metadata(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    found = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["falign"])
    if not isinstance(found, dict) or not isinstance(found["axes"], dict):
        raise ValueError("its metadata are no object")
    return found


def _course(numbers: Any, found: dict[str, Tensor]) -> Course:
    """Where the run was, from numbers and tables that may say anything."""
    for name, kind in _NUMBERS.items():
        value = numbers[name]
        whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        if not (whole if kind is int else whole or (isinstance(value, float) and isfinite(value))):
            raise ValueError(f"{name} is {str(value)[:60]}")
    records, alignment, neurons = (as_table(found[f"table.{name}"]) for name in _TABLES)
    _run_folder.check_records(records)
    course = Course(**{name: numbers[name] for name in _NUMBERS}, rows=records.to_dicts(), layers=alignment.to_dicts())
    expected = course.tables()
    if records.height and (records["step"][0] != 0 or records["step"][-1] > course.step):
        raise ValueError(f"its records do not go from step 0 to {course.step}")
    if not records.equals(expected.records) or not alignment.equals(expected.alignment):
        raise ValueError("its tables have other columns than a run's")
    if neurons.schema != course.neurons.schema:
        raise ValueError("its table of neurons has other columns than a run's")
    course.neurons = neurons
    return course


def _most() -> int:
    """So many bytes a checkpoint may have: whoever reads it has its bytes and its tensors in memory."""
    return available() // 2


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _most_of_it(learner: Learner) -> str:
    """What the model keeps most in, for the end of a sentence."""
    sizes = {}
    for name, value in {**_extra(learner, {}), **learner.attributes.state()}.items():
        tensors: dict[str, Tensor] = {}
        sizes[name] = len(json.dumps(packed(value, "part", tensors))) + _size(*tensors.values())
    name = max(sizes, key=sizes.__getitem__, default="")
    return f"; what --model {learner.config.model} keeps most in is {name!r}" if name else ""


def _states(learner: Learner) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in learner.model.state_dict().items() if isinstance(value, Tensor)}


def _extra(learner: Learner, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What modules keep beside tensors, as JSON.

    Raises:
        ConfigError: It cannot be held.
    """
    found = {}
    for name, value in learner.model.state_dict().items():
        if isinstance(value, Tensor):
            continue
        try:
            found[name] = packed(value, "extra", tensors)
            json.dumps(found[name])
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"--model {learner.config.model}: state {name!r} cannot be held by a checkpoint ({error}): let "
                "get_extra_state return tensors, numbers, texts, and lists and dicts of them"
            ) from None
    return found


def _tensors(learner: Learner) -> dict[str, Tensor]:
    tensors = _states(learner)
    tensors |= {f"feedback.{name}": buffer for name, buffer in _left_out(learner).items()}
    for index, parts in learner.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in parts.items() if value is not None}
    tensors["generator.cpu"] = torch.get_rng_state()
    kind = torch.device(learner.config.device).type
    if kind in DRAWING:
        tensors[f"generator.{kind}"] = DRAWING[kind].get_rng_state(learner.config.device)
    return tensors


def _left_out(learner: Learner) -> dict[str, Tensor]:
    """Buffers outside ``state_dict``: fixed feedback and its counters."""
    state = learner.model.state_dict()
    return {name: buffer for name, buffer in learner.model.named_buffers() if name not in state}


def _put(tensors: dict[str, Tensor], state: dict[str, Any], learner: Learner) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    extra = {name: unpacked(value, tensors) for name, value in state["extra"].items()}
    _check_kinds(part("model."), dict(learner.model.named_parameters()))
    learner.model.load_state_dict({**part("model."), **extra})
    feedback = part("feedback.")
    _check_kinds(feedback, _left_out(learner))
    if unknown := feedback.keys() - _left_out(learner).keys():
        raise ValueError(f"the model has no buffer {min(unknown)!r}")
    with torch.no_grad():
        for name, buffer in _left_out(learner).items():
            buffer.copy_(feedback[name])
    kept: dict[int, dict[str, Tensor]] = {}
    parameters = [each for group in learner.optimizer.param_groups for each in group["params"]]
    for name, value in part("optimizer.").items():
        index, _, key = name.partition(".")
        if value.dim() and value.shape != parameters[int(index)].shape:
            raise ValueError(f"the optimizer's {key} of parameter {index} has shape {tuple(value.shape)}")
        kept.setdefault(int(index), {})[key] = value
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": kept, "param_groups": groups})
    torch.set_rng_state(tensors["generator.cpu"])
    kind = torch.device(learner.config.device).type
    if kind in DRAWING:
        DRAWING[kind].set_rng_state(tensors[f"generator.{kind}"], learner.config.device)
    own = unpacked(state["python"], tensors)
    learner.attributes.load(own["attributes"])
    draw_on(own["drawn"])


def _check_kinds(came: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Neither shape nor dtype may differ: copying would make the one fit the other without a word."""
    for name, tensor in expected.items():
        here, there = ((tuple(each.shape), each.dtype) for each in (tensor, came[name]))
        if here != there:
            raise ValueError(f"{name} is {there}, expected {here}")
