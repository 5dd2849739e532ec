"""A conversion before it is carried out: which layers it reaches, the shapes of their feedback, and every problem."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from math import inf, log, sqrt
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from falign._attached import Feedback, FeedbackOfParameters, SharedSequence
from falign._guard import watch_optimizers
from falign._outputs import NESTED, Outputs, pick
from falign._preserve import forget_compiled_code
from falign._saved import SavedHooks, Site
from falign._survey import ByHand, Survey, call, detached, without_trace
from falign._validation import describe
from falign._wiring import DDP_IGNORED, SPARED, WIRING, End, Wiring, parts_of, wirings
from falign.feedback import Family, Normal, Shared, draw, family, faults_of, generator
from falign.layers import Layer, weight_of
from falign.rules import ALL_RULES, Rule

FeedbackChoice = str | Family | Mapping[str, Tensor] | None


class Plan:
    """A conversion before it is carried out: which layers, which shapes of B, and every problem.

    The steps of ``__init__`` have this order because each needs what those before it found: the rule, without which
    nothing is known; the survey of the modules, which runs nothing; the run on the example, only of a model whose
    layers have shapes and weights; the shapes of B, read off that run under a direct rule; scale and family last, as
    given tensors are compared with these shapes. Whatever would fail after a problem is left out, so that ``check``
    lists causes and not their consequences.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: str | Rule | type[Rule],
        feedback: FeedbackChoice,
        scale: float | None,
        skip: Iterable[str],
        example: Any,
        output: Outputs,
    ) -> None:
        self.model = model
        self.problems: list[str] = []
        self.layers: dict[str, Layer] = {}
        self.shapes: dict[str, dict[int, tuple[tuple[int, ...], int]]] = {}
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        self.ends: tuple[End, ...] = tuple(End(output=one) for one in outputs)
        self.skip: tuple[str, ...] = ()
        self.by_hand: dict[str, ByHand] = {}
        self.gains: dict[tuple[int, str], float] = {}
        chosen = self._rule(rule)
        self._refuse_wrapped()
        if chosen is None or self.problems:
            return
        self.rule = chosen
        if not isinstance(skip, (str, Collection, Iterator, type(None))) or isinstance(skip, (Tensor, range)):
            self.problems.append(f"skip is a {type(skip).__name__}, expected names of layers or parameters")
            return
        skip = (skip,) if isinstance(skip, str) else tuple(skip if skip is not None else ())
        if wrong := [name for name in skip if not isinstance(name, str)]:
            self.problems.append(f"skip holds {wrong[0]!r:.40}, expected names of layers or parameters")
            return
        self.skip = skip
        survey = self.survey = Survey(model, skip)
        if self.rule.wiring == "none":
            self.problems = [line for line in survey.problems if line.startswith("skip")]
            if feedback is not None or scale is not None:
                self.problems.append(f"rule {self.rule.name!r} has no feedback: pass neither feedback= nor scale=")
            return
        self.layers, self.kinds, self.problems = survey.layers, survey.kinds, survey.problems
        self.by_hand = survey.by_hand
        if survey.lazy:
            return  # a run would give the layers their shapes, behind the user's back
        if example is None:
            self.problems += survey.unclear
        if not (self.layers or self.by_hand or self.problems or survey.unclear):
            self.problems.append(
                f"nothing to convert: the model ({type(model).__name__}) has no nn.Linear or convolution outside skip"
            )
        something = self.layers or self.by_hand or survey.unclear
        result = survey.run(example) if example is not None and something else None
        self.weights = {name: weight_of(layer) for name, layer in self.layers.items()}
        if self.rule.wiring == "direct":
            self.problems += survey.unreached
        if self.rule.wiring == "direct" and not self.problems:
            if example is None:
                example, result = self._make_example()
                self.layers, self.kinds = self.survey.layers, self.survey.kinds
            self._direct_shapes(result, example)
        else:
            self.shapes = {name: {0: (tuple(weight.shape), 0)} for name, weight in self.weights.items()}
        self.by_hand = self.survey.by_hand
        by_hand = {name: getattr(one.owner, one.key).detach() for name, one in self.by_hand.items()}
        self.shapes |= {name: {0: (tuple(weight.shape), 0)} for name, weight in by_hand.items()}
        self.weights |= by_hand
        self.scale = self._scale(scale)
        if self.scale is None and self.rule.wiring == "direct" and example is not None and not self.problems:
            self.gains = self._gains(example)
        self.family, self.given = self._family(feedback)

    def rows(self) -> list[dict[str, Any]]:
        """List what the conversion does with each layer and parameter, as ``check`` shows it."""
        rows = []
        for name, shapes in self.shapes.items():
            given = tuple(shape for shape, _ in shapes.values()) if self.rule.draws else ((),)
            mechanism = "direct" if self.rule.wiring == "direct" else "cut and delivered"
            source = ("given" if name in self.given else str(self.family)) if self.rule.draws else "signs of W"
            rows.append(
                {
                    "name": name,
                    "kind": self.kinds[name].name if name in self.kinds else "parameter",
                    "mechanism": "saved tensor" if name in self.by_hand else mechanism,
                    "rule": self.rule.name,
                    "shapes": given,
                    "family": source,
                    "bytes": sum(torch.Size(shape).numel() for shape in given) * self.weights[name].element_size(),
                }
            )
        if isinstance(self.family, Shared) and rows:  # one sequence, as long as the largest needs
            largest = max(row["bytes"] for row in rows)
            rows = [{**row, "bytes": largest if row["bytes"] == largest else 0} for row in rows]
        return rows

    def _rule(self, rule: str | Rule | type[Rule]) -> Rule | None:
        if isinstance(rule, Rule) and hasattr(rule, "name"):
            return rule
        if isinstance(rule, str) and rule in ALL_RULES:
            return ALL_RULES[rule]()
        if isinstance(rule, type) and issubclass(rule, Rule) and hasattr(rule, "name"):
            try:
                return rule()
            except TypeError as error:
                self.problems.append(f"rule {rule.name!r} cannot be made without options ({error}): pass an instance")
                return None
        self.problems.append(
            f"unknown rule {describe(rule)}: choose one of {', '.join(ALL_RULES)}, or pass a falign.Rule"
        )
        return None

    def _refuse_wrapped(self) -> None:
        if not isinstance(self.model, nn.Module):
            self.problems.append(f"expected a torch.nn.Module, got {type(self.model).__name__}")
        elif converted := wirings(self.model):
            self.problems.append(
                f"the model, or a part of it, is converted already, to rule {converted[0].rule.name!r}: "
                "call falign.revert(model) first"
            )
            if WIRING in self.model.__dict__:
                self.problems += newcomers(self.model, converted[0].skip)
        elif type(self.model).__name__ in ("DistributedDataParallel", "DataParallel", "OptimizedModule") or isinstance(
            self.model, torch.jit.ScriptModule
        ):
            self.problems.append(
                f"the model is wrapped in {type(self.model).__name__}: convert the plain model first, then wrap it"
            )

    def _scale(self, scale: float | None) -> float | None:
        if scale is None:
            return None
        if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 < scale < inf:
            self.problems.append(f"scale is {describe(scale)}, expected a positive number")
            return None
        try:
            rounded = float(torch.tensor(float(scale), dtype=torch.float32, device="cpu"))
        except OverflowError:  # whole numbers and fractions have no bound
            rounded = inf
        if not 0 < rounded < inf:
            self.problems.append(f"scale is {describe(scale)}, which float32 cannot hold: expected a number near 1")
            return None
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
            if name not in self.weights:
                near = get_close_matches(str(name), self.weights, n=3) or list(self.weights)[:6]
                self.problems.append(f"feedback names {name!r}, which takes no feedback; layers: {', '.join(near)}")
            elif not isinstance(tensor, Tensor):
                self.problems.append(f"feedback of layer {name!r} is a {type(tensor).__name__}, expected a tensor")
            elif name in self.shapes and self.rule.draws and tuple(tensor.shape) != self._shape(name):
                self.problems.append(
                    f"feedback of layer {name!r} has shape {tuple(tensor.shape)}, expected {self._shape(name)}"
                )
            else:
                dtype = self.weights[name].dtype
                self.problems += [f"feedback of layer {name!r} {fault}" for fault in faults_of(tensor, dtype)]
        return dict(given)

    def _shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a layer's feedback from the first output that delivers to it."""
        return next(iter(self.shapes[name].values()))[0]

    def _make_example(self) -> tuple[Any, Any]:
        """Make an example for a model of linear layers, and its result; neither where the model does not run on it."""
        if not all(isinstance(layer, nn.Linear) for layer in self.layers.values()):
            return None, None
        first = next(iter(self.weights.values()))
        random = generator(0, "", "an example")
        values = torch.randn(64, first.shape[1], generator=random, device="cpu", dtype=torch.float32)
        example = values.to(first.device, first.dtype)
        trial = Survey(self.model, self.skip)
        result = trial.run(example)
        if trial.problems or trial.unreached:
            self.problems += trial.derived
            return None, None
        self.survey = trial
        return example, result

    def _direct_shapes(self, result: Any, example: Any) -> None:
        survey = self.survey
        if survey.watch is None:
            others = [name for name, layer in self.layers.items() if not isinstance(layer, nn.Linear)]
            if others:
                self.problems.append(
                    f"rule {self.rule.name!r} needs an example: the size of the input of {', '.join(others)} cannot "
                    "be read off the layer; pass example=x with a batch x"
                )
            if len(self.ends) > 1:
                self.problems.append("several outputs need an example: pass example=x with a batch x")
            outputs = list(self.weights.values())[-1].shape[0]
            self.shapes = {name: {0: ((outputs, weight.shape[1]), 0)} for name, weight in self.weights.items()}
            self.ends = tuple(replace(end, seen=False) for end in self.ends)
            return
        try:
            tensors = [pick(result, end.output) for end in self.ends]
        except TypeError as error:
            self.problems.append(str(error))
            return
        if any(tensor.is_nested for tensor in tensors):
            self.problems.append(NESTED)
            return
        doubled = survey.run_doubled(example)
        self.ends = tuple(self._end(end, tensor) for end, tensor in zip(self.ends, tensors, strict=True))
        for number, (end, tensor) in enumerate(zip(self.ends, tensors, strict=True)):
            self._batch_first(end, tuple(tensor.shape), doubled)
            for name in self.kinds if end.reached is None else sorted(end.reached, key=list(self.kinds).index):
                self._direct_shape(number, name, tuple(tensor.shape))

    def _end(self, end: End, tensor: Tensor) -> End:
        """Find where an output's error is taken, and which layers it reaches."""
        watch = self.survey.watch
        assert watch is not None
        reached = None
        if len(self.ends) > 1:
            reached = frozenset(name for name in watch.upstream(tensor) if name in self.kinds)
        # At the output of the last layer, if only operations without parameters follow it (a softmax): there the error
        # is that of the logits. A layer that ran twice, or behind which the shape changes, does not tell which of its
        # outputs that is.
        layers = {name.removeprefix("layer ") for name in watch.sources(tensor)}
        last = layers.pop() if len(layers) == 1 else ""
        single = last in watch.outputs and watch.order.count(last) == 1 and watch.outputs[last].shape == tensor.shape
        if not single or watch.outputs[last] is tensor or (reached is None and watch.order[-1] != last):
            last = ""
        return replace(end, layer=last or None, reached=reached)

    def _batch_first(self, end: End, shape: tuple[int, ...], doubled: Any) -> None:
        """Refuse outputs whose batch is not the first axis, or whose other axes grow with it."""
        if doubled is None or not shape:
            return
        try:
            after = tuple(pick(doubled, end.output).shape)
        except TypeError:
            return
        if len(after) == len(shape) and after != (2 * shape[0], *shape[1:]):
            self.problems.append(
                f"the model's output {shape} becomes {after} with twice the samples: a direct rule needs the batch as "
                "the first axis, and no other axis that grows with it; move the axis, or use a layerwise rule"
            )

    def _direct_shape(self, number: int, name: str, out: tuple[int, ...]) -> None:
        """Note the shape of the feedback from an output to a layer, or a problem."""
        calls, first = self.survey.shapes[name], self.kinds[name].channel_first
        shapes = {_direct_shape(x, out, first) for x in calls}
        if None in shapes:
            self.problems.append(
                f"layer {name!r} has input {calls[0]} and the model output {out}: a direct rule "
                "needs the batch first in both; name the layer in skip= or move the axis"
            )
        elif len(shapes) > 1:
            self.problems.append(
                f"layer {name!r} runs on inputs of different sizes ({', '.join(map(str, calls))}): "
                "one direct feedback cannot serve them; use a layerwise rule or name it in skip="
            )
        elif len(calls) > 1 and len(out) > 2 and len(calls[0]) < len(out) and len(calls) in out[1:]:
            self.problems.append(
                f"layer {name!r} runs {len(calls)} times, once for each position of the output {out}: a direct rule "
                "would deliver the errors of all positions to each; use a layerwise rule, or name it in skip="
            )
        else:
            self.shapes.setdefault(name, {})[number] = shapes.pop()  # pyright: ignore[reportArgumentType]

    def attach(self, seed: int) -> None:
        """Draw every B, then attach feedback and hooks to the layers: a failing draw leaves the model as it was.

        The order of the hooks matters: the root's check of new modules comes before everything else, the start of a run
        before the layers' hooks, each delivery before what other hooks do to a layer's output, and the end of a run
        after all of them.
        """
        wiring = Wiring(self.rule, seed, self.ends, self.skip, newcomers)
        layers = [name for name in self.layers if name in self.shapes]
        parts: dict[str, Feedback] = {}
        for name in layers:
            parts[name] = self._feedback(wiring, name, parts)
        for name in self.by_hand:
            parts[name] = self._feedback(wiring, name, parts)
        if parts and isinstance(self.family, Shared):
            self._share(parts, self.family, seed)
        self.model.__dict__[WIRING] = wiring  # not a module, not a buffer: nothing is registered on the root
        if not parts:
            return
        for layer in self.survey.spared:
            layer.__dict__[SPARED] = True  # so that compiled forwards, which survey nothing, know it from a newcomer
        if self.rule.wiring == "direct":
            self.model.register_forward_pre_hook(wiring.start)
        for name in layers:
            layer, part = self.layers[name], parts[name]
            layer.feedback = part
            part.train(layer.training)
            part.guard(layer)
            if self.rule.wiring == "direct":
                layer.register_forward_pre_hook(part.cut_direct)
                layer.register_forward_hook(part.deliver_direct, prepend=True)
            else:
                layer.register_forward_pre_hook(part.cut_layerwise)
                layer.register_forward_hook(part.deliver_layerwise, prepend=True)  # before what others do to y
        self._attach_by_hand(wiring, parts)
        if self.survey.watch is None:
            wiring.unseen = self.survey.weights()
            self.model.register_forward_hook(wiring.end_first_pass, always_call=True)
        for bag in self.model.modules():
            if isinstance(bag, nn.EmbeddingBag):
                bag.register_forward_pre_hook(wiring.no_weighted_bag, with_kwargs=True)
        self.model.register_forward_pre_hook(wiring.check_modules, prepend=True)
        if self.rule.wiring == "direct":
            self.model.register_forward_hook(wiring.finish, always_call=True)  # also when the forward raises
        if self.rule.learned:
            watch_optimizers()
        # The feedback is the same on every rank already: DDP need not broadcast it at every forward.
        buffers = [
            f"{name}.{key}"
            for name, part in self.model.named_modules(remove_duplicate=False)
            if isinstance(part, (Feedback, SharedSequence))
            for key, _ in (*part.named_buffers(recurse=False), *_followers(part))
        ]
        setattr(self.model, DDP_IGNORED, [*getattr(self.model, DDP_IGNORED, ()), *buffers])
        forget_compiled_code()  # made before there were hooks

    def _attach_by_hand(self, wiring: Wiring, parts: dict[str, Feedback]) -> None:
        """Attach the feedback of parameters that are multiplied by hand, and hooks to the modules that do so."""
        sites: dict[str, list[Site]] = {}
        for name, one in self.by_hand.items():
            part = parts[name]
            part.parameter, part.nodes = one.key, one.nodes
            if not parts_of(one.owner):
                one.owner._modules["feedback"] = FeedbackOfParameters()
            one.owner._modules["feedback"]._modules[one.key] = part  # type: ignore[union-attr]
            part.train(one.owner.training)
            part.guard(one.owner)
            for module in sorted(one.modules):
                expected, always = module in one.expected, module in one.always
                site = Site(owner=one.owner, key=one.key, part=part, expected=expected, always=always)
                sites.setdefault(module, []).append(site)
        for name, listed in sites.items():
            module, hooks = self.model.get_submodule(name), SavedHooks(wiring, listed)
            module.register_forward_pre_hook(hooks.enter, with_kwargs=True)
            module.register_forward_hook(hooks.leave, always_call=True)
        wiring.explained = self.survey.explained
        wiring.owners = [(one.owner, name) for name, one in self.by_hand.items()]

    def _feedback(self, wiring: Wiring, name: str, others: dict[str, Feedback]) -> Feedback:
        weight = self.weights[name]
        kind = self.kinds[name].name if name in self.kinds else "parameter"

        def initial(number: int) -> Tensor:
            shape, _ = self.shapes[name][number]
            deviation = self._deviation(number, name, shape)

            def drawn() -> Tensor:
                if name in self.given and number == first:
                    return self.given[name].detach()
                if isinstance(self.family, Shared):
                    return torch.zeros((), device="cpu")
                named = name if number == first else f"{name} from output {number}"
                return draw(self.family, shape, seed=wiring.seed, name=named, deviation=deviation)

            matrix = self.rule.init_feedback(drawn, deviation).to(weight.device, weight.dtype, copy=True)
            is_drawn = name not in self.given and not isinstance(self.family, Shared) and matrix.numel() > 0
            if is_drawn and not (torch.isfinite(matrix).all() and matrix.any()):
                raise ValueError(
                    f"feedback of layer {name!r}: {weight.dtype} cannot hold numbers of size {deviation:.3g}; give "
                    "another scale="
                )
            return matrix

        (first, (_, channels)), *further = self.shapes[name].items()
        if self.rule.learned:
            parameter = self._parameter(name)
            for other, part in others.items():  # one B a Parameter: a tied weight receives the sum of its gradients
                tied = parameter is not None and self._parameter(other) is parameter
                if tied and name not in self.given and self.weights[other].shape == weight.shape:
                    assert part.B is not None
                    twin = Feedback(wiring, name, kind, channels, part.B)
                    twin.sharers = part.sharers
                    twin.sharers.append(twin)
                    for sharer in twin.sharers:
                        sharer.follows = self._follows(parameter)
                    return twin
        part = Feedback(wiring, name, kind, channels, initial(first))
        part.follows = self.rule.learned and self._follows(self._parameter(name))
        part.first_end = first
        if name not in self.given:
            part.deviations = [self._deviation(number, name, at) for number, (at, _) in self.shapes[name].items()]
        for number, (_, axis) in further:
            part.others[number] = f"B{number}", axis
            part.register_buffer(f"B{number}", initial(number), persistent=False)
        return part

    def _parameter(self, name: str) -> nn.Parameter | None:
        """Give the parameter that is a layer's weight, or that is multiplied by hand; None of a weight that is made."""
        if name in self.by_hand:
            return self.by_hand[name].owner._parameters[self.by_hand[name].key]
        return self.layers[name]._parameters.get("weight")

    def _follows(self, parameter: nn.Parameter | None) -> bool:
        """Tell whether a parameter has a use whose gradient no delivery sees: by hand, or in a lookup."""
        if parameter is None:
            return False
        if any(self._parameter(name) is parameter for name in self.by_hand):
            return True
        layers = {id(layer) for layer in self.layers.values()}
        return any(
            other is parameter and id(module) not in layers
            for module in self.model.modules()
            for other in module._parameters.values()
        )

    def _deviation(self, number: int, name: str, shape: tuple[int, ...]) -> float:
        """Give the standard deviation of the entries of a layer's B: as asked for, or the default (docs/scales.md).

        By default an error keeps on its way the norm that it would keep under backpropagation at conversion.
        """
        direct = self.rule.wiring == "direct" and name not in self.by_hand
        fan_in = self.by_hand[name].fan_in if name in self.by_hand else self.kinds[name].fan_in(self.layers[name])
        layer_fan_in = max(fan_in, 1)
        fan_in = max(shape[1], 1) if direct else layer_fan_in
        if self.scale is not None:
            return self.scale / sqrt(fan_in)
        own_gain = float(self.weights[name].double().square().mean().sqrt()) * sqrt(layer_fan_in)  # rms(W) √fan_in
        if direct:
            return self.rule.size * _rounded(self.gains.get((number, name), 0.3 * own_gain), 2.0) / sqrt(fan_in)
        return self.rule.size * _rounded(own_gain, sqrt(2)) / sqrt(fan_in)

    def _gains(self, example: Any) -> dict[tuple[int, str], float]:
        """Measure {(number of the end, layer): |error that backpropagation hands to its input| / |error at the end|}.

        Of one random error, on the example; empty where the model does not run with gradients.
        """
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def note(name: str) -> Any:
            def before(layer: Layer, args: tuple) -> tuple:
                x = args[0] if args[0].requires_grad or not args[0].is_floating_point() else args[0].requires_grad_()
                inputs[name] = x.view_as(x)  # through it passes this layer's share of the error, and no other's
                return (inputs[name], *args[1:])

            return before

        def keep(name: str) -> Any:
            return lambda layer, args, y: outputs.update({name: y})

        handles = [layer.register_forward_pre_hook(note(name)) for name, layer in self.layers.items()]
        handles += [layer.register_forward_hook(keep(name)) for name, layer in self.layers.items()]
        gains: dict[tuple[int, str], float] = {}
        try:
            with without_trace(self.model, gradients=True):
                result = call(self.model, detached(example))
                for number, end in enumerate(self.ends):
                    at = pick(result, end.output) if end.layer is None else outputs[end.layer]
                    random = generator(0, "", "an error to measure by")
                    error = torch.randn(at.shape, generator=random, device="cpu", dtype=torch.float32)
                    error = error.to(at.device, at.dtype)
                    propagated = torch.autograd.grad(
                        at, list(inputs.values()), error, retain_graph=True, allow_unused=True
                    )
                    for name, error_here in zip(inputs, propagated, strict=True):
                        if error_here is not None:
                            gains[number, name] = float(error_here.double().norm() / error.double().norm())
        except Exception:  # a model without gradients, or one that runs only so: then the layers' own gains must do
            return {}
        finally:
            for handle in handles:
                handle.remove()
        return gains

    def _share(self, parts: dict[str, Feedback], shared: Shared, seed: int) -> None:
        sizes = {name: torch.Size(self._shape(name)).numel() for name in parts}
        values = self.rule.init_feedback(lambda: shared.sequence(seed, max(sizes.values())), 1.0)
        weight = next(iter(self.weights.values()))
        sequence = SharedSequence(values.to(weight.device, weight.dtype))
        for name, part in parts.items():
            shape = self._shape(name)
            gain = self._deviation(part.first_end, name, shape)
            part.share(sequence, shared.start(seed, name, sizes[name]), shape, gain)


def _direct_shape(x: tuple[int, ...], out: tuple[int, ...], channel_first: bool) -> tuple[tuple[int, int], int] | None:
    """Give (shape of B, axis of the shared channels or 0); None where x and the output do not have the batch first."""
    if channel_first and len(x) == len(out) > 2 and x[0] == out[0] and x[2:] == out[2:]:
        return (out[1], x[1]), 1
    if not channel_first and len(out) > 2 and x[:-1] == out[:-1]:
        return (out[-1], x[-1]), 0
    if len(x) == len(out) == 1:
        return (torch.Size(out).numel(), torch.Size(x).numel()), 0
    if not out or not x or x[0] != out[0]:
        return None
    return (torch.Size(out[1:]).numel(), torch.Size(x[1:]).numel()), 0


def _rounded(gain: float, step: float) -> float:
    """Round to PyTorch's own gain, 1/√3, times a whole power of ``step``; to that gain itself where there is none.

    Rounded, the number depends neither on the draw of the weights nor on the device or dtype that measured it: a
    network that is built anew, to go on from a checkpoint, gets the same B.
    """
    default = 3**-0.5
    return default * step ** round(log(gain / default, step)) if 0 < gain < inf else default


def _followers(part: nn.Module) -> list[tuple[str, Tensor]]:
    """List the learned B, by its name, that takes its weight's gradient: of that DDP has averaged it already."""
    return [("B", part.B)] if isinstance(part, Feedback) and part.follows and part.B is not None else []


def newcomers(model: nn.Module, skip: tuple[str, ...]) -> list[str]:
    """Name, in a sentence each, layers of a converted model that came after ``convert`` and do not take its rule."""
    survey = Survey(model, skip)
    problems = [line for line in survey.problems if not line.startswith("skip names")] + survey.unclear
    return [
        *problems,
        *(
            f"parameter {name!r} takes no feedback"
            for name, one in survey.by_hand.items()
            if one.key not in {part.parameter for part in parts_of(one.owner)}
        ),
        *[
            f"layer {name!r} ({type(layer).__name__}) takes no feedback"
            for name, layer in survey.layers.items()
            if "feedback" not in layer._modules
        ],
    ]
