"""Public SEM segmentation sets that can be fetched or converted; others are listed in ``data/README.md``.

Nothing here is a guess: what was not seen is said in ``verified``. The addresses were recorded, not fetched, when this
was written.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.data.description import DescribedClass

_WIDTH = 100  # of the text for people, characters
_GREY, _BLUE, _RED = (68, 68, 68), (0, 0, 255), (255, 0, 0)
_ORANGE, _SKY = (230, 159, 0), (86, 180, 233)


@dataclass(frozen=True)
class RemoteFile:
    """A file to download, kept under ``name``; ``sha256`` is None where nobody published it."""

    name: str
    url: str
    sha256: str | None = None


@dataclass(frozen=True)
class Entry:
    """One public dataset.

    ``license_note`` says where the statement of the license stands. ``file`` is None when it must be fetched by hand,
    which ``how_to_get`` then explains. ``verified`` says what was checked of all this, and what was not.
    """

    name: str
    title: str
    classes: tuple[DescribedClass, ...]
    images: str  # count and size, for people
    license: str
    license_note: str
    citation: str
    doi: str
    homepage: str
    split: str  # where the split comes from
    verified: str
    file: RemoteFile | None = None
    how_to_get: str = ""
    notes: str = ""


def _classes(**colors: tuple[int, int, int]) -> tuple[DescribedClass, ...]:
    """The class table in the order of the mask values."""
    return tuple(
        DescribedClass(name=name, index=index, color=color) for index, (name, color) in enumerate(colors.items())
    )


_NASA_COMMIT = "f50b5689a71cf6f86016fb4a5c5a2bb31e0397f3"
_SUPER = _classes(matrix=_GREY, secondary=_BLUE, tertiary=_RED)
_EBC = _classes(background=_GREY, oxide=(255, 215, 0), crack=_RED)
_OTHER_ALLOYS = "; the folder different_test (other alloys, see nasa-super4) is left out"
_EBC_LEAK = "; some specimens occur in more than one of the published splits"


def _nasa(name: str, images: str, notes: str) -> Entry:
    superalloy = name.startswith("super")
    title = (
        f"Ni-base superalloys, gamma-prime precipitates, benchmark Super-{name[-1]}"
        if superalloy
        else f"environmental barrier coatings, oxide layer and cracks, benchmark EBC-{name[-1]}"
    )
    return Entry(
        name=f"nasa-{name}",
        title=title,
        classes=_SUPER if superalloy else _EBC,
        images=images,
        license="MIT",
        license_note="the repository's README says that all data in it are under the license of LICENSE.txt (MIT)",
        citation=(
            'J. Stuckner, B. Harder, T. M. Smith, "Microstructure segmentation with deep learning encoders pre-trained '
            'on a large microscopy dataset", npj Computational Materials 8 (2022)'
        ),
        doi="10.1038/s41524-022-00878-5",
        homepage="https://github.com/nasa/pretrained-microscopy-models",
        split="published (train, val, test folders)",
        file=RemoteFile(
            f"nasa-pretrained-microscopy-models-{_NASA_COMMIT[:7]}.zip",
            f"https://github.com/nasa/pretrained-microscopy-models/archive/{_NASA_COMMIT}.zip",
        ),
        notes=notes,
        verified=(
            "layout, names and mask values from copies of the train and val files and the repository's file list; "
            "the address was not fetched; GitHub publishes neither size nor checksum of such archives"
        ),
    )


_ENTRIES = (
    Entry(
        name="mudrocknet",
        title="uncemented muds of the Nankai Trough: clay, silt grains, pores",
        classes=_classes(clay=_GREY, silt=(200, 40, 40), pore=(0, 158, 115)),
        images="more than 2,000 tiles",
        license="MIT",
        license_note="LICENSE of the repository that holds images and labels; the Digital Rocks Portal states its own",
        citation=(
            "A. Bihani, H. Daigle, J. E. Santos, C. Landry, M. Prodanovic, K. Milliken, \"MudrockNet: Semantic "
            'segmentation of mudrock SEM images through deep learning", Computers & Geosciences (2022), '
            "arXiv:2102.03393; data: Mudrock images from Nankai Trough, Digital Rocks Portal (2020)"
        ),
        doi="10.17612/BVXS-BC79",
        homepage="https://github.com/abhishekdbihani/MudrockNet",
        split="published (ImageSets/*.txt, 70:15:15, random over tiles); by group when the lists are missing",
        how_to_get=(
            "the repository keeps its pictures in Git LFS: 'git lfs install', then 'git clone "
            "https://github.com/abhishekdbihani/MudrockNet', or take them from "
            "https://www.digitalrocksportal.org/projects/259; then 'hpddrnet-trt datasets convert mudrocknet "
            "MudrockNet FOLDER'"
        ),
        notes=(
            "the published split is random, so neighbouring tiles of one micrograph are in train and test: "
            "compare with the paper on it, judge a model on another. The group is the first number of a name, "
            "which looks like the micrograph and is not documented"
        ),
        verified=(
            "folders, names and the license from the repository's listing and loader; that 1 is silt and 2 is pores "
            "follows from the loader's colour table (red, green) and the README's figure; look at the contact "
            "sheet of the dataset check before training. No picture was seen"
        ),
    ),
    _nasa("super1", "10 train, 4 val, at least 4 test; 512 x 512", "the complete set"),
    _nasa("super2", "4 train; 512 x 512", "few-shot: 4 of Super-1's training images" + _OTHER_ALLOYS),
    _nasa("super3", "1 train; 512 x 512", "one-shot: 1 of Super-1's training images" + _OTHER_ALLOYS),
    _nasa("super4", "4 train; 512 x 512", "few-shot, tested on other alloys, etchings and imaging conditions"),
    _nasa("ebc1", "24 in all; 1024 x 1024", "the complete set" + _EBC_LEAK),
    _nasa("ebc2", "at least 4 train; 1024 x 1024", "few-shot" + _EBC_LEAK),
    _nasa(
        "ebc3",
        "15 train, 3 val, 6 test; 1024 x 1024",
        "tested on a specimen (050317#3) that is in no other split",
    ),
    Entry(
        name="shale-duvernay",
        title="Duvernay shale: mineral grains against clay aggregates",
        classes=_classes(grain=(95, 48, 49), clay=_GREY),
        images="15 blocks of one mosaic; 384 and 512 pixels",
        license="MIT",
        license_note="LICENSE of the repository, (c) 2024 Government of Canada; it names the source code, and the "
        "pictures carry no other notice",
        citation=(
            'Z. Chen, X. Liu, J. Yang, E. Little, Y. Zhou, "Deep learning-based method for SEM image segmentation in '
            "mineral characterization, an example from Duvernay Shale samples in Western Canada Sedimentary "
            'Basin", Computers & Geosciences 138, 104450 (2020)'
        ),
        doi="10.1016/j.cageo.2020.104450",
        homepage="https://github.com/Jon-GSC/SEM_segmentation",
        split="none published; blocks of the strip from top to bottom: 60 % train, 20 % val, 20 % test",
        file=RemoteFile(
            "sem-segmentation-59ca4d6.zip",
            "https://github.com/Jon-GSC/SEM_segmentation/archive/59ca4d6f841f866eb7eb5b147953acd2256dca92.zip",
        ),
        notes="coarse polygons; clay includes organic matter and pores; 101 overlapping tiles are put together first",
        verified=(
            "names from the repository's listing, mask values and the strip's shape from a copy; the order of the "
            "tiles is found by matching their overlaps; the address was not fetched, no checksum is published"
        ),
    ),
    Entry(
        name="axondeepseg-sem",
        title="rat spinal cord: myelin and axons",
        classes=_classes(background=_GREY, myelin=_SKY, axon=_ORANGE),
        images="10 of 8 animals",
        license="MIT",
        license_note='"License" in the dataset\'s dataset_description.json',
        citation=(
            'A. Zaimi et al., "AxonDeepSeg: automatic axon and myelin segmentation from microscopy data using '
            'convolutional neural networks", Scientific Reports 8, 3816 (2018)'
        ),
        doi="10.1038/s41598-018-22181-4",
        homepage="https://github.com/axondeepseg/data_axondeepseg_sem",
        split="none published; by animal, ordered by the hash of its number",
        file=RemoteFile(
            "data_axondeepseg_sem-r20211130.zip",
            "https://github.com/axondeepseg/data_axondeepseg_sem/archive/r20211130.zip",
        ),
        notes="the values 130 and 233 that occur in masks are noise and become 255 (ignore)",
        verified=(
            "names from the repository's listing, mask values and address from two other projects' loaders; the "
            "address was not fetched"
        ),
    ),
)

ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def find_entry(name: str) -> Entry:
    """The entry of that name; :class:`UsageError` lists the names when there is none."""
    if name not in ENTRIES:
        raise UsageError(f"there is no dataset {name!r} in the catalog; it has {', '.join(ENTRIES)}")
    return ENTRIES[name]


def overview() -> str:
    """Three lines for each entry: name and title, classes and images, how to have it under which license."""
    return "\n\n".join(
        f"{entry.name}  {entry.title}\n"
        f"    classes: {', '.join(known.name for known in entry.classes)}    images: {entry.images}\n"
        f"    {_way(entry)}    license: {entry.license}    {entry.citation.split(',')[0]}, doi:{entry.doi}"
        for entry in _ENTRIES
    )


def details(entry: Entry) -> str:
    """Everything the catalog knows about one entry."""
    rows = [
        ("title", entry.title),
        ("classes", ", ".join(f"{known.index} {known.name}" for known in entry.classes)),
        ("images", entry.images),
        ("split", entry.split),
        ("license", entry.license),
        ("", entry.license_note),
        ("citation", entry.citation),
        ("doi", entry.doi),
        ("homepage", entry.homepage),
        ("way", _way(entry)),
        ("file", _file(entry.file)),
        ("by hand", entry.how_to_get),
        ("notes", entry.notes),
        ("verified", entry.verified),
    ]
    return "\n".join([entry.name, *(_row(title, text) for title, text in rows if text)])


def _way(entry: Entry) -> str:
    return "get" if entry.file is not None else "by hand, then convert"


def _file(file: RemoteFile | None) -> str:
    if file is None:
        return ""
    return f"{file.url} ({f'sha256 {file.sha256}' if file.sha256 else 'no published checksum'})"


def _row(title: str, text: str) -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent=f"  {title:<10}", subsequent_indent=" " * 12,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
