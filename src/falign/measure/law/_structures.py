"""PyTorch's attention and recurrent modules as the law sees them: which rows of which parameters are neurons.

Their products run in one piece, so they are not followed operation by operation: what is inside is known.
``nn.MultiheadAttention`` has the rows of queries, keys and values in one weight or in three. A recurrent module with
relu has neurons whose sum comes from two weights, one of the input and one of the neurons themselves a step before; an
LSTM with a projection has a linear layer behind its gates. Behind a tanh or a gate there is no law.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from falign.measure.law._weights import LinearMap, Rows, map_of_layer


class Source(NamedTuple):
    """Neurons inside a module.

    Attributes:
        name: That of the map whose rows they are.
        maps: Names of all maps into them.
        targets: {map inside the module that they feed: neuron of every feature of its input, -1 for none}.
        reason: Why there is no law for them; empty where there is one.
    """

    name: str
    maps: tuple[str, ...]
    targets: dict[str, Tensor]
    reason: str = ""


class Structure(NamedTuple):
    """A module whose inside is known.

    Attributes:
        maps: {name: linear map}, in running order.
        arguments: Names of the module's inputs.
        inputs: Names of the maps that each of them feeds.
        sources: The neurons inside, in running order.
        products: (layer, layer) whose neurons are multiplied with each other, one by one.
        outputs: Sources side by side in the last axis of the first output.
        last: The source of every slot of the second output (layers and directions), "" for none.
        recurrent: Whether neurons feed themselves, so that they must start from zero.
    """

    maps: dict[str, LinearMap]
    arguments: tuple[str, ...]
    inputs: tuple[tuple[str, ...], ...]
    sources: list[Source]
    products: tuple[tuple[str, str], ...] = ()
    outputs: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    recurrent: bool = False


def structure_of(name: str, module: nn.Module) -> Structure | None:
    """Find what is inside of a module of PyTorch's own; None of one of another kind, or with parametrised weights."""
    expanded = getattr(type(module), "is_expanded", False)  # into layers, by a direct rule: it computes the same
    forward = (module.plain if expanded else type(module)).forward  # pyright: ignore
    if isinstance(module, nn.MultiheadAttention) and forward is nn.MultiheadAttention.forward:
        return _attention(name, module)
    if isinstance(module, nn.RNNBase) and forward in (nn.RNN.forward, nn.GRU.forward, nn.LSTM.forward):
        return _recurrent(name, module)
    return None


def _attention(name: str, module: nn.MultiheadAttention) -> Structure | None:
    parameters, width = module._parameters, module.embed_dim
    fused = module._qkv_same_embed_dim
    maps: dict[str, LinearMap] = {}
    for place, (part, token) in enumerate((("q", None), ("k", "bias_k"), ("v", "bias_v"))):
        key = _joined(name, "in_proj_weight" if fused else f"{part}_proj_weight")
        weight = parameters.get("in_proj_weight" if fused else f"{part}_proj_weight")
        if weight is None:
            return None
        rows = slice(place * width, (place + 1) * width)
        biases = []
        if (bias := parameters.get("in_proj_bias")) is not None:
            biases.append(Rows(parameter=bias, text="½b²", what="bias", rows=rows, vector=True))
        if token is not None and (more := parameters.get(token)) is not None:  # one more key, or value, of all samples
            biases.append(Rows(parameter=more, text="½b²", what=token, vector=True))
        linear = Rows(parameter=weight, text="½|w|²", rows=rows if fused else slice(None))
        called = f"{key}[{part}]" if fused else key
        keys = (key, _joined(name, f"{part}_proj"))
        maps[called] = LinearMap(name=called, keys=keys, weight=linear, biases=tuple(biases))
    if module.out_proj._parameters.get("weight") is None:
        return None
    out = _joined(name, "out_proj")
    maps[out] = map_of_layer(out, module.out_proj)
    q, k, v, _ = maps
    sources = [
        Source(q, (q,), {}),
        Source(k, (k,), {}),
        Source(v, (v,), {out: torch.arange(width)}),
        Source(out, (out,), {}),
    ]
    inputs = ((q,), (k,), (v,))
    return Structure(maps, ("query", "key", "value"), inputs, sources, products=((q, k),), outputs=(out,))


def _recurrent(name: str, module: nn.RNNBase) -> Structure | None:
    ways = ("", "_reverse") if module.bidirectional else ("",)
    reason = {
        "RNN_RELU": "",
        "RNN_TANH": "tanh is not homogeneous",
        "GRU": "its gates are not homogeneous",
        "LSTM": "its gates and tanh are not homogeneous",
    }[module.mode]
    neurons = module.proj_size or module.hidden_size
    maps: dict[str, LinearMap] = {}
    sources: list[Source] = []
    last: list[str] = []
    for layer in range(module.num_layers):
        tails = [f"l{layer}{way}" for way in ways]
        for place, tail in enumerate(tails):
            made = {part: _cell_map(name, module, part, tail) for part in ("ih", "hh", "hr")}
            known = {part: linear for part, linear in made.items() if linear is not None}
            if "ih" not in known or "hh" not in known:
                return None
            maps.update({linear.name: linear for linear in known.values()})
            above = {
                _joined(name, f"weight_ih_l{layer + 1}{way}"): _placed(neurons, place, len(ways))
                for way in (ways if layer + 1 < module.num_layers else ())
            }
            targets = {known["hh"].name: torch.arange(neurons), **above}
            both = (known["ih"].name, known["hh"].name)
            if module.mode.startswith("RNN"):
                sources.append(Source(both[0], both, targets, reason))
            else:
                sources.append(Source(both[0], both, {}, reason))
            if "hr" in known:
                sources.append(Source(known["hr"].name, (known["hr"].name,), targets))
            last.append(sources[-1].name if sources[-1].targets else "")
    inputs = tuple(_joined(name, f"weight_ih_l0{way}") for way in ways)
    outputs = tuple(last[-len(ways) :])
    return Structure(maps, ("input", "hx"), (inputs,), sources, outputs=outputs, last=tuple(last), recurrent=True)


def _cell_map(name: str, module: nn.RNNBase, part: str, tail: str) -> LinearMap | None:
    """Make the map of one weight of a recurrent layer, with its bias; None if it has none."""
    weight, bias = (module._parameters.get(f"{kind}_{part}_{tail}") for kind in ("weight", "bias"))
    if weight is None:
        return None
    biases = () if bias is None else (Rows(parameter=bias, text="½b²", what="bias", vector=True),)
    key = _joined(name, f"weight_{part}_{tail}")
    keys, rows = (key, _joined(name, f"{part}_{tail}")), Rows(parameter=weight, text="½|w|²")
    return LinearMap(name=key, keys=keys, weight=rows, biases=biases, through_time=part == "hh")


def _placed(neurons: int, place: int, ways: int) -> Tensor:
    """Number the neurons of one direction among the features of both."""
    columns = torch.full((ways, neurons), -1)
    columns[place] = torch.arange(neurons)
    return columns.flatten()


def _joined(name: str, parameter: str) -> str:
    return f"{name}.{parameter}" if name else parameter


def labels_of_outputs(structure: Structure, result: object) -> Iterator[tuple[Tensor, str, Tensor, bool]]:
    """Label what a module returned: (tensor, source, labels, whether it is the source's output as it is)."""
    first, *others = result if isinstance(result, tuple) and type(result) is tuple else (result,)
    first = getattr(first, "data", first) if isinstance(first, nn.utils.rnn.PackedSequence) else first
    ways = len(structure.outputs)
    if isinstance(first, Tensor):
        for place, source in enumerate(structure.outputs):
            if source:
                columns = _placed(first.shape[-1] // ways, place, ways).to(first.device)
                yield first, source, columns.expand(first.shape).clone(), ways == 1
    state = others[0] if others else None
    state = state[0] if isinstance(state, tuple) else state
    if structure.last and isinstance(state, Tensor):
        for slot, source in enumerate(structure.last):
            if source:
                labels = torch.full_like(state, -1, dtype=torch.int64)
                labels[slot] = torch.arange(state.shape[-1], device=state.device)
                yield state, source, labels, False
