"""What annotation programs write: one reader a format, from the files of a source to pictures with their shapes."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, UserError, require
from hpddrnet_trt.core.files import read_file
from hpddrnet_trt.data.annotations import (
    FAULTS,
    Block,
    Color,
    Found,
    Shape,
    Tree,
    bitmap,
    box,
    ellipse,
    json_kind,
    polygon,
    read_json,
    split_of,
)

_MOST_LOOKED_AT = 20  # files, to tell what kind they are


def holds_json(tree: Tree, *, kind: str) -> bool:
    """True when one of the first JSON files is of the ``kind`` (``labelme``, ``coco``, ``qupath``)."""
    for path in tree.ending(".json", ".geojson")[:_MOST_LOOKED_AT]:
        try:
            if json_kind(read_json(path)) == kind:
                return True
        except UserError:
            continue
    return False


def color_of(text: str) -> Color:
    """``#rrggbb`` as three numbers."""
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


# labelme and its descendants: one JSON a picture


def read_labelme(tree: Tree) -> Found:
    """labelme's shapes lie over each other in the order of the file; ``labels.txt`` gives the order of classes."""
    found = Found()
    for path in tree.ending(".txt"):
        if path.name == "labels.txt":
            found.order = [line.strip() for line in read_file(path, "list").decode("utf-8", "replace").splitlines()]
    for path, content in tree.json("labelme", found):
        found.add(
            tree.name(path),
            partial(_labelme_picture, tree, path, content),
            partial(_labelme_shapes, content, found),
            size=partial(_size, content, "imageWidth", "imageHeight") if content.get("imageWidth") else None,
        )
    return found


def _size(entry: Any, width: str, height: str) -> tuple[int, int]:
    return int(entry.get(width)), int(entry.get(height))


def _labelme_picture(tree: Tree, path: Path, content: dict[str, Any]) -> Path:
    try:
        return tree.picture(content["imagePath"], path)
    except BadInputFile:
        if not content.get("imageData"):
            raise
    copy = tree.scratch / Path(tree.name(path)).with_suffix(PureWindowsPath(content["imagePath"]).suffix or ".png")
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(base64.b64decode(content["imageData"]))
    return copy


def _labelme_shapes(content: dict[str, Any], found: Found) -> Iterator[Shape]:
    for entry in content["shapes"]:
        kind = entry.get("shape_type") or "polygon"  # the first versions had no other
        label, points = str(entry["label"]), np.array(entry["points"], np.float64).reshape(-1, 2)
        if kind == "circle":
            radius = math.dist(*points.tolist())
            yield Shape(label, partial(ellipse, (*points[0].tolist(), radius, radius, 0.0)))
        elif kind == "mask":
            coded = np.frombuffer(base64.b64decode(entry["mask"]), np.uint8)
            pixels = cv2.imdecode(coded, cv2.IMREAD_GRAYSCALE)
            if pixels is None:
                raise BadInputFile(f"the mask of {label!r} is no picture; save it again")
            left, top = (round(value) for value in points.min(axis=0))
            yield Shape(label, partial(bitmap, top, left, pixels > 0))
        elif kind == "rectangle" and len(points) == 2:
            yield Shape(label, partial(polygon, [box(*points.ravel())]))
        elif kind in ("polygon", "rectangle", "rotation", "oriented_rectangle") and len(points) > 2:
            yield Shape(label, partial(polygon, [points]))
        else:
            found.passed_over[kind] += 1


# CVAT for images 1.1: one XML, higher z_order on top


def holds_cvat(tree: Tree) -> bool:
    """True when one of the XML files begins as CVAT's do."""
    return any(b"<annotations>" in read_file(path, "annotation")[:1000] for path in tree.ending(".xml"))


def read_cvat(tree: Tree) -> Found:
    """CVAT's ``annotations.xml``; tracks of videos are refused, as they do not name their pictures."""
    found = Found()
    for path in tree.ending(".xml"):
        try:
            root = ElementTree.fromstring(read_file(path, "annotation"))
        except ElementTree.ParseError as exc:
            found.left_out[tree.name(path)] = f"it is no XML ({exc})"
            continue
        if root.tag == "annotations" and root.find("track") is not None:
            raise BadInputFile(f"{path} holds tracks of a video; export the task as 'CVAT for images 1.1'")
        for label in root.iterfind(".//meta//labels/label"):
            name, color = label.findtext("name") or "", label.findtext("color") or ""
            found.order.append(name)
            if re.fullmatch("#[0-9a-fA-F]{6}", color):
                found.colors[name] = color_of(color)
        for image in root.iterfind("image"):
            name = image.get("name", "")
            found.add(
                f"{tree.name(path)}: {name}",
                partial(tree.picture, name, path),
                partial(_cvat_shapes, image, found),
                size=partial(_size, image, "width", "height"),
                split=split_of(image.get("subset") or ""),
            )
    return found


def _cvat_shapes(image: ElementTree.Element, found: Found) -> Iterator[Shape]:
    for entry in sorted(image, key=lambda entry: int(entry.get("z_order", "0"))):
        label = entry.get("label", "")
        number = {key: float(value) for key, value in entry.items() if re.fullmatch(r"-?\d+(\.\d+)?", value)}
        turn = number.get("rotation", 0.0)  # degrees clockwise about the centre
        if entry.tag == "polygon":
            corners = [[float(value) for value in point.split(",")] for point in entry.get("points", "").split(";")]
            yield Shape(label, partial(polygon, [np.array(corners)]))
        elif entry.tag == "box":
            ring = box(*(number[key] for key in ("xtl", "ytl", "xbr", "ybr")))
            if turn:
                cos, sin, center = math.cos(math.radians(turn)), math.sin(math.radians(turn)), ring.mean(axis=0)
                ring = (ring - center) @ np.array([[cos, sin], [-sin, cos]]) + center
            yield Shape(label, partial(polygon, [ring]))
        elif entry.tag == "ellipse":
            yield Shape(label, partial(ellipse, [*(number[key] for key in ("cx", "cy", "rx", "ry")), turn]))
        elif entry.tag == "mask":
            top, left, rows, columns = (int(number[key]) for key in ("top", "left", "height", "width"))
            runs = [int(value) for value in entry.get("rle", "").split(",")]  # row by row
            yield Shape(label, partial(_cvat_pixels, top, left, rows, columns, runs))
        else:
            found.passed_over[entry.tag] += 1


def _cvat_pixels(top: int, left: int, rows: int, columns: int, runs: list[int], height: int, width: int) -> Block:
    if rows > height or columns > width:
        raise BadInputFile(f"a mask has {rows} rows and {columns} columns, more than its picture; export it again")
    return bitmap(top, left, _from_runs(runs, rows, columns), height, width)


def _from_runs(runs: list[int], rows: int, columns: int) -> npt.NDArray[np.bool_]:
    """Lengths of runs without and within, in turn, from left to right and down."""
    if min(runs, default=0) < 0 or sum(runs) != rows * columns:
        raise BadInputFile(f"the runs of a mask make {sum(runs)} pixels, not {rows} x {columns}; export it again")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(rows, columns)


# COCO: one JSON with categories by number, polygons, and runs column by column


def read_coco(tree: Tree) -> Found:
    """COCO's instances, also crowds (as CVAT calls every painted mask); the later one in the file lies on top."""
    found = Found()
    for path, content in tree.json("coco", found):
        try:
            names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
            of_image: dict[Any, list[Any]] = {entry["id"]: [] for entry in content["images"]}
            for entry in content["annotations"]:
                of_image.setdefault(entry["image_id"], []).append((names[entry["category_id"]], entry))
            found.order += [names[key] for key in sorted(names)]
            images = [(entry["id"], str(entry["file_name"]), entry) for entry in content["images"]]
        except FAULTS as exc:
            raise BadInputFile(f"{path} is not as COCO describes it ({exc!r}); export it again") from exc
        for number, name, entry in images:
            found.add(
                f"{tree.name(path)}: {name}",
                partial(tree.picture, name, path),
                partial(_coco_shapes, of_image[number], found),
                size=partial(_size, entry, "width", "height"),
                split=split_of(*tree.name(path).split("/")),
            )
    return found


def _coco_shapes(entries: Iterable[tuple[str, Any]], found: Found) -> Iterator[Shape]:
    for label, entry in entries:
        drawn = entry.get("segmentation")
        if isinstance(drawn, dict):
            yield Shape(label, partial(_coco_pixels, drawn))
        elif drawn:
            yield from (Shape(label, partial(polygon, [np.array(ring, np.float64).reshape(-1, 2)])) for ring in drawn)
        else:
            found.passed_over["box without outline"] += 1


def _coco_pixels(drawn: dict[str, Any], height: int, width: int) -> Block:
    """Runs of pixels without and within in turn, column by column; as text they are packed (cocoapi, maskApi.c).

    Not with pycocotools: where runs are missing, its 2.0.11 gives whatever was in memory, and no error.
    """
    if drawn["size"] != [height, width]:
        size = f"{drawn['size']} rows and columns, its picture {[height, width]}"
        raise BadInputFile(f"a mask has {size}; export it again")
    counts = drawn["counts"] if isinstance(drawn["counts"], list) else _coco_counts(drawn["counts"])
    return 0, 0, _from_runs(counts, width, height).T


def _coco_counts(text: str) -> list[int]:
    """Numbers in groups of five bits, lowest first; bit 5: one follows; from the fourth on, changes."""
    counts: list[int] = []
    value, shift = 0, 0
    for sign in text:
        group = ord(sign) - 48
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (1 << shift) if group & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return counts


# QuPath: GeoJSON with the picture's name


def read_qupath(tree: Tree) -> Found:
    """QuPath's objects; smaller ones lie on top, as children do in its hierarchy."""
    found = Found()
    for path, content in tree.json("qupath", found):
        features = content.get("features", [content]) if isinstance(content, dict) else content
        shapes = partial(_qupath_shapes, features, found)
        found.add(tree.name(path), partial(tree.picture_beside, path), shapes, small_on_top=True)
    return found


def _qupath_shapes(features: list[dict[str, Any]], found: Found) -> Iterator[Shape]:
    for feature in features:
        properties = feature.get("properties") or {}
        kind = properties.get("classification") or {}
        label = kind.get("name") or ": ".join(kind.get("names") or []) or properties.get("name")
        if not label or label.casefold() == "region*":
            found.passed_over["object without a class" if not label else "Region*"] += 1
            continue
        if len(color := kind.get("color") or []) == 3:
            found.colors[label] = (int(color[0]), int(color[1]), int(color[2]))
        for rings in _geojson_polygons(feature["geometry"], found):
            yield Shape(label, partial(polygon, [np.array(ring, np.float64)[:, :2] for ring in rings]))


def _geojson_polygons(geometry: dict[str, Any], found: Found) -> Iterator[list[Any]]:
    plane = geometry.get("plane") or {}
    if plane.get("z") or plane.get("t"):
        found.passed_over["object of another plane"] += 1
    elif geometry["type"] == "Polygon":
        yield geometry["coordinates"]
    elif geometry["type"] == "MultiPolygon":
        yield from geometry["coordinates"]
    elif geometry["type"] == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _geojson_polygons(part, found)
    else:
        found.passed_over[geometry["type"]] += 1


# ImageJ: ROIs, one a file or many in a zip


def holds_rois(tree: Tree) -> bool:
    """True when there are ROI files, or zips beside pictures."""
    return bool(tree.ending(".roi")) or bool(tree.pictures and tree.ending(".zip"))


def read_rois(tree: Tree) -> Found:
    """ImageJ's ROIs; smaller ones lie on top, as they have no order.

    Their class is, in this order: the property ``class`` (as this package writes), the group, the name without its
    numbers; nameless ones are of the class ``object``.
    """
    roifile = require("roifile", "datasets", "read ImageJ ROIs")
    found = Found()
    of_picture: dict[Path, list[Path]] = {}
    for path in tree.ending(".roi", ".zip"):
        try:
            of_picture.setdefault(tree.picture_beside(path), []).append(path)
        except BadInputFile as exc:
            found.left_out[tree.name(path)] = str(exc)
    for picture, paths in of_picture.items():
        shapes = partial(_roi_shapes, roifile, paths, found)
        found.add(", ".join(map(tree.name, paths)), partial(Path, picture), shapes, small_on_top=True)
    return found


def _roi_shapes(roifile: Any, paths: list[Path], found: Found) -> Iterator[Shape | None]:
    for path in paths:
        try:
            rois = roifile.roiread(path)
        except Exception as exc:  # damaged ROIs raise whatever the reader stumbles over
            raise BadInputFile(f"{path.name} cannot be read as ImageJ ROIs ({exc}); save it again") from exc
        yield from (_roi_shape(roifile, roi, found) for roi in (rois if isinstance(rois, list) else [rois]))


def _roi_shape(roifile: Any, roi: Any, found: Found) -> Shape | None:
    types, label = roifile.ROI_TYPE, _roi_class(roi)
    if max(roi.position, roi.z_position, roi.t_position) > 1:
        found.passed_over["ROI of another slice"] += 1
        return None
    if roi.shape_roi_size > 0:
        return Shape(label, partial(polygon, [ring.astype(np.float64) for ring in roi.coordinates(multi=True)]))
    x, y, width, height = roi.left, roi.top, roi.right - roi.left, roi.bottom - roi.top
    if roi.subpixelrect:
        x, y, width, height = roi.xd, roi.yd, roi.widthd, roi.heightd
    if roi.roitype == types.OVAL:
        return Shape(label, partial(ellipse, (x + width / 2, y + height / 2, width / 2, height / 2, 0.0)))
    plain = roi.subtype not in (roifile.ROI_SUBTYPE.TEXT, roifile.ROI_SUBTYPE.IMAGE) and not roi.rounded_rect_arc_size
    if roi.roitype == types.RECT and plain:
        return Shape(label, partial(polygon, [box(x, y, x + width, y + height)]))
    if roi.roitype in (types.POLYGON, types.FREEHAND, types.TRACED):
        return Shape(label, partial(polygon, [np.asarray(roi.coordinates(), np.float64)]))
    found.passed_over[f"ROI of the type {types(roi.roitype).name.lower()}"] += 1
    return None


def _roi_class(roi: Any) -> str:
    stated = re.search(r"^class: *(.+)$", roi.props or "", flags=re.M)
    if stated:
        return stated[1].strip()
    if roi.group:
        return f"group {roi.group}"
    return re.sub(r"(^|[-_. ]+)\d+(?=[-_. ]|$)", "", roi.name or "").strip("-_. ") or "object"
