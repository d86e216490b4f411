"""bioimage.io packages, version 0.5 of the format: https://github.com/bioimage-io/spec-bioimage-io.

Written with PyYAML alone. What is written is what its versions 0.5.4 to 0.5.12 have in common; their own
tool (``bioimageio test``) passes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image

from hpddrnet_trt import __version__
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.files import decoded_text, existing_file, read_file, sha256_of
from hpddrnet_trt.core.manifest import AxisRange, Manifest
from hpddrnet_trt.data.catalog import ENTRIES
from hpddrnet_trt.data.labels import overlay
from hpddrnet_trt.data.preprocess import admitted_size
from hpddrnet_trt.export.describe import describe
from hpddrnet_trt.graph.check import load_checked
from hpddrnet_trt.packages.contents import (
    Arrays,
    Files,
    PackageSettings,
    Packed,
    input_size,
    labels_of,
    license_of,
    run_plainly,
    test_picture,
)
from hpddrnet_trt.weights import FOLDER

FORMAT_VERSION = "0.5.4"
DESCRIPTION_FILE = "rdf.yaml"
CONFIG_KEY = "hpddrnet_trt"  # of what the format has no entry for
TEST_SIZE = 256
SAMPLE = "sample_{}.png"
MODEL, INPUT, README, COVER, LICENSE = "model.onnx", "test_input.npy", "README.md", "cover.png", "LICENSE.txt"
_SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_+\- ()]+")  # what the format admits
_NAME, _TEXT = 64, 500  # most letters of a name and a description
_NUMBERS = 16  # in a row; where there are more, only the model file has them
_OWN_PICTURES = re.compile(r"^!\[.*$\n?", re.MULTILINE)  # of a card, whose files are not in the package
_NETWORK = {
    "text": "H. Pan, Y. Hong, W. Sun, Y. Jia, \"Deep Dual-Resolution Networks for Real-Time and Accurate Semantic "
            "Segmentation of Traffic Scenes\", IEEE Transactions on Intelligent Transportation Systems 24 (2023)",
    "doi": "10.1109/TITS.2022.3228042",
}  # fmt: skip
Record = dict[str, Any]


def bioimageio_files(packed: Packed, settings: PackageSettings) -> Files:
    """The files of a package: ``rdf.yaml``, the ONNX file as it is, a test with its outputs, cover, text, license."""
    grey = test_picture(input_size(packed.input, settings.size, TEST_SIZE))
    content = read_file(packed.path, "model file")
    outputs = run_plainly(packed, content, packed.feed(grey))
    description = _description(packed, settings, outputs)
    files: Files = {
        MODEL: content,
        INPUT: _npy(_test_input(packed, grey)),
        **{f"test_{name}.npy": _npy(array) for name, array in outputs.items()},
        **({SAMPLE.format("image"): _png(grey)} if packed.input.channels == 1 else {}),
        **({SAMPLE.format("labels"): _png(outputs["labels"][0])} if "labels" in outputs else {}),
        COVER: _cover(grey, outputs, packed.manifest),
        README: _documentation(packed, description).encode(),
    }
    license = description["license"]
    if not isinstance(license, str):
        files[LICENSE] = (license["text"] + "\n").encode()
        description["license"] = {"source": LICENSE}
    if settings.checkpoint is not None:
        checkpoint = f"{settings.checkpoint.stem}.safetensors"
        files[checkpoint] = existing_file(settings.checkpoint, "checkpoint")
        description["attachments"] = [{"source": checkpoint, "sha256": sha256_of(settings.checkpoint)}]
    description["weights"] = {
        "onnx": {
            "source": MODEL,
            "sha256": hashlib.sha256(content).hexdigest(),
            "opset_version": max(entry.version for entry in load_checked(packed.path).opset_import if not entry.domain),
        }
    }
    text = yaml.safe_dump(description, sort_keys=False, allow_unicode=True, width=120)
    return {DESCRIPTION_FILE: text.encode(), **files}


def _description(packed: Packed, settings: PackageSettings, outputs: Arrays) -> Record:
    manifest = packed.manifest
    data = ENTRIES.get(manifest.data.name) if manifest.data is not None else None
    authors = settings.authors or (("The HPDDRNet-TRT authors",) if packed.path.parent == FOLDER else ())
    license = license_of(packed, settings)
    for value, what, option in ((authors, "an author", "--author NAME"), (license, "a license", "--license MIT")):
        if not value:
            raise UsageError(f"a bioimage.io package names {what}, and nothing says which; give {option}")
    assert license is not None
    trained = f", trained on {manifest.data.name}" if manifest.data is not None else ""
    spatial = _spatial_axes(packed)
    cite = [_NETWORK] if manifest.network.name.startswith(("hpddrnet", "ddrnet")) else []
    return {
        "format_version": FORMAT_VERSION,
        "type": "model",
        "name": _NOT_IN_NAMES.sub(" ", f"{manifest.name} SEM segmentation").strip()[:_NAME],
        "description": (
            f"Semantic segmentation of scanning electron micrographs ({', '.join(manifest.class_names)}) with "
            f"{manifest.network.name}{trained}."
        )[:_TEXT],
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "authors": [{"name": name.replace("/", " ").replace("\\", " ")} for name in authors],
        "license": license if _SPDX.fullmatch(license) else {"text": license},
        "cite": cite + ([{"text": data.citation, "doi": data.doi}] if data is not None else []),
        "tags": ["electron-microscopy", "scanning-electron-microscopy", "2d", "semantic-segmentation", "onnx"],
        "covers": [COVER],
        "documentation": README,
        "inputs": [_input(packed, spatial)],
        "outputs": [_output(name, array, manifest, spatial) for name, array in outputs.items()],
        "config": {
            "bioimageio": {"reproducibility_tolerance": [_tolerance(name, array) for name, array in outputs.items()]},
            CONFIG_KEY: {"version": __version__, "description": _without_lists(json.loads(manifest.to_json()))},
        },
    }


def _spatial_axes(packed: Packed) -> list[Record]:
    """Axes y and x of the input: how its sizes grow, and the pixel size that the network reads at."""
    pixel = packed.pixel_size_m
    scale = {} if pixel is None else {"unit": "nanometer", "scale": float(f"{pixel * 1e9:.6g}")}
    return [
        {"type": "space", "id": name, "size": _size(axis, packed.input.multiple), **scale}
        for name, axis in (("y", packed.input.height), ("x", packed.input.width))
    ]


def _size(axis: AxisRange, multiple: int) -> int | Record:
    return axis.fixed or {"min": admitted_size(1, axis, multiple), "step": multiple}


def _input(packed: Packed, spatial: list[Record]) -> Record:
    contract, normalization = packed.input, packed.manifest.normalization
    channels = ["grey"] if contract.channels == 1 else ["red", "green", "blue"]
    steps: list[Record] = [{"id": "ensure_dtype", "kwargs": {"dtype": contract.dtype}}]
    if contract.dtype == "float32":
        kwargs = {"axis": "channel", "mean": list(normalization.mean), "std": list(normalization.std)}
        steps.append({"id": "fixed_zero_mean_unit_variance", "kwargs": kwargs})
    return {
        "id": "image",
        "description": "micrograph, grey levels 0 to 255",
        "axes": [_batch(packed.input.batch), {"type": "channel", "channel_names": channels}, *spatial],
        "data": {"type": contract.dtype, "range": [0, 255]},
        "preprocessing": steps,
        "test_tensor": {"source": INPUT},
        **({"sample_tensor": {"source": SAMPLE.format("image")}} if contract.channels == 1 else {}),
    }


def _batch(axis: AxisRange) -> Record:
    return {"type": "batch", **({"size": 1} if axis.fixed == 1 else {})}


def _output(name: str, array: npt.NDArray[Any], manifest: Manifest, spatial: list[Record]) -> Record:
    """One output: of the picture's size, or, where it is another, of one that depends on the picture."""
    batch = {"type": "batch"}
    like_input = [{**axis, "size": {"tensor_id": "image", "axis_id": axis["id"]}} for axis in spatial]
    data: Record = {"type": str(array.dtype)}
    axes: list[Record]
    if name == "labels":
        axes, text = [batch, *like_input], "class of each pixel"
        data["values"] = list(manifest.class_names)
    elif name == "confidence":
        axes, text = [batch, *like_input], "softmax probability of that class"
        data["range"] = [0, 1]
    elif name == "logits":
        axes, text = [batch, {"type": "channel", "channel_names": list(manifest.class_names)}, *like_input], "scores"
    else:
        axes = [batch, {"type": "index", "id": "feature", "size": array.shape[1]}] + [
            {"type": "index", "id": each, "size": {"min": 1}} for each in ("row", "column")[: array.ndim - 2]
        ]
        text = "what tells whether the picture is like those of the training"
    return {
        "id": name, "description": text, "axes": axes, "data": data, "test_tensor": {"source": f"test_{name}.npy"},
        **({"sample_tensor": {"source": SAMPLE.format(name)}} if name == "labels" else {}),
    }  # fmt: skip


def _tolerance(name: str, array: npt.NDArray[Any]) -> Record:
    """Rounding differs between processors: a label at a boundary may change, a score a little."""
    if name == "labels":
        numbers = {"relative_tolerance": 0.0, "absolute_tolerance": 0.0, "mismatched_elements_per_million": 100}
    else:
        numbers = {"relative_tolerance": 0.01, "absolute_tolerance": float(abs(array.max())) * 0.005,
                   "mismatched_elements_per_million": 100}  # fmt: skip
    return {**numbers, "output_ids": [name], "weights_formats": ["onnx"]}


def _without_lists(value: Any) -> Any:
    """A description for people to read: None in place of long rows of numbers, which stay in the ONNX file."""
    if isinstance(value, dict):
        kept = {name: _without_lists(entry) for name, entry in value.items()}
        return {name: entry for name, entry in kept.items() if entry is not None}
    if isinstance(value, list):
        entries = [_without_lists(entry) for entry in value]
        numbers = len(value) > _NUMBERS and isinstance(value[0], int | float)
        return None if numbers or None in entries else entries
    return value


def _test_input(packed: Packed, grey: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """``[1, C, H, W]`` before the preprocessing that the description names."""
    return np.repeat(grey[None, None], packed.input.channels, axis=1).astype(packed.input.dtype)


def _npy(array: npt.NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _cover(grey: npt.NDArray[np.uint8], outputs: Arrays, manifest: Manifest) -> bytes:
    """The test picture beside its labels, twice as wide as high."""
    side = min(grey.shape)
    drawing = overlay(grey, labels_of(outputs)[0], manifest.palette)[:side, :side]
    return _png(np.hstack([np.dstack([grey[:side, :side]] * 3), drawing]))


def _png(picture: npt.NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG")
    return stream.getvalue()


def _documentation(packed: Packed, description: Record) -> str:
    """Markdown: what the model is, how it was judged, and the card beside it where there is one."""
    card = packed.path.with_suffix(".md")
    text = _OWN_PICTURES.sub("", decoded_text(read_file(card, "card"))) if card.is_file() else ""
    return "\n".join([
        f"# {description['name']}", "", description["description"], "",
        "One channel of grey levels 0 to 255 goes in, as its microscope wrote it; the class of each pixel comes out. "
        "Nothing needs to be set.", "",
        "The model calls every pixel one of its classes, on any picture. Use it on pictures like those of its "
        "training: material, contrast and pixel size.", "",
        "## Validation", "",
        "By masks of pictures that the training has not seen: `hpddrnet-trt evaluate model.onnx --data DATASET` prints "
        "IoU of each class. What is known of this file:", "",
        "```", describe(packed.manifest, MODEL), "```", "",
        *([re.sub(r"^#", "##", text, flags=re.MULTILINE)] if text else []),
        f"Written by hpddrnet-trt {__version__}.", "",
    ])  # fmt: skip
