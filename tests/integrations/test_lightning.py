"""The callback in Lightning's own trainer: converts, measures, logs, and goes on from a checkpoint to the same bits."""

import pytest
import torch
from digits import data, loader, network
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate

import falign

lightning = pytest.importorskip(
    "lightning.pytorch", reason='Lightning is not installed: pip install "falign[lightning]"'
)
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from falign.integrations import lightning_callback  # noqa: E402  # beside what it needs

pytestmark = [
    pytest.mark.xdist_group("lightning"),
    pytest.mark.filterwarnings(
        "ignore:The 'train_dataloader' does not have many workers",
        "ignore:The number of training batches",
        "ignore:.*LeafSpec.*is deprecated",
        "ignore:Checkpoint directory .* exists",
    ),
]
RATE = 0.1


class Classifier(lightning.LightningModule):
    def __init__(self, decay: float = 0.0) -> None:
        super().__init__()
        self.model, self.decay = network(), decay
        self.example_input_array = torch.zeros(4, 64)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9, weight_decay=self.decay)


def trainer(folder, epochs, callback, **options):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, **options},
    )


def trained(folder, epochs, rule, checkpoint=None, seed=0):
    callback = lightning_callback(rule, module="model", options={"seed": seed}, loss_fn=cross_entropy, every=3)
    module = Classifier(decay=0.01)
    run = trainer(folder, epochs, callback)
    run.fit(module, loader(), ckpt_path=checkpoint)
    path = folder / f"{epochs}.ckpt"
    run.save_checkpoint(path)
    return module, callback, path


@pytest.mark.parametrize(("rule", "seed"), [("fa", 5), ("kp", 0), ("adafa", 0), ("probe", 0)])
def test_a_checkpoint_goes_on_to_the_same_numbers(rule, seed, tmp_path):
    """Weights, feedback and records, also where the script has another seed by then."""
    whole, record, _ = trained(tmp_path, 3, rule)
    _, _, checkpoint = trained(tmp_path, 2, rule)
    resumed, further, _ = trained(tmp_path, 3, rule, checkpoint, seed)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    feedback = falign.feedback_state(resumed)
    assert all(torch.equal(B, feedback[name]) for name, B in falign.feedback_state(whole).items())
    assert further.monitor.records == record.monitor.records
    assert [row["step"] for row in record.monitor.records if row["layer"] == "0"] == list(range(0, 24, 3))


def test_without_the_feedback_it_would_not(tmp_path):
    whole, _, _ = trained(tmp_path, 3, "fa")
    _, _, checkpoint = trained(tmp_path, 2, "fa")
    content = torch.load(checkpoint, weights_only=True)  # nothing in it is unpickled
    content["callbacks"].pop("FeedbackAlignmentCallback")
    torch.save(content, checkpoint)
    resumed, _, _ = trained(tmp_path, 3, "fa", checkpoint, seed=5)
    assert not torch.equal(whole.model[0].weight, resumed.model[0].weight)


def test_it_learns_by_the_rule_and_logs_to_the_trainers_loggers(tmp_path):
    """The weights are those of a loop by hand; the numbers logged are the monitor's."""
    import polars as pl

    callback = lightning_callback("dfa", module="model", options={"seed": 3}, loss_fn=cross_entropy, every=4)
    module = Classifier()
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, 1, callback, logger=logger)
    run.fit(module, loader())
    by_hand = falign.convert(network(), "dfa", seed=3, example=torch.zeros(4, 64))
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=RATE, momentum=0.9)
    for x, y in loader():
        optimizer.zero_grad()
        cross_entropy(by_hand(x), y).backward()
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(module.model.parameters(), by_hand.parameters(), strict=True))
    logged = pl.read_csv(tmp_path / "lightning_logs" / "version_0" / "metrics.csv")
    assert logged["step"].to_list() == [0, 4]
    angles = [row["displacement_angle"] for row in callback.monitor.records if row["layer"] == "2"]
    assert logged["angle of the optimizer's step/2"].to_list() == pytest.approx(angles)
    run.fit(module, loader())  # converted already, and the first monitor is off


def test_the_module_itself(tmp_path):
    class Whole(Classifier):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch[0]), batch[1])

    module = Whole()
    trainer(tmp_path, 1, lightning_callback("dfa")).fit(module, loader())
    alone = falign.convert(network(), "dfa")
    expected = {f"model.{name}": B for name, B in falign.feedback_state(alone).items()}
    assert {name: B.shape for name, B in falign.feedback_state(module).items()} == {
        name: B.shape for name, B in expected.items()
    }


def test_one_sentence_for_a_batch_that_is_no_pair(tmp_path):
    callback = lightning_callback("fa", module="model", loss_fn=cross_entropy)
    batches = DataLoader(
        data(32), batch_size=16, collate_fn=lambda rows: dict(zip("xy", default_collate(rows), strict=True))
    )
    with pytest.raises(TypeError, match=r"a batch is a dict, expected a pair \(x, y\): give unpack="):
        trainer(tmp_path, 1, callback).fit(Classifier(), batches)
    named = lightning_callback("fa", module="model", loss_fn=cross_entropy, unpack=lambda b: (b["x"], b["y"]))

    class Named(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    trainer(tmp_path, 1, named).fit(Named(), batches)
    assert named.monitor.records
