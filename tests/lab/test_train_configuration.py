"""Values of options: every one is right, or refused by one sentence that names its option."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from falign.cli import main
from falign.lab._run_folder import RunFolder
from falign.lab._validate import resolve
from falign.lab.config import ConfigError, TrainConfig, option

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

untyped = pytest.mark.unchecked

FIELDS = [part.name for part in fields(TrainConfig)]
HUGE = [10**400, -(10**400), 10**5000, 2**63, 2**64, -(2**63) - 1, 1e400, -1e400, 1e308, 5e-324, 1e-320, float("nan")]
TEXTS = [
    "",
    "\0",
    "\ud800",
    "\udcff",
    "~nobody/x",
    "a" * 5000,
    "mlp:64-" + "9" * 5000 + "-10",
    "lenet\n",
    "cuda:99999999999999999999",
]
TEXTS += [
    "low-rank(" + "9" * 5000 + ")",
    "sparse(0)",
    "low-rank(99999999)",
    "cpu:-1",
    "cpu:7",
    "meta",
    "xla",
    "١",
    "auto\0",
    "a..b:c",
]
VALUES = st.one_of(
    st.sampled_from([*HUGE, *TEXTS]),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=12),
    st.sampled_from([None, True, False, [], {}, (1,), b"x", 1j, np.float32(0.5), np.int64(3), np.bool_(True)]),
    st.sampled_from(
        [
            "digits",
            "lenet",
            "fa",
            "dfa",
            "kp",
            "bp",
            "adafa",
            "drtp",
            "adam",
            "float64",
            "bf16",
            "cpu",
            "relu",
            "cutoff",
        ]
    ),
)


@untyped
@pytest.mark.parametrize("count", [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_any_values_are_completed_or_refused(count: int) -> None:
    refused: list[str] = []

    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=4))
    def one(values: dict[str, Any]) -> None:
        try:
            found = resolve(TrainConfig(**{"dataset": "digits", "model": "mlp:64-8-10", **values}))
        except ConfigError as error:
            refused.append(str(error))
            return
        assert resolve(found) == found
        for name, value in asdict(found).items():
            for each in value if name == "rule_option" and type(value) is tuple else (value,):
                assert type(each) in (int, float, str, bool, type(None)), name

    one()
    for text in refused:
        assert "\n" not in text
        assert len(text) < 600
        assert "--" in text or "DATASET" in text or "feedback family" in text


RIGHT = {"batch_size": 10**12, "epochs": 10**12, "seed": -(2**63), "learning_rate": 1e300, "momentum": np.float32(0.25)}
RIGHT |= {
    "scale": np.float64(1e-37),
    "probe_size": np.int64(2),
    "weight_decay": 1e300,
    "measure_every": 10**12,
    "rate_decay": 1,
}


@untyped
@pytest.mark.parametrize("name", RIGHT)
def test_values_at_the_edge_that_are_right(name: str) -> None:
    assert getattr(resolve(TrainConfig(dataset="digits", model="lenet", **{name: RIGHT[name]})), name) == RIGHT[name]


WRONG = [
    (name, value)
    for name in ("batch_size", "epochs", "probe_size", "measure_every", "seed")
    for value in (3.0, True, 10**30, "3")
]
WRONG += [
    (name, value)
    for name in ("scale", "learning_rate", "momentum", "rate_decay", "weight_decay")
    for value in ("x", 10**400, 1e400)
]
WRONG += [
    ("momentum", 1 - 1e-12),
    ("learning_rate", 1e-320),
    ("ridge", 1e300),
    ("seed", 2**64),
    ("seed", 10**5000),
    ("rule", ["fa"]),
]
WRONG += [
    ("scale", 1e39),
    ("scale", 1e-46),
    ("device", "cpu:2"),
    ("feedback", "low-rank(100000)"),
    ("tensorboard", 1),
    ("model", None),
]


@untyped
@pytest.mark.parametrize(
    ("name", "value"), WRONG, ids=lambda value: repr(value)[:20] if value != 10**5000 else "5000 digits"
)
def test_values_that_cannot_be_meant(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{option(name)} is ") as caught:
        resolve(TrainConfig(**{"dataset": "digits", "model": "lenet", name: value}))
    assert len(str(caught.value)) < 200


WORDS = st.one_of(
    st.sampled_from([*TEXTS, *(str(value) for value in HUGE if value not in (10**5000,))]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(), max_size=8),
)
OPTIONS = [option(name) for name in FIELDS if name not in ("dataset", "check_law", "tensorboard", "epochs")]


@pytest.mark.parametrize("count", [40, pytest.param(1500, marks=pytest.mark.slow)])
def test_any_words_on_the_command_line(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.dictionaries(st.sampled_from(OPTIONS), WORDS, min_size=1, max_size=3))
    def one(words: dict[str, str]) -> None:
        given = {"--model": "mlp:64-8-10", **words}
        tokens = [
            "train",
            "digits",
            "--epochs",
            "0",
            "--out",
            "run",
            "--force",
            *(f"{key}={value}" for key, value in given.items()),
        ]
        out, wrong = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(wrong):
            code = main(tokens)
        said = wrong.getvalue()
        assert code in (0, 1, 2), said
        assert "Traceback" not in said
        if code == 2:
            assert said.startswith("falign: ")
            assert said.count("\n") == 1 or "\\" in repr(words) or "\n" in "".join(words.values()), said
        elif code == 0:
            assert RunFolder(tmp_path / "run").read_status()["status"] == "done"

    one()


@pytest.mark.parametrize(
    "words",
    [
        "--lr 1e300",
        "--lr 1e300 --optimizer adamw",
        "--weight-decay 1e300",
        "--ridge 1e30",
        "--scale 3e38",
        "--momentum 0.9999999 --lr 1e30",
    ],
)
def test_numbers_beyond_all_bounds_end_as_diverged(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = [
        "train",
        "digits",
        "--model",
        "mlp:64-8-10",
        "--batch-size",
        "500",
        "--epochs",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert main([*tokens, *words.split()]) == 1
    assert "the run diverged at step" in capsys.readouterr().err
    assert RunFolder(tmp_path).read_status()["status"] == "diverged"


@pytest.mark.parametrize("schedule", ["inverse-square", "exponential", "cutoff"])
def test_the_shortest_ridge_ends_at_once(schedule: str, tmp_path: Path) -> None:
    tokens = [
        "train",
        "digits",
        "--model",
        "mlp:64-8-10",
        "--batch-size",
        "500",
        "--epochs",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert main([*tokens, "--ridge", "0.1", "--ridge-schedule", schedule, "--ridge-steps", "1e-100"]) == 0
