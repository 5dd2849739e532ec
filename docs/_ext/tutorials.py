"""Tutorials: notebooks in the percent format, executed whenever the site is built, all in one process.

MyST-NB reads and shows them. Its own execution starts a kernel for each, which would import PyTorch every time.
"""

import logging
import os
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

FOLDER = "tutorials"
FRESH = "%reset -f\nimport os\nos.chdir({folder!r})\n%config InlineBackend.figure_formats = ['svg']\n%matplotlib inline"
"""Run before each of them, so that none sees another's names."""

_executed: dict[str, NotebookNode] = {}
"""The text of a tutorial: the notebook with its outputs."""


def setup(app: Sphinx) -> dict[str, bool]:
    """Take part in a build."""
    app.connect("builder-inited", _execute)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def read(text: str) -> NotebookNode:
    """Give the notebook of a file's text: how MyST-NB reads ``.py``."""
    return _executed.get(text) or jupytext.reads(text, fmt="py:percent")


def _execute(app: Sphinx) -> None:
    folder = Path(app.srcdir, FOLDER)
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}
    notebooks = [jupytext.reads(text, fmt="py:percent") for text in texts.values()]
    fresh = FRESH.format(folder=str(folder))
    cells = [cell for each in notebooks for cell in (nbformat.v4.new_code_cell(fresh), *each.cells)]
    _of_nobody(Path(app.doctreedir, "ipython", "profile_default"))
    try:
        NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=120, kernel_name="python3").execute()
    except CellExecutionError as error:
        raise ExtensionError(f"a tutorial fails:\n{error}") from None
    for (name, text), notebook in zip(texts.items(), notebooks, strict=True):
        link = f"{{download}}`This page as a notebook <../_generated/{name}.ipynb>`"
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(link))
        language = {"name": "python", "pygments_lexer": "ipython3"}
        notebook.metadata.update(
            kernelspec={"name": "python3", "display_name": "Python 3", "language": "python"}, language_info=language
        )
        _executed[text] = notebook


def _of_nobody(profile: Path) -> None:
    """Start the kernel with settings of its own, whatever the user's are, and without a word about its sockets."""
    logging.getLogger("traitlets").setLevel(logging.WARNING)
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 40\n", encoding="utf-8")
    os.environ["IPYTHONDIR"] = str(profile.parent)
