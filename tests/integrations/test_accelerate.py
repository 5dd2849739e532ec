"""Accelerate: a converted model is prepared like any other, and its feedback is part of a checkpoint."""

import pytest
import torch
from digits import loader, network
from torch.nn.functional import cross_entropy

import falign
from falign.integrations import FeedbackState
from falign.measure import Monitor

accelerate = pytest.importorskip("accelerate", reason='Accelerate is not installed: pip install "falign[hf]"')

pytestmark = pytest.mark.xdist_group("transformers")


def trained(steps, rule, folder=None, *, seed=0, resumes=False):
    """Train for some steps; save at the end, or begin from what was saved."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    model = falign.convert(network(), rule, seed=seed, example=torch.zeros(4, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    monitor = Monitor(prepared, every=2, optimizer=optimizer)
    state = FeedbackState(model, monitor)
    accelerator.register_for_checkpointing(state)
    begin = 0
    if resumes:
        accelerator.load_state(str(folder))
        begin = monitor.count
    for number, (x, y) in enumerate(batches):
        if not begin <= number < begin + steps:
            continue
        monitor.step(cross_entropy, x, y)
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(prepared(x), y))
        optimizer.step()
    if folder is not None and not resumes:
        accelerator.save_state(str(folder))
    return model, monitor


@pytest.mark.parametrize(("rule", "seed"), [("dfa", 5), ("kp", 0)])
def test_a_checkpoint_goes_on_to_the_same_numbers(rule, seed, tmp_path):
    whole, monitor = trained(6, rule)
    trained(3, rule, tmp_path)
    resumed, further = trained(3, rule, tmp_path, seed=seed, resumes=True)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    feedback = falign.feedback_state(resumed)
    assert all(torch.equal(B, feedback[name]) for name, B in falign.feedback_state(whole).items())
    assert further.records == monitor.records
    assert {row["step"] for row in monitor.records} == {0, 2, 4}


def test_it_learns_by_the_rule():
    model, _ = trained(4, "fa")
    by_hand = falign.convert(network(), "fa")
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for (x, y), _ in zip(loader(), range(4), strict=False):
        optimizer.zero_grad()
        cross_entropy(by_hand(x), y).backward()
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_measurements_see_through_the_wrapped_optimizer():
    model, batches = falign.convert(network(), "fa"), loader()
    accelerator = accelerate.Accelerator(cpu=True)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer, batches = accelerator.prepare(model, plain, batches)
    law = falign.measure.ConservationLaw(prepared, optimizer)
    for x, y in batches:
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(prepared(x), y))
        optimizer.step()
    assert law.report().steps == 8
    assert str(falign.measure.alignment(prepared, cross_entropy, x, y, optimizer=optimizer)) == str(
        falign.measure.alignment(model, cross_entropy, x, y, optimizer=plain)
    )


def test_one_sentence_for_a_state_of_something_else():
    with pytest.raises(ValueError, match=r"is not converted: call falign.convert"):
        FeedbackState(network())
    state = FeedbackState(falign.convert(network(), "fa"))
    with pytest.raises(ValueError, match=r"expected what FeedbackState.state_dict\(\) gave"):
        state.load_state_dict({"weights": 1})
