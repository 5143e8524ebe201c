"""Sphinx: the pages of this folder, and the API reference made from docstrings. `make docs` builds it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import hf_lifecycle

project = "hf_lifecycle"
author = "The hf_lifecycle developers"
copyright = f"{author}, Apache-2.0"
version = release = hf_lifecycle.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
nitpicky = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # pages link to files beside docs/; tests/test_links.py checks those

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

highlight_language = "none"  # of code boxes that name no language, such as log lines
html_theme = "furo"
html_title = f"hf_lifecycle {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
