"""Which neurons of one layer are which inputs of another, found while a model runs once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from falign.measure.law.tracer import Tracer
from falign.measure.untouched import untouched, unwrapped
from falign.outputs import pick
from falign.preserve import eagerly
from falign.survey import call


@dataclass(frozen=True, kw_only=True, eq=False)
class Connection:
    """The neurons of one layer as the inputs of another.

    Attributes:
        source: Name of the layer whose neurons they are: a linear map, a convolution (channels) or a batch
            normalisation (channels).
        target: Name of the next such layer.
        columns: For every feature (channel) of the target's input the neuron of the source that it belongs to, -1
            where it is none of this source.
    """

    source: str
    target: str
    columns: Int64[Tensor, " in"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Followed:
    """What ``follow`` found.

    Attributes:
        connections: In running order of the targets.
        reasons: {layer: why the balance of its neurons does not hold, in words}; a layer with a reason may still have
            connections, where only the law and not the way of its neurons is lost.
        neurons: {layer: how many neurons (channels) it has}, in running order.
        outputs: Layers whose output is an output of the model, element by element; under a direct rule the one where
            the error begins.
        precision: The shortest floating-point type that a layer was given.
    """

    connections: tuple[Connection, ...]
    reasons: dict[str, str]
    neurons: dict[str, int]
    outputs: frozenset[str]
    precision: torch.dtype

    def targets(self, source: str) -> tuple[Connection, ...]:
        """The connections out of one layer."""
        return self._by_source.get(source, ())

    @cached_property
    def _by_source(self) -> dict[str, tuple[Connection, ...]]:
        found: dict[str, tuple[Connection, ...]] = {}
        for connection in self.connections:
            found[connection.source] = (*found.get(connection.source, ()), connection)
        return found


def follow(model: nn.Module, example: Any) -> Followed:
    """Run a model once and find, for every layer, which inputs of which layers its neurons are.

    What lies between two layers may rearrange elements and scale each by something that does not depend on the
    neuron's size (ReLU and its relatives, dropout, pooling, casts): there the sum of error × activation of a neuron
    is the same on both sides, in every batch. Whatever else happens to a neuron's output becomes a reason. The model
    runs in its own training mode; its buffers, the random generators and modes are left as they were.

    Args:
        model: The model, or a compiled or data-parallel wrapper of it.
        example: Its input; a tuple is positional arguments, a dict keyword arguments.

    Raises:
        ValueError: The model does not run on the example.
    """
    inner = unwrapped(model)
    return trace(inner, partial(call, inner, example))


def trace(model: nn.Module, run: Callable[[], Any]) -> Followed:
    """Follow the neurons of a model, unwrapped, through what ``run`` does: one pass of it.

    Raises:
        ValueError: It fails.
    """
    tracer = Tracer(model)
    try:
        with eagerly(), torch.no_grad(), untouched(model), tracer:
            result = run()
    except Exception as error:
        raise ValueError(
            f"the model does not run on the example: {type(error).__name__}: {error}; give one batch of its input, a "
            "tuple for positional and a dict for keyword arguments"
        ) from error
    finally:
        tracer.remove()
        torch.clear_autocast_cache()  # weights cast here know of no gradient, and the next pass would take them
    wiring = model.__dict__.get("_falign")
    if wiring is not None and wiring.rule.wiring == "direct":
        tracer.finish(result, [pick(result, end.output) for end in wiring.ends])
    else:
        tracer.finish(result, tree_leaves(result))
    return Followed(
        connections=tuple(
            Connection(source=source, target=target, columns=found)
            for (source, target), found in tracer.connections.items()
        ),
        reasons=tracer.reasons,
        neurons=tracer.neurons,
        outputs=tracer.outputs,
        precision=min(tracer.types, key=lambda dtype: dtype.itemsize, default=torch.get_default_dtype()),
    )
