"""A conversion that is carried out: every B is drawn, and feedback and hooks are attached to the layers."""

from collections.abc import Mapping
from functools import partial
from math import inf, log, sqrt

import torch
from torch import Tensor, nn

from falign._attached import Feedback, FeedbackOfParameters, SharedSequence
from falign._cuts import cut_modules, is_below
from falign._direct import Site as DirectSite
from falign._expand import expand
from falign._guard import watch_optimizers
from falign._memory import give_memories, is_memory
from falign._plan import Plan
from falign._preserve import forget_compiled_code
from falign._projector import Projection
from falign._saved import SavedHooks, Site
from falign._survey import Survey
from falign._wiring import DDP_IGNORED, SPARED, WIRING, Start, Wiring, parts_of
from falign.feedback import Shared, draw, generator
from falign.layers import Layer, features_out


class Conversion(Plan):
    """A plan that can be carried out, if it has no problems."""

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
        wiring.untrained, wiring.changes, wiring.projection = self.untrained, self.changes, self.projection
        for name in self.untrained:
            self.model.get_parameter(name).requires_grad_(False)
        if not parts:
            return
        if self.changes:
            give_memories(self.changes, self._places(parts), parts, self.weights)
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
        # The feedback is the same on every rank already: DDP need not broadcast it at every forward. Where batches move
        # it, all ranks take that of the first.
        buffers = [
            f"{name}.{key}"
            for name, part in self.model.named_modules(remove_duplicate=False)
            if isinstance(part, (Feedback, SharedSequence)) and not self.rule.observes
            for key, _ in (*part.named_buffers(recurse=False), *_followers(part))
            if not is_memory(key)
        ]
        setattr(self.model, DDP_IGNORED, [*getattr(self.model, DDP_IGNORED, ()), *buffers])
        forget_compiled_code()  # made before there were hooks

    def _places(self, parts: Mapping[str, Feedback]) -> dict[tuple[str, int], int]:
        """Map where what a transform remembers is kept, (layer, number of the output), to the features of the error.

        Every layer keeps that of its own error, or the last layer that an output delivers to that of the output's.
        """
        if self.direct is None:
            return {(name, part.first_end): features_out(self.layers[name]) for name, part in parts.items()}
        places: dict[tuple[str, int], int] = {}
        for number in range(len(self.ends)):
            names = [name for name in self.layers if name in parts and number in self.shapes[name]]
            names = [name for name in names if name not in self.direct.silent]
            if names:
                places[names[-1], number] = self.shapes[names[-1]][number][0][0]
        return places

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

            matrix = self.rule.init_feedback(drawn, deviation)
            if self.rule.factored and factors[number]:
                matrix = self.rule.learned_gradient(matrix.double().cpu(), matrix, *factors[number].values())
            matrix = matrix.to(weight.device, weight.dtype, copy=True)
            is_drawn = name not in self.given and not isinstance(self.family, Shared) and matrix.numel() > 0
            from_zero = self.rule.wiring == "direct" and not self.rule.draws
            if is_drawn and not (torch.isfinite(matrix).all() and (from_zero or matrix.any())):
                raise ValueError(
                    f"feedback of layer {name!r}: {weight.dtype} cannot hold numbers of size {deviation:.3g}; give "
                    "another scale="
                )
            return matrix

        (first, (_, route)), *further = self.shapes[name].items()
        factors = {
            number: self.rule.factors(
                shape, generator(wiring.seed, name if number == first else f"{name} from output {number}", "factors")
            )
            for number, (shape, _) in self.shapes[name].items()
        }
        if self.rule.learned and self.rule.wiring == "layerwise":
            parameter = self._parameter(name)
            for other, part in others.items():  # one B a Parameter: a tied weight receives the sum of its gradients
                tied = parameter is not None and self._parameter(other) is parameter
                if tied and name not in self.given and self.weights[other].shape == weight.shape:
                    assert part.B is not None
                    twin = Feedback(wiring, name, kind, route, part.B, factors[first], first, self._shape(name))
                    twin._buffers.update({key: part._buffers[key] for key in part.kept})
                    twin.sharers = part.sharers
                    twin.sharers.append(twin)
                    for sharer in twin.sharers:
                        sharer.follows = self._follows(parameter)
                    return twin
        part = Feedback(wiring, name, kind, route, initial(first), factors[first], first, self._shape(name))
        part.follows = self._follows(self._parameter(name))
        if name not in self.given:
            part.deviations = [self._deviation(number, name, at) for number, (at, _) in self.shapes[name].items()]
        for number, (_, other_route) in further:
            part.others[number] = f"B{number}", other_route
            part.keep_factors(number, factors[number], weight, self.shapes[name][number][0])
            if self.rule.learned:
                part.register_parameter(f"B{number}", nn.Parameter(initial(number)))
            else:
                part.register_buffer(f"B{number}", initial(number), persistent=self.rule.adapts)
        return part

    def _parameter(self, name: str) -> nn.Parameter | None:
        """Give the parameter that is a layer's weight, or that is multiplied by hand; None of a weight that is made."""
        if name in self.by_hand:
            return self.by_hand[name].owner._parameters[self.by_hand[name].key]
        return self.layers[name]._parameters.get("weight")

    def _follows(self, parameter: nn.Parameter | None) -> bool:
        """Tell whether a parameter has a use whose gradient no delivery sees: by hand, or in a lookup."""
        if parameter is None or not self.rule.learned or self.rule.wiring == "direct":
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
        if self.projection is not None:
            self._project(parts, self.projection, seed)
            return
        sizes = {name: torch.Size(self._shape(name)).numel() for name in parts}
        values = self.rule.init_feedback(lambda: shared.sequence(seed, max(sizes.values())), 1.0)
        weight = next(iter(self.weights.values()))
        sequence = SharedSequence(values.to(weight.device, weight.dtype))
        for name, part in parts.items():
            shape = self._shape(name)
            gain = self._deviation(part.first_end, name, shape)
            part.share(sequence, shared.start(seed, name, sizes[name]), shape, gain)

    def _project(self, parts: dict[str, Feedback], projection: Projection, seed: int) -> None:
        """Let every layer read its B from columns of what a projector does."""
        weight = next(iter(self.weights.values()))
        sequence = SharedSequence(projection.matrix.to(weight.device, weight.dtype))
        for name, part in parts.items():
            shape = self._shape(name)
            gain = self._deviation(part.first_end, name, shape) / projection.size
            part.share(sequence, projection.start(seed, name, shape[1]), shape, gain)


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
