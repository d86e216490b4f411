"""The documentation site: `make docs` builds it, from Markdown that reads as well in the repository.

The source folder is the repository itself, so that a link between two pages is the same link here and there. Pages are
listed in docs/index.md; what INCLUDED does not name is no page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from hpddrnet_trt import __version__

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
INCLUDED = [
    "docs/**.md",
    "train/README.md",
    "export/README.md",
    "benchmarks/README.md",
    "benchmarks/results/NOTES.md",
    "hpddrnet_trt/data/README.md",
    "hpddrnet_trt/weights/*.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "README.md",
]

project = "HPDDRNet-TRT"
author = "the authors of HPDDRNet-TRT"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = INCLUDED
exclude_patterns = [".venv", "runs", "build", "site"]

myst_heading_anchors = 4  # links to headings are the same as in the repository's own view
myst_links_external_new_tab = False
suppress_warnings = ["myst.header"]  # included pages begin where they like

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"HPDDRNet-TRT {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_static/index.html"]  # the site's root leads to docs/index.html
html_copy_source = False
html_show_sourcelink = html_show_copyright = False


def _command_list() -> str:
    """The help of every command, as it is printed, in Markdown."""
    import typer

    from hpddrnet_trt.cli import app

    def pages(command: Any, context: Any) -> Iterator[str]:
        yield f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
        for name, inner in getattr(command, "commands", {}).items():
            if not inner.hidden:
                yield from pages(inner, type(context)(inner, parent=context, info_name=name, max_content_width=100))

    program = typer.main.get_command(app)
    return "\n".join(pages(program, typer.Context(program, info_name="hpddrnet-trt", max_content_width=100)))


def _append_commands(_app: Sphinx, page: str, source: list[str]) -> None:
    if page == "docs/commands":
        source[0] += _command_list()


def setup(app: Sphinx) -> None:
    app.connect("source-read", _append_commands)
