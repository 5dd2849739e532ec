"""What a run measures beside its loss: alignment of layers and neurons, events for TensorBoard."""

import math
from pathlib import Path
from time import sleep

import polars as pl
import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from training_runs import begin, go_on, quiet, same

import falign
from falign.lab._batches import Images
from falign.lab._checkpoints import restore
from falign.lab._learner import Learner, make_learner
from falign.lab._setup import prepare_run
from falign.lab._validate import resolve
from falign.lab.config import ConfigError, TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def config(**options) -> TrainConfig:
    fixed = {"dataset": "digits", "model": "mlp:64-24-16-10", "epochs": 2, "batch_size": 100, "measure_every": 7}
    return TrainConfig(**{**fixed, **options})


def test_the_tables_are_what_measuring_the_network_gives(tmp_path: Path) -> None:
    options = config(rule="adafa", optimizer="adam")
    outcome = begin(options, tmp_path)
    setup = prepare_run(resolve(options), data=None, progress=False)
    learner = setup.learner
    restore(outcome.run.checkpoints()[-1], learner)
    x, y = setup.probe_inputs, setup.probe_labels
    expected = falign.measure.alignment(learner.model, cross_entropy, x, y, optimizer=learner.optimizer)

    table = pl.read_parquet(tmp_path / "alignment.parquet")
    records = outcome.run.read_records()
    assert table["step"].unique(maintain_order=True).to_list() == records["step"].to_list()
    assert table.group_by("step", maintain_order=True).len()["len"].to_list() == [3] * records.height
    assert table.tail(3).drop("step", "epoch").to_dicts() == expected.rows()
    last = records.row(-1, named=True)
    assert (last["dominance"], last["descent"]) == (expected.dominance, expected.descent)
    assert [last[f"angle_fc{layer}"] for layer in (1, 2, 3)] == [row.gradient_angle for row in expected.layers]

    neurons = pl.read_parquet(tmp_path / "neurons.parquet")
    assert neurons.columns == ["layer", "neuron", "alignment", "cosine"]
    for layer in ("fc2", "fc3"):
        own = neurons.filter(layer=layer)
        assert own["neuron"].to_list() == list(range(own.height))
        assert own["alignment"].to_list() == expected.neurons[layer].tolist()
        assert own["cosine"].to_list() == expected.neuron_cosines[layer].tolist()


@pytest.mark.parametrize(
    ("shape", "number", "dtype", "expected"),
    [
        ((1, 28, 28), 2500, "float32", [1000, 1000, 500]),
        ((3, 160, 200), 100, "float32", [43, 43, 14]),
        ((3, 160, 200), 43, "float64", [21, 21, 1]),
        ((1, 1500, 1500), 3, "float64", [1, 1, 1]),
    ],
    ids=str,
)
def test_the_test_takes_so_many_images_at_once_as_have_16_mib(
    shape: tuple[int, int, int], number: int, dtype: str, expected: list[int]
) -> None:
    x = torch.rand(1, *shape)
    stored = torch.zeros(1, *shape, dtype=torch.uint8).expand(number, *shape)
    one = torch.ones(shape[0], 1, 1, dtype=getattr(torch, dtype))
    images = Images(pixels=stored, labels=torch.zeros(number, dtype=torch.int64), mean=one, deviation=one)
    options = resolve(config(model=f"mlp:{math.prod(shape)}-2-10", dtype=dtype))
    learner, sizes = make_learner(options, shape=shape, classes=10, example=x.to(one.dtype)), []
    learner.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    learner.test(images)
    assert sizes == expected


def test_columns_keep_their_types_where_nothing_could_be_measured(tmp_path: Path) -> None:
    begin(config(rule="bp", epochs=0), tmp_path)
    table = pl.read_parquet(tmp_path / "alignment.parquet")
    assert table["weight_angle"].null_count() == 3
    kinds = {"step": pl.Int64, "layer": pl.String, "kind": pl.String, "neurons": pl.Int64, "unreadable": pl.String}
    assert dict(table.schema) == {name: kinds.get(name, pl.Float64) for name in table.columns}
    assert pl.read_parquet(tmp_path / "neurons.parquet").height == 0


def test_a_probe_whose_loss_is_not_finite_is_a_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Learner.step

    def blown(learner: Learner, x: torch.Tensor, y: torch.Tensor, done: int) -> tuple[float, int]:
        found = step(learner, x, y, done)
        with torch.no_grad():
            learner.model.get_parameter("fc3.weight").fill_(3e38 if done == 6 else 0.0)
        return found

    monkeypatch.setattr(Learner, "step", blown)
    outcome = begin(config(), tmp_path)
    assert (outcome.status, outcome.step) == ("diverged", 8)
    assert outcome.run.read_records()["step"].to_list() == [0]
    assert pl.read_parquet(tmp_path / "alignment.parquet")["step"].unique().to_list() == [0]


def test_an_alignment_in_checkpoints_does_not_grow_their_json(tmp_path: Path) -> None:
    """Safetensors refuses more than 100 MB of it."""
    outcome = begin(config(measure_every=1, epochs=1), tmp_path)
    with safe_open(outcome.run.checkpoints()[-1], framework="pt") as file:
        length = len(file.metadata()["falign"])
    assert length < 16_000, "of which the generator of NumPy is the most"


accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def events(folder: Path):
    """As TensorBoard reads them."""
    found = accumulators.EventAccumulator(str(folder / "tensorboard"), size_guidance=dict.fromkeys(SIZES, 0))
    return found.Reload()


SIZES = ("scalars", "histograms", "compressedHistograms", "images", "audio", "tensors")


def scalars(folder: Path, tag: str) -> dict[int, float]:
    found = [(event.step, event.value) for event in events(folder).Scalars(tag)]
    assert len(dict(found)) == len(found), "no step twice"
    return dict(found)


def test_tensorboard_reads_what_the_tables_hold(tmp_path: Path) -> None:
    begin(config(tensorboard=True), tmp_path)
    tags = events(tmp_path).Tags()
    assert {"loss/train", "loss/test", "accuracy/train", "accuracy/test", "network/dominance D"} <= set(tags["scalars"])
    assert tags["histograms"] == ["alignment of neurons/fc2", "alignment of neurons/fc3"]
    table = pl.read_parquet(tmp_path / "alignment.parquet")
    records = pl.read_parquet(tmp_path / "records.parquet")
    for tag, rows, column in [
        ("angle of the gradient/fc2", table.filter(layer="fc2"), "gradient_angle"),
        ("share of aligned neurons/fc3", table.filter(layer="fc3"), "aligned_neurons"),
        ("network/dominance D", records, "dominance"),
        ("loss/train", records, "train_loss"),
        ("accuracy/test", records, "test_accuracy"),
    ]:
        expected = dict(rows.select("step", column).drop_nulls().iter_rows())
        assert scalars(tmp_path, tag) == pytest.approx(expected, rel=1e-6)
    neurons = pl.read_parquet(tmp_path / "neurons.parquet").filter(layer="fc2")
    last = events(tmp_path).Histograms("alignment of neurons/fc2")[-1]
    assert last.step == 30
    assert last.histogram_value.num == neurons.height
    assert last.histogram_value.sum == pytest.approx(neurons["cosine"].sum(), abs=1e-5)


@pytest.mark.parametrize("died", [False, True], ids=["stopped", "killed"])
def test_a_resumed_run_goes_on_in_tensorboard(died: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(tensorboard=True)
    begin(options, tmp_path / "whole")
    folder = tmp_path / "parts"
    if not died:
        begin(config(tensorboard=True, epochs=1), folder)
    else:
        step = Learner.step

        def killed(learner: Learner, x: torch.Tensor, y: torch.Tensor, done: int) -> tuple[float, int]:
            if done == 24:  # after the measurement at step 21, which no checkpoint has
                raise KeyboardInterrupt
            return step(learner, x, y, done)

        with monkeypatch.context() as patched:
            patched.setattr(Learner, "step", killed)
            with pytest.raises(KeyboardInterrupt):
                begin(options, folder)
        assert max(scalars(folder, "network/loss")) == 21
    sleep(1.1)  # files of events written by one process in one second are read in the order of a count without zeros
    go_on(folder, epochs=2)
    assert same(folder, tmp_path / "whole")
    for tag in ("network/loss", "loss/test", "angle of the gradient/fc1"):
        assert scalars(folder, tag) == scalars(tmp_path / "whole", tag)


def test_a_run_that_is_replaced_leaves_no_events_of_the_old_one(tmp_path: Path) -> None:
    from falign.lab._train import train

    begin(config(tensorboard=True), tmp_path)
    (tmp_path / "tensorboard" / "notes.txt").write_text("mine")
    train(config(tensorboard=True, epochs=1), tmp_path, replaces=True, console=quiet())
    assert max(scalars(tmp_path, "network/loss")) == 15
    assert (tmp_path / "tensorboard" / "notes.txt").exists()


def test_without_tensorboard_one_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("falign.lab._validate.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'--tensorboard needs .*: pip install "falign\[tensorboard\]"'):
        begin(config(tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
