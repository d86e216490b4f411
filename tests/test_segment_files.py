"""Segmenting files and folders: names, resuming, bad files."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from hpddrnet_trt.errors import BadInputFile, UsageError
from hpddrnet_trt.segment_files import segment_paths
from hpddrnet_trt.segmenter import Segmenter
from tests.toy import ToyEngine, grey_image, manifest


def _write(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), grey_image(20 + seed, 30, seed))
    return path


def _tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def segmenter() -> Segmenter:
    return Segmenter(ToyEngine())


def _run(segmenter: Segmenter, *arguments: object, **options: object) -> object:
    return segment_paths(segmenter, *arguments, progress=False, **options)  # type: ignore[arg-type]


def test_folder_to_labels_overlays_and_journal(tmp_path: Path, segmenter: Segmenter) -> None:
    for seed, name in enumerate(("a.png", "b.tif")):
        _write(tmp_path / "in" / name, seed)
    out = tmp_path / "out"
    summary = segment_paths(segmenter, tmp_path / "in", out, progress=False)
    assert summary.exit_code == 0
    assert _tree(out) == ["a.png", "b.png", "overlays/a.png", "overlays/b.png", "segmentations.jsonl"]
    with Image.open(out / "b.png") as picture:
        assert np.array_equal(np.asarray(picture), segmenter.segment(grey_image(21, 30, 1)).labels)
    lines = [json.loads(line) for line in (out / "segmentations.jsonl").read_text().splitlines()]
    assert [line["labels"] for line in lines] == ["a.png", "b.png"]
    assert sum(lines[0]["fractions"].values()) == pytest.approx(1)
    assert lines[1]["source"] == str((tmp_path / "in" / "b.tif").resolve())


def test_resume_skips_what_is_done_and_only_that(tmp_path: Path) -> None:
    for seed in range(3):
        _write(tmp_path / "in" / f"{seed}.png", seed)
    out = tmp_path / "out"
    source = [str(tmp_path / "in" / "*.png")]

    def run(**changes: object) -> tuple[int, int, int]:
        engine = ToyEngine(manifest("logits", **changes))
        summary = segment_paths(Segmenter(engine), source, out, progress=False)
        return len(summary.written), len(summary.skipped), len(engine.shapes)

    assert run() == (3, 0, 3)
    assert run() == (0, 3, 0)
    (out / "1.png").unlink()
    assert run() == (1, 2, 1)
    (out / "overlays" / "2.png").unlink()
    assert run() == (1, 2, 1)
    _write(tmp_path / "in" / "0.png", 5)  # the image changed
    assert run() == (1, 2, 1)
    assert run(checkpoint_sha256="another") == (3, 0, 3)  # another model
    with (out / "segmentations.jsonl").open("a") as stream:
        stream.write('{"labels": "0.png", "sou')  # killed while writing
    (out / "0.png").unlink()
    assert run(checkpoint_sha256="another") == (1, 2, 1)
    assert run(checkpoint_sha256="another") == (0, 3, 0)
    summary = segment_paths(Segmenter(ToyEngine()), source, out, progress=False, resume=False)
    assert len(summary.written) == 3


def test_bad_files_are_reported_and_others_go_on(tmp_path: Path, segmenter: Segmenter) -> None:
    _write(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "in" / "empty.tif").write_bytes(b"")
    summary = segment_paths(segmenter, tmp_path / "in", tmp_path / "out", progress=False, overlay=False)
    assert summary.exit_code == 1
    assert [path.name for path, _ in summary.failed] == ["broken.png", "empty.tif"]
    assert "broken.png" in str(summary)
    assert str(summary).startswith("1 segmented, 0 already done, 2 failed")
    assert _tree(tmp_path / "out") == ["good.png", "segmentations.jsonl"]


def test_equal_names_do_not_overwrite_each_other(tmp_path: Path, segmenter: Segmenter) -> None:
    inputs = [
        _write(tmp_path / name, seed)
        for seed, name in enumerate(
            ("p/a.png", "p/a.tif", "q/a.png", "p/b.png", "x/same/c.png", "y/same/c.png", "p/B.tif")
        )
    ]
    out = tmp_path / "out"
    summary = segment_paths(segmenter, inputs, out, suffix=".tif", overlay=False, progress=False)
    assert len({path.name.lower() for path in summary.written}) == len(inputs)
    for source, target in zip(inputs, summary.written, strict=True):
        with Image.open(target) as picture:
            expected = segmenter.segment(cv2.imread(str(source), cv2.IMREAD_UNCHANGED)).labels
            assert np.array_equal(np.asarray(picture), expected)
    assert [path.name for path in summary.written] == [
        "p_a.png.tif", "a.tif.tif", "q_a.png.tif", "b.png.tif", "x_same_c.png.tif", "y_same_c.png.tif", "B.tif.tif"
    ]
    again = segment_paths(segmenter, inputs[::-1], out, suffix=".tif", overlay=False, progress=False)
    assert (len(again.written), len(again.skipped)) == (0, len(inputs))


def test_labels_of_another_image_are_kept(tmp_path: Path, segmenter: Segmenter) -> None:
    first, second = _write(tmp_path / "p" / "b.png"), _write(tmp_path / "z" / "b.png", 1)
    _run(segmenter, first, tmp_path / "out")
    before = (tmp_path / "out" / "b.png").read_bytes()
    with pytest.raises(UsageError, match=r"b\.png holds the labels of .*choose another output folder"):
        _run(segmenter, second, tmp_path / "out")
    assert (tmp_path / "out" / "b.png").read_bytes() == before


def test_refusals(tmp_path: Path, segmenter: Segmenter) -> None:
    image = _write(tmp_path / "in" / "a.png")
    with pytest.raises(UsageError, match="holds the images to segment"):
        _run(segmenter, image, tmp_path / "in")
    with pytest.raises(UsageError, match="is a file; give a folder"):
        _run(segmenter, image, _write(tmp_path / "file.png"))
    with pytest.raises(UsageError, match=r"not '\.jpg'"):
        _run(segmenter, image, tmp_path / "out", suffix=".jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputFile, match="no micrograph found"):
        _run(segmenter, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
