"""For each layer of a model whether the law holds of its neurons, and why not."""

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
        status: "exact" (C gains ½Ση²|∇|² and nothing else), "accounted" (what else it gains is known to rounding),
            "drift" (the structure has the law, the steps depart from it) or "none".
        reason: Why it is not exact, in a clause; empty where it is.
        order: How large the drift of C is expected to be at a fixed training time; O(1) does not shrink with the rate.
            Empty where the law is exact (there it is O(η)) or there is no C.
        neurons: How many neurons (channels) the layer has.
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
        """Whether the residual is zero to rounding."""
        return self.status in ("exact", "accounted")


@dataclass(kw_only=True, eq=False)
class WatchedLaw:
    """A law, and what keeps count of it.

    Attributes:
        law: As the model's structure and the optimizer have it.
        balance: None where there is no C to look at.
        departed: How the steps depart from gradient descent, and the order of the drift; None where they do not, so
            that they can be accounted for.
        normalised: What is known of the batch normalisations that it feeds, or that it is.
    """

    law: Law
    balance: Balance | None = None
    departed: tuple[str, str] | None = None
    normalised: list[DownstreamBatchNorm] = field(default_factory=list)

    def current(self) -> Law:
        """The law, with what the steps have shown since it was found."""
        law, balance = self.law, self.balance
        if balance is None:
            return law
        changed: dict[str, Any] = {"form": balance.form}
        if law.holds_exactly and (shown := self.departed or _shown(balance, self.normalised)):
            changed |= {"status": "drift", "reason": shown[0], "order": shown[1]}
        elif law.holds_exactly and (known := _decay(balance) + balance.odd):
            changed |= {"status": "accounted", "reason": _joined(law.reason, *known), "order": "O(1)"}
        return Law(**{**vars(law), **changed})

    def step(self, rates: Rates) -> None:
        """Account for a step that is about to be made, as long as all steps were those of gradient descent."""
        if self.balance is None or self.departed:
            return
        self.departed = departure(rates, self.balance.parameters)
        if not self.departed:
            self.balance.step(rates)


def find_laws(model: nn.Module, followed: Followed, optimizer: Optimizer) -> dict[str, WatchedLaw]:
    """{layer: entry} of all layers whose neurons feed another, in running order.

    Args:
        model: The converted model, unwrapped.
        followed: What one run of it showed.
        optimizer: What trains it.
    """
    rates, parts = Rates(optimizer), feedbacks(model)
    entries = {
        name: _entry(name, model, parts, followed, rates)
        for name in followed.neurons
        if followed.targets(name) or name not in followed.outputs
    }
    for name, entry in entries.items():
        for target in entry.balance.targets if entry.balance is not None else ():
            if isinstance(target, DownstreamBatchNorm):
                entry.normalised.append(target)
                if target.name in entries and target.name != name:
                    entries[target.name].normalised.append(target)
    return entries


def _entry(name: str, model: nn.Module, parts: dict[str, Feedback], followed: Followed, rates: Rates) -> WatchedLaw:
    layer, neurons = model.get_submodule(name), followed.neurons[name]
    targets = tuple(connection.target for connection in followed.targets(name))

    def law(status: str, reason: str, order: str) -> Law:
        return Law(
            name=name, targets=targets, form="", status=status, reason=reason, order=order, neurons=neurons
        )  # the form is the balance's

    bare = next((one for one in (name, *targets) if model.get_submodule(one)._parameters.get("weight") is None), None)
    if bare is not None:
        return WatchedLaw(law=law("none", followed.reasons.get(name, f"layer {bare!r} has no weight of its own"), ""))
    built = _targets(name, model, parts, followed, rates)
    problem = next((problem for target in built if (problem := _direct_problem(target, followed.outputs))), "")
    if problem or not built:
        reason = problem or followed.reasons.get(name, "it feeds no other layer")
        return WatchedLaw(law=law("none", reason, ""))
    balance = Balance(layer, built, rates, followed.precision)
    departed = departure(rates, balance.parameters)
    return WatchedLaw(law=law(*_status(name, followed, balance, rates)), balance=balance, departed=departed)


def _targets(
    name: str, model: nn.Module, parts: dict[str, Feedback], followed: Followed, rates: Rates
) -> list[Downstream]:
    found = []
    for connection in followed.targets(name):
        layer, neurons = model.get_submodule(connection.target), followed.neurons[name]
        if kind_of(layer) is None:
            found.append(DownstreamBatchNorm(connection.target, layer, connection.columns, neurons, rates))
        else:
            part = parts.get(connection.target)
            found.append(Downstream(connection.target, layer, part, connection.columns, neurons, rates))
    return found


def _direct_problem(target: Downstream, outputs: frozenset[str]) -> str:
    """Why the error that a target hands back is not its own, in words; empty where it is."""
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
    if reason := followed.reasons.get(name, "") or next(_still(balance, rates), ""):
        return "none", reason, "O(1)"
    reasons = {target.motion: target.kind.order for target in balance.targets if target.motion}
    orders = set(reasons.values())
    order = "O(1)" if "O(1)" in orders else " + ".join(sorted(orders))
    return ("accounted" if reasons else "exact"), _joined(*reasons), order


def _shown(balance: Balance, normalised: list[DownstreamBatchNorm]) -> tuple[str, str] | None:
    """What the steps have shown that cannot be accounted for, and the order of the drift by it."""
    if balance.frozen_steps:
        return "some of its weights had no gradient in some steps (frozen, or run without gradients)", "O(1)"
    if any(bool(target.mixed_passes) for target in balance.targets):
        return "several passes behind one step, each with its own feedback or batch statistics", "O(1)"
    if (first := next((one for one in normalised if one.lost_to_rounding), None)) is not None:
        return f"layer {first.name!r} is given means so far above their spread that rounding hides the law", "O(1)"
    return None


def _decay(balance: Balance) -> list[str]:
    """The weight decay that there was, in words."""
    decays = [f"{decay:g}" for decay in sorted(balance.decays)]
    several = ", ".join(decays) if len(decays) < 4 else f"{decays[0]} to {decays[-1]}"
    return [f"weight decay {several}"] if decays else []


def _still(balance: Balance, rates: Rates) -> Iterator[str]:
    """What does not learn though the law needs it to, in words."""

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
