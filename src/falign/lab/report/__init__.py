"""The report: every figure and every claim beside what was measured, as one page and as the same numbers in JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from falign.lab._files import atomic_write

if TYPE_CHECKING:
    from falign.lab.experiment._results import PaperResults

__all__ = ["write_report"]


def write_report(out: Path, papers: "Sequence[PaperResults]") -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json``, each whole or not at all.

    A claim that cannot be read or a picture that cannot be drawn is shown as such, with the reason; neither keeps
    the rest from being written.

    Args:
        out: The folder; made if it is not there.
        papers: What is there of each paper, in the order in which they shall appear.

    Returns:
        The paths of the page and of the JSON file.

    Raises:
        WriteError: A file cannot be written; what was there before is still there.
    """
    # not before it is needed: who imports an experiment, which names colours of the style, imports this package
    from falign.lab.report._content import compose, document
    from falign.lab.report._page import page

    report = compose(papers)
    out.mkdir(parents=True, exist_ok=True)
    html, numbers = out / "report.html", out / "report.json"
    atomic_write(html, _bytes(page(report)))
    atomic_write(numbers, _bytes(json.dumps(document(report), allow_nan=False, ensure_ascii=False, indent=1)))
    return html, numbers


def _bytes(text: str) -> bytes:
    r"""UTF-8; what it cannot hold, such as bytes of file names, is written out as ``\udcfc``, as JSON itself does."""
    return text.encode(errors="backslashreplace")
