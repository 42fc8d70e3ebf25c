"""Settings of the documentation site, which `make docs` builds from the Markdown files of this repository.

The source folder is the root of the repository, so that links between pages are the relative ones that a code host follows.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from sharded_optim.version import __version__  # noqa: E402  # of this folder

project = "sharded_optim"
project_copyright = "the maintainers of sharded_optim"
release = version = __version__

root_doc = "docs/index"
include_patterns = ["docs/*.md", "examples/README.md", "benchmarks/*.md", "benchmarks/results/*.md", "*.md"]
exclude_patterns = [".*", "build", "runs", "dist", "sharded_optim", "tests", "launch", "**/__pycache__"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]

myst_enable_extensions = ["fieldlist"]
myst_heading_anchors = 4  # links to headings are those of code hosts, and checked
myst_fence_as_directive = ["mermaid"]
suppress_warnings = [
    "myst.header",  # tables that a command writes begin at a lower level
    "misc.highlighting_failure",  # fragments of JSON
    "toc.not_included",  # tables of results are reached by links; tests check that every page of docs/ is in the index
]
nitpicky = False
autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Values"]
default_role = "code"
python_maximum_signature_line_length = 100
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = "$ "
highlight_language = "text"
pygments_dark_style = "github-dark"

html_theme = "furo"
html_title = f"sharded_optim {release}"
html_static_path = ["static", "../../build/mermaid"]
html_extra_path = ["extra"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
templates_path: list[str] = []


class Mermaid(SphinxDirective):
    """A drawing, which the reader's browser makes of its text; nothing is fetched from elsewhere."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        text = "\n".join(self.content).replace("&", "&amp;").replace("<", "&lt;")
        return [nodes.raw("", f'<pre class="mermaid" role="img">{text}</pre>', format="html")]


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Make a toctree of each section of the index, from its list of links."""
    if docname != root_doc:
        return
    first, *sections = re.split(r"^## ", source[0], flags=re.MULTILINE)
    built = [first]
    for section in sections:
        title = section.partition("\n")[0]
        links = re.findall(r"^- \[([^\]]+)\]\(([^)#]+)\.md\)", section, re.MULTILINE)
        pages = [f"{name} </{path.removeprefix('../') if path.startswith('../') else f'docs/{path}'}>" for name, path in links]
        tree = "\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```"]) if pages else ""
        built.append(f"## {section.rstrip()}\n\n{tree}\n\n")
    source[0] = "".join(built)


def to_restructured_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Rewrite what docstrings have as Markdown: lists without empty lines around them, tables, and names that end in an underscore."""
    rewritten: list[str] = []
    in_list = in_table = False
    for line in lines:
        line = re.sub(r"(?<=\w)_(?![\w`(])", r"\_", line)
        entry = re.match(r"( *)(- |`[^`]+`(?:, `[^`]+`)*: )", line)
        if entry and not in_list:
            rewritten += _opened(rewritten)
        if entry:
            in_list, indent = True, len(entry[1])
            line = line if entry[2] == "- " else f"{entry[1]}- {line[indent:]}"
        elif in_list and line.startswith(" " * (indent + 1)):
            line = f"{' ' * (indent + 2)}{line.lstrip()}"
        elif in_list:
            in_list = False
            rewritten += [""] if line else []
        if line.startswith("|"):
            rewritten += [] if in_table else ["::", ""]
            in_table, line = True, f"    {line}"
        else:
            in_table = False
        rewritten.append(line)
    lines[:] = rewritten


def _opened(lines: list[str]) -> list[str]:
    """Empty lines before a list. Entries of what is returned become a list under a heading of their own."""
    if lines and lines[-1].strip() == "Returns:":
        lines[-1] = lines[-1].replace("Returns:", "Values:")
        return []
    return [""] if lines and lines[-1].strip() else []


def add_scripts(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Load the drawing library where there is something to draw."""
    if doctree is not None and any('class="mermaid"' in raw.astext() for raw in doctree.findall(nodes.raw)):
        app.add_js_file("mermaid.min.js", loading_method="defer")
        app.add_js_file("drawings.js", loading_method="defer")


def setup(app: Sphinx) -> None:
    app.add_directive("mermaid", Mermaid)
    app.connect("source-read", add_navigation)
    app.connect("autodoc-process-docstring", to_restructured_text, priority=400)  # before napoleon
    app.connect("html-page-context", add_scripts)
