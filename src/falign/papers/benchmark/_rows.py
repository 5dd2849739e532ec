"""The rows and the networks of the field's table, as frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from falign.rules import ALL_RULES

BATCH, MOMENTUM, RATE_DECAY = 64, 0.9, 0.6
"""Of every training: stochastic gradient descent, its rate times 0.6 after every epoch."""
LADDER = (0.03, 0.01, 0.1)
"""Learning rates with which every study begins."""
RATES = (1e-3, 0.3)
"""Between which it then searches, on a logarithmic scale."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: a rule, and what is done to it.

    Attributes:
        rule: Its name.
        kind: "bp", "layerwise", "learned direct", "fixed", "transport" of rules that read the weights or their signs,
            at every step or now and then, or "reference".
        transform: Of the error that is carried on; None for none.
        decay: Weight decay, of rules whose feedback would never meet the weights without.
        calibrate: One step in so many is backpropagated truly; 0 for none.
    """

    rule: str
    kind: str
    transform: str | None = None
    decay: float = 0.0
    calibrate: int = 0


_ALL = {
    "bp": Row(rule="bp", kind="bp"),
    "kp": Row(rule="kp", kind="layerwise", decay=1e-3),
    "pfa": Row(rule="pfa", kind="layerwise", decay=1e-3),
    "wm": Row(rule="wm", kind="layerwise"),
    "ldfa": Row(rule="ldfa", kind="layerwise", decay=1e-3),
    "usf": Row(rule="usf", kind="transport"),
    "adafa": Row(rule="adafa", kind="transport"),
    "dkp": Row(rule="dkp", kind="learned direct"),
    "dkp+centred": Row(rule="dkp", kind="learned direct", transform="centred"),
    "probe": Row(rule="probe", kind="learned direct"),
    "ebd": Row(rule="ebd", kind="learned direct"),
    "fdfa": Row(rule="fdfa", kind="learned direct"),
    "grape": Row(rule="grape", kind="learned direct"),
    "dfa": Row(rule="dfa", kind="fixed"),
    "dfa+centred": Row(rule="dfa", kind="fixed", transform="centred"),
    "fa": Row(rule="fa", kind="fixed"),
    "dfa+calibrated": Row(rule="dfa", kind="transport", calibrate=100),
    "shallow": Row(rule="shallow", kind="reference"),
    "frozen": Row(rule="frozen", kind="reference"),
}
ROWS: Mapping[str, Row] = MappingProxyType({name: row for name, row in _ALL.items() if row.rule in ALL_RULES})
"""Name -> row, of those whose rule the package has."""


def rows_of(*kinds: str) -> tuple[str, ...]:
    """Names of the rows of some kinds."""
    return tuple(name for name, row in ROWS.items() if row.kind in kinds)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of the table.

    Attributes:
        title: Its name in pictures.
        model: As ``falign train --model`` takes it, with a place for the width; "mlp:{0}-{0}" has hidden layers only.
        activation: Between its layers; None where it has no choice.
        width: Of hidden layers, at the preset ``paper``; 0 where it is fixed.
        epochs: Of a training, likewise.
        cost: Seconds of a step, roughly, relative to the perceptron's.
    """

    title: str
    model: str
    activation: str | None = None
    width: int = 0
    epochs: int = 4
    cost: float = 1.0


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "mlp": Network(title="two hidden layers, ReLU", model="mlp:{0}-{0}", activation="relu", width=1000, epochs=10),
        "lenet": Network(title="LeNet, tanh, average pooling", model="lenet-average", activation="tanh"),
        "lenet-relu": Network(title="LeNet, ReLU, max pooling", model="lenet", activation="relu"),
        "lenet-norm": Network(title="LeNet, batch norm, ReLU", model="lenet-norm", activation="relu"),
        "resnet": Network(title="ResNet-8", model="resnet8", cost=4.0),
        "residual": Network(title="residual MLP, pre-LN", model="residual:width={0}", activation="relu", width=256),
    }
)
"""Name -> network."""
SMALLEST = 12
"""Pixels a side below which images are shown to LeNet at twice their size."""
