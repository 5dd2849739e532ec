"""The core's public functions answer hostile arguments with the right result or with sentences."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import falign
from falign.feedback import family
from falign.measure import ConservationLaw, Monitor, alignment, angle, gradient_angles
from hostile import anything, fault

pytestmark = pytest.mark.unchecked


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


def learner(rule: str = "fa") -> nn.Module:
    return falign.convert(network(), rule, example=torch.ones(2, 4))


def batch() -> dict[str, Any]:
    return {"x": torch.randn(8, 4), "y": torch.arange(8) % 3}


def _loss(f: Any) -> torch.Tensor:
    return f.square().mean()


def _drawn_loss(f: Any, random: torch.Generator) -> torch.Tensor:
    return (f - torch.randn(f.shape, generator=random)).square().mean()


def trained() -> nn.Module:
    """A network whose weights are not as they were drawn."""
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return falign.convert(model, "dfa", example=torch.ones(2, 4))


def _with_targets(model: Any, target: Any) -> torch.Tensor:
    with falign.targets(model, target):
        return model(torch.ones(8, 4))


def _law(model: Any, optimizer: Any, example: Any) -> str:
    with ConservationLaw(model, optimizer, example=example) as law:
        return str(law)


def _monitored(model: Any, loss_fn: Any, x: Any, y: Any) -> Any:
    return Monitor(model, every=1).step(loss_fn, x, y)


_OPTIONS = {"model": network, "rule": lambda: "fa", "feedback": lambda: "normal", "scale": lambda: 1.0}
_PLACES = {"skip": lambda: (), "example": lambda: torch.ones(2, 4), "output": lambda: None}
_LEARNER = {"model": learner}
_BATCH = {"loss_fn": lambda: nn.CrossEntropyLoss(), "x": lambda: batch()["x"], "y": lambda: batch()["y"]}

#: name -> (call, {argument: a good one, made anew for each call})
GOOD: dict[str, tuple[Callable[..., Any], dict[str, Callable[[], Any]]]] = {
    "convert": (falign.convert, {**_OPTIONS, "seed": lambda: 1, **_PLACES}),
    "convert dfa": (falign.convert, {**_OPTIONS, "rule": lambda: "dfa", **_PLACES}),
    "check": (falign.check, {**_OPTIONS, **_PLACES}),
    "revert": (falign.revert, _LEARNER),
    "feedback_state": (falign.feedback_state, _LEARNER),
    "load_feedback_state": (
        falign.load_feedback_state,
        {**_LEARNER, "state": lambda: falign.feedback_state(learner())},
    ),
    "targets": (_with_targets, {"model": lambda: learner("drtp"), "target": lambda: torch.arange(8) % 3}),
    "verify": (
        falign.verify,
        {**_LEARNER, "x": lambda: batch()["x"], "loss_fn": lambda: _loss, "target": lambda: None},
    ),
    "transport": (
        falign.transport,
        {"model": network, "x": lambda: batch()["x"], "loss_fn": lambda: _loss, "target": lambda: None},
    ),
    "alignment": (alignment, {**_LEARNER, **_BATCH, "optimizer": lambda: None}),
    "gradient_angles": (gradient_angles, {**_LEARNER, **_BATCH}),
    "angle": (angle, {"one": lambda: torch.ones(3), "other": lambda: torch.arange(3.0)}),
    "Monitor": (Monitor, {**_LEARNER, "every": lambda: 1}),
    "Monitor.step": (_monitored, {**_LEARNER, **_BATCH}),
    "init.generic": (falign.init.generic, {**_LEARNER, "seed": lambda: 1}),
    "init.dominant": (
        falign.init.dominant,
        {**_LEARNER, "example": lambda: torch.ones(2, 4), "seed": lambda: 1, "share": lambda: 0.5},
    ),
    "init.small": (
        falign.init.small,
        {**_LEARNER, "example": lambda: torch.ones(2, 4), "seed": lambda: 1, "size": lambda: 0.1},
    ),
    "init.anti": (falign.init.anti, {**_LEARNER, "example": lambda: torch.ones(2, 4), "seed": lambda: 1}),
    "init.aligned_forever": (falign.init.aligned_forever, {**_LEARNER, "example": lambda: torch.ones(2, 4)}),
    "init.prior_bias": (
        falign.init.prior_bias,
        {**_LEARNER, "labels": lambda: batch()["y"], "smoothing": lambda: 1.0, "layer": lambda: "4"},
    ),
    "init.prior_bias counts": (
        falign.init.prior_bias,
        {**_LEARNER, "counts": lambda: [3, 3, 2], "example": lambda: torch.ones(2, 4)},
    ),
    "init.soft": (falign.init.soft, {**_LEARNER, "angle": lambda: 30.0, "seed": lambda: 1}),
    "init.soft dfa": (
        falign.init.soft,
        {"model": lambda: learner("dfa"), "example": lambda: torch.randn(8, 4), "seed": lambda: None},
    ),
    "init.noise": (
        falign.init.noise,
        {
            **_LEARNER,
            "optimizer": lambda: 0.1,
            "example": lambda: torch.ones(2, 4),
            "steps": lambda: 2,
            "batch": lambda: 4,
            "samples": lambda: 8,
            "seed": lambda: 1,
        },
    ),
    "init.noise loss_fn": (
        falign.init.noise,
        {**_LEARNER, "example": lambda: torch.ones(2, 4), "steps": lambda: 2, "loss_fn": lambda: _drawn_loss},
    ),
    "init.match": (
        falign.init.match,
        {
            "model": trained,
            "example": lambda: torch.eye(4).repeat(2, 1),
            "targets": lambda: trained()(torch.eye(4).repeat(2, 1)).argmax(1),
            "rank": lambda: 2,
        },
    ),
    "feedback.family": (family, {"text": lambda: "low-rank(8)"}),
}

#: What only the user's own loss function sees.
_NOT_OURS = {("alignment", "y"), ("gradient_angles", "y"), ("Monitor.step", "y")}


def calls(name: str) -> list[tuple[str, str, Any]]:
    return [
        (argument, which, value)
        for argument, make in GOOD[name][1].items()
        for which, value in anything()
        if (name, argument) not in _NOT_OURS and which not in ("10**5000", "a class", "meta")
    ]


def faults(name: str, count: int | None) -> list[str]:
    call, good = GOOD[name]
    call(**{argument: make() for argument, make in good.items()})
    chosen = calls(name)
    if count is not None and len(chosen) > count:
        chosen = random.Random(name).sample(chosen, count)
    told = []
    for argument, which, value in chosen:
        arguments = {other: make() for other, make in good.items()} | {argument: value}
        if wrong := fault(call, arguments, None, equal=False):
            told.append(f"{name}: {argument} {which}: {wrong}")
    return told


@pytest.mark.parametrize("count", [10, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GOOD)
def test_a_hostile_argument_is_answered_right_or_in_sentences(name, count):
    assert faults(name, count) == []


def _spoilt(state: dict[str, Any], place: str, how: str) -> dict[Any, Any]:
    B = state[place]
    values: dict[str, Any] = {
        "one more row": torch.cat([B, B[:1]]),
        "one axis less": B[0],
        "transposed": B.mT,
        "empty": B[:0],
        "complex": B.to(torch.complex64),
        "nan": B * float("nan"),
        "inf": B / 0,
        "1e300": B.double() * 1e300,
        "1e-300": B.double() * 1e-300,
        "text": "text",
        "None": None,
        "NumPy": B.numpy(),
        "list": B.tolist(),
        "meta": B.to("meta"),
    }
    if how == "missing":
        return {name: value for name, value in state.items() if name != place}
    if how == "another name":
        return {**state, "nothing": B}
    if how == "a number for a name":
        return {**state, 3: B}
    return {**state, place: values[how]}


SPOILT = (
    "missing", "another name", "a number for a name", "one more row", "one axis less", "transposed", "empty", "complex",
    "nan", "inf", "1e300", "1e-300", "text", "None", "NumPy", "list", "meta",
)  # fmt: skip


@given(st.sampled_from(["fa", "frsf", "kp", "adafa"]), st.integers(0, 1), st.sampled_from(SPOILT), st.randoms())
@settings(max_examples=60, deadline=None)
def test_feedback_state_is_loaded_whole_or_not_at_all(rule, which, how, order):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = falign.convert(network(), rule, seed=1)
        other = falign.feedback_state(falign.convert(network(), rule, seed=2))
    before = falign.feedback_state(model)
    state = _spoilt(other, ("0", "2")[which], how)
    keys = list(state)
    order.shuffle(keys)
    with pytest.raises(ValueError, match="nothing was loaded:\n- "):
        falign.load_feedback_state(model, {key: state[key] for key in keys})
    after = falign.feedback_state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    falign.load_feedback_state(model, other)
    assert all(torch.equal(other[name], value) for name, value in falign.feedback_state(model).items())


@given(st.one_of(st.text(max_size=12), st.from_regex(r"(low-rank|sparse|normal|shared)[(:]?-?[0-9e.]{0,25}\)?")))
@settings(max_examples=300, deadline=None)
def test_the_text_of_a_family_is_one_or_refused(text):
    try:
        found = str(family(text))
    except ValueError as error:
        found, refused = "", str(error)
        assert_sentence(refused)
    assert not found or str(family(found)) == found


def assert_sentence(refused: str) -> None:
    assert "feedback family" in refused
    assert "\n" not in refused


def test_neurons_removed_after_convert_are_named():
    model = learner()
    model[2].weight = nn.Parameter(model[2].weight[:4].detach())
    model[2].bias = nn.Parameter(model[2].bias[:4].detach())
    model[4].weight = nn.Parameter(model[4].weight[:, :4].detach())
    with pytest.raises(RuntimeError, match=r"layer '2' has weights \(4, 5\), feedback \(6, 5\): neurons were removed"):
        model(torch.ones(2, 4))
    falign.convert(falign.revert(model), "fa")
    model(torch.ones(2, 4)).sum().backward()


def test_an_input_that_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="layer '0' was called with a list, expected a tensor"):
        learner()([1.0, 2.0])
