"""A conversion before it is carried out: which layers it reaches, the shapes of their feedback, and every problem."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from math import inf, log, sqrt
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from falign._attached import Feedback, FeedbackOfParameters, SharedSequence
from falign._cuts import Cuts, cut_modules, cut_words, is_below
from falign._delivery import Route
from falign._direct import DirectPlan
from falign._direct import Site as DirectSite
from falign._expand import contract, expand, expandable, refusal
from falign._guard import shared_weight, watch_optimizers
from falign._outputs import Outputs
from falign._preserve import forget_compiled_code
from falign._saved import SavedHooks, Site
from falign._survey import ByHand, Survey
from falign._true_errors import measure_gains
from falign._validation import describe
from falign._wiring import DDP_IGNORED, SPARED, WIRING, End, Start, Wiring, parts_of, wirings
from falign.feedback import Family, Normal, Shared, draw, family, faults_of
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
        cut: Cuts | None = None,
        error_at: str | tuple[str, ...] | list[str] | None = None,
    ) -> None:
        self.model = model
        self.problems: list[str] = []
        self.layers: dict[str, Layer] = {}
        self.shapes: dict[str, dict[int, tuple[tuple[int, ...], Route]]] = {}
        self.expanded: list[tuple[nn.Module, dict[str, nn.Module]]] = []
        self.direct: DirectPlan | None = None
        self.enclosed: dict[str, str] = {}
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        self.ends: tuple[End, ...] = tuple(End(output=one) for one in outputs)
        self.skip: tuple[str, ...] = ()
        self.by_hand: dict[str, ByHand] = {}
        self.gains: dict[tuple[int, str], float] = {}
        self.family, self.given = Normal(), {}
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
        self.words = ("layers",)
        if self.rule.wiring != "direct":
            given = [f"{name}=" for name, value in (("cut", cut), ("error_at", error_at)) if value is not None]
            if given:
                self.problems.append(
                    f"{' and '.join(given)} is for direct rules, rule {self.rule.name!r} is none: leave it out"
                )
                return
        elif cut is not None:
            self.words, self.problems = cut_words(cut)
        if self.rule.wiring == "direct":
            self._start_errors_at(error_at, output)
        if self.problems:
            return
        try:
            if self.rule.wiring == "direct" and "layers" in self.words:
                self._expand()
            self._look(feedback, scale, example)
        finally:
            self.expanded = contract(model) if isinstance(model, nn.Module) else []

    def _start_errors_at(self, error_at: Any, output: Outputs) -> None:
        """Let errors begin at the outputs of modules, beside those at outputs of the model that are named as well."""
        names = () if error_at is None else (error_at,) if isinstance(error_at, str) else tuple(error_at)
        known = [name for name, _ in self.model.named_modules() if name]
        for name in names:
            if name not in known:
                near = get_close_matches(str(name), known, n=3) or known[:6]
                self.problems.append(
                    f"error_at names {describe(name)}, which the model does not have; near it: {', '.join(near)}"
                )
        if names:
            starts = tuple(End(layer=name, picked=False) for name in names)
            self.ends = starts if output is None else (*starts, *self.ends)

    def _expand(self) -> None:
        """Turn attention and recurrent modules into layers, until everything is known."""
        for name, module in expandable(self.model, self.skip):
            if why := refusal(module):
                if name not in cut_modules(self.model, self.words)[0]:
                    self.problems.append(f"layer {name or '(root)'!r} ({type(module).__name__}) {why}")
            else:
                expand(module)
                self.expanded.append((module, {}))

    def _look(self, feedback: FeedbackChoice, scale: float | None, example: Any) -> None:
        """Survey the model, run it on the example, and find what the feedback has to be."""
        model, skip, earlier = self.model, self.skip, self.problems
        survey = self.survey = Survey(model, skip)
        if self.rule.wiring == "none":
            self.problems = [line for line in survey.problems if line.startswith("skip")]
            if feedback is not None or scale is not None:
                self.problems.append(f"rule {self.rule.name!r} has no feedback: pass neither feedback= nor scale=")
            return
        self.layers, self.kinds, self.problems = survey.layers, survey.kinds, [*earlier, *survey.problems]
        self.by_hand = survey.by_hand
        if survey.lazy:
            return  # a run would give the layers their shapes, behind the user's back
        if self.rule.wiring == "direct":
            self._look_direct(example)
        else:
            self._look_layerwise(example)
        by_hand = {name: getattr(one.owner, one.key).detach() for name, one in self.by_hand.items()}
        self.shapes |= {name: {0: (tuple(weight.shape), Route())} for name, weight in by_hand.items()}
        self.weights |= by_hand
        self.scale = self._scale(scale)
        if self.scale is None and self.direct is not None and not self.problems:
            self.gains = measure_gains(self.direct)
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
                    "why": "",
                    "rule": self.rule.name,
                    "shapes": given,
                    "family": source,
                    "bytes": sum(torch.Size(shape).numel() for shape in given) * self.weights[name].element_size(),
                }
            )
            site = None if self.direct is None else self.direct.sites.get(name)
            if site is not None and site.kind is None:
                rows[-1]["kind"] = "module"
                if site.owner in self.enclosed:
                    rows[-1] |= {"mechanism": "cut as a whole", "why": self.enclosed[site.owner]}
        if isinstance(self.family, Shared) and rows:  # one sequence, as long as the largest needs
            largest = max(row["bytes"] for row in rows)
            rows = [{**row, "bytes": largest if row["bytes"] == largest else 0} for row in rows]
        return rows

    def _look_layerwise(self, example: Any) -> None:
        survey = self.survey
        if example is None:
            self.problems += survey.unclear
        something = self.layers or self.by_hand or survey.unclear
        self._refuse_nothing()
        if example is not None and something:
            before = len(survey.problems)
            survey.run(example)
            self.problems += [*survey.problems[before:], *(one.sentence for one in survey.derived.values())]
        self.weights = {name: weight_of(layer) for name, layer in self.layers.items()}
        self.by_hand = survey.by_hand
        self.shapes = {name: {0: (tuple(weight.shape), Route())} for name, weight in self.weights.items()}

    def _refuse_nothing(self) -> None:
        if not (self.layers or self.by_hand or self.problems or self.survey.unclear):
            self.problems.append(
                f"nothing to convert: the model ({type(self.model).__name__}) has no nn.Linear or convolution outside "
                "skip"
            )

    def _look_direct(self, example: Any) -> None:
        """Find what a direct rule cuts, and take that over."""
        direct = DirectPlan(self.model, self.rule, self.survey, self.ends, self.words, self.skip, bool(self.expanded))
        if "layers" not in self.words:
            cut_layers = tuple(f"layer {name!r}" for name in direct.sites)
            self.problems = [line for line in self.problems if line.startswith(("skip", *cut_layers))]
        self.layers = direct.layers
        self.problems += direct.problems
        if not direct.modules:
            self._refuse_nothing()
        if not self.problems:
            direct.look(example)
            self.problems += direct.problems
        self.survey, self.layers, self.kinds, self.weights = direct.survey, direct.layers, direct.kinds, direct.weights
        self.by_hand, self.shapes, self.ends = direct.by_hand, dict(direct.shapes), direct.ends
        self.direct, self.enclosed = direct, direct.enclosed

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
                self.problems += converted[0].newcomers(self.model, converted[0].skip)
        elif (shared := shared_weight(self.model)) is not None:
            self.problems.append(shared)
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

    def attach(self, seed: int) -> None:
        """Draw every B, then attach feedback and hooks to the layers: a failing draw leaves the model as it was.

        The order of the hooks matters: the root's check of new modules comes before everything else, the start of a run
        before the layers' hooks, each delivery before what other hooks do to a layer's output, and the end of a run
        after all of them.
        """
        wiring = Wiring(self.rule, seed, self.ends, self.skip, partial(newcomers, words=self.words))
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
        inside = {id(part) for name in self.enclosed for part in self.model.get_submodule(name).modules()}
        self.expanded = [each for each in self.expanded if id(each[0]) not in inside]
        for module, children in self.expanded:
            expand(module, children)
        sites = {} if self.direct is None else self.direct.sites
        silent = set() if self.direct is None else self.direct.silent
        spared = [layer for name, layer in self.survey.layers.items() if name not in parts]
        for layer in () if self.direct is None else self.direct.dormant.values():
            layer.register_forward_pre_hook(wiring.refuse_unreached)
        for layer in (*self.survey.spared, *spared):
            layer.__dict__[SPARED] = True  # so that compiled forwards, which survey nothing, know it from a newcomer
        if self.rule.wiring == "direct":
            self.model.register_forward_pre_hook(wiring.start)
        for name in layers:
            layer, part = self.layers[name], parts[name]
            if name in sites and sites[name].kind is None:
                continue
            layer.feedback = part
            part.train(layer.training)
            part.guard(layer)
            if self.rule.wiring == "direct":
                part.silent = name in silent
                if part.silent and part.B is not None:
                    part.B.zero_()
                layer.register_forward_pre_hook(part.cut_direct)
                layer.register_forward_hook(part.deliver_direct, prepend=True)
            else:
                layer.register_forward_pre_hook(part.cut_layerwise)
                layer.register_forward_hook(part.deliver_layerwise, prepend=True)  # before what others do to y
        for name, site in sites.items():  # when layers have theirs, with which it may share a place
            if name in parts and site.kind is None:
                _keep(parts[name], site, parts)
        for number, end in enumerate(self.ends):
            if end.layer is not None and (end.layer not in parts or parts[end.layer].path):
                start = Start(wiring, number)
                self.model.get_submodule(end.layer).register_forward_hook(start.deliver, prepend=True)
        if self.rule.wiring == "direct":
            wiring.free = self._free(parts)
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
        wiring.explained = (*self.survey.explained, *self.enclosed)
        wiring.owners = [(one.owner, name) for name, one in self.by_hand.items()]

    def _free(self, parts: Mapping[str, Feedback]) -> frozenset[str]:
        """Name the parameters through which a direct rule lets errors pass: inside what it cuts, and behind its start.

        Where it cuts all layers, those of the model outside of both are not among them.
        """
        cut = {
            id(parameter)
            for name, part in parts.items()
            if name in self.kinds
            for parameter in self.layers[name].parameters()
        }
        cut |= {id(self._parameter(name)) for name in self.by_hand}
        for module, _ in self.expanded:
            cut |= {id(parameter) for parameter in module.parameters(recurse=False)}
        direct = self.direct
        assert direct is not None
        inside = (direct.named | direct.enclosed.keys()) - self.kinds.keys()
        everywhere = "layers" not in self.words
        return frozenset(
            name
            for name, parameter in self.model.named_parameters()
            if (id(parameter) not in cut and (everywhere or is_below(name, *inside))) or is_below(name, *direct.behind)
        )

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

        (first, (_, route)), *further = self.shapes[name].items()
        if self.rule.learned:
            parameter = self._parameter(name)
            for other, part in others.items():  # one B a Parameter: a tied weight receives the sum of its gradients
                tied = parameter is not None and self._parameter(other) is parameter
                if tied and name not in self.given and self.weights[other].shape == weight.shape:
                    assert part.B is not None
                    twin = Feedback(wiring, name, kind, route, part.B)
                    twin.sharers = part.sharers
                    twin.sharers.append(twin)
                    for sharer in twin.sharers:
                        sharer.follows = self._follows(parameter)
                    return twin
        part = Feedback(wiring, name, kind, route, initial(first))
        part.follows = self.rule.learned and self._follows(self._parameter(name))
        part.first_end = first
        if name not in self.given:
            part.deviations = [self._deviation(number, name, at) for number, (at, _) in self.shapes[name].items()]
        for number, (_, other_route) in further:
            part.others[number] = f"B{number}", other_route
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
        layer_fan_in = 1.0
        if name in self.by_hand:
            layer_fan_in = max(self.by_hand[name].fan_in, 1)
        elif name in self.kinds:
            layer_fan_in = max(self.kinds[name].fan_in(self.layers[name]), 1)
        fan_in = max(shape[1], 1) if direct else layer_fan_in
        if self.scale is not None:
            return self.scale / sqrt(fan_in)
        own_gain = 3**-0.5
        if name in self.kinds or name in self.by_hand:
            own_gain = float(self.weights[name].double().square().mean().sqrt()) * sqrt(layer_fan_in)  # rms(W) √fan_in
        if direct:
            return self.rule.size * _rounded(self.gains.get((number, name), 0.3 * own_gain), 2.0) / sqrt(fan_in)
        return self.rule.size * _rounded(own_gain, sqrt(2)) / sqrt(fan_in)

    def _share(self, parts: dict[str, Feedback], shared: Shared, seed: int) -> None:
        sizes = {name: torch.Size(self._shape(name)).numel() for name in parts}
        values = self.rule.init_feedback(lambda: shared.sequence(seed, max(sizes.values())), 1.0)
        weight = next(iter(self.weights.values()))
        sequence = SharedSequence(values.to(weight.device, weight.dtype))
        for name, part in parts.items():
            shape = self._shape(name)
            gain = self._deviation(part.first_end, name, shape)
            part.share(sequence, shared.start(seed, name, sizes[name]), shape, gain)


def _rounded(gain: float, step: float) -> float:
    """Round to PyTorch's own gain, 1/√3, times a whole power of ``step``; to that gain itself where there is none.

    Rounded, the number depends neither on the draw of the weights nor on the device or dtype that measured it: a
    network that is built anew, to go on from a checkpoint, gets the same B.
    """
    default = 3**-0.5
    return default * step ** round(log(gain / default, step)) if 0 < gain < inf else default


def _followers(part: nn.Module) -> list[tuple[str, Tensor]]:
    """List the learned B, by its name, that takes its weight's gradient: DDP averages that (``AveragedGradients``)."""
    return [("B", part.B)] if isinstance(part, Feedback) and part.follows and part.B is not None else []


def newcomers(model: nn.Module, skip: tuple[str, ...], words: tuple[str, ...] = ("layers",)) -> list[str]:
    """Name, in a sentence each, what came into a converted model after ``convert`` and does not take its rule."""
    problems: list[str] = []
    layers: dict[str, Layer] = {}
    if "layers" in words:
        survey = Survey(model, skip)
        layers = survey.layers
        problems += [line for line in survey.problems if not line.startswith("skip names")] + survey.unclear
        problems += [
            f"parameter {name!r} takes no feedback"
            for name, one in survey.by_hand.items()
            if one.key not in {part.parameter for part in parts_of(one.owner)}
        ]
    layers = {**layers, **cut_modules(model, words)[0]}
    return problems + [
        f"layer {name!r} ({type(layer).__name__}) takes no feedback"
        for name, layer in layers.items()
        if "feedback" not in layer._modules and SPARED not in layer.__dict__ and not _is_cut(layer)
    ]


def _is_cut(module: nn.Module) -> bool:
    return any(isinstance(getattr(hook, "__self__", None), Feedback) for hook in module._forward_pre_hooks.values())


def _keep(part: Feedback, site: DirectSite, parts: Mapping[str, Feedback]) -> None:
    """Keep the feedback of a module that is cut as a whole, and hang its hook on the first of them.

    It is the module's ``feedback``, and that of a further argument within that one. A container that runs its children
    one by one would run it as one of them: there, the first module inside that is none keeps it.
    """
    part.path = site.path
    first = parts.get(site.owner)
    if first is not None and first is not part:
        part.slot, part.levels = site.path, first.levels
        first.further.append(part)
    host = site.module
    while isinstance(host, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and len(host):
        host = next(iter(host.children()))
        part.levels += first is None or first is part
    if "feedback" not in host._modules:
        host.add_module("feedback", FeedbackOfParameters())
    host.get_submodule("feedback").add_module(f"cut {part.levels} {site.path}".replace(".", "_"), part)
    part.train(site.module.training)
    if first is None or first is part:
        site.module.register_forward_pre_hook(part.cut_module, with_kwargs=True)
