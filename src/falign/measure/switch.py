"""Both gradients of one forward pass, for layerwise rules."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from falign.attached import Feedback
from falign.rules import Rule
from falign.wiring import converted, feedbacks

if TYPE_CHECKING:
    from falign.scratch import Scratch


class Switch:
    """Stands for a layerwise rule; switched to true, it carries errors through W, which is backpropagation.

    Args:
        rule: The rule.
    """

    learned = False  # B's own gradient is not asked for
    reads_weight = True

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.true = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def sources(self, feedback: Feedback, weight: Tensor, *, advance: bool) -> tuple[Tensor, ...]:
        """Those of the rule, and W."""
        weight = weight.detach()
        own = self.rule.sources(feedback, weight, advance=advance)
        return (*own, weight if feedback.gain == 1 else weight / feedback.gain)

    def effective(self, *sources: Tensor, scratch: "Scratch | None" = None) -> Tensor:
        """The rule's B, or W."""
        *own, weight = sources
        return weight if self.true else self.rule.effective(*own, scratch=scratch)


def switchable(model: nn.Module) -> bool:
    """Whether one forward serves both ways.

    All errors are delivered layer by layer, the weight of a layer is what its parameter is, and nobody else's hook
    stands between the layer's input and the layer: the delivery carries errors past it.
    """
    layers = [model.get_submodule(name) for name in feedbacks(model)]
    return (
        all(wiring.rule.wiring != "direct" for wiring in converted(model))
        and not any(is_parametrized(layer) for layer in layers)
        and all(isinstance(getattr(hook, "__self__", None), Feedback) for layer in layers for hook in _before(layer))
    )


def _before(layer: nn.Module) -> Iterable[Any]:
    return layer._forward_pre_hooks.values()


@contextmanager
def switches(model: nn.Module) -> Iterator[list[Switch]]:
    """Within, the forward passes of a model can be walked back by the rule and, switched, truly."""
    hung = converted(model)
    made = [Switch(wiring.rule) for wiring in hung]
    for wiring, switch in zip(hung, made, strict=True):
        wiring.state.rule = switch
    try:
        yield made
    finally:
        for wiring in hung:
            wiring.state.rule = None
