"""How the documentation is built: ``python -m sphinx -c docs -b html -W --keep-going . build/html``.

The source directory is the repository's root, so that relative links between README.md, docs/ and notebooks/ mean
the same on a code host and in the built pages. Nothing is loaded from elsewhere: the pages work without a network.
"""

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_sphinx")]

project = "minidp"
author = "the authors of minidp"
project_copyright = "the authors of minidp, MIT licence"
# Read, not imported: the version is wanted before anything of the package runs.
release = re.findall(r'^__version__ = "(.*)"', (HERE.parent / "minidp/__init__.py").read_text(), re.MULTILINE)[0]

root_doc = "docs/index"
include_patterns = ["README.md", "docs/**", "notebooks/**"]
exclude_patterns = ["build", ".*", "**/.*", "minidp", "tests", "docs/_*"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.linkcode", "docstrings", "sources"]

# Markdown and notebooks. Outputs are those that are committed: a test runs the notebooks, the site shows them.
nb_execution_mode = "off"
myst_heading_anchors = 4
myst_enable_extensions = []  # no dollar maths: formulas are Unicode
highlight_language = "text"
smartquotes = False  # a quoted "0.weight" is what one types
suppress_warnings = ["toc.empty_glob"]

# The reference. Inherited text is shown once, at the class that has it.
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 105
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"minidp {release}"
html_static_path = ["_static"]
html_css_files = ["minidp.css"]
html_extra_path = ["_root"]  # index.html at the top, which leads to docs/index.html
html_copy_source = False
html_show_sphinx = False
html_show_search_summary = False  # excerpts are fetched, which browsers refuse to pages opened from a disk
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5fa8", "color-brand-content": "#1f5fa8"},
    "dark_css_variables": {"color-brand-primary": "#7fb4ea", "color-brand-content": "#7fb4ea"},
}


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Where the source of a documented name is: reference pages all lie two folders deep."""
    import sources

    place = sources.place_of(info["module"], info["fullname"]) if domain == "py" else None
    return place and f"../../{place}"


def in_chinese(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Else browsers take the Japanese forms of some signs."""
    if page.startswith("docs/zh/"):
        context["language"] = "zh-CN"


def setup(app: Any) -> None:
    app.connect("html-page-context", in_chinese)
