"""Reports as tables of a notebook and as pictures: the same cells as their text, and the same numbers."""

import dataclasses
import re
import sys
from html.parser import HTMLParser

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from test_floor import FLAT, digits, grown
from torch import nn

import falign
from falign import init
from falign.measure import ConservationLaw, Monitor, alignment, compare, consistency

HOSTILE = "<script>$x_1&"


class Cells(HTMLParser):
    """The cells of a page's tables, line by line, and every tag and attribute on it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.lines: list[list[str]] = []
        self.tags: set[str] = set()
        self.styles: set[str] = set()
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.styles |= {value for name, value in attributes if name == "style"}
        assert {name for name, _ in attributes} <= {"style", "scope"}
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.lines[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.lines[-1][-1] += data


@pytest.fixture(scope="module")
def trained():
    """A small network after some steps, with all that can be measured of it."""
    torch.manual_seed(0)
    x, y = digits(256)
    layers = {"first": nn.Linear(64, 16), "relu": nn.ReLU(), HOSTILE: nn.Linear(16, 16), "on": nn.ReLU()}
    model = nn.Sequential()
    for name, layer in {**layers, "last": nn.Linear(16, 10)}.items():
        model.add_module(name, layer)
    shown = {
        "check": falign.check(model, "fa", example=x[:2]),
        "refused": falign.check(model, "fa", skip=[HOSTILE[1:]]),
    }
    falign.convert(model, "fa")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    law = ConservationLaw(model, optimizer)
    with Monitor(model, every=4, optimizer=optimizer) as monitor:
        for _ in range(5):
            for batch in torch.arange(256).split(64):
                monitor.step(FLAT, x[batch], y[batch])
                optimizer.zero_grad()
                FLAT(model(x[batch]), y[batch]).backward()
                optimizer.step()
    shown |= {
        "alignment": alignment(model, FLAT, x, y),
        "law": law.report(),
        "monitor": monitor,
        "verification": falign.verify(model, x[:8], lambda output: FLAT(output, y[:8])),
        "comparison": compare(model, ["fa", "dfa", "frozen"], FLAT, x, y),
        "consistency": consistency(model, FLAT, [(x[rows], y[rows]) for rows in torch.arange(256).split(32)]),
        "transport": falign.transport(model, x[:8], lambda output: FLAT(output, y[:8])),
        "noise": init.noise(model, example=x[:2], steps=2),
    }
    return shown


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    plt.close("all")


def test_html_has_the_cells_of_the_text_and_no_colour_or_script(trained):
    for name, report in trained.items():
        text, page = str(report), Cells(report._repr_html_())
        assert page.open == []
        assert page.tags <= {"div", "p", "table", "thead", "tbody", "tr", "th", "td", "strong", "small", "br"}
        assert not any("color" in style or "background" in style for style in page.styles), name
        lines = {" ".join(" ".join(line).split()) for line in page.lines}
        assert lines <= {" ".join(line.split()) for line in text.splitlines()}, name
        assert bool(lines) == (name not in ("refused", "transport")), name


def test_ipython_shows_the_table(trained):
    formatters = pytest.importorskip("IPython.core.formatters", reason="needs IPython")
    for report in trained.values():
        shown, _ = formatters.DisplayFormatter().format(report)
        assert shown["text/html"] == report._repr_html_()


def test_a_picture_draws_the_numbers(trained):
    report = trained["alignment"]
    axes = report.plot()
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert drawn["gradient"] == [row.gradient_angle for row in report.layers]
    assert drawn["error behind"] == [row.received_angle for row in report.layers]
    assert drawn["error before"] == [row.delivered_angle for row in report.layers[1:]]
    assert [label.get_text().replace(r"\$", "$") for label in axes.get_yticklabels()] == ["first", HOSTILE, "last"]
    lines = trained["monitor"].plot().get_lines()
    for line, name in zip(lines, ("first", HOSTILE, "last"), strict=False):
        angles = [row["gradient_angle"] for row in trained["monitor"].records if row["layer"] == name]
        assert list(line.get_ydata()) == angles


def test_every_picture_can_be_kept(trained, tmp_path):
    for name in trained.keys() - {"refused", "transport"}:
        axes = trained[name].plot()
        axes.figure.savefig(tmp_path / "picture.png", dpi=50)
        assert (tmp_path / "picture.png").stat().st_size > 2000, name
        assert axes.figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)  # its lettering is dark, a notebook's page may be


def test_axes_of_ones_own_are_drawn_on(trained):
    figure, both = plt.subplots(1, 2)
    assert trained["law"].plot(ax=both[1]) is both[1]
    assert both[1].has_data()
    assert not both[0].has_data()
    assert plt.get_fignums() == [figure.number]
    with pytest.raises(TypeError, match="ax is a ndarray, expected matplotlib's Axes"):
        trained["law"].plot(ax=both)


def test_what_cannot_be_drawn_is_a_sentence(trained, monkeypatch):
    with pytest.raises(ValueError, match=r"^there is nothing to draw: cannot be converted"):
        trained["refused"].plot()
    with pytest.raises(ValueError, match="it holds no numbers; print it"):
        trained["transport"].plot()
    assert plt.get_fignums() == []
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape('a picture needs matplotlib: pip install "falign[lab]"')):
        trained["alignment"].plot()


def test_a_monitor_says_that_nothing_was_measured():
    model = falign.convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), "fa")
    with Monitor(model) as monitor:
        assert "nothing was measured yet" in monitor._repr_html_()
        with pytest.raises(ValueError, match="nothing to draw: nothing was measured yet"):
            monitor.plot()


def test_an_angle_that_cannot_be_read_is_a_word_everywhere():
    model, (x, y) = falign.convert(grown(1e9), "fa"), digits()
    report = alignment(model, FLAT, x, y)
    lost = [row.layer for row in report.layers if row.lost("gradient")]
    assert lost
    html = report._repr_html_()
    assert html.count("<strong>unreadable</strong>") == str(report).split("unreadable:")[0].count("unreadable")
    axes = report.plot()
    texts = {round(text.xy[1]): text.get_text() for text in axes.texts}
    names = [row.layer for row in report.layers]
    assert {names[row] for row, text in texts.items() if "gradient unreadable" in text} == set(lost)
    (gradients,) = [line for line in axes.get_lines() if line.get_label() == "gradient"]
    assert len(gradients.get_xdata()) == len(names) - len(lost)
    with Monitor(model, every=1) as monitor:
        monitor.step(FLAT, x, y)
    assert monitor._repr_html_().count("<strong>unreadable</strong>") == len(lost)
    assert [line.get_label() for line in monitor.plot().get_lines()].count("unreadable in a layer") == 1
    compared = compare(model, ["fa"], FLAT, x, y)
    assert "<strong>unreadable</strong>" in compared._repr_html_()
    assert any("fa unreadable" in text.get_text() for text in compared.plot().texts)


def test_a_broken_law_and_a_wrong_gradient_are_loud(trained):
    law = trained["law"]
    broken = dataclasses.replace(law, laws=(dataclasses.replace(law.laws[0], leap=1.0), *law.laws[1:]))
    assert "IS BROKEN" in str(broken)
    assert "<strong>BROKEN</strong>" in broken._repr_html_()
    assert [text.get_text() for text in broken.plot().texts] == ["BROKEN"]
    right = trained["verification"]
    wrong = dataclasses.replace(right, rows=(dataclasses.replace(right.rows[0], error=0.5), *right.rows[1:]))
    assert "<strong>WRONG</strong>" in wrong._repr_html_()
    assert any("WRONG" in text.get_text() for text in wrong.plot().texts)
    assert "WRONG" not in right._repr_html_() + str(right)


def test_rows_are_a_table(trained):
    for name in ("alignment", "law", "monitor", "comparison", "consistency"):
        assert trained[name].to_polars().to_dicts() == trained[name].rows()


def test_the_settings_of_matplotlib_stay_as_they_are(trained):
    before = dict(matplotlib.rcParams)
    trained["alignment"].plot()
    assert dict(matplotlib.rcParams) == before
