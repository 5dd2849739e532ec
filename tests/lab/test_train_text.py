"""Trainings on text, and of the sequence models on images: what they reach, what is shown, and what is refused."""

import json
import math
import os
import signal
from hashlib import sha256
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import polars as pl
import pytest
import torch
from training_runs import begin, go_on, quiet, same

from falign import ALL_RULES
from falign.cli import main
from falign.lab import _compare
from falign.lab._batches import cut
from falign.lab._files import RunError
from falign.lab._learner import Learner
from falign.lab._setup import prepare_run
from falign.lab._train import default_folder
from falign.lab._validate import resolve
from falign.lab.config import ConfigError, TrainConfig
from falign.lab.data import DataError, _loading, load, load_text

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

GPT = "gpt:width=32,blocks=2"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A part of the corpus that a test can learn from in seconds."""
    whole = load_text("pydoc")
    path = tmp_path_factory.mktemp("texts") / "part.txt"
    path.write_text("".join(whole.vocabulary[place] for place in whole.train[:16_000].tolist()), "utf-8")
    return f"text:{path}"


def config(dataset: str, **options: Any) -> TrainConfig:
    given = {"model": GPT, "rule": "bp", "epochs": 2, "context": 32, "optimizer": "adam"}
    given |= {"learning_rate": 0.003, "batch_size": 16, "probe_size": 32}
    return TrainConfig(dataset, **{**given, **options})


# The data.


def test_the_corpus_is_the_language_reference_of_this_python() -> None:
    one, other = load_text("pydoc"), load_text("pydoc")
    codes = torch.cat([one.train, one.validation, one.test])
    read = "".join(one.vocabulary[place] for place in codes.tolist())
    assert len(read) > 300_000
    assert one.sha256 == other.sha256 == sha256(read.encode()).hexdigest()
    place = 0
    for name in sorted(topics):  # one after the other
        place = read.index(topics[name].strip("\n"), place) + len(topics[name].strip("\n"))
    assert place == len(read)
    assert one.vocabulary == "".join(sorted(set(read)))
    assert len(one.validation) == len(one.test) == len(read) // 10


@pytest.mark.parametrize("letters", ["ab", "аб\u00e9\U0001f600", "".join(map(chr, range(0x4E00, 0x4E00 + 300)))])
def test_a_file_is_its_characters(letters: str, tmp_path: Path) -> None:
    content = "\ufeff" + letters * 40
    (tmp_path / "a.txt").write_text(content, "utf-8", newline="")
    read = load_text(f"text:{tmp_path / 'a.txt'}")
    codes = torch.cat([read.train, read.validation, read.test])
    assert "".join(read.vocabulary[place] for place in codes.tolist()) == content[1:], "without the mark of its coding"
    assert codes.dtype == (torch.uint8 if len(letters) <= 256 else torch.int32)
    assert read.sha256 == sha256(content.encode()).hexdigest()
    assert (read.name, read.notes) == ("a.txt", ())


def test_characters_that_training_lacks_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab" * 50 + "c")
    assert load_text(f"text:{tmp_path / 'a.txt'}").notes == (
        "a.txt: 1 of its 3 characters are not in its training part",
    )


def test_pieces_follow_each_other_and_their_labels_are_the_next_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(0x100 + place) for place in range(260)))
    text = load_text(f"text:{tmp_path / 'a.txt'}")
    parts = cut(text, context=5, device=CPU)
    taken = [part.take(slice(None)) for part in parts]
    assert [len(part) for part in parts] == [41, 5, 5], "what is behind the last whole piece is not used"
    for (x, y), start in zip(taken, (0, 208, 234), strict=True):
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x.flatten(), start + torch.arange(x.numel()))
        assert torch.equal(y, x + 1)
    x, y = parts[0].take(torch.tensor([3, 1]))
    assert x[:, 0].tolist() == [15, 5]
    assert [len(piece) for piece, _ in parts[0].pieces(20)] == [20, 20, 1]
    short = cut(text, context=25, device=CPU)
    assert [len(part) for part in short] == [8, 1, 1]
    with pytest.raises(DataError, match="validation part has 26 characters, expected more than the context of 26"):
        cut(text, context=26, device=CPU)


def hostile(folder: Path) -> dict[str, str]:
    """{path: what is said of it}."""
    for name, content in {
        "empty": b"",
        "one": b"aaaa" * 90,
        "latin": b"abc" * 90 + b"\xe9",
        "mark": b"\xef\xbb\xbf",
    }.items():
        (folder / name).write_bytes(content)
    (folder / "utf-16").write_bytes(("ab" * 500).encode("utf-16"))
    os.mkfifo(folder / "pipe")
    return {
        "missing": "missing cannot be read (No such file or directory), expected a text file in UTF-8: check the path",
        ".": "cannot be read (Is a directory)",
        "pipe": "cannot be read (it is no regular file)",
        "empty": "empty is empty, expected a text to learn from",
        "mark": "mark is empty",
        "one": "one is of the one character 'a'",
        "latin": "latin is no text in UTF-8 (byte 270 is 0xe9): convert it",
        "utf-16": "utf-16 is no text in UTF-8 (byte 0 is 0xff)",
        "a" * 300: "File name too long",
        "\0": "cannot be read",
    }


def test_files_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in hostile(tmp_path).items():
        with pytest.raises(DataError) as caught:
            prepare_run(resolve(config(f"text:{tmp_path / name}")), data=None, progress=False)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    for name in ("text:", "text:~nobody-of-this-name/x"):
        with pytest.raises(DataError, match="cannot be read"):
            load_text(name)
    monkeypatch.setattr(_loading, "available", lambda: 16 * 100)
    with pytest.raises(DataError, match=r"it has 360 bytes, expected at most 100, by the memory .*use a part of it"):
        load_text(f"text:{tmp_path / 'one'}")


def test_images_are_no_text_and_texts_no_images() -> None:
    with pytest.raises(DataError, match="'digits' is no text, expected pydoc or text:FILE"):
        load_text("digits")
    with pytest.raises(DataError, match="'pydoc' is a text, expected images"):
        load("pydoc")


# What is reached.

#: Test accuracy on the digits; measured: gru .956, lstm .944, vit .947.
DIGITS = {"gru": 4, "lstm": 5, "vit:width=32,blocks=2": 4}


@pytest.mark.parametrize("model", DIGITS)
def test_images_are_learned_by_rows_and_by_patches(model: str, tmp_path: Path) -> None:
    records = begin(
        config("digits", model=model, context=None, epochs=DIGITS[model], batch_size=32), tmp_path
    ).run.read_records()
    assert records["test_accuracy"][-1] > 0.9
    assert "perplexity" not in records.columns


@pytest.mark.parametrize(("model", "epochs"), [(GPT, 3), ("gru", 3)])
def test_text_is_learned_beyond_the_frequencies_of_its_characters(
    model: str, epochs: int, text: str, tmp_path: Path
) -> None:
    """Measured: gpt 17, gru 15 of 24 by the frequencies."""
    console = quiet()
    records = begin(config(text, model=model, epochs=epochs), tmp_path, console).run.read_records()
    unigram = load_text(text).unigram_perplexity()
    assert 20 < unigram < 30
    assert records["perplexity"][-1] < 0.85 * unigram
    said = console.file.getvalue()
    assert f"perplexity by their frequencies alone: {unigram:.4g}" in said
    assert f"perplexity {records['perplexity'][-1]:.4g}" in said.splitlines()[-1]


@pytest.mark.slow
def test_the_corpus_is_learned(tmp_path: Path) -> None:
    records = begin(config("pydoc", model="gpt", context=64, epochs=4), tmp_path).run.read_records()
    assert records["perplexity"][-1] < 9


#: The others are slow.
FAST = {("gru:hidden=16", "kp"), ("gru:hidden=16", "dfa")}
LEARNERS = [
    pytest.param(model, rule, marks=() if (model, rule) in FAST else pytest.mark.slow)
    for model in ("gpt:width=16,blocks=1,heads=2", "gru:hidden=16", "lstm:hidden=16")
    for rule in ALL_RULES
    if ALL_RULES[rule].trained_layers is None and not ALL_RULES[rule].answers_noise
]


@pytest.mark.parametrize(("model", "rule"), LEARNERS)
def test_every_rule_learns_text(model: str, rule: str, text: str, tmp_path: Path) -> None:
    options = {"scale": 0.1} if rule == "drtp" else {}
    given = config(text, rule=rule, model=model, epochs=1, learning_rate=0.01, **options)
    records = begin(given, tmp_path).run.read_records()
    assert records["perplexity"][-1] < 0.6 * records["perplexity"][0]
    assert records["angle_head"][-1] == pytest.approx(0, abs=1e-3)
    angles = [name for name in records.columns if name.startswith("angle_")]
    assert angles[-1] == "angle_head"
    if ALL_RULES[rule].wiring == "layerwise" and not model.startswith("gpt"):
        assert angles[:-1] == ["angle_rnn.weight_ih_l0", "angle_rnn.weight_hh_l0"]
        assert 0 < records[angles[1]][-1] < 180


@pytest.mark.parametrize("rule", ["fa", "dfa", "kp"])
def test_rules_read_images_row_by_row(rule: str, tmp_path: Path) -> None:
    """Measured after five epochs: fa .867, dfa .869, kp .906."""
    options = config("digits", model="gru", rule=rule, context=None, epochs=2, batch_size=32)
    assert begin(options, tmp_path).run.read_records()["test_accuracy"][-1] > 0.5


# What is written and shown.


def test_what_is_measured_of_a_text(text: str, tmp_path: Path) -> None:
    options = resolve(config(text, measure_every=20))
    outcome = begin(options, tmp_path)
    records = outcome.run.read_records()
    assert records.columns[:9] == [
        *("step", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
        *("validation_loss", "validation_accuracy", "perplexity"),
    ]
    tested = records.drop_nulls("test_loss")
    assert tested["epoch"].to_list() == [0, 1, 2]
    assert records.height > 3
    assert records["validation_loss"].null_count() == records["perplexity"].null_count() == records.height - 3
    assert tested["perplexity"].to_list() == pytest.approx([math.exp(loss) for loss in tested["test_loss"]])
    setup = prepare_run(options, data=None, progress=False)
    for name, part in (("test", setup.test), ("validation", setup.validation)):
        x, y = part.take(slice(None))
        output = setup.learner.model.eval()(x)
        loss = torch.nn.functional.cross_entropy(output.transpose(1, 2), y).item()
        assert records[f"{name}_loss"][0] == pytest.approx(loss, rel=1e-5)
        assert records[f"{name}_accuracy"][0] == pytest.approx((output.argmax(2) == y).double().mean().item())
    assert 0 < records["train_accuracy"][-1] < 1
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["config"]["context"] == 32
    assert written["provenance"]["data_sha256"] == sha256(Path(text.removeprefix("text:")).read_bytes()).hexdigest()
    assert "context" not in TrainConfig("digits", model="lenet").to_json(), "names of earlier runs stay the same"


def test_comparison_of_texts_and_images(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"model": "gpt:width=16,blocks=1", "probe_size": 32, "learning_rate": 0.01}
    begin(config(text, **small), tmp_path / "text")
    begin(config("digits", model="gru:hidden=8", context=None, epochs=1), tmp_path / "images")
    console = quiet()
    both = _compare.read([tmp_path / "text", tmp_path / "images"])
    _compare.show(both, console)
    title, header, _, *rows = [line for line in console.file.getvalue().splitlines() if line.strip()]
    assert title.strip() == "bp"
    assert "train loss  perplexity" in header
    perplexity = both[0].records["perplexity"][-1]
    assert f" {perplexity:.4g} " in "\n".join(rows)
    assert both[1].numbers()["perplexity"] is None
    first = _compare.comparison_figure(both[:1]).axes[0]
    assert "Test perplexity" in (first.get_title(), first.get_title(loc="left"))
    console = quiet()
    _compare.show(both[1:], console)
    assert "perplexity" not in console.file.getvalue()


def test_the_best_accuracy_of_a_text_is_chosen_by_its_validation(text: str, tmp_path: Path) -> None:
    run = begin(config(text, epochs=0, model="gpt:width=16,blocks=1"), tmp_path).run
    records = pl.concat([run.read_records()] * 3).with_columns(
        epoch=pl.Series([0.0, 1.0, 2.0]),
        validation_loss=pl.Series([3.0, 1.0, 2.0]),
        test_accuracy=pl.Series([0.1, 0.25, 0.5]),
    )
    (read,) = _compare.read([tmp_path])
    changed = _compare.RunData(name="a", config=read.config, records=records, status={"status": "done"})
    console = quiet()
    _compare.show([changed], console)
    assert "50.00   25.00" in console.file.getvalue()


def test_pictures_and_events_of_a_text(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with pictures
    begin(config(text, epochs=1, model="gpt:width=16,blocks=1", probe_size=16), tmp_path)
    assert (tmp_path / "perplexity.png").stat().st_size > 1000


# Going on.


@pytest.mark.parametrize(("model", "rule"), [("gpt:width=16,blocks=1", "fa"), ("lstm:hidden=8", "kp")])
def test_a_run_goes_on_to_the_same_numbers(
    model: str, rule: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(text, rule=rule, model=model, probe_size=16, epochs=2, weight_decay=0.01)
    begin(options, tmp_path / "whole")
    step = Learner.step

    def armed(learner: Learner, x: torch.Tensor, y: torch.Tensor, done: int) -> tuple[float, int]:
        if done + 1 == 7:
            signal.raise_signal(signal.SIGINT)
        return step(learner, x, y, done)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "step", armed)
        assert begin(options, tmp_path / "parts").status == "interrupted"
    assert go_on(tmp_path / "parts").status == "done"
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_another_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abc " * 200)
    begin(config(f"text:{file}", epochs=1, model="gpt:width=8,blocks=1", context=8), tmp_path / "run")
    file.write_text("abd " * 200)
    with pytest.raises(RunError, match=r"is not the data that .* began with"):
        go_on(tmp_path / "run", epochs=2)
    file.unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read"):
        go_on(tmp_path / "run", epochs=2)


# What ends badly, and what is refused.


@pytest.mark.parametrize("model", ["gpt:width=16,blocks=1", "lstm:hidden=8"])
def test_a_run_that_diverges_says_where(model: str, text: str, tmp_path: Path) -> None:
    options = {"optimizer": "sgd", "learning_rate": 1e18, "probe_size": 16}
    outcome = begin(config(text, model=model, **options), tmp_path)
    assert outcome.status == "diverged"
    assert "diverged at step" in outcome.message


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model for images": ({"model": "vit"}, "--model vit is for images, and the data are a text"),
    "model for texts": ({"dataset": "digits", "context": None}, "is for text, and the data are images"),
    "context of images": ({"dataset": "digits", "model": "gru"}, "--context is for text, the data set is 'digits'"),
    "no context": ({"context": 0}, "--context is 0, expected at least 1"),
    "activation": (
        {"model": "gru", "activation": "relu"},
        "--activation is for mlp, lenet, lenet-average, lenet-norm, residual, vit, gpt, the model is gru",
    ),
    "long context": ({"context": 10**9}, "expected more than the context of 1,000,000,000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, text: str, tmp_path: Path) -> None:
    options, said = REFUSED[case]
    with pytest.raises((ConfigError, DataError)) as caught:
        begin(config(**{"dataset": text, **options}), tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_targets_that_fit_two_axes_are_refused(text: str, tmp_path: Path) -> None:
    characters = len(load_text(text).vocabulary)
    with pytest.raises(ConfigError, match=rf"--context is {characters}, as many as the text has characters"):
        begin(config(text, rule="drtp", context=characters), tmp_path)


def test_the_law_is_checked_where_it_holds(text: str, tmp_path: Path) -> None:
    options = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.3, "activation": "relu"}
    console = quiet()
    outcome = begin(config(text, rule="fa", epochs=1, check_law=True, **options), tmp_path, console)
    assert (outcome.status, outcome.failure) == ("done", "")
    assert "conservation law after" in console.file.getvalue()
    assert pl.read_parquet(tmp_path / "law.parquet").filter(status="exact").height > 0


def test_a_model_of_ones_own_learns_text(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_of_characters.py").write_text(
        "from torch import nn\n"
        "def make(shape, classes): return nn.Sequential(nn.Embedding(classes, 8), nn.Linear(8, classes))\n"
        "def sums(shape, classes): return nn.Sequential(nn.Embedding(classes, 8), nn.Flatten(), "
        "nn.Linear(8 * shape[0], classes))\n"
        "class Product(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.embedding = nn.Embedding(classes, 8)\n"
        "        self.W = nn.Parameter(0.1 * self.embedding.weight.detach().mT)\n"
        "    def forward(self, x): return self.embedding(x) @ self.W\n"
        "def lazy(classes): return nn.Sequential(nn.Embedding(classes, 8), nn.LazyLinear(classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("make", "lazy", "Product"):
        options = config(text, model=f"model_of_characters:{name}", rule="fa")
        records = begin(options, tmp_path / name).run.read_records()
        assert records["perplexity"][-1] < 0.8 * records["perplexity"][0]
    with pytest.raises(ConfigError, match=r"--ridge is for the last nn.Linear or convolution, .*Product has none"):
        begin(config(text, model="model_of_characters:Product", ridge=0.1), tmp_path / "ridge")
    with pytest.raises(ConfigError, match=r"returned \(2, \d+\) for 2 texts, expected \(2, 32, \d+\) .* each position"):
        begin(config(text, model="model_of_characters:sums"), tmp_path / "sums")


def test_names_of_the_folders() -> None:
    long = default_folder(TrainConfig("pydoc", model="gpt:width=32,blocks=2", context=48)).name
    assert long == "pydoc-gpt-width=32-blocks=2-fa-0-context=48"
    assert default_folder(TrainConfig("pydoc", model="gpt", context=64)).name == "pydoc-gpt-fa-0"


def test_the_command(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", text, "--model", "gpt:width=16,blocks=1", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path / "run"), "--context", "32"]) == 2
    assert "--context is 32, but the run in" in capsys.readouterr().err
    assert main([*words, "--context", "1.5"]) == 2
    assert "it is 1.5, expected a whole number" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
