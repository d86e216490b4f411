"""Stacks: pages of a TIFF and files of a folder become one stack of labels, slice by slice."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.data.stack import stack_in_file, stacks_in_folders
from hpddrnet_trt.engines.base import Prediction
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.files import ResultSettings
from hpddrnet_trt.inference.folder import SegmentSummary, segment_paths
from hpddrnet_trt.results import FORMATS
from tests.toy import ToyEngine, grey_image

# ome-zarr still has a class that it deprecates as default of an argument.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated class Scaler:DeprecationWarning")

SLICES = np.stack([grey_image(40, 30, seed) for seed in range(5)])
EXPECTED = np.stack([Segmenter(ToyEngine()).segment(image).labels for image in SLICES])


def _run(source: Any, out: Path, engine: ToyEngine | None = None, **options: Any) -> SegmentSummary:
    return segment_paths(Segmenter(engine or ToyEngine()), source, out, ResultSettings(**options), progress=False)


def _tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _slices(path: Path) -> list[npt.NDArray[Any]]:
    stack = stack_in_file(path)
    assert stack is not None
    return [read_micrograph(source, page=page).pixels for source, page in stack.slices]


# ------------------------------------------------------------ what is a stack


def _ome(path: Path, data: npt.NDArray[Any], axes: str, **more: Any) -> None:
    tifffile.imwrite(path, data, ome=True, photometric="minisblack", metadata={"axes": axes, **more})


def test_pages_of_every_writer(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "plain.tif", SLICES, photometric="minisblack", metadata=None)
    tifffile.imwrite(tmp_path / "shaped.tif", SLICES, photometric="minisblack")
    tifffile.imwrite(tmp_path / "big.tif", SLICES, photometric="minisblack", bigtiff=True, compression="zlib")
    tifffile.imwrite(
        tmp_path / "imagej.tif", SLICES, imagej=True, resolution=(100, 100),
        metadata={"axes": "ZYX", "unit": "um", "spacing": 0.02},
    )  # fmt: skip
    sizes = {"PhysicalSizeZ": 20, "PhysicalSizeZUnit": "nm", "PhysicalSizeX": 10, "PhysicalSizeXUnit": "nm",
             "PhysicalSizeY": 10, "PhysicalSizeYUnit": "nm"}  # fmt: skip
    _ome(tmp_path / "ome.tif", SLICES, "ZYX", **sizes)
    _ome(tmp_path / "time.tif", SLICES, "TYX")
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(_slices(path), SLICES, err_msg=path.name)
    for name in ("imagej.tif", "ome.tif"):
        stack = stack_in_file(tmp_path / name)
        assert stack is not None
        assert stack.spacing_m == pytest.approx(20e-9)
        assert read_micrograph(tmp_path / name, page=3).pixel_size_m == pytest.approx(10e-9)


def test_planes_that_imagej_hides_behind_the_first_page(tmp_path: Path) -> None:
    path = tmp_path / "virtual.tif"
    deep = SLICES.astype(">u2") * 257
    tifffile.imwrite(path, deep, imagej=True, metadata={"axes": "ZYX"})
    with tifffile.TiffFile(path) as tif:  # what ImageJ writes for stacks above 4 GB: no directory but the first
        following = tif.pages[0].tags.get(256).offset - 2 + 2 + 12 * len(tif.pages[0].tags)
    with path.open("r+b") as stream:
        stream.seek(following)
        stream.write(bytes(4))
    np.testing.assert_array_equal(_slices(path), deep)
    assert "first of 5 pages" in "".join(read_micrograph(path).remarks)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)
    assert stack_in_file(path) is None


def test_of_several_channels_the_first(tmp_path: Path) -> None:
    both = np.stack([SLICES, 255 - SLICES], axis=1)  # ZCYX
    tifffile.imwrite(tmp_path / "imagej.tif", both, imagej=True, metadata={"axes": "ZCYX"})
    _ome(tmp_path / "ome.tif", both, "ZCYX")
    _ome(tmp_path / "other.tif", both.swapaxes(0, 1), "CZYX")
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(_slices(path), SLICES, err_msg=path.name)
        assert "the first of 2 channels is used" in read_micrograph(path, page=1).remarks


def test_what_is_no_stack(tmp_path: Path) -> None:
    def writing(name: str, *pages: tuple[npt.NDArray[Any], dict[str, Any]]) -> Path:
        with tifffile.TiffWriter(tmp_path / name) as writer:
            for data, options in pages:
                writer.write(data, metadata=None, **options)
        return tmp_path / name

    grey: dict[str, Any] = {"photometric": "minisblack"}
    single = writing("single.tif", (SLICES[0], grey))
    thumbnail = writing("thumbnail.tif", (SLICES[0, ::4, ::4], grey), (SLICES[0], grey))
    pyramid = writing("pyramid.tif", *((SLICES[0, ::step, ::step], grey) for step in (1, 2, 4)))
    mask = writing("mask.tif", (SLICES[0], grey), (SLICES[1], grey | {"subfiletype": 2}))
    with tifffile.TiffFile(mask) as tif:
        kind = tif.pages[1].aspage().tags[254].valueoffset
    with mask.open("r+b") as stream:  # a transparency mask, which tifffile does not write of grey pictures
        stream.seek(kind)
        stream.write(b"\4\0\0\0")
    mixed = writing("mixed.tif", (SLICES[0], grey), (np.stack([SLICES[0]] * 3, -1), {"photometric": "rgb"}))
    depths = writing("depths.tif", (SLICES[0], grey), (SLICES[1].astype(np.uint16), grey))
    png = tmp_path / "a.png"
    Image.fromarray(SLICES[0]).save(png)
    (tmp_path / "broken.tif").write_bytes(b"II*\0" + bytes(40))
    for path in (single, thumbnail, pyramid, mask, mixed, depths, png, tmp_path / "broken.tif", tmp_path / "none.tif"):
        assert stack_in_file(path) is None, path
    assert "first of 2 pages" in "".join(read_micrograph(mixed).remarks)


def test_colour_pages_are_slices(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.stack([SLICES] * 3, -1), photometric="rgb", metadata=None)
    np.testing.assert_array_equal(_slices(tmp_path / "a.tif"), SLICES)


def test_files_of_a_folder_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["s10.tif", "s9.tif", "S2.tif", "s1_b.tif", "s1_a.tif"]
    (stack, other) = stacks_in_folders([*(tmp_path / name for name in names), tmp_path / "sub" / "x.tif"])
    assert [path.name for path, _ in stack.slices] == ["s1_a.tif", "s1_b.tif", "S2.tif", "s9.tif", "s10.tif"]
    assert (stack.source, other.source) == (tmp_path, tmp_path / "sub")


# ------------------------------------------------------------ what segment makes of it


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "run.tif"
    path.parent.mkdir()
    tifffile.imwrite(
        path, SLICES, imagej=True, resolution=(100, 100), metadata={"axes": "ZYX", "unit": "um", "spacing": 0.02}
    )
    return path


def test_a_stack_in_and_out(tmp_path: Path, stack: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(SLICES[0]).save(stack.parent / "alone.png")
    summary = _run(stack.parent, tmp_path / "out")
    assert summary.exit_code == 0, summary
    assert len(summary.written) == 6
    assert f"{stack}: its 5 pages are segmented as a stack (--no-stack: only the first)" in caplog.text
    out = tmp_path / "out"
    assert _tree(out) == [
        "alone.png", "fractions.csv", "overlays/alone.png", *(f"overlays/run/{n:04d}.png" for n in range(1, 6)),
        "run.tif", *(f"run/{n:04d}.png" for n in range(1, 6)), "segmentations.jsonl",
    ]  # fmt: skip
    np.testing.assert_array_equal(tifffile.imread(out / "run.tif"), EXPECTED)
    with tifffile.TiffFile(out / "run.tif") as tif:
        page = tif.pages[4].aspage()
        assert page.photometric == tifffile.PHOTOMETRIC.PALETTE
        assert page.tags["XResolution"].value[0] / page.tags["XResolution"].value[1] == pytest.approx(1e6)  # a cm
        assert json.loads(tif.pages[0].aspage().description)["spacing_m"] == pytest.approx(20e-9)
    with (out / "fractions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["slice"] for row in rows if row["image"] == "run"] == [str(n) for n in range(1, 6) for _ in range(3)]
    assert {row["slice"] for row in rows if row["image"] == "alone"} == {""}
    assert "tiff of a stack" in str(summary)
    assert "NAME.tif" in str(summary)
    again = _run(stack.parent, out)
    assert (len(again.written), len(again.skipped), again.exit_code) == (0, 6, 0)


def test_formats_with_z(tmp_path: Path, stack: Path) -> None:
    zarr = pytest.importorskip("zarr")
    pytest.importorskip("ome_zarr")
    out = tmp_path / "out"
    summary = _run(stack, out, write=["ome-tiff", "ome-zarr"], overlay=False)
    assert summary.exit_code == 0, summary
    assert {path.name for path in out.iterdir()} == {
        "run", "run.ome.tif", "run.ome.zarr", "fractions.csv", "segmentations.jsonl"
    }  # fmt: skip
    with tifffile.TiffFile(out / "run.ome.tif") as tif:
        assert tif.series[0].axes == "ZYX"
        np.testing.assert_array_equal(tif.asarray(), EXPECTED)
        assert 'PhysicalSizeZ="0.02"' in str(tif.ome_metadata)
        assert 'PhysicalSizeX="0.01"' in str(tif.ome_metadata)
    root = zarr.open_group(str(out / "run.ome.zarr"), mode="r")
    np.testing.assert_array_equal(root["0"][:], EXPECTED)
    scales = root.attrs["ome"]["multiscales"][0]
    assert [(axis["name"], axis["unit"]) for axis in scales["axes"]] == [(axis, "micrometer") for axis in "zyx"]
    assert scales["datasets"][0]["coordinateTransformations"][0]["scale"] == pytest.approx([0.02, 0.01, 0.01])
    assert root.attrs["ome"]["image-label"]["properties"][1]["class"] == "pore"
    other = _run(stack, out, write=["ome-tiff"], overlay=False, spacing_m=5e-8)
    assert len(other.skipped) == 5
    with tifffile.TiffFile(out / "run.ome.tif") as tif:
        assert 'PhysicalSizeZ="0.05"' in str(tif.ome_metadata)


def test_a_pyramid_halves_y_and_x(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    pytest.importorskip("ome_zarr")
    path = tmp_path / "large.tif"
    tifffile.imwrite(path, np.stack([grey_image(600, 521, n) for n in range(2)]), photometric="minisblack")
    assert _run(path, tmp_path / "out", write=["ome-zarr"], overlay=False).exit_code == 0
    root = zarr.open_group(str(tmp_path / "out" / "large.ome.zarr"), mode="r")
    assert root["1"].shape == (2, 300, 261)
    np.testing.assert_array_equal(root["1"][:], root["0"][:, ::2, ::2])


def test_an_interrupted_stack_is_continued(tmp_path: Path, stack: Path) -> None:
    class Interrupted(ToyEngine):
        def infer(self, images: Any) -> Prediction:
            if len(self.shapes) == 2:
                raise KeyboardInterrupt
            return super().infer(images)

    out = tmp_path / "out"
    first = _run(stack, out, Interrupted())
    assert first.interrupted
    assert not (out / "run.tif").exists()
    engine = ToyEngine()
    second = _run(stack, out, engine)
    assert (len(second.written), len(second.skipped), len(engine.shapes)) == (3, 2, 3)
    np.testing.assert_array_equal(tifffile.imread(out / "run.tif"), EXPECTED)
    (out / "run" / "0003.png").unlink()
    third = _run(stack, out)
    assert (len(third.written), len(third.skipped)) == (1, 4)
    np.testing.assert_array_equal(tifffile.imread(out / "run.tif"), EXPECTED)
    (out / "run.tif").unlink()
    fourth = _run(stack, out)
    assert (len(fourth.written), fourth.exit_code) == (0, 0)
    np.testing.assert_array_equal(tifffile.imread(out / "run.tif"), EXPECTED)


def test_a_slice_that_fails_is_told_and_no_stack_is_written(tmp_path: Path, stack: Path) -> None:
    class Poisoned(ToyEngine):
        def infer(self, images: Any) -> Prediction:
            if np.array_equal(images[0, 0, :40, :30], SLICES[2]):
                raise UserError("not this one")
            return super().infer(images)

    summary = _run(stack, tmp_path / "out", Poisoned())
    assert [reason for _, reason in summary.failed] == [
        f"{stack}: not this one",
        f"{stack}: 1 of its 5 slices failed, so the stack of labels is not written; correct them and run again",
    ]
    assert not (tmp_path / "out" / "run.tif").exists()
    assert _run(stack, tmp_path / "out").exit_code == 0


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, stack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise UserError("cannot write run.tif: No space left on device; free some space")

    with monkeypatch.context() as patch:
        patch.setattr("hpddrnet_trt.results.stacks.write_tiff_stack", full)
        summary = _run(stack, tmp_path / "out")
    assert (len(summary.written), len(summary.failed)) == (5, 1)
    again = _run(stack, tmp_path / "out")
    assert (len(again.written), len(again.skipped), again.exit_code) == (0, 5, 0)
    assert (tmp_path / "out" / "run.tif").exists()


def test_only_the_first_page_where_asked(tmp_path: Path, stack: Path) -> None:
    summary = _run(stack, tmp_path / "out", stack=False)
    assert len(summary.written) == 1
    with Image.open(tmp_path / "out" / "run.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), EXPECTED[0])


def test_a_folder_as_a_stack(tmp_path: Path) -> None:
    folder = tmp_path / "fib"
    folder.mkdir()
    for number, image in enumerate(SLICES):
        Image.fromarray(image).save(folder / f"slice_{number + 8}.png")
    out = tmp_path / "out"
    single = _run(folder, tmp_path / "single")
    assert (tmp_path / "single" / "slice_10.png").exists(), single
    summary = _run(folder, out, stack=True, spacing_m=1e-8, overlay=False)
    assert (len(summary.written), summary.exit_code) == (5, 0)
    np.testing.assert_array_equal(tifffile.imread(out / "fib.tif"), EXPECTED)
    assert len(_run(folder, out, stack=True, spacing_m=1e-8, overlay=False).skipped) == 5
    Image.fromarray(SLICES[4]).save(folder / "slice_7.png")  # all others move on by one
    longer = _run(folder, out, stack=True, spacing_m=1e-8, overlay=False)
    assert len(longer.written) == 6
    np.testing.assert_array_equal(tifffile.imread(out / "fib.tif"), EXPECTED[[4, 0, 1, 2, 3, 4]])
    Image.fromarray(SLICES[0, :, :-1]).save(folder / "slice_11.png")
    (failed, whole) = _run(folder, out, stack=True, overlay=False, resume=False).failed
    assert "slice 5 of" in failed[1]
    assert "29 x 40 pixels and the first 30 x 40" in failed[1]
    assert "1 of its 6 slices failed" in whole[1]


def test_regions_of_a_stack_are_a_file_a_slice(tmp_path: Path, stack: Path) -> None:
    pytest.importorskip("skimage")
    _run(stack, tmp_path / "out", write=["regions", "tiff"], overlay=False)
    assert (tmp_path / "out" / "run" / f"0005{FORMATS['regions'].ending}").exists()
    assert (tmp_path / "out" / "run.tif").exists()
