"""Direct rules on attention, recurrent nets and language models against definitions that are written out by hand."""

import copy

import pytest
import torch
from torch import nn

import falign
from cases import relative
from direct_networks import NETWORKS, Cuts, Recurrent, build, defined, feedback_of, loss_of, taken

SELDOM = {  # of the recurrent modules each size and each output stay once
    *(f"rnn, {how}" for how in ("last", "mean")),
    *(f"gru of two layers, {how}" for how in ("all", "last")),
    *(f"lstm both ways, {how}" for how in ("all", "mean")),
    *(f"lstm projected, {how}" for how in ("all", "last")),
    *("RNNCell", "GRUCell, last", "LSTMCell, last"),
}


def named(names):
    """Parameters of a test, of which some are slow."""
    return [pytest.param(name, marks=pytest.mark.slow if name in SELDOM else ()) for name in names]


RECURRENT = [name for name in NETWORKS if any(word in name.lower() for word in ("rnn", "gru", "lstm"))]


@pytest.mark.parametrize("name", named(NETWORKS))
def test_gradients_equal_the_definition_at_any_length(name):
    """On the example's length and on others, S = T among them; and no weight carried an error."""
    model, inputs = build(name), NETWORKS[name][1]
    plain = copy.deepcopy(model)
    falign.convert(model, "dfa", example=inputs(5))
    for length in (5, 4, 7):
        x = inputs(length)
        assert relative(taken(model, x), defined(plain, x, feedback_of(model))) <= 1e-12
    assert falign.transport(model, inputs(5), loss_of) == {}
    assert falign.verify(model, inputs(5), loss_of).worst.error <= 1e-12


@pytest.mark.parametrize("name", ["translator", "decoder"])
def test_sources_of_the_length_of_the_targets_are_still_other_positions(name):
    model, inputs = build(name), NETWORKS[name][1]
    plain = copy.deepcopy(model)
    falign.convert(model, "dfa", example=inputs(4))  # the sources have length 4 as well
    for length in (4, 6):
        x = inputs(length)
        assert relative(taken(model, x), defined(plain, x, feedback_of(model))) <= 1e-12


@pytest.mark.parametrize("name", named(RECURRENT))
def test_eprop_has_no_feedback_through_the_states(name):
    """B_hh = 0: the states' products hand nothing back; gates, cell state and leak are walked back exactly."""
    model, x = build(name), NETWORKS[name][1](5)
    plain = copy.deepcopy(model)
    falign.convert(model, "eprop", example=x)
    assert relative(taken(model, x), defined(plain, x, feedback_of(model), through_time=False)) <= 1e-12
    assert falign.transport(model, x, loss_of) == {}
    assert falign.verify(model, x, loss_of)


def test_eprop_is_direct_feedback_alignment_where_nothing_recurs():
    x = NETWORKS["gpt"][1](5)
    one, other = (falign.convert(build("gpt"), rule, example=x) for rule in ("dfa", "eprop"))
    assert relative(taken(one, x), taken(other, x)) == 0


@pytest.mark.parametrize("name", named(NETWORKS))
def test_backpropagation_is_the_plain_networks(name):
    """Within ``falign.backprop``, without gradients, and behind ``revert``; the class, too, is as before."""
    model, x = build(name), NETWORKS[name][1](5)
    plain = copy.deepcopy(model)
    expected, classes = taken(plain, x), [type(module) for module in plain.modules()]
    falign.convert(model, "dfa", example=x)
    with torch.no_grad():
        assert torch.equal(model(*x), plain(*x))
    with falign.backprop(model):
        assert relative(taken(model, x), expected) <= 1e-13
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}
    plain.load_state_dict(model.state_dict())
    falign.revert(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(relative_of == 0 for relative_of in [relative(taken(model, x), expected)])


@pytest.mark.parametrize("name", named(NETWORKS))
def test_check_leaves_the_model_as_it_was(name):
    model, x = build(name), NETWORKS[name][1](5)
    before = {key: list(vars(module)) for key, module in model.named_modules()}
    classes = {key: type(module) for key, module in model.named_modules()}
    assert falign.check(model, "dfa", example=x) == []
    assert {key: list(vars(module)) for key, module in model.named_modules()} == before
    assert {key: type(module) for key, module in model.named_modules()} == classes


class Packed(nn.Module):
    """A recurrent module on packed sequences."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(6 * (1 + rnn.bidirectional), 5)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = self.rnn(packed)
        return self.head(nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0])


@pytest.mark.parametrize("cls", [nn.RNN, nn.GRU, nn.LSTM])
def test_packed_sequences_get_the_errors_of_their_steps(cls):
    """As each sequence by itself, without packing: steps behind an end are none."""
    torch.manual_seed(0)
    x, lengths = torch.randn(4, 6, 8, dtype=torch.float64), torch.tensor([3, 6, 2, 5])
    model = Packed(cls(8, 6, 2, batch_first=True, bidirectional=True)).double()
    plain = copy.deepcopy(model)
    falign.convert(model, "dfa", example=(x, lengths))

    def loss(y):
        return sum(y[n, :length].square().sum() for n, length in enumerate(lengths.tolist()))

    loss(model(x, lengths)).backward()
    total: dict[str, torch.Tensor] = {}
    for n, length in enumerate(lengths.tolist()):
        alone, cut = Recurrent(copy.deepcopy(plain.rnn), "all").double(), Cuts()
        alone.head.load_state_dict(plain.head.state_dict())
        output = alone.written(cut, x[n : n + 1, :length])
        cut.backward(output.square().sum(), output, feedback_of(model))
        total = {name: p.grad + total.get(name, 0.0) for name, p in alone.named_parameters()}
    assert relative({name: p.grad for name, p in model.named_parameters()}, total) <= 1e-12
    assert falign.transport(model, (x, lengths), loss) == {}
    assert falign.verify(model, (x, lengths), loss)


def test_a_projection_behind_packed_sequences_is_refused():
    model = Packed(nn.LSTM(8, 9, batch_first=True, proj_size=6))
    x, lengths = torch.randn(4, 6, 8), torch.tensor([3, 6, 2, 5])
    (problem,) = falign.check(model, "dfa", example=(x, lengths))
    assert "takes no packed sequences in an nn.LSTM with proj_size" in problem
