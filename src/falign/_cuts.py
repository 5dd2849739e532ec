"""Names of what is cut: the words of ``cut=``, the modules that they name, and the arguments that modules are given."""

from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

Cuts = str | tuple[str, ...] | list[str]
"""Names or patterns of modules, "layers", "blocks", or several of these."""


def cut_words(cut: Any) -> tuple[tuple[str, ...], list[str]]:
    """Give the words of ``cut=``, and problems."""
    words = (cut,) if isinstance(cut, str) else tuple(cut) if isinstance(cut, (tuple, list)) else ()
    if not words or not all(isinstance(word, str) and word for word in words):
        return (), [f"cut is {cut!r:.60}, expected names or patterns of modules, 'layers' or 'blocks'"]
    return words, []


def cut_modules(model: nn.Module, words: tuple[str, ...]) -> tuple[dict[str, nn.Module], list[str]]:
    """Find the modules that the words of ``cut=`` name, "layers" left out, and say which name none.

    A pattern holds for the parts of a name between dots: "blocks.*" is every block, and nothing inside of it.
    """
    named = {name: module for name, module in model.named_modules() if name and not _is_feedback(name)}
    chosen: dict[str, nn.Module] = {}
    problems = []
    for word in words:
        if word == "layers":
            continue
        if word == "blocks":
            blocks = find_blocks(model)
            if not blocks:
                problems.append(
                    "cut='blocks' finds no blocks: no nn.ModuleList or nn.Sequential holds two modules of one class, "
                    "with parameters, one behind the other; name the modules"
                )
            matching = blocks
        else:
            parts = word.split(".")
            matching = {
                name: module
                for name, module in named.items()
                if name == word
                or (len(name.split(".")) == len(parts) and all(map(fnmatchcase, name.split("."), parts)))
            }
            if not matching:
                near = get_close_matches(word, named, n=3) or list(named)[:6]
                problems.append(f"cut names {word!r}, which the model does not have; near it: {', '.join(near)}")
        for name, module in matching.items():
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                problems.append(f"cut names {name!r}, a {type(module).__name__}, which is never called: name its parts")
            elif (outer := compiled_around(model, name)) is not None:
                problems.append(
                    f"cut names {name!r}, which is part of compiled code ({outer}): convert the plain model first, and "
                    "compile it then; torch.jit takes no rule"
                )
            chosen[name] = module
    return chosen, problems


def is_below(name: str, *modules: str) -> bool:
    """Tell whether a name is that of one of some modules, or of something inside of one."""
    return any(f"{name}.".startswith(f"{one}.") for one in modules)


def compiled_around(model: nn.Module, name: str) -> str | None:
    """Name the class of what a module is compiled in; None where no rule would be left out."""
    module = model
    for part in name.split("."):
        if type(module).__name__ == "OptimizedModule" or isinstance(module, torch.jit.ScriptModule):
            return type(module).__name__
        module = module.get_submodule(part)
    return type(module).__name__ if isinstance(module, torch.jit.ScriptModule) else None


def _is_feedback(name: str) -> bool:
    return "feedback" in name.split(".")


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Find the longest runs of siblings of one class, one behind the other; several where they are of one length."""
    runs: list[list[tuple[str, nn.Module]]] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            children = [(f"{name}.{key}".lstrip("."), child) for key, child in module.named_children()]
            run = children[:1]
            for (_, before), (key, child) in pairwise(children):
                run = [*run, (key, child)] if type(child) is type(before) else [(key, child)]
                if len(run) > 1 and any(True for _ in child.parameters()):
                    runs = [*(other for other in runs if other != run[:-1]), run]
    longest = max(map(len, runs), default=0)
    chosen: dict[str, nn.Module] = {}
    for run in runs:
        if len(run) == longest and not any(run[0][0].startswith(f"{name}.") for name in chosen):
            chosen |= dict(run)
    return chosen


def map_arguments(
    args: tuple, kwargs: dict[str, Any], function: Callable[[str, Tensor], Tensor]
) -> tuple[tuple, dict[str, Any]]:
    """Replace every floating-point tensor among arguments, also within tuples, lists and dicts, by a function of it.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        function: (where it is: "[0]", "[memory]", "[state][1]"; the tensor of any shape) -> a tensor.
    """

    def mapped(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return function(path, value) if value.is_floating_point() else value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(mapped(each, f"{path}[{at}]") for at, each in enumerate(value)))
        if type(value) in (tuple, list):
            return type(value)(mapped(each, f"{path}[{at}]") for at, each in enumerate(value))
        if type(value) is dict:
            return {key: mapped(each, f"{path}[{key}]") for key, each in value.items()}
        return value

    return mapped(args, ""), mapped(kwargs, "")
