"""What direct rules cut, where their errors begin, and which positions are the same: definitions and refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import falign
from cases import DIRECT, relative
from direct_networks import (
    GPT,
    NETWORKS,
    Block,
    Cuts,
    build,
    feedback_of,
    linear,
    loss_of,
    norm,
    same,
    taken,
)  # fmt: skip


def gradients_of(plain, cut, output, feedback, loss=None):
    plain.zero_grad()
    cut.backward(loss_of(output) if loss is None else loss, output, feedback)
    return {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}


def x_of(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def build_(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make().double()


# --- modules that are cut as a whole


@pytest.mark.parametrize("words", ["blocks", "blocks.*", ("blocks.0", "blocks.1"), ["blocks.[01]"]])
def test_blocks_are_cut_at_the_stream_and_backpropagated_inside(words):
    """Launay, Poli and Krzakala 2020: between blocks e B, within a block ordinary backpropagation."""
    model, (x,) = build("gpt"), NETWORKS["gpt"][1](5)
    plain, cut = copy.deepcopy(model), Cuts()
    h = plain.words(x) + plain.positions[:5]
    for number, block in enumerate(plain.blocks):
        h = block(cut(f"blocks.{number}", h, same))
    output = plain.head(plain.ln_f(h))
    falign.convert(model, "dfa", cut=words, example=x)
    assert {name: tuple(b.shape) for name, b in feedback_of(model).items()} == {
        "blocks.0": (11, 8),
        "blocks.1": (11, 8),
    }
    assert relative(taken(model, (x,)), gradients_of(plain, cut, output, feedback_of(model))) <= 1e-13
    assert falign.verify(model, x, loss_of)


def test_blocks_and_their_layers():
    """Cut both: the stream gets e B of the block, the layers inside get theirs, and no weight carries an error."""
    model, (x,) = build("gpt"), NETWORKS["gpt"][1](5)
    plain, cut = copy.deepcopy(model), Cuts()
    h = plain.words(x) + plain.positions[:5]
    for number, block in enumerate(plain.blocks):
        h = block.written(cut, f"blocks.{number}", cut(f"blocks.{number}", h, same), same)
    output = linear(cut, "head", plain.head, norm(plain.ln_f, h), same)
    falign.convert(model, "dfa", cut=("layers", "blocks"), example=x)
    assert relative(taken(model, (x,)), gradients_of(plain, cut, output, feedback_of(model))) <= 1e-13
    assert falign.transport(model, x, loss_of) == {}


class Steered(nn.Module):
    """Modules with several arguments, by position, by keyword and in a tuple."""

    def __init__(self):
        super().__init__()
        self.below, self.side, self.third = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(6, 3)
        self.mix, self.head = Mixed(), nn.Linear(4, 3)

    def forward(self, x, scale=1.0):
        pair = (self.third(x).tanh(), x.abs())
        return self.head(self.mix(self.below(x).tanh(), count=3, pair=pair, memory=self.side(x).sin() * scale))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(5, 4), nn.Linear(3, 4)

    def forward(self, x, *, count, memory, pair):
        return torch.tanh(self.one(x)) + self.two(memory).cos() / count + self.three(pair[0]) * pair[1][:, :4]


def test_every_argument_is_cut_with_a_feedback_of_its_own():
    model, x = build_(Steered), x_of(7, 6)
    plain, cut = copy.deepcopy(model), Cuts()
    falign.convert(model, "dfa", cut="mix", example=x)
    shapes = {name: tuple(b.shape) for name, b in feedback_of(model).items()}
    assert shapes == {"mix": (3, 4), "mix[pair][0]": (3, 3), "mix[memory]": (3, 5)}
    pair = (cut("mix[pair][0]", plain.third(x).tanh(), same), x.abs())
    memory = cut("mix[memory]", plain.side(x).sin(), same)
    output = plain.head(plain.mix(cut("mix", plain.below(x).tanh(), same), count=3, pair=pair, memory=memory))
    assert relative(taken(model, (x,)), gradients_of(plain, cut, output, feedback_of(model))) <= 1e-13
    assert falign.verify(model, x, loss_of)
    late = torch.ones((), dtype=torch.float64, requires_grad=True)
    model(x, late)  # it wants a gradient through an argument that is known
    inner = model.mix

    def other(module, args, kwargs):
        return args, {**kwargs, "pair": (kwargs["pair"][0], kwargs["memory"][:, :4].repeat(1, 2)[:, :6])}

    handle = inner.register_forward_pre_hook(other, with_kwargs=True, prepend=True)
    with pytest.raises(RuntimeError, match=r"module 'mix' got a tensor \(7, 6\) at \[pair\]\[1\] that it did not get"):
        model(x)
    handle.remove()
    falign.revert(model)


def test_an_argument_given_twice_gets_the_sum():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.attention, self.head = (
                nn.Linear(4, 8),
                nn.MultiheadAttention(8, 2, batch_first=True),
                nn.Linear(8, 3),
            )

        def forward(self, x):
            h = self.below(x)
            return self.head(self.attention(h, h, h)[0])

    model, x = build_(Twice), x_of(3, 5, 4)
    plain, cut = copy.deepcopy(model), Cuts()
    falign.convert(model, "dfa", cut="attention", example=x)
    assert set(feedback_of(model)) == {"attention", "attention[1]", "attention[2]"}
    h = plain.below(x)
    for name in feedback_of(model):
        inside = cut(name, h, same)
    output = plain.head(plain.attention(inside, inside, inside)[0])
    assert relative(taken(model, (x,)), gradients_of(plain, cut, output, feedback_of(model))) <= 1e-13


def test_a_container_is_cut_without_a_further_child():
    """A Sequential runs its children: their number stays, and the feedback lies in the first module within."""
    parts = [nn.Linear(5, 6), nn.Sequential(nn.Sequential(nn.Tanh(), nn.Linear(6, 6)), nn.ReLU()), nn.Linear(6, 4)]
    model, x = build_(lambda: nn.Sequential(*parts)), x_of(7, 5)
    falign.convert(model, "dfa", cut=("1", "1.0", "2"), example=x)
    assert (len(model), len(model[1]), len(model[1][0])) == (3, 2, 2)
    assert set(feedback_of(model)) == {"1", "1.0", "2"}
    assert falign.verify(model, x, loss_of)
    assert set(feedback_of(model[1])) == {"", "0"}
    assert set(feedback_of(model[1][0])) == {""}
    plain, cut = falign.revert(copy.deepcopy(model)), Cuts()
    assert not any("feedback" in name for name, _ in plain.named_modules())
    h = cut("1", plain[0](x), same)
    output = linear(cut, "2", plain[2], plain[1](h), same)
    assert relative(taken(model, (x,)), gradients_of(plain, cut, output, feedback_of(model))) <= 1e-13


def test_images_before_a_block_get_a_map_of_the_whole():
    model = build_(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)),
            nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
            nn.Flatten(),
            nn.Linear(64, 5),
        )
    )
    x = x_of(2, 3, 6, 6)
    falign.convert(model, "dfa", cut="blocks", example=x)
    assert {name: tuple(b.shape) for name, b in feedback_of(model).items()} == {"1": (5, 144), "2": (5, 144)}
    assert falign.verify(model, x, loss_of)


# --- modules with products of their own


class Conv1D(nn.Module):
    """x W + b, as language models have it."""

    def __init__(self, inner, outer):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inner, outer) / 2), nn.Parameter(torch.zeros(outer))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_a_module_that_multiplies_by_itself_is_cut_at_its_input():
    model, x = (
        build_(lambda: nn.Sequential(Conv1D(6, 5), nn.Tanh(), Conv1D(5, 4), nn.Tanh(), nn.Linear(4, 3))),
        x_of(7, 6),
    )
    plain, cut = copy.deepcopy(model), Cuts()
    falign.convert(model, "dfa", example=x)
    h = plain[0](cut("0", x, same)).tanh()
    h = plain[2](cut("2", h, same)).tanh()
    output = linear(cut, "4", plain[4], h, same)
    assert relative(taken(model, (x,)), gradients_of(plain, cut, output, feedback_of(model))) <= 1e-13
    assert falign.transport(model, x, loss_of) == {}


# --- modules that a direct rule cuts as a whole by itself


class Middle(nn.Module):
    """A layer, a module with parts and what is done with them, a layer."""

    class Part(nn.Module):
        def __init__(self, use, **parts):
            super().__init__()
            self.use = use
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, h):
            return self.use(self, h)

    def __init__(self, use, **parts):
        super().__init__()
        self.first, self.part, self.last = nn.Linear(5, 6), self.Part(use, **parts), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.part(self.first(x).tanh()))


class Standardised(nn.Conv1d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2), keepdim=True)
        return F.conv1d(x, w / w.std((1, 2), keepdim=True), self.bias, padding=1)


class Adapted(nn.Module):
    """Weights and increments of low rank, whose norms are taken of the layers' own outputs (DoRA)."""

    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.size = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x):
        whole = self.base.weight + self.b(self.a(torch.eye(6, dtype=x.dtype))).mT
        return (self.base(x) + self.b(self.a(x))) * (self.size / whole.norm(dim=1).detach())


class Routing(nn.Module):
    """Experts that get the rows which a gate has chosen."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = (
            nn.Linear(6, 3),
            nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in "abc"),
        )

    def forward(self, h):
        rows = h.flatten(0, -2)
        gates = self.gate(rows).softmax(-1)
        mixed = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            (chosen,) = torch.where(gates.argmax(-1) == number)
            mixed = mixed.index_add(0, chosen, expert(rows[chosen]) * gates[chosen, number, None])
        return h + mixed.view_as(h)


class Sorting(nn.Module):
    """One expert, on rows that are sorted by a gate: as many rows as there are samples."""

    def __init__(self):
        super().__init__()
        self.gate, self.expert = nn.Linear(6, 1), nn.Linear(6, 6)

    def forward(self, h):
        order = self.gate(h)[:, 0].argsort()
        return torch.zeros_like(h).index_copy(0, order, self.expert(h[order]).tanh()) * self.gate(h).sigmoid()


def raw(*shape):
    return nn.Parameter(torch.randn(shape) / 2)


WHOLES = {
    "halved": (lambda: Middle(lambda m, h: h @ (m.w * 0.5), w=raw(6, 6)), "part", (4, 5), "'part.w' is changed by mul"),
    "merged": (
        lambda: Middle(
            lambda m, h: F.linear(h, m.layer.weight + m.a @ m.b), layer=nn.Linear(6, 6), a=raw(6, 2), b=raw(2, 6)
        ),
        "part", (4, 7, 5), "'part.a' is changed by mm",
    ),
    "standardised": (
        lambda: Middle(lambda m, h: m.conv(h.mT).mT, conv=Standardised(6, 6, 3)),
        "part.conv", (4, 7, 5), "'part.conv.weight' is changed by",
    ),
    "given as an argument": (
        lambda: Middle(lambda m, h: m.inner(h, m.w * 2), inner=Times(), w=raw(6, 6)),
        "part", (4, 5), "'part.w' is changed by mul",
    ),
    "with attention beside": (
        lambda: Middle(
            lambda m, h: m.attend(h, h, h)[0] @ m.w.exp(),
            attend=nn.MultiheadAttention(6, 2, batch_first=True), w=raw(6, 6),
        ),
        "part", (4, 7, 5), "'part.w' is changed by exp",
    ),
    "a layer that runs on the identity as well": (
        lambda: Middle(lambda m, h: m.adapted(h), adapted=Adapted()),
        "part.adapted", (4, 7, 5), "inputs of different sizes",
    ),
    "routed": (lambda: Middle(lambda m, h: m.route(h), route=Routing()), "part.route", (4, 7, 5), "are not the rows"),
    "sorted": (lambda: Middle(lambda m, h: m.sort(h), sort=Sorting()), "part.sort", (7, 5), "in its order"),
}  # fmt: skip


class Times(nn.Module):
    def forward(self, h, w):
        return h @ w


@pytest.mark.parametrize("case", WHOLES)
def test_the_smallest_module_around_what_cannot_be_cut_is_cut_as_a_whole(case):
    """Its input receives e B, inside of it true autograd: written out; and check says which module, and why."""
    make, name, shape, why = WHOLES[case]
    model, x = build_(make), x_of(*shape)
    plain, cut = copy.deepcopy(model), Cuts()
    checked = falign.check(model, "dfa", example=x)
    assert checked == []
    assert {row.name: row.mechanism for row in checked.rows} == {
        "first": "direct", name: "cut as a whole", "last": "direct"
    }  # fmt: skip
    assert f"backpropagated inside of {name}: " in str(checked)
    assert why in next(row.why for row in checked.rows if row.name == name)
    falign.convert(model, "dfa", example=x)
    feedback = feedback_of(model)
    turned = name == "part.conv"

    def cut_whole(module, args):
        how = (lambda e, b: (e.flatten(1) @ b).view(4, 6, 7)) if turned else same
        return (cut(name, args[0], how), *args[1:])

    plain.get_submodule(name).register_forward_pre_hook(cut_whole)
    h = plain.part(linear(cut, "first", plain.first, x, same).tanh())
    output = linear(cut, "last", plain.last, h, same)
    assert relative(taken(model, (x,)), gradients_of(plain, cut, output, feedback)) <= 1e-13
    assert falign.verify(copy.deepcopy(model), x, loss_of)
    assert {n for n in falign.transport(model, x, loss_of) if not n.startswith(f"{name}.")} == set()
    model.get_submodule(name).more = nn.Linear(2, 2).double()  # inside of it all is backpropagated, as before
    model(x)
    assert falign.revert(model).state_dict().keys() >= plain.state_dict().keys()
    assert relative(taken(model, (x,)), taken(make_plain(plain), (x,))) == 0


def make_plain(model):
    for module in model.modules():
        module._forward_pre_hooks.clear()
    return model


@pytest.mark.parametrize("rule", ["drtp", "eprop"])
def test_other_direct_rules_cut_the_same(rule):
    model, x = build_(WHOLES["merged"][0]), x_of(4, 7, 5)
    falign.convert(model, rule, example=x)
    assert set(feedback_of(model)) == {"first", "part", "last"}
    target = torch.arange(28).view(4, 7) % 3
    with falign.targets(model, target):
        loss_of(model(x)).backward()
    assert falign.verify(model, x, loss_of, target=target)


def test_a_weight_of_a_parametrization_of_its_own_takes_the_rule_as_any_other():
    model, x = build_(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))), x_of(4, 5)
    nn.utils.parametrize.register_parametrization(model[2], "weight", Increment().double())
    falign.convert(model, "dfa", example=x)
    assert set(feedback_of(model)) == {"0", "2"}
    assert falign.verify(model, x, loss_of)
    assert falign.transport(model, x, loss_of) == {}


class Increment(nn.Module):
    """W + A B."""

    def __init__(self):
        super().__init__()
        self.a, self.b = raw(3, 2), raw(2, 6)

    def forward(self, weight):
        return weight + self.a @ self.b


def test_what_cut_names_inside_stays_cut_and_the_error_may_begin_inside():
    parts = {"inner": nn.Linear(6, 6), "w": raw(6, 6), "end": nn.Tanh()}
    model = build_(lambda: Middle(lambda m, h: m.end(m.inner(h @ (m.w * 2)).sin()).cos(), **parts))
    x = x_of(4, 5)
    plain = copy.deepcopy(model)
    falign.convert(model, "dfa", example=x)
    assert set(feedback_of(model)) == {"first", "part", "last"}
    falign.convert(falign.revert(model), "dfa", example=x, cut=("layers", "part.inner"))
    assert set(feedback_of(model)) == {"first", "part", "part.inner", "last"}
    assert falign.verify(model, x, loss_of)
    falign.convert(falign.revert(model), "dfa", example=x, error_at="part.end")
    cut, inside = Cuts(), []
    plain.part.register_forward_pre_hook(lambda m, args: (cut("part", args[0], same),))
    plain.part.end.register_forward_hook(lambda m, args, y: inside.append(y))
    loss = loss_of(plain.last(plain.part(linear(cut, "first", plain.first, x, same).tanh())))
    assert relative(taken(model, (x,)), gradients_of(plain, cut, inside[0], feedback_of(model), loss)) <= 1e-13


def test_several_outputs_reach_the_modules_that_they_are_made_of():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 6)
            self.one, self.two = (Middle.Part(lambda m, h: h @ (m.w * 2), w=raw(6, 6)) for _ in range(2))
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x):
            h = self.first(x).tanh()
            return self.a(self.one(h).tanh()), self.b(self.two(h).tanh())

    model, x = build_(Two), x_of(4, 5)
    falign.convert(model, "dfa", example=x, output=(0, 1))
    assert {"one", "two", "a", "b", "first", "first.B1"} == set(feedback_of(model))
    assert {name: b.shape[0] for name, b in feedback_of(model).items()}["two"] == 2
    assert falign.verify(model, x, lambda result: loss_of(result[0]) + loss_of(result[1]))


def test_what_no_module_encloses_or_would_leave_little_of_the_rule_is_refused():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.w, self.last = nn.Linear(5, 6), raw(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(self.first(x).tanh() @ (self.w * 0.5))

    (problem,) = falign.check(build_(Root), "dfa", example=x_of(4, 5))
    assert "parameter 'w' is changed by mul before its product" in problem
    assert problem.endswith("or name it in skip=; in a module of its own, whose input can be cut, it may be changed")
    whole = build_(lambda: nn.Sequential(Root(), nn.Tanh(), nn.Linear(3, 2)))
    (problem,) = falign.check(whole, "dfa", example=x_of(4, 5))
    assert problem == (
        "parameter '0.w' is changed by mul before its product, so that module '0' would be cut as a whole; but nothing "
        "in front of it wants an error, and 3 of 4 products would be backpropagated inside of it: add '0' to cut= if "
        "that is meant, or use a layerwise rule"
    )
    falign.convert(whole, "dfa", example=x_of(4, 5), cut=("layers", "0"))
    assert set(feedback_of(whole)) == {"0", "2"}
    assert falign.verify(whole, x_of(4, 5), loss_of)
    first = nn.Sequential(Middle.Part(lambda m, h: h @ (m.w * 0.5), w=raw(5, 6)), nn.Tanh(), nn.Linear(6, 3)).double()
    assert falign.check(first, "dfa", example=x_of(4, 5)) == [], "the first product has no error to hand on"


# --- where errors begin


@pytest.mark.parametrize("words", [None, "blocks"])
def test_the_error_is_taken_before_the_vocabulary(words):
    """B (d, d); the head and what else follows is backpropagated."""
    model, (x,) = build("gpt"), NETWORKS["gpt"][1](5)
    plain, cut = copy.deepcopy(model), Cuts()
    falign.convert(model, "dfa", error_at="ln_f", cut=words, example=x)
    assert {b.shape[0] for b in feedback_of(model).values()} == {8}
    h = plain.words(x) + plain.positions[:5]
    for number, block in enumerate(plain.blocks):
        name = f"blocks.{number}"
        h = block.written(cut, name, h, same) if words is None else block(cut(name, h, same))
    inside = plain.ln_f(h)
    loss = loss_of(plain.head(inside))
    assert relative(taken(model, (x,)), gradients_of(plain, cut, inside, feedback_of(model), loss)) <= 1e-13
    verified = falign.verify(model, x, loss_of)
    assert verified
    assert verified.transported == {}
    assert "head.weight" in falign.transport(model, x, loss_of), "which is said"


def test_a_tied_head_behind_the_error_is_backpropagated():
    class Tied(GPT):
        def forward(self, x):
            h = self.words(x)
            for block in self.blocks:
                h = block(h)
            return F.linear(self.ln_f(h), self.words.weight)

    def make():
        model = Tied()
        del model.head, model.positions
        return model

    model, (x,) = build_(make), NETWORKS["gpt"][1](5)
    plain, cut = copy.deepcopy(model), Cuts()
    falign.convert(model, "dfa", error_at="ln_f", example=x)
    assert "words.weight" not in feedback_of(model)
    h = plain.words(x)
    for number, block in enumerate(plain.blocks):
        h = block.written(cut, f"blocks.{number}", h, same)
    inside = plain.ln_f(h)
    loss = loss_of(F.linear(inside, plain.words.weight))
    assert relative(taken(model, (x,)), gradients_of(plain, cut, inside, feedback_of(model), loss)) <= 1e-13
    assert falign.verify(model, x, loss_of)


def test_several_outputs_deliver_to_blocks():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(4, 8)
            self.blocks = nn.ModuleList(Block(8) for _ in range(2))
            self.words, self.kind = nn.Linear(8, 5), nn.Linear(8, 3)

        def forward(self, x):
            h = self.enter(x)
            early = h = self.blocks[0](h)
            return {"words": self.words(self.blocks[1](h)), "kind": self.kind(early.mean(1))}

    def loss(result):
        return result["words"].square().sum() + (result["kind"] ** 3).sum()

    model, x = build_(Two), x_of(3, 5, 4)
    plain = copy.deepcopy(model)
    falign.convert(model, "dfa", cut="blocks", output=("words", "kind"), example=x)
    feedback = feedback_of(model)
    assert {name: tuple(b.shape) for name, b in feedback.items()} == {
        "blocks.0": (5, 8), "blocks.0.B1": (3, 8), "blocks.1": (5, 8),
    }  # fmt: skip
    stream = plain.enter(x)
    middle = plain.blocks[0](stream.detach())
    kind, words = plain.kind(middle.mean(1)), plain.words(plain.blocks[1](middle.detach()))
    e, f = 2 * words.detach(), 3 * kind.detach() ** 2
    spread = (f @ feedback["blocks.0.B1"] / 5**0.5).unsqueeze(1)
    total = loss({"words": words, "kind": kind}) + ((e @ feedback["blocks.0"] + spread) * stream).sum()
    (total + (e @ feedback["blocks.1"] * middle).sum()).backward()
    loss(model(x)).backward()
    assert (
        relative(
            {name: p.grad for name, p in model.named_parameters()},
            {name: p.grad for name, p in plain.named_parameters()},
        )
        <= 1e-12
    )
    assert falign.verify(model, x, loss)


# --- which positions are the same


class Frames(nn.Module):
    """Convolutions of frames: once a frame, or all frames in one batch; a recurrent net reads them."""

    def __init__(self, folded, last):
        super().__init__()
        self.conv, self.cell, self.head = nn.Conv2d(2, 3, 3), nn.GRUCell(12, 6), nn.Linear(6, 4)
        self.folded, self.last = folded, last

    def forward(self, x):
        if self.folded:
            frames = self.conv(x.flatten(0, 1).tanh()).tanh().flatten(1).unflatten(0, x.shape[:2])
        else:
            frames = torch.stack([self.conv(x[:, t].tanh()).tanh().flatten(1) for t in range(x.shape[1])], 1)
        h, outputs = None, []
        for t in range(x.shape[1]):
            h = self.cell(frames[:, t], h)
            outputs.append(self.head(h))
        return outputs[-1] if self.last else torch.stack(outputs, 1)


@pytest.mark.parametrize("last", [False, True])
def test_frames_one_by_one_or_in_one_batch_get_the_same_errors(last):
    models = [build_(lambda folded=folded: Frames(folded, last)) for folded in (False, True)]
    for model in models:
        falign.convert(model, "dfa", example=x_of(3, 5, 2, 4, 4))
        assert tuple(feedback_of(model)["conv"].shape) == (4, 32), "the frame as one vector"
    for length in (5, 3):
        x = x_of(3, length, 2, 4, 4).requires_grad_()
        assert relative(taken(models[0], (x,)), taken(models[1], (x,))) <= 1e-13
        assert falign.verify(models[1], x, loss_of)
    assert falign.transport(models[0], x, loss_of) == {}


class Pooled(nn.Module):
    """Time first, and one answer for all times."""

    def __init__(self):
        super().__init__()
        self.inner, self.mid, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.mid(torch.tanh(self.inner(x)))).mean(0))


@pytest.mark.parametrize(("length", "count"), [(5, 4), (4, 4), (7, 2)])
def test_time_first_and_pooled(length, count):
    model, x = build_(Pooled), x_of(length, count, 6)
    plain, cut = copy.deepcopy(model), Cuts()
    falign.convert(model, "dfa", example=x_of(5, 3, 6))

    def first(e, b):
        return (e @ b / length**0.5).expand(length, -1, -1)

    h = torch.tanh(linear(cut, "inner", plain.inner, x, first))
    h = torch.tanh(linear(cut, "mid", plain.mid, h, first))
    output = linear(cut, "out", plain.out, h.mean(0), same)
    assert relative(taken(model, (x,)), gradients_of(plain, cut, output, feedback_of(model))) <= 1e-13


class Shapes(nn.Module):
    """An inner layer on an input of one form, an output of another."""

    def __init__(self, form, end):
        super().__init__()
        self.inner, self.mid, self.out, self.form, self.end = (
            nn.Linear(6, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
            form,
            end,
        )

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        return self.end(self.out(self.form(torch.tanh(self.mid(h)), x)))


FORMS = {
    "flattened tokens": (lambda h, x: h.flatten(0, 1).sin().unflatten(0, x.shape[:2]), lambda y: y, same),
    "logits behind the classes": (lambda h, x: h, lambda y: y.transpose(1, 2), lambda e, b: e.transpose(1, 2) @ b),
    "flat logits": (lambda h, x: h, lambda y: y.flatten(0, 1), lambda e, b: (e @ b).unflatten(0, (-1, 5))),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_other_arrangements_of_the_same_positions(form):
    change, end, how = FORMS[form]
    model, x = build_(lambda: Shapes(change, end)), x_of(4, 5, 6)
    plain, cut = copy.deepcopy(model), Cuts()
    falign.convert(model, "dfa", example=x)
    h = torch.tanh(linear(cut, "inner", plain.inner, x, how))
    h = torch.tanh(linear(cut, "mid", plain.mid, h, how))
    output = end(linear(cut, "out", plain.out, change(h, x), how))
    assert relative(taken(model, (x,)), gradients_of(plain, cut, output, feedback_of(model))) <= 1e-13


def test_windows_are_folded_into_the_samples():
    """(samples · windows, features): e B at each window of the sample, times 1/√windows."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.mid, self.out = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.tanh(self.inner(x.unflatten(1, (-1, 2)).flatten(2).flatten(0, 1)))
            return self.out(torch.tanh(self.mid(h)).unflatten(0, (len(x), -1)).mean(1))

    model, x = build_(Windows), x_of(5, 8, 6)
    plain, cut = copy.deepcopy(model), Cuts()
    falign.convert(model, "dfa", example=x)
    assert tuple(feedback_of(model)["mid"].shape) == (3, 8)

    def fold(e, b):
        return (e @ b / 2).repeat_interleave(4, 0)

    h = torch.tanh(linear(cut, "inner", plain.inner, x.reshape(20, 12), fold))
    h = torch.tanh(linear(cut, "mid", plain.mid, h, fold)).unflatten(0, (5, -1)).mean(1)
    output = linear(cut, "out", plain.out, h, same)
    assert relative(taken(model, (x,)), gradients_of(plain, cut, output, feedback_of(model))) <= 1e-13


@pytest.mark.unchecked
def test_a_full_map_is_there_where_it_is_asked_for_and_keeps_its_length():
    model, inputs = build("encoder, pooled"), NETWORKS["encoder, pooled"][1]
    full = falign.ALL_RULES["dfa"](positions="all")
    falign.convert(model, full, example=inputs(5))
    assert tuple(feedback_of(model)["layer.linear1"].shape) == (5, 5 * 8)
    assert falign.verify(model, inputs(5), loss_of)
    with pytest.raises(
        RuntimeError, match=r"direct feedback of layer '.*' is 5 x 40, but the model's output is \(3, 5\)"
    ):
        model(*inputs(6))
    with pytest.raises(ValueError, match="dfa: positions is 'some', expected each or all"):
        falign.ALL_RULES["dfa"](positions="some")


def test_a_loop_of_another_number_of_steps_than_positions_is_refused():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head, self.steps = nn.GRUCell(4, 6), nn.Linear(6, 3), 9

        def forward(self, x):
            h, outputs = None, []
            for t in range(min(x.shape[1], self.steps)):
                h = self.cell(x[:, t], h)
                outputs.append(self.head(h))
            return torch.stack(outputs, 1)

    model, x = build_(Cut), x_of(3, 5, 4).requires_grad_()
    falign.convert(model, "dfa", example=x)
    assert falign.verify(model, x, loss_of)
    extra = model.cell.register_forward_hook(lambda cell, args, h: cell.ih(args[0]).sum() * 0 + h)
    with pytest.raises(RuntimeError, match="in each of its 10 calls: convert the model with"):
        model(x)
    extra.remove()


# --- bad input


class Own(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


@pytest.mark.unchecked
def test_what_is_not_there_or_does_not_fit_is_said_in_one_sentence():
    gpt, (x,) = build("gpt"), NETWORKS["gpt"][1](5)

    def problem(rule="dfa", model=gpt, example=x, **options):
        (line,) = falign.check(model, rule, example=example, **options)
        return line

    assert (
        problem(cut="block") == "cut names 'block', which the model does not have; near it: blocks, blocks.1, blocks.0"
    )
    assert "cut names 'blocks.*.nothing', which the model does not have" in problem(cut=("layers", "blocks.*.nothing"))
    assert problem("fa", cut="blocks") == "cut= is for direct rules, rule 'fa' is none: leave it out"
    assert "cut= and error_at= is for direct rules, rule 'bp'" in problem("bp", cut="blocks", error_at="ln_f")
    assert "cut is 3, expected names or patterns of modules, 'layers' or 'blocks'" in problem(cut=3)
    assert "cut is (), expected" in problem(cut=())
    assert "module 'words' is to be cut and got no floating-point tensor" in problem(cut="words")
    line = problem(model=build("translator"), example=NETWORKS["translator"][1](5), cut="net.encoder.layers")
    assert "cut names 'net.encoder.layers', a ModuleList, which is never called: name its parts" in line
    assert "error_at names 'ln', which the model does not have; near it: ln_f" in problem(error_at="ln")
    assert "error_at names 'blocks.0.attention', which returns a tuple" in problem(error_at="blocks.0.attention")
    line = problem(model=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double(), example=x_of(5, 4), cut="blocks.*")
    assert "cut names 'blocks.*'" in line
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    assert "cut='blocks' finds no blocks" in problem(model=plain, example=x_of(5, 4), cut="blocks")

    class Unrun(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.twice = nn.Linear(4, 4), nn.Tanh(), nn.Tanh()

        def forward(self, x):
            return self.a(self.twice(self.twice(x)))

    assert "error_at names 'b', which did not run" in problem(model=Unrun().double(), example=x_of(5, 4), error_at="b")
    twice = problem(model=Unrun().double(), example=x_of(5, 4), error_at="twice")
    assert "error_at names 'twice', which runs 2 times, each with an error of its own" in twice
    own = nn.Sequential(Own(4, 5), SimpleHead()).double()
    line = problem(model=own, example=x_of(5, 3, 4))
    assert "layer '0' (Own) has a forward of its own over nn.LSTM's" in line
    falign.convert(own, "dfa", cut=("layers", "0"), example=x_of(5, 3, 4))
    assert falign.verify(own, x_of(5, 3, 4), loss_of)


class SimpleHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, given):
        return self.head(given[0])


@pytest.mark.parametrize("rule", DIRECT)
def test_an_example_is_asked_for(rule):
    (problem,) = falign.check(nn.Sequential(nn.LSTM(4, 5), SimpleHead()), rule)
    assert "needs an example" in problem
    (problem,) = falign.check(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), rule, error_at="0")
    assert problem == "error_at needs an example: pass example=x with a batch x"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_block_within_compiled_or_scripted_code_is_refused():
    for wrap, name in (
        (torch.compile, "1._orig_mod.0"),
        (lambda module: torch.jit.trace(module, torch.ones(3, 4)), "1"),
    ):
        model = nn.Sequential(nn.Linear(4, 4), wrap(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, 3))
        problems = falign.check(model, "dfa", cut=name, example=torch.ones(3, 4))
        assert any("which is part of compiled code" in line for line in problems), problems


def test_what_comes_after_convert_is_named():
    model, (x,) = build("gpt"), NETWORKS["gpt"][1](5)
    falign.convert(model, "dfa", cut="blocks.*", example=x)
    model.blocks.append(Block(8).double())
    with pytest.raises(RuntimeError, match=r"layer 'blocks.2' \(Block\) takes no feedback"):
        model(x)
    del model.blocks[2]
    model.extra = nn.Linear(8, 8).double()  # not named by cut=, so it is backpropagated as the others are
    model(x).sum().backward()
    falign.revert(model)
    falign.convert(model, "dfa", example=x, skip="extra")
    model.more = nn.MultiheadAttention(8, 2).double()
    with pytest.raises(RuntimeError, match="takes no feedback"):
        model(x)


def test_the_loss_has_to_pass_what_carries_the_error():
    model, (x,) = build("gpt"), NETWORKS["gpt"][1](5)
    falign.convert(
        model, "dfa", cut="blocks", output=lambda result: result.logits, example=None or x
    ) if False else None
    wrapped = build_(lambda: Holding())
    falign.convert(wrapped, "dfa", cut="inner", output="logits", example=x_of(5, 4))
    with pytest.raises(RuntimeError, match="the loss does not pass through the model's output"):
        wrapped(x_of(5, 4))["loss"].backward()


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 3)

    def forward(self, x):
        logits = self.head(self.inner(self.first(x)))
        return {"logits": logits, "loss": logits.square().sum()}
