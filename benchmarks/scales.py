"""Which size of the feedback serves each rule: accuracy over candidates and learning rates, and the first gradients.

A candidate gives every layer the standard deviation of B's entries: ``scale s`` is s/√fan_in, a number for all layers;
``c rms(W)`` follows the weights of the layer at conversion. For direct rules, ``c backprop`` gives B_l the gain |error
at x_l| / |error at the output| that backpropagation has at conversion (measured with a random error), ``c own`` that of
the layer alone, rms(W)·√fan_in, and ``c chain`` the product of those of this layer and all after it.

All candidates, learning rates and seeds of one (network, rule, optimizer) are trained together, as one network with
copies stacked by ``torch.vmap``; such groups run in worker processes, the important ones first, until ``--budget``.
``--ratios`` writes the first gradients instead, ``--table FILE…`` prints what docs/scales.md shows. Needs torch, numpy
and the library; ``benchmarks/scales_networks.py`` has the networks and the images.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.functional import cross_entropy

import falign
from falign._wiring import feedbacks
from falign.layers import KINDS, kind_of
from scales_networks import LLAMA, NETWORKS, fashion, make

RATES = {"sgd": (0.01, 0.03, 0.1), "adam": (0.001,), "sgd-long": (0.01,)}
LONG = 10  # times as many steps
DIRECT = ("dfa", "drtp")
LAYERWISE = tuple(rule for rule in falign.ALL_RULES if rule not in ("bp", *DIRECT))
DECAY = {"kp": 1e-3}
SKIP = ("position",)
BATCH = 100
LONG_NETWORKS = ("lenet", "mlp")
FOCUS = ("lenet", "mlp", "transformer", "resnet20-bn")


class Candidate(NamedTuple):
    """One way to choose the standard deviation of B's entries."""

    kind: str
    factor: float

    def __str__(self) -> str:
        return f"scale {self.factor:g}" if self.kind == "scale" else f"{self.factor:g} {self.kind}"


def candidates(rule: str) -> list[Candidate]:
    """What is compared for a rule."""
    if rule == "bp":
        return [Candidate("scale", 1.0)]
    if rule in DIRECT:
        fixed = [Candidate("scale", s) for s in (0.03, 0.1, 0.3, 1.0)]
        measured = [Candidate("backprop", c) for c in (0.3, 0.5, 1.0, 3.0)]
        return [*fixed, *measured, Candidate("own", 0.3), Candidate("chain", 1.0)]
    return [Candidate("scale", s) for s in (0.3, 0.6, 1.0)] + [Candidate("rms(W)", c) for c in (0.3, 0.5, 1.0, 2.0)]


def spreads(model: nn.Module, rule: str) -> dict[str, float]:
    """The spread of every layer of a converted model: scale 1 is a deviation of 1/√fan_in."""
    if rule in DIRECT:
        return {name: float(part.matrix.shape[1]) for name, part in feedbacks(model).items()}
    return {name: KINDS[part.kind].fan_in(model.get_submodule(name)) for name, part in feedbacks(model).items()}


def carried(model: nn.Module, x: Tensor) -> dict[str, float]:
    """{layer: |error that it hands to its input| / |error at the output|} of a plain model, for a random error."""
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple) -> tuple:
            here = args[0].view_as(args[0]) if args[0].requires_grad else args[0].detach().requires_grad_()
            here.retain_grad()
            inputs[name] = here
            return (here, *args[1:])

        return hook

    layers = {name: layer for name, layer in model.named_modules() if kind_of(layer) is not None}
    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    y = model(x)
    error = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    y.backward(error)
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return {name: float(here.grad.norm() / error.norm()) for name, here in inputs.items() if here.grad is not None}


def gains(plain: nn.Module, model: nn.Module, rule: str, x: Tensor) -> dict[str, dict[str, float]]:
    """{kind of candidate: {layer: gain of the error's norm at factor 1}}, gain the deviation times √fan_in."""
    spread = spreads(model, rule)
    own = {name: KINDS[part.kind].fan_in(model.get_submodule(name)) for name, part in feedbacks(model).items()}
    rms = {name: float(plain.get_submodule(name).weight.detach().square().mean().sqrt()) for name in spread}
    found = {"scale": dict.fromkeys(spread, 1.0)}
    if rule not in DIRECT:
        found["rms(W)"] = {name: (rms[name] or (3 * own[name]) ** -0.5) * own[name] ** 0.5 for name in spread}
        return found
    found["backprop"] = carried(plain, x)
    names = list(spread)
    found["own"] = {name: rms[name] * own[name] ** 0.5 for name in names}
    found["chain"] = {name: math.prod(found["own"][later] for later in names[i:]) for i, name in enumerate(names)}
    return found


def converted(network: str, rule: str, seed: int, x: Tensor) -> tuple[nn.Module, dict[str, dict[str, float]]]:
    """A converted network at scale 1, and the gains of all candidates."""
    plain = make(network, seed)
    model = copy.deepcopy(plain)
    skip = [name for name in SKIP if hasattr(plain, name)]
    if rule == "bp":
        return model, {"scale": {}}
    falign.convert(model, rule, seed=seed, scale=1.0, example=x, skip=skip)
    return model, gains(plain, model, rule, x)


class Group(NamedTuple):
    """What is trained together."""

    network: str
    rule: str
    optimizer: str


def stacked(
    group: Group, rows: list[tuple[Candidate, float, int]], x: Tensor, device: str
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """The network without numbers, and parameters and buffers of all copies: first axis (candidate, rate, seed)."""
    seeds = sorted({seed for _, _, seed in rows})
    models, found = zip(*(converted(group.network, group.rule, seed, x) for seed in seeds), strict=True)
    parameters, buffers = stack_module_state(list(models))
    which = torch.tensor([seeds.index(seed) for _, _, seed in rows])
    result: list[dict[str, Tensor]] = []
    for tensors in (parameters, buffers):
        whole = {}
        for key, value in tensors.items():
            here = value.detach()[which]
            if key.endswith(".feedback.B"):
                layer = key.removesuffix(".feedback.B")
                sizes = [c.factor * found[seeds.index(seed)][c.kind].get(layer, 1.0) for c, _, seed in rows]
                here = here * torch.tensor(sizes).reshape(-1, *[1] * (here.dim() - 1))
            whole[key] = here.to(device)
        result.append(whole)
    for value in result[0].values():
        value.requires_grad_()
    return models[0].to(device), result[0], result[1]


class Stepper:
    """SGD with momentum 0.9, or Adam, with a learning rate of its own for every copy."""

    def __init__(self, kind: str, parameters: list[Tensor], rates: Tensor, decay: float) -> None:
        self.kind, self.decay, self.count = kind, decay, 0
        self.parameters = parameters
        self.rates = [rates.reshape(-1, *[1] * (p.dim() - 1)).to(p.device) for p in parameters]
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters] if kind == "adam" else []

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients, which it clears."""
        gradients = [p.grad for p in self.parameters]
        self.count += 1
        if self.decay:
            torch._foreach_add_(gradients, self.parameters, alpha=self.decay)
        if self.kind != "adam":
            torch._foreach_mul_(self.first, 0.9)
            torch._foreach_add_(self.first, gradients)
            change = torch._foreach_mul(self.first, self.rates)
        else:
            torch._foreach_lerp_(self.first, gradients, 0.1)
            torch._foreach_mul_(self.second, 0.999)
            torch._foreach_addcmul_(self.second, gradients, gradients, 0.001)
            size = torch._foreach_sqrt(self.second)
            torch._foreach_div_(size, math.sqrt(1 - 0.999**self.count))
            torch._foreach_add_(size, 1e-8)
            change = torch._foreach_div(torch._foreach_mul(self.first, self.rates), size)
            torch._foreach_div_(change, 1 - 0.9**self.count)
        torch._foreach_sub_(self.parameters, change)
        for p in self.parameters:
            p.grad = None


def train(
    group: Group, rows: list[tuple[Candidate, float, int]], data: tuple[Tensor, ...], steps: int, deadline: float
) -> list[dict] | None:
    """Train all copies, copy by copy independent of the others; None when the deadline passed."""
    x, y, test_x, test_y = data
    device = x.device
    model, parameters, buffers = stacked(group, rows, x[:16].cpu(), str(device))
    model.train()

    def forward(own: dict[str, Tensor], kept: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        if group.rule == "drtp":
            with falign.targets(model, labels):
                return cross_entropy(functional_call(model, (own, kept), (images,)), labels)
        return cross_entropy(functional_call(model, (own, kept), (images,)), labels)

    def right(own: dict[str, Tensor], kept: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return (functional_call(model, (own, kept), (images,)).argmax(1) == labels).float().mean()

    losses_of = torch.vmap(forward, randomness="different")
    right_of = torch.vmap(right, in_dims=(0, 0, None, None))
    seeds = sorted({seed for _, _, seed in rows})
    which = torch.tensor([seeds.index(seed) for _, _, seed in rows], device=device)
    randoms = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
    epochs = math.ceil(steps * BATCH / len(x))
    passes = [[torch.randperm(len(x), generator=randoms[s]) for _ in range(epochs)] for s in seeds]
    order = torch.stack([torch.cat(one) for one in passes]).to(device)
    rates = torch.tensor([rate for _, rate, _ in rows])
    stepper = Stepper(group.optimizer, list(parameters.values()), rates, DECAY.get(group.rule, 0.0))
    first, last = torch.zeros(len(rows), device=device), torch.zeros(len(rows), device=device)
    tail = max(1, steps // 15)
    for step in range(steps):
        picked = order[:, step * BATCH : (step + 1) * BATCH][which]
        losses = losses_of(parameters, buffers, x[picked], y[picked])
        losses.sum().backward()
        stepper.step()
        with torch.no_grad():
            if step == 0:
                first.copy_(losses)
            if step >= steps - tail:
                last.add_(losses.detach() / tail)
        if step % 10 == 0 and time.time() > deadline:
            return None
    with torch.no_grad():
        pairs = zip(test_x.split(250), test_y.split(250), strict=True)
        scores = torch.stack([right_of(parameters, buffers, a, b) for a, b in pairs]).mean(0)
    result = []
    for (candidate, rate, seed), a, b, score in zip(rows, first.tolist(), last.tolist(), scores.tolist(), strict=True):
        diverged = not math.isfinite(b) or b > 2 * a
        result.append(
            {**group._asdict(), "candidate": str(candidate), "rate": rate, "seed": seed}
            | {"accuracy": None if diverged else round(100 * score, 2), "diverged": diverged}
            | {"loss": None if diverged else round(b, 4)}
        )
    return result


def first_gradients(network: str, rule: str, seeds: int, data: tuple[Tensor, ...] | None) -> list[dict]:
    """Per candidate and seed the largest and the smallest over layers of |f|/|g|, weight gradients at conversion."""
    rows = []
    for seed in range(seeds):
        if network in LLAMA:
            x, y = torch.randint(0, 512, (2, 4, 32), generator=torch.Generator().manual_seed(seed))
        else:
            assert data is not None
            x, y = data[0][:64], data[1][:64]
        model, found = converted(network, rule, seed, x)
        start = {name: part.matrix.detach().clone() for name, part in feedbacks(model).items()}
        layers = {name: layer for name, layer in model.named_modules() if kind_of(layer) is not None}

        def norms(model: nn.Module = model, layers: dict = layers, x: Tensor = x, y: Tensor = y) -> dict[str, float]:
            model.zero_grad()
            cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            return {name: float(layer.weight.grad.norm()) for name, layer in layers.items()}

        with falign.backprop(model):
            true = norms()
        for candidate in candidates(rule):
            with torch.no_grad():
                for name, part in feedbacks(model).items():
                    part.matrix.copy_(start[name] * candidate.factor * found[candidate.kind].get(name, 1.0))
            ratio = [norm / true[name] for name, norm in norms().items() if true[name] > 0]
            rows.append({"network": network, "rule": rule, "candidate": str(candidate), "seed": seed}
                        | {"largest": max(ratio), "smallest": min(ratio)})  # fmt: skip
    return rows


Task = tuple[Group, list[tuple[Candidate, float, int]]]


def tasks(networks: Iterable[str], rules: Iterable[str], optimizers: Iterable[str], seeds: int, copies: int) -> list:
    """All groups, cut into at most ``copies`` copies each, the important ones first."""
    first, second = ("bp", "fa", "dfa"), ("usf", "kp", "adafa")

    def rank(group: Group) -> int | None:
        """Tier of a group, None where it is not in the grid."""
        network, rule, optimizer = group
        if optimizer == "adam":
            return 2 if rule in first else None
        if optimizer == "sgd-long":
            if network not in LONG_NETWORKS or rule not in (*first, "usf", "drtp"):
                return None
            return 0 if rule in ("fa", "dfa") else 2
        if rule in first or rule in second:
            return 0 if rule in first else 1
        return 3 if network in FOCUS else None

    ranked = {group: tier for group in map(Group._make, product(networks, rules, optimizers))
              if (tier := rank(group)) is not None}  # fmt: skip
    result: list[Task] = []
    for group in sorted(ranked, key=ranked.__getitem__):
        rows = list(product(candidates(group.rule), RATES[group.optimizer], range(seeds)))
        size = math.ceil(len(rows) / math.ceil(len(rows) / copies))
        result += [(group, rows[start : start + size]) for start in range(0, len(rows), size)]
    return result


_HELD: dict[str, Any] = {}


def _begin(device: str, steps: int, deadline: float, sizes: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    for other in ("flash", "mem_efficient", "cudnn"):  # vmap knows attention written out
        getattr(torch.backends.cuda, f"enable_{other}_sdp")(False)
    _HELD.update(data=tuple(part.to(device) for part in fashion(*sizes)), steps=steps, deadline=deadline)


def _do(task: Task) -> tuple[Task, list[dict] | str | None, float]:
    begin = time.time()
    try:
        found: list[dict] | str | None = None
        if begin < _HELD["deadline"]:
            steps = _HELD["steps"] * (LONG if task[0].optimizer == "sgd-long" else 1)
            found = train(*task, _HELD["data"], steps, _HELD["deadline"])
    except Exception as error:  # of one group; it is written down, and the others go on
        found = f"{type(error).__name__}: {str(error)[:300]}"
    if _HELD["data"][0].is_cuda:
        torch.cuda.empty_cache()  # the card is shared with the other workers
    return task, found, time.time() - begin


def write(path: Path, content: dict) -> None:
    """Write whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def run(
    todo: list[Task], device: str, workers: int, steps: int, budget: float, sizes: tuple[int, int], out: Path
) -> None:
    """Train every group in worker processes until the budget is spent; everything finished is in the file."""
    begin = time.time()
    deadline = begin + budget
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    content: dict[str, Any] = {"setting": {"steps": steps, "batch": BATCH, "device": name, "torch": torch.__version__}}
    content |= {"runs": [], "failed": {}, "unfinished": []}
    pool = multiprocessing.get_context("spawn").Pool(workers, _begin, (device, steps, deadline, sizes))
    waiting = pool.imap_unordered(_do, todo)
    for _ in todo:
        try:
            (group, rows), found, took = waiting.next(timeout=max(1.0, deadline + 20 - time.time()))
        except multiprocessing.TimeoutError:
            print("a worker did not stop at the deadline", flush=True)
            break
        label = "/".join(group)
        if isinstance(found, list):
            content["runs"] += found
        elif found is None:
            content["unfinished"].append(label)
        else:
            content["failed"][label] = found
        word = found if isinstance(found, str) else "done" if found else "no time"
        print(f"{time.time() - begin:6.1f} s  {label:28} {len(rows):3} copies {took:6.1f} s  {word}", flush=True)
        write(out, content)
    pool.terminate()


def summary(runs: list[dict]) -> tuple[str, float, float, int] | None:
    """Of all runs of one (network, rule, candidate): a table's cell, best accuracy, the one at 0.01, diverged runs."""
    by_rate: dict[float, list[float | None]] = {}
    for row in runs:
        by_rate.setdefault(row["rate"], []).append(row["accuracy"])
    if not by_rate:
        return None
    whole = {rate: [a for a in found if a is not None] for rate, found in by_rate.items() if None not in found}
    diverged = sum(row["diverged"] for row in runs)
    best = max(whole, key=lambda rate: statistics.mean(whole[rate]), default=None)
    usual = min(by_rate)
    at_usual = statistics.mean(whole[usual]) if usual in whole else math.nan
    if best is None:
        return f"– / – / {diverged}", math.nan, math.nan, diverged
    mean, spread = statistics.mean(whole[best]), statistics.pstdev(whole[best])
    second = "–" if math.isnan(at_usual) else f"{at_usual:.1f}"
    return f"{mean:.1f} ± {spread:.1f} / {second} / {diverged}", mean, at_usual, diverged


def table(content: dict) -> Iterator[str]:
    """The markdown tables of what was written."""
    runs, ratios = content.get("runs", []), content.get("ratios", [])
    for optimizer, rule in dict.fromkeys((row["optimizer"], row["rule"]) for row in runs):
        own = [row for row in runs if (row["optimizer"], row["rule"]) == (optimizer, rule)]
        networks = [network for network in NETWORKS if any(row["network"] == network for row in own)]
        yield f"\n### `{rule}`, {optimizer}\n"
        yield "| B | " + " | ".join(networks) + " | mean |"
        yield "|---" * (len(networks) + 2) + "|"
        for candidate in map(str, candidates(rule)):
            found = [summary([r for r in own if (r["network"], r["candidate"]) == (n, candidate)]) for n in networks]
            known = [cell for cell in found if cell is not None]
            if not known:
                continue
            means = [statistics.mean(0.0 if math.isnan(cell[i]) else cell[i] for cell in known) for i in (1, 2)]
            cells = ["" if cell is None else cell[0] for cell in found]
            last = f"{means[0]:.1f} / {means[1]:.1f} / {sum(cell[3] for cell in known)}"
            yield f"| {candidate if rule != 'bp' else 'W'} | " + " | ".join([*cells, last]) + " |"
    for rule in dict.fromkeys(row["rule"] for row in ratios):
        own = [row for row in ratios if row["rule"] == rule]
        networks = list(dict.fromkeys(row["network"] for row in own))
        yield f"\n### First gradients, `{rule}`\n"
        yield "| B | " + " | ".join(networks) + " |"
        yield "|---" * (len(networks) + 1) + "|"
        for candidate in dict.fromkeys(row["candidate"] for row in own):
            cells = []
            for network in networks:
                here = [row for row in own if (row["network"], row["candidate"]) == (network, candidate)]
                low, high = min(r["smallest"] for r in here), max(r["largest"] for r in here)
                cells.append(f"{low:.2g} – {high:.2g}")
            yield f"| {candidate} | " + " | ".join(cells) + " |"


def main() -> None:
    """Run the grid, or look at the first gradients, or print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=[*NETWORKS, *LLAMA])
    parser.add_argument("--rules", nargs="+", default=list(falign.ALL_RULES), choices=list(falign.ALL_RULES))
    parser.add_argument("--optimizers", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--copies", type=int, default=99, help="trained together at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds")
    parser.add_argument("--small", action="store_true", help="only whether it runs: 4 steps, 1 seed, few images")
    parser.add_argument("--ratios", action="store_true")
    parser.add_argument("--table", type=Path, nargs="+", help="files of earlier runs, put together")
    parser.add_argument("--out", type=Path, default=Path("scales.json"))
    chosen = parser.parse_args()
    if chosen.table:
        merged: dict[str, list] = {"runs": [], "ratios": []}
        for path in chosen.table:
            for key, value in json.loads(path.read_text()).items():
                if key in merged:
                    merged[key] += value
        print("\n".join(table(merged)))
    elif chosen.ratios:
        torch.set_num_threads(1)
        data = fashion() if set(chosen.networks) & set(NETWORKS) else None
        rows: list[dict] = []
        for network, rule in product(chosen.networks, chosen.rules):
            if rule not in ("bp", "drtp"):
                rows += first_gradients(network, rule, chosen.seeds, data)
                write(chosen.out, {"ratios": rows})
    else:
        seeds, steps, sizes = (1, 4, (500, 250)) if chosen.small else (chosen.seeds, chosen.steps, (60000, 5000))
        todo = tasks(chosen.networks, chosen.rules, chosen.optimizers, seeds, chosen.copies)
        budget = min(chosen.budget, 1e9)
        run(todo, chosen.device, chosen.workers, steps, budget, sizes, chosen.out)


if __name__ == "__main__":
    main()
