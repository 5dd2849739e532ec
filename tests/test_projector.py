"""A device in place of feedback matrices: what the layers read of it, its scale, and what it must return."""

import numpy as np
import pytest
import torch
from torch import nn

import falign
from cases import batch, build, gradients, loss_of, relative

DEVICE = torch.randn(7, 90, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


class Optics:
    """A fixed linear map that counts its calls and sees the size of what it is given."""

    def __init__(self, matrix=DEVICE):
        self.matrix, self.calls = matrix, []

    def __call__(self, error):
        self.calls.append(float(error.double().square().mean().sqrt()))
        return error @ self.matrix.to(error.dtype)


def convert(projector, case="mlp", **how):
    return falign.convert(build(case), "dfa", example=batch(case)[0], projector=projector, **how)


def test_layers_read_their_columns_and_the_gradients_are_those_of_e_b():
    x, y = batch("mlp")
    optics = Optics()
    model = convert(optics)
    del optics.calls[:]
    e = (torch.softmax(model(x), -1) - nn.functional.one_hot(y, 7)).detach().numpy() / 16
    received = {}
    model[5].register_full_backward_hook(lambda module, into, out: received.update(e=out[0]))
    taken = gradients(model, x, y)
    assert optics.calls == [pytest.approx(1)], "once a backward, with an error of unit size"
    part = model[6].feedback
    columns = DEVICE.numpy()[:, part.start : part.start + 25]
    expected = e @ columns * part.gain
    np.testing.assert_allclose(received["e"].numpy(), expected, rtol=1e-6)
    assert len({model[i].feedback.start for i in (0, 2, 4, 6)}) > 1
    given = falign.convert(build("mlp"), "dfa", example=x, feedback=falign.feedback_state(model))
    assert relative(taken, gradients(given, x, y)) <= 1e-6  # B is kept in float32


@pytest.mark.parametrize("factor", [1.0, 1e-3, 50.0])
def test_the_size_is_that_of_drawn_feedback_whatever_the_device_amplifies(factor):
    plain = falign.feedback_state(falign.convert(build("mlp"), "dfa", example=batch("mlp")[0], scale=0.7))
    state = falign.feedback_state(convert(Optics(factor * DEVICE), scale=0.7))
    for name, matrix in state.items():
        assert float(matrix.norm() / plain[name].norm()) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("case", ["mlp", "conv", "sequence"])
def test_it_is_verified_on_every_network(case):
    x, y = batch(case)
    outputs = {"mlp": 7, "conv": 5, "sequence": 4}[case]
    device = torch.randn(outputs, 700, generator=torch.Generator().manual_seed(1), dtype=torch.float32).double()
    model = convert(Optics(device), case)
    assert falign.verify(model, x, lambda output: loss_of(output, y))


def test_a_loss_scale_passes_and_an_overflow_is_the_scalers_business():
    x, y = batch("mlp")
    model = convert(lambda error: torch.tanh(error @ DEVICE.to(error.dtype)))  # not even linear
    taken = gradients(model, x, y)
    model.zero_grad()
    (2.0**16 * loss_of(model(x), y)).backward()
    assert relative({n: p.grad / 2.0**16 for n, p in model.named_parameters()}, taken) <= 1e-14
    (float("inf") * loss_of(model(x), y)).backward()


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("projector", "how", "said"),
    [
        (3, {}, "projector is a int, expected a callable (batch, outputs) -> (batch, N)"),
        (Optics(), {"rule": "fa"}, "is for direct rules with fixed feedback (dfa, drtp, eprop), not for 'fa'"),
        (Optics(), {"rule": "dkp"}, "projector= is for direct rules with fixed feedback"),
        (Optics(), {"feedback": "uniform"}, "projector= takes the place of the feedback: leave feedback= out"),
        (Optics(DEVICE[:, :20]), {}, "returns 20 numbers for an error, fewer than layer '2' has inputs, 30"),
        (lambda e: e.sum(), {}, "the projector returned () for errors (7, 7), expected (7, N)"),
        (lambda e: [e], {}, "the projector returned a list"),
        (lambda e: e @ DEVICE.float() * float("nan"), {}, "numbers that are not finite for errors (7, 7) that are"),
        (lambda e: torch.zeros(len(e), 90), {}, "nothing but zeros for the unit matrix"),
        (lambda e: e @ DEVICE.float()[:5], {}, "the projector failed on errors (7, 7): RuntimeError"),
    ],
)  # fmt: skip
def test_what_does_not_serve_is_said(projector, how, said):
    how = {"rule": "dfa", **how}
    (line,) = falign.check(build("mlp"), how.pop("rule"), example=batch("mlp")[0], projector=projector, **how)
    assert said in line


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda p: p[:, :-1], r"returned \(16, 89\) for errors \(16, 7\), expected \(16, 90\)"),
        (lambda p: p * float("nan"), "not finite for errors"),
    ],
)
def test_a_device_that_breaks_is_told_in_the_backward(broken, said):
    x, y = batch("mlp")
    state = {"works": True}

    def device(error):
        result = error @ DEVICE.to(error.dtype)
        return result if state["works"] else broken(result)

    model = convert(device)
    state["works"] = False
    with pytest.raises(ValueError, match=said):
        gradients(model, x, y)
