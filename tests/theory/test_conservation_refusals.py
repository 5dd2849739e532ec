"""What the simulator and the checks of dominance refuse, each in one sentence."""

from math import inf, nan

import pytest
import torch
from conservation_cases import data, made, start

from falign.theory.conservation import (
    Dynamics,
    State,
    activation,
    alignment,
    conservation,
    decay_equilibrium,
    dominant,
    draw,
    gradient_descent,
    gradient_flow,
    gradients,
    invariant,
    loss_of,
    rule,
    small,
)
from falign.theory.dominance import (
    convergence,
    largest_kappa,
    lasting_descent,
    least_product,
    lojasiewicz_constant,
    lojasiewicz_exponent,
    neuron_descent,
    predicted_loss,
    split,
    squared_loss_rate,
)

untyped = pytest.mark.unchecked
NAMES = [
    "loss",
    "incoming",
    "alignment_term",
    "invariant",
    "expected_change",
    "alignment",
    "gradient_norm",
    "dominance",
]
DYNAMICS, (X, Y) = made("linear"), data()
STATE, ONE = start(DYNAMICS), torch.ones(2)
TIMES = torch.tensor([0.0, 1.0], dtype=torch.float64)


def _descend(state=STATE, x=X, y=Y, rate=0.1, steps=2, names=("loss",), at=None):
    return gradient_descent(state, DYNAMICS, x, y, rate=rate, steps=steps, names=names, at=at)


def _flow(state=STATE, x=X, y=Y, times=TIMES, **others):
    return gradient_flow(state, DYNAMICS, x, y, times=times, names=["loss"], **others)


def _once(widths=(6, 8, 7, 3), y=Y):
    return gradient_descent(start(DYNAMICS, widths=widths), DYNAMICS, X, y, rate=0.1, steps=0, names=NAMES, at=[0])


def _predicted(initial=ONE, kappa=ONE, exponent=1.0):
    return predicted_loss(initial, TIMES, kappa=kappa, mu=ONE, exponent=exponent)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: _descend(x=X[:, :3]), r"inputs have shape \(20, 3\), the network wants \(points, 6\)"),
        (lambda: _descend(y=Y[:, :2]), "targets have shape"),
        (lambda: _descend(x=X.float()), r"X is torch\.float32 on cpu, state\.B\[1\] torch\.float64 on cpu"),
        (lambda: _descend(x=X * nan), "not finite"),
        (lambda: _descend(start(made(rule_name="bp"))), r"feedback has shapes \[\], 'fa' wants"),
        (lambda: _descend(start(made(rule_name="dfa"))), "draw the state with the same dynamics"),
        (lambda: _descend(STATE._replace(W=STATE.W[::2])), "are no network"),
        (lambda: _descend(STATE._replace(b=STATE.b[:1])), "are no network"),
        (lambda: _descend(rate=inf), "rate is inf"),
        (lambda: _descend(steps=-1), "steps is -1"),
        (lambda: _descend(steps=torch.full((3, 2), 20)), "whole numbers below 20"),
        (lambda: _flow(STATE.map(torch.Tensor.float), X.float(), Y.float()), "integrated in float64"),
        (lambda: _flow(times=torch.tensor([0.0, inf])), "1 numbers of times are not finite"),
        (lambda: _flow(tolerance=nan), "tolerance is nan"),
        (lambda: gradients(STATE, DYNAMICS, X, Y[:, :1]), "targets have shape"),
        (lambda: loss_of(STATE, DYNAMICS, X[:, :1], Y), "inputs have shape"),
        (lambda: invariant(start(made(rule_name="bp")), DYNAMICS), "feedback has shapes"),
        (lambda: alignment(State(W=STATE.W[:1]), DYNAMICS), "hidden neurons"),
        (lambda: dominant(STATE, DYNAMICS, share=nan), "share is nan"),
        (lambda: small(STATE, nan), "size is nan"),
        (lambda: draw([6, 4, 3], seeds=[0], dynamics=DYNAMICS, scale=nan), "scale is nan"),
        (lambda: conservation(_once(), tolerance=0.0), "tolerance is 0.0"),
        (lambda: decay_equilibrium(_once()), "1 time was recorded"),
        (lambda: lasting_descent(_once((6, 4, 1), Y[:, :1])), "1 time was recorded"),
        (lambda: convergence(_once(), kappa=nan), "kappa is nan"),
        (lambda: convergence(_once(), exponent=nan), "exponent is nan"),
        (lambda: _predicted(exponent=nan), "exponent is nan"),
        (lambda: _predicted(kappa=-ONE), "kappa is -1 in a run"),
        (lambda: largest_kappa(torch.ones(2, 0)), "at least one number"),
        (lambda: neuron_descent(start(DYNAMICS, widths=(6, 4, 1)), DYNAMICS, X, Y), "targets have shape"),
        (lambda: squared_loss_rate(start(DYNAMICS, widths=(6, 4, 1)), made(loss_name="squared"), X[:, :2]), "inputs"),
    ],
)
def test_what_does_not_fit(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@untyped
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: _descend(x=X[0]), r"X has shape \[6\], expected \[\*#runs n _\]"),
        (lambda: _descend(y=Y[:3]), r"y has shape \[3, 3\], expected \[\*#runs n _\]"),
        (lambda: _descend(x=X.expand(3, 20, 6)), "all of its 2 runs"),
        (lambda: _descend(steps=2.5), r"steps must be an integer, got 2\.5 of type float"),
        (lambda: _descend(at=[0.5, 1]), r"at\[0\] must be an integer, got 0\.5 of type float"),
        (lambda: _descend(names="loss"), "names is 'loss', expected a sequence"),
        (lambda: Dynamics(activation="relu"), "activation is 'relu', expected an Activation"),
        (lambda: Dynamics(rates=[1.0, -2.0]), "rate is -2.0"),
        (lambda: rule(["fa"]), "unknown rule"),
        (lambda: activation(None), "unknown activation None"),
        (
            lambda: draw([6, 4.5, 3], seeds=[0], dynamics=DYNAMICS),
            r"widths\[1\] must be an integer, got 4\.5 of type float",
        ),
        (lambda: draw([6, 4, 3], seeds=0, dynamics=DYNAMICS), "seeds is 0, expected a sequence"),
        (lambda: _predicted(kappa=torch.ones(3)), r"kappa has shape \[3\], expected \[runs\]"),
        (lambda: _predicted(kappa=1.0), r"kappa is torch\.float64 on cpu, initial torch\.float32 on cpu"),
        (
            lambda: lojasiewicz_constant(torch.ones(2, 3), torch.ones(2, 4)),
            r"gradient_norm has shape \[2, 4\], expected \[\*runs times\]",
        ),
        (
            lambda: lojasiewicz_exponent(torch.ones(3), torch.ones(4)),
            r"gradient_norm has shape \[4\], expected \[times\]",
        ),
        (
            lambda: split(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3)),
            r"gradient_norm has shape \[2, 4\], expected \[\*times layers\]",
        ),
        (
            lambda: least_product(torch.ones(2, 3), torch.ones(2, 4)),
            r"W has shape \[2, 4\], expected \[outputs neurons\]",
        ),
    ],
)
def test_what_checked_annotations_refuse_too(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_zero_weights_stay_zero_in_a_dominant_start():
    state = dominant(start(DYNAMICS, scale=0.0), DYNAMICS)
    assert all((W == 0).all() for W in state.W[:1])
    assert all(part.isfinite().all() for part in (*state.W, *state.b))
