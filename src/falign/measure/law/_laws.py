"""The law of every layer of a model: whether it holds for the layer's neurons, and why not."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from falign._attached import Feedback
from falign._wiring import feedbacks
from falign.layers import kind_of
from falign.measure.law._balance import Balance
from falign.measure.law._downstream import Downstream, DownstreamBatchNorm
from falign.measure.law._rates import Rates, departure
from falign.measure.law._trace import Followed


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
    rates, parts = Rates(optimizer), feedbacks(model)
    laws = {
        name: _watched(name, model, parts, followed, rates)
        for name in followed.neurons
        if followed.targets(name) or name not in followed.outputs
    }
    for name, watched in laws.items():
        for target in watched.balance.targets if watched.balance is not None else ():
            if isinstance(target, DownstreamBatchNorm):
                # A mean far above the spread spoils the gradients on both sides: of the layer that the normalisation
                # reads, and of its own γ and β.
                watched.normalised.append(target)
                if target.name in laws and target.name != name:
                    laws[target.name].normalised.append(target)
    return laws


def _watched(name: str, model: nn.Module, parts: dict[str, Feedback], followed: Followed, rates: Rates) -> WatchedLaw:
    layer, neurons = model.get_submodule(name), followed.neurons[name]
    targets = tuple(connection.target for connection in followed.targets(name))

    def law(status: str, reason: str, order: str) -> Law:
        return Law(
            name=name, targets=targets, form="", status=status, reason=reason, order=order, neurons=neurons
        )  # ``WatchedLaw.current`` asks the balance for the form, which changes with the rates

    weightless = (one for one in (name, *targets) if model.get_submodule(one)._parameters.get("weight") is None)
    if (bare := next(weightless, None)) is not None:
        return WatchedLaw(law=law("none", followed.reasons.get(name, f"layer {bare!r} has no weight of its own"), ""))
    downstream = _downstream(name, model, parts, followed, rates)
    problem = next((problem for target in downstream if (problem := _direct_problem(target, followed.outputs))), "")
    if problem or not downstream:
        reason = problem or followed.reasons.get(name, "it feeds no other layer")
        return WatchedLaw(law=law("none", reason, ""))
    balance = Balance(layer, downstream, rates, followed.precision)
    departed = departure(rates, balance.parameters)
    return WatchedLaw(law=law(*_status(name, followed, balance, rates)), balance=balance, departed=departed)


def _downstream(
    name: str, model: nn.Module, parts: dict[str, Feedback], followed: Followed, rates: Rates
) -> list[Downstream]:
    layers = []
    for connection in followed.targets(name):
        layer, neurons = model.get_submodule(connection.target), followed.neurons[name]
        if kind_of(layer) is None:
            layers.append(DownstreamBatchNorm(connection.target, layer, connection.columns, neurons, rates))
        else:
            part = parts.get(connection.target)
            layers.append(Downstream(connection.target, layer, part, connection.columns, neurons, rates))
    return layers


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
    if target.part.matrix.shape != target.weight.shape:
        return f"the direct feedback of layer {target.name!r} has not the shape of its weight"
    return ""


def _status(name: str, followed: Followed, balance: Balance, rates: Rates) -> tuple[str, str, str]:
    """(status, reason, order)."""
    if reason := followed.reasons.get(name, "") or next(_untrained(balance, rates), ""):
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

    if why := state(balance.weight):
        yield f"its weight is {why}"
    if balance.bias is not None and (why := state(balance.bias)) and bool(torch.any(balance.bias != 0)):
        yield f"its bias is {why} and not zero"
    for target in balance.targets:
        if why := state(target.weight):
            yield f"the weight of layer {target.name!r} is {why}"


def _joined(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)
