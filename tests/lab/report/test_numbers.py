"""Numbers, tracks and colours: few digits that never mislead, positions that agree with verdicts, legible colours."""

import math
import re
from itertools import pairwise

import matplotlib
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from falign.lab.experiment import Check
from falign.lab.report import style
from falign.lab.report._figures import inline, png
from falign.lab.report._numbers import digits_of, duration, format_number, interval, portable
from falign.lab.report._page import PALETTE, contrast, interval_bars, on_dark
from falign.lab.report.style import RC_PARAMS

finite = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (12800, "12800"),
        (0.613249, "0.6132"),
        (0.5, "0.5"),
        (-2.0, "−2"),
        (1234.56, "1235"),
        (99999.6, "100000"),
        (1e-5, "10⁻⁵"),
        (-1e-5, "−10⁻⁵"),
        (1.3e-5, "1.3 × 10⁻⁵"),
        (0.00099999999, "0.001"),
        (1e9, "10⁹"),
        (1.23456e9, "1.235 × 10⁹"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "not a number"),
    ],
)
def test_shown(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.58, 0.64, "[0.58, 0.64]"),
        (0.58, math.inf, "≥ 0.58"),
        (-math.inf, 0.64, "≤ 0.64"),
        (-math.inf, math.inf, "any number"),
        (-1e-12, 1e-12, "[−10⁻¹², 10⁻¹²]"),
    ],
)
def test_interval(low: float, high: float, text: str) -> None:
    assert interval(Check(label="", measured=0.6, low=low, high=high)) == text


def test_a_number_just_outside_does_not_look_like_the_end() -> None:
    check = Check(label="", measured=0.61000004, low=0.5, high=0.61)
    assert (format_number(check.measured, digits_of(check)), interval(check)) == ("0.61000004", "[0.5, 0.61]")


@given(finite, finite)
def test_what_is_shown_tells_apart_what_differs(measured: float, end: float) -> None:
    check = Check(label="", measured=measured, high=end)
    digits = digits_of(check)
    assert (format_number(measured, digits) == format_number(end, digits)) == (measured == end)


@given(st.floats(-1e300, 1e300))
def test_shown_is_near(value: float) -> None:
    text = format_number(value).replace("−", "-").replace(" × 10", "e")
    if text.lstrip("-").startswith("10") and any(digit in text for digit in "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"):
        text = text.replace("10", "1e", 1)
    assert float(text.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3599.7, "1 h"),
        (3900, "1 h 5 min"),
        (90000, "25 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_portable_keeps_what_json_has() -> None:
    value = {"a": [1, 2.5, None, True, "x"], "b": (math.nan, {"c": -math.inf}), 3: math}
    assert portable(value) == {"a": [1, 2.5, None, True, "x"], "b": ["NaN", {"c": "-Infinity"}], "3": str(math)}


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9) | st.just(-math.inf), st.floats(1e-9, 1e9) | st.just(math.inf))
def test_a_point_lies_in_its_track_as_the_number_does_in_its_interval(measured: float, low: float, wide: float) -> None:
    check = Check(label="", measured=measured, low=low, high=wide if low == -math.inf else low + wide)
    (track,) = interval_bars([check])
    if track is None:
        assert check.low == -math.inf or not check.low < check.high
        return
    slack = 0.01  # positions are rounded
    assert 0 <= track.at <= 100
    if check.holds:
        assert track.start - slack <= track.at <= track.end + slack
    else:
        assert track.at <= track.start + slack or track.at >= track.end - slack


def test_tracks_of_open_intervals_share_a_scale() -> None:
    near, far, below = interval_bars([Check(label="", measured=value, low=0.0) for value in (0.1, 0.5, -0.25)])
    assert near is not None
    assert far is not None
    assert below is not None
    assert below.at < near.start < near.at < far.at
    assert (far.at - far.start) == pytest.approx(5 * (near.at - near.start))
    assert interval_bars([Check(label="", measured=1.0), Check(label="", measured=math.nan, low=0.0)]) == [None, None]


@pytest.mark.parametrize("dark", [0, 1])
def test_text_of_the_page_is_legible(dark: int) -> None:
    def of(first: str, second: str) -> float:
        return contrast(PALETTE[first][dark], PALETTE[second][dark])

    for word in ("ink", "quiet", "link", "holds", "fails", "open"):
        assert of(word, "paper") >= 4.5
        assert of(word, "raised") >= 4.5
    for kind in ("holds", "fails", "open"):
        assert of(kind, f"{kind}-back") >= 4.5
    for word in ("ink", "quiet"):
        assert of(word, "fails-back") >= 4.5


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_lines_are_legible_on_both_pages(count: int) -> None:
    light, dark = PALETTE["paper"]
    for colour in (*style.sequence(count), *style.COLOURS, style.INK):
        assert contrast(colour, light) >= 2.9
        assert contrast(on_dark(colour), dark) >= 4.5
    assert contrast(on_dark("#ffffff"), dark) < 1.2, "white becomes the page"
    assert contrast(on_dark(style.GRID), dark) > 1.05, "the grid is still seen"


def test_a_sequence_grows_darker() -> None:
    against_white = [contrast(colour, "#ffffff") for colour in style.sequence(6)]
    assert all(before < after for before, after in pairwise(against_white))


def test_panels_bands_and_legend_hold_what_they_are_given() -> None:
    data = pl.DataFrame({"x": [1.0, 2.0, 4.0], "y": [1.0, 0.1, 0.001]})
    figure, panels = style.panels(
        2, 2, titles=["a", "b", "c", "d"], xlabels=["up", "down"], ylabels=["one", "two"], share="row"
    )
    for panel in panels:
        for colour, marker in zip(style.sequence(2), style.MARKERS, strict=False):
            style.band(
                panel,
                data["x"],
                data["y"],
                data["y"] / 2,
                data["y"] * 2,
                label=f"line {marker}",
                colour=colour,
                marker=marker,
            )
        style.law(panel, data["x"], 1 / data["x"], "1/x")
        style.expected(panel, 0.2, 0.4, "expected")
        style.logarithmic(panel, "both", ticks=None)
    style.legend(figure)
    png(figure)
    assert [panel.get_title("left") for panel in panels] == ["a", "b", "c", "d"]
    assert [panel.get_xlabel() for panel in panels] == ["up", "up", "down", "down"]
    assert [panel.get_ylabel() for panel in panels] == ["one", "", "two", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["line o", "line s", "1/x", "expected"]
    assert list(panels[0].get_lines()[0].get_ydata()) == data["y"].to_list()  # pyright: ignore


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1e-6, 10.0, {"10⁻⁶", "10⁻⁴", "10⁻²", "1"}),
        (1.0, 1000.0, {"1", "10", "100", "1000"}),
        (0.02, 0.3, {"0.02", "0.05", "0.1", "0.2"}),
        (200, 12800, {"10³", "10⁴"}),
        (1e2, 1e9, {"10²", "10⁸"}),
    ],
)
def test_ticks_of_a_logarithmic_axis(low: float, high: float, labels: set[str]) -> None:
    figure, (panel,) = style.panels(1)
    panel.plot([low, high], [0, 1])
    style.logarithmic(panel, "x")
    png(figure)
    assert labels <= {label.get_text() for label in panel.get_xticklabels()}


def test_chosen_ticks_are_written() -> None:
    figure, (panel,) = style.panels(1)
    panel.plot([200, 12800], [0, 1])
    style.logarithmic(panel, "x", ticks=[200, 800, 12800])
    png(figure)
    assert [label.get_text() for label in panel.get_xticklabels()] == ["200", "800", "12800"]


def test_any_figure_can_live_in_a_page() -> None:
    figure = Figure(figsize=(3, 2))
    panel = figure.add_subplot()
    panel.imshow([[0, 1], [2, 3]])
    panel.set_title("<b> $\\lambda^2$ & co")
    with matplotlib.rc_context(RC_PARAMS):
        first, second = inline(figure, "one", "A & B"), inline(figure, "two", "A & B")
    assert first.width == 288
    assert first.markup.startswith("<svg ")
    assert "http" not in first.markup
    assert "<style" not in first.markup
    assert first.markup.replace("one-", "two-") == second.markup
    assert "#000000" in first.colours
    assert not re.search(r"(fill|stroke): *#[0-9a-f]", first.markup), "every colour can follow the page"
