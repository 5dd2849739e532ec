"""The simulators' parts of ``gpu.py``: against the CPU (stage 1), and speed (stage 3)."""

import gzip
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from falign.theory import deep_linear, factorisation
from falign.theory.two_layer import (
    Dual,
    Penalty,
    Reduced,
    Start,
    WeightSpace,
    WidthFree,
    draw,
    draw_reduced,
    draw_weights,
)
from gpu_record import Record, Row, Setting, check

RIDGES = (Penalty(0.0), Penalty(0.1), Penalty(0.3))
RATES = {"identity": 1e-4, "relu": 1e-3, "tanh": 1e-2}


def _relative(one: Tensor, other: Tensor) -> float:
    one, other = one.double().cpu(), other.double().cpu()
    return float((one - other).norm() / other.norm())


def _compare(what: str, run: Callable[[torch.device], dict[str, Tensor]], device: torch.device) -> list[Row]:
    """What a computation gives on the device against the same on the CPU, in float64."""
    found, expected = run(device), run(torch.device("cpu"))
    return [check(what, _relative(found[name], expected[name]), 1e-10, quantity=name) for name in expected]


def engine_rows(device: torch.device) -> list[Row]:
    """The three engines: errors and measurements after forty steps, two seeds and two ridges."""
    sizes = {"n": 20, "d": 30, "p": 64}
    penalties = [Penalty(0.0), Penalty(3.0)]

    def stepped(engine: WeightSpace | Dual | WidthFree) -> dict[str, Tensor]:
        engine.advance(40)
        measured = engine.measure()
        return {"errors": engine.error(), "loss": measured["loss"], "cosine": measured["cosine"]}

    def scalar(kind: str, activation: str) -> Callable[[torch.device], dict[str, Tensor]]:
        def run(where: torch.device) -> dict[str, Tensor]:
            start = draw([0, 1], **sizes, activation=activation, test=5, device=where)
            if kind == "width-free":
                return stepped(WidthFree.from_start(start, rate=1e-3, penalties=penalties))
            engine = {"literal": WeightSpace, "dual": Dual}[kind]
            return stepped(engine(start, activation=activation, rate=1e-3, penalties=penalties))

        return run

    def classes(where: torch.device) -> dict[str, Tensor]:
        start = draw([0, 1], **sizes, outputs=3, activation="relu", device=where)
        start = Start(X=start.X, y=start.y.softmax(-1), W=start.W, beta=start.beta, b=start.b)
        more = {"loss": "softmax", "batch": 8, "dropout": 0.3}
        return stepped(WeightSpace(start, activation="relu", rate=1e-1, penalties=penalties, **more))

    def sampled(where: torch.device) -> dict[str, Tensor]:
        return stepped(WidthFree.sample([0, 1], n=20, d=30, p=10**9, rate=1e-3, penalties=penalties, device=where))

    return [
        *_compare("literal, tanh", scalar("literal", "tanh"), device),
        *_compare("literal, softmax, batches, dropout", classes, device),
        *_compare("dual, ReLU", scalar("dual", "relu"), device),
        *_compare("dual, tanh", scalar("dual", "tanh"), device),
        *_compare("width-free of a start", scalar("width-free", "identity"), device),
        *_compare("width-free, p = 10⁹", sampled, device),
    ]


def deep_linear_rows(device: torch.device) -> list[Row]:
    """Modes by steps and in flow, learning times, and matrices."""

    def of_modes(where: torch.device) -> dict[str, Tensor]:
        target = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64, device=where)
        chains = deep_linear.modes(target, [torch.full_like(target, 0.05)] * 3)
        stepped = deep_linear.gradient_descent(chains, rate=0.05, steps=40)
        flowed = deep_linear.gradient_flow(chains, times=[0.0, 1.0, 2.0])
        return {
            "steps": stepped.weights,
            "flow": flowed.weights,
            "learning time": deep_linear.learning_time(chains),
            "stable rate": torch.as_tensor(deep_linear.stable_rate(chains)),
        }

    def of_matrices(rule: str) -> Callable[[torch.device], dict[str, Tensor]]:
        def run(where: torch.device) -> dict[str, Tensor]:
            X, Y = (part.to(where) for part in deep_linear.task([2.0, 1.0, 0.3], inputs=8, outputs=5))
            more = {"weights": [0.1, 0.2, 0.1], "hidden": [10, 7], "seeds": [0, 1], "rule": rule}
            start = deep_linear.spectral(X.cpu(), Y.cpu(), **more).state
            start = deep_linear.network([W.to(where) for W in start.W], [B.to(where) for B in start.B], rule=rule)
            course = deep_linear.matrix_gradient_descent(start, X, Y, rule=rule, rate=0.05, steps=100)
            flowed = deep_linear.matrix_gradient_flow(start, X, Y, rule=rule, times=[0.0, 1.0, 2.0])
            return {"loss": course["loss"], "map": course["map"][:, -1], "flow": flowed["loss"]}

        return run

    return [
        *_compare("modes", of_modes, device),
        *(row for rule in ("fa", "dfa", "bp") for row in _compare(f"matrices, {rule}", of_matrices(rule), device)),
    ]


def factorisation_rows(device: torch.device) -> list[Row]:
    """Steps of every method, flow, and closed forms."""

    def run(method: str) -> Callable[[torch.device], dict[str, Tensor]]:
        def on(where: torch.device) -> dict[str, Tensor]:
            random = torch.Generator().manual_seed(0)
            Y = torch.randn(20, 24, generator=random, dtype=torch.float64).to(where)
            B = factorisation.feedback(20, 4, seeds=range(3)).to(where)
            start = factorisation.State(*(part.to(where) for part in factorisation.normal(Y, B, seeds=range(3))))
            if method == "fa*":
                start = factorisation.State(
                    *(part.to(where) for part in factorisation.orthonormal(Y, B, seeds=[0, 1, 2]))
                )
            rate = float(factorisation.sufficient_rate(method, Y, B, start).min())
            course = factorisation.gradient_descent(method, Y, B, start, rate=rate, steps=60, names=["error"])
            return {"error": course["error"], "factors": torch.cat([part.flatten() for part in course.end])}

        return on

    def forms(where: torch.device) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(0)
        Y = torch.randn(20, 24, generator=random, dtype=torch.float64).to(where)
        B = factorisation.feedback(20, 4, seeds=range(3)).to(where)
        flowed = factorisation.gradient_flow(
            "fa", Y, B, factorisation.zero(Y, B), times=[0.0, 0.01, 0.02], names=["error"]
        )
        return {
            "stationary error": factorisation.stationary_error(Y, B),
            "flow": flowed["error"],
            "range finder": factorisation.range_finder_ratios(Y, B, rank=2, oversampling=[0, 2], power=[0, 1]),
        }

    methods = [row for method in ("fa", "fa*", "gd") for row in _compare(method, run(method), device)]
    return [*methods, *_compare("closed forms", forms, device)]


def correctness_cases(record: Record, setting: Setting) -> None:
    """The simulators' part of stage 1."""
    device = setting.device
    record.case("two-layer engines", "against the CPU", lambda: engine_rows(device), needs=5)
    record.case("deep linear networks", "against the CPU", lambda: deep_linear_rows(device), needs=10)
    record.case("matrix factorisation", "against the CPU", lambda: factorisation_rows(device), needs=10)


def seconds(run: Callable[[], object], device: torch.device, repetitions: int = 5) -> float:
    """Median time of a call that the device has finished, after one that does not count."""
    times = []
    for repetition in range(repetitions + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repetition:
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def dual_rows(setting: Setting, activation: str) -> list[Row]:
    """Steps of the dual engine in float32, and the one matrix product that such a step contains.

    The rows of U(0) are drawn on the device, as only their time matters here: independent N(0, d), not ``X Wᵀ``.
    """
    runs, p, steps = (2, 256, 5) if setting.small else (50, 12_800, 100)
    device, n, d = setting.device, 50, 150
    small = draw_reduced(range(runs), n=n, d=d, p=64, activation=activation, dtype=torch.float32, device=device)
    random = torch.Generator(device).manual_seed(0)
    U, beta, b = (
        torch.randn(runs, *shape, generator=random, device=device) * scale
        for shape, scale in (((n, p), d**0.5), ((p,), 1.0), ((p,), 1.0))
    )
    start = Reduced(X=small.X, y=small.y, U=U, beta=beta, b=b)
    engine = Dual(start, activation=activation, rate=RATES[activation] / 4)
    step = seconds(lambda: engine.advance(steps), device) / steps
    K, signal, product = torch.randn(runs, n, n, device=device), torch.randn_like(U), torch.empty_like(U)
    bare = seconds(lambda: [torch.bmm(K, signal, out=product) for _ in range(10)], device) / 10
    finite = bool(engine.error().isfinite().all())
    told = f"{step * 1e3:.3f} ms a step of {runs} runs, {step / bare:.1f} times its matrix product"
    return [
        {
            "what": f"dual, {activation}, p = {p:,}, {runs} runs, n = {n}, d = {d}, float32",
            "ms_a_step": step * 1e3, "product_ms": bare * 1e3, "finite": finite, "told": told,
        }
    ]  # fmt: skip


def width_free_rows(setting: Setting) -> list[Row]:
    """Steps of fifty linear networks of a width that no memory holds, in float64."""
    runs, steps = (2, 20) if setting.small else (50, 1000)
    engine = WidthFree.sample(range(runs), n=50, d=150, p=10**9, rate=1e-4, device=setting.device)
    step = seconds(lambda: engine.advance(steps), setting.device) / steps
    whole = step * 20_000
    return [
        {
            "what": f"width-free, p = 10⁹, {runs} runs, n = 50, d = 150, float64",
            "ms_a_step": step * 1e3, "seconds_20000_steps": whole,
            "finite": bool(engine.error().isfinite().all()),
            "told": f"{step * 1e6:.0f} µs a step, 20,000 steps in {whole:.2f} s (extrapolated from {steps})",
        }
    ]  # fmt: skip


def _images(setting: Setting) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
    """Training and test images, normalised, with labels: real ones where ``FALIGN_DATA`` has them, or synthetic."""
    folder = os.environ.get("FALIGN_DATA")
    for name in ("mnist", "fashion-mnist", "mnist-10k") if folder and not setting.small else ():
        files = [
            Path(str(folder)) / name / f"{part}.gz"
            for part in (
                "train-images-idx3-ubyte",
                "train-labels-idx1-ubyte",
                "t10k-images-idx3-ubyte",
                "t10k-labels-idx1-ubyte",
            )
        ]
        if all(file.is_file() for file in files):
            X, y, X_test, y_test = (torch.from_numpy(_idx(file)).to(setting.device) for file in files)
            mean, deviation = X.float().mean(), X.float().std()
            X, X_test = ((part.flatten(1).float() - mean) / deviation for part in (X, X_test))
            return name, X, y.long(), X_test, y_test.long()
    train, test, pixels = (400, 100, 64) if setting.small else (60_000, 10_000, 784)
    random = torch.Generator(setting.device).manual_seed(0)
    X, teacher = (
        torch.randn(*shape, generator=random, device=setting.device) for shape in ((train + test, pixels), (pixels, 10))
    )
    y = (X @ teacher).argmax(1)
    what = f"synthetic: {train:,} points N(0, 1) of {pixels} numbers, labels of a linear teacher"
    return what, X[:train], y[:train], X[train:], y[train:]


def _idx(file: Path) -> np.ndarray:
    """The bytes of an IDX file in their shape."""
    with gzip.open(file) as stream:
        content = stream.read()
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4).astype(int)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def figure3_rows(setting: Setting) -> list[Row]:
    """Some epochs of figure 3 of Song, Xu and Lafferty 2021: ten seeds and three ridges as one block, float32."""
    seeds, p, batch, epochs = (2, 20, 100, 1) if setting.small else (10, 1000, 600, 6)
    data, X, y, X_test, y_test = _images(setting)
    weights = draw_weights(
        range(seeds), p=p, d=X.shape[1], outputs=10, dtype=torch.float32, device=setting.device
    )  # fmt: skip
    start = Start(X=X, y=torch.nn.functional.one_hot(y, 10).to(X), **weights, seeds=tuple(range(seeds)))
    engine = WeightSpace(start, activation="relu", rate=1e-2, penalties=RIDGES, loss="softmax", batch=batch)
    steps = -(-len(X) // batch)
    epoch = seconds(lambda: engine.advance(steps), setting.device, epochs - 1 or 1)
    flops = 2 * 2 * seeds * len(RIDGES) * p * X.shape[1] * len(X)
    accuracy = engine.accuracy(X_test, y_test).mean(0).tolist()
    done = engine.t // steps
    return [
        {
            "what": f"figure 3: {X.shape[1]}-{p}-10, {seeds} seeds x {len(RIDGES)} ridges, batch {batch}, float32",
            "data": data, "seconds_an_epoch": epoch, "epochs": done, "seconds_300_epochs": epoch * 300,
            "tflops_a_second": flops / epoch / 1e12, "accuracy": accuracy,
            "finite": bool(engine.error().isfinite().all()),
            "told": f"{epoch:.2f} s an epoch of {seeds * len(RIDGES)} runs; 300 epochs {epoch * 300:.0f} s "
            f"(extrapolated from {done}); {data}",
        }
    ]  # fmt: skip


def speed_cases(record: Record, setting: Setting) -> None:
    """Stage 3."""
    record.case("two-layer engines", "dual, relu", lambda: dual_rows(setting, "relu"), needs=10)
    record.case("two-layer engines", "dual, tanh", lambda: dual_rows(setting, "tanh"), needs=10)
    record.case("two-layer engines", "width-free", lambda: width_free_rows(setting), needs=10)
    record.case("figure 3", "30 runs together", lambda: figure3_rows(setting), needs=25)
