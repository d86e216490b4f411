"""The datasets of the catalog. Nothing here is a guess: what nobody published or we could not see is None
or said so in ``verified``. The addresses were recorded, not fetched, when this was written."""

from __future__ import annotations

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.data.catalog.entry import Entry, RemoteFile, classes

_GREY, _BLUE, _RED = (68, 68, 68), (0, 0, 255), (255, 0, 0)
_ORANGE, _SKY, _GREEN, _YELLOW = (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)

_NASA_COMMIT = "f50b5689a71cf6f86016fb4a5c5a2bb31e0397f3"
_NASA_FILES = (
    RemoteFile(
        f"nasa-pretrained-microscopy-models-{_NASA_COMMIT[:7]}.zip",
        f"https://github.com/nasa/pretrained-microscopy-models/archive/{_NASA_COMMIT}.zip",
    ),
)
_NASA_CITATION = (
    'J. Stuckner, B. Harder, T. M. Smith, "Microstructure segmentation with deep learning encoders pre-trained on '
    'a large microscopy dataset", npj Computational Materials 8 (2022)'
)
_NASA_VERIFIED = (
    "layout, names and mask values from copies of the train and val files and the repository's file list; "
    "the address was not fetched; GitHub publishes neither size nor checksum of such archives"
)


def _nasa(name: str, title: str, table: dict[str, tuple[int, int, int]], images: str, notes: str) -> Entry:
    return Entry(
        name=name,
        title=title,
        classes=classes(**table),
        images=images,
        licence="MIT",
        licence_note="the repository's README says that all data in it are under the licence of LICENSE.txt (MIT)",
        citation=_NASA_CITATION,
        doi="10.1038/s41524-022-00878-5",
        homepage="https://github.com/nasa/pretrained-microscopy-models",
        split="published (train, val, test folders)",
        files=_NASA_FILES,
        notes=notes,
        verified=_NASA_VERIFIED,
    )


_SUPER = {"matrix": _GREY, "secondary": _BLUE, "tertiary": _RED}
_EBC = {"background": _GREY, "oxide": (255, 215, 0), "crack": _RED}
_SUPER_TITLE = "Ni-base superalloys, gamma-prime precipitates, benchmark Super-{}"
_EBC_TITLE = "environmental barrier coatings, oxide layer and cracks, benchmark EBC-{}"
_OTHER_ALLOYS = "; the folder different_test (other alloys, see nasa-super4) is left out"
_EBC_LEAK = "; some specimens occur in more than one of the published splits"

_UHCS_COMMIT = "7aea6f37f5246bb2570e0300f224db7f186a5fc3"
_UHCS_NUMBERS = (
    6, 7, 75, 124, 220, 235, 295, 312, 333, 357, 360, 477,
    495, 579, 596, 599, 1061, 1150, 1176, 1219, 1289, 1528, 1579, 1648,
)  # fmt: skip
_UHCS_MIRROR = "https://data.materialsdatafacility.org/legacy/mdr_item_1496_v1/micrographs/micrographs"

_ENTRIES = (
    Entry(
        name="mudrocknet",
        title="uncemented muds of the Nankai Trough: clay, silt grains, pores",
        classes=classes(clay=_GREY, silt=(200, 40, 40), pore=(0, 158, 115)),
        images="more than 2,000 tiles",
        licence="MIT",
        licence_note="LICENSE of the repository that holds images and labels; the Digital Rocks Portal states its own",
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
            "folders, names and the licence from the repository's listing and loader; that 1 is silt and 2 is pores "
            "follows from the loader's colour table (red, green) and the README's figure; look at the contact "
            "sheet of `datasets check` before training. No picture was seen"
        ),
    ),
    _nasa("nasa-super1", _SUPER_TITLE.format(1), _SUPER, "10 train, 4 val, at least 4 test; 512 x 512",
          "the complete set"),
    _nasa("nasa-super2", _SUPER_TITLE.format(2), _SUPER, "4 train; 512 x 512",
          "few-shot: 4 of Super-1's training images" + _OTHER_ALLOYS),
    _nasa("nasa-super3", _SUPER_TITLE.format(3), _SUPER, "1 train; 512 x 512",
          "one-shot: 1 of Super-1's training images" + _OTHER_ALLOYS),
    _nasa("nasa-super4", _SUPER_TITLE.format(4), _SUPER, "4 train; 512 x 512",
          "few-shot, tested on other alloys, etchings and imaging conditions"),
    _nasa("nasa-ebc1", _EBC_TITLE.format(1), _EBC, "24 in all; 1024 x 1024",
          "the complete set" + _EBC_LEAK),
    _nasa("nasa-ebc2", _EBC_TITLE.format(2), _EBC, "at least 4 train; 1024 x 1024", "few-shot" + _EBC_LEAK),
    _nasa("nasa-ebc3", _EBC_TITLE.format(3), _EBC, "15 train, 3 val, 6 test; 1024 x 1024",
          "tested on a specimen (050317#3) that is in no other split"),
    Entry(
        name="shale-duvernay",
        title="Duvernay shale: mineral grains against clay aggregates",
        classes=classes(grain=(95, 48, 49), clay=_GREY),
        images="15 blocks of one mosaic; 384 and 512 pixels",
        licence="MIT",
        licence_note="LICENSE of the repository, (c) 2024 Government of Canada; it names the source code, and the "
        "pictures carry no other notice",
        citation=(
            'Z. Chen, X. Liu, J. Yang, E. Little, Y. Zhou, "Deep learning-based method for SEM image segmentation in '
            "mineral characterization, an example from Duvernay Shale samples in Western Canada Sedimentary "
            'Basin", Computers & Geosciences 138, 104450 (2020)'
        ),
        doi="10.1016/j.cageo.2020.104450",
        homepage="https://github.com/Jon-GSC/SEM_segmentation",
        split="none published; blocks of the strip from top to bottom: 60 % train, 20 % val, 20 % test",
        files=(
            RemoteFile(
                "sem-segmentation-59ca4d6.zip",
                "https://github.com/Jon-GSC/SEM_segmentation/archive/59ca4d6f841f866eb7eb5b147953acd2256dca92.zip",
            ),
        ),
        notes="coarse polygons; clay includes organic matter and pores; 101 overlapping tiles are put together first",
        verified=(
            "names from the repository's listing, mask values and the strip's shape from a copy; the order of the "
            "tiles is found by matching their overlaps; the address was not fetched, no checksum is published"
        ),
    ),
    Entry(
        name="uhcs",
        title="ultrahigh carbon steel: matrix, cementite network, spheroidite, Widmanstätten cementite",
        classes=classes(matrix=_GREY, network=_SKY, spheroidite=_ORANGE, widmanstatten=_YELLOW),
        images="24; 645 x 484",
        licence="CC BY 3.0 US (micrographs), CC BY-SA 3.0 US (labels)",
        licence_note="as other users recorded it from the publisher's pages (NIST, handles 11256/940 and 11256/964)",
        citation=(
            'B. L. DeCost, B. Lei, T. Francis, E. A. Holm, "High throughput quantitative metallography for complex '
            'microstructures using deep learning: a case study in ultrahigh carbon steel", Microscopy and '
            "Microanalysis 25 (2019); micrographs: B. L. DeCost et al., \"UHCSDB\", Integrating Materials and "
            "Manufacturing Innovation (2017), doi:10.1007/s40192-017-0097-0"
        ),
        doi="10.1017/S1431927618015635",
        homepage="https://hdl.handle.net/11256/964",
        split="from the six published validation sets: the first is test, the second val",
        files=(
            RemoteFile(
                f"uhcs-segment-{_UHCS_COMMIT[:7]}.zip",
                f"https://github.com/bdecost/uhcs-segment/archive/{_UHCS_COMMIT}.zip",
            ),
            *(RemoteFile(f"micrograph{one}.tif", f"{_UHCS_MIRROR}/micrograph{one}.tif") for one in _UHCS_NUMBERS),
        ),
        how_to_get=(
            "if an address fails: take the archive of https://hdl.handle.net/11256/964, and use 'hpddrnet-trt "
            "datasets convert uhcs SOURCE FOLDER'"
        ),
        notes="the instrument's banner (38 rows) is cut off; samples that occur in several splits are reported "
        "by `datasets check`",
        verified=(
            "names, values, banner and validation sets from the authors' loader and listing; the mirror's addresses "
            "and licences from another project's notes of 2026; no address was fetched"
        ),
    ),
    Entry(
        name="metaldam",
        title="additively manufactured steels: matrix, austenite, martensite/austenite, precipitates, defects",
        classes=classes(
            matrix=_GREY, austenite=_SKY, martensite_austenite=_ORANGE, precipitate=_GREEN, defect=(213, 94, 0)
        ),
        images="42; 1280 x 895 and 1024 x 703",
        licence=None,
        licence_note="the authors' repository states none; a third party's copy says MIT",
        citation=(
            "ArcelorMittal and DaSCI Andalusian Research Institute, \"MetalDAM: Metallography dataset from additive "
            'manufacturing"; J. Luengo et al., Information Fusion 78 (2022) 232-253'
        ),
        homepage="https://github.com/ari-dasci/OD-MetalDAM",
        split="none published; by image, ordered by the hash of the name: 15 % test, 15 % val",
        files=(
            RemoteFile(
                "MetalDAM_labeled.zip",
                "https://github.com/ari-dasci/OD-MetalDAM/releases/download/1.0/MetalDAM_labeled.zip",
            ),
        ),
        notes="most precipitates are not labelled, say the authors; specimens are not named",
        verified=(
            "classes and sizes from the authors' README, address and layout from two other projects' loaders; "
            "the address was not fetched"
        ),
    ),
    Entry(
        name="axondeepseg-sem",
        title="rat spinal cord: myelin and axons",
        classes=classes(background=_GREY, myelin=_SKY, axon=_ORANGE),
        images="10 of 8 animals",
        licence="MIT",
        licence_note='"License" in the dataset\'s dataset_description.json',
        citation=(
            'A. Zaimi et al., "AxonDeepSeg: automatic axon and myelin segmentation from microscopy data using '
            'convolutional neural networks", Scientific Reports 8, 3816 (2018)'
        ),
        doi="10.1038/s41598-018-22181-4",
        homepage="https://github.com/axondeepseg/data_axondeepseg_sem",
        split="none published; by animal, ordered by the hash of its number",
        files=(
            RemoteFile(
                "data_axondeepseg_sem-r20211130.zip",
                "https://github.com/axondeepseg/data_axondeepseg_sem/archive/r20211130.zip",
            ),
        ),
        notes="the values 130 and 233 that occur in masks are noise and become 255 (ignore)",
        verified=(
            "names from the repository's listing, mask values and address from two other projects' loaders; the "
            "address was not fetched"
        ),
    ),
    Entry(
        name="carbides-rpv",
        title="reactor pressure vessel steels: carbides",
        classes=classes(matrix=_GREY, carbide=_ORANGE),
        images="13 pairs of SE2 and in-lens; 2048 x 1404",
        licence=None,
        licence_note="not seen",
        citation=(
            'A. E. Gerçek, T. Korten, P. Chekhonin, M. Hassan, P. Steinbach, "Data-efficient U-Net for Segmentation '
            'of Carbide Microstructures in SEM Images of Steel Alloys", arXiv:2511.11485 (2025)'
        ),
        homepage="https://rodare.hzdr.de/record/4124",
        split="a hold-out folder",
        how_to_get="data.zip of https://rodare.hzdr.de/record/4124 (preprocessed/images, preprocessed/labels)",
        verified="the dataset's README; file names, label values and licence were not seen",
    ),
    Entry(
        name="superconductor-3d",
        title="iron-based superconductor ceramics, serial sections: two phases",
        classes=classes(phase_0=_GREY, phase_1=_ORANGE),
        images="1,000 random crops",
        licence="MIT",
        licence_note="README of the repository",
        citation=(
            'Y. Hirabayashi et al., "Deep learning for three-dimensional segmentation of electron microscopy images '
            'of complex ceramic materials", npj Computational Materials (2024)'
        ),
        doi="10.1038/s41524-024-01226-5",
        homepage="https://github.com/YamamotoLaboratory/3D-SEM-Segmentation",
        split="none: the crops overlap, so any split of them leaks",
        how_to_get="train_dataset.npy.gz in https://github.com/YamamotoLaboratory/3D-SEM-Segmentation",
        verified="README and the script that made the crops; the file was not seen, the classes are not named there",
    ),
    Entry(
        name="emps",
        title="particles in electron micrographs (EMPS), instance labels",
        classes=classes(background=_GREY, particle=_ORANGE),
        images="465",
        licence=None,
        licence_note="not seen",
        citation=(
            'B. Yildirim, J. M. Cole, "Bayesian Particle Instance Segmentation for Electron Microscopy Image '
            'Quantification", J. Chem. Inf. Model. (2021)'
        ),
        doi="10.1021/acs.jcim.0c01455",
        homepage="https://www.kaggle.com/datasets/batuhanyil/electron-microscopy-particle-segmentation",
        split="not known here",
        how_to_get="the homepage asks for an account; labels are instances (32-bit numbers): above 0 is particle",
        verified="a description by other users; files and licence were not seen",
    ),
    Entry(
        name="ic-layout",
        title="integrated circuits: tracks and vias",
        classes=classes(background=_GREY, track=_SKY, via=_ORANGE),
        images="4096 x 3536",
        licence="CC BY 4.0",
        licence_note="README of the repository: SEM images and labels",
        citation='"Towards Unsupervised SEM Image Segmentation for IC Layout Extraction"',
        homepage="https://github.com/emsec/unsupervised-ic-sem-segmentation",
        split="none known",
        how_to_get="see the homepage; labels are drawings (SVG) that must be made into pictures first",
        verified="the repository's README; no file was seen",
    ),
)

ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def find_entry(name: str) -> Entry:
    """The entry of that name; :class:`UsageError` lists the names when there is none."""
    if name not in ENTRIES:
        raise UsageError(f"there is no dataset {name!r} in the catalog; it has {', '.join(ENTRIES)}")
    return ENTRIES[name]
