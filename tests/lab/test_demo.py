"""The demonstration: trained rules and a paper on one page."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from falign.cli import main
from falign.lab import _demo
from falign.lab._demo import demonstrate
from falign.lab.experiment._selection import narrow, select
from falign.papers import PAPERS


@pytest.mark.unchecked
def test_trained_rules_and_paper_stand_on_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    selection = narrow(select(["song2021.inputs"], PAPERS), ["n=5"], 2, "smoke")
    code = demonstrate(
        selection,
        "smoke",
        runs=Path("runs"),
        out=Path("results"),
        workers=1,
        console=Console(file=printed, width=120),
        config=replace(_demo._CONFIG, epochs=1),
    )
    assert code == 0
    page = tmp_path / "results" / "demo.html"
    assert f"trained rules and paper on one page: {page.as_uri()}" in printed.getvalue().replace("\n", "")
    html = page.read_text()
    rows = re.findall(r'<th scope="row">(bp|fa|dfa|usf)</th><td>.*?</td><td>([\d.]+)</td><td>(\d+)°</td>', html)
    assert [rule for rule, *_ in rows] == ["bp", "fa", "dfa", "usf"]
    assert rows[0][2] == "0", "of backpropagation"
    assert all(0 < int(angle) < 100 for _, _, angle in rows[1:])
    assert all(10 < float(accuracy) <= 100 for _, accuracy, _ in rows)
    assert (
        html.index("Four rules") < html.index("Convergence and Alignment of Gradient Descent") < html.index("s claims")
    )
    assert 'href="report.html"' in html
    assert "Four rules" not in Path("results/report/song2021.html").read_text(), "the paper's own page is of it alone"


def test_a_wrong_option_is_told_before_anything_begins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", "--workers", "0", "--out", str(tmp_path / "new")]) == 2
    assert "--workers is 0, expected at least 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
