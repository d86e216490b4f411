"""Label maps as annotation programs would have saved them, written without any of the package's code.

Outlines come from shapely: exact, along the edges of pixels.
"""

from __future__ import annotations

import base64
import io
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]
Pairs = Mapping[str, tuple[Array, Array]]  # name to picture and labels


def outlines(labels: Array, value: int) -> list[tuple[Array, list[Array]]]:
    """Outline and holes of every region of one class, ``[N, 2]`` corners x, y."""
    import shapely

    runs = []
    for row, line in enumerate(labels == value):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
        runs += [shapely.box(left, row, right, row + 1) for left, right in zip(edges[::2], edges[1::2], strict=True)]
    union = shapely.union_all(runs)
    parts = [union] if union.geom_type == "Polygon" else list(union.geoms)
    return [
        (np.array(part.exterior.coords)[:-1], [np.array(ring.coords)[:-1] for ring in part.interiors])
        for part in parts if not part.is_empty
    ]  # fmt: skip


def area(ring: Array) -> float:
    x, y = ring.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def stacked(labels: Array, classes: Sequence[str]) -> list[tuple[str, Array]]:
    """Outlines without holes, larger ones first: drawn in this order they give the label map."""
    shapes = [(name, ring) for value, name in enumerate(classes) for ring, _ in outlines(labels, value)]
    return sorted(shapes, key=lambda shape: -area(shape[1]))


def png(values: Array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def labelme(folder: Path, pairs: Pairs, classes: Sequence[str], *, windows: bool = False, embed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (image, labels) in pairs.items():
        if not embed:
            (folder / f"{name}.png").write_bytes(png(image))
        shapes = [
            {"label": "_background_" if label == classes[0] else label, "points": ring.tolist(), "group_id": None,
             "shape_type": "polygon", "flags": {}}
            for label, ring in stacked(labels, classes)
        ]  # fmt: skip
        content = {
            "version": "5.5.0", "flags": {}, "shapes": shapes,
            "imagePath": f"..\\pictures\\{name}.png" if windows else f"{name}.png",
            "imageData": base64.b64encode(png(image)).decode() if embed else None,
            "imageHeight": labels.shape[0], "imageWidth": labels.shape[1],
        }  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content))


def cvat(folder: Path, pairs: Pairs, classes: Sequence[str], *, masks: bool = False) -> None:
    """``annotations.xml`` and ``images``; shapes in the order of the file are not those of ``z_order``."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    known = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "job"), "labels")
    for name in classes:
        ElementTree.SubElement(ElementTree.SubElement(known, "label"), "name").text = name
    for number, (name, (image, labels)) in enumerate(pairs.items()):
        (folder / "images" / f"{name}.png").write_bytes(png(image))
        height, width = labels.shape
        entry = ElementTree.SubElement(
            root, "image", id=str(number), name=f"{name}.png", width=str(width), height=str(height)
        )
        if masks:
            for value, label in enumerate(classes):
                rows, columns = np.nonzero(labels == value)
                top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
                block = (labels[top:bottom, left:right] == value).ravel()
                ElementTree.SubElement(
                    entry, "mask", label=label, rle=", ".join(map(str, runs(block))), left=str(left), top=str(top),
                    width=str(right - left), height=str(bottom - top), z_order="0",
                )  # fmt: skip
        else:
            for order, (label, ring) in reversed(list(enumerate(stacked(labels, classes)))):
                points = ";".join(f"{x:.2f},{y:.2f}" for x, y in ring)
                ElementTree.SubElement(
                    entry, "polygon", label=label, points=points, occluded="0", z_order=str(order)
                )
    ElementTree.ElementTree(root).write(folder / "annotations.xml", encoding="utf-8", xml_declaration=True)


def runs(bits: Array) -> list[int]:
    """Lengths of equal values in turn, beginning with zeros."""
    changes = np.flatnonzero(np.diff(bits.astype(np.int8))) + 1
    lengths = np.diff(np.concatenate([[0], changes, [len(bits)]])).tolist()
    return [0, *lengths] if bits[0] else lengths


def cvat_masks(folder: Path, pairs: Pairs, classes: Sequence[str], colors: Sequence[tuple[int, int, int]]) -> None:
    for part in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    lines = [f"{name}:{red},{green},{blue}::" for name, (red, green, blue) in zip(classes, colors, strict=True)]
    (folder / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines[1:], lines[0]]) + "\n")
    for name, (image, labels) in pairs.items():
        (folder / "JPEGImages" / f"{name}.png").write_bytes(png(image))
        (folder / "SegmentationClass" / f"{name}.png").write_bytes(png(np.array(colors, np.uint8)[labels]))
        (folder / "SegmentationObject" / f"{name}.png").write_bytes(png(np.array(colors, np.uint8)[labels][::-1]))


def coco(folder: Path, pairs: Pairs, classes: Sequence[str], kind: str) -> None:
    """``kind``: ``polygons``, ``runs`` (uncompressed) or ``compressed``. Category numbers have gaps."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    numbers = {name: 7 * place + 3 for place, name in enumerate(classes)}
    images, annotations = [], []
    for number, (name, (image, labels)) in enumerate(pairs.items()):
        (folder / "images" / f"{name}.png").write_bytes(png(image))
        height, width = labels.shape
        images.append({"id": number, "file_name": f"{name}.png", "width": width, "height": height})
        if kind == "polygons":
            drawn = [(label, [ring.ravel().tolist()], 0) for label, ring in stacked(labels, classes)]
        else:
            drawn = [(label, run_lengths(labels == value, kind), 1) for value, label in enumerate(classes)]
        for label, segmentation, crowd in drawn:
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": numbers[label], "iscrowd": crowd,
                 "segmentation": segmentation}
            )  # fmt: skip
    categories = [{"id": number, "name": name} for name, number in reversed(numbers.items())]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances_default.json").write_text(json.dumps(content))


def run_lengths(mask: Array, kind: str) -> dict[str, Any]:
    """COCO counts column by column."""
    if kind == "runs":
        return {"counts": runs(mask.ravel(order="F")), "size": list(mask.shape)}
    from pycocotools import mask as tools

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        coded = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"counts": coded["counts"].decode("ascii"), "size": list(mask.shape)}


def qupath(folder: Path, pairs: Pairs, classes: Sequence[str]) -> None:
    """Polygons with holes, and all regions of the last class as one MultiPolygon."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (image, labels) in pairs.items():
        (folder / f"{name}.png").write_bytes(png(image))
        features = []
        for value, label in list(enumerate(classes))[1:]:
            polygons = [
                [[*ring.tolist(), ring[0].tolist()] for ring in (outer, *holes)]
                for outer, holes in outlines(labels, value)
            ]
            shapes: list[dict[str, Any]] = [{"type": "Polygon", "coordinates": polygon} for polygon in polygons]
            if label == classes[-1]:
                shapes = [{"type": "MultiPolygon", "coordinates": polygons}]
            kind = {"name": label, "color": [200, 10 * value, 0]}
            properties = {"objectType": "annotation", "classification": kind}
            features += [{"type": "Feature", "geometry": shape, "properties": properties} for shape in shapes]
        (folder / f"{name}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def rois(folder: Path, pairs: Pairs, classes: Sequence[str]) -> None:
    """A set of ROIs a picture, named ``0001-grain``; regions with holes are left to the order: smaller on top."""
    import roifile

    folder.mkdir(parents=True, exist_ok=True)
    for name, (image, labels) in pairs.items():
        (folder / f"{name}.png").write_bytes(png(image))
        with zipfile.ZipFile(folder / f"{name}_RoiSet.zip", "w") as archive:
            for number, (label, ring) in enumerate(stacked(labels, classes)):
                roi = roifile.ImagejRoi.frompoints(ring, name=f"{number:04d}-{label}")
                archive.writestr(f"{number:04d}-{label}.roi", roi.tobytes())


def colored(folder: Path, pairs: Pairs, colors: Sequence[tuple[int, int, int]]) -> None:
    """``images/NAME.png`` and ``masks/NAME.png`` in RGB."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, (image, labels) in pairs.items():
        (folder / "images" / f"{name}.png").write_bytes(png(image))
        (folder / "masks" / f"{name}.png").write_bytes(png(np.array(colors, np.uint8)[labels]))
