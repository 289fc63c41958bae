"""How Sphinx makes the site: `sphinx-build -W --keep-going -n -b html docs build/docs` (needs no network)."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_sphinx"))

import exitkit  # noqa: E402  after the path

project = "exitkit"
author = "the exitkit developers"
release = version = exitkit.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "commands",
    "generated",
    "plain_docstrings",
]
root_doc = "index"
exclude_patterns = [
    "_sphinx",
    "examples",
    "figures",
    "default-comparison",
    "results/**/runs",
    "results/**/report",
    "**/.ipynb_checkpoints",
]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook is committed with its outputs; a test executes it
nb_merge_streams = True

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "__init__, __new__, __post_init__, __init_subclass__"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Class attributes", "params_style")]
python_use_unqualified_type_names = True
add_module_names = False

# Types of other projects: their inventories would have to be fetched.
nitpick_ignore_regex = [
    ("py:.*", r"(numpy|torch|nn|pd|pandas|matplotlib|collections|pathlib|fractions)\..*|Path|Tensor")
]
# Reports written by commands may link to files that are no page; tests/docs/test_site.py checks every link.
suppress_warnings = ["myst.xref_missing", "toc.empty_glob", "toc.not_included", "mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = f"exitkit {release}"
html_static_path = ["_static"]
html_css_files = ["exitkit.css"]
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#00557f",
        "color-brand-content": "#00608f",
        "font-stack": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
    },
    "dark_css_variables": {"color-brand-primary": "#6cc0f0", "color-brand-content": "#6cc0f0"},
}
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


PAGE = "sort-and-filter.html"
"""Name in the site of the page of a study."""

EVIDENCE = (
    "performance",
    "robustness",
    "reproducibility",
    "results/README",
    "claims",
    "results/*/report",
)
"""Pages of measurements and results, for the section "Evidence" of the contents; those that exist are listed."""


def _evidence(app: Any, name: str, source: list[str]) -> None:
    if name == "index":
        paths = [path for pattern in EVIDENCE for path in sorted(HERE.glob(f"{pattern}.md"))]
        names = [path.relative_to(HERE).with_suffix("").as_posix() for path in paths]
        source[0] = source[0].replace("EVIDENCE\n", "".join(f"{name}\n" for name in names))


def _open_in_browser(app: Any, doctree: Any, name: str) -> None:
    """Links to the page of a study open it; Sphinx would offer it as a download."""
    # Imported when used: a test reads this file where Sphinx is not installed.
    from docutils import nodes
    from sphinx import addnodes

    for link in list(doctree.findall(addnodes.download_reference)):
        folder, _, file = link["reftarget"].rpartition("/")
        if file == "report.html":
            link.replace_self(nodes.reference("", "", *link.children, refuri=f"{folder}/{PAGE}", internal=True))


def _copy_pages(app: Any, error: Exception | None) -> None:
    for page in HERE.glob("results/*/report.html"):  # the site has a report.html of its own, made of report.md
        target = Path(app.outdir) / page.relative_to(HERE).with_name(PAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, target)


def setup(app: Any) -> None:
    """Fill in the table of contents, and take the pages of the studies into the site."""
    app.connect("source-read", _evidence)
    app.connect("doctree-resolved", _open_in_browser)
    app.connect("build-finished", _copy_pages)
