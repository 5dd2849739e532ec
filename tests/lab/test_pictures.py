"""The pictures: real PNG files with the lines, names and scales that they should have."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from matplotlib.axes import Axes
from PIL import Image

from falign.lab import _compare, _tables
from falign.lab._pictures import draw, figures
from falign.lab._run_folder import PICTURES, RunFolder
from falign.lab._tables import Tables
from falign.lab.config import TrainConfig
from falign.lab.report._figures import png

CONFIG = TrainConfig("digits", model="mlp:64-128-10", rule="dfa", learning_rate=0.1)


def measured(layers: int, points: int, *, law: bool = False) -> Tables:
    """A run whose layer l has at point p the angle 90 - l - p, the last one 0."""
    rows, long = [], []
    names = [f"fc{layer + 1}" for layer in range(layers)]
    for point in range(points):
        row = {
            "step": 10 * point,
            "epoch": float(point),
            "train_loss": None if point == 0 else 2.0 / point,
            "train_accuracy": None if point == 0 else 1 - 0.9 / point,
            "test_loss": 2.5 / (point + 1),
            "test_accuracy": 1 - 0.9 / (point + 1),
            "dominance": 0.5 * point - 0.25,
        }
        angles = {name: 0.0 if name == names[-1] else 90.0 - index - point for index, name in enumerate(names)}
        row |= {f"angle_{name}": angle for name, angle in angles.items()}
        rows.append({**row, "seconds": 1.5 * point})
        long += [
            {
                "step": 10 * point,
                "epoch": float(point),
                "layer": name,
                "cosine": 0.1 * point,
                "gradient_norm": 0.5,
                "taken_norm": 0.25,
                "delivered_angle": None if name == "fc1" else 80.0 - point,
            }
            for name in names
        ]
    cosines = [(neuron - 1) / 10 for neuron in range(5)]
    neurons = pl.DataFrame({"layer": "fc2", "neuron": range(5), "alignment": cosines, "cosine": cosines[::-1]})
    found = pl.DataFrame(
        {
            "layer": ["fc1", "fc1", "fc2"],
            "targets": ["fc2", "fc2", "fc3"],
            "status": "exact",
            "weights": [0.0, 3.0, 1.0],
            "alignment": [0.0, 3.0, 1.0],
            "residual": 0.0,
        }
    )
    return Tables(
        records=_tables.record_table(rows),
        alignment=_tables.alignment_table(long),
        neurons=neurons if layers > 1 and points else _tables.neuron_table(None),
        law=found if law else None,
    )


def labels(axes: Axes) -> list[str]:
    return [str(line.get_label()) for line in axes.get_lines() if not str(line.get_label()).startswith("_")]


def heights(axes: Axes) -> list[list[float]]:
    return [[float(y) for y in line.get_ydata()] for line in axes.get_lines()]  # pyright: ignore


def test_png_files_are_written(tmp_path: Path) -> None:
    draw(RunFolder(tmp_path), measured(3, 5, law=True), CONFIG)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["accuracy.png", "angles.png", "dominance.png", "law.png", "loss.png", "neurons.png"]
    for name in written:
        with Image.open(tmp_path / name) as picture:
            picture.verify()
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert 900 <= picture.width <= 1500
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, "it is not empty"
            assert picture.getpixel((0, 0))[:3] == (255, 255, 255), "on white, not transparent"


def test_a_law_that_was_not_checked_has_no_picture() -> None:
    assert "law.png" not in figures(measured(2, 2), CONFIG)


def test_training_and_test_are_drawn_with_the_measured_numbers() -> None:
    found = measured(2, 4)
    drawn = figures(found, CONFIG)
    for name, factor in (("loss", 1), ("accuracy", 100)):
        (axes,) = drawn[f"{name}.png"].axes
        assert labels(axes) == ["training (mean over the epoch)", "test"]
        train, test = axes.get_lines()
        assert list(train.get_xdata()) == [1, 2, 3], "what was not measured is not drawn"  # pyright: ignore
        expected = [factor * value for value in found.records[f"test_{name}"]]
        assert list(test.get_ydata()) == pytest.approx(expected)  # pyright: ignore
        assert all(word in axes.get_title("left") for word in ("dfa", "digits", "mlp:64-128-10"))
    assert drawn["loss.png"].axes[0].get_yscale() == "log"


@pytest.mark.parametrize("layers", [1, 3, 8, 9, 22])
def test_every_layer_has_its_angles(layers: int) -> None:
    figure = figures(measured(layers, 6), CONFIG)["angles.png"]
    left, right, *scale = figure.axes
    names = [f"fc{number}" for number in range(1, layers + 1)]
    assert labels(left) == names
    assert labels(right) == names[1:], "the first layer hands no error on"
    if scale:
        assert layers > 8, "few layers are named one by one"
        assert scale[0].get_xlabel() == f"{layers} layers, from fc1 to fc{layers}"
    else:
        assert sorted(text.get_text() for text in left.texts) == sorted(names)
    colours = {str(line.get_label()): line.get_color() for line in left.get_lines()[:layers]}
    assert len(set(colours.values())) == layers
    assert all(line.get_color() == colours[str(line.get_label())] for line in right.get_lines()[: layers - 1])
    for axes in (left, right):
        low, high = axes.get_ylim()
        assert low < 0
        assert high >= 95


def test_names_at_the_lines_do_not_overlap() -> None:
    figure = figures(measured(8, 6), CONFIG)["angles.png"]
    png(figure)  # lays it out
    for axes in figure.axes:
        boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
        assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))


def test_angles_beyond_a_right_angle_are_seen() -> None:
    found = measured(2, 3)
    wide = replace(found, records=found.records.with_columns(angle_fc1=pl.lit(150.0)))
    assert all(axes.get_ylim()[1] > 150 for axes in figures(wide, CONFIG)["angles.png"].axes)


def test_neurons_are_sorted_and_those_aligned_are_counted() -> None:
    (axes,) = figures(measured(2, 2), CONFIG)["neurons.png"].axes
    assert labels(axes) == ["into fc2: 60% of 5 aligned"]
    assert heights(axes)[0] == pytest.approx([-0.1, 0.0, 0.1, 0.2, 0.3])
    assert heights(axes)[1] == [0, 0]


def test_a_rule_without_feedback_of_that_shape_says_so() -> None:
    (axes,) = figures(measured(1, 2), CONFIG)["neurons.png"].axes
    assert "no feedback of the shape" in axes.texts[0].get_text()


def test_dominance_has_its_line_and_its_three_components() -> None:
    figure = figures(measured(3, 4), CONFIG)["dominance.png"]
    above, cosine, gradient, taken = figure.axes
    assert heights(above) == [pytest.approx([-0.25, 0.25, 0.75, 1.25]), [-1, -1]]
    assert above.get_ylim()[0] < -1
    assert heights(cosine)[0] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert heights(gradient) == [[0.5] * 4] * 3
    assert heights(taken) == [[0.25] * 4] * 3
    assert gradient.get_ylim() == taken.get_ylim(), "the two norms are seen on one scale"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fc1", "fc2", "fc3"]


def test_a_dominance_far_away_does_not_hide_the_line() -> None:
    found = measured(2, 4)
    far = replace(found, records=found.records.with_columns(dominance=pl.lit(5000.0)))
    axes = figures(far, CONFIG)["dominance.png"].axes[0]
    low, high = axes.transData.transform([(0, -1), (0, 5000)])[:, 1]
    bottom = axes.transData.transform((0, axes.get_ylim()[0]))[1]
    assert low - bottom > 0.02 * (high - low)


def test_the_law_is_a_diagonal_of_equal_axes() -> None:
    figure = figures(measured(3, 2, law=True), CONFIG)["law.png"]
    (axes,) = figure.axes
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_aspect() == 1
    points = [collection.get_offsets().tolist() for collection in axes.collections]  # pyright: ignore
    assert points == [[[0, 0], [3, 3]], [[1, 1]]]
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == list(line.get_ydata())  # pyright: ignore
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["fc1, exact", "fc2, exact", "conserved"]


def test_what_is_accounted_for_is_put_back_by_rings() -> None:
    found = measured(3, 2, law=True)
    assert found.law is not None
    moved = found.law.with_columns(status=pl.lit("accounted"), alignment=pl.lit(7.0), residual=pl.lit(0.25))
    (axes, *_) = figures(replace(found, law=moved), CONFIG)["law.png"].axes
    points, rings, *_ = (collection.get_offsets().tolist() for collection in axes.collections)  # pyright: ignore
    assert points == [[0, 7], [3, 7]]
    assert rings == [[0, -0.25], [3, 2.75]]


def test_many_layers_are_a_scale_and_the_statuses_have_markers() -> None:
    found = measured(12, 2)
    names = [f"fc{number}" for number in range(1, 12)]
    law = pl.DataFrame(
        {
            "layer": names,
            "targets": names,
            "status": ["exact"] * 5 + ["drift"] * 3 + ["none"] * 3,
            "weights": [float(number) for number in range(11)],
            "alignment": [float(number) for number in range(11)],
            "residual": 0.0,
        }
    )
    neurons = pl.DataFrame({"layer": names, "neuron": 0, "alignment": 1.0, "cosine": 1.0})
    drawn = figures(replace(found, law=law, neurons=neurons), CONFIG)
    axes, scale = drawn["law.png"].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["exact", "drift", "none"]
    assert scale.get_xlabel() == "11 layers, from fc1 to fc11"
    axes, scale = drawn["neurons.png"].axes
    assert axes.texts[0].get_text() == "of a layer's neurons 100% to 100% are aligned"
    assert png(drawn["dominance.png"]).startswith(b"\x89PNG")


def test_a_network_of_which_nothing_can_be_followed_says_so() -> None:
    found = measured(3, 2, law=True)
    assert found.law is not None
    (axes,) = figures(replace(found, law=found.law.clear()), CONFIG)["law.png"].axes
    assert "no neuron" in axes.texts[0].get_text()


def test_neurons_of_layers_without_angles_are_drawn() -> None:
    found = measured(3, 2, law=False)
    neurons = found.neurons.with_columns(layer=pl.lit("rnn.ih_l0"))
    (axes,) = figures(replace(found, neurons=neurons), CONFIG)["neurons.png"].axes
    assert axes.get_legend().get_texts()[0].get_text().startswith("into rnn.ih_l0")


@pytest.mark.parametrize("points", [0, 1])
def test_few_points(points: int, tmp_path: Path) -> None:
    draw(RunFolder(tmp_path), measured(2, points, law=True), CONFIG)
    assert all((tmp_path / name).stat().st_size > 1000 for name in PICTURES if name != "perplexity.png")  # of texts


def written(folder: Path, rule: str, **status: object) -> Path:
    run = RunFolder(folder)
    run.begin()
    run.write_config(TrainConfig("digits", model="mlp:64-128-10", rule=rule), {})
    run.write_tables(measured(3, 4))
    run.write_status(**{"status": "done", "step": 30, **status})  # pyright: ignore
    return folder


def test_comparison_has_a_line_for_each_run_in_each_panel(tmp_path: Path) -> None:
    runs = _compare.read([written(tmp_path / rule, rule) for rule in ("bp", "fa", "dfa")])
    figure = _compare.comparison_figure(runs)
    *panels, names = figure.axes
    assert len(panels) == 5
    for axes in panels:
        assert labels(axes) == ["bp", "fa", "dfa"]
    assert [text.get_text() for text in names.get_legend().get_texts()] == ["bp", "fa", "dfa"]
    titles = {axes.get_title("left"): heights(axes)[0] for axes in panels}
    assert titles["Mean angle before the last layer"] == pytest.approx([89.5 - point for point in range(4)])
    assert titles["Alignment dominance D"] == pytest.approx([-0.25, 0.25, 0.75, 1.25])
    assert titles["Angle of every layer at the end"] == pytest.approx([87.0, 86.0, 0.0])
    assert png(figure).startswith(b"\x89PNG\r\n\x1a\n")


def test_many_runs_have_colours_of_their_own(tmp_path: Path) -> None:
    runs = _compare.read([written(tmp_path / str(number), "fa") for number in range(13)])
    lines = _compare.comparison_figure(runs).axes[0].get_lines()
    assert len({line.get_color() for line in lines}) == 13
