"""Stage 2 of ``gpu.py``: time and memory of forward and backward under each rule, beside what the card can do.

Every repetition runs one step of every variant, in shuffled order and without waiting in between, as a training loop
would; device events stand around each. A ratio is the median, over repetitions, of the variant's time over that of
plain backpropagation, eager, in the same repetition. The optimizer's step is left out: rules do not differ there.
"""

import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import falign
from gpu_models import Network, Timed, timed
from gpu_record import Record, Row, Setting, one_line

CHECKPOINTED = "bp, checkpointed"
VARIANTS = ("bp", CHECKPOINTED, "fa", "dfa", "usf", "kp")
COMPILED = ("bp", "fa", "dfa", "usf", "kp", CHECKPOINTED)
"""The most telling first: not all compilations may fit the time."""

AGREES = 0.1
"""What 1 - cosine of a compiled to an eager gradient may be at most, in bfloat16."""


def intervals(steps: dict[str, Callable[[], object]], repetitions: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call, interleaved in shuffled order, three rounds before they count."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0)
    for repetition in range(repetitions + 3):
        shuffle.shuffle(order)
        for name in order:
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                steps[name]()
                end.record()
                if repetition >= 3:
                    events[name].append((begin, end))
            else:
                clock = time.perf_counter()
                steps[name]()
                if repetition >= 3:
                    found[name].append(time.perf_counter() - clock)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return {name: [begin.elapsed_time(end) / 1e3 for begin, end in pairs] for name, pairs in events.items()}
    return found


def spread(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def ceiling_rows(setting: Setting) -> list[Row]:
    """What the card can do: products of large matrices, and copies."""
    size, device, rows = (64 if setting.small else 8192), setting.device, []
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32, no tf32")):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        times = intervals({"product": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, 20, device)["product"]
        rate = 2 * size**3 / statistics.median(times) / 1e12
        rows.append({
            "what": f"matrix product {size}³, {name}", "dtype": str(dtype).removeprefix("torch."), "tflops": rate,
            "told": f"{name}: {rate:.3g} TFLOP/s",
        })  # fmt: skip
    source = torch.randn(1 << (16 if setting.small else 28), device=device)
    target = torch.empty_like(source)
    median = statistics.median(intervals({"copy": lambda: target.copy_(source)}, 20, device)["copy"])
    rate = 2 * source.nbytes / median / 1e12
    rows.append({
        "what": f"copy of {source.nbytes / 2**20:.0f} MiB, bytes read and written", "terabytes_a_second": rate,
        "told": f"copy: {rate:.3g} TB/s",
    })  # fmt: skip
    return rows


class Bench:
    """One network under every variant, with one batch.

    Args:
        case: The network.
        setting: Where.
    """

    def __init__(self, case: Timed, setting: Setting) -> None:
        self.case = case
        self.setting = setting
        self.models: dict[str, Network] = {}
        self.flops: dict[str, float | None] = {}
        torch.manual_seed(0)
        x, self.y = case.batch(setting.device)
        self.x = x if case.autocast or not x.is_floating_point() else x.bfloat16()

    def build(self, variant: str) -> Network:
        """The network under a variant, with the same weights in all of them, on the device."""
        torch.manual_seed(1)
        with torch.device(self.setting.device):
            model = self.case.make()
        if variant == CHECKPOINTED:
            model.recompute = True
        elif variant != "bp":
            family = self.case.dfa_feedback if variant == "dfa" else None
            falign.convert(model, variant, example=self.x[:2].float() if self._short else self.x[:2], feedback=family)
        if not self.case.autocast:
            model.bfloat16()
        if self.case.channels_last:
            model.to(memory_format=torch.channels_last)
        self.models[variant] = model
        return model

    @property
    def _short(self) -> bool:
        return self.x.dtype == torch.bfloat16

    def step(self, model: nn.Module, forward: Callable[[Tensor], Tensor] | None = None) -> None:
        """Forward, mean cross-entropy, backward, from no gradients."""
        model.zero_grad(set_to_none=True)
        how = torch.autocast(self.setting.device.type, torch.bfloat16) if self.case.autocast else nullcontext()
        with how:
            output = (model if forward is None else forward)(self.x)
            loss = nn.functional.cross_entropy(output.flatten(0, -2).float(), self.y.flatten())
        loss.backward()

    def held(self, model: nn.Module) -> int:
        """Bytes of weights, feedback and other buffers, each counted once."""
        tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
        return sum(tensor.nbytes for tensor in tensors.values())

    def memory(self, step: Callable[[], object], model: nn.Module) -> Row:
        """What is held between steps, and how much a step needs above it; only CUDA tells the latter."""
        found: Row = {"held_gib": self.held(model) / 2**30}
        if self.setting.device.type == "cuda":
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            torch.cuda.synchronize()
            found["step_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
            model.zero_grad(set_to_none=True)
        return found

    def count(self, variant: str) -> None:
        """FLOPs of a step, as PyTorch counts them; None where it cannot."""
        try:
            with FlopCounterMode(display=False) as counter:
                self.step(self.models[variant])
            self.flops[variant] = float(counter.get_total_flops())
        except Exception as error:  # the count is a convenience: times do not depend on it
            print(f"no FLOP count of {variant}: {one_line(error)}")
            self.flops[variant] = None

    def row(self, variant: str, mode: str, own: list[float], base: list[float], product: float | None) -> Row:
        """Times and ratios of a variant."""
        low, ratio, high = spread([mine / plain for mine, plain in zip(own, base, strict=True)])
        fast, middle, slow = (1e3 * value for value in spread(own))
        flops = self.flops.get("bp" if variant == CHECKPOINTED else variant)
        rate = flops / middle / 1e9 if flops else None
        return {
            "variant": variant, "mode": mode, "ms": middle, "ms_low": fast, "ms_high": slow,
            "ratio": ratio, "low": low, "high": high, "tflop": flops / 1e12 if flops else None,
            "tflop_counted": (self.flops.get(variant) or 0) / 1e12 or None, "tflops_a_second": rate,
            "utilisation": rate / product if rate and product else None, "repetitions": len(own),
            "told": f"{variant} {middle:.3g} ms, {ratio:.2f} of bp",
        }  # fmt: skip

    @property
    def repetitions(self) -> int:
        """How many count."""
        return 3 if self.setting.small else 12

    def eager_rows(self, product: float | None) -> list[Row]:
        """All variants, eager; one that fails is told and the others go on."""
        rows: list[Row] = []
        more: dict[str, Row] = {}
        for variant in VARIANTS:
            try:
                model = self.build(variant)
                self.step(model)
                more[variant] = self.memory(lambda model=model: self.step(model), model)
                self.count(variant)
            except Exception as error:  # out of memory above all
                self.models.pop(variant, None)
                rows.append({"variant": variant, "mode": "eager", "error": one_line(error)})
                if self.setting.device.type == "cuda":
                    torch.cuda.empty_cache()
        steps = {name: lambda model=model: self.step(model) for name, model in self.models.items()}
        times = intervals(steps, self.repetitions, self.setting.device)
        base = times.get("bp", [float("nan")] * self.repetitions)
        for variant, own in times.items():
            rows.append(self.row(variant, "eager", own, base, product) | more[variant])
            self.models[variant].zero_grad(set_to_none=True)
        return rows

    def compiled_rows(self, variant: str, product: float | None) -> list[Row]:
        """One variant compiled, beside eager backpropagation."""
        plain, model = self.models["bp"], self.models[variant]
        self.step(model)
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        try:
            compiled, cold = self._compile(model, whole=True)
            whole = True
        except torch._dynamo.exc.Unsupported as error:
            print(f"{variant} is no whole graph: {one_line(error)}")
            compiled, cold = self._compile(model, whole=False)
            whole = False
        apart = _apart({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)
        del expected
        memory = self.memory(lambda: self.step(model, compiled), model)
        steps = {"bp, eager": lambda: self.step(plain), "compiled": lambda: self.step(model, compiled)}
        times = intervals(steps, self.repetitions, self.setting.device)
        for used in (plain, model):
            used.zero_grad(set_to_none=True)
        row = self.row(variant, "compiled", times["compiled"], times["bp, eager"], product)
        checked = {"difference": apart, "tolerance": AGREES, "holds": apart <= AGREES}
        return [row | memory | checked | {"compile_seconds": cold, "whole_graph": whole}]

    def _compile(self, model: Network, whole: bool) -> tuple[Callable[[Tensor], Tensor], float]:
        """The compiled network, and the seconds that its first step took."""
        torch._dynamo.reset()  # all networks share one forward, and its recompilations are limited
        compiled = torch.compile(model, backend=self.setting.backend, dynamic=False, fullgraph=whole)
        begin = time.perf_counter()
        self.step(model, compiled)
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize()
        return compiled, time.perf_counter() - begin


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """1 - the least cosine, over parameters, of two sets of gradients; infinite if the parameters differ.

    Gradients below a ten-thousandth of the whole are left out: they may be rounding.
    """
    if one.keys() != other.keys():
        return float("inf")
    sizes = {name: float(torch.linalg.vector_norm(grad, dtype=torch.float32)) for name, grad in other.items()}
    least = 1e-4 * sum(size**2 for size in sizes.values()) ** 0.5
    found = [
        float(nn.functional.cosine_similarity(one[name].float().flatten(), other[name].float().flatten(), dim=0))
        for name, size in sizes.items()
        if not size < least
    ]
    return 1 - min(found)


class Speed:
    """The cases of stage 2, eager ones before compiled ones."""

    def __init__(self, record: Record, setting: Setting) -> None:
        self.record = record
        self.setting = setting
        self.cases = timed(setting.small)
        self.benches: dict[str, Bench] = {}

    @property
    def product(self) -> float | None:
        """Measured rate of bfloat16 products, TFLOP/s."""
        found = [row["tflops"] for row in self.record.rows if row.get("dtype") == "bfloat16"]
        return float(str(found[0])) if found else None

    def eager(self) -> None:
        """The card's ceilings, then all networks."""
        if self.setting.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.record.case("ceilings", "card", lambda: ceiling_rows(self.setting), needs=5)
        for name, case in self.cases.items():

            def run(name: str = name, case: Timed = case) -> list[Row]:
                self.benches[name] = Bench(case, self.setting)
                rows = self.benches[name].eager_rows(self.product)
                return [{"title": case.title, "numbers": case.numbers, **row} for row in rows]

            self.record.case(name, "eager", run, needs=25)

    def compiled(self) -> None:
        """Variant by variant through all networks."""
        small = self.setting.small  # the test suite has no time for more
        for variant in COMPILED[:3] if small else COMPILED:
            for name, case in self.cases.items():
                if small and name == "resnet18":
                    continue
                if variant not in getattr(self.benches.get(name), "models", ()):
                    missing = [{"left_out": "not measured eagerly"}]
                    self.record.case(name, f"{variant}, compiled", lambda rows=missing: rows)
                    continue

                def run(name: str = name, variant: str = variant) -> list[Row]:
                    return self.benches[name].compiled_rows(variant, self.product)

                self.record.case(name, f"{variant}, compiled", run, needs=case.compile_seconds)
        self.benches.clear()
