"""Alignment of attention and recurrent modules: rows under every rule, against passes written out in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

import falign
from falign.measure import Monitor, alignment

N, T, H, C = 4, 7, 6, 3


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.GRU, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(5, H, batch_first=True, **options)
        self.head = nn.Linear((options.get("proj_size") or H) * (2 if options.get("bidirectional") else 1), C)
        self.double()

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(5, H), nn.Linear(H, C)
        self.attention = nn.MultiheadAttention(H, 2, batch_first=True)
        self.double()
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x):
        h = self.first(x)
        return self.head(self.attention(h, h, h)[0])


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, T, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(C, (N, T), generator=generator)


def loss_fn(output, y):
    return nn.functional.cross_entropy(output.transpose(1, 2), y)


def rows_of(model, **options):
    return {row.layer: row for row in alignment(model, loss_fn, *data(), **options).layers}


def arrays(model):
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def error_at(logits):
    """The gradient of the loss at the logits."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True) - np.eye(C)[data()[1].numpy()]) / (N * T)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def linear(w, x, name, prefix=""):
    return x @ w[f"{name}{prefix}weight"].T + w[f"{name}{prefix}bias"]


def gradient(error, x):
    """Weight's and bias's, as one vector."""
    return np.concatenate([np.einsum("nti,ntj->ij", error, x).ravel(), error.sum((0, 1))])


def gru(w, feedback):
    """{row: (gradient, error at its output, error at its input)}; truly where there is no feedback."""
    x = data()[0].numpy()
    h, steps = np.zeros((N, H)), []
    for t in range(T):
        inputs = x[:, t] @ w["rnn.weight_ih_l0"].T + w["rnn.bias_ih_l0"]
        states = h @ w["rnn.weight_hh_l0"].T + w["rnn.bias_hh_l0"]
        r, z = sigmoid(inputs[:, :H] + states[:, :H]), sigmoid(inputs[:, H : 2 * H] + states[:, H : 2 * H])
        n = np.tanh(inputs[:, 2 * H :] + r * states[:, 2 * H :])
        steps.append((h, r, z, n, states[:, 2 * H :]))
        h = (1 - z) * n + z * h
    before = np.stack([step[0] for step in steps], 1)
    above = np.concatenate([before[:, 1:], h[:, None]], 1)
    e = error_at(linear(w, above, "head."))
    carried = e @ (feedback["head"] if feedback else w["head.weight"])
    at_inputs, at_states = np.zeros((N, T, 3 * H)), np.zeros((N, T, 3 * H))
    handed, later = np.zeros((N, T, H)), np.zeros((N, H))
    for t in reversed(range(T)):
        h, r, z, n, candidate = steps[t]
        error = carried[:, t] + later
        at_n = error * (1 - z) * (1 - n**2)
        at_z = error * (h - n) * z * (1 - z)
        at_r = at_n * candidate * r * (1 - r)
        at_inputs[:, t] = np.concatenate([at_r, at_z, at_n], 1)
        at_states[:, t] = np.concatenate([at_r, at_z, at_n * r], 1)
        handed[:, t] = e[:, t] @ feedback["rnn.hh_l0"] if feedback else at_states[:, t] @ w["rnn.weight_hh_l0"]
        later = handed[:, t] + error * z
    return {
        "rnn.ih_l0": (gradient(at_inputs, x), at_inputs, None),
        "rnn.hh_l0": (gradient(at_states, before), at_states, handed),
        "head": (gradient(e, above), e, carried),
    }


def attention(w, feedback):
    """The same of two heads of attention."""
    x = data()[0].numpy()
    h = linear(w, x, "first.")
    parts = dict(zip("qkv", np.split(w["attention.in_proj_weight"], 3), strict=True))
    biases = dict(zip("qkv", np.split(w["attention.in_proj_bias"], 3), strict=True))
    q, k, v = ((h @ parts[a].T + biases[a]).reshape(N, T, 2, H // 2).transpose(0, 2, 1, 3) for a in "qkv")
    scores = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(H // 2))
    p = scores / scores.sum(-1, keepdims=True)
    mixed = (p @ v).transpose(0, 2, 1, 3).reshape(N, T, H)
    attended = linear(w, mixed, "attention.out_proj.")
    e = error_at(linear(w, attended, "head."))
    at_out = e @ (feedback["head"] if feedback else w["head.weight"])
    at_mixed = e @ feedback["attention.out_proj"] if feedback else at_out @ w["attention.out_proj.weight"]
    heads = at_mixed.reshape(N, T, 2, H // 2).transpose(0, 2, 1, 3)
    at_p = heads @ v.transpose(0, 1, 3, 2)
    at_scores = p * (at_p - (at_p * p).sum(-1, keepdims=True)) / np.sqrt(H // 2)
    split = {"q": at_scores @ k, "k": at_scores.transpose(0, 1, 3, 2) @ q, "v": p.transpose(0, 1, 3, 2) @ heads}
    split = {a: error.transpose(0, 2, 1, 3).reshape(N, T, H) for a, error in split.items()}
    rows = {
        "attention.out_proj": (gradient(at_out, mixed), at_out, at_mixed),
        "head": (gradient(e, attended), e, at_out),
    }
    for a, error in split.items():
        name = f"attention.{a}_proj"
        rows[name] = (gradient(error, h), error, e @ feedback[name] if feedback else error @ parts[a])
    return rows


def angles(one, other):
    """Of every sample, in degrees."""
    one, other = one.reshape(len(one), -1), other.reshape(len(other), -1)
    sizes = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.degrees(np.arccos(np.clip((one * other).sum(1) / sizes, -1, 1)))


CASES = {"gru": (Recurrent, gru), "attention": (Attention, attention)}


@pytest.mark.parametrize("case", CASES)
def test_products_of_a_direct_rule(case):
    """The gradient is that of the rows of the parameters, weight and bias, that the product works with."""
    build, oracle = CASES[case]
    model = falign.convert(build(), "dfa", example=data()[0])
    measured = alignment(model, loss_fn, *data())
    rows = {row.layer: row for row in measured.layers}
    taken = oracle(arrays(model), {name: b.numpy() for name, b in falign.feedback_state(model).items()})
    true = oracle(arrays(model), None)
    assert set(rows) - {"first"} == set(taken)
    for name, (f, received, delivered) in taken.items():
        g, row = true[name][0], rows[name]
        assert row.kind == "linear"
        assert row.gradient_norm == pytest.approx(np.linalg.norm(g), rel=1e-10)
        assert row.taken_norm == pytest.approx(np.linalg.norm(f), rel=1e-10)
        assert row.descent == pytest.approx(f @ g, rel=1e-8, abs=1e-12)
        assert row.gradient_angle == pytest.approx(angles(f[None], g[None])[0], abs=1e-5)
        assert row.received_angle == pytest.approx(angles(received, true[name][1]).mean(), abs=1e-5)
        if delivered is None:
            assert row.delivered_angle is None, "no error is wanted at the model's input"
        else:
            assert row.delivered_angle == pytest.approx(angles(delivered, true[name][2]).mean(), abs=1e-5)
    assert measured.descent == pytest.approx(sum(row.descent for row in measured.layers) + measured.other, rel=1e-12)
    assert measured.other == pytest.approx(0, abs=1e-15), "every parameter is in a row"


@pytest.mark.parametrize("case", CASES)
def test_backpropagation_has_the_rows_of_feedback_alignment(case):
    build, oracle = CASES[case]
    rows = {rule: rows_of(falign.convert(build(), rule, example=data()[0])) for rule in ("bp", "fa", "dfa")}
    assert list(rows["bp"]) == list(rows["fa"])
    for name, row in rows["bp"].items():
        assert (row.kind, row.gradient_norm) == (rows["fa"][name].kind, pytest.approx(rows["fa"][name].gradient_norm))
        assert row.taken_norm == row.gradient_norm > 0
        assert row.cosine == pytest.approx(1, abs=1e-15)
        assert row.gradient_angle == pytest.approx(0, abs=1e-5)
        assert row.weight_angle is None
    true = oracle(arrays(build()), None)
    products = (
        {"rnn.weight_ih_l0": ["rnn.ih_l0"], "rnn.weight_hh_l0": ["rnn.hh_l0"]}
        if case == "gru"
        else {"attention.in_proj_weight": [f"attention.{a}_proj" for a in "qkv"]}
    )
    for name, parts in products.items():
        weights = [g[: -(3 * H if case == "gru" else H)] for g in (true[part][0] for part in parts)]
        assert rows["bp"][name].gradient_norm == pytest.approx(np.linalg.norm(np.concatenate(weights)), rel=1e-10)
        squares = sum(rows["dfa"][part].gradient_norm ** 2 for part in parts)
        assert squares == pytest.approx(sum(np.sum(true[part][0] ** 2) for part in parts), rel=1e-10)


def test_what_skip_and_cut_leave_to_backpropagation_has_rows():
    model = falign.convert(Recurrent(), "fa", skip=("rnn",), example=data()[0])
    rows = rows_of(model)
    assert list(rows) == ["head", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert 0 < rows["rnn.weight_hh_l0"].gradient_angle < 180, "the error comes through the head's feedback"
    rows = rows_of(falign.convert(Recurrent(), "dfa", cut=("head", "rnn"), example=data()[0]))
    assert {"rnn.weight_ih_l0", "rnn.weight_hh_l0"} < set(rows)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"proj_size": 4}),
        (nn.RNN, {"nonlinearity": "relu", "bias": False}),
    ],
)
def test_every_product_has_its_angles(kind, options):
    model = falign.convert(Recurrent(kind, **options), "dfa", example=data()[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = rows_of(model, optimizer=optimizer)
    assert len(rows) == 1 + sum(name.startswith("rnn.weight") for name, _ in model.named_parameters())
    for name, row in rows.items():
        assert row.gradient_angle is not None, name
        assert row.displacement_angle == pytest.approx(row.gradient_angle, abs=1e-5)
        assert row.displacement_norm == pytest.approx(0.1 * row.taken_norm, rel=1e-9)
        assert row.received_angle is not None
        assert (row.delivered_angle is None) == name.startswith("rnn.ih_l0")
    silent = rows_of(falign.convert(Recurrent(kind, **options), "eprop", example=data()[0]))
    assert silent["rnn.hh_l0"].delivered_angle is None
    assert silent["rnn.hh_l0"].gradient_angle is not None


@pytest.mark.parametrize("rule", ["bp", "fa", "dfa"])
def test_monitor_of_an_optimizer_that_moves_a_part(rule):
    model = falign.convert(Recurrent(), rule, example=data()[0])
    optimizer = torch.optim.SGD([model.rnn.weight_hh_l0, model.head.weight], lr=0.1)
    with Monitor(model, every=1, optimizer=optimizer) as monitor:
        monitor.step(loss_fn, *data())
        optimizer.zero_grad()
        loss_fn(model(data()[0]), data()[1]).backward()
        optimizer.step()
    moved = {record["layer"]: record["displacement_norm"] for record in monitor.records}
    state, inputs = ("rnn.hh_l0", "rnn.ih_l0") if rule == "dfa" else ("rnn.weight_hh_l0", "rnn.weight_ih_l0")
    assert moved[state] > 0
    assert moved["head"] > 0
    assert moved[inputs] is None
