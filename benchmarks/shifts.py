"""What are models worth at other settings of the microscope? One table of several files.

    python benchmarks/shifts.py DATASET before.onnx after.onnx --splits val test --shift magnification=0.35 noise=15

A row is a setting, a column a model; a cell has mIoU, the micro-averaged IoU (mean over the pictures of these splits)
and the IoU of the class that is the rarest in the masks. Of enlarged pictures the middle part is shown. All see the
same noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.accuracy.folds import shifts_at
from hpddrnet_trt.accuracy.robustness import measure_robustness
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.core.metrics import Scores
from hpddrnet_trt.core.text import plain
from hpddrnet_trt.data.datasets import FolderDataset

USUAL = (
    *(f"magnification={value}" for value in (0.35, 0.5, 0.7, 1.4, 2, 3)), "contrast=0.4", "contrast=2.5",
    "brightness=-60", "brightness=60", "gamma=0.5", "gamma=2", "noise=15", "noise=40", "defocus=1.5", "defocus=3",
)  # fmt: skip


def scores(model: str, dataset: FolderDataset, settings: Sequence[str], engine: str) -> dict[str, Scores]:
    """Of one model on all pictures of ``dataset``, by setting; ``as they are`` first."""
    shifts = shifts_at((name, float(value)) for name, value in (setting.split("=") for setting in settings))
    found: dict[str, Scores] = {}
    with load_segmenter(model, engine=engine, precision="file") as segmenter:
        for sweep in measure_robustness(segmenter, dataset, "held out", shifts=shifts).sweeps:
            for point in sweep.points:
                neutral = point.value == sweep.shift.neutral
                if point.scores is not None:
                    found["as they are" if neutral else f"{sweep.shift.name} {point.value:g}"] = point.scores
    first = found.pop("as they are")
    return {"as they are": first, **found}


def rarest_class(dataset: FolderDataset) -> int:
    """Of those that the masks hold."""
    masks = (dataset.load(sample)[1] for sample in dataset.split("held out"))
    pixels = np.sum([np.bincount(mask.ravel(), minlength=256) for mask in masks], axis=0)[: len(dataset.classes)]
    return int(np.where(pixels > 0, pixels, pixels.sum() + 1).argmin())


def table(models: Sequence[str], results: Sequence[dict[str, Scores]], rarest: int, name: str) -> str:
    """Markdown; percent."""
    head = ["mIoU, micro-IoU, " + name, *models]
    lines = [head, ["---"] * len(head)]
    for setting in results[0]:
        cells = [
            ", ".join(f"{100 * value:.1f}" for value in (found.miou, found.mean_image_micro_iou, found.iou[rarest]))
            for found in (result[setting] for result in results)
        ]
        lines.append([setting, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("models", nargs="+", help="shipped names, .onnx or .safetensors files")
    parser.add_argument("--splits", nargs="+", default=["val"])
    parser.add_argument("--shift", nargs="+", default=list(USUAL), metavar="NAME=VALUE")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    dataset = FolderDataset.open(given.dataset)
    dataset = replace(dataset, samples={"held out": dataset.pooled(given.splits)})
    results = [scores(model, dataset, given.shift, given.engine) for model in given.models]
    rarest = rarest_class(dataset)
    print(table([Path(model).stem for model in given.models], results, rarest, dataset.class_names[rarest]))
    if given.json is not None:
        record = {
            model: {setting: vars(found) for setting, found in result.items()}
            for model, result in zip(given.models, results, strict=True)
        }
        write_text(given.json, json.dumps(plain(record), indent=1) + "\n")


if __name__ == "__main__":
    main()
