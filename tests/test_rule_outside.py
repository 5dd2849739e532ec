"""A rule that no file of the package knows of does whatever the package's own rules do, also on the command line.

The suites of every rule take it by ``cases.RULES``; here is what is not a suite of every rule.
"""

import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import falign
import outside_rule
from cases import OUTSIDE, batch, build, gradients, loss_of, relative
from falign.cli import main
from outside_rule import MixedFeedback

TRAIN = ["train", "digits", "--model", "mlp:64-12-10", "--epochs", "1"]
RULE = ["--rule", "rules_of_mine:MixedFeedback"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the rule's module in it."""
    monkeypatch.chdir(tmp_path)
    import_module("falign.lab._train")
    monkeypatch.setattr("falign.lab._ending.draw", lambda *_: None)
    shutil.copy(outside_rule.__file__, "rules_of_mine.py")
    yield tmp_path
    sys.modules.pop("rules_of_mine", None)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("falign: ")
    assert len(said.splitlines()) == 1
    return said


def test_no_file_of_the_package_knows_of_it() -> None:
    source = Path(falign.__file__).parent
    for rule in OUTSIDE:
        assert rule not in falign.ALL_RULES.values()
        assert not [file for file in source.rglob("*.py") if rule.__name__ in file.read_text()]


@pytest.mark.parametrize("rule", [MixedFeedback, MixedFeedback(mix=0.6)], ids=str)
def test_the_public_functions_take_it(rule: falign.Rule | type[falign.Rule]) -> None:
    x, y = batch("mlp")
    model = build("mlp")
    assert falign.check(model, rule, example=x) == []
    falign.convert(model, rule, example=x)
    result = falign.verify(model, x, lambda output: loss_of(output, y))
    assert result
    assert result.rule == "mixed"
    angles = falign.measure.alignment(model, loss_of, x, y)
    assert angles.rule == "mixed"
    assert all(row.weight_angle is not None and row.weight_angle < 90 for row in angles.layers[1:])


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
def test_it_has_the_law_that_its_attributes_imply(mix: float) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    falign.convert(model, MixedFeedback(mix=mix))
    x, y = torch.randn(20, 8, dtype=torch.float64), torch.randint(3, (20,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    law = falign.measure.ConservationLaw(model, optimizer)
    for _ in range(50):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    report = law.report()
    assert report.holds
    assert report.conclusive
    assert {row.status for row in report.laws} == {"accounted"}
    assert all("∫⟨B(W),dW⟩" in row.form for row in report.laws)
    assert max(row.residual for row in report.laws) < 1e-13


def test_a_rule_may_name_its_law() -> None:
    class Fixed(falign.rules.FeedbackAlignment):
        law = falign.rules.LawKind.MOVING

    model = falign.convert(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)), Fixed)
    (law,) = falign.measure.ConservationLaw(
        model, torch.optim.SGD(model.parameters(), lr=0.1), example=torch.randn(4, 8)
    ).laws
    assert "⟨B(t),W⟩" in law.form


def test_initial_weights_take_it() -> None:
    x, _ = batch("mlp")
    model = falign.convert(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 7)).double(), "fa")
    assert set(falign.init.aligned_forever(model, example=x)) == {"0"}
    falign.convert(falign.revert(model), MixedFeedback)
    with pytest.raises(ValueError, match="no neuron of the model is under the conservation law"):
        falign.init.dominant(model, example=x)  # an integral along the way bounds no alignment
    before = model[0].weight.clone()
    falign.init.generic(model, seed=1)
    assert not torch.equal(model[0].weight, before)


def test_the_example_of_the_documentation_is_a_rule() -> None:
    source = inspect.cleandoc(falign.Rule.__doc__ or "").split("::\n", 1)[1].split("Class attributes:")[0]
    names: dict[str, Any] = {"dataclass": dataclass, "ClassVar": ClassVar, "falign": falign}
    exec(textwrap.dedent(source), names)
    rule = names["HalvedFeedback"]
    x, y = batch("mlp")
    model, fixed = build("mlp", rule), build("mlp", "fa")
    falign.load_feedback_state(fixed, {name: B / 2 for name, B in falign.feedback_state(model).items()})
    assert relative(gradients(model, x, y), gradients(fixed, x, y)) < 1e-15
    assert falign.verify(model, x, lambda output: loss_of(output, y))


def test_a_rule_that_needs_options_is_given_as_an_instance() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needy(MixedFeedback):
        power: float

    (problem,) = falign.check(build("mlp"), Needy)
    assert "cannot be made without options" in problem
    assert falign.check(build("mlp"), Needy(power=2.0)) == []


def test_the_command_trains_by_it_with_its_own_options(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, *RULE, "--rule-option", "mix=0.5", "--out", "run"]) == 0
    stored = json.loads(Path("run/config.json").read_text())
    assert stored["config"]["rule"] == "rules_of_mine:MixedFeedback"
    assert stored["config"]["rule_option"] == ["mix=0.5"]
    assert list(stored["provenance"]["code"]) == [str(here / "rules_of_mine.py")]
    assert "rule rules_of_mine:MixedFeedback" in capsys.readouterr().out


def test_its_options_count(here: Path) -> None:
    angles = {}
    for mix in ("0.0", "0.9"):
        assert main([*TRAIN, *RULE, "--rule-option", f"mix={mix}", "--out", mix]) == 0
        import polars as pl

        angles[mix] = pl.read_parquet(Path(mix) / "alignment.parquet")["weight_angle"].drop_nulls()[0]
    assert angles["0.9"] < 30 < 60 < angles["0.0"]


def test_a_run_goes_on_by_it_and_foreign_code_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, *RULE, "--rule-option", "mix=0.5", "--out", "run"]) == 0
    sys.modules.pop("rules_of_mine")
    assert main(["train", "--resume", "run", "--epochs", "2"]) == 0, "what the run began with is run"
    assert "--rule-option is mix=0.4, but the run in run has mix=0.5: leave it out" in refusal(
        capsys, "train", "--resume", "run", "--rule-option", "mix=0.4"
    )
    sys.modules.pop("rules_of_mine", None)
    file = here / "rules_of_mine.py"
    file.write_text(file.read_text() + "\nPath = None\n")
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--epochs", "3"]) == 2
    assert "rules_of_mine:MixedFeedback, but" in (said := capsys.readouterr().err)
    assert "read it, and if it may run add --trust" in said
    assert "rules_of_mine" not in sys.modules, "nothing of it was run"
    assert main(["train", "--resume", "run", "--epochs", "3", "--trust"]) == 0


@pytest.mark.parametrize(
    ("words", "sentences"),
    [
        ([*RULE, "--rule-option", "mux=1"], ["'mux=1'", "the options of rule rules_of_mine:MixedFeedback are mix=…"]),
        ([*RULE, "--rule-option", "mix"], ["'mix'", "are mix=…"]),
        ([*RULE, "--rule-option", "mix=much"], ["--rule-option mix is 'much', expected a number"]),
        ([*RULE, "--rule-option", "mix=2"], ["mix is 2.0, expected a number from 0 (fa) to 1 (bp)"]),
        ([*RULE, "--rule-option", "mix=0", "--rule-option", "mix=1"], ["mix is given twice"]),
        (["--rule", "fa", "--rule-option", "mix=1"], ["the options of rule fa are none: leave it out"]),
        (["--rule", "adafa", "--rule-option", "rate=2"], ["rate is 2.0, expected a number from 0 (fa) to 1 (bp)"]),
        (["--rule", "adafa", "--rule-option", "rate=0.1", "--adafa-rate", "0.2"], ["--adafa-rate", "differ"]),
        (["--rule", "fa", "--positions", "all"], ["--positions is for direct rules, the rule is fa: leave it out"]),
        (["--rule", "dfa", "--positions", "x"], ["positions"]),
        (["--rule", "dfa", "--positions", "all", "--rule-option", "positions=each"], ["--positions and", "differ"]),
        (["--rule", "drtp", "--rule-option", "output=x"], ["'x', expected softmax or sigmoid or linear"]),
        (["--rule", "rules_of_mine:Missing"], ["cannot be imported", "no attribute 'Missing'"]),
        (["--rule", "no_such_rules:Rule"], ["cannot be imported", "No module named 'no_such_rules'"]),
        (["--rule", "rules_of_mine:torch"], ["expected a subclass of falign.Rule with a name"]),
        (["--rule", "rules_of_mine"], ["shallow, or package.module:Rule"]),
    ],
    ids=lambda each: " ".join(each[-2:]),
)
def test_what_is_wrong_is_one_clear_sentence(
    words: list[str], sentences: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, *TRAIN, *words)
    assert all(sentence in said for sentence in sentences)


def test_an_option_with_a_word_of_its_own_is_the_same_either_way(here: Path) -> None:
    for out, words in {"one": ["--adafa-rate", "0.1"], "two": ["--rule-option", "rate=0.1"]}.items():
        assert main([*TRAIN, "--rule", "adafa", *words, "--out", out]) == 0
    one, two = (json.loads(Path(out, "config.json").read_text())["config"] for out in ("one", "two"))
    assert one == two
    assert one["adafa_rate"] == 0.1
    assert "rule_option" not in one
