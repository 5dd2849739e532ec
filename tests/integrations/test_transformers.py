"""Transformers' own trainer, on models made from a configuration: rules, losses, measurements, checkpoints."""

import json

import pytest
import torch
from torch import nn

import falign

transformers = pytest.importorskip("transformers", reason='Transformers is not installed: pip install "falign[hf]"')
pytest.importorskip("accelerate", reason='Accelerate is not installed: pip install "falign[hf]"')
from falign.integrations import transformers_callback, transformers_loss  # noqa: E402  # beside what it needs

pytestmark = [pytest.mark.xdist_group("transformers")]

WORDS, LENGTH = 40, 10


def texts(count: int = 48) -> list[dict[str, torch.Tensor]]:
    """Sequences in which every word follows from the one before it."""
    made = torch.Generator().manual_seed(2)
    starts = torch.randint(WORDS, (count, 1), generator=made)
    ids = (starts + 7 * torch.arange(LENGTH)) % WORDS
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def sentences(count: int = 48) -> list[dict[str, torch.Tensor]]:
    return [{**row, "labels": row["input_ids"][0] % 3} for row in texts(count)]


def gpt() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert(**options) -> nn.Module:
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        **{"num_labels": 3, **options},
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def batch(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trainer(model, folder, *callbacks, rows=None, **options):
    loss = options.pop("compute_loss_func", None)
    kind = options.pop("kind", transformers.Trainer)
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "lr_scheduler_type": "constant", "weight_decay": 0.1,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**{**settings, **options})
    rows = texts() if rows is None else rows
    return kind(model=model, args=arguments, train_dataset=rows, compute_loss_func=loss, callbacks=list(callbacks))


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("how", ["usf", "dfa, output=", "dfa, error_at="])
def test_a_gpt_learns_and_its_gradients_are_the_rules(how, tmp_path):
    model, own = gpt(), batch(texts(4))
    example = {"input_ids": own["input_ids"]}
    options = {"usf": {}, "dfa, output=": {"output": "logits"}, "dfa, error_at=": {"error_at": "transformer.ln_f"}}[how]
    falign.convert(model, how[:3], example=example, **options)
    loss = transformers_loss(model)
    run = trainer(model, tmp_path, compute_loss_func=loss if "output" in options else None, max_steps=25)
    run.train()
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    found = falign.verify(model, example, lambda outputs: loss(outputs, own["labels"]))
    assert found.worst.error < found.tolerance


def test_a_direct_rule_at_the_logits_refuses_the_loss_inside_the_model(tmp_path):
    model = gpt()
    falign.convert(model, "dfa", example={"input_ids": batch(texts(4))["input_ids"]}, output="logits")
    with pytest.raises(RuntimeError, match="output"):
        trainer(model, tmp_path).train()


@pytest.mark.parametrize("kind", ["gpt", "classes", "regression"])
def test_the_loss_is_the_models_own(kind, tmp_path):
    """The same weights as by the loss inside the model, and as by two accumulated batches of half the size."""
    rows = texts() if kind == "gpt" else sentences()
    if kind == "regression":
        rows = [{**row, "labels": row["labels"].float()} for row in rows]
    ends = []
    for helped, size, accumulated in ((False, 8, 1), (True, 8, 1), (True, 4, 2)):
        model = gpt() if kind == "gpt" else bert(num_labels=1 if kind == "regression" else 3)
        loss = transformers_loss(model) if helped else None
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        trainer(model, tmp_path, rows=rows, compute_loss_func=loss, max_steps=2, optim="sgd", **sizes).train()
        ends.append(dict(model.named_parameters()))
    for name, weight in ends[0].items():
        for other in ends[1:]:
            assert torch.allclose(weight, other[name], atol=1e-6), name


@pytest.mark.parametrize(("rule", "seed"), [("fa", 5), ("kp", 0)])
def test_a_checkpoint_goes_on_to_the_same_numbers(rule, seed, tmp_path):
    """Weights, feedback and records, also where the script has another seed by then."""
    probe, found = batch(texts(4)), []
    example = {"input_ids": probe["input_ids"]}
    for resumes in (False, True):
        model = falign.convert(gpt(), rule, example=example, seed=seed if resumes else 0)
        callback = transformers_callback(probe=probe, every=2)
        run = trainer(model, tmp_path, callback, save_strategy="steps", save_steps=3)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resumes else None)
        found.append((model, callback.monitor.records, run.state.log_history))
    (whole, records, history), (resumed, further, _) = found
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    feedback = falign.feedback_state(resumed)
    assert all(torch.equal(B, feedback[name]) for name, B in falign.feedback_state(whole).items())
    assert further == records
    assert sorted({row["step"] for row in records}) == [0, 2, 4]
    measured = [entry["network/loss"] for entry in history if "network/loss" in entry]
    assert measured == [row["loss"] for row in records if row["layer"] == records[0]["layer"]]
    kept = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert sum("network/loss" in entry for entry in kept) == 3


def test_targets_through_a_trainer_of_ones_own(tmp_path):
    class Targeted(transformers.Trainer):
        def compute_loss(self, model, inputs, **options):
            with falign.targets(self.model, inputs["labels"]):
                return super().compute_loss(model, inputs, **options)

    model = bert()
    example = {"input_ids": batch(texts(4))["input_ids"]}
    falign.convert(model, "drtp", example=example, output="logits")
    loss = transformers_loss(model)
    run = trainer(model, tmp_path, rows=sentences(), kind=Targeted, compute_loss_func=loss)
    run.train()
    assert len(losses(run)) == 6


def test_one_sentence_for_what_cannot_be(tmp_path):
    model = falign.convert(gpt(), "fa", example={"input_ids": batch(texts(4))["input_ids"]})
    with pytest.raises(ValueError, match="probe has 'input_ids', expected a batch with 'labels'"):
        transformers_callback(probe={"input_ids": torch.zeros(1, 2)})
    with pytest.raises(TypeError, match=r"Linear has no loss_function of its own: write a function"):
        transformers_loss(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="the loss of BertForQuestionAnswering needs start_logits"):
        transformers_loss(transformers.BertForQuestionAnswering(bert().config))
    trainer(model, tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()  # without the callback
    callback = transformers_callback(probe=batch(texts(4)))
    run = trainer(model, tmp_path, callback)
    with pytest.raises(ValueError, match=r"falign.safetensors cannot be read .*: the callback writes it at every save"):
        run.train(resume_from_checkpoint=True)
    trainer(model, tmp_path / "anew", callback, max_steps=1).train()  # the monitor of the broken one is off
