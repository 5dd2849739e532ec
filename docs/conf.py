"""The documentation site: ``make docs`` builds it, without a warning, into build/site. Nothing in it is fetched."""

import os
import sys
from pathlib import Path

import falign

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the notebooks

project = "falign"
version = release = falign.__version__
author = copyright = "The falign developers"
extensions = [
    "myst_nb",  # pages in Markdown, tutorials as notebooks in the percent format
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "generated",  # the reference, and what lies beside the docs
    "matrix",  # the rules compared
    "tutorials",  # executed, of falign as it is now: none can rot
]
exclude_patterns = ["conf.py", "_ext/**", "_generated/*.ipynb", "gpu/**"]

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence"]
myst_heading_anchors = 3
nb_custom_formats = {".py": "tutorials.read"}
nb_execution_mode = "off"  # they are executed already
nb_output_stderr = "error"
nb_merge_streams = True

autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [
    *((name, "notes_style") for name in ("Source", "Needs", "Limits")),
    ("Class attributes", "params_style"),
]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "falign"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": {"color-brand-primary": "#1d4ed8", "color-brand-content": "#1d4ed8"},
    "dark_css_variables": {"color-brand-primary": "#93b4ff", "color-brand-content": "#93b4ff"},
}
