"""How Sphinx builds the site: `make docs`.

The source folder is the repository, so that a link from a page to a notebook, or back, is the same
here, in JupyterLab and on the site.
"""

import re
import tomllib
import typing
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

typing.GENERATING_DOCUMENTATION = True  # jaxtyping then shows shapes as they stand in the source

ROOT = Path(__file__).parent.parent

project = "gipip"
author = "gipip developers"
project_copyright = f"{author}, MIT licence"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

root_doc = "docs/index"
include_patterns = [
    *("docs/*.md", "docs/api/*.md", "notebooks/*.ipynb"),
    *("data/README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
]
exclude_patterns = [".venv", "results", "docs/_build"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
nb_execution_mode = "off"
nb_execution_cache_path = str(ROOT / "docs" / "_build" / "cache")
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "exclude-members": "model_config, model_post_init",
}
autodoc_inherit_docstrings = False
maximum_signature_line_length = 80

pygments_style = "a11y-light"
pygments_dark_style = "github-dark"
html_theme = "furo"
html_copy_source = False
html_math_renderer = "mathml"
html_title = "gipip"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_extra"]  # index.html, which leads to docs/index.html


def as_literal_text(app, what, name, obj, options, lines):
    """Docstrings are plain text with code in backticks: keep both from reStructuredText."""
    text = re.sub(r"([*|\\]|_(?!\w))|`([^`]+)`", _literal, "\n".join(lines))
    lines[:] = text.split("\n")


def _literal(found: re.Match) -> str:
    return f"\\{found[1]}" if found[1] else f"\\ ``{' '.join(found[2].split())}``\\ "


def without_constraints(app, what, name, obj, options, signature, returned):
    """Types of settings as int, not as Annotated[int, Gt(gt=0)]: docstrings tell the ranges."""
    if signature is None:
        return None
    return re.sub(r"Annotated\[(\w+), [^\]]*\]", r"\1", signature), returned


def inline_formula(translator, node):
    """MathML, which browsers draw by themselves."""
    translator.body.append(tex2mathml(node.astext()))
    raise SkipNode


def formula(translator, node):
    translator.body.append(tex2mathml(node.astext(), as_block=True))
    raise SkipNode


def setup(app):
    app.connect("autodoc-process-docstring", as_literal_text)
    app.connect("autodoc-process-signature", without_constraints)
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
