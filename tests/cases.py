"""The networks that every rule is tested on, each with the same network for the oracle."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import falign
from oracles import Step
from outside_rule import MixedFeedback

OUTSIDE = (MixedFeedback,)
REFERENCES = tuple(name for name, rule in falign.ALL_RULES.items() if rule.trained_layers is not None)
RULES = (*(name for name in falign.ALL_RULES if name not in REFERENCES), *OUTSIDE)  # those that train every layer

TWINS = frozenset(("usf", "frsf", "wm", "eprop", "fdfa", "grape", "afa", "shallow"))
"""Rules that take the path of another through the core: that of fa, dfa, or frozen. See ``conftest.py``."""
CORE = frozenset(("bp", "fa", "kp", "adafa", "dfa", "dkp", "probe"))
"""Rules that are tried on every network: one for each way in which feedback can be kept and moved."""


def rule_class(rule: str | type[falign.Rule]) -> type[falign.Rule]:
    """The class that an entry of ``RULES`` stands for."""
    return falign.ALL_RULES[rule] if isinstance(rule, str) else rule


LAYERWISE = tuple(rule for rule in RULES if rule_class(rule).wiring == "layerwise")
DIRECT = tuple(rule for rule in RULES if rule_class(rule).wiring == "direct")


def observes(rule: str | type[falign.Rule]) -> bool:
    """Whether training passes move the feedback by what they see: two of them are not one."""
    own = rule_class(rule)
    return own.observe is not falign.Rule.observe or own.observe_error is not falign.Rule.observe_error


def follows(rule: str | falign.Rule | type[falign.Rule]) -> bool:
    """Whether feedback moves in ``falign.follow`` alone."""
    own = type(rule) if isinstance(rule, falign.Rule) else rule_class(rule)
    return own.follow is not falign.Rule.follow


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, a batch for it, and its steps for the oracle."""

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    y: Callable[[], Tensor]
    steps: list[Step]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _classes(count: int, *shape: int) -> Tensor:
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(2))


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class CausalMean(nn.Module):
    """Every position receives the mean of itself and all before it."""

    def __init__(self, length: int) -> None:
        super().__init__()
        mix = torch.tril(torch.ones(length, length, dtype=torch.float64))
        self.register_buffer("mix", mix / mix.sum(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix.to(x.dtype) @ x


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 30), nn.ReLU(inplace=True),
        nn.Linear(30, 25, bias=False), nn.Tanh(), nn.Linear(25, 7),
    )  # fmt: skip


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, (2, 3), dilation=(2, 1), padding=(1, 2), groups=2), nn.Tanh(),
        nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 6, 5),
    )  # fmt: skip


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 16),
        Residual(nn.Tanh(), nn.Linear(16, 9), nn.ReLU(inplace=True), nn.Linear(9, 16)),
        Residual(nn.Tanh(), nn.Linear(16, 16)),
        nn.Linear(16, 5),
    )


def sequence() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(11, 8), nn.Linear(8, 10), CausalMean(6), nn.Tanh(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 4)
    )


def _conv_step(name: str, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) -> Step:
    return Step("conv", name, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups})


_MIX = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]

CASES = {
    "mlp": Case(
        make=mlp,
        x=lambda: _normal(16, 20),
        y=lambda: _classes(7, 16),
        steps=[
            Step("linear", "0"), Step("tanh"), Step("linear", "2"), Step("relu"), Step("linear", "4"), Step("tanh"),
            Step("linear", "6"),
        ],
    ),
    "conv": Case(
        make=conv,
        x=lambda: _normal(4, 3, 11, 12),
        y=lambda: _classes(5, 4),
        steps=[
            _conv_step("0", stride=(2, 2), padding=(1, 1)), Step("relu"),
            _conv_step("2", padding=(1, 2), dilation=(2, 1), groups=2), Step("tanh"),
            _conv_step("4"), Step("relu"), Step("flatten"), Step("linear", "7"),
        ],
    ),
    "residual": Case(
        make=residual,
        x=lambda: _normal(8, 12),
        y=lambda: _classes(5, 8),
        steps=[
            Step("linear", "0"),
            Step("residual", inside=[
                Step("tanh"), Step("linear", "1.inner.1"), Step("relu"), Step("linear", "1.inner.3"),
            ]),
            Step("residual", inside=[Step("tanh"), Step("linear", "2.inner.1")]),
            Step("linear", "3"),
        ],
    ),
    "sequence": Case(
        make=sequence,
        x=lambda: _classes(11, 5, 6),
        y=lambda: _classes(4, 5, 6),
        steps=[
            Step("embedding", "0"), Step("linear", "1"), Step("mix", options={"matrix": _MIX}), Step("tanh"),
            Step("linear", "4"), Step("relu"), Step("linear", "6"),
        ],
    ),
}  # fmt: skip


def build(
    case: str,
    rule: str | falign.Rule | type[falign.Rule] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> nn.Module:
    """The network of a case, always with the same weights; converted where a rule is named."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CASES[case].make().to(dtype)
    if rule is not None:
        x = batch(case, dtype)[0]
        falign.convert(model, rule, seed=seed, example=x)
        if follows(rule):  # from a B that is not zero
            falign.follow(model, x, generator=torch.Generator().manual_seed(0))
    return model


def batch(case: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The batch of a case."""
    x, y = CASES[case].x(), CASES[case].y()
    return (x.to(dtype) if x.is_floating_point() else x), y


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy, classes on the last axis."""
    return nn.functional.cross_entropy(output.reshape(-1, output.shape[-1]), y.reshape(-1))


def step(model: nn.Module, x: Tensor, y: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Forward, loss, backward; gradients are added to what is there."""
    with falign.targets(model, y):
        loss = loss_of((model if forward is None else forward)(x), y)
    loss.backward()
    return loss


def gradients(model: nn.Module, x: Tensor, y: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> dict:
    """{parameter: gradient} of one fresh step."""
    model.zero_grad(set_to_none=True)
    step(model, x, y, forward)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(one: dict, other: dict) -> float:
    """The largest relative difference of two dicts of gradients; the keys must agree."""
    assert one.keys() == other.keys()

    def vector(value: Tensor) -> Tensor:
        return torch.as_tensor(value).detach().double()

    return max(
        float((vector(one[key]) - vector(other[key])).norm()) / max(float(vector(other[key]).norm()), 1e-300)
        for key in one
    )
