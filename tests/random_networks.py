"""Random small networks from a seed, and every rule's gradients on them by autograd alone, without falign's hooks."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import falign
from oracles import effective

#: What has to be refused or seen: error passes through a weight behind its layer's back.
SPOILERS = (
    "functional", "functional and called", "layer.forward", "scaled", "matrix", "einsum", "plain list", "late",
    "replaced after", "replaced before", "inside a parametrization",
)  # fmt: skip

#: Behind the last layer, without parameters and in its shape: the error of a direct rule is taken at the layer.
ENDS = {
    "softmax": lambda z, axis: z.softmax(axis),
    "log-softmax": lambda z, axis: z.log_softmax(axis),
    "sigmoid": lambda z, axis: z.sigmoid(),
}
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MEAN = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_MAX = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Branches(nn.Module):
    """Two layers that read one tensor."""

    def __init__(self, how: str, axis: int, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.how, self.axis, self.one, self.other = how, axis, one, other

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.one(x), self.other(x)
        if self.how == "cat":
            return torch.cat([one, other], self.axis)
        if self.how == "gate":
            return one * other.sigmoid()
        return one * other if self.how == "product" else one + other


class Twice(nn.Module):
    """A layer used twice, or two layers of one weight."""

    def __init__(self, layer: nn.Module, again: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.again = layer, layer if again is None else again
        if again is not None:
            again.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.layer(x)))


class CausalMix(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        mix = torch.tril(torch.ones(length, length))
        self.register_buffer("mix", mix / mix.sum(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix @ x


class Attention(nn.Module):
    def __init__(self, size: int, inner: int, fused: bool, causal: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(size, inner, bias=False) for _ in range(3))
        self.out, self.fused, self.causal = nn.Linear(inner, size), fused, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.fused:
            return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if self.causal:
            length = x.shape[1]
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        return x + self.out(scores.softmax(-1) @ v)


class MeanOverPositions(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


class Gain(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Through(nn.Module):
    """A parametrization with a layer of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.map = nn.Linear(size, size)

    def forward(self, weight: Tensor) -> Tensor:
        return self.map(weight)


class Spoiled(nn.Module):
    """A square map of the features that a rule does not reach, in one of many ways."""

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.kind, self.size = kind, size
        if kind in ("matrix", "einsum"):
            self.matrix = nn.Parameter(torch.randn(size, size))
        elif kind == "plain list":
            self.held = [nn.Linear(size, size)]
        elif kind != "late":
            self.layer = nn.Linear(size, size)
        if kind == "inside a parametrization":
            parametrize.register_parametrization(self.layer, "weight", Through(size))
        if kind == "replaced before":
            self._replace()

    def _replace(self) -> None:
        layer = self.layer
        layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)

    def later(self) -> None:
        """What is done after ``convert``."""
        if self.kind == "late":
            self.layer = nn.Linear(self.size, self.size)
        elif self.kind == "replaced after":
            self._replace()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        if self.kind == "functional":
            return F.linear(x, self.layer.weight, self.layer.bias)
        if self.kind == "functional and called":
            return F.linear(torch.tanh(self.layer(x)), self.layer.weight)
        if self.kind == "layer.forward":
            return self.layer.forward(x)
        if self.kind == "scaled":
            return x @ (3 * self.layer.weight).T
        if self.kind == "matrix":
            return x @ self.matrix
        if self.kind == "einsum":
            return torch.einsum("...i,oi->...o", x, self.matrix)
        return self.held[0](x) if self.kind == "plain list" else getattr(self, "layer", nn.Identity())(x)


class Net(nn.Module):
    """A body, the last layer, what follows it, and the structure in which the output is returned."""

    def __init__(self, body: nn.Module, head: nn.Module, end: str | nn.Module, axis: int, structure: str) -> None:
        super().__init__()
        self.body, self.head, self.axis, self.structure = body, head, axis, structure
        self.end = end if isinstance(end, str) else "module"
        self.after = nn.Identity() if isinstance(end, str) else end
        self.recompute = False

    def forward(self, x: Tensor):
        h = checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)
        out = self.head(h)
        if self.end == "module":
            out = self.after(out)
        elif self.end in ENDS:
            out = ENDS[self.end](out, self.axis)
        if self.structure == "dict":
            return {"hidden": h.detach(), "logits": out}
        return (h.mean(), out) if self.structure == "tuple" else out


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Float64 by default, and random numbers of a seed; both are put back."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(before)


class Case:
    """A random network with its batch: ``build`` makes it, always the same."""

    def __init__(self, seed: int, spoiler: str | None = None) -> None:
        self.seed, self.spoiler = seed, spoiler
        r = random.Random(seed)
        self.family = r.choice(("vector", "image", "sequence") if spoiler is None else ("vector", "sequence"))
        self.classes, self.count = r.randint(2, 6), r.randint(2, 5)
        self.training = r.random() < 0.7
        self.wants_input = r.random() < 0.3
        self.floating = r.random() < 0.4
        net, x = self._make(seed)
        self.input, self.axis = x, net.axis
        self.output = {"dict": "logits", "tuple": 1}.get(net.structure)
        with torch.no_grad(), seeded(seed):
            shape = self.pick(net(x)).shape
        random_ = torch.Generator().manual_seed(seed)
        if self.floating:
            self.target = torch.rand(shape, generator=random_, dtype=torch.float64)
        else:
            positions = [size for place, size in enumerate(shape) if place != self.axis % len(shape)]
            self.target = torch.randint(shape[self.axis], positions, generator=random_)

    def build(self, weights: int | None = None, still: bool = False) -> Net:
        """The network; ``weights`` seeds other numbers, ``still`` keeps spectral norms where they are."""
        net, _ = self._make(self.seed if weights is None else weights)
        net.train(self.training)
        for module in net.modules():
            if isinstance(module, parametrizations._SpectralNorm) and still:
                module.eval()
        return net

    def x(self) -> Tensor:
        x = self.input.clone()
        return x.requires_grad_() if self.wants_input and x.is_floating_point() else x

    def pick(self, result) -> Tensor:
        return result if self.output is None else result[self.output]

    def loss(self, result) -> Tensor:
        out = self.pick(result)
        if self.floating:
            return F.mse_loss(out, self.target)
        return F.cross_entropy(out.movedim(self.axis, -1).flatten(0, -2), self.target.flatten())

    def _make(self, weights: int) -> tuple[Net, Tensor]:
        r = random.Random(f"{self.seed} network")
        with seeded(weights):
            body, x, features, spatial = getattr(self, "_" + self.family)(r)
            axis = -1
            if self.spoiler is not None:
                body += [nn.Linear(features, features), Spoiled(self.spoiler, features)]
            if spatial and (self.family == "image" and r.random() < 0.6):
                if r.random() < 0.5:
                    body.append(MeanOverPositions(*range(2, 2 + len(spatial))))
                else:
                    body.append(nn.Flatten())
                    features *= torch.Size(spatial).numel()
                spatial = ()
            elif self.family == "sequence" and r.random() < 0.3:
                body.append(MeanOverPositions(1))
                spatial = ()
            if self.family == "image" and spatial:
                axis = 1
                head = _CONV[len(spatial) - 1](features, self.classes, 1)
            else:
                head = nn.Linear(features, self.classes)
            end = r.choice(("none", "none", "softmax", "log-softmax", "sigmoid", "gain", "norm"))
            if end == "gain":
                end = Gain(self.classes, *(1 for _ in spatial) if axis == 1 else ())
            elif end == "norm":
                end = nn.GroupNorm(1, self.classes) if axis == 1 else nn.LayerNorm(self.classes)
            net = Net(nn.Sequential(*body), head, end, axis, r.choice(("plain", "plain", "dict", "tuple")))
        with seeded(self.seed):
            x = x()
        return net, x

    def _vector(self, r: random.Random):
        start = r.randint(2, 7)
        body: list[nn.Module] = []
        features = start
        for number in range(r.randint(1, 4)):
            block, features = self._features(r, features, number == 0)
            body += block
        return body, lambda: torch.randn(self.count, start), features, ()

    def _features(self, r: random.Random, d: int, first: bool, length: int = 0) -> tuple[list[nn.Module], int]:
        """A block that maps the last axis, and its size behind."""
        k, bias = r.randint(2, 7), r.random() < 0.7
        kinds = [
            "linear", "in place", "residual", "branches", "norm", "twice", "tied", "frozen", "parametrized", "dropout",
            "gain",
        ]  # fmt: skip
        kind = "linear" if first else r.choice(kinds + ["mix", "attention"] * bool(length))
        act = _activation(r)
        if kind == "linear":
            return [nn.Linear(d, k, bias=bias), act], k
        if kind == "in place":
            return [nn.Linear(d, k, bias=bias), nn.ReLU(inplace=True)], k
        if kind == "residual":
            inner = nn.Sequential(act, nn.Linear(d, k), _activation(r), nn.Linear(k, d, bias=bias))
            return [Residual(inner[r.randint(0, 1) :])], d
        if kind == "branches":
            how = r.choice(("sum", "cat", "product", "gate"))
            return [Branches(how, -1, nn.Linear(d, k), nn.Linear(d, k, bias=bias)), act], k * (1 + (how == "cat"))
        if kind == "norm":
            norms = [nn.LayerNorm(d), nn.RMSNorm(d), nn.LayerNorm(d, elementwise_affine=False)]
            norm = r.choice([*norms, *([] if length else [nn.BatchNorm1d(d), nn.GroupNorm(1, d)])])
            return [nn.Linear(d, d), norm, act], d
        if kind == "twice":
            return [Twice(nn.Linear(d, d)), act], d
        if kind == "tied":
            return [Twice(nn.Linear(d, d), nn.Linear(d, d, bias=bias)), act], d
        if kind == "frozen":
            layer = nn.Linear(d, k)
            for parameter in r.choice(([layer.weight], [layer.bias], [*layer.parameters()])):
                parameter.requires_grad_(False)
            return [layer, act], k
        if kind == "parametrized":
            wrap = r.choice((parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal))
            return [wrap(nn.Linear(d, k)), act], k
        if kind == "dropout":
            return [nn.Linear(d, k), nn.Dropout(0.4)], k
        if kind == "gain":
            return [nn.Linear(d, k), Gain(k), act], k
        if kind == "mix":
            return [CausalMix(length), nn.Linear(d, k), act], k
        return [Attention(d, k, r.random() < 0.5, r.random() < 0.5)], d

    def _sequence(self, r: random.Random):
        length, d = r.randint(2, 5), r.randint(2, 6)
        body: list[nn.Module] = []
        indices = r.random() < 0.5
        if indices:
            body.append(nn.Embedding(7, d))
        features = d
        for number in range(r.randint(1, 4)):
            block, features = self._features(r, features, number == 0 and not indices, length)
            body += block

        def x() -> Tensor:
            return torch.randint(7, (self.count, length)) if indices else torch.randn(self.count, length, d)

        return body, x, features, (length,)

    def _image(self, r: random.Random):
        dims = r.choice((1, 1, 2, 2, 2, 3))
        start, sizes = r.randint(1, 4), [r.randint(3, 6 if dims < 3 else 4) for _ in range(dims)]
        shape = (self.count, start, *sizes)
        body: list[nn.Module] = []
        channels = start
        probe = torch.zeros(2, start, *sizes)
        for number in range(r.randint(1, 4)):
            block = self._planes(r, channels, probe.shape[2:], number == 0)
            with torch.no_grad(), seeded(0):
                probe = nn.Sequential(*block).train()(probe)
            for module in block:
                for part in module.modules():
                    if isinstance(part, nn.modules.batchnorm._NormBase):
                        part.reset_running_stats()
            body += block
            channels = probe.shape[1]
        return body, lambda: torch.randn(shape), channels, tuple(probe.shape[2:])

    def _planes(self, r: random.Random, c: int, sizes: torch.Size, first: bool) -> list[nn.Module]:
        n, k, act, bias = len(sizes) - 1, r.randint(1, 6), _activation(r), r.random() < 0.7
        same, smallest = _CONV[n], min(sizes)
        kind = r.choice(("conv", "conv", "transposed") if first else (
            "conv", "conv", "transposed", "in place", "residual", "branches", "twice", "norm", "pool", "dropout",
            "parametrized", "frozen",
        ))  # fmt: skip
        if kind == "conv":
            groups = r.choice([g for g in (1, 2, 3) if c % g == 0])
            kernel, dilation = [r.randint(1, min(3, s)) for s in sizes], r.randint(1, 2)
            mode = r.choice(("zeros", "zeros", "circular", "reflect", "replicate"))
            padding = 1 if mode == "zeros" or smallest > 1 else 0
            if any(dilation * (size - 1) >= s for size, s in zip(kernel, sizes, strict=True)):
                dilation = 1
            stride: int | list[int] = [r.randint(1, 2) for _ in sizes]
            if mode == "zeros" and r.random() < 0.2:
                padding, stride, kernel = "same", 1, [r.choice((1, 3)) for _ in sizes]
            return [
                same(c, groups * r.randint(1, 3), kernel, stride=stride, padding=padding, dilation=dilation,
                     groups=groups, padding_mode=mode, bias=bias),
                act,
            ]  # fmt: skip
        if kind == "transposed":
            groups, stride = r.choice([g for g in (1, 2) if c % g == 0]), r.randint(1, 2) if smallest < 5 else 1
            kernel = r.randint(1, 3)
            padding = r.randint(0, kernel > 1 and smallest > 1)
            return [
                _TRANSPOSED[n](c, groups * r.randint(1, 3), kernel, stride=stride, padding=padding,
                               output_padding=r.randint(0, 1) if stride > 1 else 0, groups=groups, bias=bias),
                act,
            ]  # fmt: skip
        if kind == "in place":
            return [same(c, k, 1), nn.ReLU(inplace=True)]
        if kind == "residual":
            return [Residual(nn.Sequential(act, same(c, k, 3, padding=1), _activation(r), same(k, c, 1)))]
        if kind == "branches":
            how = r.choice(("sum", "cat", "product", "gate"))
            return [Branches(how, 1, same(c, k, 3, padding=1), same(c, k, 1, bias=bias)), act]
        if kind == "twice":
            return [Twice(same(c, c, 3, padding=1), same(c, c, 3, padding=1) if r.random() < 0.5 else None), act]
        if kind == "norm":
            return [same(c, c, 1), r.choice((_BATCH_NORM[n](c), nn.GroupNorm(1, c), nn.GroupNorm(c, c))), act]
        if kind == "pool":
            return [same(c, k, 1), r.choice((_MEAN[n], _MAX[n]))(min(2, smallest))]
        if kind == "dropout":
            return [same(c, k, 1), nn.Dropout(0.4)]
        if kind == "parametrized":
            wrap = r.choice((parametrizations.weight_norm, parametrizations.spectral_norm))
            return [wrap(same(c, k, 3, padding=1)), act]
        layer = same(c, k, 1)
        layer.weight.requires_grad_(False)
        return [layer, act]


def _activation(r: random.Random) -> nn.Module:
    return r.choice((nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid, nn.SiLU, nn.PReLU, nn.ELU, nn.Identity))()


# --- the definition ---------------------------------------------------------------------------------------------------


def mapped(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's map without its bias, of another weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    if isinstance(layer, _CONV):
        return layer._conv_forward(x, weight, None)
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
    return convolve(x, weight, None, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)


def defined(case: Case, rule: str, net: Net, model: nn.Module, seed: int) -> tuple[dict[str, Tensor | None], Tensor]:
    """({parameter: gradient}, loss) of the rule on a plain network, given the feedback of a converted model."""
    numbers = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            tensor.copy_(numbers[name])
    feedback = {} if rule == "bp" else falign.feedback_state(model)
    wiring = falign.ALL_RULES[rule].wiring
    cuts: list[tuple[str, nn.Module, Tensor]] = []
    last: list[Tensor] = []
    learned: dict[int, Tensor] = {}
    names: dict[str, int] = {}
    passes = {name: int(feedback.get(f"{name}.passes", 0)) for name in feedback}

    def replace(name: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        plain = layer.forward
        shared = model.get_submodule(name).feedback.B
        if rule == "kp":
            if id(shared) not in learned:  # tied weights have one B, which is named once
                names[f"{name}.feedback.B"] = id(shared)
            learned.setdefault(id(shared), feedback[name].clone().requires_grad_())

        def layerwise(x: Tensor) -> Tensor:
            y = plain(x.detach())
            with torch.no_grad():
                stored, weight = feedback[name], layer.weight
                if rule == "brsf":
                    passes[name] += case.training
                if rule == "adafa" and not (case.training and weight.norm() != feedback[f"{name}.seen"]):
                    matrix = stored
                else:
                    matrix = effective_of(rule, weight, stored, passes[name])
            through = mapped(layer, x, matrix)
            y = y + (through - through.detach())
            if rule == "kp" and layer.weight.requires_grad:
                through = mapped(layer, x.detach(), learned[id(shared)])
                y = y + (through - through.detach())
            return y

        def direct(x: Tensor) -> Tensor:
            if x.requires_grad:
                cuts.append((name, layer, x))
            y = plain(x.detach())
            if name == "head":
                last.append(y)
            return y

        return layerwise if wiring == "layerwise" else direct

    for name in feedback:
        if name.split(".")[-1] not in ("passes", "seen"):
            layer = net.get_submodule(name)
            layer.forward = replace(name, layer)
    x = case.x()
    torch.manual_seed(seed)
    result = net(x)
    loss = total = case.loss(result)
    if wiring == "direct":
        output = last[0] if net.end in ENDS else case.pick(result)
        (e,) = torch.autograd.grad(loss, output, retain_graph=True)
        if rule == "drtp":
            e = projected(case, e, output.detach())
        for name, layer, at in cuts:
            total = total + (delivered(e, feedback[name], layer, at.shape) * at).sum()
    total.backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    gradients |= {name: learned[key].grad for name, key in names.items()}
    if x.requires_grad:
        gradients["input"] = x.grad
    return gradients, loss.detach()


def effective_of(rule: str, weight: Tensor, stored: Tensor, passes: int) -> Tensor:
    matrix = effective(rule, weight.numpy(), stored.numpy(), passes)
    return torch.as_tensor(matrix).reshape(weight.shape)


def projected(case: Case, e: Tensor, output: Tensor) -> Tensor:
    """-s t of drtp."""
    axis, target = case.axis, case.target
    if case.floating:
        axis = -1
    else:
        target = F.one_hot(target, output.shape[axis]).to(e.dtype).movedim(-1, axis)
    counted = (e != 0).any(axis, keepdim=True)
    difference = (output.softmax(axis) - target) * counted
    return -(e * difference).sum() / (difference**2).sum() * target * counted


def delivered(e: Tensor, matrix: Tensor, layer: nn.Module, shape: torch.Size) -> Tensor:
    if isinstance(layer, nn.Linear):
        if e.dim() > 2 and shape[:-1] == e.shape[:-1]:
            return e @ matrix
        if e.dim() == 2 and len(shape) == 3:  # one vector, at every position
            return (e @ matrix / shape[1] ** 0.5).unsqueeze(1).expand(shape)
    elif e.dim() == len(shape) > 2 and shape[2:] == e.shape[2:]:
        return torch.einsum("no...,oc->nc...", e, matrix)
    return (e.flatten(1) @ matrix).reshape(shape)
