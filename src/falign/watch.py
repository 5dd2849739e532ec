"""Weights that a model uses behind its layers' backs, found while it runs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "convolution", "_convolution",
        "matmul", "addbmm", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
    )
    if hasattr(torch.ops.aten, name)
)  # fmt: skip


class Watch(TorchDispatchMode):
    """Finds products with a parameter outside the layer that owns it: they would be plain backpropagation.

    Args:
        model: the model that runs while this mode is entered.
        allowed: the layers within which products are the layer's own business.
        explained: parameters about which there is nothing to say, or something was said already.
    """

    def __init__(self, model: nn.Module, allowed: list[nn.Module], explained: list[nn.Parameter]) -> None:
        super().__init__()
        self._depth = 0
        self._owner: dict[int, str | None] = {
            parameter.untyped_storage().data_ptr(): name
            for name, parameter in model.named_parameters()
            if not isinstance(parameter, UninitializedParameter)
        }
        for parameter in explained:
            self._owner.pop(parameter.untyped_storage().data_ptr(), None)
        self._found: dict[str, str] = {}
        self._kept: list[Tensor] = []
        self._handles = [
            handle
            for module in allowed
            for handle in (
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave, always_call=True),
            )
        ]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else entering the mode imports the compiler, for a second

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._depth -= 1

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def problems(self) -> list[str]:
        """A sentence for every parameter that was found."""
        return [
            f"parameter {name!r} is multiplied by {operation} outside its layer: the error would return through it by "
            "backpropagation; call the layer itself, or name the layer in skip="
            for name, operation in self._found.items()
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._depth:
            return result
        operands = [operand for operand in args if isinstance(operand, Tensor) and operand.layout is torch.strided]
        owners = [self._owner.get(operand.untyped_storage().data_ptr()) for operand in operands]
        if func.overloadpacket in _PRODUCTS:
            for owner in filter(None, owners):
                self._found.setdefault(owner, func.overloadpacket.__name__)
        elif owners and isinstance(result, Tensor) and all(owners):
            self._owner[result.untyped_storage().data_ptr()] = owners[0]  # a scaled or cast weight is still the weight
            self._kept.append(result)  # or its memory could become an activation's
        return result
