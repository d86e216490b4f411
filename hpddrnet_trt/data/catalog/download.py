"""Download one file over HTTP(S): resumed, verified, whole or not at all."""

from __future__ import annotations

import http.client
import logging
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from hpddrnet_trt import __version__
from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.files import digest_of
from hpddrnet_trt.data.catalog.entry import RemoteFile

log = logging.getLogger(__name__)

USER_AGENT = f"hpddrnet-trt/{__version__} (dataset download)"
ATTEMPTS = 5  # in a row without a single new byte
_BLOCK = 1 << 18
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_RANGE_NOT_SATISFIABLE = 416


class _Dropped(Exception):
    """The connection ended early or never came about: worth another attempt."""


@dataclass(frozen=True)
class _Part:
    """The incomplete file and, beside it, the server's mark of the version it belongs to."""

    path: Path

    @property
    def mark_path(self) -> Path:
        return self.path.with_name(self.path.name + ".mark")

    @property
    def mark(self) -> str | None:
        return self.mark_path.read_text(encoding="utf-8") if self.mark_path.is_file() else None

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def restart(self, mark: str | None) -> None:
        self.path.write_bytes(b"")
        if mark is None:
            self.mark_path.unlink(missing_ok=True)
        else:
            self.mark_path.write_text(mark, encoding="utf-8")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.mark_path.unlink(missing_ok=True)


def download(file: RemoteFile, folder: Path, *, timeout: float = 30, pause: float = 2) -> Path:
    """Download ``file`` into ``folder`` and return its path; a complete one is not fetched again.

    Bytes go to ``NAME.part``, which an interrupted download leaves behind and a later one
    continues (HTTP Range). Size and checksum are compared where they were published.
    ``timeout`` and ``pause`` (before another attempt) are in seconds.

    Raises :class:`BadInputFile` when a different file of that name is there already, or when the
    content is not what was published; :class:`UserError` when the server cannot be reached or
    refuses.
    """
    if not file.url.startswith(("https://", "http://")):
        raise UsageError(f"{file.url} is not a web address; only http and https are downloaded")
    target = folder / file.name
    if target.exists():
        problem = _difference(file, target)
        if problem:
            raise BadInputFile(f"{target} is there already but {problem}; move it away, it is not overwritten")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = _Part(target.with_name(target.name + ".part"))
    _fetch_with_retries(file, part, timeout, pause)
    problem = _difference(file, part.path)
    if problem:
        part.discard()
        raise BadInputFile(
            f"what {file.url} sent is not the published file: it {problem}; try again, and if it stays so, "
            "the publisher has changed it"
        )
    part.path.rename(target)
    part.discard()
    return target


def _difference(file: RemoteFile, path: Path) -> str:
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"has {size} bytes instead of {file.size}"
    for name, expected in (("sha256", file.sha256), ("md5", file.md5)):
        if expected is not None:
            digest = digest_of(path, name)
            if digest != expected.lower():
                return f"has the {name} {digest} instead of {expected}"
    return ""


def _fetch_with_retries(file: RemoteFile, part: _Part, timeout: float, pause: float) -> None:
    failures = 0
    while True:
        before = part.size
        try:
            return _fetch(file, part, timeout)
        except _Dropped as exc:
            failures = 1 if part.size > before else failures + 1
            if failures >= ATTEMPTS:
                raise UserError(
                    f"{file.url} cannot be downloaded ({exc}); check the connection and call the command again: "
                    "it continues where it stopped"
                ) from exc
            log.warning("%s: %s; trying again", file.url, exc)
            time.sleep(pause)


def _fetch(file: RemoteFile, part: _Part, timeout: float) -> None:
    """One attempt: ask for the rest and append it, or start over when the server sends the whole."""
    # Without a mark or a checksum nobody could tell a continued file from a mixture of two versions.
    offset = part.size if part.mark or file.has_checksum else 0
    request = urllib.request.Request(file.url, headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        if part.mark:
            request.add_header("If-Range", part.mark)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            _refuse_web_page(file, response)
            start, total = _extent(response)
            if start not in {0, offset}:
                part.discard()
                raise _Dropped(f"the server did not send the file from byte {offset}, as asked")
            if start == 0:
                part.restart(_version_mark(response))
            _append(response, part, total, file.name)
    except urllib.error.HTTPError as exc:
        exc.close()
        if exc.code == _RANGE_NOT_SATISFIABLE and offset:
            if exc.headers.get("Content-Range", "").endswith(f"/{offset}"):
                return  # complete: only the last step was missing
            part.discard()
            raise _Dropped("the file has become shorter since the download began") from exc
        if exc.code in _PASSING:
            raise _Dropped(f"the server answers {exc.code} {exc.reason}") from exc
        raise UserError(
            f"{file.url} cannot be downloaded: the server answers {exc.code} {exc.reason}; look for its present "
            "address on the dataset's page, download it by hand and use 'datasets convert'"
        ) from exc
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as exc:
        raise _Dropped(str(getattr(exc, "reason", None) or exc) or type(exc).__name__) from exc


def _refuse_web_page(file: RemoteFile, response: http.client.HTTPResponse) -> None:
    if response.headers.get_content_type() == "text/html":
        raise UserError(
            f"{file.url} shows a web page instead of the file (a login, or it has moved); download it by hand "
            "and use 'datasets convert'"
        )


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """First byte that is sent (-1: not said), and the size of the whole file if the server says it."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if not found:
            return -1, None
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length and length.isdigit() else None


def _version_mark(response: http.client.HTTPResponse) -> str | None:
    """A strong ETag or else the date: what ``If-Range`` accepts (RFC 9110, section 13.1.5)."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _append(response: http.client.HTTPResponse, part: _Part, total: int | None, name: str) -> None:
    with (
        part.path.open("ab") as output,
        tqdm(total=total, initial=part.size, desc=name, unit="B", unit_scale=True, unit_divisor=1024) as bar,
    ):
        while block := response.read(_BLOCK):
            output.write(block)
            bar.update(len(block))
    if total is not None and part.size != total:
        raise _Dropped(f"the connection ended after {part.size} of {total} bytes")
