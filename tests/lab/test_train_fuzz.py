"""Whatever the files of a run folder hold: the right numbers, or one sentence that names the file."""

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from training_runs import begin, checkpoint

from falign.cli import main
from falign.lab import _files
from falign.lab._checkpoints import restore
from falign.lab._files import RunError
from falign.lab._run_folder import RunFolder
from falign.lab._setup import prepare_run
from falign.lab._validate import resolve
from falign.lab.config import TrainConfig
from mutations import mutations

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

CONFIG = TrainConfig("digits", model="mlp:64-6-10", epochs=1, batch_size=800)
LAST = "checkpoint-00000002.safetensors"
COUNTS = [120, pytest.param(1500, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    begin(CONFIG, folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def told(words: list[str]) -> tuple[int, str]:
    """Exit code and what was said on standard error: a traceback would come up here as an exception."""
    error = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(error):
        code = main(words)
    return code, error.getvalue()


def raised(action: Callable[[], object]) -> str | None:
    """What a reader says, None where it reads."""
    try:
        action()
    except RunError as error:
        return str(error)
    return None


def refused(words: list[str], name: str, how: str) -> None:
    code, said = told(words)
    assert code == 2, (how, said)
    assert said.startswith("falign: "), how
    assert len(said.splitlines()) == 1, how
    assert len(said) < 3000, how
    assert name in said, how


def compared(run: Path) -> list[str]:
    return ["compare", str(run), "--out", str(run.with_name("picture.png"))]


def resumed(run: Path) -> list[str]:
    return ["train", "--resume", str(run)]


# Damage: not a bit of any file may change unseen


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["config.json", "status.json", "records.parquet"])
def test_damaged_files_are_refused(name: str, count: int, run: Path) -> None:
    content = (run / name).read_bytes()
    for number, (how, damaged) in enumerate(mutations(content, count, seed=1)):
        (run / name).write_bytes(damaged)
        refused(compared(run) if number % 2 or name == "records.parquet" else resumed(run), name, how)


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_checkpoints_are_refused(count: int, run: Path) -> None:
    path = run / LAST
    learner = prepare_run(resolve(CONFIG), data=None, progress=False).learner
    for how, damaged in mutations(path.read_bytes(), count, seed=2):
        path.write_bytes(damaged)
        error = raised(lambda: restore(path, learner))
        assert error is not None, how
        assert re.search(rf"{LAST} cannot be read \(it(s checksum is wrong| has no checksum)\)", error), how
    refused(resumed(run), LAST, "the last one")


# What anyone can seal


SNIPPETS = [
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 400,
    "9" * 5000,
    "-1",
    "1.5",
    "true",
    "null",
    '""',
    '"[/x]\\u001b[31m"',
    '"\\u0000"',
    '"\\ud800"',
    '"a\\nb"',
    "{}",
    "[]",
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
]


def snippets(content: dict[str, Any], finish: Callable[[str], bytes]) -> Iterator[tuple[str, bytes]]:
    """A file with hostile text in place of every one of its values in turn, sealed again."""
    owners = [content, *(value for value in content.values() if isinstance(value, dict))]
    for owner in owners:
        for key, before in list(owner.items()):
            owner[key] = "PLACE"
            text = json.dumps(content)
            owner[key] = before
            for snippet in SNIPPETS:
                yield f"{key}: {snippet[:30]}", finish(text.replace('"PLACE"', snippet))


def sealed_text(text: str) -> bytes:
    return _files.sealed(f'{{"checksum": "{_files.BLANK}", {text[1:]}'.encode())


@pytest.mark.parametrize("name", ["config.json", "status.json"])
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 29])
def test_sealed_objects_that_say_something_else(name: str, every: int, run: Path, trained: Path) -> None:
    """Refused, or of no weight: then the command does what it did before."""
    content = (run / name).read_bytes()
    for number, (how, hostile) in enumerate(snippets(_files.from_json(content), sealed_text)):
        if number % every:
            continue
        (run / name).write_bytes(hostile)
        for words in (resumed(run), compared(run)):
            code, said = told(words)
            if code == 0:
                continue
            assert code in (1, 2), (how, said)
            assert said.startswith("falign: "), how
            assert len(said.splitlines()) == 1, how
            assert len(said) < 3000, how
            assert str(run) in said or "--" in said, (how, said)
        shutil.rmtree(run)
        shutil.copytree(trained, run)


def header_of(path: Path) -> tuple[dict[str, Any], Callable[[str], bytes]]:
    state, tensors = checkpoint(path)

    def finish(text: str) -> bytes:
        return _files.sealed(save(tensors, {"checksum": _files.BLANK, "falign": text}))

    return state, finish


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_sealed_checkpoints_that_say_something_else(every: int, run: Path) -> None:
    """Refused by name, or taken where it makes no difference that can be told, as another loss so far."""
    path = run / LAST
    config = resolve(CONFIG)
    learner = prepare_run(config, data=None, progress=False).learner
    taken = 0
    for number, (how, hostile) in enumerate(snippets(*header_of(path))):
        if number % every:
            continue
        path.write_bytes(hostile)
        error = raised(lambda: restore(path, learner))
        if error is None:
            taken += 1
            assert any(word in how for word in ("run: ", "1.5", "null", "{}", "-1")), how
        else:
            assert LAST in error, how
            assert len(error.splitlines()) == 1, how
    assert taken < number / 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["run", "config", "provenance", "status", "saved", "step", "epoch", "message", "law", "course"])
FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=1500)


def _check_object(name: str, run: Path, trained: Path, given_: dict[str, Any]) -> None:
    content = _files.from_json((trained / name).read_bytes())
    text = json.dumps(given_ if given_.pop("alone", False) else {**content, **given_})
    (run / name).write_bytes(sealed_text(text if len(text) > 2 else '{"a": 1}'))
    found = RunFolder(run)
    error = raised(lambda: (found.read_config(), found.read_status()))
    code, said = told(compared(run))
    assert code == (0 if error is None else 2), said
    if error is not None:
        assert name in error
        assert len(error.splitlines()) == 1
        assert said == f"falign: {error}\n"


OBJECTS = st.dictionaries(KEYS, JSON, max_size=4) | st.dictionaries(KEYS, JSON).map(
    lambda each: {**each, "alone": True}
)


@FEW
@given(name=st.sampled_from(["config.json", "status.json"]), content=OBJECTS)
def test_any_sealed_object(name: str, content: dict, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("any") / "run"))
    _check_object(name, run, trained, content)
    shutil.rmtree(run)


@pytest.mark.slow
@MANY
@given(name=st.sampled_from(["config.json", "status.json"]), content=OBJECTS)
def test_any_sealed_object_often(name: str, content: dict, trained: Path, tmp_path_factory) -> None:
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("any") / "run"))
    _check_object(name, run, trained, content)
    shutil.rmtree(run)


# A configuration alone, as anyone could write it: then the run begins, or it is said why not


ODD: dict[str, list[Any]] = {
    "dataset": ["~nobody-of-this-name/x", "x" * 5000, "/dev/null", "", ".", "digits\n", "\x1b[31m", "[/x]", "é" * 200],
    "model": ["mlp:64-0-10", "mlp:" + "9" * 300, "lenet ", "[/x]", "mlp:64-10\n", "nowhere:to_be_found", ":", "a.:b"],
    "rule": ["", "FA", "[/x]", "bp"],
    "transform": ["", "centred,", "quantised(0)", "noisy(nan)", "[/x]", "signs\n"],
    "mirror_every": [2**62, 0, -1],
    "follow_every": [2**62, 0, -1],
    "calibrate": [2**62, -1],
    "feedback": ["sparse(0)", "normal()", "[/x]"],
    "learning_rate": [1e308, 5e-324, -0.0, 1e18],
    "batch_size": [2**62, 0, -1],
    "probe_size": [2**62, 1, -5],
    "measure_every": [2**62, -1],
    "seed": [2**62, -(2**62)],
    "epochs": [0, -1],
    "scale": [1e308, 1e-320, -1.0],
    "ridge": [1e308, -1.0],
    "ridge_steps": [1e308, 1e-320],
    "ridge_schedule": ["cutoff", "exponential"],
    "weight_decay": [1e308],
    "momentum": [1.0, 0.9999999999999999],
    "rate_decay": [1e-320, 0.0],
    "rate_schedule": ["linear", "cosine"],
    "device": ["cpu:7", "meta", "cuda:99", "[/x]", "\n"],
    "activation": ["identity"],
    "context": [2**62, 0, -1, 1],
    "autocast": ["bf16"],
    "dtype": ["float64"],
    "optimizer": ["adamw"],
}
CONFIGURATIONS = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in ODD.items()})


def _check_configuration(options: dict[str, Any], run: Path) -> None:
    written = RunFolder(run)
    written.begin()
    written.write_config(TrainConfig(**{"dataset": "digits", "model": "mlp:64-6-10", "epochs": 0, **options}), {})
    code, said = told(resumed(run))
    assert code in (1, 2), "it has no data_sha256"
    assert said.startswith("falign: ")
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 2


def test_odd_values_are_of_every_kind_of_option() -> None:
    assert {part.name for part in fields(TrainConfig)} - ODD.keys() == {
        *("rule_option", "adafa_rate", "drtp_output", "positions", "check_law", "tensorboard")
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in ODD.items() for value in values],
    ids=lambda each: repr(each)[:30],
)
@pytest.mark.unchecked  # annotations would refuse whole numbers for real ones first
def test_one_odd_option(name: str, value: Any, tmp_path: Path) -> None:
    _check_configuration({name: value}, tmp_path / "run")


@pytest.mark.slow
@MANY
@given(options=CONFIGURATIONS)
def test_odd_options_together(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    _check_configuration(options, tmp_path_factory.mktemp("odd") / "run")


NUMBERS = (
    st.floats(allow_nan=False, width=32)
    | st.floats()
    | st.sampled_from([0.0, -1.0, 1e308, 5e-324, 90.0, 180.0])
    | st.none()
)


def _check_records(data: st.DataObject, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Shown and drawn, or refused by name."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("any") / "run"))
    table = pl.read_parquet(run / "records.parquet")
    names = [name for name in table.columns if name != "step"]
    for name in data.draw(st.lists(st.sampled_from(names), max_size=3)):
        values = data.draw(st.lists(NUMBERS, min_size=table.height, max_size=table.height))
        table = table.with_columns(pl.Series(name, values, dtype=pl.Float64))
    stream = io.BytesIO()
    metadata = pl.read_parquet_metadata(run / "records.parquet")
    table.write_parquet(stream, metadata={"checksum": _files.BLANK, "run": metadata["run"]})
    (run / "records.parquet").write_bytes(_files.sealed(stream.getvalue()))
    code, said = told(compared(run))
    if code:
        assert code == 2
        assert "records.parquet cannot be read" in said
        assert len(said.splitlines()) == 1
    shutil.rmtree(run)


@settings(FEW, max_examples=8)
@given(data=st.data())
def test_records_of_any_numbers(data: st.DataObject, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    _check_records(data, trained, tmp_path_factory)


@pytest.mark.slow
@settings(FEW, max_examples=300)
@given(data=st.data())
def test_records_of_any_numbers_often(data: st.DataObject, trained: Path, tmp_path_factory) -> None:
    _check_records(data, trained, tmp_path_factory)
