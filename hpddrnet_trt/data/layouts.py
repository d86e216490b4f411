"""Which file is whose mask: the two folder layouts and their file names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.data.decode import IMAGE_SUFFIXES

Layout = Literal["folders", "cityscapes"]
SPLITS = ("train", "val", "test")
_IMAGE_MARK, _MASK_MARK = "_leftImg8bit", "_gtFine_labelTrainIds"


@dataclass(frozen=True)
class Sample:
    """One micrograph with its mask. ``name`` is unique in its split and knows no file ending."""

    image: Path
    mask: Path
    name: str
    group: str | None = None


@dataclass(frozen=True)
class SplitFiles:
    """One split as found: pairs, and what could not be paired."""

    samples: list[Sample]
    images_without_mask: list[Path] = field(default_factory=list)
    masks_without_image: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class _Names:
    """Where a layout keeps one split's images and masks, and the key that pairs them."""

    folders: Callable[[Path, str], tuple[Path, Path]]
    image_mark: str
    mask_mark: str


_LAYOUTS: dict[str, _Names] = {
    "folders": _Names(lambda root, split: (root / "images" / split, root / "masks" / split), "", ""),
    "cityscapes": _Names(lambda root, split: (root / split / "imgs", root / split / "labels"), _IMAGE_MARK, _MASK_MARK),
}


def detect_layout(root: str | Path, layout: str | None = None) -> Layout:
    """The layout of the dataset in ``root``, or ``layout`` itself when it is one of the two.

    Raises :class:`BadInputFile` when the folder is missing or looks like neither.
    """
    root = Path(root)
    if layout is not None and layout not in _LAYOUTS:
        raise UsageError(f"unknown dataset layout {layout!r}; choose one of {', '.join(_LAYOUTS)}")
    if not root.is_dir():
        raise BadInputFile(f"dataset folder {root} does not exist or is not a folder; check the path")
    for name in _LAYOUTS if layout is None else (layout,):
        if any(folder.is_dir() for split in SPLITS for folder in _LAYOUTS[name].folders(root, split)):
            return "folders" if name == "folders" else "cityscapes"
    expected = (
        "images/SPLIT + masks/SPLIT, or SPLIT/imgs/*_leftImg8bit.* + SPLIT/labels/*_gtFine_labelTrainIds.png"
        if layout is None
        else " + ".join(str(folder) for folder in _LAYOUTS[layout].folders(Path(), "SPLIT"))
    )
    raise BadInputFile(f"{root} holds no dataset; expected {expected}, SPLIT being one of {', '.join(SPLITS)}")


def scan_split(root: Path, layout: Layout, split: str) -> SplitFiles:
    """Pair the files of one split by name, sorted; a split without folders is empty.

    Raises :class:`BadInputFile` when two images or two masks share a name (``a.png``, ``a.tif``).
    """
    names = _LAYOUTS[layout]
    image_folder, mask_folder = names.folders(root, split)
    images = _keyed(image_folder, names.image_mark)
    masks = _keyed(mask_folder, names.mask_mark)
    return SplitFiles(
        [Sample(images[key], masks[key], key) for key in sorted(images.keys() & masks.keys())],
        [images[key] for key in sorted(images.keys() - masks.keys())],
        [masks[key] for key in sorted(masks.keys() - images.keys())],
    )


def _keyed(folder: Path, mark: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.suffix.lower() not in IMAGE_SUFFIXES or not path.stem.endswith(mark) or not path.is_file():
            continue
        stem = path.stem.removesuffix(mark)
        if not stem:
            continue
        key = relative.with_name(stem).as_posix()
        if key in found:
            raise BadInputFile(f"{found[key]} and {path} have the same name; keep one of them")
        found[key] = path
    return found
