"""The pictures of the field's table in the docs are what today's code draws of the published trainings."""

import sys
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"


@pytest.mark.skipif(not PICTURES.exists(), reason="the documentation is not beside the tests")
def test_pictures_are_what_the_code_draws(tmp_path, monkeypatch):
    from matplotlib.testing.compare import compare_images

    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from field import draw

    trials = pl.read_csv(ROOT / "docs" / "benchmark" / "trials.csv", infer_schema_length=None)
    draw(SimpleNamespace(table=trials), tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in PICTURES.glob("benchmark-*.png"))
    for name in drawn:
        assert compare_images(str(PICTURES / name), str(tmp_path / name), tol=2) is None
