"""Keep to itself what a process shares: random generators, the order of sums, and the code that Dynamo compiled."""

import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# NumPy's global generator (rule NPY002 of ruff) is what a model may draw from, whatever one would write today.

GENERATOR_MODULES = {"cuda": torch.cuda, "mps": torch.mps}
"""Kinds of devices beside the CPU that have generators, and who knows their states."""


@contextmanager
def preserve_generators(model: nn.Module) -> Iterator[None]:
    """Put the random generators back afterwards: PyTorch's (CPU, the model's devices), Python's and NumPy's."""
    with _kept({tensor.device for tensor in (*model.parameters(), *model.buffers())}):
        yield


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Start the global generators of PyTorch, Python and NumPy from a seed, and put them back afterwards.

    Args:
        seed: From 0 to below 2⁶⁴.
        devices: Those whose generators are put back too.
    """
    with _kept(devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002
        yield


def generator_states() -> dict[str, Any]:
    """Read the states of Python's and NumPy's global generators, as JSON can hold them."""
    name, key, *rest = np.random.get_state()  # noqa: NPY002
    return {"python": random.getstate(), "numpy": [name, np.asarray(key).tolist(), *rest]}


def restore_generator_states(state: Mapping[str, Any]) -> None:
    """Put Python's and NumPy's global generators into states that ``generator_states`` read.

    Raises:
        ValueError, TypeError, KeyError: This is no such state.
    """
    version, key, normal = state["python"]
    random.setstate((version, tuple(key), normal))
    name, key, *rest = state["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))  # noqa: NPY002


@contextmanager
def _kept(devices: Iterable[torch.device]) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    others = [device for device in devices if device.type in GENERATOR_MODULES]
    with torch.random.fork_rng(devices=others, device_type=others[0].type if others else "cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Run without cuDNN, whose recurrent kernels take all weights as one piece of memory."""
    cudnn: Any = torch.backends.cudnn
    enabled = cudnn.enabled
    cudnn.enabled = False
    try:
        yield
    finally:
        cudnn.enabled = enabled


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Make the same computation on a CUDA device give the same numbers every time, to the bit.

    Convolutions' gradients, among others, are summed in any order unless PyTorch is told not to. Where it has no other
    algorithm it warns of the operation and goes on. The CPU needs nothing.

    Args:
        device: What is computed on.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or every matrix product is warned of
    cudnn: Any = torch.backends.cudnn  # whose attributes are properties that no checker sees
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    strict, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True, warn_only=not strict or warned)
        memory.fill_uninitialized_memory = False  # nothing reads it, and filling takes time
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
        memory.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(strict, warn_only=warned)


class DrawOnCPU(TorchDispatchMode):
    """Draw everything random by the CPU's generator and then move it: one seed, one model on any device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; one that draws, on copies of its arguments on the CPU."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        device = next(
            (a.device for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), kwargs.get("device")
        )
        kwargs = {name: torch.device("cpu") if name == "device" else value for name, value in kwargs.items()}
        twins, named = tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), (args, kwargs))
        drawn = func(*twins, **named)
        if func._schema.is_mutable:  # in place: the first argument is what is drawn
            return args[0].copy_(drawn)
        return drawn.to(device)


@contextmanager
def force_eager() -> Iterator[None]:
    """Run compiled code uncompiled: hooks and modes that are attached now would see nothing of it."""
    if "torch._dynamo" not in sys.modules:  # importing it takes a second, and without it nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


# Dynamo shares compiled code between the instances of a class and, by default, does not look at hooks when it decides
# whether the code fits (``torch._dynamo.config.skip_nnmodule_hook_guards``). Code of a plain model would so run for a
# converted one, whose rule is in its hooks: backpropagation, without a word. So that option is switched off.

_CONFIG = "torch._dynamo.config"


class _OnImport(MetaPathFinder):
    """Do something with a module as soon as it is imported: importing Dynamo here would cost every program seconds."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _guard_hooks(config: Any) -> None:
    config.skip_nnmodule_hook_guards = False


def run_uncompiled(*functions: Callable[..., Any]) -> None:
    """Make Dynamo, once it is there, leave functions alone, and break its graph where they are called."""

    def skip(dynamo: Any) -> None:
        for function in functions:
            dynamo.decorators.skip(function)

    if "torch._dynamo" in sys.modules:
        skip(sys.modules["torch._dynamo"])
    else:
        sys.meta_path.insert(0, _OnImport("torch._dynamo", skip))


def look_at_hooks() -> None:
    """Make Dynamo check the hooks of modules before it runs compiled code; code compiled before is forgotten."""
    config: Any = sys.modules.get(_CONFIG)
    if config is None:
        if not any(isinstance(finder, _OnImport) and finder.name == _CONFIG for finder in sys.meta_path):
            sys.meta_path.insert(0, _OnImport(_CONFIG, _guard_hooks))
    elif config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        forget_compiled_code()


def forget_compiled_code() -> None:
    """Forget all compiled code, if there is any."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None and hasattr(dynamo, "reset_code_caches"):
        dynamo.reset_code_caches()  # and not reset(), which on a GPU machine imports the whole of Inductor


def refuse_forward_mode() -> None:
    """Raise within forward-mode differentiation."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "forward-mode derivatives (jvp, jacfwd, hessian) pass no delivery of errors: take them within "
            "`with falign.backprop(model):`, where they are exact"
        )


def exporting() -> bool:
    """Tell whether ``torch.export`` is at work."""
    # Not is_exporting(), which Dynamo of torch 2.11 takes for true whenever it compiles.
    return getattr(torch.compiler, "_is_exporting_flag", False)
