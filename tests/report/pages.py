"""A page as its reader's program sees it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "hr", "input", "source"}


class Page(HTMLParser):
    """Collects sources, headings and text, and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.content = text
        self.open: list[str] = []
        self.sources: list[str] = []
        self.alternatives: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.sources += [value for key, value in attrs if key in {"src", "href"} and value is not None]
        if tag == "img":
            self.alternatives.append(values["alt"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h3"]:
            self.headings.append(data.strip())
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def assert_complete_in_itself(self) -> None:
        """Nothing is loaded from outside, and every picture says what it shows."""
        assert all(self.alternatives)
        assert all(source.startswith("data:image/") for source in self.sources)
        assert all(address.startswith("data:image/jpeg") for address in re.findall(r"url\(([^)]*)\)", self.content))
        without_pictures = re.sub(r"data:image/[^\"')]*", "", self.content)
        assert not re.search(r"https?://|//cdn|@import|<script[^>]*src|<link", without_pictures)
