"""What a rule would find in a model: the layers that take it, and everything that stands in its way."""

import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from falign.layers import KINDS, LOOKUPS, Kind, Layer, kind_of
from falign.watch import Watch

#: Layers whose parameters scale and shift what passes; autograd carries the error through them exactly.
_NORMALISATIONS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU,
)  # fmt: skip

_REFUSED: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "write its projections as nn.Linear around scaled_dot_product_attention",
    nn.RNNBase: "unroll it with nn.Linear cells",
    nn.RNNCellBase: "write its two maps as nn.Linear",
    nn.Bilinear: "write it as nn.Linear on the outer product",
}


class Survey:
    """The layers of a model that take a rule, by name, and why the others do not.

    Attributes:
        layers: name -> layer, in the model's order.
        kinds: name -> its kind.
        shapes: name -> the shapes of its inputs on the example, one a call.
        problems: one sentence each.
    """

    def __init__(self, model: nn.Module, skip: Iterable[str]) -> None:
        self.model = model
        self.layers: dict[str, Layer] = {}
        self.kinds: dict[str, Kind] = {}
        self.problems: list[str] = []
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self._spared: list[nn.Module] = []
        self._explained: list[nn.Parameter] = []
        names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
        self._skip = set(skip)
        for name in sorted(self._skip.difference(names)):
            near = get_close_matches(name, names, n=3) or [name for name in names if name][:6]
            self.problems.append(f"skip names {name!r}, which the model does not have; near it: {', '.join(near)}")
        self._visit("", model, set())

    def _visit(self, name: str, module: nn.Module, seen: set[int]) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if name in self._skip or isinstance(module, (*LOOKUPS, *_NORMALISATIONS)):
            self._spared.append(module)
            if name in self._skip or not isinstance(module, LOOKUPS):
                self._explained += module.parameters()
            return
        own = dict(module.named_parameters(recurse=False))
        if kind_of(module) is None:
            named = {key for key in own if f"{name}.{key}".lstrip(".") in self._skip}
            self._explained += [own.pop(key) for key in named]
        if any(isinstance(parameter, UninitializedParameter) for parameter in own.values()):
            self._refuse(name, module, "has no shape yet: run one batch through the model first")
        elif (kind := kind_of(module)) is not None:
            self.layers[name], self.kinds[name] = module, kind
            if hasattr(module, "feedback"):
                self._refuse(name, module, "has an attribute feedback of its own, which falign needs: rename it")
        elif isinstance(module, tuple(base for kind in KINDS.values() for base in kind.types)):
            self._explained += own.values()
            self._refuse(
                name, module,
                "has a forward of its own, so its map is not known: use the plain layer, or name it in skip= "
                "(backpropagation)",
            )  # fmt: skip
        elif refused := next((base for base in _REFUSED if isinstance(module, base)), None):
            self._explained += module.parameters()
            self._refuse(
                name, module, f"cannot take feedback: {_REFUSED[refused]}, or name it in skip= (backpropagation)"
            )
        elif any(max(parameter.shape, default=1) < parameter.numel() for parameter in own.values()):
            self._explained += own.values()
            listed = ", ".join(f"{key} {'x'.join(map(str, p.shape))}" for key, p in own.items())
            self._refuse(
                name, module,
                f"uses parameters of its own ({listed}) in a way that falign cannot see: put them into nn.Linear or a "
                "convolution, or name the parameter in skip= (backpropagation) if it only adds or scales",
            )  # fmt: skip
            for child_name, child in module.named_children():
                self._visit(f"{name}.{child_name}".lstrip("."), child, seen)
        else:
            for child_name, child in module.named_children():
                self._visit(f"{name}.{child_name}".lstrip("."), child, seen)

    def _refuse(self, name: str, module: nn.Module, why: str) -> None:
        self.problems.append(f"layer {name or '(root)'!r} ({type(module).__name__}) {why}")

    def run(self, example: Any) -> Any:
        """Run the example once, without gradients and leaving no trace; note which layers ran, on which shapes.

        Layers that run only in training (auxiliary heads) are looked for in a second run, in the model's own mode.

        Args:
            example: the model's input; a tuple is its positional arguments, a dict its keyword arguments.

        Returns:
            What the model returned, or None where it failed (then there is a problem that says how).
        """
        modes = {module: module.training for module in self.model.modules()}
        buffers = {buffer: buffer.clone() for buffer in self.model.buffers()}
        handles = [layer.register_forward_pre_hook(self._note(name)) for name, layer in self.layers.items()]
        watch = Watch(self.model, [*self.layers.values(), *self._spared], self._explained)
        fast = torch.backends.mha.get_fastpath_enabled()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings(), watch:
                warnings.simplefilter("ignore")
                torch.backends.mha.set_fastpath_enabled(False)  # evaluation's short cut past a transformer's layers
                self.model.eval()
                result = call(self.model, example)
                if set(self.layers) - set(self.shapes) and any(modes.values()):
                    for module, mode in modes.items():
                        module.training = mode
                    call(self.model, example)
        except Exception as error:
            self.problems.append(f"the model does not run on the example: {type(error).__name__}: {error}")
            return None
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers.items():
                    buffer.copy_(value)
            for handle in handles:
                handle.remove()
            watch.remove()
        for name in self.layers:
            if name not in self.shapes:
                self.problems.append(
                    f"layer {name!r} did not run on the example, so no error can reach it: call it in forward "
                    "(using its weight by other means passes falign by), or name it in skip="
                )
        self.problems.extend(watch.problems())
        return result

    def _note(self, name: str) -> Any:
        def note(layer: nn.Module, args: tuple) -> None:
            if not args:
                raise TypeError(f"layer {name!r} was called with keyword arguments only: pass its input as the first")
            if isinstance(args[0], Tensor):
                self.shapes.setdefault(name, []).append(tuple(args[0].shape))

        return note


def call(model: nn.Module, example: Any) -> Any:
    """The model on an example: a tuple is positional arguments, a dict keyword arguments, anything else the input."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)
