"""Do INT8, FP16 and BF16 keep the labels of FP32 at other settings of the microscope? Agreement and mIoU.

    hpddrnet-trt calibrate model.onnx model.int8.onnx --data DATASET --under-shift
    python benchmarks/int8_shift.py model.onnx model.int8.onnx --data DATASET --json shift.json

All run on the pictures of val and test as they are and at other contrast, gamma, dose and magnification: the FP32 file
in FP32 (ONNX Runtime, what the others are compared with), FP16 (rounded by arithmetic) and BF16 (OpenVINO, on
processors with AMX what `auto` takes), INT8 files for TensorRT in OpenVINO and, with --simulate, with TensorRT's
rounding, and INT8 files for ONNX Runtime there. A row is a file: share of labels equal to those of FP32 on the worst
picture, and mIoU of the classes in the masks over all.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpddrnet_trt import Segmenter, load_segmenter
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.export.images import Crop, at_setting
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.graph.precision import to_half
from hpddrnet_trt.graph.rounding import simulate_rounding
from hpddrnet_trt.inference.matched import matched
from hpddrnet_trt.weights import locate

Labels = npt.NDArray[np.uint8]
SETTINGS: tuple[tuple[str, float] | None, ...] = (
    None, ("contrast", 0.4), ("contrast", 2.5), ("gamma", 2.2), ("noise", 15), ("magnification", 0.5),
    ("magnification", 2.5),
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One picture at one setting, with the labels of its mask."""

    image: Micrograph
    mask: Labels


def in_words(setting: tuple[str, float] | None) -> str:
    return "as they are" if setting is None else f"{setting[0]} {setting[1]:g}".replace("noise", "dose")


def pictures(dataset: FolderDataset, splits: Sequence[str], setting: tuple[str, float] | None) -> Iterator[Picture]:
    """Of all splits; a magnified one shows the middle, and states its pixel size as before."""
    for sample in (sample for split in splits for sample in dataset.split(split)):
        image, mask = dataset.read(sample)
        crop = Crop(sample.image, 0, 0, shift=setting)
        shown, labels = at_setting(image.pixels, mask, crop, *mask.shape)
        yield Picture(replace(image, pixels=np.ascontiguousarray(shown)), labels)


def rounded(path: Path, folder: Path, *, half: bool) -> Segmenter:
    """The file with the rounding of its types, or of FP16 throughout, on ONNX Runtime."""
    model, manifest = load_model(path)
    model = simulate_rounding(to_half(model) if half else model)
    target = save_model(model, folder / f"{path.stem}.rounded.onnx", manifest)
    return Segmenter(OnnxRuntimeEngine(target, threads=1))


def opened(model: Path, files: Sequence[Path], folder: Path, simulate: bool) -> Iterator[tuple[str, Segmenter]]:
    """Every way to run the files, with the name of its row."""
    yield "FP16, rounded", rounded(model, folder, half=True)
    yield "BF16, OpenVINO", load_segmenter(model, engine="openvino", precision="bf16", threads=1)
    for path in files:
        if read_manifest(path).quantized_for == "onnxruntime":
            yield f"{path.name}, ONNX Runtime", load_segmenter(path, engine="onnxruntime", precision="file", threads=1)
            continue
        yield f"{path.name}, OpenVINO", load_segmenter(path, engine="openvino", precision="file", threads=1)
        if simulate:
            yield f"{path.name}, TensorRT's rounding", rounded(path, folder, half=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="FP32 ONNX file, or the name of a model that comes with the package")
    parser.add_argument("files", nargs="*", type=Path, help="its INT8 files")
    parser.add_argument("--data", type=Path, required=True, help="dataset with masks")
    parser.add_argument("--splits", nargs="+", default=["val", "test"])
    parser.add_argument("--simulate", action="store_true", help="also TensorRT's arithmetic, by rounding")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    model = locate(arguments.model, ".onnx")
    dataset = FolderDataset.open(arguments.data)
    classes = len(dataset.classes)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        reference = load_segmenter(model, engine="onnxruntime", precision="file", threads=1)
        reference, dataset = matched(stack.enter_context(reference), dataset)
        ways = dict(opened(model, arguments.files, Path(folder), arguments.simulate))
        ways = {name: matched(stack.enter_context(way), dataset)[0] for name, way in ways.items()}
        table: dict[str, dict[str, tuple[float, float, float]]] = {name: {} for name in ("FP32", *ways)}
        for setting in progress_bar(SETTINGS, desc="settings", unit="setting"):
            counts = {name: (LabelComparison(classes), LabelComparison(classes)) for name in table}
            for picture in pictures(dataset, arguments.splits, setting):
                truth = reference.segment(picture.image).labels
                for name, way in (("FP32", None), *ways.items()):
                    labels = truth if way is None else way.segment(picture.image).labels
                    for comparison, expected in zip(counts[name], (truth, picture.mask), strict=True):
                        comparison.update(labels, expected)
            for name, (equal, masks) in counts.items():
                table[name][in_words(setting)] = equal.agreement, equal.worst_agreement, masks.scores().masked_miou
    print("| worst picture's equal labels, mIoU, % | " + " | ".join(map(in_words, SETTINGS)) + " |")
    print("|---" * (1 + len(SETTINGS)) + "|")
    for name, row in table.items():
        cells = (f"{100 * worst:.2f}, {100 * miou:.1f}" for _, worst, miou in row.values())
        print(f"| {name} | " + " | ".join(cells) + " |")
    if arguments.json is not None:
        keys = "agreement", "worst_agreement", "masked_miou"
        record = {name: {at: dict(zip(keys, v, strict=True)) for at, v in row.items()} for name, row in table.items()}
        write_text(arguments.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
