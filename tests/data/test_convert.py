"""From an address, an archive or a folder to a dataset: whole and right, or not at all."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import shutil
import stat
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.data import convert
from hpddrnet_trt.data.catalog import RemoteFile, find_entry
from hpddrnet_trt.data.check import check_dataset
from hpddrnet_trt.data.convert import convert_dataset, download, get_dataset, is_archive, unpack, write_converted
from hpddrnet_trt.data.converters import Labelled

RNG = np.random.default_rng(5)
ENTRY = find_entry("axondeepseg-sem")


# Downloads


@dataclasses.dataclass
class Site:
    """A local server: what it sends next, and how often it was asked."""

    folder: Path
    address: str = ""
    status: int = 200
    kind: str = "application/zip"
    lost: int = 0  # bytes at the end that do not arrive
    asked: int = 0

    @property
    def archive(self) -> Path:
        return self.folder / "site/data.zip"

    def file(self, sha256: str | None = None) -> RemoteFile:
        return RemoteFile("data.zip", f"{self.address}/data.zip", sha256)


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            site.asked += 1
            if site.status != 200:
                self.send_error(site.status)
                return
            body = b"<html>log in</html>" if "html" in site.kind else site.archive.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", site.kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) - site.lost])
            self.close_connection = True

    return Handler


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An archive in the authors' layout behind an address of this machine."""
    pytest.importorskip("pooch", reason="downloads need the extra datasets")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    plan = Site(tmp_path)
    plan.archive.parent.mkdir()
    with zipfile.ZipFile(plan.archive, "w") as archive:
        for number in range(6):
            stem = f"sub-rat{number}_sample-data{number}_SEM"
            picture, mask = RNG.integers(0, 256, (16, 24), dtype=np.uint8), RNG.choice([0, 127, 255], (16, 24))
            for name, pixels in ((f"micr/{stem}.png", picture), (f"labels/{stem}_seg-axonmyelin-manual.png", mask)):
                stream = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
                archive.writestr(f"data/{name}", stream.getvalue())
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(plan))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    plan.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield plan
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_get_downloads_converts_and_records(site: Site, tmp_path: Path) -> None:
    entry = dataclasses.replace(ENTRY, file=site.file(sha256_of(site.archive)))
    dataset = get_dataset(entry, tmp_path / "data/axons")
    assert check_dataset(dataset.root, progress=False).ok
    assert sum(len(dataset.split(split)) for split in dataset.splits) == 6
    written = json.loads((dataset.root / "dataset.json").read_text(encoding="utf-8"))
    assert written["downloads"] == [{"url": site.file().url, "sha256": sha256_of(site.archive)}]
    assert (written["citation"], written["license"]) == (ENTRY.citation, "MIT")
    assert written["files"][0]["source"].startswith("sub-rat0_sample-data0_SEM.png, ")
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"axons", "downloads"}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(dataset.root.stat().st_mode) == 0o777 & ~umask
    # Again, from what is there already: the same pixels in the same splits, and nothing asked.
    second = get_dataset(entry, tmp_path / "again", downloads=tmp_path / "data/downloads")
    assert second.checksum() == dataset.checksum()
    assert site.asked == 1


@pytest.mark.parametrize(
    ("change", "known", "message"),
    [
        ({}, "0" * 64, "not the published file"),
        ({"status": 404}, None, "answers 404.*datasets convert"),
        ({"status": 503}, None, "answers 503.*try again later"),
        ({"kind": "text/html"}, None, "a web page"),
        ({"lost": 100}, None, "check the connection"),
    ],
)
def test_what_is_not_the_file_leaves_nothing(
    site: Site, tmp_path: Path, change: dict[str, object], known: str | None, message: str
) -> None:
    for name, value in change.items():
        setattr(site, name, value)
    with pytest.raises(UserError, match=message) as caught:
        download(site.file(known), tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_different_file_is_never_overwritten(site: Site, tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"mine")
    with pytest.raises(BadInputFile, match="not overwritten"):
        download(site.file(), tmp_path)
    shutil.copy(site.archive, tmp_path / "data.zip")
    with pytest.raises(BadInputFile, match="not overwritten"):
        download(site.file("0" * 64), tmp_path)
    assert site.asked == 0


def test_what_cannot_be_downloaded_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"git lfs install.*datasets convert mudrocknet"):
        get_dataset(find_entry("mudrocknet"), tmp_path / "out")


def test_nothing_is_overwritten(site: Site, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    entry = dataclasses.replace(ENTRY, file=site.file())
    for name in ("full", "file"):
        with pytest.raises(UsageError, match="nothing is overwritten"):
            get_dataset(entry, tmp_path / name)
        with pytest.raises(UsageError, match="nothing is overwritten"):
            convert_dataset(ENTRY, site.archive, tmp_path / name)
    assert site.asked == 0
    (tmp_path / "empty").mkdir()
    convert_dataset(ENTRY, site.archive, tmp_path / "empty")
    assert (tmp_path / "empty/dataset.json").is_file()


def test_a_source_that_is_neither_folder_nor_archive(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for source in ("notes.txt", "missing"):
        with pytest.raises(BadInputFile, match="neither a folder nor"):
            convert_dataset(ENTRY, tmp_path / source, tmp_path / "out")


# The writer


def sample(name: str = "a", split: str = "train", **changes: object) -> Labelled:
    image = RNG.integers(0, 256, (8, 9), dtype=np.uint8)
    mask = RNG.integers(0, 3, (8, 9)).astype(np.uint8)
    return dataclasses.replace(Labelled(image, mask, split, name, "g", f"{name}.tif"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "no labelled image"),
        ([sample("a"), sample("a")], "two images are called a"),
        ([sample("a"), sample("b", mask=np.zeros((8, 8), np.uint8))], "9 x 8 pixels, its mask 8 x 8"),
        ([sample("a"), sample("b", mask=np.full((8, 9), 3, np.uint8))], r"b\.tif: the mask holds 3"),
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


# Archives


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, *members: tarfile.TarInfo, content: bytes = b"hello") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            if member.isreg():
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                archive.addfile(member)
    return path


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def test_zip_and_tar_unpack(tmp_path: Path) -> None:
    first = make_zip(tmp_path / "a.zip", {"deep/er/a.txt": b"hello", "empty/": b""})
    second = make_tar(tmp_path / "b.tgz", tar_member("deep", tarfile.DIRTYPE), tar_member("deep/b.txt"))
    for path in (first, second):
        assert is_archive(path)
        unpack(path, tmp_path / "out")
    assert (tmp_path / "out/deep/er/a.txt").read_bytes() == (tmp_path / "out/deep/b.txt").read_bytes() == b"hello"
    (tmp_path / "text").write_text("no archive")
    assert not is_archive(tmp_path / "text")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..\\evil", "C:evil"])
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    for path in (
        make_zip(tmp_path / "a.zip", {"good": b"", name: b"evil"}),
        make_tar(tmp_path / "b.tar", tar_member("good"), tar_member(name)),
    ):
        with pytest.raises(BadInputFile, match="outside"):
            unpack(path, tmp_path / "out")
    assert list(tmp_path.rglob("*evil*")) == []
    assert list((tmp_path / "out").iterdir()) == []  # not even the good one


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = make_tar(tmp_path / "b.tar", tar_member("way", kind, "/etc"), tar_member("way/evil"))
    info = zipfile.ZipInfo("way")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc")
    for one in (path, tmp_path / "a.zip"):
        with pytest.raises(BadInputFile, match="link or device"):
            unpack(one, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_too_much_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_zip(tmp_path / "a.zip", {"a": bytes(600_000), "b": bytes(600_000)})
    assert path.stat().st_size < 5_000
    with pytest.raises(BadInputFile, match="more bytes than the limit of 1000000"):
        unpack(path, tmp_path / "out", max_bytes=1_000_000)
    with pytest.raises(BadInputFile, match="more files than the limit of 1"):
        unpack(path, tmp_path / "out", max_members=1)
    usage = convert.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BadInputFile, match="free some space"):
        unpack(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_huge_tar_is_refused_at_its_first_header(tmp_path: Path) -> None:
    """The declared terabyte need not be there, nor be looked for."""
    member = tar_member("huge")
    member.size = 1 << 40
    path = tmp_path / "b.tgz"
    path.write_bytes(gzip.compress(member.tobuf() + bytes(100_000)))
    with pytest.raises(BadInputFile, match="more bytes than the limit"):
        unpack(path, tmp_path / "out")
    path.write_bytes(gzip.compress(tar_member("x").tobuf() + bytes(70 << 20), 1))
    with pytest.raises(BadInputFile, match="goes on after its end"):
        unpack(path, tmp_path / "out")


def test_a_size_that_is_declared_too_small_is_noticed(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"a": bytes(600_000)})
    raw = path.read_bytes()
    path.write_bytes(raw.replace((600_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(BadInputFile, match="damaged"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("second", ["x", "x/y", "x/y/z"])
def test_a_name_that_occurs_twice_is_refused(tmp_path: Path, second: str) -> None:
    path = make_tar(tmp_path / "b.tar", tar_member("x"), tar_member(second))
    with pytest.raises(BadInputFile, match="twice"):
        unpack(path, tmp_path / "out")


@given(st.sampled_from(["zip", "gz", "xz", "bz2"]), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_wrong_byte_is_said_or_does_not_matter(kind: str, place: float, change: int) -> None:
    """One wrong byte, or an end, anywhere: a sentence, or files that are still right; never another error."""
    content = bytes(range(256)) * 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / f"a.{kind}"
        if kind == "zip":
            make_zip(path, {"a.bin": content})
        else:
            with tarfile.open(path, f"w:{kind}") as archive:  # type: ignore[call-overload]
                member = tar_member("a.bin")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        raw = bytearray(path.read_bytes())
        raw[int(place * len(raw))] ^= change
        path.write_bytes(raw if change < 128 else raw[: int(place * len(raw))])
        try:
            unpack(path, folder / "out")
        except BadInputFile as exc:
            assert str(path) in str(exc)  # noqa: PT017
        else:
            assert all(found.read_bytes() == content for found in (folder / "out").rglob("*") if found.is_file())
