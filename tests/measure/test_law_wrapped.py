"""The law in the loops that people run: compiled, data-parallel, mixed precision, clipped, accumulated, resumed."""

import io

import pytest
import torch
from law_training import batches, built, by_layer, conv, inputs, mlp, norm, sgd, step, trained
from torch import nn

import falign
from falign.measure.law import ConservationLaw


def _losses(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def test_accumulated_and_clipped_gradients():
    model = built(mlp, "usf")
    optimizer = sgd(model)
    law = ConservationLaw(model, optimizer)
    for count, (x, y) in enumerate(batches(60)):
        (_losses(model, x, y) / 3).backward()
        if count % 3 == 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad(set_to_none=bool(count % 2))
    assert law.steps == 20
    assert max(row.residual for row in law.report().laws) <= 1e-13


def test_gradients_clipped_one_by_one_are_no_longer_those_of_the_rule():
    model = built(mlp)
    optimizer = sgd(model)
    law = ConservationLaw(model, optimizer)
    for x, y in batches(10):
        optimizer.zero_grad()
        _losses(model, x, y).backward()
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        optimizer.step()
    assert not law.report().holds


def test_a_closure():
    model = built(mlp)
    optimizer = sgd(model)
    law = ConservationLaw(model, optimizer)
    for x, y in batches(20):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = _losses(model, x, y)
            loss.backward()
            return loss

        assert isinstance(optimizer.step(closure), torch.Tensor)
    assert law.steps == 20
    assert max(row.residual for row in law.report().laws) <= 1e-13


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_and_the_steps_that_it_skips(fused):
    model = built(mlp, dtype=torch.float32)
    optimizer = sgd(model, fused=fused)
    law, scaler = ConservationLaw(model, optimizer), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for count, (x, y) in enumerate(batches(30, dtype=torch.float32)):
        optimizer.zero_grad()
        scaler.scale(_losses(model, x, y)).backward()
        if count % 10 == 4:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert law.steps == 27
    report = law.report()
    assert report.holds
    assert max(row.residual for row in report.laws) < 1e-6


@pytest.mark.parametrize("make", [mlp, norm])
def test_autocast(make):
    model = built(make, dtype=torch.float32)
    optimizer = sgd(model)
    law = ConservationLaw(model, optimizer)
    for x, y in batches(30, dtype=torch.float32):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = _losses(model, x, y)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())  # following the first pass left no casts behind
        optimizer.step()
    report = law.report()
    assert 1e-4 < report.tolerance < 0.5
    assert report.holds
    assert max(row.residual for row in report.laws) < 5e-3


def test_nothing_of_the_training_changes():
    results = []
    for attached in (False, True):
        model = built(conv, "brsf")
        optimizer = sgd(model)
        law = ConservationLaw(model, optimizer) if attached else None
        torch.manual_seed(1)
        for x, y in batches(5):
            step(model, optimizer, x, y)
        results.append([p.detach().clone() for p in model.parameters()])
        if law is not None:
            law.detach()
            assert not optimizer._optimizer_step_pre_hooks
            assert law.report().holds
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_measuring_alignment_meanwhile_does_not_disturb():
    for rule in ("fa", "brsf", "adafa"):
        model = built(norm, rule)
        optimizer = sgd(model)
        law = ConservationLaw(model, optimizer)
        for x, y in batches(6):
            falign.measure.alignment(model, nn.functional.cross_entropy, x, y, optimizer=optimizer)
            step(model, optimizer, x, y)
        assert law.steps == 6
        assert by_layer(law)["1"].status == "accounted"
        assert max(row.residual for row in law.report().laws) <= 1e-13


@pytest.mark.parametrize("rule", ["fa", "adafa", "kp", "brsf"])
def test_a_resumed_run_goes_on(rule):
    model = built(mlp, rule)
    optimizer = sgd(model, weight_decay=1e-3)
    law, stream = ConservationLaw(model, optimizer), list(batches(40))
    for x, y in stream[:20]:
        step(model, optimizer, x, y)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "law": law.state_dict(), "feedback": falign.feedback_state(model)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = built(mlp, rule)
    later = sgd(resumed, weight_decay=1e-3)
    again = ConservationLaw(resumed, later)
    again.load_state_dict(saved["law"])  # before the first pass has shown which layers there are
    resumed.load_state_dict(saved["model"])
    falign.load_feedback_state(resumed, saved["feedback"])
    for x, y in stream[20:]:
        step(model, optimizer, x, y)
        step(resumed, later, x, y)
    assert again.steps == law.steps == 40
    for name, drift in law.drift().items():
        assert torch.equal(drift, again.drift()[name])
        assert torch.equal(law.residual()[name], again.residual()[name])
    assert max(row.residual for row in again.report().laws) <= 1e-13
    with pytest.raises(ValueError, match="load it into the law of the same model"):
        trained(built(conv, rule), steps=1).load_state_dict(saved["law"])


def step_of(model, optimizer, x, y):
    optimizer.zero_grad()
    _losses(model, x, y).backward()
    optimizer.step()


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model():
    torch._dynamo.reset()
    model = built(norm, "usf")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = sgd(model)
    law = ConservationLaw(compiled, optimizer)
    for x, y in batches(6):
        step_of(compiled, optimizer, x, y)
    rows = by_layer(law)
    assert law.steps == 6
    assert rows["1"].status == "drift"  # the statistics of its batches cannot be seen
    assert rows["2"].status == "accounted"
    assert max(rows[name].residual for name in ("2", "6")) <= 1e-13
    assert rows["1"].residual < 1e-3
    assert law.report().holds
    law.detach()
    law = ConservationLaw(model, optimizer)  # of what is compiled: only an example can show it
    step_of(compiled, optimizer, *next(batches(1)))
    with pytest.raises(ValueError, match="or give example="):
        law.report()


def test_direct_feedback_is_followed_from_within_its_first_pass():
    law = trained(built(mlp, "dfa"), steps=3)
    assert by_layer(law)["2"].status == "exact"


def test_passes_without_gradients_are_not_the_example():
    model = built(norm).eval()
    law = ConservationLaw(model, sgd(model))
    with torch.no_grad():
        model(inputs()[:4])
    with pytest.raises(ValueError, match="no forward pass was seen yet"):
        _ = law.laws


def test_bad_input_is_refused_in_one_sentence():
    plain = nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10)).double()
    with pytest.raises(ValueError, match="not converted"):
        ConservationLaw(plain, sgd(plain))
    model = built(mlp)
    with pytest.raises(ValueError, match="SGD has none of the parameters of this Sequential"):
        ConservationLaw(model, sgd(plain))
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="does not run on the example"):
        ConservationLaw(model, optimizer, example=inputs()[:, :9])
    law = ConservationLaw(model, optimizer)
    with pytest.raises(ValueError, match="have a law already"):
        ConservationLaw(model, optimizer)
    for asked in (law.value, law.drift, law.residual, law.report, law.state_dict):
        with pytest.raises(ValueError, match="no forward pass was seen yet"):
            asked()
    model(inputs()[:2])
    assert law.value().keys() == {"0", "2"}
    with pytest.raises(ValueError, match="no step of the optimizer was seen yet"):
        law.residual()
    with torch.no_grad():
        model[2].weight[1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"parameter '2\.weight' holds numbers that are not finite"):
        law.value()
    law.detach()
    with pytest.raises(ValueError, match=r"'2\.weight'"):
        ConservationLaw(model, optimizer)
