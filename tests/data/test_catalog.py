"""The catalog's records, and what people read of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.data.catalog import ENTRIES, Entry, details, find_entry, overview
from hpddrnet_trt.data.converters import CONVERTERS
from hpddrnet_trt.data.description import DatasetDescription


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))
def test_an_entry_is_complete(entry: Entry) -> None:
    assert re.fullmatch(r"[a-z0-9-]+", entry.name)
    table = DatasetDescription(classes=list(entry.classes)).class_table()
    assert table is not None
    assert len({known.color for known in table}) == len(table)
    assert entry.file is not None or entry.how_to_get
    assert entry.homepage.startswith("https://")
    assert re.fullmatch(r"10\.\d{4,}/\S+", entry.doi)
    if entry.file is not None:
        assert entry.file.url.startswith("https://")
        assert Path(entry.file.name).name == entry.file.name
        assert entry.file.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.file.sha256)


def test_files_of_one_name_are_one_file() -> None:
    """They share a folder of downloads."""
    addresses: dict[str, str] = {}
    for file in (entry.file for entry in ENTRIES.values() if entry.file is not None):
        assert addresses.setdefault(file.name, file.url) == file.url


def test_every_entry_has_a_converter() -> None:
    assert CONVERTERS.keys() == ENTRIES.keys()


def test_text_for_people() -> None:
    text = overview()
    for entry in ENTRIES.values():
        assert f"{entry.name}  {entry.title}" in text
        page = " ".join(details(entry).split())
        for part in (entry.title, entry.citation, entry.license_note, entry.verified, entry.how_to_get):
            assert part in page
        assert entry.file is None or f"{entry.file.url} (no published checksum)" in page
        assert max(len(line) for line in details(entry).splitlines()) < 170


def test_an_unknown_name_lists_the_others() -> None:
    with pytest.raises(UsageError, match=r"'metal'.*mudrocknet, nasa-super1"):
        find_entry("metal")
