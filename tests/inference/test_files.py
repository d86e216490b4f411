"""Segmenting files and folders: names, kinds of file, resuming, bad files, Ctrl-C."""

from __future__ import annotations

import csv
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import DataRecord
from hpddrnet_trt.data.intensity import Percentiles
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.files import FileSegmenter, ResultSettings
from hpddrnet_trt.inference.folder import SegmentSummary, segment_paths
from hpddrnet_trt.results import FORMATS, KINDS
from tests.toy import ToyEngine, grey_image, manifest

# ome-zarr still has a class that it deprecates as default of an argument.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated class Scaler:DeprecationWarning")


def _write(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), grey_image(20 + seed, 30, seed))
    return path


def _tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "segmentations.jsonl").read_text().splitlines()]


def _table(folder: Path) -> list[dict[str, str]]:
    with (folder / "fractions.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def segmenter() -> Segmenter:
    return Segmenter(ToyEngine())


def _run(segmenter: Segmenter, *arguments: Any, **options: Any) -> SegmentSummary:
    return segment_paths(segmenter, *arguments, ResultSettings(**options), progress=False)


def test_folder_to_labels_overlays_table_and_journal(tmp_path: Path, segmenter: Segmenter) -> None:
    for seed, name in enumerate(("a.png", "b.tif")):
        _write(tmp_path / "in" / name, seed)
    out = tmp_path / "out"
    summary = segment_paths(segmenter, tmp_path / "in", out, progress=True)
    assert summary.exit_code == 0
    assert _tree(out) == ["a.png", "b.png", "fractions.csv", "overlays/a.png", "overlays/b.png", "segmentations.jsonl"]
    assert summary.written == [out / "a.png", out / "b.png"]
    with Image.open(out / "b.png") as picture:
        assert np.array_equal(np.asarray(picture), segmenter.segment(grey_image(21, 30, 1)).labels)
    lines = _lines(out)
    assert [line["outputs"]["png"] for line in lines] == ["a.png", "b.png"]
    assert sum(lines[0]["fractions"].values()) == pytest.approx(1)
    assert lines[1]["source"] == str((tmp_path / "in" / "b.tif").resolve())
    assert lines[1]["size"] == [21, 30]
    assert lines[1]["provenance"]["engine"] == "numpy"
    assert (lines[1]["pixel_size_m"], lines[1]["remarks"], lines[1]["info_bar_rows"]) == (None, [], None)
    assert [(row["image"], row["class"]) for row in _table(out)] == [
        (name, entry) for name in "ab" for entry in ("grain", "pore", "clay")
    ]
    assert sum(int(row["pixels"]) for row in _table(out)) == 30 * (20 + 21)
    assert {row["area_um2"] for row in _table(out)} == {""}


def test_every_kind_of_file(tmp_path: Path) -> None:
    for module in ("skimage", "roifile", "zarr", "ome_zarr"):
        pytest.importorskip(module)
    image, out = _write(tmp_path / "in" / "a.ome.tif"), tmp_path / "out"
    segmenter, expected = Segmenter(ToyEngine(), confidence=True), Segmenter(ToyEngine()).segment(grey_image(20, 30))
    summary = _run(segmenter, image, out, write=KINDS, background=["grain"], smallest=3, pixel_size_m=20e-9)
    assert summary.exit_code == 0, summary
    assert {path.name for path in out.iterdir()} == {
        *(f"a{FORMATS[kind].ending}" for kind in KINDS), "overlays", "fractions.csv", "segmentations.jsonl"
    }  # fmt: skip
    for name in ("a.png", "a.tif", "a.ome.tif"):
        with Image.open(out / name) as picture:
            assert np.array_equal(np.asarray(picture), expected.labels)
    with (out / "a.regions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["class"] for row in rows} == {"pore", "clay"}
    assert min(int(row["area_px"]) for row in rows) >= 3
    assert float(rows[0]["area_um2"]) == pytest.approx(int(rows[0]["area_px"]) * 4e-4)
    assert len(zipfile.ZipFile(out / "a.rois.zip").namelist()) == len(rows)
    (line,) = _lines(out)
    assert set(line["outputs"]) == {*KINDS, "overlay"}
    assert (line["pixel_size_m"], line["pixel_size_source"]) == (20e-9, "given")
    assert line["mean_confidence"] == pytest.approx(float(tifffile.imread(out / "a.confidence.tif").mean()))
    assert {row["pixel_size_nm"] for row in _table(out)} == {"20"}


def test_resume_skips_what_is_done_and_only_that(tmp_path: Path) -> None:
    for seed in range(3):
        _write(tmp_path / "in" / f"{seed}.png", seed)
    out = tmp_path / "out"
    source = [str(tmp_path / "in" / "*.png")]

    def run(**changes: Any) -> tuple[int, int, int]:
        engine = ToyEngine(manifest("logits", **changes))
        summary = _run(Segmenter(engine), source, out)
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
    with (out / "segmentations.jsonl").open("ab") as stream:  # foreign lines, and one torn by a crash
        stream.write(b'[]\n{"name": 5, "outputs": {}}\n{"labels": "a.png"}\n\xff\n{"name": "0", "sou')
    (out / "0.png").unlink()
    assert run(checkpoint_sha256="another") == (1, 2, 1)
    journal = (out / "segmentations.jsonl").read_bytes()
    assert b'"name": "0", "sou\n' not in journal  # the torn line has gone, the others stand
    assert b'\xff\n{"name": "0", "source"' in journal
    (out / "segmentations.jsonl").write_bytes(journal.rstrip(b"\n"))  # whole, but for its end
    (out / "1.png").unlink()
    assert run(checkpoint_sha256="another") == (1, 2, 1)
    assert run(checkpoint_sha256="another") == (0, 3, 0)
    summary = _run(Segmenter(ToyEngine()), source, out, resume=False)
    assert len(summary.written) == 3
    assert len(_table(out)) == 9


def test_options_that_change_are_noticed(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    image, out = _write(tmp_path / "in" / "a.png"), tmp_path / "out"

    def run(**options: Any) -> list[str]:
        """Files that were written."""
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        window, model = options.pop("window", None), options.pop("model", "a1")
        _run(Segmenter(ToyEngine(), window=window, model_sha256=model), image, out, **options)
        files = (path for path in out.rglob("*") if path.is_file() and path.stat().st_mtime_ns != before.get(path))
        return sorted(path.name for path in files if path.name not in ("fractions.csv", "segmentations.jsonl"))

    assert run(overlay=False) == ["a.png"]
    assert run(overlay=True) == ["a.png"]  # overlays/a.png only
    assert (out / "overlays" / "a.png").exists()
    assert run(write=["png", "tiff", "regions"]) == ["a.regions.csv", "a.tif"]
    assert run(write=["png", "tiff", "regions"]) == []
    assert run(write=["regions"], smallest=4) == ["a.regions.csv"]
    assert run(write=["regions"], smallest=4, background=["pore"]) == ["a.regions.csv"]
    assert run(write=["ome-tiff"], smallest=2) == ["a.ome.tif"]
    assert run(write=["regions"], smallest=4, background=["pore"]) == []  # other runs did not make it forget
    assert run(write=["png", "tiff"], window=(0, 200)) == ["a.png", "a.png", "a.tif"]
    assert run(write=["png", "tiff"], window=Percentiles(1, 99)) == ["a.png", "a.png", "a.tif"]
    assert _lines(out)[-1]["window"] != [0, 255]
    assert run(write=["tiff"], overlay=False, pixel_size_m=1e-9) == ["a.tif"]
    assert run(write=["tiff"], overlay=False, pixel_size_m=1e-9) == []
    # Another file of the same name, checkpoint and precision, such as an INT8 file of another calibration.
    assert run(write=["tiff"], overlay=False, pixel_size_m=1e-9, model="b2") == ["a.tif"]



def test_a_file_that_changes_while_it_is_segmented_is_not_done(tmp_path: Path) -> None:
    image = _write(tmp_path / "in" / "a.png")

    class Slow(ToyEngine):
        def infer(self, images: Any) -> Any:
            _write(image, seed=7)
            return super().infer(images)

    _run(Segmenter(Slow()), image, tmp_path / "out")
    again = _run(Segmenter(ToyEngine()), image, tmp_path / "out")
    assert (len(again.written), len(again.skipped)) == (1, 0)
    assert _lines(tmp_path / "out")[-1]["size"] == [27, 30]


def test_bad_files_are_reported_and_others_go_on(tmp_path: Path, segmenter: Segmenter) -> None:
    _write(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "in" / "empty.tif").write_bytes(b"")
    summary = _run(segmenter, tmp_path / "in", tmp_path / "out", overlay=False)
    assert summary.exit_code == 1
    assert [path.name for path, _ in summary.failed] == ["broken.png", "empty.tif"]
    assert "broken.png" in str(summary)
    assert str(summary).startswith("1 segmented, 0 already done, 2 failed")
    assert _tree(tmp_path / "out") == ["fractions.csv", "good.png", "segmentations.jsonl"]
    (tmp_path / "other" / "segmentations.jsonl").mkdir(parents=True)
    (failed,) = _run(segmenter, tmp_path / "in" / "good.png", tmp_path / "other").failed
    assert "cannot write" in failed[1]
    assert "segmentations.jsonl" in failed[1]


def test_a_result_that_fails_leaves_the_others_and_is_tried_again(
    tmp_path: Path, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, out = _write(tmp_path / "in" / "a.png"), tmp_path / "out"
    pytest.importorskip("skimage")

    def full(*_: object) -> Path:
        raise UserError("cannot write a.regions.csv: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hpddrnet_trt.results.tables.write_regions", full)
        summary = _run(segmenter, image, out, write=["png", "regions"])
    assert summary.failed == [(image, f"{image}: cannot write a.regions.csv: No space left on device")]
    assert _lines(out)[0]["outputs"] == {"png": "a.png"}
    before = (out / "a.png").stat().st_mtime_ns
    assert len(_run(segmenter, image, out, write=["png", "regions"]).written) == 1
    assert (out / "a.png").stat().st_mtime_ns == before
    assert len(_run(segmenter, image, out, write=["png", "regions"]).skipped) == 1


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    for seed in range(3):
        _write(tmp_path / "in" / f"{seed}.png", seed)

    class Interrupted(ToyEngine):
        def infer(self, images: Any) -> Any:
            if len(self.shapes) == 1:
                raise KeyboardInterrupt
            return super().infer(images)

    summary = _run(Segmenter(Interrupted()), tmp_path / "in", tmp_path / "out")
    assert summary.interrupted
    assert str(summary).startswith("1 segmented, 0 already done, 0 failed, interrupted: run again to continue\n")
    assert _tree(tmp_path / "out") == ["0.png", "fractions.csv", "overlays/0.png", "segmentations.jsonl"]
    assert len(_table(tmp_path / "out")) == 3
    again = _run(Segmenter(ToyEngine()), tmp_path / "in", tmp_path / "out")
    assert (len(again.written), len(again.skipped), again.interrupted) == (2, 1, False)


def test_summary_weighs_by_area_where_all_are_known(tmp_path: Path, segmenter: Segmenter) -> None:
    sizes = {"a.tif": 10e-9, "b.tif": 30e-9}
    for name, size in sizes.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        value = 0 if name == "a.tif" else 255  # all grain, all clay
        tifffile.imwrite(
            tmp_path / "in" / name, np.full((20, 30), value, np.uint8), imagej=True,
            resolution=(1e-6 / size, 1e-6 / size), metadata={"unit": "um"},
        )  # fmt: skip
    summary = _run(segmenter, tmp_path / "in", tmp_path / "out", overlay=False)
    assert summary.weighed_by == "area"
    assert summary.fractions == pytest.approx({"grain": 0.1, "pore": 0, "clay": 0.9})
    assert "overall, by area: grain 10.0 %, pore 0.0 %, clay 90.0 %" in str(summary)
    _write(tmp_path / "in" / "c.png")
    mixed = _run(segmenter, tmp_path / "in", tmp_path / "out", overlay=False)
    assert (len(mixed.skipped), mixed.weighed_by) == (2, "pixels")
    assert sum(mixed.fractions.values()) == pytest.approx(1)


def test_equal_names_do_not_overwrite_each_other(tmp_path: Path, segmenter: Segmenter) -> None:
    files = ("p/a.png", "p/a.tif", "q/a.png", "p/b.png", "x/same/c.png", "y/same/c.png", "p/B.tif", "p/d.ome.tif",
             "p/d.tif")  # fmt: skip
    inputs = [_write(tmp_path / name, seed) for seed, name in enumerate(files)]
    out = tmp_path / "out"
    summary = _run(segmenter, inputs, out, write=["tiff", "ome-tiff"], overlay=False)
    assert len({path.name.lower() for path in summary.written}) == len(inputs)
    for source, target in zip(inputs, summary.written, strict=True):
        expected = segmenter.segment(cv2.imread(str(source), cv2.IMREAD_UNCHANGED)).labels
        for path in (target, target.with_name(target.name.removesuffix(".tif") + ".ome.tif")):
            with Image.open(path) as picture:
                assert np.array_equal(np.asarray(picture), expected)
    assert [path.name for path in summary.written] == [
        "p_a.png.tif", "a.tif.tif", "q_a.png.tif", "b.png.tif", "x_same_c.png.tif", "y_same_c.png.tif", "B.tif.tif",
        "d.ome.tif.tif", "d.tif.tif",
    ]  # fmt: skip
    again = _run(segmenter, inputs[::-1], out, write=["tiff", "ome-tiff"], overlay=False)
    assert (len(again.written), len(again.skipped)) == (0, len(inputs))


def test_results_keep_their_name_and_their_files(tmp_path: Path) -> None:
    segmenter, out = Segmenter(ToyEngine(), tile=16), tmp_path / "out"
    summary = _run(segmenter, _write(tmp_path / "in" / "a.png"), out)
    assert (summary.tiled, summary.seam_disagreement) == (1, _lines(out)[0]["tiling"]["seam_disagreement"])
    assert "1 in tiles, which disagree about " in str(summary)
    before = (out / "a.png").read_bytes()
    with pytest.raises(UsageError, match=r"a holds the labels of .*choose another output folder"):
        _run(segmenter, _write(tmp_path / "z" / "a.png", 1), out)
    assert (out / "a.png").read_bytes() == before
    _write(tmp_path / "in" / "a.tif", 1)
    summary = _run(segmenter, tmp_path / "in", out)  # and beside another of that name
    assert ([path.name for path in summary.written], len(summary.skipped)) == (["a.tif.png"], 1)
    rows = [(row["image"], Path(row["source"]).name) for row in _table(out)[::3]]
    assert rows == [("a", "a.png"), ("a.tif", "a.tif")]


def test_images_that_come_one_by_one_keep_their_names(tmp_path: Path, segmenter: Segmenter) -> None:
    inputs = [_write(tmp_path / name, seed) for seed, name in enumerate(("p/a.png", "q/a.png", "r/a.png"))]
    names: list[str] = []
    for source in inputs:
        work = FileSegmenter(segmenter, tmp_path / "out", ResultSettings(overlay=False))
        name = work.name_of(source)
        work.segment(work.task(source, name))
        names.append(name)
        assert not work.task(source, name).missing
    assert names == ["a", "a.png", "r_a.png"]
    work = FileSegmenter(segmenter, tmp_path / "out", ResultSettings(overlay=False))
    assert [work.name_of(source) for source in inputs] == names
    assert not any(work.task(source, name).missing for source, name in zip(inputs, names, strict=True))


def test_refusals(tmp_path: Path, segmenter: Segmenter) -> None:
    image = _write(tmp_path / "in" / "a.png")
    refusals: list[tuple[str, dict[str, Any]]] = [
        ("not 'jpg'", {"write": ["jpg"]}),
        ("a list of kinds", {"write": "png"}),
        ("nothing is to be written", {"write": [], "overlay": False}),
        ("'rock' is no class", {"background": ["rock"]}),
        ("at least 1 pixel", {"smallest": 0}),
        ("gives no confidence", {"write": ["confidence"]}),
        ("positive number of metres", {"pixel_size_m": 0.0}),
        ("a number of rows to keep, not 0", {"info_bar": 0}),
    ]
    for message, options in refusals:
        with pytest.raises(UsageError, match=message):
            _run(segmenter, image, tmp_path / "out", **options)
    with pytest.raises(UsageError, match="holds the images to segment"):
        _run(segmenter, image, tmp_path / "in")
    with pytest.raises(UsageError, match="is a file; give a folder"):
        _run(segmenter, image, _write(tmp_path / "file.png"))
    with pytest.raises(UserError, match=r"cannot write into .*labels: Not a directory; choose another output folder"):
        _run(segmenter, image, _write(tmp_path / "file.png") / "labels")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputFile, match="no micrograph found"):
        _run(segmenter, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


JOB = {"model": "toy", "given_window": (0.0, 9.0)}


def test_links_are_called_what_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "store" / "MD5E-s49k.png"), grey_image(16, 24))
    for name in ("grain_1.png", "grain_2.png"):
        os.symlink(tmp_path / "store" / "MD5E-s49k.png", tmp_path / "in" / name)
    summary = segment_paths(Segmenter(ToyEngine(manifest("logits"))), tmp_path / "in", tmp_path / "out", progress=False)
    assert len(summary.written) == 2
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["grain_1.png", "grain_2.png"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_names_that_are_no_utf8_do_not_stop_the_others(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    content = cv2.imencode(".png", grey_image(16, 24))[1].tobytes()
    for name in (b"Gr\xf6\xdfe.png", b"b.png"):
        with open(os.path.join(os.fsencode(tmp_path / "in"), name), "wb") as stream:
            stream.write(content)
    segmenter = Segmenter(ToyEngine(manifest("logits")), confidence=True)
    for again in range(2):
        settings = ResultSettings(write=(kind,))
        summary = segment_paths(segmenter, tmp_path / "in", tmp_path / "out", settings, progress=False)
        assert not summary.failed
        assert (len(summary.written), len(summary.skipped)) == ((0, 2) if again else (2, 0))
    assert "Gr\\xf6\\xdfe" in (tmp_path / "out" / "fractions.csv").read_text(encoding="utf-8")


def test_another_pixel_size_is_told_in_summary_journal_and_table(tmp_path: Path) -> None:
    image, out = _write(tmp_path / "in" / "a.png"), tmp_path / "out"
    trained = manifest(data=DataRecord(name="steel", pixel_size_m=(10e-9, 10e-9)))
    segmenter, as_it_is = Segmenter(ToyEngine(trained)), Segmenter(ToyEngine(trained), rescale=False)
    summary = _run(segmenter, image, out, pixel_size_m=15e-9)
    assert summary.record()["rescaled"] == 1
    assert "1 brought to the pixel size that the model was trained at" in str(summary)
    assert _lines(out)[0]["rescale"] == pytest.approx(1.5)
    assert [row["rescale"] for row in _table(out)] == ["1.5"] * 3
    assert _run(segmenter, image, out, pixel_size_m=15e-9).written == []
    # Without rescaling the result is another.
    summary = _run(as_it_is, image, out, pixel_size_m=15e-9)
    assert (len(summary.written), summary.rescaled) == (1, 0)
    assert "brought to" not in str(summary)
    assert {row["rescale"] for row in _table(out)} == {""}


def test_a_model_without_pixel_sizes_goes_on_in_folders_of_older_versions(tmp_path: Path, segmenter: Segmenter) -> None:
    image, out = _write(tmp_path / "in" / "a.png"), tmp_path / "out"
    _run(segmenter, image, out)
    (line,) = _lines(out)
    assert "rescale" not in line["job"]
    del line["rescale"]
    (out / "segmentations.jsonl").write_text(json.dumps(line) + "\n")
    assert len(_run(segmenter, image, out).skipped) == 1
    assert {row["rescale"] for row in _table(out)} == {""}
