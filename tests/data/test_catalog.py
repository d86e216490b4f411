"""The catalog's records, what people read of them, and the way from an entry to a dataset."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.data.catalog.converters import CONVERTERS
from hpddrnet_trt.data.catalog.describe import details, overview
from hpddrnet_trt.data.catalog.entries import ENTRIES, find_entry
from hpddrnet_trt.data.catalog.entry import Entry, RemoteFile
from hpddrnet_trt.data.catalog.get import convert_dataset, get_dataset
from hpddrnet_trt.data.catalog.labelled import Labelled
from hpddrnet_trt.data.catalog.writer import new_folder, write_converted
from hpddrnet_trt.data.check import check_dataset
from hpddrnet_trt.data.datasets import DatasetDescription

RNG = np.random.default_rng(5)
ENTRY = ENTRIES["metaldam"]


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))
def test_an_entry_is_complete(entry: Entry) -> None:
    assert re.fullmatch(r"[a-z0-9-]+", entry.name)
    table = DatasetDescription(classes=list(entry.classes)).class_table()
    assert table is not None
    assert len({known.color for known in table}) == len(table)
    assert entry.files or entry.how_to_get
    assert entry.name in CONVERTERS or not entry.files  # what is downloaded can be converted
    assert entry.homepage.startswith("https://")
    assert entry.doi is None or re.fullmatch(r"10\.\d{4,}/\S+", entry.doi)
    assert len({file.name for file in entry.files}) == len(entry.files)
    for file in entry.files:
        assert file.url.startswith("https://")
        assert Path(file.name).name == file.name
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.md5 is None or re.fullmatch("[0-9a-f]{32}", file.md5)


def test_files_of_one_name_are_one_file() -> None:
    """They share a folder of downloads."""
    addresses: dict[str, str] = {}
    for entry in ENTRIES.values():
        for file in entry.files:
            assert addresses.setdefault(file.name, file.url) == file.url


def test_every_converter_has_an_entry() -> None:
    assert CONVERTERS.keys() <= ENTRIES.keys()


def test_text_for_people() -> None:
    text = overview(ENTRIES.values())
    for entry in ENTRIES.values():
        assert f"{entry.name}  {entry.title}" in text
    assert "NOT CLEAR" in text
    page = " ".join(details(ENTRY).split())
    for part in (ENTRY.title, ENTRY.citation, ENTRY.licence_note, ENTRY.files[0].url, ENTRY.verified,
                 "size not published, no published checksum", "2 martensite austenite"):  # fmt: skip
        assert part in page
    known = RemoteFile("a", "https://a", sha256="ab", size=1_234_567_890)
    page = details(dataclasses.replace(ENTRY, files=(known,)))
    assert "1 GB, sha256 ab" in " ".join(page.split())
    assert "1 GB" in overview([dataclasses.replace(ENTRY, files=(known,))])
    assert max(len(line) for line in details(find_entry("uhcs")).splitlines()) < 170


def test_an_unknown_name_lists_the_others() -> None:
    with pytest.raises(UsageError, match=r"'metal'.*mudrocknet, nasa-super1"):
        find_entry("metal")


# From an entry to a dataset


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metaldam_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Entry]:
    """The entry with its file on a local server: a small archive in the authors' layout."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "site").mkdir()
    with zipfile.ZipFile(tmp_path / "site/MetalDAM_labeled.zip", "w") as archive:
        for number in range(6):
            mask = RNG.integers(0, 5, (16, 24)).astype(np.uint8)
            for kind, pixels in (("images", RNG.integers(0, 256, (20, 24), dtype=np.uint8)), ("labels", mask)):
                suffix = "jpg" if kind == "images" else "png"
                Image.fromarray(pixels).save(tmp_path / f"one.{suffix}")
                archive.write(tmp_path / f"one.{suffix}", f"MetalDAM/{kind}/m{number}.{suffix}")
                (tmp_path / f"one.{suffix}").unlink()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "site")))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/MetalDAM_labeled.zip"
    try:
        yield dataclasses.replace(ENTRY, files=(RemoteFile("MetalDAM_labeled.zip", url),))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_get_downloads_converts_and_records(metaldam_site: Entry, tmp_path: Path) -> None:
    dataset = get_dataset(metaldam_site, tmp_path / "data/metaldam", accept_unclear_licence=True)
    assert check_dataset(dataset.root, progress=False).ok
    assert sum(len(dataset.split(split)) for split in dataset.splits) == 6
    written = json.loads((dataset.root / "dataset.json").read_text(encoding="utf-8"))
    archive = tmp_path / "data/downloads/MetalDAM_labeled.zip"
    assert written["downloads"] == [{"url": metaldam_site.files[0].url, "sha256": sha256_of(archive)}]
    assert written["citation"] == ENTRY.citation
    assert written["files"][0]["source"] == "m0.jpg, m0.png"
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"metaldam", "downloads"}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(dataset.root.stat().st_mode) == 0o777 & ~umask
    # Again, from what is there already: the same pixels in the same splits.
    (tmp_path / "site/MetalDAM_labeled.zip").unlink()
    second = get_dataset(
        metaldam_site, tmp_path / "again", downloads=tmp_path / "data/downloads", accept_unclear_licence=True
    )
    assert second.checksum() == dataset.checksum()


def test_an_unclear_licence_must_be_accepted(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--accept-unclear-license"):
        get_dataset(ENTRY, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_downloaded_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"git lfs install.*datasets convert mudrocknet"):
        get_dataset(find_entry("mudrocknet"), tmp_path / "out")
    with pytest.raises(UsageError, match=r"by itself: the homepage asks for an account"):
        get_dataset(find_entry("emps"), tmp_path / "out")
    with pytest.raises(UsageError, match="listed only"):
        convert_dataset(find_entry("ic-layout"), tmp_path, tmp_path / "out")


def test_nothing_is_overwritten(metaldam_site: Entry, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(UsageError, match="nothing is overwritten"):
            get_dataset(metaldam_site, tmp_path / name, accept_unclear_licence=True)
        with pytest.raises(UsageError, match="nothing is overwritten"):
            convert_dataset(ENTRY, tmp_path / "site", tmp_path / name)
    assert not (tmp_path / "downloads").exists()
    (tmp_path / "empty").mkdir()
    convert_dataset(ENTRY, tmp_path / "site/MetalDAM_labeled.zip", tmp_path / "empty")
    assert (tmp_path / "empty/dataset.json").is_file()


def test_a_source_that_is_neither_folder_nor_archive(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for source in ("notes.txt", "missing"):
        with pytest.raises(BadInputFile, match="neither a folder nor"):
            convert_dataset(ENTRY, tmp_path / source, tmp_path / "out")


# The writer


def sample(name: str = "a", split: str = "train", **changes: object) -> Labelled:
    image = RNG.integers(0, 256, (8, 9), dtype=np.uint8)
    mask = RNG.integers(0, 5, (8, 9)).astype(np.uint8)
    return dataclasses.replace(Labelled(image, mask, split, name, "g", f"{name}.tif"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "no labelled image"),
        ([sample("a"), sample("a")], "two images are called a"),
        ([sample("a"), sample("b", mask=np.zeros((8, 8), np.uint8))], "9 x 8 pixels, its mask 8 x 8"),
        ([sample("a"), sample("b", mask=np.full((8, 9), 5, np.uint8))], r"b\.tif: the mask holds 5"),
    ],
)
def test_what_does_not_fit_leaves_nothing_behind(samples: list[Labelled], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match=message):
        write_converted(ENTRY, samples, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_same_name_in_two_splits_is_two_files(tmp_path: Path) -> None:
    deep = RNG.integers(0, 60_000, (8, 9), dtype=np.uint16)
    write_converted(ENTRY, [sample("a"), sample("a", "val", image=deep)], tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/images/val/a.png")), deep)
    assert (tmp_path / "out/images/train/a.png").is_file()


def test_an_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Labelled]:
        yield sample()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_converted(ENTRY, interrupted(), tmp_path / "deep/out")
    with pytest.raises(ValueError, match="mine"), new_folder(tmp_path / "deep/out"):
        raise ValueError("mine")
    assert list((tmp_path / "deep").iterdir()) == []
