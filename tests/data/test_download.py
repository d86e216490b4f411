"""Downloads and archives against a local server and hostile files: whole and right, or not at all."""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import re
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.data.catalog import archives
from hpddrnet_trt.data.catalog.archives import is_archive, unpack
from hpddrnet_trt.data.catalog.download import ATTEMPTS, USER_AGENT, download
from hpddrnet_trt.data.catalog.entry import RemoteFile

CONTENT = np.random.default_rng(0).bytes(700_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Site:
    """What the server does next, and what it was asked."""

    address: str = ""
    content: bytes = CONTENT
    mark: str | None = '"v1"'
    ranges: bool = True
    length: bool = True
    drops: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    errors: list[int] = field(default_factory=list)  # status codes of the next answers
    kind: str = "application/zip"
    lie: str | None = None  # a Content-Range of its own
    asked: list[dict[str, str]] = field(default_factory=list)

    def file(self, **known: str | int | None) -> RemoteFile:
        return RemoteFile("data.zip", f"{self.address}/data.zip", **known)  # type: ignore[arg-type]


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            site.asked.append(dict(self.headers))
            if site.errors:
                self.send_error(site.errors.pop(0))
                return
            start = self.first_byte()
            if start > 0 and start >= len(site.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(site.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = site.content[start:]
            self.send_response(206 if start else 200)
            if start:
                full = f"bytes {start}-{len(site.content) - 1}/{len(site.content)}"
                self.send_header("Content-Range", site.lie or full)
            self.send_header("Content-Type", site.kind)
            if site.mark:
                self.send_header("ETag", site.mark)
            if site.length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if site.drops:
                body = body[: site.drops.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

        def first_byte(self) -> int:
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = self.headers.get("If-Range") in {None, site.mark}
            return int(wanted[1]) if wanted and site.ranges and same else 0

    return Handler


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    plan = Site()
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


def get(file: RemoteFile, folder: Path) -> Path:
    return download(file, folder, timeout=5, pause=0)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_arrives_whole_and_alone(site: Site, tmp_path: Path) -> None:
    path = get(site.file(sha256=SHA256, md5=hashlib.md5(CONTENT).hexdigest(), size=len(CONTENT)), tmp_path / "new")
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == {"data.zip"}
    assert site.asked[0]["User-Agent"] == USER_AGENT
    assert get(site.file(sha256=SHA256), path.parent) == path
    assert len(site.asked) == 1  # it was there: nothing asked


def test_a_drop_is_continued_where_it_happened(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site.drops = [300_000, 100_000]
    with caplog.at_level(logging.WARNING):
        assert get(site.file(), tmp_path).read_bytes() == CONTENT
    assert [request.get("Range") for request in site.asked] == [None, "bytes=300000-", "bytes=400000-"]
    assert "300000 of 700000" in caplog.text


def test_a_later_call_continues(site: Site, tmp_path: Path) -> None:
    site.drops = [300_000] + [0] * ATTEMPTS
    with pytest.raises(UserError, match="continues where it stopped"):
        get(site.file(), tmp_path)
    assert (tmp_path / "data.zip.part").stat().st_size == 300_000
    assert get(site.file(), tmp_path).read_bytes() == CONTENT
    assert site.asked[-1]["Range"] == "bytes=300000-"
    assert names(tmp_path) == {"data.zip"}


def test_a_file_that_changed_meanwhile_is_fetched_anew(site: Site, tmp_path: Path) -> None:
    site.drops = [300_000] + [0] * ATTEMPTS
    with pytest.raises(UserError):
        get(site.file(), tmp_path)
    site.content, site.mark = CONTENT[::-1][:500_000], '"v2"'
    assert get(site.file(), tmp_path).read_bytes() == site.content


def test_without_mark_or_checksum_nothing_is_continued(site: Site, tmp_path: Path) -> None:
    site.mark = None
    site.drops = [300_000]
    assert get(site.file(), tmp_path).read_bytes() == CONTENT
    assert [request.get("Range") for request in site.asked] == [None, None]
    site.drops = [300_000]
    get(site.file(sha256=SHA256), tmp_path / "known")
    assert site.asked[-1]["Range"] == "bytes=300000-"  # the checksum would tell


def test_a_server_without_ranges_sends_all_again(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    site.drops = [300_000]
    assert get(site.file(), tmp_path).read_bytes() == CONTENT


def test_a_complete_part_needs_no_further_byte(site: Site, tmp_path: Path) -> None:
    (tmp_path / "data.zip.part").write_bytes(CONTENT)
    assert get(site.file(sha256=SHA256), tmp_path).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_dropped(site: Site, tmp_path: Path) -> None:
    (tmp_path / "data.zip.part").write_bytes(CONTENT + b"more")
    assert get(site.file(sha256=SHA256), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("lie", ["bytes 5-6/7", "nonsense"])
def test_a_server_that_sends_another_part_is_not_believed(site: Site, tmp_path: Path, lie: str) -> None:
    site.drops, site.lie = [300_000], lie
    assert get(site.file(), tmp_path).read_bytes() == CONTENT
    assert [request.get("Range") for request in site.asked] == [None, "bytes=300000-", None]


def test_a_server_that_says_no_length_is_read_to_its_end(site: Site, tmp_path: Path) -> None:
    site.length = False
    assert get(site.file(size=len(CONTENT)), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("known", [{"sha256": "0" * 64}, {"md5": "0" * 32}, {"size": 5}])
def test_other_content_than_published_is_refused(site: Site, tmp_path: Path, known: dict[str, str | int]) -> None:
    with pytest.raises(BadInputFile, match="not the published file"):
        get(site.file(**known), tmp_path)
    assert names(tmp_path) == set()


def test_a_different_file_is_never_overwritten(site: Site, tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"mine")
    with pytest.raises(BadInputFile, match="not overwritten"):
        get(site.file(sha256=SHA256), tmp_path)
    assert (tmp_path / "data.zip").read_bytes() == b"mine"
    assert site.asked == []


def test_missing_and_forbidden_are_said_at_once(site: Site, tmp_path: Path) -> None:
    for code in (404, 403):
        site.errors = [code]
        with pytest.raises(UserError, match=f"answers {code}.*datasets convert"):
            get(site.file(), tmp_path)
    assert len(site.asked) == 2


def test_a_passing_fault_is_waited_for(site: Site, tmp_path: Path) -> None:
    site.errors = [503, 429]
    assert get(site.file(), tmp_path).read_bytes() == CONTENT
    site.errors = [500] * ATTEMPTS
    with pytest.raises(UserError, match="500"):
        get(site.file(), tmp_path / "other")
    assert site.errors == []


def test_a_web_page_is_not_taken_for_the_file(site: Site, tmp_path: Path) -> None:
    site.kind = "text/html; charset=utf-8"
    with pytest.raises(UserError, match="web page"):
        get(site.file(), tmp_path)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="check the connection"):
        get(RemoteFile("x", "http://127.0.0.1:9/x"), tmp_path)
    with pytest.raises(UsageError, match="only http"):
        get(RemoteFile("x", "file:///etc/hostname"), tmp_path)


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
def test_links_and_devices_in_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = make_tar(tmp_path / "b.tar", tar_member("way", kind, "/etc"), tar_member("way/evil"))
    with pytest.raises(BadInputFile, match="link or device"):
        unpack(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_links_in_zip_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("way")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc")
    with pytest.raises(BadInputFile, match="link or device"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_too_much_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_zip(tmp_path / "a.zip", {"a": bytes(600_000), "b": bytes(600_000)})
    assert path.stat().st_size < 5_000
    with pytest.raises(BadInputFile, match="more bytes than the limit of 1000000"):
        unpack(path, tmp_path / "out", max_bytes=1_000_000)
    with pytest.raises(BadInputFile, match="more files than the limit of 1"):
        unpack(path, tmp_path / "out", max_members=1)
    usage = archives.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: usage)
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


def test_damaged_archives_are_said(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"a": np.random.default_rng(1).bytes(5_000)})
    raw = bytearray(path.read_bytes())
    raw[2_000] ^= 255
    path.write_bytes(raw)
    with pytest.raises(BadInputFile, match="damaged"):
        unpack(path, tmp_path / "out")
    tar = make_tar(tmp_path / "b.tar", tar_member("x"), content=np.random.default_rng(2).bytes(50_000))
    tar.write_bytes(tar.read_bytes()[:20_000])
    with pytest.raises(BadInputFile, match="damaged"):
        unpack(tar, tmp_path / "out")


@pytest.mark.parametrize("second", ["x", "x/y", "x/y/z"])
def test_a_name_that_occurs_twice_is_refused(tmp_path: Path, second: str) -> None:
    path = make_tar(tmp_path / "b.tar", tar_member("x"), tar_member(second))
    with pytest.raises(BadInputFile, match="twice"):
        unpack(path, tmp_path / "out")


@given(st.sampled_from(["zip", "gz", "xz", "bz2"]), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_wrong_byte_is_said_or_does_not_matter(kind: str, place: float, change: int) -> None:
    """One wrong byte anywhere: a sentence, or files that are still right; never another error."""
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
        path.write_bytes(raw)
        try:
            unpack(path, folder / "out")
        except BadInputFile as exc:
            assert str(path) in str(exc)  # noqa: PT017
        else:
            assert all(found.read_bytes() == content for found in (folder / "out").rglob("*") if found.is_file())
