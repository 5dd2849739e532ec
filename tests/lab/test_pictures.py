"""The pictures: real PNG files with the lines, names and scales that they should have."""

from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from matplotlib.figure import Figure
from PIL import Image

from falign.lab import compare
from falign.lab.config import TrainConfig
from falign.lab.pictures import draw, figures, png
from falign.lab.runs import Run, table

CONFIG = TrainConfig("digits", model="mlp:64-128-10", rule="dfa", learning_rate=0.1)


def records(layers: int, points: int) -> pl.DataFrame:
    rows = []
    for point in range(points):
        row = {
            "step": 10 * point,
            "epoch": float(point),
            "train_loss": None if point == 0 else 2.0 / point,
            "train_accuracy": None if point == 0 else 1 - 0.9 / point,
            "test_loss": 2.5 / (point + 1),
            "test_accuracy": 1 - 0.9 / (point + 1),
        }
        row |= {f"angle_fc{layer + 1}": 0.0 if layer + 1 == layers else 90.0 - layer - point for layer in range(layers)}
        rows.append({**row, "seconds": 1.5 * point})
    return table(rows)


def labels(figure: Figure) -> list[str]:
    (axes,) = figure.axes
    return [str(line.get_label()) for line in axes.get_lines() if not str(line.get_label()).startswith("_")]


def test_png_files_are_written(tmp_path: Path) -> None:
    draw(Run(tmp_path), records(3, 5), CONFIG)
    for name in ("loss.png", "accuracy.png", "angles.png"):
        with Image.open(tmp_path / name) as picture:
            picture.verify()
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert picture.size == (910, 546)
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, "it is not empty"


def test_training_and_test_are_drawn_with_the_measured_numbers() -> None:
    drawn = figures(records(2, 4), CONFIG)
    for name, factor in (("loss", 1), ("accuracy", 100)):
        (axes,) = drawn[f"{name}.png"].axes
        assert labels(drawn[f"{name}.png"]) == ["training (mean over the epoch)", "test"]
        train, test = axes.get_lines()
        assert list(train.get_xdata()) == [1, 2, 3], "what was not measured is not drawn"  # pyright: ignore
        expected = [factor * value for value in records(2, 4)[f"test_{name}"]]
        assert list(test.get_ydata()) == pytest.approx(expected)  # pyright: ignore
        assert all(word in axes.get_title("left") for word in ("dfa", "digits", "mlp:64-128-10"))
    assert drawn["loss.png"].axes[0].get_yscale() == "log"


@pytest.mark.parametrize("layers", [1, 3, 8, 9, 22])
def test_every_layer_has_its_angle(layers: int) -> None:
    figure = figures(records(layers, 6), CONFIG)["angles.png"]
    (axes,) = figure.axes
    names = [f"fc{number}" for number in range(1, layers + 1)]
    assert labels(figure) == names
    written = [text.get_text() for text in axes.texts]
    if axes.get_legend() is not None:
        written += [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(written) == sorted(names)
    assert len({line.get_color() for line in axes.get_lines()[:layers]}) == layers
    low, high = axes.get_ylim()
    assert low < 0
    assert high >= 95


def test_names_at_the_lines_do_not_overlap() -> None:
    figure = figures(records(8, 6), CONFIG)["angles.png"]
    png(figure)  # lays it out
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))


def test_angles_beyond_a_right_angle_are_seen() -> None:
    wide = records(2, 3).with_columns(angle_fc1=pl.lit(150.0))
    assert figures(wide, CONFIG)["angles.png"].axes[0].get_ylim()[1] > 150


@pytest.mark.parametrize("points", [0, 1])
def test_few_points(points: int, tmp_path: Path) -> None:
    draw(Run(tmp_path), records(2, points), CONFIG)
    assert (tmp_path / "angles.png").stat().st_size > 1000


def written(folder: Path, rule: str, **status: object) -> Path:
    run = Run(folder)
    run.begin()
    run.write_config(TrainConfig("digits", model="mlp:64-128-10", rule=rule), {})
    run.write_records([dict(row) for row in records(3, 4).iter_rows(named=True)])
    run.write_status(**{"status": "done", "step": 30, **status})  # pyright: ignore
    return folder


def test_comparison_has_a_line_for_each_run_in_each_panel(tmp_path: Path) -> None:
    runs = compare.read([written(tmp_path / rule, rule) for rule in ("bp", "fa", "dfa")])
    figure = compare.figure(runs)
    assert len(figure.axes) == 3
    for axes in figure.axes:
        names = [str(line.get_label()) for line in axes.get_lines()]
        assert [name for name in names if not name.startswith("_")] == ["bp", "fa", "dfa"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["bp", "fa", "dfa"]
    (mean,) = (axes for axes in figure.axes if "angle" in axes.get_title("left"))
    expected = [89.5 - point for point in range(4)]
    assert list(mean.get_lines()[0].get_ydata()) == pytest.approx(expected), "the last layer is left out"  # pyright: ignore
    assert png(figure).startswith(b"\x89PNG\r\n\x1a\n")


def test_many_runs_have_colours_of_their_own(tmp_path: Path) -> None:
    runs = compare.read([written(tmp_path / str(number), "fa") for number in range(13)])
    lines = compare.figure(runs).axes[0].get_lines()
    assert len({line.get_color() for line in lines}) == 13
