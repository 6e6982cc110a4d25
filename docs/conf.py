"""Sphinx: Markdown by MyST, a reference drawn from the docstrings. `make docs` builds it; warnings are errors."""

from __future__ import annotations

from importlib.metadata import version as version_of

project = "zrl"
author = "The zrl authors"
copyright = "2026, The zrl authors"
release = version = version_of("zrl")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "code"  # docstrings name code in single backquotes

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_inherit_docstrings = False  # those of gymnasium and torch are theirs to show
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # "Attributes:" describes members that autodoc lists by itself
nitpicky = False

html_theme = "furo"
html_title = "zrl"
