"""Hang a rule on a model, look at it, take it off."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from falign.feedback import Family, Normal, Shared, draw, family
from falign.layers import KINDS, Kind, kind_of
from falign.rules import ALL_RULES, Rule
from falign.survey import Survey
from falign.wiring import Feedback, Output, SharedSequence, Wiring, pick

FeedbackChoice = str | Family | Mapping[str, Tensor] | None


class ConversionError(ValueError):
    """A model, or what was asked of it, does not admit a rule; the message lists every reason."""


def convert(
    model: nn.Module,
    rule: str | Rule = "fa",
    *,
    seed: int = 0,
    feedback: FeedbackChoice = None,
    scale: float | None = None,
    skip: Iterable[str] = (),
    example: Any = None,
    output: Output = None,
) -> nn.Module:
    """Make a model learn by a rule, in place: from now on ``loss.backward()`` delivers errors without weight transport.

    Nothing else in a training loop changes. Layerwise rules carry the error at a layer's output (..., out) to its
    input (..., in) by the layer's own linear map, transposed, with B (of the weight's shape) in place of W. Direct
    rules carry e, the gradient at the network's output (batch, outputs), batch reduction included, as
    ``(e @ B).reshape(x.shape)`` to the input x of every layer, B (outputs, elements of one sample of x); where output
    and x share their position axes (sequence models), position by position with B (outputs, features). The last layer
    always has its true gradient.

    Args:
        model: any module of linear maps (``nn.Linear``, convolutions, transposed convolutions, embeddings) and of
            operations without weights or with elementwise ones. Convert before ``torch.compile``, DDP and, for
            learned feedback, before the optimizer is made.
        rule: a name (bp, fa, dfa, usf, frsf, brsf, drtp, kp, adafa) or a ``Rule``.
        seed: of the feedback; B is a function of (seed, layer name, family) alone.
        feedback: a family by name ("normal", "uniform", "orthogonal", "low-rank(8)", "sparse(1)", "shared"), a
            callable ((rows, columns), generator) -> tensor of entries of variance one, or {layer name: B}, used as
            it is; layers that the dict does not name are drawn from the normal family. Default: normal.
        scale: B's entries have variance scale²/spread, spread the number of inputs to which one element of the error
            is carried, so that E|error carried|² = scale²·|error|². Default: the rule's, chosen by measurement.
        skip: names of layers, or of modules with all inside, that keep backpropagation.
        example: an input of the model (a tuple: positional arguments, a dict: keyword arguments); one forward without
            gradients then finds layers that never run and weights used outside their layer. Direct rules read the
            shapes off it and need it unless all layers are ``nn.Linear``.
        output: for direct rules, which tensor carries the error where the model returns a structure: a key, an index,
            or a function of what the model returns.

    Returns:
        The model.

    Raises:
        ConversionError: with everything that stands in the way, as ``check`` lists it.
    """
    plan = _Plan(model, rule, feedback, scale, skip, example, output)
    if plan.problems:
        raise ConversionError("the model cannot be converted:\n" + "\n".join(f"- {line}" for line in plan.problems))
    plan.hang(seed)
    return model


def check(
    model: nn.Module,
    rule: str | Rule = "fa",
    *,
    feedback: FeedbackChoice = None,
    scale: float | None = None,
    skip: Iterable[str] = (),
    example: Any = None,
    output: Output = None,
) -> list[str]:
    """Everything that would keep ``convert`` with the same arguments from converting the model; empty when fine."""
    return _Plan(model, rule, feedback, scale, skip, example, output).problems


class _Plan:
    """A conversion before it is carried out: which layers, which shapes, which problems."""

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
        self.layers: dict[str, nn.Module] = {}
        self.shapes: dict[str, tuple[tuple[int, ...], int]] = {}
        self.rule = self._rule(rule)
        self._refuse_wrapped()
        if self.rule is None or self.problems:
            return
        if isinstance(skip, str):
            skip = (skip,)
        survey = Survey(model, skip)
        if self.rule.wiring == "none":
            self.problems = [line for line in survey.problems if line.startswith("skip")]
            return
        self.layers, self.problems = survey.layers, survey.problems
        if not self.layers and not self.problems:
            self.problems.append(
                f"nothing to convert: the model ({type(model).__name__}) has no nn.Linear or convolution outside skip"
            )
        result = survey.run(example) if example is not None and self.layers else None
        if self.rule.wiring == "direct" and not self.problems:
            self._direct_shapes(survey, result)
        else:
            self.shapes = {name: (tuple(layer.weight.shape), 0) for name, layer in self.layers.items()}
        self.scale = self._scale(scale)
        self.family, self.given = self._family(feedback)

    def _rule(self, rule: str | Rule) -> Rule | None:
        if isinstance(rule, Rule):
            return rule
        if isinstance(rule, str) and rule in ALL_RULES:
            return ALL_RULES[rule]()
        if isinstance(rule, type) and issubclass(rule, Rule):
            return rule()
        self.problems.append(f"unknown rule {rule!r}: choose one of {', '.join(ALL_RULES)}, or pass a falign.Rule")
        return None

    def _refuse_wrapped(self) -> None:
        if not isinstance(self.model, nn.Module):
            self.problems.append(f"expected a torch.nn.Module, got {type(self.model).__name__}")
        elif converted := _wirings(self.model):
            self.problems.append(
                f"the model is converted already, to rule {converted[0].rule.name!r}: call falign.revert(model) first"
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
        if isinstance(feedback, Mapping):
            return Normal(), self._tensors(feedback)
        if not self.rule.draws:
            self.problems.append(f"rule {self.rule.name!r} makes its feedback from the weights: pass no feedback=")
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
            self.problems.append(f"rule {self.rule.name!r} changes each layer's feedback: the shared family cannot serve it")
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
        if not self.rule.draws:
            self.problems.append(f"rule {self.rule.name!r} makes its feedback from the weights: pass no feedback=")
        return dict(given)

    def _direct_shapes(self, survey: Survey, result: Any) -> None:
        if not survey.shapes:
            others = [name for name, layer in self.layers.items() if not isinstance(layer, nn.Linear)]
            if others:
                self.problems.append(
                    f"rule {self.rule.name!r} needs an example: the size of the input of {', '.join(others)} cannot "
                    "be read off the layer; pass example=x with a batch x"
                )
            outputs = list(self.layers.values())[-1].weight.shape[0]
            self.shapes = {name: ((outputs, layer.weight.shape[1]), 0) for name, layer in self.layers.items()}
            return
        try:
            out = tuple(pick(result, self.output).shape)
        except TypeError as error:
            self.problems.append(str(error))
            return
        for name, layer in self.layers.items():
            kind = kind_of(layer)
            shapes = {_direct_shape(x, out, kind) for x in survey.shapes[name]}
            if None in shapes:
                self.problems.append(
                    f"layer {name!r} has input {survey.shapes[name][0]} and the model output {out}: a direct rule needs "
                    "the batch first in both; name the layer in skip= or move the axis"
                )
            elif len(shapes) > 1:
                self.problems.append(
                    f"layer {name!r} runs on inputs of different sizes ({', '.join(map(str, survey.shapes[name]))}): one "
                    "direct feedback cannot serve them; use a layerwise rule or name it in skip="
                )
            else:
                (self.shapes[name],) = shapes

    def hang(self, seed: int) -> None:
        """Draw every B, then hang the hooks: a failure while drawing leaves the model as it was."""
        wiring = Wiring(self.rule, seed, self.output)
        parts = {name: self._feedback(wiring, name) for name in self.layers}
        if isinstance(getattr(self, "family", None), Shared):
            self._share(parts, seed)
        self.model._falign = wiring
        if self.rule.wiring == "direct":
            self.model.register_forward_pre_hook(wiring.start)
        for name, layer in self.layers.items():
            part = layer.feedback = parts[name]
            part.train(layer.training)
            if self.rule.wiring == "direct":
                layer.register_forward_pre_hook(part.cut_direct)
            else:
                layer.register_forward_pre_hook(part.cut_layerwise)
                layer.register_forward_hook(part.deliver_layerwise)
        if self.rule.wiring == "direct":
            self.model.register_forward_hook(wiring.deliver)
        # The feedback is the same on every rank already: DDP need not broadcast it at every forward.
        own = [name for name, _ in self.model.named_buffers(remove_duplicate=False) if "feedback" in name.split(".")]
        self.model._ddp_params_and_buffers_to_ignore = [*getattr(self.model, _IGNORED, ()), *own]

    def _feedback(self, wiring: Wiring, name: str) -> Feedback:
        layer, (shape, channels) = self.layers[name], self.shapes[name]
        kind = kind_of(layer)
        deviation = self._deviation(layer, kind, shape)

        def drawn() -> Tensor:
            if name in self.given:
                return self.given[name].detach()
            if isinstance(self.family, Shared):
                return torch.zeros(())
            return draw(self.family, shape, seed=wiring.seed, name=name, deviation=deviation)

        stored = self.rule.stored(drawn, deviation).to(layer.weight.device, layer.weight.dtype, copy=True)
        return Feedback(wiring, name, kind.name, channels, stored)

    def _deviation(self, layer: nn.Module, kind: Kind, shape: tuple[int, ...]) -> float:
        return self.scale / sqrt(shape[1] if self.rule.wiring == "direct" else kind.spread(layer))

    def _share(self, parts: dict[str, Feedback], seed: int) -> None:
        sizes = {name: torch.Size(self.shapes[name][0]).numel() for name in parts}
        values = self.rule.stored(lambda: self.family.sequence(seed, max(sizes.values())), 1.0)
        weight = next(iter(self.layers.values())).weight
        sequence = SharedSequence(values.to(weight.device, weight.dtype))
        for name, part in parts.items():
            layer, shape = self.layers[name], self.shapes[name][0]
            gain = self._deviation(layer, KINDS[part.kind], shape)
            part.share(sequence, self.family.start(seed, name, sizes[name]), shape, gain)


_IGNORED = "_ddp_params_and_buffers_to_ignore"


def _direct_shape(x: tuple[int, ...], out: tuple[int, ...], kind: Kind) -> tuple[tuple[int, int], int] | None:
    """(shape of B, axis of the shared channels or 0); None where x and the output do not have the batch first."""
    if kind.channel_first and len(x) == len(out) > 2 and x[0] == out[0] and x[2:] == out[2:]:
        return (out[1], x[1]), 1
    if not kind.channel_first and len(out) > 2 and x[:-1] == out[:-1]:
        return (out[-1], x[-1]), 0
    if len(x) == len(out) == 1:
        return (out[0], x[0]), 0
    if not out or not x or x[0] != out[0]:
        return None
    return (torch.Size(out[1:]).numel(), torch.Size(x[1:]).numel()), 0


def _wirings(model: nn.Module) -> list[Wiring]:
    return [wiring for module in model.modules() if (wiring := module.__dict__.get("_falign")) is not None]


def _converted(model: nn.Module) -> list[Wiring]:
    wirings = _wirings(model)
    if not wirings:
        raise ValueError(f"the model ({type(model).__name__}) is not converted: call falign.convert(model, rule) first")
    return wirings


def _feedbacks(model: nn.Module) -> dict[str, Feedback]:
    _converted(model)
    return {part.name: part for part in model.modules() if isinstance(part, Feedback)}


def revert(model: nn.Module) -> nn.Module:
    """Take the rule off: the plain network again, with the weights as they are.

    Raises:
        ValueError: the model is not converted.
    """
    _converted(model)
    for module in list(model.modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), (Feedback, Wiring))]:
                del hooks[key]
        if isinstance(getattr(module, "feedback", None), Feedback):
            del module.feedback
        if module.__dict__.pop("_falign", None) is not None and hasattr(module, _IGNORED):
            kept = [name for name in getattr(module, _IGNORED) if "feedback" not in name.split(".")]
            setattr(module, _IGNORED, kept)
    return model


@contextmanager
def backprop(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context forward passes of the model are backpropagated truly, on the same weights.

    What counts is where the forward runs: a loss of a forward from within has the true gradient wherever its
    ``backward`` is called. Feedback neither learns nor draws.

    Raises:
        ValueError: the model is not converted.
    """
    wirings = _converted(model)
    before = [wiring.on for wiring in wirings]
    for wiring in wirings:
        wiring.on = False
    try:
        yield model
    finally:
        for wiring, on in zip(wirings, before, strict=True):
            wiring.on = on


@contextmanager
def targets(model: nn.Module, target: Tensor) -> Iterator[nn.Module]:
    """Within this context forward passes of the model know their targets; rules that need none take no notice.

    Args:
        model: a converted model.
        target: class indices, of the output's shape without its classes, or floating-point targets in its shape.

    Raises:
        ValueError: the model is not converted.
    """
    wirings = _converted(model)
    before = [wiring.target for wiring in wirings]
    for wiring in wirings:
        wiring.target = target
    try:
        yield model
    finally:
        for wiring, old in zip(wirings, before, strict=True):
            wiring.target = old


def feedback_state(model: nn.Module) -> dict[str, Tensor]:
    """{layer name: B} of a converted model, as copies; further state of a rule is under "layer name.key".

    For random signs B is the magnitude |B₀|, for uniform signs the number c.

    Raises:
        ValueError: the model is not converted.
    """
    state: dict[str, Tensor] = {}
    for name, part in _feedbacks(model).items():
        state[name] = (part.matrix.detach() * part.gain).clone()
        for key in part.wiring.rule.state():
            state[f"{name}.{key}"] = getattr(part, key).detach().clone()
    return state


def load_feedback_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put feedback back that ``feedback_state`` gave, of this model or of one of the same layers and rule.

    Args:
        model: a converted model.
        state: every B of the model, by layer name. Under the shared family each layer then holds its own copy.

    Raises:
        ValueError: names, shapes or numbers do not fit; all of them are listed, and nothing was loaded.
    """
    here = feedback_state(model)
    problems = [f"layer {name!r} has feedback here, but not in the state" for name in here if name not in state]
    problems += [f"the state has {name!r}, which takes no feedback here" for name in state if name not in here]
    for name in here.keys() & state.keys():
        if tuple(state[name].shape) != tuple(here[name].shape):
            problems.append(f"{name!r} has shape {tuple(state[name].shape)}, expected {tuple(here[name].shape)}")
        elif state[name].is_floating_point() and not torch.isfinite(state[name]).all():
            problems.append(f"{name!r} holds numbers that are not finite")
    if problems:
        listed = "\n".join(f"- {line}" for line in sorted(problems))
        raise ValueError(f"this is the feedback of another network, nothing was loaded:\n{listed}")
    with torch.no_grad():
        for name, part in _feedbacks(model).items():
            if part.B is None:
                part.own(here[name])
            part.matrix.copy_(state[name])
            for key in part.wiring.rule.state():
                getattr(part, key).copy_(state[f"{name}.{key}"])
