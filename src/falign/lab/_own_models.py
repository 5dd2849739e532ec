"""Networks, rules and data of the user's own: imported, made, and networks tried on a few images before a run."""

import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from math import prod
from pathlib import Path
from pkgutil import resolve_name
from reprlib import Repr

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from falign._preserve import seeded
from falign._wiring import preserve_state
from falign.lab._batches import label_loss
from falign.lab._packing import JSON_LIMIT
from falign.lab._python_state import Attributes, attribute_fingerprints, storable_attributes
from falign.lab._streams import suggestion
from falign.lab._text import one_line
from falign.lab.config import ConfigError
from falign.lab.data import DataError, Dataset
from falign.lab.data._dataset import remarks
from falign.rules import ALL_RULES, Rule

Shape = tuple[int, ...]
"""Channels, height and width of images; of texts, the characters of a context."""

_SHORT = Repr()
_SHORT.maxstring = 60


@contextmanager
def as_config_error(what: str) -> Iterator[None]:
    """Turn any error of the user's own code into a ``ConfigError``; only Ctrl-C passes.

    Args:
        what: Beginning of the sentence; a colon and the error follow.
    """
    try:
        yield
    except (ConfigError, DataError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit, too: a factory that exits has made no network
        raise ConfigError(f"{what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    text = one_line(error)
    # On the CPU PyTorch has no class of its own for it.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return "it needs more memory than there is"
    return text


def make_model(model: str, shape: Shape, classes: int) -> nn.Module:
    """Call ``package.module:factory`` with those of the arguments ``shape`` and ``classes`` that it takes.

    Modules are looked for in the working folder first, as by ``python -m``. Layers without a shape get theirs from one
    forward pass. Working folder, module path and PyTorch's defaults are afterwards as they were.

    Args:
        model: As it was given.
        shape: Channels, height and width of the images; of texts, the characters of a context.
        classes: Number of classes; of texts, characters of the vocabulary.

    Returns:
        The network.

    Raises:
        ConfigError: There is no such factory, or it makes no network that can be trained here.
    """
    with _process_state_kept():
        made = _called(f"--model {model}", model, {"shape": shape, "classes": classes}, "a torch.nn.Module")
        if not isinstance(made, nn.Module):
            raise ConfigError(f"--model {model} returned a {type(made).__name__}, expected a torch.nn.Module")
        _refuse(model, made)
        _materialise(model, made, shape)
    return made


def rule_class(rule: str) -> type[Rule]:
    """Return the class that ``--rule`` names: one of falign's, or as ``package.module:Rule`` one of the user's own.

    Raises:
        ConfigError: There is no such rule.
    """
    if rule in ALL_RULES:
        return ALL_RULES[rule]
    module, _, path = rule.partition(":")
    if not all(part.isidentifier() for text in (module, path) for part in text.split(".")):
        raise ConfigError(
            f"--rule is {_SHORT.repr(rule)}, expected one of {', '.join(ALL_RULES)}, or package.module:Rule"
            + suggestion(rule, ALL_RULES)
        )
    with _process_state_kept():
        imported = _import("--rule", rule)
    if not (
        isinstance(imported, type) and issubclass(imported, Rule) and isinstance(getattr(imported, "name", None), str)
    ):
        raise ConfigError(f"--rule {rule} is {imported!r:.60}, expected a subclass of falign.Rule with a name")
    return imported


def make_dataset(named: str, folder: Path | None) -> Dataset:
    """Call ``package.module:factory``, with ``folder=`` if it takes that, and check what it makes.

    Args:
        named: As it was given.
        folder: The folder of ``--data``; None where there is none.

    Returns:
        The data set: the factory's own ``falign.lab.data.Dataset``, or made of the four arrays that it returned, with
        the largest label as the last class. Its notes say what is odd about it.

    Raises:
        ConfigError: There is no such factory, or it makes something else.
        DataError: What it makes are no images and labels that fit each other.
    """
    what = f"DATASET {named}"
    with _process_state_kept():
        made = _called(what, named, {"folder": folder}, "a falign.lab.data.Dataset")
    if isinstance(made, Dataset):
        return replace(made, notes=(*made.notes, *remarks(made)))
    if not isinstance(made, (tuple, list)) or len(made) != 4:
        raise ConfigError(
            f"{what} returned a {type(made).__name__}, expected a falign.lab.data.Dataset, or four arrays: training "
            "images, training labels, test images, test labels"
        )
    with as_config_error(f"{what} returned what cannot be read as images and labels"):
        tensors = [torch.as_tensor(part) for part in made]
    for place, part in enumerate(tensors):
        if place % 2 == 0 and part.ndim == 3:  # grey images without an axis of channels
            tensors[place] = part.unsqueeze(1)
        elif place % 2 and part.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
            tensors[place] = part.long()
    labels = [part for part in tensors[1::2] if part.dtype == torch.int64 and part.numel()]
    classes = tuple(str(number) for number in range(1 + max((int(part.max()) for part in labels), default=0)))
    names = ("train_images", "train_labels", "test_images", "test_labels")
    data = Dataset(name=named, classes=classes, **dict(zip(names, tensors, strict=True)))
    return replace(data, notes=remarks(data))


def _called(what: str, named: str, known: Mapping[str, object], makes: str) -> object:
    """Call a factory of the user's own with those of the known arguments that it takes."""
    factory = _import(what.partition(" ")[0], named)
    if not callable(factory):
        raise ConfigError(f"{what} is a {type(factory).__name__}, expected a function or class to call")
    try:
        taken = inspect.signature(factory).parameters
        given = {key: value for key, value in known.items() if key in taken or _takes_any(taken)}
        inspect.signature(factory).bind(**given)
    except (TypeError, ValueError) as error:
        arguments = " and ".join(f"{name}=" for name in known)
        raise ConfigError(
            f"{what} cannot be called with {arguments}, or without arguments: {one_line(error)}"
        ) from None
    if inspect.isbuiltin(factory):  # os.abort, for example, would end the process without an exception
        raise ConfigError(f"{what} is a function of Python itself, expected one that makes {makes}")
    with as_config_error(f"{what} failed"):
        return factory(**given)


def _import(option: str, named: str) -> object:
    # An import may draw random numbers, but only the first one in a process does: the factory must not notice.
    with seeded(0), as_config_error(f"{option} {named} cannot be imported"):
        return resolve_name(named)


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """Put working folder, module path and PyTorch's defaults back, which the user's code may change."""
    folder, path = Path.cwd(), list(sys.path)
    kind, device = torch.get_default_dtype(), torch.get_default_device()
    sys.path.insert(0, str(folder))
    try:
        torch.set_default_dtype(torch.float32)  # another default would draw other weights from the same seed
        with torch.device("cpu"), torch.enable_grad():
            yield
    finally:
        os.chdir(folder)
        sys.path[:] = path
        torch.set_default_dtype(kind)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)


def _refuse(model: str, made: nn.Module) -> None:
    """Refuse a network of a kind that cannot be trained here."""
    if isinstance(made, torch.jit.ScriptModule):
        raise ConfigError(f"--model {model} returned a {type(made).__name__}, expected the plain module, not compiled")
    tensors = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    for name, tensor in tensors.items():
        if not is_lazy(tensor) and tensor.is_complex():
            raise ConfigError(f"--model {model} has complex numbers in {name!r}, expected real ones")
        if not is_lazy(tensor) and tensor.is_meta:
            raise ConfigError(f"--model {model} has {name!r} on the meta device, without numbers: make it on the CPU")


def _materialise(model: str, made: nn.Module, shape: Shape) -> None:
    """Give layers that wait for their first input (``nn.LazyLinear``) their shapes and weights."""
    for training in (False, True):  # some layers run in training only
        if not _lazy(made):
            return
        kinds = [tensor.dtype for tensor in made.parameters() if not is_lazy(tensor) and tensor.is_floating_point()]
        x = torch.linspace(-1, 1, 2 * prod(shape), dtype=[*kinds, torch.float32][0]).reshape(2, *shape)
        if len(shape) == 1:
            x = torch.zeros(2, *shape, dtype=torch.int64)
        modes = [(module, module.training) for module in made.modules()]
        buffers = [(buffer, buffer.clone()) for buffer in made.buffers() if not is_lazy(buffer)]
        with (
            as_config_error(f"--model {model} does not run on {samples(x)} of shape {tuple(x.shape)}"),
            torch.no_grad(),
        ):
            made.train(training)
            made(x)
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
    if waiting := _lazy(made):
        raise ConfigError(
            f"--model {model} has a layer without a shape, {waiting[0]!r}, which did not run on the data: leave it "
            "out, or give it its sizes"
        )


def _lazy(model: nn.Module) -> list[str]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name.rpartition(".")[0] for name, tensor in tensors if is_lazy(tensor)]


def differing_tensors(one: nn.Module, other: nn.Module) -> list[str]:
    """Name the parameters and buffers in which two networks differ."""
    here, there = ({**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (one, other))
    return [name for name in {**here, **there} if not _equal(here.get(name), there.get(name))]


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def try_training(model: str, made: nn.Module, x: Tensor, classes: int, *, single: bool) -> list[str]:
    """Train a network that is thrown away on a few images, to refuse at once what cannot be trained.

    Args:
        model: As it was given.
        made: The network; buffers, gradients and attributes change.
        x: Two images or pieces of text, or more.
        classes: Number of classes.
        single: Whether a batch of one image will come.

    Returns:
        Names of attributes that change from pass to pass and that no checkpoint can hold.

    Raises:
        ConfigError: It cannot be trained; the message says why.
    """
    package = model.partition(".")[0].partition(":")[0]
    learns = [parameter.requires_grad for parameter in made.parameters()]
    if learns and not any(learns):
        raise ConfigError(f"--model {model} has no parameter that learns: requires_grad is False for all of them")
    labels = torch.arange(len(x), device=x.device) % classes if x.is_floating_point() else x
    seen: list[dict[str, object]] = []
    before = x.clone()
    what = f"--model {model} does not train on {samples(x)} of shape {tuple(x.shape)}"
    with as_config_error(what), torch.enable_grad():
        made.train()
        for _ in range(3):
            output = made(x)
            check_output(model, output, x, classes, "in training")
            if not output.requires_grad:
                raise ConfigError(f"{what}: its output has no gradient, so that nothing in it can learn")
            label_loss(output, labels).backward()
            seen.append(attribute_fingerprints(made, package))
    if not torch.equal(x, before):
        raise ConfigError(
            f"--model {model} changes the {samples(x)} that it is given: let it work on a copy, x.clone()"
        )
    if sparse := [name for name, each in made.named_parameters() if each.grad is not None and each.grad.is_sparse]:
        raise ConfigError(f"--model {model} has sparse gradients, of {sparse[0]!r}: leave out sparse=True")
    if single:
        try_single_image(model, made, x)
    changing = [name for name in seen[-1] if any(one.get(name) != seen[-1][name] for one in seen)]
    storable = storable_attributes(made)
    for name in changing:
        if name in storable and (letters := len(json.dumps(storable[name], default=lambda _: None))) > JSON_LIMIT:
            raise ConfigError(
                f"--model {model} keeps {letters:,} letters in {name!r}, and a checkpoint holds {JSON_LIMIT:,} of what "
                "is no tensor: let it be a tensor or an array"
            )
    return [name for name in changing if name not in storable]


def is_reproducible(model: str, made: nn.Module, x: Tensor, classes: int) -> bool:
    """Tell whether a network gives the same numbers again from the same seed and the same state, to the bit.

    Args:
        model: As it was given.
        made: The network; everything that a checkpoint holds is put back.
        x: Two images or pieces of text, or more.
        classes: Number of classes.

    Raises:
        ConfigError: It does not run; the message says why.
    """
    try:
        state = deepcopy(made.state_dict())
    except Exception:  # code of the user, refused with its reason by _checkpoints.check_storable
        return True
    attributes, outputs = Attributes(made), []
    for training in (True, True, False, False):
        with preserve_state(made), attributes.kept(), seeded(0, [x.device]):
            with as_config_error(f"--model {model} does not run on {samples(x)} of shape {tuple(x.shape)}"):
                output = made.train(training)(x.clone())
            check_output(model, output, x, classes, "in training" if training else "in evaluation")
            outputs.append(output.detach().contiguous().view(torch.uint8))
        with as_config_error(f"--model {model} does not take back its own state_dict()"):
            made.load_state_dict(deepcopy(state))
    return all(torch.equal(one, other) for one, other in zip(outputs[::2], outputs[1::2], strict=True))


def try_single_image(model: str, made: nn.Module, x: Tensor) -> None:
    """Refuse a network that cannot be trained on one image, where a batch of one will come."""
    one = samples(x).removesuffix("s")
    what = f"--model {model} does not train on a batch of one {one}, and one will come: give another --batch-size"
    with as_config_error(what), torch.no_grad():
        made.train()
        made(x[:1])


def check_output(model: str, output: object, x: Tensor, classes: int, when: str) -> None:
    """Refuse an output that is not one number for each image and class, or for each position and character."""
    came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    expected = (len(x), classes) if x.is_floating_point() else (*x.shape, classes)
    if came != expected:
        each = f"each of the {classes} classes" if x.is_floating_point() else f"each position and {classes} characters"
        raise ConfigError(
            f"--model {model} returned {came} for {len(x)} {samples(x)}, expected {expected} {when}: one number for "
            f"{each}"
        )
    if isinstance(output, Tensor) and not output.is_floating_point():
        kind = str(output.dtype).removeprefix("torch.")
        raise ConfigError(f"--model {model} returned numbers of type {kind} {when}, expected float32 or float64")


def samples(x: Tensor) -> str:
    """Name a batch in a sentence: images are real numbers, texts whole ones."""
    return "images" if x.is_floating_point() else "texts"
