"""Keep ``torch.compile`` from running code of a plain model in the place of a converted one.

Dynamo shares compiled code between the instances of a class and, by default, does not look at hooks when it decides
whether the code fits (``torch._dynamo.config.skip_nnmodule_hook_guards``). Code of a plain model would so run for a
converted one, whose rule hangs on hooks: backpropagation, without a word. Here hooks are looked at.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_CONFIG = "torch._dynamo.config"


class _OnImport(MetaPathFinder):
    """Sets the option as soon as Dynamo is imported: importing it here would cost every program a second or two."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                module.skip_nnmodule_hook_guards = False  # type: ignore[attr-defined]

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def look_at_hooks() -> None:
    """Have Dynamo look at the hooks of modules before it runs compiled code; code compiled before is forgotten."""
    config: Any = sys.modules.get(_CONFIG)
    if config is None:
        if not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
            sys.meta_path.insert(0, _OnImport())
    elif config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        forget()


def forget() -> None:
    """Forget all compiled code, if there is any."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None and hasattr(dynamo, "reset_code_caches"):
        dynamo.reset_code_caches()  # and not reset(), which on a GPU machine imports the whole of Inductor
