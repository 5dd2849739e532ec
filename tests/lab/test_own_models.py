"""Models of one's own in ``falign train``: seeded and resumed whatever they draw and keep, or refused in a sentence."""

import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from training_runs import begin, go_on, numbers, quiet, same

from falign._preserve import generator_states, restore_generator_states, seeded
from falign.lab import _checkpoints, _own_models
from falign.lab._files import RunError, WriteError
from falign.lab._learner import Learner, make_learner
from falign.lab._models import build
from falign.lab._python_state import Attributes, attribute_fingerprints, storable_attributes
from falign.lab._run_folder import RunFolder
from falign.lab._validate import resolve
from falign.lab.config import ConfigError, TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.fixture(autouse=True)
def _networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("networks_of_ones_own", None)


undrawn = pytest.mark.unchecked  # the check of annotations draws from Python's generator itself


def config(factory: str, **options) -> TrainConfig:
    fixed = {"dataset": "digits", "epochs": 2, "batch_size": 120, "measure_every": 5}
    return TrainConfig(**{**fixed, **options, "model": f"networks_of_ones_own:{factory}"})


def learner(factory: str, **options) -> Learner:
    return make_learner(
        resolve(config(factory, **options)), shape=(1, 8, 8), classes=10, example=torch.rand(2, 1, 8, 8)
    )


def said(factory: str, folder: Path, **options) -> str:
    console = quiet()
    begin(config(factory, epochs=0, **options), folder, console)
    return console.file.getvalue()  # pyright: ignore


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends a run after its step ``number`` as Ctrl-C does."""
    step = Learner.step

    def arm(number: int) -> None:
        def armed(learner: Learner, x: torch.Tensor, y: torch.Tensor, done: int) -> tuple[float, int]:
            if done + 1 == number:
                signal.raise_signal(signal.SIGINT)
            return step(learner, x, y, done)

        monkeypatch.setattr(Learner, "step", armed)

    return arm


RUNS = [
    ("lazy", {}),
    ("depth", {"rule": "dfa", "optimizer": "adam"}),
    ("depth", {"rule": "kp", "weight_decay": 0.01}),
    ("keeper", {}),
    ("keeper", {"rule": "drtp", "optimizer": "adamw"}),
    ("sharing", {}),
    ("sharing", {"rule": "dfa", "optimizer": "adam"}),
    ("sharing_late", {}),
    ("thawing", {"rule": "bp"}),
    ("thawing", {"rule": "fa", "optimizer": "adam"}),
    ("late", {}),
    ("late", {"rule": "kp", "weight_decay": 0.01}),
    ("late", {"rule": "dfa", "check_law": True, "momentum": 0.0}),
    ("late", {"rule": "usf", "optimizer": "adamw"}),
    ("moving", {}),
]


@undrawn
@pytest.mark.parametrize(("factory", "options"), RUNS, ids=str)
def test_the_seed_fixes_the_run_and_it_goes_on_to_the_same_numbers(
    factory: str, options: dict, tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    begin(config(factory, **options), tmp_path / "whole")
    for step, at in enumerate((5, 13), 1):  # as new processes do, with other generators
        random.seed(step), np.random.seed(step), torch.manual_seed(step)  # noqa: NPY002
        del sys.modules["networks_of_ones_own"]
        stop_at(at)
        outcome = begin(config(factory, **options), tmp_path / "parts") if step == 1 else go_on(tmp_path / "parts")
        assert (outcome.status, outcome.step) == ("interrupted", at)
    before = random.getstate(), torch.get_rng_state(), repr(np.random.get_state())  # noqa: NPY002
    assert go_on(tmp_path / "parts").status == "done"
    assert same(tmp_path / "whole", tmp_path / "parts")
    after = random.getstate(), torch.get_rng_state(), repr(np.random.get_state())  # noqa: NPY002
    assert before[::2] == after[::2]
    assert torch.equal(before[1], after[1])
    begin(config(factory, **options, seed=8), tmp_path / "other")
    assert not same(tmp_path / "whole", tmp_path / "other")
    assert (Path.cwd(), "/nowhere" in sys.path) == (tmp_path, False)
    assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.float32, "cpu")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("factory", ["late", "thawing"])
def test_late_first_gradients_train_as_in_plain_torch(factory: str, momentum: float) -> None:
    made = learner(factory, rule="bp", momentum=momentum)
    plain = build(f"networks_of_ones_own:{factory}", shape=(1, 8, 8), classes=10, seed=0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=momentum, fused=False, foreach=False)
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    for step in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
        made.step(x, y, step)
    for (name, one), other in zip(plain.named_parameters(), made.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("factory", ["keeper", "sharing", "sharing_late"])
def test_measuring_leaves_what_is_kept_in_python(factory: str, tmp_path: Path) -> None:
    begin(config(factory, measure_every=0), tmp_path / "seldom")
    begin(config(factory, measure_every=1), tmp_path / "often")
    seldom = numbers(tmp_path / "seldom")["records.parquet"]["test_loss"]
    often = numbers(tmp_path / "often")["records.parquet"]["test_loss"].drop_nulls()
    assert seldom.to_list() == often.to_list()


def test_a_new_learner_begins_where_the_factory_left_it() -> None:
    made = learner("keeper").model
    assert (made.count, made.mode, made.seen) == (0, "tensor:0", {"last": [0]})
    assert made.shared is made.drawing["python"]  # pyright: ignore
    assert made.shared.random() == random.Random(1).random()  # pyright: ignore


def test_states_of_attributes_go_through_and_back() -> None:
    one, other = learner("keeper"), learner("keeper")
    assert one.attributes.state() == {}
    for step in range(9):
        one.step(torch.rand(6, 1, 8, 8), torch.arange(6), step)
    one.model.first.bias.requires_grad_(False)  # pyright: ignore
    other.attributes.load(one.attributes.state())
    assert attribute_fingerprints(one.model, "networks_of_ones_own") == attribute_fingerprints(
        other.model, "networks_of_ones_own"
    )
    assert repr(storable_attributes(one.model)) == repr(storable_attributes(other.model))
    assert other.model.shared is other.model.drawing["python"]  # pyright: ignore
    other.attributes.load({})
    assert repr(storable_attributes(other.model)) == repr(storable_attributes(learner("keeper").model))


@pytest.mark.parametrize("factory", ["sharing", "sharing_late"])
def test_what_is_shared_stays_shared(factory: str) -> None:
    one, other = learner(factory), learner(factory)
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    for step in range(4):
        one.step(x, y, step)
        one.alignment(torch.rand(5, 1, 8, 8), torch.arange(5))
    assert one.model.images is x, "measuring puts back the very object"
    other.attributes.load(one.attributes.state())
    for net in (one.model, other.model):
        assert net.plan["now"] == [4]  # pyright: ignore
        assert net.plan["itself"] is net.plan is net.scaled.plan  # pyright: ignore
        assert all(getattr(net.scaled, name) is getattr(net, name) for name in ("array", "mean"))
        assert (net.scaled.drawing, net.scaled.history) == net.pair  # pyright: ignore
        assert net.scaled.history is net.pair[1]  # pyright: ignore
        assert net.scaled.view.untyped_storage().data_ptr() == net.mean.untyped_storage().data_ptr()
    assert torch.equal(other.model.images, x)  # pyright: ignore
    other.attributes.load({})
    assert hasattr(other.model, "plan") == (factory == "sharing"), "what came later is gone"
    assert other.model.images is None


def test_what_is_put_back_is_written_into_nothing_else() -> None:
    def net() -> nn.Linear:
        net = nn.Linear(2, 2, bias=False)
        vars(net)["alias"], vars(net)["first"] = net.weight.data, [1, 2]
        vars(net)["chosen"] = net.first
        vars(net)["wide"] = torch.zeros(1).expand(3)
        return net

    one, other = net(), net()
    before, there = Attributes(one), Attributes(other)
    one.alias, one.chosen, one.wide, one.first = torch.ones(2, 2), [3], torch.arange(3.0), [1, 2]
    weight = other.weight.detach().clone()
    there.load(before.state())
    assert torch.equal(other.weight, weight)
    assert torch.equal(other.alias, torch.ones(2, 2))
    assert (other.first, other.chosen, other.wide.tolist()) == ([1, 2], [3], [0.0, 1.0, 2.0])
    x = torch.rand(2, 2)
    other.alias, kept = x, x.clone()
    with there.kept():
        other.alias = torch.zeros(2, 2)
        other.late = 3
        del other.first
    assert other.alias is x
    assert torch.equal(x, kept)
    assert (other.first, hasattr(other, "late")) == ([1, 2], False)
    del one.first
    there.load(before.state())
    assert not hasattr(other, "first")


def test_what_no_checkpoint_holds_is_said_before_the_first_step(tmp_path: Path) -> None:
    text = " ".join(said("foreign", tmp_path / "run").split())
    assert "Foreign:total" in text
    assert "keeps networks_of_ones_own.Foreign:total, networks_of_ones_own:CALLS, order and 1 more in Python" in text
    for factory in ("plain", "keeper", "depth", "lazy", "late", "thawing"):
        assert "in Python" not in said(factory, tmp_path / factory), factory


AGAIN = "does not give the same numbers again: they depend on something that neither --seed nor a checkpoint holds"


@pytest.mark.parametrize("factory", ["a_default", "a_hook", "a_system", "a_system_in_tests"])
def test_numbers_that_no_seed_and_no_checkpoint_fixes_are_said(factory: str, tmp_path: Path) -> None:
    assert AGAIN in " ".join(said(factory, tmp_path / "run").split())


@undrawn
@pytest.mark.parametrize(
    "factory",
    ["plain", "plenty", "keeper", "sharing", "sharing_late", "depth", "lazy", "late", "thawing", "batch_norm"],
)
def test_numbers_that_come_again_are_not_said_to_be_others(factory: str) -> None:
    example = torch.rand(8, 1, 8, 8)
    made = make_learner(resolve(config(factory, rule="bp")), shape=(1, 8, 8), classes=10, example=example)
    assert not made.notes


def test_a_counter_in_another_module_of_the_package_is_said(tmp_path: Path) -> None:
    package = tmp_path / "package_that_counts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text("rate = 1.0\ndef decay():\n global rate\n rate *= 0.999\n return rate\n")
    (package / "net.py").write_text(
        "from torch import nn\nfrom . import layers\n"
        "class Net(nn.Sequential):\n def forward(self, x): return super().forward(x) * layers.decay()\n"
        "def make(classes): return Net(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    options = resolve(TrainConfig("digits", model="package_that_counts.net:make"))
    made = make_learner(options, shape=(1, 8, 8), classes=10, example=torch.rand(2, 1, 8, 8))
    assert [AGAIN in note for note in made.notes] == [True]


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("texts", r"has [\d,]+ letters, and a checkpoint holds 60,000; .* in is 'kept': let it be a tensor"),
        ("banked", r"would have [\d,]+ bytes, and with more than 150,000, half the memory .* is 'bank'"),
    ],
)
def test_what_grows_beyond_a_checkpoint_ends_at_the_save_with_its_name(
    factory: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(config(factory, epochs=1), tmp_path / "whole")
    with monkeypatch.context() as small:
        small.setattr(_checkpoints, "JSON_LIMIT", 60_000)
        small.setattr(_checkpoints, "available", lambda: 300_000 if factory == "banked" else 1 << 40)
        with pytest.raises(WriteError, match=rf"cannot write .*checkpoint-\d+.safetensors: .*{words}.*--resume"):
            begin(config(factory, epochs=1), tmp_path / "run")
    assert RunFolder(tmp_path / "run").read_status()["status"] == "failed"
    assert go_on(tmp_path / "run").status == "done", "nothing is lost that was there"
    assert same(tmp_path / "run", tmp_path / "whole")


def test_what_no_checkpoint_could_give_back_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_own_models, "JSON_LIMIT", 60_000)
    with pytest.raises(ConfigError, match=r"keeps 3\d\d,\d\d\d letters in 'kept', and a checkpoint holds 60,000"):
        begin(config("many_texts"), tmp_path / "run")
    begin(config("large", epochs=1, optimizer="adam"), tmp_path / "before")
    monkeypatch.setattr(_checkpoints, "available", lambda: 800_000)
    with pytest.raises(ConfigError, match=r"a checkpoint would have 4\d\d,\d\d\d bytes, .* 400,000, half the memory"):
        begin(config("large"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_was_saved_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much larger than the network what it keeps may be."""
    outcome = begin(config("large", epochs=1), tmp_path / "run")
    path = outcome.run.checkpoints()[-1]
    made = learner("large")
    made.model.bank = torch.ones(40_000_000)  # pyright: ignore
    with seeded(0):
        state = _checkpoints.restore(path, learner("large"))
        _checkpoints.save(outcome.run, made, state)
        other = learner("large")
        _checkpoints.restore(path, other)
        assert torch.equal(other.model.bank, made.model.bank)  # pyright: ignore
    monkeypatch.setattr(_checkpoints, "available", lambda: 1_000_000)
    monkeypatch.setattr(_checkpoints, "JSON_LIMIT", 0)
    with pytest.raises(RunError, match=r"160,\d\d\d,\d\d\d bytes, .* half the memory that there is\): go on where"):
        _checkpoints.restore(path, other)


def test_weights_that_the_seed_does_not_fix_are_said(tmp_path: Path) -> None:
    assert "draws first.bias by other generators" in " ".join(said("entropy", tmp_path / "entropy").split())
    assert "returns the same weights at every call" in " ".join(said("once", tmp_path / "once").split())
    made = sys.modules["networks_of_ones_own"].MADE[0]
    assert all(parameter.grad is None for parameter in made.parameters()), "a copy is trained"
    assert not hasattr(made, "_falign")


@pytest.mark.parametrize("factory", ["doubles", "halves", "nothing"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_other_types_and_empty_layers_train(factory: str, tmp_path: Path) -> None:
    assert begin(config(factory, check_law=True, momentum=0.0), tmp_path / "run").status == "done"


REFUSED = {
    "tuples": r"returned tuple for 2 images, expected \(2, 10\) in training",
    "dicts": r"returned dict for 2 images, expected \(2, 10\) in evaluation",
    "cut": "its output has no gradient",
    "whole": "returned numbers of type int16 in training",
    "booleans": "returned numbers of type bool in training",
    "complexes": "has complex numbers in '1.weight'",
    "wide": "failed: it needs more memory than there is",
    "memory": "failed: it needs more memory than there is",
    "quits": "failed: SystemExit: no more",
    "gives_up": "failed: GeneratorExit",
    "lines": r"failed: OSError: one two \\x1b\[31mx+…",
    "meta": "has '.*' on the meta device",
    "script": "returned a .*Module, expected the plain module",
    "unused": "has a layer without a shape, 'spare'",
    "frozen": "has no parameter that learns",
    "in_place": "changes the images that it is given",
    "two": "missing 1 required positional argument: 'mask'",
    "sparse": "has sparse gradients, of 'table.weight'",
    "Net.forward": "cannot be called",
    "np.random.seed": "returned a NoneType",
    "os.abort": "is a function of Python itself",
    "x.": "expected mlp:SIZES, lenet",
    "no.such": "cannot be imported: AttributeError",
}


@pytest.mark.parametrize("factory", REFUSED)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_what_cannot_train_is_refused_before_the_first_step(factory: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=REFUSED[factory]) as caught:
        begin(config(factory, rule="bp"), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("batch", [1, 4, 359, 1436])
def test_a_batch_of_one_image_is_refused_where_it_cannot_be_normalised(batch: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch of one image, and one will come: give another --batch-size"):
        begin(config("batch_norm", batch_size=batch), tmp_path / "run")
    begin(config("plain", batch_size=batch, epochs=0), tmp_path / "plain")
    begin(config("batch_norm", batch_size=100, epochs=0), tmp_path / "run")


@pytest.mark.parametrize(
    "source", ["import nothing_of_this_name", "raise SystemExit", "1 +", "while True: raise KeyError(3)"]
)
def test_imports_that_fail(source: str, tmp_path: Path) -> None:
    (tmp_path / "networks_that_cannot_be_imported.py").write_text(source)
    with pytest.raises(ConfigError, match="networks_that_cannot_be_imported:make cannot be imported: ") as caught:
        build("networks_that_cannot_be_imported:make", shape=(1, 8, 8), classes=10, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["a..b:c", ".a:b", ":x", "x:", "a:b:c", "a b:c", "a:\0", "a\ud800:b", "1:2", "é è:x"])
def test_names_that_are_none(model: str) -> None:
    with pytest.raises(ConfigError, match="expected mlp:SIZES"):
        build(model, shape=(1, 8, 8), classes=10, seed=0)


def test_names_of_other_scripts_are_names(tmp_path: Path) -> None:
    (tmp_path / "réseaux.py").write_text("from torch.nn import Flatten as größe", encoding="utf-8")
    assert isinstance(build("réseaux:größe", shape=(1, 8, 8), classes=10, seed=0), nn.Flatten)
    del sys.modules["réseaux"]


@pytest.mark.parametrize(
    "model",
    [
        "mlp:784-99999999999-10",
        "mlp:784-9" + "0" * 5000 + "-10",
        "mlp:784-" + "1-" * 20000 + "10",
        "mlp:784-200000-200000-10",
    ],
    ids=len,
)
def test_networks_that_no_memory_holds(model: str) -> None:
    with pytest.raises(ConfigError, match=r"no memory holds that|GiB of memory, and this machine has") as caught:
        build(model, shape=(1, 28, 28), classes=10, seed=0, room=400)
    assert len(str(caught.value)) < 400


def test_large_images_for_lenet() -> None:
    with pytest.raises(ConfigError, match="GiB of memory, and this machine has"):
        build("lenet", shape=(3, 10**6, 10**6), classes=10, seed=0)


@undrawn
def test_global_generators_are_seeded_and_put_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    before = generator_states()
    with seeded(2**63 + 5):
        first, at = draw(), generator_states()
        then = draw()
        restore_generator_states(at)
        assert draw()[:2] == then[:2]
    assert generator_states() == before
    with seeded(2**63 + 5):
        assert draw() == first
    with seeded(6):
        assert all(one != other for one, other in zip(draw(), first, strict=True))
