"""The documentation site builds without a warning, and no link of it leads nowhere."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer

import hpddrnet_trt
from hpddrnet_trt.cli import app

REPOSITORY = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    """Addresses that a page refers to, and the places in it that others may refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.targets.append(value)
            if name in ("id", "name") and value:
                self.places.add(value)


def dead_links(site: Path) -> list[str]:
    """Links of a site's pages, within the site, to files or places that do not exist."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")
             if not {"_downloads", "_static"} & set(file.relative_to(site).parts)}  # fmt: skip
    dead = []
    for file, page in pages.items():
        for target in page.targets:
            link = urlsplit(target)
            if link.scheme or link.netloc:
                continue
            there = (file.parent / unquote(link.path)).resolve() if link.path else file
            anchored = there in pages and link.fragment
            if not there.exists() or (anchored and unquote(link.fragment) not in pages[there].places):
                dead.append(f"{file.relative_to(site)}: {target}")
    return dead


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in ("sphinx", "furo", "myst_parser") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    command += ["-b", "html", "-c", "docs", "-d", str(folder / "doctrees"), ".", str(folder / "html")]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
    return folder / "html"


def test_every_page_is_built(site: Path) -> None:
    for page in (REPOSITORY / "docs").rglob("*.md"):
        assert (site / page.relative_to(REPOSITORY)).with_suffix(".html").is_file(), page


def test_no_dead_links(site: Path) -> None:
    assert dead_links(site) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#here">1</a><a href="b.html#gone">2</a><img src="c.png">')
    (tmp_path / "b.html").write_text('<h1 id="here">b</h1><a href="https://example.org/x">3</a><a href="#gone">4</a>')
    assert sorted(dead_links(tmp_path)) == ["a.html: b.html#gone", "a.html: c.png", "b.html: #gone"]


# -- what the pages say about the code ---------------------------------------------------------------

TROUBLESHOOTING = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^- `(.+)`$", TROUBLESHOOTING, flags=re.MULTILINE)


@functools.cache
def texts_of_the_code() -> str:
    """Every text of the package but its docstrings, a line each, with three dots where a value is put in."""

    def text_of(node: ast.AST) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(text_of(part) or "..." for part in node.values)
        return None

    said = []
    for file in (REPOSITORY / "hpddrnet_trt").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        said += [text for node in nodes if id(node) not in alone and (text := text_of(node))]
    return "\n".join(" ".join(text.split()) for text in said)


@pytest.mark.parametrize("sentence", QUOTED)
def test_quoted_messages_are_those_of_the_code(sentence: str) -> None:
    pattern = ".*".join(re.escape(part.strip()) for part in sentence.split("..."))
    assert re.search(pattern, texts_of_the_code()), f"no message of the package says: {sentence}"


def test_messages_are_quoted() -> None:
    assert len(QUOTED) > 30


def test_public_names_are_in_the_reference() -> None:
    reference = (REPOSITORY / "docs/api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"auto(?:function|class):: (\w+)", reference))
    public = set(hpddrnet_trt.__all__) - {"__version__"}
    assert public <= named
    assert named - public <= {"Engine", "Prediction", "load_engine"}


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")),
         *(REPOSITORY / f"{stage}/README.md" for stage in ("train", "export", "benchmarks"))]  # fmt: skip


def commands_in(text: str) -> list[list[str]]:
    """The words of every call of the program in a page, in code on a line of its own or within one."""
    calls = re.findall(r"(?:^ *|`)hpddrnet-trt ([a-z][^`\n]*)", text.replace("\\\n", " "), flags=re.MULTILINE)
    return [shlex.split(call, comments=True) for call in calls]


def unknown_in(call: list[str]) -> set[str]:
    """Options that the called command does not have, or the command itself where there is none of that name."""
    program: Any = typer.main.get_command(app)
    command, words = program, call
    context = program.make_context("hpddrnet-trt", [], resilient_parsing=True)
    while hasattr(command, "commands") and words:
        name, command, words = command.resolve_command(context, words)  # None where there is none
        if command is None:
            return {str(name or call[0])}
    everywhere = {name for parameter in program.params for name in parameter.opts} | {"--help"}
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return {word for word in words if word.startswith("-")} - known - everywhere


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_of_the_pages_exist(page: Path) -> None:
    calls = commands_in(page.read_text(encoding="utf-8"))
    assert {" ".join(call): unknown for call in calls if (unknown := unknown_in(call))} == {}


def test_wrong_commands_are_found() -> None:
    text = "a `hpddrnet-trt segment x --y`\n```\nhpddrnet-trt builds m 1   # word\n  hpddrnet-trt -v\n```\n"
    assert [unknown_in(call) for call in commands_in(text)] == [{"--y"}, {"builds"}]
