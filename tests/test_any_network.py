"""Random networks × rules × what PyTorch users do to a model: the gradient is the definition, or falign refuses."""

import copy
import io
import random
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import falign
from cases import RULES, rule_class
from random_networks import SPOILERS, Case, Spoiled, defined, seeded

EAGER = ("plain", "checkpointed", "functional", "deep-copied", "wrapped", "resumed")
COMPILED = ("compiled", "compiled after its twin")
compiled = [
    pytest.mark.compiled,
    pytest.mark.xdist_group("compiled"),  # the compiler takes seconds to import
    pytest.mark.filterwarnings("ignore"),
]

#: Why a network that is not spoiled may be refused; nothing else is a refusal.
REFUSALS = (
    "drtp: the softmax of a single output is always 1",
    "if only one axis can be these",
    "runs on inputs of different sizes",
    "once for each position of the output",
    "activation checkpointing does not say which pass it recomputes",  # brsf, a layer that runs twice
)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor):
        return self.inner(x)


def refused(error: Exception) -> bool:
    """Whether falign itself raised, or what wraps its words (Dynamo does), and not a wrong network."""
    if "does not run on the example" in str(error):
        return False
    if isinstance(error, falign.ConversionError):
        return True
    home = str(Path(falign.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    own = isinstance(error, (ValueError, RuntimeError, TypeError)) and frames[-1].filename.startswith(home)
    words = ("the model was changed after falign.convert", "was replaced after convert")
    return own or any(part in str(error) for part in words)


class Trial:
    """One case: a network, a rule, a mode."""

    def __init__(self, number: int, rule: str, mode: str, spoiler: str | None = None) -> None:
        self.case, self.rule, self.mode, self.number = Case(number, spoiler), rule, mode, number
        r = self.random = random.Random(f"{number} {rule} {mode}")
        self.still = mode == "checkpointed" or rule_class(rule).reads_weight
        family = r.choice((None, None, "uniform", "orthogonal", "low-rank(2)", "sparse(1)", "shared"))
        kind = rule_class(rule)
        if rule == "bp" or not kind.draws or (family == "shared" and (kind.learned or kind.adapts)):
            family = None
        self.moved = ""
        self.options = {"seed": r.randint(0, 9), "feedback": family}
        if rule != "bp":
            self.options["scale"] = r.choice((None, 0.7))
        if kind.wiring == "direct" or r.random() < 0.5:
            self.options["example"] = self.case.input
        if kind.wiring == "direct":
            self.options["output"] = self.case.output

    def __str__(self) -> str:
        return f"Trial({self.number}, {self.rule!r}, {self.mode!r}, {self.case.spoiler!r})"

    def converted(self, weights: int | None = None) -> nn.Module:
        model = self.case.build(weights, self.still)
        with seeded(self.number):
            if self.mode == "compiled after its twin":
                twin = self.case.build(weights, self.still)
                self.case.loss(torch.compile(twin, backend="aot_eager")(self.case.x())).backward()
            modes = {module: module.training for module in model.modules()}
            falign.convert(model, self.rule, **self.options)
            for module, mode in modes.items():
                if module.training != mode:
                    self.moved = type(module).__name__
                    module.training = mode
            for module in model.modules():
                if isinstance(module, Spoiled):
                    module.later()
        model.recompute = self.mode == "checkpointed"
        return model

    def prepared(self) -> nn.Module:
        """The model whose next step is looked at."""
        model = self.converted()
        if self.mode == "deep-copied":
            return copy.deepcopy(model)
        if self.mode != "resumed":
            return model
        self.step(model, model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        file = io.BytesIO()
        torch.save((model.state_dict(), falign.feedback_state(model) if self.rule != "bp" else {}), file)
        file.seek(0)
        state, feedback = torch.load(file)
        fresh = self.converted(weights=self.number + 1)
        fresh.load_state_dict(state)
        if self.rule != "bp":
            falign.load_feedback_state(fresh, feedback)
        self.model_of_definition = model
        return fresh

    def step(self, model: nn.Module, forward) -> tuple[dict[str, Tensor | None], Tensor]:
        x = self.case.x()
        torch.manual_seed(self.number)
        model.zero_grad(set_to_none=True)
        with falign.targets(model, self.case.target):
            loss = self.case.loss(forward(x))
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        if x.requires_grad:
            gradients["input"] = x.grad
        return gradients, loss.detach()

    def functional(self, model: nn.Module) -> tuple[dict[str, Tensor | None], Tensor]:
        case, model = self.case, copy.deepcopy(model)  # torch leaves a layer used twice with the weights of the call
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        wanted = {name: parameters.pop(name) for name, p in model.named_parameters() if p.requires_grad}
        buffers = {name: b.clone() for name, b in model.named_buffers()}

        def loss(wanted, buffers):
            with falign.targets(model, case.target):
                return case.loss(functional_call(model, (wanted, parameters, buffers), (case.input,)))

        torch.manual_seed(self.number)
        if self.random.random() < 0.5:
            gradients, value = torch.func.grad_and_value(loss)(wanted, buffers)
            return gradients, value
        for parameter in wanted.values():
            parameter.requires_grad_()
        value = loss(wanted, buffers)
        gradients = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
        return dict(zip(wanted, gradients, strict=True)), value.detach()

    def taken(self, model: nn.Module) -> tuple[dict[str, Tensor | None], Tensor]:
        if self.mode == "functional":
            return self.functional(model)
        if self.mode == "wrapped":
            outer = self.random.choice((Wrapper, nn.Sequential))(model)
            outer.train(self.case.training)
            for module in outer.modules():
                if self.still and type(module).__name__ == "_SpectralNorm":
                    module.eval()
            return self.step(model, outer)
        if self.mode in COMPILED:
            return self.step(model, torch.compile(model, backend="aot_eager"))
        return self.step(model, model)

    def run(self) -> str:
        """ "compared", "refused", "carried" or "seen"; raises where anything is wrong."""
        if self.mode in COMPILED:
            torch._dynamo.reset()
        try:
            model = self.prepared()
            before = copy.deepcopy(getattr(self, "model_of_definition", model))
            gradients, loss = self.taken(model)
        except Exception as error:
            if not refused(error):
                raise
            if self.case.spoiler is None and not any(words in str(error) for words in REFUSALS):
                raise AssertionError(f"refused without need: {error}") from error
            return "refused"
        if self.case.spoiler is not None:
            return self.seen(model)
        net = self.case.build(still=self.still)
        expected, value = defined(self.case, self.rule, net, before, self.number)
        assert torch.allclose(loss, value, rtol=1e-10, atol=0), "another loss"
        self.compare(gradients, expected)
        if self.rule != "bp":
            outer = nn.Sequential(model) if self.mode == "wrapped" else model
            found = falign.transport(outer, self.case.input, self.case.loss, target=self.case.target)
            assert found == {}, str(found)
        assert not self.moved, f"convert changed the mode of a {self.moved}"
        return "compared"

    def compare(self, gradients: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
        if self.mode == "functional":
            expected = {name: expected[name] for name in gradients}  # frozen ones were not asked for
        assert gradients.keys() == expected.keys(), gradients.keys() ^ expected.keys()
        whole = sum(float(g.square().sum()) for g in expected.values() if g is not None) ** 0.5
        wrong = {}
        for name, should in expected.items():
            got = gradients[name]
            if got is None or should is None:
                if got is not should and (
                    self.mode not in ("functional", *COMPILED) or bool((got if should is None else should).any())
                ):
                    wrong[name] = "no gradient" if got is None else "a gradient where there is none"
                continue
            error = float((got - should).norm()) / max(float(should.norm()), 1e-3 * whole, 1e-300)
            if not error <= 1e-9:
                wrong[name] = f"{error:.1e}"
        assert not wrong, wrong

    def seen(self, model: nn.Module) -> str:
        """A spoiled network that was accepted: it must be told from outside."""
        if self.rule == "bp":
            return "compared"
        case = self.case
        try:
            verified = falign.verify(model, case.input, case.loss, target=case.target)
            found = falign.transport(model, case.input, case.loss, target=case.target)
        except Exception as error:
            if not refused(error):
                raise
            return "seen"
        if verified and found == {} and case.spoiler in BY_HAND and "example" in self.options:
            return "carried"
        if verified and case.spoiler == "scaled" and rule_class(self.rule).wiring == "direct":  # its module is cut
            return "carried"
        assert not verified, "verify is true"
        assert any("body" in name for name in found), f"transport is silent: {found}"
        return "seen"


def survey(trials) -> Counter:
    """Run all trials; fail with all that are wrong."""
    counts: Counter = Counter()
    wrong = []
    for arguments in trials:
        try:
            outcome = Trial(*arguments).run()
        except Exception as error:
            outcome = "wrong"
            wrong.append(f"Trial{arguments}: {type(error).__name__}: {str(error)[:400]}")
        counts[outcome] += 1
    assert not wrong, f"{len(wrong)} of {sum(counts.values())}:\n" + "\n".join(wrong)
    return counts


def mostly_compared(counts: Counter) -> None:
    assert counts["compared"] > 0.6 * sum(counts.values()), counts


def plain_trials(mode, numbers):
    return ((number, RULES[(number + number // 9) % 9], mode) for number in numbers)


def spoiled_trials(spoiler, modes, numbers):
    rules = [rule for rule in RULES if rule != "bp"]
    return ((number, rules[number % 8], modes[number // 8 % len(modes)], spoiler) for number in numbers)


#: Spoilers that are products by hand: where an example shows them, they take feedback of their own.
BY_HAND = {"functional", "functional and called", "layer.forward", "matrix", "einsum"}


def caught(counts: Counter) -> None:
    assert counts["refused"] + counts["seen"] + counts["carried"] == sum(counts.values()) > 0, counts


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", EAGER)
def test_any_network(mode, part):
    start = 100 * EAGER.index(mode) + 18 * part
    mostly_compared(survey(plain_trials(mode, range(start, start + 18))))


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_a_spoiled_network_is_refused_or_seen(spoiler):
    start = SPOILERS.index(spoiler)
    modes = (*EAGER[start % 6 :], *EAGER)
    caught(survey(spoiled_trials(spoiler, modes, range(8))))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("mode", EAGER)
def test_many_networks(mode, part):
    start = 1000 + 10000 * EAGER.index(mode) + 100 * part
    mostly_compared(survey(plain_trials(mode, range(start, start + 100))))


@pytest.mark.slow
@pytest.mark.parametrize("spoiler", SPOILERS)
def test_many_spoiled_networks(spoiler):
    caught(survey(spoiled_trials(spoiler, EAGER, range(1000, 1048))))


@pytest.mark.parametrize("mode", COMPILED)
class TestCompiled:
    pytestmark = compiled

    def test_any_network(self, mode):
        start, count = {"compiled": (700, 9)}.get(mode, (800, 5))
        mostly_compared(survey(plain_trials(mode, range(start, start + count))))

    def test_a_spoiled_network_is_refused_or_seen(self, mode):
        for number, spoiler in enumerate(SPOILERS[COMPILED.index(mode) :: 3]):
            caught(survey(spoiled_trials(spoiler, [mode], [number])))

    @pytest.mark.slow
    @pytest.mark.parametrize("part", range(4))
    def test_many_networks(self, mode, part):
        start = 70000 + 1000 * COMPILED.index(mode) + 25 * part
        mostly_compared(survey(plain_trials(mode, range(start, start + 25))))

    @pytest.mark.slow
    def test_many_spoiled_networks(self, mode):
        for spoiler in SPOILERS:
            caught(survey(spoiled_trials(spoiler, [mode], range(8))))
