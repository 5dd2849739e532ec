"""Attention as layers: modules whose products with weights become child layers while a direct rule is attached.

``nn.MultiheadAttention`` and the recurrent modules (``_recurrent``) multiply their parameters in fused kernels, where
no input could be cut. An *expanded* module is the same object under another class: its parameters stay where they are,
under their names, and children without parameters of their own run the products, which hooks reach as they reach any
``nn.Linear``. Without gradients, it runs the fused kernels as ever.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from falign._attached import Feedback
from falign._cuts import is_below


class Product(nn.Linear):
    """A linear layer on some rows of parameters that another module owns.

    Args:
        owner: the module.
        weight: name of its parameter (rows, in).
        bias: name of its parameter (rows), or None.
        rows: (first, behind the last), of the bias; of the weight as well if it has as many rows as the bias.
    """

    def __init__(self, owner: nn.Module, weight: str, bias: str | None, rows: tuple[int, int] | None = None) -> None:
        nn.Module.__init__(self)
        self.__dict__["_owner"] = [owner]  # in a list, or it would be a child of its child
        self._names = weight, bias
        self._rows = rows
        self.training = owner.training

    def _get(self, name: str | None) -> Any:
        value = None if name is None else getattr(self.__dict__["_owner"][0], name)
        rows = None if value is None else self._rows_of(value)
        return value if value is None or rows is None else value[slice(*rows)]

    def _rows_of(self, value: Tensor) -> tuple[int, int] | None:
        """Give the rows of a parameter that are this layer's; None where all are."""
        if self._rows is None:
            return None
        first, stop = self._rows
        return None if value.dim() > 1 and len(value) == stop - first else self._rows

    def sources(self) -> list[tuple[Tensor, tuple[int, int] | None]]:
        """List the owner's parameters that the layer works on, and which rows of them; None: all."""
        owner = self.__dict__["_owner"][0]
        values = [getattr(owner, name) for name in self._names if name is not None]
        return [(value, self._rows_of(value)) for value in values if value is not None]

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """W, (out, in)."""
        return self._get(self._names[0])

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The bias, (out,), if there is one."""
        return self._get(self._names[1])

    @property
    def in_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Size of the input's last axis."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Size of the output's last axis."""
        return self.weight.shape[0]


class Expanded:
    """Base of the classes of expanded modules, in front of the module's own class."""

    is_expanded: ClassVar[bool] = True  # for ``_survey``, which stands below this module
    plain: ClassVar[type[nn.Module]]
    __dict__: dict[str, Any]

    @staticmethod
    def products(module: Any) -> dict[str, tuple[str, str | None, tuple[int, int] | None]]:
        """Give {name of the child: weight, bias, rows}."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle: the class is made anew where the module is."""
        _, _, *state = super().__reduce_ex__(protocol)
        return (_empty, (self.plain,), *state)

    def feedback_part(self) -> Feedback | None:
        """Give the feedback of one of the children; None while a conversion is only planned."""
        for name in self.__dict__[_CHILDREN]:
            child = self.__dict__["_modules"][name]
            if isinstance(part := child._modules.get("feedback"), Feedback):
                return part
        return None

    def plain_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module's own class."""
        return self.plain.forward(self, *args, **kwargs)  # type: ignore[arg-type]


_CHILDREN = "_falign_products"
_TABLE: list[tuple[type[nn.Module], type[Expanded]]] = []
_CLASSES: dict[type[nn.Module], type] = {}


def expands(base: type[nn.Module]) -> Any:
    """Enter a class as the expansion of a class of torch's."""

    def enter(expansion: type[Expanded]) -> type[Expanded]:
        _TABLE.append((base, expansion))
        return expansion

    return enter


def _expansion(cls: type[nn.Module]) -> tuple[type[nn.Module], type[Expanded]] | None:
    return next((entry for entry in _TABLE if issubclass(cls, entry[0])), None)


def _class_of(cls: type[nn.Module]) -> type:
    if cls not in _CLASSES:
        entry = _expansion(cls)
        assert entry is not None
        _CLASSES[cls] = type(cls.__name__, (entry[1], cls), {"plain": cls, "__module__": cls.__module__})
    return _CLASSES[cls]


def _empty(cls: type[nn.Module]) -> Any:
    made: Any = _class_of(cls)
    return made.__new__(made)


def expandable(model: nn.Module, skip: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Find (name, module) of what can be expanded, outside of what ``skip`` names."""
    for name, module in model.named_modules():
        spared = is_below(name, *skip)
        if not spared and not isinstance(module, Expanded) and _expansion(type(module)) is not None:
            yield name, module


def refusal(module: nn.Module) -> str | None:
    """Say why a module cannot be expanded; None where it can."""
    base = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn."))
    if type(module).forward is not base.forward or "forward" in module.__dict__:
        return (
            f"has a forward of its own over nn.{base.__name__}'s, so its products are not known: name it in cut= (its "
            "input is cut, inside it backpropagation) or in skip= (backpropagation)"
        )
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return "is on the meta device, without numbers: load its weights first, and convert then"
    return None


def expand(module: nn.Module, children: dict[str, nn.Module] | None = None) -> None:
    """Turn a module into an expanded one, in place; with the children that it had as one before, if it was."""
    entry = _expansion(type(module))
    assert entry is not None
    if children is None:
        children = {name: Product(module, *what) for name, what in entry[1].products(module).items()}
    for name, child in children.items():
        child.train(module.training)
        module.add_module(name, child)
    module.__dict__[_CHILDREN] = tuple(children)
    module.__class__ = _class_of(type(module))


def contract(model: nn.Module) -> list[tuple[nn.Module, dict[str, nn.Module]]]:
    """Turn all expanded modules within a model back into what they were, in place; give them and their children."""
    contracted = []
    expanded: list[Any] = [module for module in model.modules() if isinstance(module, Expanded)]
    for module in expanded:
        contracted.append((module, {name: module._modules.pop(name) for name in module.__dict__.pop(_CHILDREN)}))
        module.__class__ = module.plain
    return contracted


@expands(nn.MultiheadAttention)
class ExpandedAttention(Expanded):
    """``nn.MultiheadAttention`` whose four products are layers; softmax and the products of activities are its own."""

    @staticmethod
    def products(module: Any) -> dict[str, tuple[str, str | None, tuple[int, int] | None]]:
        """Give the products of queries, keys and values; that of the output is a layer already."""
        size = module.embed_dim
        bias = None if module.in_proj_bias is None else "in_proj_bias"
        return {
            f"{letter}_proj": (
                "in_proj_weight" if module._qkv_same_embed_dim else f"{letter}_proj_weight",
                bias,
                (place * size, (place + 1) * size),
            )
            for place, letter in enumerate("qkv")
        }

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as ``nn.MultiheadAttention`` does."""
        if self.feedback_part() is not None and not torch.is_grad_enabled():
            return self.plain_forward(
                query, key, value, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
                average_attn_weights=average_attn_weights, is_causal=is_causal,
            )  # fmt: skip
        F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)  # type: ignore[attr-defined]
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint that attn_mask is causal: give attn_mask, too")
        batched, first = query.dim() == 3, 1 if query.dim() == 3 and not self.batch_first else 0
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif first:  # time first
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        count, length, heads = q.shape[0], q.shape[1], self.num_heads
        use_hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if use_hint else self._mask(q, attn_mask, key_padding_mask)
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(count, -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(count, -1, -1)], 1)
        q, k, v = (each.unflatten(-1, (heads, self.head_dim)).transpose(1, 2) for each in (q, k, v))
        if self.add_zero_attn:
            k, v = (torch.cat([each, torch.zeros_like(each[:, :, :1])], 2) for each in (k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout > 0 else weights
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=use_hint)
        attended = attended.transpose(1, 2).reshape(count, length, self.embed_dim)
        attended = attended.squeeze(0) if not batched else attended.transpose(0, 1) if first else attended
        return self.out_proj(attended), weights

    def _mask(self: Any, q: Tensor, attention: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Merge both masks into one that is added to the scores, (samples or 1, heads or 1, queries, keys)."""
        more = (self.bias_k is not None) + self.add_zero_attn  # keys that no mask knows

        def added(mask: Tensor) -> Tensor:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
            return F.pad(mask, (0, more)) if more else mask

        merged = None
        if attention is not None:
            merged = added(attention)
            per_head = attention.dim() == 3  # (samples * heads, queries, keys)
            merged = merged.unflatten(0, (q.shape[0], self.num_heads)) if per_head else merged[None, None]
        if padding is not None:
            padding = added(padding).reshape(q.shape[0], 1, 1, -1)
            merged = padding if merged is None else merged + padding
        return merged
