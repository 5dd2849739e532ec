"""Parameters that are multiplied by hand: attention, recurrent kernels, raw products, tied weights."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import falign

RULES = ["fa", "usf", "frsf", "brsf", "kp", "adafa"]


class Raw(nn.Module):
    """Products with ``@``, ``einsum`` (of a view, of a copy) and ``bmm``, and an added parameter."""

    def __init__(self):
        super().__init__()
        self.w, self.position = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter(torch.randn(5, 8))
        self.layer, self.experts = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8, 8) / 3)
        self.copied = nn.Parameter(torch.randn(8, 2, 4) / 3)
        self.batched = nn.Parameter(torch.randn(3, 8, 8) / 3)

    def forward(self, x):
        h = torch.tanh(x @ self.w + self.position)
        h = torch.tanh(self.layer(h))
        h = torch.einsum("ntd,hde->nhte", h, self.experts).mean(1)
        h = torch.tanh(torch.einsum("ntd,dab->ntba", h, self.copied).flatten(2))
        return torch.bmm(h, self.batched) @ self.w.t()


class ByBroadcast(nn.Module):
    """A product that is a multiplication and a sum, one with a vector, and two scales."""

    def __init__(self):
        super().__init__()
        self.first, self.w = nn.Linear(8, 8), nn.Parameter(torch.randn(6, 8) / 3)
        self.v, self.scale = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(5, 8))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x)) * self.scale
        h = torch.tanh((h.unsqueeze(-2) * self.w).sum(-1))
        return self.last(h * (h @ self.v).unsqueeze(-1))


class TiedHead(nn.Module):
    """An output head that is the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(torch.tanh(self.inner(self.embed(x))), self.embed.weight)


class TiedLayer(nn.Module):
    """The same with a layer that shares the embedding's parameter."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.embed(x))))


class TiedAutoencoder(nn.Module):
    """A decoder that is the encoder's weight, transposed."""

    def __init__(self):
        super().__init__()
        self.first, self.encoder, self.bias = nn.Linear(8, 8), nn.Linear(8, 5), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        h = torch.tanh(self.encoder(torch.tanh(self.first(x))))
        return F.linear(h, self.encoder.weight.t(), self.bias)


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(8, 6, **options)
        size = options.get("proj_size") or 6
        self.out = nn.Linear(2 * size if options.get("bidirectional") else size, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


class Packed(Recurrent):
    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3, 2], batch_first=True)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


class Cells(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.out = kind(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        state, outputs = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(self.out(state[0] if isinstance(state, tuple) else state))
        return torch.stack(outputs, 1)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 6), nn.Bilinear(6, 6, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.out(self.b(h, h.flip(1)))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        h = self.first(x)
        return self.last(self.attention(h, h.flip(1), h)[0])


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        h = self.first(x)
        return self.layer(h, h.flip(1))


class Kernel(nn.Module):
    """Attention by a function of torch's, on the weights of layers that are never called (WavLM)."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, h):
        h = h.transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            h, h, h, 8, 2, torch.empty(0), torch.cat((self.q.bias, self.k.bias, self.v.bias)), None, None, False, 0.0,
            self.out.weight, self.out.bias, use_separate_proj_weight=True, q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )  # fmt: skip
        return y.transpose(0, 1)


class AsksItself(nn.Module):
    """It wants the gradient of its input, which only a leaf allows."""

    def __init__(self):
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(8, 8), Kernel(), nn.Linear(8, 3)

    def forward(self, x):
        x = x[:]
        if self.training:
            x.requires_grad = True
        return self.last(self.attention(self.first(x)))


class Increment(nn.Module):
    """W + A B."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))

    def forward(self, weight):
        return weight + self.a @ self.b


class Merged(nn.Module):
    """A layer whose weight a parametrization with matrices of its own makes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        nn.utils.parametrize.register_parametrization(self.layers[2], "weight", Increment())

    def forward(self, x):
        return self.layers(x)


SEQUENCES, TOKENS = (3, 5, 8), (3, 5)
CASES = {
    "raw": (Raw, SEQUENCES),
    "broadcast": (ByBroadcast, SEQUENCES),
    "tied head": (TiedHead, TOKENS),
    "tied layer": (TiedLayer, TOKENS),
    "tied autoencoder": (TiedAutoencoder, SEQUENCES),
    "rnn": (lambda: Recurrent(nn.RNN, nonlinearity="relu", bias=False), SEQUENCES),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True), SEQUENCES),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, batch_first=True), SEQUENCES),
    "lstm, projected": (lambda: Recurrent(nn.LSTM, proj_size=4), SEQUENCES),
    "packed": (lambda: Packed(nn.LSTM, batch_first=True), SEQUENCES),
    "rnn cells": (lambda: Cells(nn.RNNCell), SEQUENCES),
    "gru cells": (lambda: Cells(nn.GRUCell), SEQUENCES),
    "lstm cells": (lambda: Cells(nn.LSTMCell), SEQUENCES),
    "bilinear": (Bilinear, SEQUENCES),
    "attention": (Attention, SEQUENCES),
    "attention, apart": (lambda: Attention(kdim=8, vdim=8, add_bias_kv=True, add_zero_attn=True), SEQUENCES),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), SEQUENCES),
    "decoder layer": (Decoder, SEQUENCES),
    "kernel of layers' weights": (AsksItself, SEQUENCES),
    "parametrization of matrices": (Merged, SEQUENCES),
}


def make(case):
    torch.manual_seed(0)
    model, shape = CASES[case][0]().double(), CASES[case][1]
    x = torch.randint(11, shape) if shape == TOKENS else torch.randn(shape, dtype=torch.float64)
    return model, x


def loss_of(output):
    return output.square().mean() + output.sin().mean()


def gradients(model, x, times=1):
    model.zero_grad()
    for _ in range(times):
        loss_of(model(x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(one, other):
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / max(float(other[n].norm()), 1e-12)) for n in one)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_definition_and_no_weight_carries_an_error(case, rule):
    model, x = make(case)
    plain, before = copy.deepcopy(model), gradients(model, x)
    falign.convert(model, rule, example=x)
    verified = falign.verify(model, x, loss_of)
    assert verified, str(verified)
    assert relative({n: g for n, g in gradients(model, x).items() if n in before}, before) > 1e-3
    with falign.backprop(model):
        assert {n: g for n, g in gradients(model, x).items() if ".B" not in n}.keys() == before.keys()
        assert relative({n: g for n, g in gradients(model, x).items() if ".B" not in n}, before) < 1e-12
    falign.revert(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert relative(gradients(model, x), before) == 0


@pytest.mark.parametrize("rule", ["dfa", "probe"])
@pytest.mark.parametrize("case", CASES)
def test_direct_rules_cut_what_multiplies(case, rule):
    model, x = make(case)
    falign.convert(model, rule, example=x)
    gradients(model, x)  # feedback that begins at 0 has moved
    verified = falign.verify(model, x, loss_of)
    assert verified, str(verified)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case not in ("raw", "broadcast", "tied head", "tied autoencoder", "kernel of layers' weights")
    ],
)
def test_modules_of_pytorch_need_no_example(case):
    model, x = make(case)
    shown = falign.convert(copy.deepcopy(model), "fa", example=x)
    falign.convert(model, "fa")
    assert relative(gradients(model, x), gradients(shown, x)) == 0
    assert falign.verify(model, x, loss_of)


@pytest.mark.parametrize("case", ["tied head", "tied autoencoder"])
def test_without_an_example_a_weight_that_is_multiplied_outside_its_layer_is_refused(case):
    model, x = make(case)
    falign.convert(model, "fa")
    with pytest.raises(RuntimeError, match="is multiplied outside its layer"):
        loss_of(model(x)).backward()


@pytest.mark.parametrize("case", [case for case in CASES if case != "parametrization of matrices"])  # W is no parameter
def test_learned_feedback_meets_its_weight(case):
    model, x = make(case)
    falign.convert(model, "kp", example=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1.0)
    parts = {
        name: (model.get_parameter(name if name in dict(model.named_parameters()) else f"{name}.weight"), name)
        for name in falign.feedback_state(model)
    }
    before = {name: float((w.detach() - falign.feedback_state(model)[name]).norm()) for name, (w, _) in parts.items()}
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    after = falign.feedback_state(model)
    for name, (w, _) in parts.items():
        assert float((w.detach() - after[name]).norm()) == pytest.approx(before[name] * 0.99**20, rel=1e-9), name


@pytest.mark.parametrize("rule", ["fa", "usf", "kp", "adafa"])
@pytest.mark.parametrize("case", ["raw", "lstm", "attention", "tied head"])
def test_accumulation_copies_and_pickles(case, rule):
    model, x = make(case)
    falign.convert(model, rule, example=x)
    once = gradients(model, x)
    assert relative(gradients(copy.deepcopy(model), x), once) == 0
    assert relative(gradients(pickle.loads(pickle.dumps(model)), x), once) == 0
    twice = gradients(model, x, times=2)
    assert relative(twice, {name: 2 * g for name, g in once.items()}) < 1e-12
    state = falign.feedback_state(model)
    other = falign.convert(make(case)[0], rule, example=x, seed=5)
    falign.load_feedback_state(other, state)
    other.load_state_dict(model.state_dict())
    assert relative(gradients(other, x), once) == 0


@pytest.mark.parametrize("rule", ["fa", "usf", "kp"])
@pytest.mark.parametrize("case", ["raw", "gru", "attention", "encoder layer", "tied head"])
def test_autocast(case, rule):
    model, x = make(case)
    model = falign.convert(model.float(), rule, example=x.float() if x.is_floating_point() else x)
    x = x.float() if x.is_floating_point() else x

    def cast(output):
        return loss_of(output.float())

    def run(**options):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, **options):
            loss = cast(model(x))
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    assert relative(run(), run(enabled=False)) < 0.2
    with torch.autocast("cpu", torch.bfloat16):
        assert falign.transport(model, x, cast) == {}


class Checkpointed(nn.Module):
    def __init__(self, inner, how):
        super().__init__()
        self.first, self.inner, self.how = nn.Linear(8, 8), inner, how

    def forward(self, x):
        h = self.first(x)
        if self.how == "off":
            return self.inner(h)
        return torch.utils.checkpoint.checkpoint(self.inner, h, use_reentrant=self.how == "reentrant")


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", ["raw", "lstm", "encoder layer"])
def test_activation_checkpointing(case, rule, how):
    inner, x = make(case)
    if how == "reentrant":
        x.requires_grad_()
    models = [Checkpointed(copy.deepcopy(inner), one).double() for one in ("off", how)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        falign.convert(model, rule, example=x)
    assert relative(gradients(models[1], x), gradients(models[0], x)) < 1e-12


class InnerCheckpoint(nn.Module):
    """Its product runs within a checkpoint, to be recomputed without the module."""

    def __init__(self):
        super().__init__()
        self.first, self.w = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(lambda h: h @ self.w, self.first(x), use_reentrant=False)


def test_checkpointing_within_the_module_that_multiplies_is_refused():
    x = torch.randn(4, 8, dtype=torch.float64)
    model = falign.convert(InnerCheckpoint().double(), "fa", example=x)
    with pytest.raises(RuntimeError, match="call activation checkpointing on the module that multiplies"):
        loss_of(model(x)).backward()


def test_transforms_are_refused_in_one_sentence():
    model, x = make("lstm")
    falign.convert(model, "fa")
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return loss_of(torch.func.functional_call(model, parameters, (x,)))

    with pytest.raises(RuntimeError, match="switch off the saved-tensor hooks"):
        torch.func.grad(loss)(parameters, x)


def test_functional_call_takes_the_parameters_that_it_is_given():
    model, x = make("raw")
    falign.convert(model, "fa", example=x)
    given = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    loss_of(torch.func.functional_call(model, given, (x,))).backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(given[name])
    assert relative({n: p.grad for n, p in given.items()}, gradients(model, x)) == 0


def test_feedback_is_given_by_the_name_of_the_parameter():
    model, _ = make("attention")
    B = torch.randn(24, 8, dtype=torch.float64)
    falign.convert(model, "fa", feedback={"attention.in_proj_weight": B})
    assert torch.equal(falign.feedback_state(model)["attention.in_proj_weight"], B)
    problems = falign.check(make("attention")[0], "fa", feedback={"attention.in_proj": B})
    assert problems == [
        "feedback names 'attention.in_proj', which takes no feedback; layers: attention.in_proj_weight, "
        "attention.out_proj.weight"
    ]


@pytest.mark.parametrize("family", ["orthogonal", "sparse(2)", "low-rank(2)", "shared"])
def test_families(family):
    model, x = make("encoder layer")
    falign.convert(model, "fa", feedback=family, scale=0.5)
    assert falign.verify(model, x, loss_of)


def test_skip_leaves_a_parameter_to_backpropagation():
    model, x = make("lstm")
    falign.convert(model, "fa", skip=("rnn.weight_hh_l0", "rnn.weight_hh_l1"))
    assert set(falign.feedback_state(model)) == {"rnn.weight_ih_l0", "rnn.weight_ih_l1", "out"}
    verified = falign.verify(model, x, loss_of)
    assert verified
    assert set(falign.transport(model, x, loss_of)) == {"rnn.weight_hh_l0", "rnn.weight_hh_l1"}


def test_a_module_that_comes_after_convert_is_refused():
    model, x = make("attention")
    falign.convert(model, "fa")
    model.attention = make("attention")[0].attention
    with pytest.raises(RuntimeError, match=r"was changed after falign\.convert"):
        model(x)


@pytest.mark.parametrize("case", ["raw", "lstm", "attention", "tied layer"])
def test_a_changed_weight_between_forward_and_backward_is_refused(case):
    model, x = make(case)
    falign.convert(model, "usf", example=x)
    loss = loss_of(model(x))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        loss.backward()


def test_weights_in_one_piece_of_memory():
    """Recurrent kernels of GPUs keep all weights and biases in one buffer, and save the whole."""
    torch.manual_seed(0)
    flat = torch.randn(8 * 6 + 6 * 3 + 3, dtype=torch.float64)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(flat[:48].view(8, 6)), nn.Parameter(flat[48:66].view(6, 3))
            self.bias = nn.Parameter(flat[66:])

        def forward(self, x):
            return torch.tanh(torch.tanh(x) @ self.a) @ self.b + self.bias

    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    model = falign.convert(Flat(), "fa", example=x)
    assert model.a.untyped_storage().data_ptr() == model.b.untyped_storage().data_ptr()
    assert falign.verify(model, x, loss_of)
    alone = falign.convert(copy.deepcopy(Flat()).double(), "fa", example=x)
    falign.load_feedback_state(alone, falign.feedback_state(model))
    assert relative(gradients(model, x), gradients(alone, x)) == 0


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore")  # of the compilers' own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("rule", ["fa", "usf", "kp"])
@pytest.mark.parametrize("case", ["raw", "attention"])
def test_compiled(case, rule, backend):
    if backend == "inductor" and rule != "fa":
        pytest.skip("one rule through the slow compiler is enough: modules that multiply by hand run uncompiled")
    torch._dynamo.reset()
    model, x = make(case)
    falign.convert(model, rule, example=x)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=backend)
    for _ in range(2):
        twin.zero_grad()
        loss_of(compiled(x)).backward()
        taken = {name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None}
        assert relative(taken, gradients(model, x)) < 1e-12
    twin.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):  # saved copies of another type
        loss_of(torch.compile(twin.float(), backend=backend)(x.float()).float()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in twin.parameters())
