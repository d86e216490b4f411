"""`dataset import`: what each program writes comes back pixel by pixel, and every picture is accounted for."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.data.annotations import polygon
from hpddrnet_trt.data.check import check_dataset
from hpddrnet_trt.data.class_names import parse_rule
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.importer import CONTACT_SHEET, FORMATS, ImportReport, ImportSettings, import_folder
from hpddrnet_trt.data.specimens import specimens, split_pictures
from tests.data import annotation_writers as writers
from tests.data.annotation_writers import Pairs, png

Array = npt.NDArray[Any]
CLASSES = ["background", "grain", "pore"]
COLORS = [(0, 0, 0), (255, 0, 0), (0, 160, 255)]
HEIGHT, WIDTH = 48, 64


def label_map(seed: int) -> Array:
    """Blobs of three classes with holes, touching each other and the border."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).random((HEIGHT, WIDTH)), (0, 0), 2)
    return np.digitize(noise, np.quantile(noise, [0.45, 0.8])).astype(np.uint8)


def picture(seed: int) -> Array:
    return np.random.default_rng(seed).integers(20, 230, (HEIGHT, WIDTH)).astype(np.uint8)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return {f"{specimen}_{place}": (picture(seed), label_map(seed))
            for seed, (specimen, place) in enumerate((s, p) for s in ("S1", "S2", "S3") for p in (1, 2))}  # fmt: skip


def imported(source: Path, rules: tuple[str, ...] = (), **settings: Any) -> tuple[FolderDataset, ImportReport]:
    form = settings.pop("form", None)
    options = ImportSettings(rules=tuple(parse_rule(rule) for rule in rules), **settings)
    return import_folder(source, source.parent / "dataset", form=form, settings=options)


def pixels(dataset: FolderDataset) -> dict[str, tuple[Array, Array]]:
    return {sample.name: dataset.load(sample) for split in dataset.splits for sample in dataset.split(split)}


WRITERS: dict[str, tuple[str, Callable[[Path, Pairs], None], tuple[str, ...]]] = {
    "labelme": ("labelme", lambda folder, pairs: writers.labelme(folder, pairs, CLASSES), ()),
    "labelme, Windows": ("labelme", lambda folder, pairs: writers.labelme(folder, pairs, CLASSES, windows=True), ()),
    "labelme, embedded": ("labelme", lambda folder, pairs: writers.labelme(folder, pairs, CLASSES, embed=True), ()),
    "CVAT polygons": ("cvat", lambda folder, pairs: writers.cvat(folder, pairs, CLASSES), ()),
    "CVAT masks": ("cvat", lambda folder, pairs: writers.cvat(folder, pairs, CLASSES, masks=True), ()),
    "CVAT segmentation": ("masks", lambda folder, pairs: writers.cvat_masks(folder, pairs, CLASSES, COLORS), ()),
    "COCO polygons": ("coco", lambda folder, pairs: writers.coco(folder, pairs, CLASSES, "polygons"), ()),
    "COCO runs": ("coco", lambda folder, pairs: writers.coco(folder, pairs, CLASSES, "runs"), ()),
    "COCO compressed": ("coco", lambda folder, pairs: writers.coco(folder, pairs, CLASSES, "compressed"), ()),
    "QuPath": ("qupath", lambda folder, pairs: writers.qupath(folder, pairs, CLASSES), ()),
    "ImageJ": ("imagej", lambda folder, pairs: writers.rois(folder, pairs, CLASSES), ()),
    "colours": (
        "masks", lambda folder, pairs: writers.colored(folder, pairs, COLORS),
        ("#000000=background", "255,0,0=grain", "#00A0FF=pore"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "archive"), [*((kind, False) for kind in WRITERS), ("CVAT polygons", True)])
def test_what_a_program_wrote_comes_back_pixel_by_pixel(tmp_path: Path, pairs: Pairs, kind: str, archive: bool) -> None:
    form, write, rules = WRITERS[kind]
    if kind == "COCO compressed":
        pytest.importorskip("pycocotools")
    if form == "imagej":
        pytest.importorskip("roifile")
    pytest.importorskip("shapely")
    source = tmp_path / "source"
    write(source, pairs)
    if archive:
        shutil.make_archive(str(source), "zip", source)
        shutil.rmtree(source)
        source = source.with_suffix(".zip")
    dataset, report = imported(source, rules)
    assert report.format == form
    assert (report.imported, report.left_out, report.without_labels) == (len(pairs), {}, [])
    assert dataset.class_names == CLASSES
    read = pixels(dataset)
    assert read.keys() == pairs.keys()
    for name, (image, labels) in pairs.items():
        np.testing.assert_array_equal(read[name][0], image)
        np.testing.assert_array_equal(read[name][1], labels)
    assert "by specimen, told by how the names begin (3: S1, S2, S3)" in report.split
    assert {split: len(dataset.split(split)) for split in dataset.splits} == {"train": 2, "val": 2, "test": 2}
    assert dataset.shared_groups("train") == []
    assert (dataset.root / CONTACT_SHEET).is_file()
    assert check_dataset(dataset.root, progress=False).ok


# Shapes


def test_polygons_take_the_pixels_whose_centres_lie_within() -> None:
    shapely = pytest.importorskip("shapely")
    random = np.random.default_rng(3)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    centers = shapely.points(columns.ravel(), rows.ravel())
    for _ in range(20):
        angles = np.sort(random.uniform(0, 2 * np.pi, 9))
        radii = random.uniform(3, 40, (9, 1))  # beyond the border too
        ring = random.uniform(0, 50, 2) + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        top, left, inside = polygon([ring], HEIGHT, WIDTH)
        full = np.zeros((HEIGHT, WIDTH), bool)
        full[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        expected = shapely.contains(shapely.Polygon(ring), centers).reshape(HEIGHT, WIDTH)
        np.testing.assert_array_equal(full, expected)


def test_coco_polygons_are_those_of_pycocotools_but_for_borders() -> None:
    tools = pytest.importorskip("pycocotools.mask")
    shapely = pytest.importorskip("shapely")
    ring = np.array([[5.3, 4.1], [50.7, 9.9], [41.2, 39.5], [30.0, 22.0], [8.8, 44.4]])
    top, left, inside = polygon([ring], HEIGHT, WIDTH)
    own = np.zeros((HEIGHT, WIDTH), bool)
    own[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = tools.decode(tools.frPyObjects([ring.ravel().tolist()], HEIGHT, WIDTH))[..., 0].astype(bool)
    rows, columns = np.nonzero(own != theirs)
    distances = shapely.distance(shapely.Polygon(ring).exterior, shapely.points(columns + 0.5, rows + 0.5))
    assert (distances < 0.5).all()
    assert len(rows) < 20


def drawn(tmp_path: Path, shapes: list[dict[str, Any]], **more: Any) -> tuple[Array, ImportReport, FolderDataset]:
    """A labelme file with these shapes beside a picture of 64 x 48."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(png(picture(1)))
    content = {"imagePath": "a.png", "imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": shapes}
    (source / "a.json").write_text(json.dumps({**content, **more}))
    dataset, report = imported(source)
    return pixels(dataset)["a"][1], report, dataset


def test_labelme_shapes_of_every_kind(tmp_path: Path) -> None:
    mask = np.zeros((3, 4), np.uint8)
    mask[1:, 1:] = 1
    labels, report, dataset = drawn(tmp_path, [
        {"label": "grain", "shape_type": "rectangle", "points": [[20, 30], [2, 3]]},
        {"label": "pore", "shape_type": "circle", "points": [[10, 10], [10, 13]]},
        {"label": "__ignore__", "shape_type": "mask", "points": [[40, 20], [43, 22]],
         "mask": base64.b64encode(png(mask * 255)).decode()},
        {"label": "grain", "shape_type": "line", "points": [[0, 0], [40, 40]]},
        {"label": "grain", "shape_type": "point", "points": [[50, 40]]},
    ])  # fmt: skip
    assert dataset.class_names == ["background", "grain", "pore"]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[3:30, 2:20] = 1
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    expected[(rows - 10) ** 2 + (columns - 10) ** 2 <= 9] = 2
    expected[21:23, 41:44] = 255
    np.testing.assert_array_equal(labels, expected)
    assert "not drawn, as no area of a class: 1 x line, 1 x point" in report.notes
    assert any("pixels are covered by shapes of two classes: the upper one counts" in note for note in report.notes)


def test_rois_of_every_kind(tmp_path: Path) -> None:
    roifile = pytest.importorskip("roifile")
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(png(picture(1)))

    def roi(kind: str, box: tuple[int, int, int, int], name: str, **more: Any) -> Any:
        made = roifile.ImagejRoi()
        made.roitype, made.name = roifile.ROI_TYPE[kind], name
        made.left, made.top, made.right, made.bottom = box
        for key, value in more.items():
            setattr(made, key, value)
        return made

    steps = np.array([0, 30, 5, 1, 50, 5, 1, 50, 25, 1, 30, 25, 4, 0, 35, 10, 1, 35, 20, 1, 45, 20, 1, 45, 10, 4.0])
    composite = roi("RECT", (30, 5, 50, 25), "", shape_roi_size=len(steps), multi_coordinates=steps.astype(np.float32))
    composite.props = "class: grain\nregion: 1\n"
    roifile.roiwrite(source / "a_rois.zip", [
        composite, roi("RECT", (2, 2, 12, 8), "0001-pore"), roi("OVAL", (10, 30, 20, 40), "pore_2"),
        roi("RECT", (60, 40, 64, 48), "0012-0034", group=3), roi("LINE", (0, 0, 5, 5), "line"),
        roi("RECT", (0, 40, 4, 48), "pore", position=7),
    ])  # fmt: skip
    dataset, report = imported(source)
    assert dataset.class_names == ["background", "grain", "group 3", "pore"]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[5:25, 30:50] = 1
    expected[10:20, 35:45] = 0
    expected[40:48, 60:64] = 2
    expected[2:8, 2:12] = 3
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    expected[(rows - 35) ** 2 + (columns - 15) ** 2 <= 25] = 3
    np.testing.assert_array_equal(pixels(dataset)["a"][1], expected)
    assert "not drawn, as no area of a class: 1 x ROI of the type line, 1 x ROI of another slice" in report.notes


def test_cvat_boxes_ellipses_and_cut_masks(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(png(picture(1)))
    (source / "annotations.xml").write_text(
        '<annotations><version>1.1</version><meta><task><labels><label><name>grain</name><color>#ff0000</color></label>'
        '<label><name>Background</name></label><label><name>crack</name></label></labels></task></meta>'
        '<image id="0" name="set\\a.png" width="64" height="48">'
        '<box label="grain" xtl="10" ytl="10" xbr="20" ybr="14" rotation="90" z_order="1"/>'
        '<ellipse label="Background" cx="40" cy="20" rx="8" ry="4" rotation="90" z_order="0"/>'
        '<mask label="grain" rle="0, 4" left="62" top="46" width="2" height="2" z_order="0"/>'
        '<polyline label="crack" points="0,0;5,5" z_order="0"/></image></annotations>'
    )  # fmt: skip
    dataset, report = imported(source)
    assert dataset.class_names == ["background", "grain"]
    assert dataset.palette[1] == (255, 0, 0)
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[7:17, 13:17] = 1
    expected[46:, 62:] = 1
    np.testing.assert_array_equal(pixels(dataset)["a"][1], expected)
    assert "named by the source but nowhere drawn: crack" in report.notes


def test_runs_that_do_not_fill_their_picture_are_left_out(tmp_path: Path, pairs: Pairs) -> None:
    writers.coco(tmp_path / "source", pairs, CLASSES, "runs")
    path = tmp_path / "source" / "instances_default.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"]["counts"] = "zz"
    content["annotations"][3]["segmentation"]["size"] = [10, 10]
    content["images"][2]["width"] = 640
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 2]
    path.write_text(json.dumps(content))
    _, report = imported(tmp_path / "source")
    assert report.imported == 3
    first, second, third = report.left_out.values()
    assert "the runs of a mask make 20 pixels, not 64 x 48" in first
    assert "[10, 10] rows and columns, its picture [48, 64]" in second
    assert "drawn on a picture of 640 x 48 pixels, this one has 64 x 48" in third


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every container within a JSON document with each of its keys."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [pair for key in keys for pair in [(node, key), *places(node[key])]]


@pytest.mark.parametrize("kind", ["labelme", "COCO runs", "COCO polygons", "QuPath"])
def test_damaged_annotations_never_give_a_traceback(tmp_path: Path, pairs: Pairs, kind: str) -> None:
    pytest.importorskip("shapely")
    WRITERS[kind][1](tmp_path / "source", {"a": pairs["S1_1"]})
    (path,) = (path for path in (tmp_path / "source").iterdir() if path.suffix.endswith("json"))
    text = path.read_text()
    random = np.random.default_rng(0)
    for junk in (None, -1, 1e300, float("inf"), "x", [], {}, [[1]], 10**20):
        content = json.loads(text)
        # Points are most of a document: of each kind of place as many.
        by_kind: dict[str, list[tuple[Any, Any]]] = {}
        for node, key in places(content):
            by_kind.setdefault(str(key) if isinstance(node, dict) else "item", []).append((node, key))
        chosen = by_kind[str(random.choice(sorted(by_kind)))]
        node, key = chosen[int(random.integers(len(chosen)))]
        node[key] = junk
        path.write_text(json.dumps(content))
        with contextlib.suppress(UserError):
            _, report = imported(tmp_path / "source")
            assert report.imported + len(report.left_out) + len(report.without_labels) >= 1
        shutil.rmtree(tmp_path / "dataset", ignore_errors=True)


# Masks


def mask_folder(tmp_path: Path, masks: dict[str, Array], names: str = "{}_mask.png") -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for place, (name, values) in enumerate(masks.items()):
        (source / f"{name}.tif").parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(source / f"{name}.tif", picture(place))
        path = source / names.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(values)) if path.suffix == ".png" else tifffile.imwrite(path, values)
    return source


@pytest.mark.parametrize("names", ["{}_mask.png", "{}.png", "{}-labels.tif", "masks/{}.png", "train_annot/{}_seg.png"])
def test_masks_are_found_by_folder_and_name(tmp_path: Path, names: str) -> None:
    masks = {f"a{number}": (label_map(number) > 0).astype(np.uint8) * 255 for number in range(3)}
    dataset, report = imported(mask_folder(tmp_path, masks, names), ("255=pore",) if "seg" in names else ())
    assert report.imported == 3
    assert dataset.class_names == ["background", "pore" if "seg" in names else "foreground"]
    for number in range(3):
        np.testing.assert_array_equal(pixels(dataset)[f"a{number}"][1], label_map(number) > 0)
    if "seg" not in names:
        assert "0 and 255 are taken as background and foreground; --class 255=NAME names it" in report.notes


def test_colours_without_names_are_shown_and_not_guessed(tmp_path: Path, pairs: Pairs) -> None:
    source = tmp_path / "source"
    writers.colored(source, pairs, COLORS)
    with pytest.raises(UsageError) as refused:
        imported(source)
    assert "found the colours #000000 (44.99%), #00a0ff (20.02%), #ff0000 (34.99%)" in str(refused.value)
    assert "--class '#000000=background' --class '#00a0ff=class 1' --class '#ff0000=class 2'" in str(refused.value)
    assert not (tmp_path / "dataset").exists()
    asked: list[str] = []
    dataset, _ = import_folder(source, tmp_path / "dataset", confirm=lambda text: not asked.append(text))
    assert dataset.class_names == ["background", "class 1", "class 2"]
    assert "found the colours" in asked[0]


def test_a_colour_that_is_not_named_is_refused_or_the_nearest(tmp_path: Path, pairs: Pairs) -> None:
    source = tmp_path / "source"
    writers.colored(source, pairs, COLORS)
    with pytest.raises(UsageError, match=r"nothing names #00a0ff \(20.02% of the pixels\); add --class"):
        imported(source, ("#ff0000=grain",))
    dataset, report = imported(source, ("#ff0000=grain", "#0000ff=pore"), nearest=True)
    assert "taken as the nearest class: #00a0ff (20.02% of the pixels)" in report.notes
    np.testing.assert_array_equal(pixels(dataset)["S1_1"][1], np.array([0, 1, 2])[label_map(0)])


def test_masks_saved_as_jpeg(tmp_path: Path) -> None:
    source = mask_folder(tmp_path, {"a": label_map(0), "b": label_map(1)})
    for name in "ab":
        with Image.open(source / f"{name}_mask.png") as image:
            Image.fromarray(np.array(COLORS, np.uint8)[np.array(image)]).save(source / f"{name}_mask.jpg", quality=95)
        (source / f"{name}_mask.png").unlink()
    with pytest.raises(BadInputFile, match=r"a_mask\.jpg is a JPEG, which alters colours and values; save it as PNG"):
        imported(source)
    rules = ("#000000=background", "#ff0000=grain", "#00a0ff=pore")
    dataset, report = imported(source, rules, nearest=True)
    assert any(note.startswith("taken as the nearest class: #") for note in report.notes)
    assert np.mean(pixels(dataset)["a"][1] == label_map(0)) > 0.9


def test_colours_on_a_transparent_layer_and_painted_over_the_picture(tmp_path: Path) -> None:
    layer = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    layer[label_map(0) == 1] = (255, 0, 0, 255)
    painted = np.repeat(picture(5)[..., None], 3, axis=2)
    painted[label_map(1) == 1] = (255, 0, 0)
    dataset, _ = imported(mask_folder(tmp_path, {"a": layer, "b": painted}), ("#ff0000=grain",))
    assert dataset.class_names == ["background", "grain"]
    np.testing.assert_array_equal(pixels(dataset)["a"][1], label_map(0) == 1)
    np.testing.assert_array_equal(pixels(dataset)["b"][1], label_map(1) == 1)


def test_half_transparent_borders_are_refused(tmp_path: Path) -> None:
    layer = np.full((HEIGHT, WIDTH, 4), 255, np.uint8)
    layer[:10, :, 3], layer[10:12, :, 3] = 0, 90
    with pytest.raises(BadInputFile, match=r"a_mask\.png is half transparent in places; save it without smoothing"):
        imported(mask_folder(tmp_path, {"a": layer}))


def test_rgb_masks_without_colour_and_palettes_that_differ(tmp_path: Path) -> None:
    grey = {"a": np.repeat(label_map(0)[..., None], 3, axis=2), "b": label_map(1).astype(np.uint16)}
    dataset, report = imported(mask_folder(tmp_path, grey))
    assert dataset.class_names == ["class 0", "class 1", "class 2"]
    np.testing.assert_array_equal(pixels(dataset)["b"][1], label_map(1))
    assert "the values 0 to 2 are taken as classes without names; --class 1=NAME names one" in report.notes
    shutil.rmtree(tmp_path / "dataset")
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        image = Image.fromarray(np.argsort(order).astype(np.uint8)[label_map(ord(name) - ord("a"))])
        image.putpalette([value for index in order for value in COLORS[index]])
        image.save(tmp_path / "source" / f"{name}_mask.png")
    dataset, report = imported(tmp_path / "source", ("#000000=background", "#ff0000=grain", "#00a0ff=pore"))
    np.testing.assert_array_equal(pixels(dataset)["b"][1], label_map(1))
    shutil.rmtree(tmp_path / "dataset")
    with pytest.raises(UsageError, match="found the colours #000000"):
        imported(tmp_path / "source")


def test_numbers_of_objects_are_not_classes(tmp_path: Path) -> None:
    numbers = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) // 8
    source = mask_folder(tmp_path, {"a": numbers, "b": numbers.T.reshape(HEIGHT, WIDTH)}, "{}-labels.tif")
    with pytest.raises(UsageError, match=r"hold 384 different values .* are they numbers of objects") as refused:
        imported(source)
    assert "--class 0=background --class 1-383=NAME" in str(refused.value)
    dataset, _ = imported(source, ("0=background", "1-65535=grain"))
    np.testing.assert_array_equal(pixels(dataset)["a"][1], numbers > 0)


def test_values_that_are_neither_numbered_nor_0_and_255(tmp_path: Path) -> None:
    source = mask_folder(tmp_path, {"a": label_map(0) * np.uint8(127)})
    with pytest.raises(UsageError, match=r"found the values 0 .* --class '127=class 1' --class '254=class 2'"):
        imported(source)


# What becomes of every picture


def test_every_file_is_accounted_for_and_none_is_changed(tmp_path: Path) -> None:
    masks = {name: (label_map(seed) > 0).astype(np.uint8) for seed, name in enumerate("abcdef")}
    source = mask_folder(tmp_path, masks)
    tifffile.imwrite(source / "b_mask.png", np.zeros((10, 10), np.uint8))  # another size
    (source / "c_mask.png").unlink()  # a picture without mask
    (source / "d.tif").unlink()  # a mask without picture
    (source / "e.tif").write_bytes(b"II*\0 broken")
    shutil.copy(source / "f.tif", source / "g.tif")  # one picture, two names
    shutil.copy(source / "f_mask.png", source / "g_mask.png")
    shutil.copy(source / "f.tif", source / "F.TIFF")  # two pictures of one name, where case does not count
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    dataset, report = imported(source)
    assert sorted(pixels(dataset)) == ["a", "g"]
    assert report.without_labels == ["c.tif"]
    reasons = {
        "b.tif, b_mask.png": "the mask has 10 x 10 pixels, the picture 64 x 48",
        "d_mask.png": "a mask without a picture of its name",
        "F.TIFF": "F.TIFF and f.tif and f_mask.png have one name; keep one picture and one mask",
    }
    for name, reason in reasons.items():
        assert reason in report.left_out[name]
    assert "e.tif cannot be decoded" in report.left_out["e.tif, e_mask.png"]
    mentioned = " ".join([*report.left_out, *report.without_labels, "a.tif a_mask.png g.tif g_mask.png"])
    assert all(name in mentioned for name in before)
    assert "2 imported, 6 left out, 1 without labels" in report.text()
    stated = json.loads((dataset.root / "dataset.json").read_text())
    assert stated["imported"]["left_out"] == report.left_out
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    with pytest.raises(UsageError, match="exists and is not an empty folder"):
        imported(source)


def test_one_picture_under_two_names_is_imported_once(tmp_path: Path) -> None:
    masks = {name: (label_map(seed) > 0).astype(np.uint8) for seed, name in enumerate("abc")}
    source = mask_folder(tmp_path, masks)
    shutil.copy(source / "a.tif", source / "c.tif")
    dataset, report = imported(source)
    assert sorted(pixels(dataset)) == ["a", "b"]
    assert report.left_out == {"c.tif, c_mask.png": "the same picture is imported with a.tif, a_mask.png"}


@pytest.mark.parametrize("rows", [48, 40])
def test_masks_with_and_without_the_rows_of_the_information_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr("hpddrnet_trt.data.micrograph.find_info_bar", lambda pixels: 40)
    source = mask_folder(tmp_path, {"a": label_map(0)[:rows]})
    dataset, _ = import_folder(source, tmp_path / "dataset")
    (sample,) = dataset.split("train")
    with Image.open(sample.mask) as image:
        np.testing.assert_array_equal(np.array(image), label_map(0)[:40])


def test_pictures_that_the_annotation_was_not_drawn_on(tmp_path: Path, pairs: Pairs) -> None:
    source = tmp_path / "source"
    writers.labelme(source, pairs, CLASSES)
    image = Image.fromarray(pairs["S1_1"][0])
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn: viewers, and labelme with them, show 48 x 64
    image.save(source / "S1_1.png", exif=exif)
    (source / "S1_2.png").unlink()
    (source / "S2_1.json").write_text('{"imagePath": "S2_1.png", "shapes": [{"label": "grain"}]}')
    (source / "S2_2.json").write_text('{"imagePath": ')
    _, report = imported(source)
    assert report.imported == 2
    assert "drawn on a picture of 64 x 48 pixels, this one has 48 x 64" in report.left_out["S1_1.json, S1_1.png"]
    assert "its picture S1_2.png is not there; add it, or say where with --images" in report.left_out["S1_2.json"]
    assert report.left_out["S2_1.json"] == "not as its program writes it (KeyError: 'points'); save it again"
    assert "it is no JSON in UTF-8" in report.left_out["S2_2.json"]
    assert report.without_labels == ["S2_1.png", "S2_2.png"]


def test_pictures_elsewhere_and_pictures_on_which_nothing_is_drawn(tmp_path: Path, pairs: Pairs) -> None:
    source = tmp_path / "source"
    writers.labelme(source, pairs, CLASSES)
    (tmp_path / "elsewhere").mkdir()
    for path in source.glob("*.png"):
        path.rename(tmp_path / "elsewhere" / path.name)
    content = json.loads((source / "S1_1.json").read_text())
    (source / "S1_1.json").write_text(json.dumps({**content, "shapes": []}))
    _, report = imported(source, images=tmp_path / "elsewhere")
    assert report.imported == 5
    assert report.without_labels == ["S1_1.png (nothing is drawn on it; --keep-empty takes it as background)"]
    shutil.rmtree(tmp_path / "dataset")
    dataset, _ = imported(source, images=tmp_path / "elsewhere", keep_empty=True)
    assert not pixels(dataset)["S1_1"][1].any()


# Specimens and splits


@pytest.mark.parametrize(
    ("paths", "rule", "groups", "how"),
    [
        (["A/1.png", "A/2.png", "B/1.png", "B/2.png"], None, ["A", "A", "B", "B"], "told by the folders (2: A, B)"),
        (["11_10_a", "11_11_b", "12_1_a", "12_2_a", "13_1", "13_2"], None, ["11", "11", "12", "12", "13", "13"],
         "told by how the names begin (3: 11, 12, 13)"),
        (["sample-a_01", "sample-a_02", "sample-b_01", "sample-b_02"], None, ["sample-a"] * 2 + ["sample-b"] * 2,
         "told by how the names begin (2: sample-a, sample-b)"),
        ([f"image_{number:03}" for number in range(20)], None, [], "neither folders nor names tell specimens"),
        (["x1q", "y1q", "x2q"], "([0-9])", ["1", "1", "2"], "as --specimen ([0-9]) finds it"),
        (["A/1.png", "A/2.png", "B/1.png", "B/2.png"], "none", [], "by picture, as told"),
    ],
)  # fmt: skip
def test_specimens(paths: list[str], rule: str | None, groups: list[str], how: str) -> None:
    found, sentence = specimens(paths, rule)
    assert [found[path] for path in paths if path in found] == groups
    assert how in sentence


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([20], (20, 0, 0)), ([5, 3], (5, 3, 0)), ([9, 1, 1, 1, 1], (9, 2, 2)), ([1] * 20, (14, 3, 3)),
        ([1, 1], (1, 1, 0)), ([8, 4, 4, 4, 4, 4], (20, 4, 4)),
    ],
)
def test_splits_keep_specimens_together(sizes: list[int], expected: tuple[int, int, int]) -> None:
    groups = {f"{group}/{place}": str(group) for group, size in enumerate(sizes) for place in range(size)}
    splits = split_pictures(groups)
    assert tuple(list(splits.values()).count(split) for split in ("train", "val", "test")) == expected
    assert len({(groups[picture], split) for picture, split in splits.items()}) == len(sizes)


def test_a_split_that_the_source_has_is_kept(tmp_path: Path) -> None:
    masks = {f"{split}/a{place}": (label_map(place) > 0).astype(np.uint8) for place, split in
             enumerate(("training", "training", "valid", "test"))}  # fmt: skip
    dataset, report = imported(mask_folder(tmp_path, masks))
    assert report.split == "as the source has it"
    assert {split: len(dataset.split(split)) for split in dataset.splits} == {"train": 2, "val": 1, "test": 1}


# Wrong usage: one sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "new"], "nowhere does not exist"),
        (["empty", "new"], "empty holds no picture with labels, read as masks; give pictures with their masks"),
        (["masks", "masks/new"], "lies within masks, which is not changed"),
        (["masks", "masks"], "exists and is not an empty folder"),
        (["masks", "new", "--format", "voc"], "'voc' is not one of 'labelme', 'cvat'"),
        (["masks", "new", "--format", "coco"], "holds no picture with labels, read as coco"),
        (["masks", "new", "--class", "pore"], "--class takes WHAT=NAME"),
        (["masks", "new", "--class", "3=pore"], "nothing names 1"),
        (["masks", "new", "--class", "0=pore", "--class", "1=pore"], "2 to 32 classes are needed, the source has 1"),
        (["masks", "new", "--specimen", "("], "is no regular expression"),
        (["masks", "new", "--specimen", "^S"], "finds nothing in a.tif"),
        (["masks", "new", "--images", "nowhere"], "nowhere does not exist"),
        (["both", "new"], "both holds labelme and coco; say with --format"),
        (["a.txt", "new"], "a.txt is neither a folder nor a ZIP or TAR archive"),
        (["video", "new"], "holds tracks of a video; export the task as 'CVAT for images 1.1'"),
    ],
)
def test_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str],
    sentence: str,
) -> None:
    from hpddrnet_trt import cli

    monkeypatch.chdir(tmp_path)
    mask_folder(tmp_path, {"a": (label_map(0) > 0).astype(np.uint8)}).rename("masks")
    for name in ("empty", "both", "video"):
        Path(name).mkdir()
    Path("a.txt").write_text("no archive")
    Path("both/a.json").write_text('{"imagePath": "a.png", "shapes": []}')
    Path("both/b.json").write_text('{"images": [], "annotations": [], "categories": []}')
    Path("video/annotations.xml").write_text("<annotations><track id='0'/></annotations>")
    before = sorted(map(str, Path().rglob("*")))
    monkeypatch.setattr("sys.argv", ["hpddrnet-trt", "dataset", "import", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code in (1, 2)
    assert sentence in error
    assert "Traceback" not in error
    assert sorted(map(str, Path().rglob("*"))) == before


def test_the_command_lists_all_formats() -> None:
    from hpddrnet_trt.cli.data import ImportFormat

    assert get_args(ImportFormat) == tuple(FORMATS)


def test_pictures_of_one_name_in_folders_of_specimens(tmp_path: Path, pairs: Pairs) -> None:
    for specimen, (first, second) in {"A": ("S1_1", "S1_2"), "B": ("S2_1", "S2_2")}.items():
        writers.labelme(tmp_path / "source" / specimen, {"1": pairs[first], "2": pairs[second]}, CLASSES, embed=True)
    dataset, report = imported(tmp_path / "source")
    assert sorted(pixels(dataset)) == ["A-1", "A-2", "B-1", "B-2"]
    np.testing.assert_array_equal(pixels(dataset)["B-2"][1], pairs["S2_2"][1])
    assert "by specimen, told by the folders (2: A, B); 2 train, 2 val, 0 test" in report.split
    assert [sample.group for sample in dataset.split("val")] in (["A", "A"], ["B", "B"])


def test_coco_split_by_files_and_labels_without_a_name(tmp_path: Path, pairs: Pairs) -> None:
    for split, names in {"train": ("S1_1", "S1_2"), "valid": ("S2_1",), "test": ("S3_1",)}.items():
        of_split = {name: pairs[name] for name in names}
        writers.coco(tmp_path / "source" / split, of_split, ["background", "", "Pore"], "runs")
    dataset, report = imported(tmp_path / "source")
    assert report.split == "as the source has it"
    assert [sample.name for sample in dataset.split("val")] == ["S2_1"]
    assert dataset.class_names == ["background", "nameless", "Pore"]
