"""A run that was stopped goes on to the same numbers as one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import begin, checkpoint, go_on, numbers, same, sealed_json

from falign import ALL_RULES
from falign._preserve import seeded
from falign.lab import _train as train_module
from falign.lab._checkpoints import restore, save
from falign.lab._files import RunError
from falign.lab._learner import Learner
from falign.lab._packing import axes_by_stride
from falign.lab._run_folder import RunFolder
from falign.lab._setup import prepare_run
from falign.lab._validate import resolve
from falign.lab.config import ConfigError, TrainConfig

OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "weight_decay": 1e-3},
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw"},
}


pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def config(**options) -> TrainConfig:
    fixed = {"dataset": "digits", "model": "mlp:64-24-16-10", "epochs": 3, "batch_size": 100}
    return TrainConfig(**{**fixed, **options})


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch):
    """Sends a real signal to this process while it makes its step number ``step``."""
    step = Learner.step

    def arm(number: int, how: signal.Signals = signal.SIGINT) -> None:
        def armed(learner: Learner, x: torch.Tensor, y: torch.Tensor, done: int) -> tuple[float, int]:
            if done + 1 == number:
                signal.raise_signal(how)
            return step(learner, x, y, done)

        monkeypatch.setattr(Learner, "step", armed)

    return arm


NETWORKS = """
import random

import numpy as np
import torch
from torch import nn


class Noise(nn.Module):
    'Draws from the generators of Python and NumPy, and counts in a state that is no tensor.'

    def __init__(self):
        super().__init__()
        self.drawn = {"passes": 0, "last": (0.0, None)}

    def forward(self, x):
        if not self.training:
            return x
        factor = 1 + 0.01 * random.random() + 0.01 * float(np.random.rand()) + 0.001 * (self.drawn["passes"] % 3)
        self.drawn = {"passes": self.drawn["passes"] + 1, "last": (factor, None)}
        return x * factor

    def get_extra_state(self):
        return self.drawn

    def set_extra_state(self, state):
        self.drawn = state


def regularised(shape, classes):
    return nn.Sequential(
        nn.Conv2d(shape[0], 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(144, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, classes),
    )


def lazy(classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(12), nn.ReLU(), nn.LazyLinear(classes))


def noisy(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), Noise(), nn.Linear(12, classes))


def channels_last(shape, classes):
    layers = [nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, classes)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)
"""
SGD = {"optimizer": "sgd", "learning_rate": 0.02}
FACTORS: dict[str, list[dict]] = {
    "rule": [{"rule": name} for name, rule in ALL_RULES.items() if rule.trained_layers is None],
    "optimizer": [
        {**SGD, "momentum": 0.0, "rate_decay": 0.5},
        {**SGD, "weight_decay": 1e-3},
        {"optimizer": "adam"},
        {"optimizer": "adamw", "rate_schedule": "cosine"},
    ],
    "ridge": [
        {},
        {"check_law": True},
        {"ridge": 0.1},
        {"ridge": 0.1, "ridge_schedule": "cutoff", "ridge_steps": 4.0},
        {"ridge": 0.1, "ridge_schedule": "inverse-square", "ridge_steps": 10.0},
        {"ridge": 0.1, "ridge_schedule": "exponential", "ridge_steps": 10.0},
    ],
    "numbers": [{}, {"dtype": "float64"}, {"autocast": "bf16"}],
    "measuring": [{}, {"measure_every": 3}, {"measure_every": 1, "probe_size": 40}],
    "tensorboard": [{}, {"tensorboard": True}],
    "feedback": [{}, {"feedback": "uniform"}, {"feedback": "orthogonal"}, {"feedback": "shared", "scale": 0.2}],
    "model": [
        {"model": "mlp:64-16-12-10"},
        {"model": "mlp:64-12-10", "activation": "tanh"},
        {"model": "lenet", "dataset": "small"},
        *({"model": f"networks_that_go_on:{name}"} for name in ("regularised", "lazy", "noisy", "channels_last")),
    ],
}
CHECKED = bool(os.environ.get("FALIGN_TYPECHECK"))
"""Whoever checks annotations draws from Python's generator, to look at one item of a list."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def possible(choice: dict[str, int]) -> bool:
    """Whether ``falign train`` takes the combination: rules without random feedback have no family of it."""
    feedback = FACTORS["feedback"][choice.get("feedback", 0)]
    rule = FACTORS["rule"][choice.get("rule", 1)]["rule"]
    if feedback.get("feedback") == "shared":
        return rule in ("fa", "dfa", "drtp", "brsf")
    return not feedback or ALL_RULES[rule]().draws


def pairs(choice: dict[str, int]) -> set[frozenset[tuple[str, int]]]:
    return {frozenset(pair) for pair in combinations(choice.items(), 2)}


def design() -> list[dict[str, int]]:
    """Choices, the next one always with the most pairs of values that no earlier one had, up to all possible ones."""
    draw = random.Random(12)
    sizes = {factor: len(values) for factor, values in FACTORS.items()}
    everything = {
        pair
        for one, other in combinations(sizes, 2)
        for here in range(sizes[one])
        for there in range(sizes[other])
        for pair in pairs({one: here, other: there})
        if possible({one: here, other: there})
    }
    found, missing = [], everything
    while missing:
        candidates, first = [], sorted(map(sorted, missing))
        for _ in range(15):
            choice = dict(first[draw.randrange(min(len(first), 40))])
            choice |= {factor: draw.randrange(size) for factor, size in sizes.items() if factor not in choice}
            if possible(choice):
                candidates.append(choice)
        seen = {item for choice in found for item in choice.items()}

        def gain(choice: dict[str, int], seen: set = seen, missing: set = missing) -> tuple[int, int]:
            return len(choice.items() - seen), len(pairs(choice) & missing)

        found.append(max(candidates, key=gain, default={}))
        if not found[-1]:
            raise AssertionError(f"no choice has one of {missing}")
        missing = missing - pairs(found[-1])
    return found


DESIGN = design()
FEW = 25


@pytest.fixture(scope="module")
def small_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of IDX files: 150 and 50 images of 12 × 12, each class with a bright row of its own."""
    folder = tmp_path_factory.mktemp("small")
    draw = torch.Generator().manual_seed(0)
    for name, count in (("train", 150), ("t10k", 50)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 100, (count, 12, 12), generator=draw)
        images[torch.arange(count), labels] += 120
        for kind, content, sizes in (("images-idx3", images, (count, 12, 12)), ("labels-idx1", labels, (count,))):
            head = bytes((0, 0, 8, len(sizes))) + b"".join(size.to_bytes(4, "big") for size in sizes)
            (folder / f"{name}-{kind}-ubyte").write_bytes(head + content.to(torch.uint8).numpy().tobytes())
    return folder


@pytest.mark.parametrize(
    "choice",
    [pytest.param(each, marks=[pytest.mark.slow] if number >= FEW else []) for number, each in enumerate(DESIGN)],
    ids=lambda choice: "-".join(map(str, choice.values())),
)
@pytest.mark.unchecked  # beartype draws from Python's generator
def test_an_interrupted_run_goes_on_to_the_same_bits(
    choice: dict[str, int], tmp_path: Path, interrupt_at, monkeypatch: pytest.MonkeyPatch, small_images: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "networks_that_go_on.py").write_text(NETWORKS)
    options = {name: value for factor, index in choice.items() for name, value in FACTORS[factor][index].items()}
    if CHECKED and options["model"].endswith(":noisy"):
        pytest.skip("its numbers are those of Python's generator")
    if options.get("dataset") == "small":
        options |= {"dataset": str(small_images), "batch_size": 32}
    options = TrainConfig(**{"dataset": "digits", "epochs": 2, "batch_size": 300, **options})
    steps = 2 * 5
    draw = random.Random(str(choice))
    stop, how = draw.randrange(1, steps), draw.choice(SIGNALS)
    whole = begin(options, tmp_path / "whole")
    assert (whole.status, whole.step) == ("done", steps)
    interrupt_at(stop, how)
    outcome = begin(options, tmp_path / "parts")
    assert (outcome.status, outcome.step, outcome.signal) == ("interrupted", stop, how)
    assert "--resume" in outcome.message
    torch.manual_seed(99)  # nothing may come from the process's own generators
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    resumed = go_on(tmp_path / "parts")
    assert resumed.status == "done"
    assert same(tmp_path / "parts", tmp_path / "whole")
    assert resumed.run.read_status().get("law") == whole.run.read_status().get("law")
    (state, here), (expected, there) = (checkpoint(each.run.checkpoints()[-1]) for each in (resumed, whole))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here if name != "table.records"), (
        "weights and optimizer"
    )
    for each in (state, expected):
        del each["run"], each["training"]["seconds"]
        if CHECKED:
            del each["python"]
    assert state == expected
    if options.tensorboard:
        assert scalars(tmp_path / "parts") == scalars(tmp_path / "whole") != {}


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} as TensorBoard reads them."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sizes = dict.fromkeys(("scalars", "histograms", "compressedHistograms", "images", "audio", "tensors"), 0)
    found = accumulators.EventAccumulator(str(folder / "tensorboard"), size_guidance=sizes).Reload()
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_the_combinations_have_every_pair_and_the_first_ones_every_value() -> None:
    assert {item for choice in DESIGN[:FEW] for item in choice.items()} == {
        (factor, index) for factor, values in FACTORS.items() for index in range(len(values))
    }
    assert all(possible(choice) for choice in DESIGN)
    assert frozenset({("rule", 8), ("model", 5)}) in set().union(*map(pairs, DESIGN))


def test_dropout_depends_on_the_seed_of_the_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "networks_that_go_on.py").write_text(NETWORKS)
    found = []
    for process, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(process)
        begin(config(model="networks_that_go_on:regularised", epochs=1, seed=seed), tmp_path / f"{process}-{seed}")
        found.append(tmp_path / f"{process}-{seed}")
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize("device", ["mps", "cuda:1"])
def test_the_generator_of_a_device_goes_through_a_checkpoint_and_is_put_back(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine without the device: its generator is a list here."""
    at, asked = [torch.tensor([7], dtype=torch.uint8)], []
    kind = torch.device(device).type
    module = getattr(torch, kind)
    monkeypatch.setattr(module, "get_rng_state", lambda device: (asked.append(str(device)), at[-1])[1])
    monkeypatch.setattr(module, "set_rng_state", lambda state, device: (asked.append(str(device)), at.append(state)))
    with seeded(3, [torch.device(device)]):
        at.append(at[-1] + 1)
    assert at[-1] == 7
    outcome = begin(config(epochs=1), tmp_path)
    learner = prepare_run(resolve(config()), data=None, progress=False).learner
    learner = replace(learner, config=replace(learner.config, device=device))
    state = restore(outcome.run.checkpoints()[-1], replace(learner, config=replace(learner.config, device="cpu")))
    path = save(outcome.run, learner, state)
    at.append(at[-1] + 5)
    with seeded(0):
        restore(path, learner)
    assert at[-1] == 7
    assert set(asked) == {device}


@pytest.mark.parametrize("rule", ["fa", "brsf", "kp"])
def test_a_model_in_channels_last_stays_so(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "networks_that_go_on.py").write_text(NETWORKS)
    options = config(model="networks_that_go_on:channels_last", rule=rule, feedback="orthogonal", learning_rate=0.01)
    kept: list[Learner] = []
    ended = train_module.end

    def keep(run, learner, *rest, **options):
        kept.append(learner)
        return ended(run, learner, *rest, **options)

    monkeypatch.setattr(train_module, "end", keep)
    begin(options, tmp_path / "whole")
    begin(replace(options, epochs=1), tmp_path / "parts")
    go_on(tmp_path / "parts", epochs=options.epochs)
    whole, _, parts = kept
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
        first, second = (
            learner.optimizer.state[part]["momentum_buffer"] for learner, part in ((whole, one), (parts, other))
        )
        assert torch.equal(first, second)
        assert axes_by_stride(first.squeeze()) == axes_by_stride(second.squeeze())
    assert whole.model[2].weight.is_contiguous(memory_format=torch.channels_last)  # pyright: ignore


def test_resumed_at_the_end_of_an_epoch_with_more_epochs(tmp_path: Path) -> None:
    begin(config(rule="kp", epochs=4, **OPTIMIZERS["sgd"]), tmp_path / "whole")
    begin(config(rule="kp", epochs=2, **OPTIMIZERS["sgd"]), tmp_path / "parts")
    outcome = go_on(tmp_path / "parts", epochs=4)
    assert outcome.status == "done"
    assert same(tmp_path / "parts", tmp_path / "whole")
    checkpoints = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert checkpoints == ["checkpoint-00000045.safetensors", "checkpoint-00000060.safetensors"]


def test_a_run_that_lost_its_checkpoints_is_not_begun_again_unasked(tmp_path: Path) -> None:
    begin(config(), tmp_path / "run")
    for path in (tmp_path / "run").glob("*.safetensors"):
        path.unlink()
    before = numbers(tmp_path / "run")
    with pytest.raises(RunError, match="no checkpoint left to go on from"):
        go_on(tmp_path / "run", epochs=9)
    assert all(before[name].equals(table) for name, table in numbers(tmp_path / "run").items())


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path, monkeypatch) -> None:
    begin(config(), tmp_path / "whole")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(config(), tmp_path / "parts")
    assert go_on(tmp_path / "parts").status == "done"
    assert same(tmp_path / "parts", tmp_path / "whole")


def test_a_complete_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    begin(config(epochs=1), tmp_path)
    before = numbers(tmp_path)
    outcome = go_on(tmp_path)
    assert "--epochs" in outcome.message
    after = numbers(tmp_path)
    assert before.keys() == after.keys()
    assert all(after[name].equals(before[name]) for name in before)


def test_fewer_epochs_than_done_are_refused(tmp_path: Path) -> None:
    begin(config(epochs=2), tmp_path)
    with pytest.raises(ConfigError, match=r"--epochs is 1, .* is in epoch 2"):
        go_on(tmp_path, epochs=1)


def test_other_data_are_refused(tmp_path: Path) -> None:
    begin(config(epochs=1), tmp_path)
    sealed_json(tmp_path / "config.json", lambda content: content["provenance"].update(data_sha256="0"))
    with pytest.raises(RunError, match="digits is not the data"):
        go_on(tmp_path)


def test_ctrl_c_in_a_process_of_its_own(tmp_path: Path) -> None:
    options = config(model="mlp:64-12-10", rule="brsf", batch_size=8, learning_rate=1e-3)
    words = [
        "train",
        "digits",
        "--model",
        options.model,
        "--rule",
        "brsf",
        "--batch-size",
        "8",
        "--lr",
        "1e-3",
    ]
    code = "import sys, torch; torch.set_num_threads(1); from falign.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--epochs", "100000", "--out", str(tmp_path / "parts")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.lstrip().startswith("epoch") and line.split()[1].startswith("1/"):
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted after step" in said
    assert f"--resume {tmp_path / 'parts'}" in said
    assert "Traceback" not in said
    status = RunFolder(tmp_path / "parts").read_status()
    assert status["status"] == "interrupted"
    assert go_on(tmp_path / "parts", epochs=status["epoch"] + 1).status == "done"
    begin(replace(options, epochs=status["epoch"] + 1), tmp_path / "whole")
    assert same(tmp_path / "parts", tmp_path / "whole")
