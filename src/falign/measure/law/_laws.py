"""The law of every layer of a model: whether it holds for the layer's neurons, and why not."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from falign._wiring import feedbacks
from falign.layers import kind_of
from falign.measure.law._balance import Balance
from falign.measure.law._downstream import Downstream, DownstreamBatchNorm, Partner
from falign.measure.law._products import Product, components
from falign.measure.law._rates import Rates, departure
from falign.measure.law._trace import Connection, Followed
from falign.measure.law._weights import LinearMap, Neurons, map_of_layer
from falign.rules._direct import limit_of


@dataclass(frozen=True, kw_only=True)
class Law:
    """The law of one layer's neurons.

    Attributes:
        name: The layer whose neurons they are.
        targets: The layers that it feeds.
        form: C as text; empty where there is none.
        status: "exact" (C changes by ½Ση²|∇|² and nothing else), "accounted" (its other changes are computed, to
            rounding), "drift" (the model has the law, but the optimizer's steps depart from it) or "none".
        reason: Why it is not exact, in a clause; empty where it is.
        order: Expected size of the drift of C at a fixed training time; O(1) does not shrink with the rate. Empty where
            the law is exact (there it is O(η)) or there is no C.
        neurons: Number of the layer's neurons (channels).
    """

    name: str
    targets: tuple[str, ...]
    form: str
    status: str
    reason: str
    order: str
    neurons: int

    @property
    def holds_exactly(self) -> bool:
        """True if the residual is zero to rounding."""
        return self.status in ("exact", "accounted")


@dataclass(kw_only=True, eq=False)
class WatchedLaw:
    """A law while the model trains.

    Attributes:
        law: The law by the structure of the model and the settings of the optimizer.
        balance: The account of C; None where there is no C.
        departed: How the steps depart from gradient descent, and the order of the drift by that; None while they are
            gradient descent, so that they can be accounted for.
        normalised: The batch normalisations that the layer feeds, and itself if it is one.
    """

    law: Law
    balance: Balance | None = None
    departed: tuple[str, str] | None = None
    normalised: list[DownstreamBatchNorm] = field(default_factory=list)

    def current(self) -> Law:
        """The law as the steps so far have shown it: its status can only have got worse."""
        law, balance = self.law, self.balance
        if balance is None:
            return law
        changed: dict[str, Any] = {"form": balance.form}
        if law.holds_exactly and (obstacle := self.departed or _obstacle(balance, self.normalised)):
            changed |= {"status": "drift", "reason": obstacle[0], "order": obstacle[1]}
        elif law.holds_exactly and (accounted := _decay(balance) + balance.rate_changes):
            changed |= {"status": "accounted", "reason": _joined(law.reason, *accounted), "order": "O(1)"}
        return Law(**{**vars(law), **changed})

    def step(self, rates: Rates) -> None:
        """Account for a step that is about to be made, as long as all steps were those of gradient descent."""
        if self.balance is None or self.departed:
            return
        self.departed = departure(rates, self.balance.parameters)
        if not self.departed:
            self.balance.step(rates)


def find_laws(model: nn.Module, followed: Followed, optimizer: Optimizer) -> dict[str, WatchedLaw]:
    """Find the law of every layer whose neurons feed another: {layer: law}, in running order.

    Args:
        model: The converted model, unwrapped.
        followed: Its neurons, as one run of it showed them.
        optimizer: The optimizer that trains it.
    """
    laws = _Finder(model, followed, Rates(optimizer)).laws()
    for name, watched in laws.items():
        for target in watched.balance.targets if watched.balance is not None else ():
            if isinstance(target, DownstreamBatchNorm):
                # A mean far above the spread spoils the gradients on both sides: of the layer that the normalisation
                # reads, and of its own γ and β.
                watched.normalised.append(target)
                if target.name in laws and target.name != name:
                    laws[target.name].normalised.append(target)
    return laws


class _Finder:
    """Puts the laws of one model together.

    Args:
        model: The converted model, unwrapped.
        followed: Its neurons, as one run of it showed them.
        rates: The optimizer's.
    """

    def __init__(self, model: nn.Module, followed: Followed, rates: Rates) -> None:
        self._model, self._followed, self._rates = model, followed, rates
        self._parts = feedbacks(model)
        self._maps: dict[str, LinearMap] = {}

    def laws(self) -> dict[str, WatchedLaw]:
        """The law of every layer by itself, of queries with keys and of scores with values, in running order."""
        followed, laws = self._followed, {}
        for name in followed.neurons:
            products = [product for product in followed.products if product.source == name]
            if (rest := self._rest(name)) is not None:
                laws[name] = self._law(name, rest, [one for one in products if one.groups is None and not one.alone])
            for product in products:
                if product.groups is None and product.alone:
                    laws[self._called(product, 0)] = self._law_of_factors(product)
            for product in products:
                if product.groups is not None:
                    factor = next((one for one in products if one.groups is None and one.alone), None)
                    called = f"{name if factor is None else self._called(factor, 0)} (heads)"
                    laws[called] = self._law_of_heads(called, product, product.groups)
        return laws

    def _rest(self, name: str) -> Tensor | None:
        """Find the neurons of a layer that are not mere factors of products; None where there is no law to look for."""
        rest = torch.ones(self._count(name), dtype=torch.bool)
        for product in self._followed.products:
            if product.groups is None and product.alone and product.source == name:
                rest[product.pairs[:, 0].cpu()] = False
            if product.groups is None and product.partner == name:
                rest[product.pairs[:, 1].cpu()] = False
        fed, factors = self._followed.targets(name), not bool(rest.all())
        if factors and not (fed and rest.any()):
            return None
        return rest if fed or name not in self._followed.outputs else None

    def _called(self, product: Product, side: int) -> str:
        """Name one side of a product: as the layer, or of a layer with other neurons as its queries or its keys."""
        name = (product.source, product.partner)[side]
        several = product.source == product.partner or self._rest(name) is not None
        return name + ("[q]", "[k]")[side] * several

    def _law(self, name: str, rest: Tensor, products: list[Product]) -> WatchedLaw:
        """The law of a layer's neurons, or of those that are left."""
        targets = tuple(connection.target for connection in self._followed.targets(name))
        reason = self._followed.reasons.get(name, "")
        for one in (name, *targets):
            if one not in self._followed.maps and self._model.get_submodule(one)._parameters.get("weight") is None:
                return self._none(name, targets, reason or f"layer {one!r} has no weight of its own")
        targets += tuple(product.partner for product in products)
        groups = None if bool(rest.all()) else torch.where(rest, rest.cumsum(0) - 1, -1)
        neurons = self._neurons(name, groups, int(rest.sum()))
        downstream = [self._downstream(connection, neurons) for connection in self._followed.targets(name)]
        downstream = [target for target in downstream if not _returns_nothing(target)]
        problems = (_direct_problem(target, self._followed.outputs) for target in downstream)
        if problem := next(filter(None, problems), ""):
            return self._none(name, targets, problem)
        for product in products:
            _, places, count = self._sets(product)
            if count != len(product.pairs):
                return self._none(name, targets, reason or "several of its neurons are multiplied with the same one")
            places = torch.full_like(places, -1)
            places[product.pairs[:, 1].cpu()] = product.pairs[:, 0].cpu()
            downstream.append(Partner(self._neurons(product.partner), places, neurons.count, self._rates))
        if not downstream:
            return self._none(name, targets, reason or "it feeds no other layer")
        return self._watched(name, targets, neurons, downstream, reason)

    def _law_of_factors(self, product: Product) -> WatchedLaw:
        """The law of queries and keys: ``½|w|² + ½b²`` of each less that of its partner."""
        sets, places, count = self._sets(product)
        same = torch.equal(sets, torch.arange(self._count(product.source)))
        neurons = self._neurons(product.source, None if same else sets, count)
        partner = Partner(self._neurons(product.partner), places, count, self._rates)
        return self._watched(self._called(product, 0), (self._called(product, 1),), neurons, [partner], "")

    def _law_of_heads(self, name: str, product: Product, groups: Tensor) -> WatchedLaw:
        """The law of scores that weigh values: ``½|w|²`` of a head's queries less that of its values."""
        sets, places, count = components(product.pairs, int(groups.max()) + 1, self._count(product.partner))
        groups = groups.cpu()
        neurons = self._neurons(product.source, torch.where(groups >= 0, sets[groups], -1), count)
        partner = Partner(self._neurons(product.partner), places, count, self._rates)
        return self._watched(name, (product.partner,), neurons, [partner], "")

    def _sets(self, product: Product) -> tuple[Tensor, Tensor, int]:
        return components(product.pairs, self._count(product.source), self._count(product.partner))

    def _watched(
        self, name: str, targets: tuple[str, ...], neurons: Neurons, downstream: list[Downstream], reason: str
    ) -> WatchedLaw:
        balance = Balance(neurons, downstream, self._rates, self._followed.precision)
        status, reason, order = _status(reason, balance, self._rates)
        # ``WatchedLaw.current`` asks the balance for the form, which changes with the rates.
        law = Law(name=name, targets=targets, form="", status=status, reason=reason, order=order, neurons=neurons.count)
        return WatchedLaw(law=law, balance=balance, departed=departure(self._rates, balance.parameters))

    def _none(self, name: str, targets: tuple[str, ...], reason: str) -> WatchedLaw:
        count = self._count(name)
        law = Law(name=name, targets=targets, form="", status="none", reason=reason, order="", neurons=count)
        return WatchedLaw(law=law)

    def _downstream(self, connection: Connection, neurons: Neurons) -> Downstream:
        name, columns, count = connection.target, connection.columns, neurons.count
        if neurons.groups is not None:
            columns = torch.where(columns >= 0, neurons.groups.to(columns.device)[columns], -1)
        if name not in self._followed.maps and kind_of(layer := self._model.get_submodule(name)) is None:
            return DownstreamBatchNorm(self._map(name), layer, columns, count, self._rates)
        linear = self._map(name)
        part = next((self._parts[key] for key in (name, *linear.keys) if key in self._parts), None)
        return Downstream(linear, part, columns, count, self._rates)

    def _neurons(self, name: str, groups: Tensor | None = None, count: int | None = None) -> Neurons:
        maps = self._followed.into.get(name, (name,))
        return Neurons(
            name=name,
            maps=tuple(self._map(one) for one in maps),
            count=self._count(name) if count is None else count,
            groups=groups,
        )

    def _count(self, name: str) -> int:
        return self._followed.neurons[name]

    def _map(self, name: str) -> LinearMap:
        if name not in self._maps:
            known = self._followed.maps.get(name)
            self._maps[name] = known or map_of_layer(name, self._model.get_submodule(name))
        return self._maps[name]


def _direct_problem(target: Downstream, outputs: frozenset[str]) -> str:
    """Reason why the error that a layer returns under a direct rule is not its own, in words; empty where it is.

    A direct rule sends the output's error straight to every layer. Only in the output layer is that the layer's own
    error, so only the layer that feeds it is under the law.
    """
    if target.part is None or target.part.wiring.rule.wiring != "direct":
        return ""
    if target.part.wiring.rule.targeted:
        return f"layer {target.name!r} hands back the targets, not an error"
    if target.name not in outputs:
        return f"layer {target.name!r} hands back the output's error (direct feedback), not its own"
    if target.part.matrices()[target.part.first_end].shape != target.weight.shape:
        return f"the direct feedback of layer {target.name!r} has not the shape of its weight"
    if limit_of(target.part.wiring.rule):
        return f"the error that layer {target.name!r} hands back is confined (limit): the law is of the error e B alone"
    if len(target.part.matrices()) > 1:
        return f"layer {target.name!r} hands back the errors of several outputs"
    return ""


def _returns_nothing(target: Downstream) -> bool:
    """Test whether a rule hands no error back through a product of states, as e-prop: its term of the law is zero."""
    rule = None if target.part is None else target.part.wiring.rule
    return target.map.through_time and not getattr(rule, "through_time", True)


def _status(reason: str, balance: Balance, rates: Rates) -> tuple[str, str, str]:
    """(status, reason, order) of a law that the run gave that reason against, or none."""
    if reason := reason or next(_untrained(balance, rates), ""):
        return "none", reason, "O(1)"
    reasons = {target.motion: target.kind.order for target in balance.targets if target.motion}
    orders = set(reasons.values())
    order = "O(1)" if "O(1)" in orders else " + ".join(sorted(orders))
    return ("accounted" if reasons else "exact"), _joined(*reasons), order


def _obstacle(balance: Balance, normalised: list[DownstreamBatchNorm]) -> tuple[str, str] | None:
    """Reason why the steps so far cannot be accounted for, and the order of the drift by it; None where they can."""
    if balance.frozen_steps:
        return "some of its weights had no gradient in some steps (frozen, or run without gradients)", "O(1)"
    if any(bool(target.mixed_passes) for target in balance.targets):
        return "several passes behind one step, each with its own feedback or batch statistics", "O(1)"
    if (first := next((one for one in normalised if one.lost_to_rounding), None)) is not None:
        return f"layer {first.name!r} is given means so far above their spread that rounding hides the law", "O(1)"
    return None


def _decay(balance: Balance) -> list[str]:
    """Weight decays so far, in words."""
    decays = [f"{decay:g}" for decay in sorted(balance.decays)]
    several = ", ".join(decays) if len(decays) < 4 else f"{decays[0]} to {decays[-1]}"
    return [f"weight decay {several}"] if decays else []


def _untrained(balance: Balance, rates: Rates) -> Iterator[str]:
    """Parameters that the law needs to learn and that do not, in words."""

    def state(parameter: Tensor) -> str:
        return "frozen" if not parameter.requires_grad else "not in the optimizer" if parameter not in rates else ""

    partners = [target.partner for target in balance.targets if isinstance(target, Partner)]
    for neurons in (balance.neurons, *partners):
        whose = "its" if neurons is balance.neurons else f"layer {neurons.name!r}'s"
        for part in neurons.parts:
            parameter = part.parameter
            if (why := state(parameter)) and (part.what == "weight" or bool(torch.any(parameter != 0))):
                yield f"{whose} {part.what} is {why}" + " and not zero" * (part.what != "weight")
    for target in balance.targets:
        if not isinstance(target, Partner) and (why := state(target.weight)):
            yield f"the weight of layer {target.name!r} is {why}"


def _joined(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)
