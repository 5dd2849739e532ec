"""Trajectories as tables and pictures: where a run left the finite numbers there is a word, with step and quantity."""

import re
import warnings
from math import isfinite

import pytest
import torch
from good_calls import GOOD, numbers
from matplotlib import pyplot as plt

from falign.theory import attention as att
from falign.theory import conservation as law
from falign.theory import deep_linear as deep
from falign.theory import factorisation as fac
from falign.theory import two_layer as two
from falign.theory.statement import TheoremCheck
from falign.theory.two_layer import kernels, theorems

pytestmark = pytest.mark.unchecked

LINEAR = law.Dynamics(activation=law.activation("linear"))


def two_layer(rate):
    return two.simulate(two.Dual(two.draw([0, 1], n=4, d=6, p=8), rate=rate), [0, 1, 5, 400])


def followed_kernels(rate):
    engine = two.Dual(two.draw([0, 1], n=4, d=6, p=8), activation="relu", rate=rate)
    return kernels.follow_kernels(engine, [0, 1, 5, 400])


def factorised(rate):
    Y, B = numbers(6, 5), fac.feedback(6, 2, seeds=[0, 1])
    start = fac.normal(Y, B, seeds=[0, 1], scale=0.1)
    return fac.gradient_descent("fa", Y, B, start, rate=rate, steps=300, names=["error", "loss", "cosine"])


def conserved(rate):
    state = law.draw([4, 5, 3], seeds=[0, 1], dynamics=LINEAR)
    names = ["loss", "incoming", "dominance"]
    return law.gradient_descent(state, LINEAR, numbers(6, 4), numbers(6, 3), rate=rate, steps=100, names=names)


def attended(rate):
    block = att.draw(seeds=[0, 1], dynamics=LINEAR, inputs=2, width=3, d=2, above=3)
    X, y = numbers(4, 3, 2), numbers(4, 2, seed=1)
    return att.gradient_descent(block, LINEAR, X, y, scores="linear", rate=rate, steps=100)


def modes(rate):
    return deep.gradient_descent(deep.modes([0.5, 1.0], [0.1, 0.1]), rate=rate, steps=200)


def matrices(rate):
    state = deep.network([numbers(5, 4), numbers(3, 5)], [numbers(3, 5, seed=1)])
    return deep.matrix_gradient_descent(state, numbers(9, 4), numbers(9, 3), rate=rate, steps=100)


def predicted(rate):
    W, B = [0.1 * numbers(5, 4), 0.1 * numbers(3, 5)], [numbers(3, 5, seed=1)]
    return deep.predict(W, B, numbers(9, 4), numbers(9, 3), rate=rate, steps=100)


SIMULATORS = [two_layer, followed_kernels, factorised, conserved, attended, modes, matrices, predicted]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the rates, which other tests ask for
        yield
    plt.close("all")


@pytest.mark.parametrize("simulate", SIMULATORS)
def test_a_run_that_diverges_is_told_by_step_and_quantity_and_never_by_a_number(simulate):
    trajectory = simulate(8.0)
    text, page, axes = str(trajectory), trajectory._repr_html_(), trajectory.plot()
    legend = " ".join(label.get_text() for label in axes.get_legend().get_texts())
    told = re.search(r" at step (\d+) \(([\w ,]+)\)", text)
    assert told, text
    assert 0 < int(told[1]) <= 400
    assert re.search(r"diverged, the first at step \d+ \([\w ,]+\)", legend), legend
    assert "<strong>diverged</strong>" in page
    assert told[0] in page
    for shown in (text, page, legend):
        assert not re.search(r"\b(inf|nan)\b", shown)
    held = [value for row in trajectory.rows() for value in row.values()]
    entries = [each for value in held for each in (value if isinstance(value, list) else [value])]
    assert None in entries
    assert all(each is None or isfinite(each) for each in entries)
    assert all(isfinite(float(y)) for line in axes.get_lines() if line.get_marker() == "x" for y in line.get_ydata())


@pytest.mark.parametrize("simulate", SIMULATORS)
def test_a_run_that_stays_finite_has_its_numbers(simulate):
    trajectory = simulate(1e-3)
    text = str(trajectory)
    assert "diverged" not in text + trajectory._repr_html_()
    assert "left the finite" not in text
    course = trajectory._course()
    assert bool((course.diverged == -1).all())
    name = course.main or next(iter(course.values))
    places = len(trajectory.rows()) // len(course.at)
    assert places == course.diverged.numel()
    drawn = trajectory.plot().get_lines()
    apart = len({tuple(line.get_ydata()) for line in drawn})
    assert apart >= places
    values = course.values[name].detach().reshape(places, len(course.at), -1)
    first = [row[name] for row in trajectory.rows()[:: len(course.at)]]
    assert torch.tensor(first).double().reshape(places, -1).allclose(values[:, 0].double())


def test_a_diverged_run_is_lost_at_the_first_record_that_is_not_finite():
    trajectory = conserved(8.0)
    step, cause = int(trajectory.diverged[0]), {name: int(steps[0]) for name, steps in trajectory.lost.items()}
    assert step == min(value for value in cause.values() if value >= 0)
    assert trajectory["loss"][0, step - 1].isfinite()  # there is a record at every step
    assert trajectory["loss"][0, step:].isnan().all()
    assert trajectory["incoming"][0, step:].isnan().all()


def test_a_mode_without_a_target_has_no_share_and_did_not_diverge():
    trajectory = deep.gradient_descent(deep.modes([0.0, 1.0], [0.1, 0.1]), rate=0.01, steps=4)
    assert "diverged" not in str(trajectory)
    assert {row["share"] for row in trajectory.rows() if row["mode"] == 0} == {None}


def test_a_picture_of_another_quantity():
    trajectory = two_layer(1e-3)
    assert trajectory.plot("cosine").get_ylabel() == "cosine"
    with pytest.raises(ValueError, match="'angle' was not recorded: choose from loss, "):
        trajectory.plot("angle")


def test_many_runs_are_a_median_with_a_band():
    Y, B = numbers(4, 3), fac.feedback(4, 2, seeds=range(50))
    trajectory = fac.gradient_descent("fa", Y, B, fac.zero(Y, B), rate=1e-3, steps=5, names=["error"])
    axes = trajectory.plot()
    (line,) = axes.get_lines()
    assert list(line.get_ydata()) == pytest.approx(trajectory["error"].median(0).values.tolist(), rel=0.1)
    assert "50 runs: median, middle 80 %" in line.get_label()


def test_many_modes_are_not_all_listed():
    trajectory = deep.gradient_descent(deep.modes(torch.linspace(0.1, 1, 30), [0.0, 0.0]), rate=0.01, steps=5)
    assert "12 of 30 are shown: to_polars() has all" in str(trajectory)
    assert trajectory.to_polars().height == 30 * 6


def test_every_check_of_a_theorem_is_a_table_and_a_picture():
    seen = 0
    for call, good in GOOD.values():
        check = call(**good())
        if not isinstance(check, TheoremCheck):
            continue
        seen += 1
        text = str(check)
        assert text.startswith(check.sentence)
        assert all(assumption.name in text for assumption in check.assumptions)
        assert check._repr_html_().count("<tr>") == len(check.assumptions) + bool(check.assumptions)
        labels = [label.get_text() for label in check.plot().get_legend().get_texts()]
        assert "bound" in labels
        assert check.rows()[0]["measured"] == float(check.measured[0, 0])
        plt.close("all")
    assert seen > 30


def test_a_check_of_runs_that_diverge_says_which():
    start = two.draw([0, 1, 2], n=4, d=6, p=8)
    check = theorems.theorem_3_2(start, activation="identity", rate=3.0, steps=400)
    text = str(check)
    assert check.verdict != "holds"
    assert re.search(r"3 of 3 runs left the finite numbers.*\n- run 0 at record \d+ \(measured\)", text)
    assert "NO" in text
    table = text.partition("\n")[2]
    assert not re.search(r"\b(inf|nan)\b", table)
