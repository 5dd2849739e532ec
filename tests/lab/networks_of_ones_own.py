# ruff: noqa: NPY002
"""Networks as users may write them, good and bad; their tests are in test_own_models."""

import os
import random
import sys

import numpy as np
import torch
from torch import nn

np.random.rand(), random.random(), torch.rand(1)  # what an import draws must not matter
MADE, CALLS = [], 0


def layers(*parts):
    return nn.Sequential(nn.Flatten(), *parts)


class Net(nn.Module):
    def __init__(self, classes, last=nn.Linear):
        super().__init__()
        self.first, self.between, self.last = nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, classes)

    def forward(self, x, skip=False):
        h = torch.relu(self.first(x.flatten(1)))
        return self.last(h if skip else h + torch.relu(self.between(h)))


class Lazy(nn.Module):
    """Lazy layers, a mask drawn by NumPy and a width by Python when it is made."""

    def __init__(self, classes):
        super().__init__()
        self.first, self.last = nn.LazyLinear(random.randint(8, 14)), nn.LazyLinear(classes)
        self.norm = nn.LazyBatchNorm1d()
        self.register_buffer("mask", torch.tensor(np.random.rand(64) < 0.8))

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x.flatten(1) * self.mask))))


class Depth(Net):
    """Stochastic depth by Python's generator, noise by NumPy's, dropout by torch's."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x = x + torch.tensor(np.random.normal(size=x.shape), dtype=x.dtype) * 0.1
        return super().forward(nn.functional.dropout(x, 0.1), skip=random.random() < 0.4)


class Keeper(Net):
    """Keeps a count, generators, a mean and a text in Python."""

    def __init__(self, classes):
        super().__init__(classes)
        self.count, self.mean, self.mode, self.seen = 0, torch.zeros(12), "tensor:0", {"last": [np.float32(0)]}
        self.drawing = {"python": random.Random(1), "numpy": np.random.default_rng(2)}
        self.legacy, self.torchs, self.array = np.random.RandomState(3), torch.Generator().manual_seed(4), np.ones(12)
        self.shared = self.drawing["python"]

    def forward(self, x):
        if self.training:
            self.count += 1
            self.mode = f"tensor:{self.count}"
            self.seen["last"].append(np.float32(self.count / 3))
            noise = self.drawing["numpy"].normal(size=12) + self.legacy.normal(size=12) * self.shared.random()
            self.array = self.array * 0.9 + noise * self.drawing["python"].random()
            noise = torch.tensor(self.array, dtype=x.dtype) + torch.rand(12, generator=self.torchs) / self.count
            h = torch.relu(self.first(x.flatten(1))) + 0.1 * noise + float(self.seen["last"][-1]) * 0.01 * self.mean
            self.mean = 0.9 * self.mean + 0.1 * h.mean(0).detach()
            return self.last(h if self.mode.endswith("7") else h + self.between(h))
        return super().forward(x)


class Scaled(nn.Module):
    """Reads what the network around it counts."""

    def forward(self, x):
        if self.training:
            self.history.append(round(float(x.detach().abs().mean()), 4))
        factor = 1 + 0.1 * (self.plan["now"][0] % 5) + 0.05 * self.array[0] + 0.05 * self.mean[0] + self.view[0]
        return x * (factor + 0.01 * (len(self.history) % 7) + 0.01 * self.drawing.random())


class Sharing(Net):
    """Counts in a dict, lists, an array, a tensor and a generator that a part shares, early or once it runs."""

    def __init__(self, classes, early=True):
        super().__init__(classes)
        self.scaled, self.images = Scaled(), None
        if early:
            self.share()
            self.scaled.view = self.mean[1:]

    def share(self):
        self.plan, self.array, self.mean, self.pair = {"now": [0]}, np.zeros(2), torch.zeros(2), (random.Random(5), [])
        self.plan["itself"] = self.plan
        for name, value in (("plan", self.plan), ("array", self.array), ("mean", self.mean)):
            setattr(self.scaled, name, value)
        self.scaled.view = self.mean
        self.scaled.drawing, self.scaled.history = self.pair

    def forward(self, x):
        if not hasattr(self, "plan"):
            self.share()
        if self.training:
            self.images = x
            self.plan["now"][0] += 1
            self.array += 0.1
            self.mean[0] = x.mean()
            self.mean[1] += 0.001
        return self.scaled(super().forward(x))


class Thawing(Net):
    """The first layer is frozen for some steps: its first gradient comes late."""

    def __init__(self, classes):
        super().__init__(classes)
        self.first.requires_grad_(False)
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        self.first.requires_grad_(self.steps > 9)
        return super().forward(x)


class Late(Net):
    """The layer between is used from some step on, which a buffer counts."""

    def __init__(self, classes):
        super().__init__(classes)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.steps += self.training
        return super().forward(x, skip=bool(self.training and self.steps < 8))


class State:
    counted = 0


class Foreign(Net):
    """Keeps what no file can hold."""

    total = 0

    def __init__(self, classes):
        super().__init__(classes)
        self.state, self.order = State(), iter(range(10**9))

    def forward(self, x):
        global CALLS
        CALLS += 1
        Foreign.total += 1
        self.state.counted += next(self.order)
        return super().forward(x)


def calls(_, at=[0]):  # noqa: B006
    at[0] += 1
    return at[0]


class Hidden(Net):
    """Its outputs depend on what nobody sees: what a function keeps, or a system that draws."""

    def __init__(self, classes, how):
        super().__init__(classes)
        self.how = how
        if how == "a hook on a weight":
            counts = iter(range(10**9))
            self.first.register_forward_pre_hook(lambda _, inputs: (inputs[0] * (1 + 0.01 * (next(counts) % 5)),))

    def forward(self, x):
        y = super().forward(x)
        match self.how:
            case "a default":
                return y * (1 + 0.01 * calls(x))
            case "a system":
                return y + torch.randn(y.shape, generator=torch.Generator().manual_seed(int.from_bytes(os.urandom(4))))
            case "a system in tests":
                return y if self.training else y + float(np.random.default_rng().normal())
        return y


class Plenty(Net):
    """Everything that a checkpoint or a seed does hold, and outputs that are no numbers."""

    def __init__(self, classes):
        super().__init__(classes)
        self.noise, self.norm = nn.RReLU(), nn.BatchNorm1d(12)
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        nn.utils.parametrizations.spectral_norm(self.between)
        nn.utils.parametrizations.weight_norm(self.first)
        self.state = {"passes": 0}

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state

    def forward(self, x):
        self.steps = self.steps + 1  # another tensor in its place
        self.state["passes"] += 1
        with torch.no_grad():
            self.last.bias.mul_(0.99)
        h = self.noise(self.norm(self.first(x.flatten(1)))) * self.steps + self.state["passes"]
        y = self.last(h + self.between(nn.functional.dropout(h, 0.2, self.training))) + random.random()
        return torch.where(y > 3, torch.inf * (y - y), y)


class Returning(Net):
    def __init__(self, classes, what):
        super().__init__(classes)
        self.what = what

    def forward(self, x):
        return self.what(super().forward(x), self.training)


def lazy(classes):
    return Lazy(classes)


def depth(classes):
    return Depth(classes)


def keeper(classes):
    return Keeper(classes)


def sharing(classes):
    return Sharing(classes)


def sharing_late(classes):
    return Sharing(classes, early=False)


class Hoarding(Net):
    """Keeps more at every step of a training: texts, or a tensor."""

    def __init__(self, classes, what, first=0):
        super().__init__(classes)
        self.few, self.kept, self.what = [0], ["x"] * first, what
        self.bank = torch.zeros(0)

    def forward(self, x):
        if self.training:
            self.few[0] += 1
            if self.what == "texts" and len(x) > 9:
                self.kept.extend(["a text of some letters"] * 100)
            if self.what == "texts":
                self.kept[:1] = [f"{self.few[0]}"]
            if self.what == "tensor" and len(x) > 9:
                self.bank = torch.cat([self.bank, torch.ones(5000)])
        return super().forward(x)


def texts(classes):
    return Hoarding(classes, "texts")


def many_texts(classes):
    return Hoarding(classes, "texts", first=20_000)


def banked(classes):
    return Hoarding(classes, "tensor")


def large(classes):
    net = Hoarding(classes, "nothing")
    net.bank = torch.zeros(100_000)
    return net


def a_default(classes):
    return Hidden(classes, "a default")


def a_hook(classes):
    return Hidden(classes, "a hook on a weight")


def a_system(classes):
    return Hidden(classes, "a system")


def a_system_in_tests(classes):
    return Hidden(classes, "a system in tests")


def plenty(classes):
    return Plenty(classes)


def thawing(classes):
    return Thawing(classes)


def late(classes):
    return Late(classes)


def foreign(classes):
    return Foreign(classes)


def plain(classes):
    return Net(classes)


def tuples(classes):
    return Returning(classes, lambda y, training: (y, y) if training else y)


def dicts(classes):
    return Returning(classes, lambda y, training: y if training else {"logits": y})


def cut(classes):
    return Returning(classes, lambda y, training: y.detach())


def whole(classes):
    return Returning(classes, lambda y, training: y.round().short())


def booleans(classes):
    return Returning(classes, lambda y, training: y > 0)


def complexes(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes, dtype=torch.complex64))


def wide(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 30 * 10**10), nn.Linear(30 * 10**10, classes))


def quits(classes):
    sys.exit("no more")


def gives_up(classes):
    raise GeneratorExit


def lines(classes):
    raise OSError("one\ntwo \x1b[31m" + "x" * 5000)


def memory(classes):
    raise MemoryError


def nothing(classes):
    return layers(nn.Linear(64, 0), nn.ReLU(), nn.Linear(0, classes))


def meta(classes):
    return Net(classes).to("meta")


def script(classes):
    return torch.jit.trace(Net(classes), torch.zeros(2, 1, 8, 8))


def batch_norm(classes):
    return layers(nn.LazyLinear(9), nn.LazyBatchNorm1d(), nn.Tanh(), nn.Linear(9, classes))


def unused(classes):
    net = Net(classes)
    net.spare = nn.LazyLinear(3)
    return net


def frozen(classes):
    return Net(classes).requires_grad_(False)


def doubles(classes):
    return Net(classes).double()


def halves(classes):
    return Net(classes).half()


def entropy(classes):
    net = Net(classes)
    with torch.no_grad():
        net.first.bias.copy_(torch.from_numpy(np.random.default_rng().normal(size=12)))
    return net


class InPlace(Net):
    def forward(self, x):
        return super().forward(x.add_(1))


def in_place(classes):
    return InPlace(classes)


class Two(Net):
    def forward(self, x, mask):
        return super().forward(x)


def two(classes):
    return Two(classes)


class Sparse(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.table, self.last = nn.Embedding(9, 2, sparse=True), nn.Linear(128, classes)

    def forward(self, x):
        return self.last(self.table(x.flatten(1).abs().long().clamp(0, 8)).flatten(1))


def sparse(classes):
    return Sparse(classes)


def once(classes):
    if not MADE:
        MADE.append(Net(classes))
    return MADE[0]


def moving(classes):
    os.chdir("/")
    sys.path.append("/nowhere")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_default_device("meta")
    net = Net(classes).to_empty(device="cpu")
    for module in (net.first, net.between, net.last):
        module.reset_parameters()
    return net
