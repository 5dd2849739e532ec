"""Stage 1 of ``gpu.py``: every rule, the law, compilation, autocast, dropout, on the device against float64 on the CPU.

The networks and batches are those of the test suite, whose gradients an oracle in NumPy confirms on the CPU.
"""

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import falign
from gpu_record import Record, Row, Setting, check


def of_tests(name: str, folder: str = "tests") -> ModuleType:
    """A module of the checkout's test suite."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / folder))
    return importlib.import_module(name)


cases = of_tests("cases")
by_hand = of_tests("test_by_hand")

Gradients = dict[str, Tensor]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
SHORT = {torch.float64: "float64", torch.float32: "float32"}
COSINE = 0.2
"""What 1 - cosine to the float64 gradient may be at most under autocast in bfloat16, which moves samples of these small
batches across a ReLU's edge: up to 0.06 on a CPU. Gradients of another rule are at 0.29 or more."""


def difference(one: Gradients, other: Gradients) -> float:
    """The largest relative difference of two sets of gradients; infinite if they are not of the same parameters."""
    if one.keys() != other.keys():
        return float("inf")
    return cases.relative(*({name: value.cpu() for name, value in part.items()} for part in (one, other)))


def model_on(device: torch.device, case: str, rule: str | None, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network of a case, moved to the device and converted there."""
    model = cases.build(case, dtype=dtype).to(device)
    if rule is not None:
        falign.convert(model, rule, seed=0, example=batch_on(device, case, dtype)[0])
        if cases.follows(rule):  # what forward passes have moved so far
            falign.load_feedback_state(model, falign.feedback_state(cases.build(case, rule)))
    return model


def batch_on(device: torch.device, case: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The batch of a case on the device."""
    x, y = cases.batch(case, dtype)
    return x.to(device), y.to(device)


def gradients(model: nn.Module, x: Tensor, y: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> Gradients:
    """Gradients of one fresh step, of a plain or a converted model."""
    if "_falign" in model.__dict__:
        return cases.gradients(model, x, y, forward)
    model.zero_grad(set_to_none=True)
    cases.loss_of((model if forward is None else forward)(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rule_rows(device: torch.device, rule: str) -> list[Row]:
    """B and the gradients of two passes in a row of a rule, every network, float64 and float32, against the CPU."""
    rows = []
    for case in cases.CASES:
        reference = cases.build(case, rule)
        passes = [gradients(reference, *cases.batch(case)) for _ in range(2)]
        for dtype, tolerance in TOLERANCE.items():
            model = model_on(device, case, rule, dtype)
            about = {"network": case, "dtype": SHORT[dtype]}
            if rule != "bp" and not cases.follows(rule):
                own, there = (falign.feedback_state(m) for m in (cases.build(case, rule, dtype=dtype), model))
                same = own.keys() == there.keys() and all(torch.equal(own[name], there[name].cpu()) for name in own)
                rows.append(check("B is the CPU's, bit for bit", 0.0 if same else float("inf"), 0.0, **about))
            batch = batch_on(device, case, dtype)
            worst = max(difference(gradients(model, *batch), expected) for expected in passes)
            rows.append(check("gradients against float64 on the CPU", worst, tolerance, **about))
    return rows


def _law_network(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A ReLU network, for whose neurons the law is exact, and a batch."""
    random = torch.Generator().manual_seed(4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if kind == "mlp":
            model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 7))
            x = torch.randn(16, 20, generator=random, dtype=torch.float64)
        else:
            model = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.Flatten(),
                nn.Linear(6 * 9, 7),
            )  # fmt: skip
            x = torch.randn(16, 3, 8, 8, generator=random, dtype=torch.float64)
    return model.double(), x, torch.randint(7, (16,), generator=random)


def law_rows(device: torch.device, rule: str) -> list[Row]:
    """The conservation law over thirty steps of gradient descent on the device."""
    rows = []
    for kind in ("mlp", "conv"):
        for dtype in TOLERANCE:
            model, x, y = _law_network(kind)
            model, x, y = model.to(device, dtype), x.to(device, dtype), y.to(device)
            falign.convert(model, rule, example=x)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.2, weight_decay=1e-2 if rule in ("kp", "pfa") else 0.0)
            law = falign.measure.ConservationLaw(model, optimizer, example=x)
            for _ in range(30):
                gradients(model, x, y)
                optimizer.step()
            report = law.report()
            residuals = [row.residual for row in report.laws if row.checked]
            worst = max((value if value is not None else float("nan") for value in residuals), default=float("nan"))
            row = check("residual of the law", worst, report.tolerance, network=kind, dtype=SHORT[dtype])
            row["holds"] = row["holds"] and report.holds and report.conclusive
            rows.append(row | {"layers": report.checked})
    return rows


def compiled_rows(device: torch.device, rule: str, networks: list[str], backend: str) -> list[Row]:
    """Gradients of three compiled passes in a row, against those of the same model run eagerly."""
    rows = []
    for case in networks:
        torch._dynamo.reset()
        model = model_on(device, case, rule)
        eager, batch = copy.deepcopy(model), batch_on(device, case)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        worst = max(difference(gradients(model, *batch, compiled), gradients(eager, *batch)) for _ in range(3))
        rows.append(check("compiled against eager", worst, 1e-10, network=case, dtype="float64", backend=backend))
    return rows


def after_plain_rows(device: torch.device, rule: str, second: str, backend: str) -> list[Row]:
    """What is compiled after the same class ran compiled under another rule, or none: the rule's own gradients?"""
    torch._dynamo.reset()
    batch = batch_on(device, "mlp")
    expected = {name: gradients(model_on(device, "mlp", name), *batch) for name in (rule, second)}
    plain = model_on(device, "mlp", None)
    true = gradients(plain, *batch, torch.compile(plain, backend=backend))
    rows = []

    def compare(what: str, model: nn.Module, wanted: Gradients) -> None:
        found = gradients(model, *batch, torch.compile(model, backend=backend))
        rows.append(check(what, difference(found, wanted), 1e-10, network="mlp", dtype="float64", backend=backend))

    compare("another instance, converted after a plain one was compiled", model_on(device, "mlp", rule), expected[rule])
    falign.convert(plain, rule, seed=0, example=batch[0])
    compare("the same instance, converted after it was compiled", plain, expected[rule])
    falign.revert(plain)
    compare("reverted and compiled again: backpropagation", plain, true)
    falign.convert(plain, second, seed=0, example=batch[0])
    compare(f"converted to {second} and compiled again", plain, expected[second])
    return rows


def autocast_rows(device: torch.device, rule: str) -> list[Row]:
    """Gradients of float32 weights under autocast in bfloat16: near the exact ones, and in float32."""
    rows = []
    for case in cases.CASES:
        exact = gradients(cases.build(case, rule), *cases.batch(case))
        model = model_on(device, case, rule, torch.float32)
        x, y = batch_on(device, case, torch.float32)
        with torch.autocast(device.type, torch.bfloat16), falign.targets(model, y):
            loss = cases.loss_of(model(x), y)
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        same = found.keys() == exact.keys() and all(grad.dtype == torch.float32 for grad in found.values())
        worst = max(
            (1 - float(torch.cosine_similarity(found[name].double().cpu().flatten(), exact[name].flatten(), dim=0)))
            if same
            else float("inf")
            for name in exact
        )
        rows.append(check("autocast: 1 - cosine to float64", worst, COSINE, network=case, dtype="bfloat16"))
    return rows


def _angle(found: Gradients, expected: Gradients) -> float:
    """1 - cosine of all gradients as one vector."""
    one, other = (
        torch.cat([part[name].double().cpu().flatten() for name in expected]) for part in (found, expected)
    )  # fmt: skip
    return 1 - float(torch.cosine_similarity(one, other, dim=0))


def _library_network(case: str, rule: str, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    model, x = by_hand.make(case)
    x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
    return falign.convert(model.to(device, dtype), rule, seed=0, example=x), x


def library_rows(device: torch.device, case: str) -> list[Row]:
    """PyTorch's attention and recurrent modules, and products by hand, with the kernels that the device has for them.

    A direct rule cuts them where it can; where it cannot, ``convert`` says so on the CPU as well, and there is no row.
    """
    rows = []
    for rule in ("bp", "fa", "usf", "kp", "adafa", "dfa", "dkp", "probe"):
        try:
            exact, x = _library_network(case, rule, torch.device("cpu"), torch.float64)
        except ValueError:
            continue
        expected = by_hand.gradients(exact, x)
        if case == "kernel of layers' weights":
            del expected["attention.k.bias"]  # 0 but for rounding: softmax does not see it
        for dtype, tolerance in TOLERANCE.items():
            model, x = _library_network(case, rule, device, dtype)
            about = {"network": case, "rule": rule, "dtype": SHORT[dtype]}
            twin = copy.deepcopy(model)  # its weights lie apart
            found = by_hand.gradients(model, x)
            worst = difference({name: found[name] for name in expected if name in found}, expected)
            rows.append(check("gradients against float64 on the CPU", worst, tolerance, **about))
            worst = difference(by_hand.gradients(twin, x), found)
            rows.append(check("a copy's gradients against the model's", worst, tolerance, **about))
            if dtype == torch.float32 and case != "bilinear" and rule != "probe":  # no autocast of torch's; B has moved
                with torch.autocast(device.type, torch.bfloat16):
                    half = by_hand.gradients(twin, x)
                rows.append(check("autocast: 1 - cosine to float64", _angle(half, expected), COSINE, **about))
            elif dtype == torch.float64 and rule != "bp":
                verified = falign.verify(model, x, by_hand.loss_of)
                worst = verified.worst.error if not verified.transported else float("inf")
                rows.append(check("verify: gradients against the definition", worst, verified.tolerance, **about))
    return rows


def dropout_rows(device: torch.device, rule: str) -> list[Row]:
    """``verify`` of a network with dropout, whose masks the device's own generator draws."""
    torch.manual_seed(5)
    x, y = torch.randn(64, 20, dtype=torch.float64).to(device), torch.randint(7, (64,)).to(device)
    model = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 7)
    )
    model = falign.convert(model.to(device, torch.float64), rule, example=x)

    def state() -> Tensor:
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    before = state()
    found = falign.verify(model, x, lambda output: cases.loss_of(output, y), target=y)
    kept = 0.0 if torch.equal(before, state()) else float("inf")
    about = {"network": "mlp with dropout", "dtype": "float64"}
    return [
        check("verify: gradients against the definition", found.worst.error, found.tolerance, **about),
        check("verify leaves the device's random generator as it was", kept, 0.0, **about),
    ]


def alignment_rows(device: torch.device, rule: str) -> list[Row]:
    """``measure.alignment`` on the device against the CPU: dominance, and the cosine of every layer."""
    rows = []
    for case in ("mlp", "conv"):
        found = []
        for model, batch in (
            (cases.build(case, rule), cases.batch(case)),
            (model_on(device, case, rule), batch_on(device, case)),
        ):
            measured = falign.measure.alignment(model, cases.loss_of, *batch)
            numbers = [measured.dominance, *(row.cosine for row in measured.layers)]
            found.append(torch.tensor(numbers, dtype=torch.float64))
        worst = float((found[0] - found[1]).abs().max())
        rows.append(check("alignment against the CPU", worst, 1e-6, network=case, dtype="float64"))
    return rows


def start_rows(device: torch.device, scheme: str) -> list[Row]:
    """Weights that ``falign.init`` draws on the device against those that it draws on the CPU from the same seed."""
    drawn = []
    for model, x in (
        (cases.build("conv", "fa"), cases.batch("conv")[0]),
        (model_on(device, "conv", "fa"), batch_on(device, "conv")[0]),
    ):
        falign.init.SCHEMES[scheme](model, example=x, seed=7)
        drawn.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    worst = difference(drawn[1], drawn[0])
    return [check("initial weights against the CPU's of the same seed", worst, 1e-10, network="conv", dtype="float64")]


def eager_cases(record: Record, setting: Setting) -> None:
    """All that is not compiled, the rules' gradients first."""
    device = setting.device
    for rule in ("bp", "fa", "kp", "dfa", "probe", "fdfa") if setting.small else falign.ALL_RULES:
        record.case("gradients", rule, lambda rule=rule: rule_rows(device, rule), needs=10)
    layerwise = [name for name, each in falign.ALL_RULES.items() if each.wiring == "layerwise"]
    for rule in ("fa", "kp") if setting.small else layerwise:
        record.case("conservation law", rule, lambda rule=rule: law_rows(device, rule), needs=5)
    for rule in ("fa", "dfa") if setting.small else falign.ALL_RULES:
        record.case("autocast", rule, lambda rule=rule: autocast_rows(device, rule), needs=5)
        record.case("dropout", rule, lambda rule=rule: dropout_rows(device, rule), needs=5)
    for scheme in falign.init.SCHEMES:
        record.case("initial weights", scheme, lambda scheme=scheme: start_rows(device, scheme), needs=5)
    for case in ("gru", "encoder layer") if setting.small else by_hand.CASES:
        record.case("attention and recurrence", case, lambda case=case: library_rows(device, case), needs=10)
    for rule in ("fa", "dfa"):
        record.case("alignment", rule, lambda rule=rule: alignment_rows(device, rule), needs=5)


def compiled_cases(record: Record, setting: Setting) -> None:
    """What is compiled by the backend that users have."""
    device, backend = setting.device, setting.backend
    for rule, second in (("fa", "dfa"), ("dfa", "usf")):

        def after_plain(rule: str = rule, second: str = second) -> list[Row]:
            return after_plain_rows(device, rule, second, backend)

        record.case("compiled after another", rule, after_plain, needs=40)
    for rule in ("fa", "dfa") if setting.small else ("fa", "dfa", "usf", "kp"):
        record.case("compiled", rule, lambda rule=rule: compiled_rows(device, rule, ["mlp"], backend), needs=20)
    torch._dynamo.reset()


def traced_cases(record: Record, setting: Setting) -> None:
    """Every rule, traced and partitioned as for the code generator, but run by PyTorch's own kernels."""
    backend = "aot_eager_decomp_partition"
    for rule in () if setting.small else falign.ALL_RULES:

        def run(rule: str = rule) -> list[Row]:
            return compiled_rows(setting.device, rule, ["mlp", "conv", "sequence"], backend)

        record.case("compiled", f"{rule}, traced", run, needs=10)
    torch._dynamo.reset()
