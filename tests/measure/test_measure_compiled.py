"""Measuring models that are compiled, whole, in place or in parts; annotations must not be checked here."""

import pytest
import torch

from cases import batch, build, loss_of
from falign.measure import Monitor, alignment

BACKEND = "aot_eager"
pytestmark = [
    pytest.mark.compiled,
    pytest.mark.xdist_group("compiled"),  # the compiler takes seconds to import
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("rule", ["fa", "dfa", "adafa"])
def test_compiled_model(rule):
    model, (x, y) = build("mlp", rule), batch("mlp")
    expected = str(alignment(model, loss_of, x, y))
    compiled = torch.compile(model, backend=BACKEND)
    loss_of(compiled(x), y).backward()
    model.zero_grad()
    model.load_state_dict(build("mlp", rule).state_dict())
    assert str(alignment(compiled, loss_of, x, y)) == expected
    assert str(alignment(model, loss_of, x, y)) == expected
    with Monitor(compiled, every=1) as monitor:
        monitor.step(loss_of, x, y)
    loss_of(compiled(x), y).backward()
    assert model[0].weight.grad.any()


def test_model_compiled_in_place_or_in_parts():
    model, (x, y) = build("mlp", "fa"), batch("mlp")
    expected = [row.gradient_angle for row in alignment(model, loss_of, x, y).layers]
    model.compile(backend=BACKEND)
    loss_of(model(x), y)
    assert [row.gradient_angle for row in alignment(model, loss_of, x, y).layers] == expected
    parts = build("mlp", "fa")
    parts[2] = torch.compile(parts[2], backend=BACKEND)
    loss_of(parts(x), y)
    assert [row.gradient_angle for row in alignment(parts, loss_of, x, y).layers] == expected
