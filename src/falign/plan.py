"""A conversion before it is carried out: which layers it reaches, the shapes of their feedback, and every problem."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from falign.feedback import Family, Normal, Shared, draw, family
from falign.layers import KINDS, Kind, Layer, weight_of
from falign.outputs import Output, pick
from falign.rules import ALL_RULES, Rule
from falign.survey import Survey
from falign.wiring import Feedback, SharedSequence, Wiring, wirings

FeedbackChoice = str | Family | Mapping[str, Tensor] | None

#: Where DDP looks for the names of what it need not send to the other ranks.
DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"


class Plan:
    """A conversion before it is carried out: which layers, which shapes of B, and every problem."""

    def __init__(
        self,
        model: nn.Module,
        rule: str | Rule,
        feedback: FeedbackChoice,
        scale: float | None,
        skip: Iterable[str],
        example: Any,
        output: Output,
    ) -> None:
        self.model, self.output = model, output
        self.problems: list[str] = []
        self.layers: dict[str, Layer] = {}
        self.shapes: dict[str, tuple[tuple[int, ...], int]] = {}
        found = self._rule(rule)
        self._refuse_wrapped()
        if found is None or self.problems:
            return
        self.rule = found
        skip = (skip,) if isinstance(skip, str) else tuple(skip or ())
        if wrong := [name for name in skip if not isinstance(name, str)]:
            self.problems.append(f"skip holds {wrong[0]!r:.40}, expected names of layers or parameters")
            return
        survey = Survey(model, skip)
        if self.rule.wiring == "none":
            self.problems = [line for line in survey.problems if line.startswith("skip")]
            if feedback is not None or scale is not None:
                self.problems.append(f"rule {self.rule.name!r} has no feedback: pass neither feedback= nor scale=")
            return
        self.layers, self.kinds, self.problems = survey.layers, survey.kinds, survey.problems
        self.weights = {name: weight_of(layer) for name, layer in self.layers.items()}
        if not self.layers and not self.problems:
            self.problems.append(
                f"nothing to convert: the model ({type(model).__name__}) has no nn.Linear or convolution outside skip"
            )
        result = survey.run(example) if example is not None and self.layers else None
        if self.rule.wiring == "direct" and not self.problems:
            self._direct_shapes(survey, result)
        else:
            self.shapes = {name: (tuple(weight.shape), 0) for name, weight in self.weights.items()}
        self.scale = self._scale(scale)
        self.family, self.given = self._family(feedback)

    def _rule(self, rule: str | Rule) -> Rule | None:
        if isinstance(rule, Rule) and hasattr(rule, "name"):
            return rule
        if isinstance(rule, str) and rule in ALL_RULES:
            return ALL_RULES[rule]()
        if isinstance(rule, type) and issubclass(rule, Rule) and hasattr(rule, "name"):
            return rule()
        self.problems.append(f"unknown rule {rule!r}: choose one of {', '.join(ALL_RULES)}, or pass a falign.Rule")
        return None

    def _refuse_wrapped(self) -> None:
        if not isinstance(self.model, nn.Module):
            self.problems.append(f"expected a torch.nn.Module, got {type(self.model).__name__}")
        elif converted := wirings(self.model):
            self.problems.append(
                f"the model, or a part of it, is converted already, to rule {converted[0].rule.name!r}: "
                "call falign.revert(model) first"
            )
        elif type(self.model).__name__ in ("DistributedDataParallel", "DataParallel", "OptimizedModule") or isinstance(
            self.model, torch.jit.ScriptModule
        ):
            self.problems.append(
                f"the model is wrapped in {type(self.model).__name__}: convert the plain model first, then wrap it"
            )

    def _scale(self, scale: float | None) -> float:
        if scale is None:
            return self.rule.default_scale
        if not isinstance(scale, (int, float)) or not isfinite(scale) or scale <= 0:
            self.problems.append(f"scale is {scale!r}, expected a positive number")
            return 1.0
        return float(scale)

    def _family(self, feedback: FeedbackChoice) -> tuple[Family, dict[str, Tensor]]:
        if feedback is None:
            return Normal(), {}
        if not self.rule.draws:
            self.problems.append(f"rule {self.rule.name!r} makes its feedback from the weights: pass no feedback=")
        if isinstance(feedback, Mapping):
            return Normal(), self._tensors(feedback)
        if isinstance(feedback, str):
            try:
                feedback = family(feedback)
            except ValueError as error:
                self.problems.append(str(error))
                return Normal(), {}
        if not callable(feedback):
            self.problems.append(
                f"feedback is a {type(feedback).__name__}, expected a family, a callable or {{layer name: tensor}}"
            )
        if isinstance(feedback, Shared) and (self.rule.learned or self.rule.adapts):
            self.problems.append(
                f"rule {self.rule.name!r} changes each layer's feedback: the shared family cannot serve it"
            )
        return feedback, {}

    def _tensors(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in given.items():
            if name not in self.layers:
                near = get_close_matches(str(name), self.layers, n=3) or list(self.layers)[:6]
                self.problems.append(f"feedback names {name!r}, which takes no feedback; layers: {', '.join(near)}")
            elif not isinstance(tensor, Tensor):
                self.problems.append(f"feedback of layer {name!r} is a {type(tensor).__name__}, expected a tensor")
            elif name in self.shapes and self.rule.draws and tuple(tensor.shape) != self.shapes[name][0]:
                self.problems.append(
                    f"feedback of layer {name!r} has shape {tuple(tensor.shape)}, expected {self.shapes[name][0]}"
                )
            elif not torch.isfinite(tensor).all():
                self.problems.append(f"feedback of layer {name!r} holds numbers that are not finite")
        return dict(given)

    def _direct_shapes(self, survey: Survey, result: Any) -> None:
        if not survey.shapes:
            others = [name for name, layer in self.layers.items() if not isinstance(layer, nn.Linear)]
            if others:
                self.problems.append(
                    f"rule {self.rule.name!r} needs an example: the size of the input of {', '.join(others)} cannot "
                    "be read off the layer; pass example=x with a batch x"
                )
            outputs = list(self.weights.values())[-1].shape[0]
            self.shapes = {name: ((outputs, weight.shape[1]), 0) for name, weight in self.weights.items()}
            return
        try:
            out = tuple(pick(result, self.output).shape)
        except TypeError as error:
            self.problems.append(str(error))
            return
        for name, kind in self.kinds.items():
            shapes = {_direct_shape(x, out, kind.channel_first) for x in survey.shapes[name]}
            if None in shapes:
                self.problems.append(
                    f"layer {name!r} has input {survey.shapes[name][0]} and the model output {out}: a direct rule "
                    "needs the batch first in both; name the layer in skip= or move the axis"
                )
            elif len(shapes) > 1:
                self.problems.append(
                    f"layer {name!r} runs on inputs of different sizes ({', '.join(map(str, survey.shapes[name]))}): "
                    "one direct feedback cannot serve them; use a layerwise rule or name it in skip="
                )
            else:
                self.shapes[name] = shapes.pop()  # pyright: ignore[reportArgumentType]  (None was named above)

    def hang(self, seed: int) -> None:
        """Draw every B, then hang the hooks: a failure while drawing leaves the model as it was."""
        wiring = Wiring(self.rule, seed, self.output)
        parts = {name: self._feedback(wiring, name) for name in self.layers}
        if parts and isinstance(self.family, Shared):
            self._share(parts, self.family, seed)
        self.model.__dict__["_falign"] = wiring  # not a module, not a buffer: nothing is registered on the root
        if self.rule.wiring == "direct":
            self.model.register_forward_pre_hook(wiring.start)
        for name, layer in self.layers.items():
            part = layer.feedback = parts[name]
            part.train(layer.training)
            if self.rule.wiring == "direct":
                layer.register_forward_pre_hook(part.cut_direct)
            else:
                layer.register_forward_pre_hook(part.cut_layerwise)
                layer.register_forward_hook(part.deliver_layerwise, prepend=True)  # before what others do to y
        if self.rule.wiring == "direct":
            self.model.register_forward_hook(wiring.deliver, always_call=True)  # also when the forward raises
        # The feedback is the same on every rank already: DDP need not broadcast it at every forward.
        own = [
            f"{name}.{key}"
            for name, part in self.model.named_modules(remove_duplicate=False)
            if isinstance(part, (Feedback, SharedSequence))
            for key, _ in part.named_buffers(recurse=False)
        ]
        setattr(self.model, DDP_IGNORED, [*getattr(self.model, DDP_IGNORED, ()), *own])

    def _feedback(self, wiring: Wiring, name: str) -> Feedback:
        layer, weight, (shape, channels) = self.layers[name], self.weights[name], self.shapes[name]
        kind = self.kinds[name]
        deviation = self._deviation(layer, kind, shape)

        def drawn() -> Tensor:
            if name in self.given:
                return self.given[name].detach()
            if isinstance(self.family, Shared):
                return torch.zeros(())
            return draw(self.family, shape, seed=wiring.seed, name=name, deviation=deviation)

        stored = self.rule.stored(drawn, deviation).to(weight.device, weight.dtype, copy=True)
        return Feedback(wiring, name, kind.name, channels, stored)

    def _deviation(self, layer: Layer, kind: Kind, shape: tuple[int, ...]) -> float:
        return self.scale / sqrt(shape[1] if self.rule.wiring == "direct" else kind.spread(layer))

    def _share(self, parts: dict[str, Feedback], shared: Shared, seed: int) -> None:
        sizes = {name: torch.Size(self.shapes[name][0]).numel() for name in parts}
        values = self.rule.stored(lambda: shared.sequence(seed, max(sizes.values())), 1.0)
        weight = next(iter(self.weights.values()))
        sequence = SharedSequence(values.to(weight.device, weight.dtype))
        for name, part in parts.items():
            layer, shape = self.layers[name], self.shapes[name][0]
            gain = self._deviation(layer, KINDS[part.kind], shape)
            part.share(sequence, shared.start(seed, name, sizes[name]), shape, gain)


def _direct_shape(x: tuple[int, ...], out: tuple[int, ...], channel_first: bool) -> tuple[tuple[int, int], int] | None:
    """(shape of B, axis of the shared channels or 0); None where x and the output do not have the batch first."""
    if channel_first and len(x) == len(out) > 2 and x[0] == out[0] and x[2:] == out[2:]:
        return (out[1], x[1]), 1
    if not channel_first and len(out) > 2 and x[:-1] == out[:-1]:
        return (out[-1], x[-1]), 0
    if len(x) == len(out) == 1:
        return (torch.Size(out).numel(), torch.Size(x).numel()), 0
    if not out or not x or x[0] != out[0]:
        return None
    return (torch.Size(out[1:]).numel(), torch.Size(x[1:]).numel()), 0
