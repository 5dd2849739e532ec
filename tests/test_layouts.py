"""Every rule, family, kind of layer and memory format, from conversion to a resumed training and back to the plain net.

And batches that have no samples, or one.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import falign
from cases import CORE, RULES
from falign.lab import _checkpoints
from falign.lab._checkpoints import TrainingState
from falign.lab._learner import Learner
from falign.lab._run_folder import RunFolder
from falign.lab._validate import resolve
from falign.lab.config import TrainConfig

pytestmark = pytest.mark.unchecked

FAMILIES = ("normal", "uniform", "orthogonal", "low-rank(2)", "sparse(1)", "shared")
MOVING = {name for name, rule in falign.ALL_RULES.items() if rule.learned or rule.adapts}
UNDRAWN = {name for name, rule in falign.ALL_RULES.items() if not rule.draws}
REFUSED = {(rule, "shared") for rule in MOVING} | {(rule, family) for rule in UNDRAWN for family in FAMILIES}
FEEDBACK = [
    (rule, family)
    for rule in RULES
    if isinstance(rule, str)
    for family in ((None,) if rule in UNDRAWN else FAMILIES)
    if (rule, family) not in REFUSED and (rule in CORE or family in (None, "normal"))
]
"""The core's rules with all families, the others with the usual one."""
CONFIG = resolve(TrainConfig("digits", model="mlp:64-10"))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A network of one kind of layer, the shape of its input, and its memory format beside the contiguous one."""

    layers: Callable[[], list[nn.Module]]
    shape: tuple[int, ...]
    form: torch.memory_format | None = None


KINDS = {
    "linear": Kind(
        layers=lambda: [nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)],
        shape=(6,),
    ),
    "conv1d": Kind(
        layers=lambda: [
            nn.Conv1d(2, 5, 3), nn.ReLU(), nn.ConvTranspose1d(5, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3),
        ],
        shape=(2, 6),
    ),
    "conv2d": Kind(
        layers=lambda: [
            nn.Conv2d(2, 5, 2), nn.ReLU(), nn.ConvTranspose2d(5, 4, 2, groups=1), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 2, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
        ],
        shape=(2, 4, 4),
        form=torch.channels_last,
    ),
    "conv3d": Kind(
        layers=lambda: [
            nn.Conv3d(2, 4, 2), nn.ReLU(), nn.ConvTranspose3d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(81, 3),
        ],
        shape=(2, 3, 3, 3),
        form=torch.channels_last_3d,
    ),
}  # fmt: skip


def built(kind: Kind, rule: str, family: str | None, form: torch.memory_format | None, *, late: bool) -> nn.Module:
    """A converted network; its format was taken on before the conversion or, late, after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(*kind.layers())
    if form is not None and not late:
        model.to(memory_format=form)  # pyright: ignore[reportCallIssue]
    falign.convert(model, rule, feedback=family, example=torch.zeros(2, *kind.shape))
    if form is not None and late:
        model.to(memory_format=form)  # pyright: ignore[reportCallIssue]
    return model


def learner_of(model: nn.Module) -> Learner:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Learner(config=CONFIG, model=model, optimizer=optimizer, order=(), layers=(), ridge=None, law=None)


def batches(kind: Kind, form: torch.memory_format | None) -> list[tuple[Tensor, Tensor]]:
    """Four batches, the last one of a single sample."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for size in (4, 4, 4, 1):
        x = torch.randn(size, *kind.shape, generator=generator)
        y = torch.randint(3, (size,), generator=generator)
        found.append((x if form is None else x.to(memory_format=form), y))
    return found


def step(learner: Learner, x: Tensor, y: Tensor) -> None:
    with falign.targets(learner.model, y):
        loss = nn.functional.cross_entropy(learner.model(x), y, reduction="sum") / 4
    learner.optimizer.zero_grad()
    loss.backward()
    learner.optimizer.step()


def state_of(learner: Learner) -> dict[str, Tensor]:
    """Everything that a training has changed: weights, feedback, the optimizer's buffers."""
    kept = learner.optimizer.state_dict()["state"]
    momenta = {f"momentum {index}": value["momentum_buffer"] for index, value in kept.items()}
    return {**learner.model.state_dict(), **dict(learner.model.named_buffers()), **momenta}


def combinations(kind: Kind) -> Iterator[tuple[str, str | None, torch.memory_format | None, bool]]:
    for rule, family in FEEDBACK:
        yield rule, family, None, False
        if kind.form is not None:
            yield rule, family, kind.form, False
            yield rule, family, kind.form, True


def test_what_a_rule_refuses_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    for rule in falign.ALL_RULES:
        for family in FAMILIES:
            assert bool(falign.check(model, rule, feedback=family)) == ((rule, family) in REFUSED), (rule, family)


@pytest.mark.parametrize("name", KINDS)
def test_a_training_goes_on_where_it_stopped_and_the_plain_network_comes_back(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    run = RunFolder(tmp_path)
    run.begin()
    for rule, family, form, late in combinations(kind):
        at = f"{rule}, {family}, {form}, {'late' if late else 'early'}"
        whole, parts = (learner_of(built(kind, rule, family, form, late=late)) for _ in range(2))
        stream = batches(kind, form)
        for x, y in stream[:2]:
            step(whole, x, y)
        path = _checkpoints.save(run, whole, TrainingState(step=2))
        file = io.BytesIO()
        torch.save(
            {
                "model": whole.model.state_dict(),
                "feedback": {} if rule == "bp" else falign.feedback_state(whole.model),
                "optimizer": whole.optimizer.state_dict(),
            },
            file,
        )
        for x, y in stream[2:]:
            step(whole, x, y)
        expected = state_of(whole)

        _checkpoints.restore(path, parts)
        for x, y in stream[2:]:
            step(parts, x, y)
        for key, value in state_of(parts).items():
            assert torch.equal(value, expected[key]), (at, key)
            assert value.stride() == expected[key].stride(), (at, key)

        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again = learner_of(built(kind, rule, family, form, late=late))
        again.model.load_state_dict(saved["model"])
        if rule != "bp":
            falign.load_feedback_state(again.model, saved["feedback"])
        again.optimizer.load_state_dict(saved["optimizer"])
        for x, y in stream[2:]:
            step(again, x, y)
        for key, value in again.model.state_dict().items():
            if family == "shared":  # a sequence times its scale is now a matrix of its own
                assert torch.allclose(value, expected[key], rtol=1e-5, atol=1e-6), (at, key)
            else:
                assert torch.equal(value, expected[key]), (at, key)

        x, y = stream[0]
        with torch.no_grad():
            output = whole.model(x)
        plain = nn.Sequential(*kind.layers())
        plain.load_state_dict(falign.revert(whole.model).state_dict())
        assert torch.equal(whole.model(x), output), at
        for model in (whole.model, plain):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
        for one, other in zip(whole.model.parameters(), plain.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6), at


@pytest.mark.parametrize("name", KINDS)
def test_a_memory_format_changes_no_more_than_the_last_digits(name: str) -> None:
    kind = KINDS[name]
    if kind.form is None:
        return
    for rule, family in FEEDBACK:
        found = []
        for form, late in ((None, False), (kind.form, False), (kind.form, True)):
            learner = learner_of(built(kind, rule, family, form, late=late))
            for x, y in batches(kind, form):
                step(learner, x, y)
            found.append([parameter.detach() for parameter in learner.model.parameters()])
        for other in found[1:]:
            for one, two in zip(found[0], other, strict=True):
                assert torch.allclose(one, two, rtol=1e-4, atol=1e-5), (rule, family)


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_without_samples_teaches_nothing(name: str) -> None:
    kind = KINDS[name]
    for rule in falign.ALL_RULES:
        for form in {None, kind.form}:
            learner = learner_of(built(kind, rule, None, form, late=False))
            x = torch.zeros(0, *kind.shape)
            step(learner, x if form is None else x.to(memory_format=form), torch.zeros(0, dtype=torch.int64))
            fresh = built(kind, rule, None, form, late=False)
            for (key, value), before in zip(learner.model.named_parameters(), fresh.parameters(), strict=True):
                assert torch.equal(value, before), (rule, form, key)


def test_feedback_is_contiguous_whatever_the_family_returns() -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 3))

    def turned(shape: tuple[int, int], random: torch.Generator) -> Tensor:
        return torch.randn(shape[::-1], generator=random).mT

    for family in ("orthogonal", turned):
        falign.convert(model, "fa", feedback=family)
        assert all(part.is_contiguous() for part in model.buffers())
        falign.revert(model)


JAGGED = ("bp", "fa", "usf", "frsf", "brsf", "adafa")
"""Rules under which jagged batches train; direct feedback and Kolen-Pollack end in a message of PyTorch's."""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_batches_are_those_of_all_their_positions() -> None:
    samples = [torch.randn(length, 6) for length in (3, 1, 5)]
    flat, y = torch.cat(samples), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    for rule in JAGGED:
        found = []
        for x in (flat, torch.nested.nested_tensor(samples, layout=torch.jagged)):
            model = built(KINDS["linear"], rule, None, None, late=False)
            output = model(x)
            nn.functional.cross_entropy(output.values() if output.is_nested else output, y).backward()
            found.append([parameter.grad for parameter in model.parameters()])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other), rule
