"""What the simulator and the checks of dominance refuse, each in one sentence."""

import os
from math import inf, nan

import pytest
import torch
from conservation_cases import data, made, start

from falign.theory.conservation import (
    Dynamics,
    State,
    alignment,
    conservation,
    decay_equilibrium,
    descend,
    dominant,
    draw,
    flow,
    gate,
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

untyped = pytest.mark.skipif("FALIGN_TYPECHECK" in os.environ, reason="checked annotations refuse it before we do")
NAMES = ["loss", "incoming", "potential", "invariant", "account", "alignment", "gradient_norm", "dominance"]
DYNAMICS, (X, Y) = made("linear"), data()
STATE, ONE = start(DYNAMICS), torch.ones(2)
TIMES = torch.tensor([0.0, 1.0], dtype=torch.float64)


def _descend(state=STATE, x=X, y=Y, rate=0.1, steps=2, names=("loss",), at=None):
    return descend(state, DYNAMICS, x, y, rate=rate, steps=steps, names=names, at=at)


def _flow(state=STATE, x=X, y=Y, times=TIMES, **others):
    return flow(state, DYNAMICS, x, y, times=times, names=["loss"], **others)


def _once(widths=(6, 8, 7, 3), y=Y):
    return descend(start(DYNAMICS, widths=widths), DYNAMICS, X, y, rate=0.1, steps=0, names=NAMES, at=[0])


def _predicted(initial=ONE, kappa=ONE, exponent=1.0):
    return predicted_loss(initial, TIMES, kappa=kappa, mu=ONE, exponent=exponent)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: _descend(x=X[:, :3]), r"inputs have shape \(20, 3\), the network wants \(points, 6\)"),
        (lambda: _descend(y=Y[:, :2]), "targets have shape"),
        (lambda: _descend(x=X.float()), "inputs are torch.float32, the weights torch.float64"),
        (lambda: _descend(x=X * nan), "not finite"),
        (lambda: _descend(start(made(rule_name="bp"))), r"feedback has shapes \[\], 'fa' wants"),
        (lambda: _descend(start(made(rule_name="dfa"))), "draw the state with the same dynamics"),
        (lambda: _descend(STATE._replace(W=STATE.W[::2])), "are no network"),
        (lambda: _descend(STATE._replace(b=STATE.b[:1])), "are no network"),
        (lambda: _descend(rate=inf), "rate is inf"),
        (lambda: _descend(steps=-1), "steps is -1"),
        (lambda: _descend(steps=torch.full((3, 2), 20)), "whole numbers below 20"),
        (lambda: _flow(STATE.map(torch.Tensor.float), X.float(), Y.float()), "integrated in float64"),
        (lambda: _flow(times=torch.tensor([0.0, inf])), "times must increase"),
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
        (lambda: _descend(x=X[0]), r"inputs have shape \(6,\)"),
        (lambda: _descend(y=Y[:3]), r"targets have shape \(3, 3\)"),
        (lambda: _descend(x=X.tolist()), "inputs is of type list"),
        (lambda: _descend(x=X.expand(3, 20, 6)), "all of its 2 runs"),
        (lambda: _descend(steps=2.5), "steps is 2.5"),
        (lambda: _descend(at=[0.5, 1]), "recording steps must increase"),
        (lambda: _descend(names="loss"), "names is 'loss', expected a sequence"),
        (lambda: Dynamics(gate="relu"), "gate is 'relu', expected a Gate"),
        (lambda: Dynamics(rates=[1.0, 2.0]), r"rate is \[1.0, 2.0\]"),
        (lambda: rule(["fa"]), "unknown rule"),
        (lambda: gate(None), "unknown gate None"),
        (lambda: draw([6, 4.5, 3], seeds=[0], dynamics=DYNAMICS), "widths of inputs"),
        (lambda: draw([6, 4, 3], seeds=0, dynamics=DYNAMICS), "seeds is 0, expected a sequence"),
        (lambda: _predicted(kappa=torch.ones(3)), r"kappa \(3,\)"),
        (lambda: _predicted(kappa=1.0), "kappa is of type float"),
        (lambda: lojasiewicz_constant(torch.ones(2, 3), torch.ones(2, 4)), r"gradient_norm \(2, 4\)"),
        (lambda: lojasiewicz_exponent(torch.ones(3), torch.ones(4)), "one a time of both"),
        (lambda: split(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3)), "the same of all"),
        (lambda: largest_kappa([[1.0]]), "dominance is of type list"),
        (lambda: least_product(torch.ones(2, 3), torch.ones(2, 4)), "the same of all"),
    ],
)
def test_what_checked_annotations_refuse_too(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_zero_weights_stay_zero_in_a_dominant_start():
    state = dominant(start(DYNAMICS, scale=0.0), DYNAMICS)
    assert all((W == 0).all() for W in state.W[:1])
    assert all(part.isfinite().all() for part in (*state.W, *state.b))
