"""Threads that share a model compute what one thread computes."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import falign
from cases import RULES, batch, build, gradients, loss_of, relative, rule_class, step

STEPS = 60


def together(*works):
    """Run functions at once, each in a thread of its own, and raise what they raise."""
    faults = []
    begin = threading.Barrier(len(works))

    def guarded(work):
        try:
            begin.wait()
            work()
        except BaseException as fault:  # whatever it is, it is raised below
            faults.append(fault)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def still(model):
    """The model with what a rule moves at every pass held, so that passes can be compared."""
    return model.eval()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", ["mlp", "residual"])
def test_one_thread_evaluates_while_another_trains(case, rule):
    model, (x, y) = build(case, rule), batch(case)
    still(model)
    expected = gradients(model, x, y)
    with torch.no_grad():
        output = model(x)
    wrong = []

    def train():
        for _ in range(STEPS):
            if relative(gradients(model, x, y), expected) > 0:
                wrong.append("training")

    def evaluate():
        for _ in range(4 * STEPS):
            with torch.no_grad():
                if not torch.equal(model(x), output):
                    wrong.append("evaluation")

    together(train, evaluate, evaluate)
    assert not wrong


@pytest.mark.parametrize("rule", RULES)
def test_several_threads_train_on_their_own_batches(rule):
    """Hogwild: the gradients of the threads, taken apart, are those of one thread."""
    model = still(build("mlp", rule))
    x, y = batch("mlp")
    parts = [slice(4 * index, 4 * index + 4) for index in range(4)]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if rule_class(rule).reuses_gradient:  # of the weights, which arrives by a hook and has no node of its own
        names = [name for name in names if "feedback" not in name]

    def taken(part):
        with falign.targets(model, y[part]):
            loss = loss_of(model(x[part]), y[part])
        return torch.autograd.grad(loss, [model.get_parameter(name) for name in names])

    expected = [taken(part) for part in parts]
    wrong = []

    def work(index):
        for _ in range(STEPS):
            if not all(torch.equal(a, b) for a, b in zip(taken(parts[index]), expected[index], strict=True)):
                wrong.append(index)

    together(*(lambda index=index: work(index) for index in range(4)))
    assert not wrong


@pytest.mark.parametrize("rule", ["fa", "dfa", "kp"])
def test_contexts_hold_for_their_own_thread(rule):
    """One thread takes true gradients, another measures, a third learns by the rule."""
    model, (x, y) = still(build("conv", rule)), batch("conv")
    own = gradients(copy.deepcopy(model), x, y)
    twin = copy.deepcopy(model)
    with falign.backprop(twin):
        true = gradients(twin, x, y)
    names = [name for name in own if not name.endswith("feedback.B")]
    wrong = []

    def taken():
        with falign.targets(model, y):
            loss = loss_of(model(x), y)
        found = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
        return dict(zip(names, found, strict=True))

    def learn():
        for _ in range(STEPS // 2):
            if relative(taken(), {name: own[name] for name in names}) > 0:
                wrong.append("rule")

    def truly():
        for _ in range(STEPS // 2):
            with falign.backprop(model):
                if relative(taken(), {name: true[name] for name in names}) > 0:
                    wrong.append("true")

    together(learn, truly, learn)
    assert not wrong


class Recursive(nn.Module):
    """Calls itself, and in between itself without gradients."""

    def __init__(self):
        super().__init__()
        self.inner, self.layer = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x, depth=2):
        with torch.no_grad():
            hint = self.layer(x)
        if depth == 0:
            return self.layer(torch.tanh(x)) + hint
        return self(torch.tanh(self.inner(x)), depth - 1) + self.inner(self.layer(torch.tanh(x)))


@pytest.mark.parametrize("rule", ["fa", "usf", "kp"])
def test_calls_within_calls(rule):
    model, x = falign.convert(Recursive().double(), rule), torch.randn(5, 7, dtype=torch.float64)
    assert falign.verify(model, x, lambda output: output.square().sum())


@pytest.mark.parametrize("rule", ["dfa", "drtp"])
def test_an_evaluation_within_a_forward(rule):
    """A model that looks at itself without gradients while it runs (distillation from itself)."""

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x, look=True):
            h = torch.tanh(self.a(x))
            if look:
                with torch.no_grad():
                    self(x, False)
            return self.c(torch.tanh(self.b(h)))

    model, x, y = Looking().double(), torch.randn(6, 9, dtype=torch.float64), torch.randint(5, (6,))
    falign.convert(model, rule, example=x)
    assert falign.verify(model, x, lambda output: loss_of(output, y), target=y)


class Recomputed(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


@pytest.mark.parametrize("rule", ["fa", "frsf", "dfa"])
def test_recomputations_in_several_threads(rule):
    x, y = batch("residual")
    model = falign.convert(Recomputed(build("residual")), rule, example=x)
    names = [name for name, _ in model.named_parameters()]
    step(model, x, y)
    expected = {name: model.get_parameter(name).grad.clone() for name in names}
    wrong = []

    def work():
        for _ in range(STEPS // 3):
            found = torch.autograd.grad(loss_of(model(x), y), [model.get_parameter(name) for name in names])
            if relative(dict(zip(names, found, strict=True)), expected) > 0:
                wrong.append(1)

    together(work, work)
    assert not wrong
