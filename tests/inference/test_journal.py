"""The journal of a folder: what counts as done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.inference.journal import Journal, modified

JOB = {"model": "toy", "given_window": (0.0, 9.0)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in.png").write_text("image")
    return tmp_path / "in.png"


def _journal(tmp_path: Path, job: dict[str, object] = JOB) -> Journal:
    return Journal(tmp_path / "j.jsonl", job)


def _add(tmp_path: Path, source: Path) -> None:
    for file in ("a.png", "a.csv"):
        (tmp_path / file).touch()
    outputs = {"png": "a.png", "regions": "a.csv"}
    _journal(tmp_path).add(
        "a", source, modified(source), {"outputs": outputs, "settings": {"regions": {"smallest": 1}}}
    )


def test_what_is_done_is_done_for_the_same_job(tmp_path: Path, source: Path) -> None:
    _add(tmp_path, source)
    assert _journal(tmp_path).made("a", source) == {"png": ("a.png", None), "regions": ("a.csv", {"smallest": 1})}
    assert _journal(tmp_path, {**JOB, "model": "other"}).made("a", source) == {}
    assert _journal(tmp_path).made("b", source) == {}
    assert _journal(tmp_path).made("a", tmp_path / "other.png") == {}
    (tmp_path / "a.csv").unlink()
    assert _journal(tmp_path).made("a", source) == {"png": ("a.png", None)}
    source.write_text("changed")
    assert _journal(tmp_path).made("a", source) == {}
    assert [entry["name"] for entry in _journal(tmp_path)] == ["a"]
    assert _journal(tmp_path).name_of(source) == "a"
    (tmp_path / "a.png").unlink()
    assert (list(_journal(tmp_path)), _journal(tmp_path).source_of("a")) == ([], None)
    assert _journal(tmp_path).name_of(source) is None


def test_foreign_and_torn_lines_are_passed_over(tmp_path: Path, source: Path) -> None:
    (tmp_path / "j.jsonl").write_text('[]\n{"name": 5, "outputs": {}}\n{"labels": "a.png"}\n\xff\n{"name": "a", "out')
    _add(tmp_path, source)
    lines = (tmp_path / "j.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert json.loads(lines[-1])["job"] == {"model": "toy", "given_window": [0.0, 9.0]}
    assert [entry["name"] for entry in _journal(tmp_path)] == ["a"]


def test_a_journal_that_cannot_be_written_is_an_error(tmp_path: Path, source: Path) -> None:
    (tmp_path / "j.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*j\.jsonl"):
        _add(tmp_path, source)
