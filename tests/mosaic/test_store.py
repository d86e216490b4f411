"""The store of a mosaic: read with zarr itself, checked by two libraries that know the standard, killed in between."""

from __future__ import annotations

import errno
import json
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.mosaic.create import create_store
from hpddrnet_trt.mosaic.layout import CELL, NO_DATA, Box
from hpddrnet_trt.mosaic.sources import open_source
from hpddrnet_trt.mosaic.store import MosaicStore, majority, open_store
from hpddrnet_trt.mosaic.summary import summarize
from tests.mosaic.mosaics import BLOCK, SETTINGS, SIZE, block, grey, labels_of, layout_of
from tests.toy import CLASSES, DOMAIN, ToyEngine

zarr = pytest.importorskip("zarr")
pytest.importorskip("ome_zarr")
# ome-zarr still has a class that it deprecates as default of an argument.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated class Scaler:DeprecationWarning")

SHAPE = (1, 700, 1000)
LABELS = labels_of(SHAPE)
ORIGIN = {"model": "toy", "command": "hpddrnet-trt mosaic a.zarr"}


def _create(target: Path | None, source: Any = None, *, name: str = "classes", **options: Any) -> MosaicStore:
    source = source or grey(SHAPE)
    settings = options.pop("settings", SETTINGS)
    manifest = ToyEngine().manifest.model_copy(update={"domain": DOMAIN})
    return create_store(target, name, source, layout_of(source.shape), settings, manifest, ORIGIN, **options)


def _fill(store: MosaicStore, labels: np.ndarray = LABELS) -> None:
    for box in store.layout:
        store.write(block(box, labels))
    _end(store)


def _end(store: MosaicStore) -> None:
    for part in store.smooth_parts():
        store.write_smoothed(part)
    for level in range(1, len(store.factors)):
        for part in store.pyramid_parts(level):
            store.write_pyramid_part(level, part)
    store.finish(summarize(store.records(), CLASSES, SIZE, len(store.layout)), {"finished": "now"})


def _image(folder: Path, factors: tuple[int, ...] = (1, 2, 4), version: int = 3, **about: Any) -> Path:
    """An OME-Zarr image in nanometres that does not begin at the origin."""
    group = zarr.open_group(str(folder), mode="w", zarr_format=version)
    datasets = []
    for level, factor in enumerate(factors):
        names = {"dimension_names": ("c", "y", "x")} if version == 3 else {}
        shape = (1, SHAPE[1] // factor, SHAPE[2] // factor)
        group.create_array(str(level), shape=shape, dtype="uint8", chunks=(1, 99, 99), **names)
        steps = [{"type": "scale", "scale": [1, 25 * factor, 25 * factor]},
                 {"type": "translation", "translation": [0, 100, 300]}]  # fmt: skip
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    axes = [{"name": "c", "type": "channel"}, *({"name": name, "type": "space", "unit": "nanometer"} for name in "yx")]
    multiscale = {"axes": axes, "datasets": datasets, "name": "sem", **about}
    described = {"multiscales": [multiscale]}
    group.attrs.update({"ome": {"version": "0.5", **described}} if version == 3 else described)
    return folder


def _valid(path: Path, *groups: str) -> None:
    models, yaozarrs = pytest.importorskip("ome_zarr_models"), pytest.importorskip("yaozarrs")
    root = zarr.open_group(str(path), mode="r")
    for group in groups:
        yaozarrs.validate_zarr_store(str(path / group))
        models.open_ome_zarr(root[group] if group else root)


def _scale(group: Any, level: int = 0) -> list[dict[str, Any]]:
    return group.attrs["ome"]["multiscales"][0]["datasets"][level]["coordinateTransformations"]


def test_a_folder_of_its_own_is_the_label_image(tmp_path: Path) -> None:
    store = pickle.loads(pickle.dumps(_create(tmp_path / "a.ome.zarr")))
    assert next(iter(store.records()), None) is None
    _fill(store)
    root = zarr.open_group(str(tmp_path / "a.ome.zarr"), mode="r")
    assert np.array_equal(root["0"][:], LABELS[0])
    assert np.array_equal(root["1"][:], LABELS[0, ::2, ::2])
    assert root["0"].fill_value == NO_DATA
    assert root["0"].shards == (BLOCK, BLOCK)
    assert _scale(root) == [{"type": "scale", "scale": [0.05, 0.05]}]
    assert _scale(root, 1) == [{"type": "scale", "scale": [0.1, 0.1]}]
    described = root.attrs["ome"]["image-label"]
    assert described["colors"][-1] == {"label-value": NO_DATA, "rgba": [0, 0, 0, 0]}
    assert described["properties"][1] == {"label-value": 1, "class": "pore"}
    assert "source" not in described
    own = root.attrs["hpddrnet-trt"]
    assert own["classes"] == [entry.name for entry in CLASSES]
    assert own["provenance"] == {**ORIGIN, "source": "memory.zarr", "finished": "now"}
    assert own["mosaic"]["complete"]
    assert own["mosaic"]["summary"]["fractions"][0]["pixels"] == np.count_nonzero(LABELS == 0)
    made_with = {**SETTINGS.as_dict(), "shape": SHAPE, "smooth_slices": 1, "pixel_size_m": SIZE, "spacing_m": None}
    assert own["mosaic"]["settings"] == json.loads(json.dumps(made_with))
    # The middle of a map's first pixel is that of its cell.
    assert _scale(root["distance"]) == [
        {"type": "scale", "scale": pytest.approx([CELL * 0.05] * 2)},
        {"type": "translation", "translation": pytest.approx([(CELL - 1) / 2 * 0.05] * 2)},
    ]
    rows, columns = np.indices((11, 16))
    assert np.array_equal(root["distance/0"][:], rows)
    assert np.array_equal(root["confidence/0"][:], columns)
    assert np.array_equal(store.read(Box(0, 100, 200, 50, 60)), LABELS[0, 100:150, 200:260])
    assert store.beside(".areas.csv") == tmp_path / "a.areas.csv"
    _valid(tmp_path / "a.ome.zarr", "", "distance", "confidence")


def test_in_the_store_of_the_image(tmp_path: Path) -> None:
    """Units, place and number of levels are the image's, and other labels in it stay."""
    path = _image(tmp_path / "sem.zarr")
    source = open_source(path)
    _fill(_create(None, source, name="other"))
    store = _create(None, source)
    _fill(store)
    root = zarr.open_group(str(path), mode="r")
    assert root["labels"].attrs["ome"] == {"version": "0.5", "labels": ["other", "classes"]}
    labels = root["labels/classes"]
    assert np.array_equal(labels["2"][:], LABELS[0, ::4, ::4])
    assert labels.attrs["ome"]["image-label"]["source"] == {"image": "../../"}
    assert [axis["unit"] for axis in labels.attrs["ome"]["multiscales"][0]["axes"]] == ["nanometer"] * 2
    assert _scale(labels, 1) == [
        {"type": "scale", "scale": [50, 50]}, {"type": "translation", "translation": [100, 300]}
    ]  # fmt: skip
    assert _scale(labels["distance"])[1]["translation"] == [100 + 31.5 * 25, 300 + 31.5 * 25]
    assert store.root == path
    assert store.beside(".areas.csv") == tmp_path / "sem.classes.areas.csv"
    assert open_store(store.folder) == store
    _valid(path, "", "labels", "labels/classes", "labels/classes/distance")


def test_an_image_of_one_level_gets_labels_of_one(tmp_path: Path) -> None:
    path = _image(tmp_path / "sem.zarr", (1,), coordinateTransformations=[{"type": "scale", "scale": [1, 2, 2]}])
    store = _create(None, open_source(path))
    assert store.factors == (1,)
    assert _scale(zarr.open_group(str(store.folder), mode="r"))[0]["scale"] == [50, 50]
    _valid(path, "")


def test_what_stands_consolidated_knows_the_labels(tmp_path: Path) -> None:
    path = _image(tmp_path / "sem.zarr")
    with pytest.warns(zarr.errors.ZarrUserWarning, match="Consolidated"):
        zarr.consolidate_metadata(str(path))
    _fill(_create(None, open_source(path)))
    own = zarr.open_group(str(path), mode="r")["labels/classes"].attrs["hpddrnet-trt"]
    assert own["mosaic"]["complete"]


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("old", {}, "is no OME-Zarr of version 0.5, and older ones cannot hold its labels; write elsewhere with --to"),
        ("tiff", {}, "is no OME-Zarr 0.5, so no labels can be in it; write elsewhere with --to"),
        ("full", {}, "is no OME-Zarr 0.5, so no labels can be in it; take another place for --to"),
        ("small", {}, "has 500 x 350 pixels, and the mosaic 1000 x 700 pixels, .*; take another place for --to"),
        ("group", {}, "holds no image of OME-Zarr 0.4 or 0.5"),
        ("senseless axes", {}, "the metadata of the OME-Zarr image .* make no sense"),
        ("senseless steps", {}, "the metadata of the OME-Zarr image .* make no sense"),
        ("broken", {}, "is no Zarr group that can be read"),
        ("foreign", {}, "were not written by this command, and stay; take another --name"),
        ("foreign", {"overwrite": True}, "were not written by this command, and stay"),
        ("new", {"name": "../x"}, "not '../x'; take another --name"),
        ("new", {"smooth": 4}, "an odd number of slices votes, such as 3 or 5, not 4"),
        ("new", {"smooth": 3}, "has one slice"),
    ],
)
def test_where_labels_cannot_be(tmp_path: Path, kind: str, options: dict[str, Any], said: str) -> None:
    path, target = tmp_path / "a.zarr", tmp_path / "a.zarr"
    if kind == "old":
        target = _image(path, version=2)
    elif kind == "tiff":
        path.write_bytes(b"II")
    elif kind == "full":
        path.mkdir()
        (path / "mine.txt").write_text("x")
    elif kind == "group":
        zarr.open_group(str(path), mode="w", zarr_format=3)
    elif kind == "broken":
        path.mkdir()
        (path / "zarr.json").write_text("{")
    elif kind == "small":
        _image(path, (2,))
    elif kind == "senseless axes":
        _image(path, axes=["x"])
    elif kind == "senseless steps":
        _image(path, coordinateTransformations=[{"type": "scale", "scale": [1, 2]}])
    elif kind == "foreign":
        group = zarr.open_group(str(_image(path)), mode="r+")
        group.create_group("labels/classes").attrs["mine"] = True
    source = open_source(path) if kind == "old" else grey(SHAPE, path=path if kind == "tiff" else Path("b.tif"))
    before = _content(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        _create(None if kind in ("old", "tiff") else target, source, **options)
    assert "\n" not in str(caught.value)
    assert _content(tmp_path) == before


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_goes_on_with_the_same_settings_only(tmp_path: Path) -> None:
    first, *others = (store := _create(tmp_path / "a")).layout
    store.write(block(first, LABELS))
    torn = tmp_path / "a/0/c/0/1.123.partial"
    torn.write_bytes(b"half")
    again = _create(tmp_path / "a", settings=replace(SETTINGS, model="moved.onnx"))
    assert not torn.exists()
    assert [record.block for record in again.records()] == [first]
    assert again.done(first)
    assert not again.done(others[0])
    with pytest.raises(UsageError, match=r"\(threads 1, not 2; window \[0.0, 255.0\], not \[3, 255\]\)"):
        _create(tmp_path / "a", settings=replace(SETTINGS, window=(3, 255), threads=2))
    assert _create(tmp_path / "a", settings=replace(SETTINGS, threads=2), overwrite=True).record(first) is None
    _create(tmp_path / "b", grey(SHAPE, pixel_size_m=None))
    with pytest.raises(UsageError, match="pixel_size_m None, not 5e-08"):
        _create(tmp_path / "b")


def test_a_block_that_is_done_again_takes_what_was_made_of_it_with_it(tmp_path: Path) -> None:
    store = _create(tmp_path / "a")
    _fill(store)
    assert store.pyramid_parts(1) == []
    changed = labels_of(SHAPE, seed=1)
    box = Box(0, BLOCK, 2 * BLOCK, BLOCK, BLOCK)
    store.write(block(box, changed))
    assert store.pyramid_parts(1) == [Box(0, 0, BLOCK, BLOCK, 500 - BLOCK)]
    _end(store)
    expected = LABELS[0].copy()
    expected[box.rows, box.columns] = changed[0][box.rows, box.columns]
    root = zarr.open_group(str(tmp_path / "a"), mode="r")
    assert np.array_equal(root["1"][:], expected[::2, ::2])


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a shard is written when the disk is full: the block is not done, and one sentence says what to do."""
    from zarr.storage import _local

    store, real = _create(tmp_path / "a"), _local._put
    first, second = list(store.layout)[:2]
    store.write(block(first, LABELS))

    def full(path: Path, value: Any, *rest: Any, **options: Any) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_local, "_put", full)
    for _ in range(2):  # one that is new, and one that was done
        with pytest.raises(UserError, match=r"No space left on device; free some space.* run the same command again"):
            store.write(block(second, LABELS))
        assert not store.done(second)
        second = first
    monkeypatch.setattr(_local, "_put", real)
    _fill(store)
    assert np.array_equal(zarr.open_array(str(tmp_path / "a/0"), mode="r")[:], LABELS[0])


WRITER = """
import sys, itertools
from pathlib import Path
from hpddrnet_trt.mosaic.sources import open_source
from hpddrnet_trt.mosaic.store import open_store
from tests.mosaic.mosaics import block, labels_of
store = open_store(Path(sys.argv[1]))
labels = labels_of(store.layout.shape)
for _ in itertools.count():
    for box in store.layout:
        store.write(block(box, labels))
        print(box.name, flush=True)
"""


def test_a_writer_that_is_killed(tmp_path: Path) -> None:
    """Wherever it is killed, blocks with a record have all their labels, and the rest is done again."""
    store = _create(tmp_path / "a")
    for moment in (0.0, 0.007):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, store.folder], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(5):
            assert writer.stdout.readline()
        time.sleep(moment)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        store = _create(tmp_path / "a")
        records = list(store.records())
        assert len(records) >= 4
        for record in records:
            box = record.block
            assert np.array_equal(store.read(box), LABELS[0][box.rows, box.columns])
    for box in store.layout:
        if not store.done(box):
            store.write(block(box, LABELS))
    _end(store)
    assert np.array_equal(zarr.open_array(str(tmp_path / "a/0"), mode="r")[:], LABELS[0])
    assert not list((tmp_path / "a").rglob("*.partial"))


def test_a_torn_record_is_none(tmp_path: Path) -> None:
    store = _create(tmp_path / "a")
    box = next(iter(store.layout))
    store.write(block(box, LABELS))
    (record,) = (tmp_path / "a/0/run/records").iterdir()
    record.write_bytes(record.read_bytes()[:40])
    assert not store.done(box)


def test_slices_vote(tmp_path: Path) -> None:
    shape = (4, 290, 300)
    source = grey(shape, spacing_m=10e-9)
    labels = np.stack([labels_of(shape)[0]] * 4)
    noisy = labels.copy()
    noisy[1, 20:60, 20:60] = (noisy[1, 20:60, 20:60] + 1) % 3
    noisy[2, 100:150, 100:150] = NO_DATA
    store = _create(tmp_path / "a", source, smooth=3)
    for box in store.layout:
        store.write(block(box, noisy))
    with pytest.raises(UserError, match="is not done, so its slices cannot vote"):
        _create(tmp_path / "b", source, smooth=3).write_smoothed(next(iter(store.layout)))
    parts = store.smooth_parts()
    for part in parts[:5]:
        store.write_smoothed(part)
    store = _create(tmp_path / "a", source, smooth=3)
    assert store.smooth_parts() == parts[5:]
    changed = Box(1, 0, 0, BLOCK, BLOCK)
    store.write(block(changed, noisy))  # done again: it and its neighbors vote again
    assert {part.z for part in store.smooth_parts() if part[1:] == changed[1:]} >= {0, 1, 2}
    _end(store)
    expected = labels.copy()
    expected[2, 100:150, 100:150] = NO_DATA
    expected[0, 20:60, 20:60] = noisy[0, 20:60, 20:60]  # two slices see each other: ties keep what is there
    root = zarr.open_group(str(tmp_path / "a"), mode="r")
    assert np.array_equal(root["0"][:], expected)
    for record in store.records():
        own = expected[record.block.z, record.block.rows, record.block.columns]
        assert record.pixels == tuple(np.bincount(own.ravel(), minlength=256)[:3])
        far = _far(record.block)
        assert record.foreign_pixels == tuple(np.bincount(own[far], minlength=256)[:3])
    axes = root.attrs["ome"]["multiscales"][0]["axes"]
    assert [axis["name"] for axis in axes] == ["z", "y", "x"]
    assert _scale(root)[0]["scale"] == [0.01, 0.05, 0.05]
    assert not (tmp_path / "a/0/run/raw").exists()
    _valid(tmp_path / "a", "", "distance")
    with pytest.raises(UserError, match="do all with --restart"):
        store.write(block(changed, noisy))


def _far(box: Box) -> np.ndarray:
    """Where the made up distance, the number of the row of cells, is beyond that of the toy (4)."""
    rows = np.arange(box.top, box.top + box.height) // CELL >= 4
    return np.broadcast_to(rows[:, None], (box.height, box.width))


def test_majority() -> None:
    window = np.array([[[0, 0, 1, 255, 2, 0]], [[0, 1, 2, 255, 255, 1]], [[1, 2, 0, 0, 2, 0]], [[1, 1, 0, 0, 2, 2]],
                       [[0, 1, 1, 0, 2, 2]]], np.uint8)  # fmt: skip
    assert majority(window, 1).tolist() == [[0, 1, 2, 255, 255, 1]]
    assert majority(window, 2).tolist() == [[0, 1, 0, 0, 2, 0]]
