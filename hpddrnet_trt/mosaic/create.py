"""Where the labels of a mosaic go, and their store from nothing: in the OME-Zarr image they belong to, or alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hpddrnet_trt.core.errors import BadInputFile, UsageError, describe, require
from hpddrnet_trt.core.files import atomic_folder
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.mosaic.layout import CELL, CHUNK, NO_DATA, Layout, MosaicSettings, Source
from hpddrnet_trt.mosaic.ome_zarr import MARKS, OmeZarr, image_in
from hpddrnet_trt.mosaic.store import (
    MAPS,
    PURPOSE,
    RAW,
    RUN,
    MosaicStore,
    open_group,
    open_store,
    own_attributes_of,
    renew_consolidated,
    shard_side,
    writing,
)
from hpddrnet_trt.results.ome import (
    LABELS,
    OWN,
    ZARR_VERSION,
    Placement,
    describe_labels,
    describe_pyramid,
    own_attributes,
    reductions,
)


def create_store(
    target: Path | None,
    name: str,
    source: Source,
    layout: Layout,
    settings: MosaicSettings,
    manifest: Manifest,
    provenance: Mapping[str, Any],
    *,
    smooth: int = 1,
    overwrite: bool = False,
) -> MosaicStore:
    """Make the store of a mosaic, or open the one that is there, so that the run goes on.

    ``target``: an OME-Zarr 0.5 image, whose ``labels/<name>`` it becomes, or a new folder, which becomes the label
    image itself; None for the image that ``source`` is. ``smooth``: slices that vote, odd. ``overwrite``: begin anew.
    Call it while no other client writes there.

    Raises :class:`UsageError` where labels cannot be there, where others than ours are, and where ours were made with
    other settings: it says which; :class:`UserError` when the disk does not take it.
    """
    zarr = require("zarr", "mosaic", PURPOSE)
    if smooth < 1 or smooth % 2 == 0:
        raise UsageError(f"an odd number of slices votes, such as 3 or 5, not {smooth}")
    if smooth > 1 and layout.shape[0] == 1:
        raise UsageError(f"{source.path} has one slice, and several are needed to smooth them; leave that away")
    if layout.block % CELL:
        raise UsageError(f"the sides of blocks are multiples of {CELL} pixels, not {layout.block}")
    folder, image = labels_folder(target, name, source)
    asked = {"pixel_size_m": source.pixel_size_m, "spacing_m": source.spacing_m, **settings.as_dict(),
             "shape": layout.shape, "block": layout.block, "smooth_slices": smooth}  # fmt: skip
    asked = json.loads(json.dumps(asked))  # as it is read back
    exists = folder.is_dir() and any(folder.iterdir())
    own = own_attributes_of(folder) if exists else {}
    if exists and not overwrite:
        there = own["mosaic"]["settings"]
        # The model's checksum counts, not where it lies.
        differing = [key for key in asked if key != "model" and there.get(key) != asked[key]]
        if differing:
            what = "; ".join(f"{key} {there.get(key)}, not {asked[key]}" for key in differing)
            raise UsageError(
                f"the labels in {folder} were made with other settings ({what}); take the same, write elsewhere with "
                "--to or --name, or begin anew with --restart"
            )
        with writing(folder):
            for torn in folder.rglob("*.partial"):  # of writers that were killed
                torn.unlink(missing_ok=True)
    else:
        volume = layout.shape[0] > 1
        described = image or (source.folder if isinstance(source, OmeZarr) else None)
        placement = Placement.of(source.pixel_size_m, source.spacing_m, volume=volume)
        if described is not None:
            placement = _placement(described, volume=volume)
        factors = [2**level for level in range(reductions(layout.shape[1:]) + 1)]
        if image is not None:  # the standard wants as many levels of the labels as of their image
            factors = _factors(image)
        with atomic_folder(folder) as fresh:
            group = zarr.open_group(str(fresh), mode="w", zarr_format=3)
            _fill(group, fresh, layout, placement, factors, smooth)
            describe_pyramid(group, LABELS if image is None else name, placement, factors)
            describe_labels(group, manifest.classes, None if image is None else {"image": "../../"}, NO_DATA)
            foreign = None if manifest.domain is None else manifest.domain.foreign
            group.attrs[OWN] = {
                **own_attributes(manifest.classes, source.pixel_size_m, {**provenance, "source": str(source.path)}),
                "mosaic": {"complete": False, "factors": factors, "foreign": foreign, "settings": asked},
            }
    if image is not None:
        with writing(folder):
            _list_labels(image, name)
            renew_consolidated(image)
    return open_store(folder)


def labels_folder(target: Path | None, name: str, source: Source) -> tuple[Path, Path | None]:
    """Where the labels go: the folder of their group, and that of the OME-Zarr image which it lies in, if any.

    Raises :class:`UsageError` as :func:`create_store` does.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UsageError(f"labels are called with letters, digits, '.', '_' and '-', not {name!r}; take another --name")
    itself = target is None or target.absolute() == source.path.absolute()
    place = source.path if target is None else target
    if itself and isinstance(source, OmeZarr):
        place = source.folder
    place = place.absolute()
    elsewhere = "write elsewhere with --to" if itself else "take another place for --to"
    if any((place / mark).is_file() for mark in MARKS if mark != "zarr.json"):
        raise UsageError(
            f"{place} is no OME-Zarr of version {ZARR_VERSION}, and older ones cannot hold its labels; {elsewhere}"
        )
    if not (place / "zarr.json").is_file():
        if itself or place.is_file() or (place.is_dir() and any(place.iterdir())):
            raise UsageError(f"{place} is no OME-Zarr {ZARR_VERSION}, so no labels can be in it; {elsewhere}")
        return place, None
    own = open_group(place).attrs.get(OWN, {})
    if "mosaic" in own:
        return place, None
    image, about = image_in(place, place, None)
    try:
        full = open_group(image)[about["datasets"][0]["path"]]
        sides = dict(zip((axis["name"] for axis in about["axes"]), full.shape, strict=True))
        shape = (sides.get("z", 1), sides["y"], sides["x"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as exc:
        raise _senseless(image, exc) from exc
    if shape != source.shape:
        raise UsageError(
            f"the image in {place} has {_in_words(shape)}, and the mosaic {_in_words(source.shape)}, so that labels of "
            f"it cannot be there; {elsewhere}"
        )
    return image / "labels" / name, image


def _in_words(shape: tuple[int, int, int]) -> str:
    return f"{shape[2]} x {shape[1]} pixels" + (f" in {shape[0]} slices" if shape[0] > 1 else "")


def _senseless(image: Path, exc: Exception) -> BadInputFile:
    return BadInputFile(f"the metadata of the OME-Zarr image {image} make no sense ({describe(exc)}); write it again")


def _fill(group: Any, folder: Path, layout: Layout, placement: Placement, factors: list[int], smooth: int) -> None:
    """All arrays of a store, without a pixel."""
    zarr = require("zarr", "mosaic", PURPOSE)
    one = (1,) * (len(placement.axes) - 2)
    shard = shard_side(layout.block)
    chunk = CHUNK if shard % CHUNK == 0 else shard

    def add(place: Any, array: str, factor: int, **options: Any) -> None:
        shape = (layout.shape[0], *(-(-side // factor) for side in layout.shape[1:]))[-len(placement.axes) :]
        place.create_array(array, shape=shape, dimension_names=placement.axes, **options)

    labels: dict[str, Any] = {"dtype": "uint8", "fill_value": NO_DATA, "chunks": (*one, chunk, chunk),
                              "shards": (*one, shard, shard)}  # fmt: skip
    for level, factor in enumerate(factors):
        add(group, str(level), factor, **labels)
    if smooth > 1:
        add(zarr.open_group(str(folder / RUN), mode="w", zarr_format=3), RAW, 1, **labels)
    cells = (*one, *(layout.block // CELL,) * 2)
    for name, words in MAPS.items():
        coarse = group.create_group(name)
        add(coarse, "0", CELL, dtype="float32", fill_value=float("nan"), chunks=cells)
        describe_pyramid(coarse, words, placement.of_cells(CELL), [1])


def _factors(image: Path) -> list[int]:
    """Of each level of an OME-Zarr image, how many pixels of the first are one of its."""
    group, factors = open_group(image), [1]
    try:
        widths = [group[level["path"]].shape[-1] for level in image_in(image, image, None)[1]["datasets"]]
    except (KeyError, TypeError, AttributeError) as exc:
        raise _senseless(image, exc) from exc
    for before, width in pairwise(widths):
        factors.append(factors[-1] * max(1, round(before / width)))
    return factors


def _placement(image: Path, *, volume: bool) -> Placement:
    """That of an OME-Zarr image, so that labels lie over it whatever it says."""
    about = image_in(image, image, None)[1]
    try:
        axes = {axis["name"]: number for number, axis in enumerate(about["axes"])}
        scale, translation = np.ones(len(axes)), np.zeros(len(axes))
        key = "coordinateTransformations"
        for step in (*about["datasets"][0].get(key, []), *about.get(key, [])):
            if step["type"] == "scale":
                scale, translation = scale * step["scale"], translation * step["scale"]
            elif step["type"] == "translation":
                translation = translation + step["translation"]
        names = ("z", "y", "x") if volume else ("y", "x")
        own = [axes[name] for name in names]
        units = {name: about["axes"][axes[name]].get("unit") for name in names}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as exc:
        raise _senseless(image, exc) from exc
    known = {name: unit for name, unit in units.items() if unit is not None}
    return Placement(names, tuple(scale[own].tolist()), tuple(translation[own].tolist()), known)


def _list_labels(image: Path, name: str) -> None:
    """Name the labels in the image's list of them."""
    zarr = require("zarr", "mosaic", PURPOSE)
    group = zarr.open_group(str(image / "labels"), mode="a", zarr_format=3, use_consolidated=False)
    listed = group.attrs.get("ome", {})
    if name not in listed.get("labels", []):
        group.attrs["ome"] = {"version": ZARR_VERSION, **listed, "labels": [*listed.get("labels", []), name]}
