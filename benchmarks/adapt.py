"""What is `hpddrnet-trt adapt` worth? Pictures with known truth are changed, adapted to without masks, and scored.

    python benchmarks/adapt.py DATASET model.safetensors --split val --shift none contrast=0.4 --mix 0.3 0.6 1
    python benchmarks/adapt.py DATASET one.safetensors=1/3 two.safetensors=2/3 --pictures 1 2 --json adapt.json

``MODEL=NUMBER/COUNT``: a model trained with ``data.fold=NUMBER/COUNT``, judged on the specimens that this fold of
``--fold-splits`` held out; a model alone is judged on ``--split``. Pictures are brought to the model's pixel size. The
table has the mean over the models, the JSON file every trial.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from hpddrnet_trt import Segmenter, load_segmenter
from hpddrnet_trt.accuracy.folds import shifts_at
from hpddrnet_trt.core.manifest import Manifest, read_manifest
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.data.augment import SHIFTS
from hpddrnet_trt.data.datasets import FolderDataset, with_mask_at
from hpddrnet_trt.training.adapt import Look, adapt
from hpddrnet_trt.weights import CHECKPOINT, locate

Grey8 = npt.NDArray[np.uint8]
Pair = tuple[Grey8, Grey8]


@dataclass(frozen=True)
class Score:
    """Against masks, 0..1: ``micro``: mean over the pictures of the micro-averaged IoU."""

    miou: float
    micro: float
    iou: list[float]


@dataclass(frozen=True)
class Trial:
    """One model adapted to ``pictures`` pictures under one shift, scored on all. ``mix``: as asked for, ``share``: as
    it became; ``seconds``: of processor time."""

    model: str
    shift: str
    mix: str
    share: float
    pictures: int
    truth_before: Score
    truth_after: Score
    before: Look
    after: Look
    changed: float
    doubts: list[str]
    seconds: float

    @property
    def gain(self) -> float:
        return self.truth_after.miou - self.truth_before.miou


def opened(path: Path, model: str, manifest: Manifest, split: str, fold_splits: Sequence[str]) -> list[Pair]:
    """Pictures and masks that the model is judged on, uint8 ``[H, W]``, at the pixel size that it reads."""
    dataset = FolderDataset.open(path)
    if "=" in model:
        number, count = (int(part) for part in model.split("=")[1].split("/"))
        split = "held out"
        dataset = dataset.fold(number, count, fold_splits, train="train", held_out=split)
    return [with_mask_at(*dataset.read(sample), manifest.read_at_m) for sample in dataset.split(split)]


def shifted(pairs: Sequence[Pair], name: str, value: float) -> list[Pair]:
    """At another setting, as folds are judged; of magnified pictures the middle part."""
    if name == "none":
        return list(pairs)
    (shift,) = shifts_at([(name, value)])
    return [shift(image, mask, value, np.random.default_rng(place)) for place, (image, mask) in enumerate(pairs)]


def scored(segmenter: Segmenter, pairs: Sequence[Pair]) -> Score:
    compared = LabelComparison(len(segmenter.manifest.classes))
    for image, mask in pairs:
        compared.update(segmenter.segment(image).labels, mask)
    scores = compared.scores()
    return Score(scores.miou, scores.mean_image_micro_iou, [float(value) for value in scores.iou])


def trials(checkpoint: Path, name: str, pairs: Sequence[Pair], options: argparse.Namespace) -> Iterator[Trial]:
    for shift in options.shift:
        setting, _, value = shift.partition("=")
        seen = shifted(pairs, setting, float(value or math.nan))
        before = scored(load_segmenter(checkpoint, precision="fp32", threads=1), seen)
        for count in sorted({min(count, len(seen)) for count in options.pictures or [len(seen)]}):
            with tempfile.TemporaryDirectory() as folder:
                for place, (image, _) in enumerate(seen[:count]):
                    Image.fromarray(image).save(Path(folder, f"{place:04}.png"))
                for mix in options.mix:
                    target = Path(folder, "adapted.safetensors")
                    begin = time.process_time()
                    share = None if mix == "auto" else float(mix)
                    result = adapt(checkpoint, Path(folder, "*.png"), target, mix=share)
                    seconds = time.process_time() - begin
                    after = scored(load_segmenter(target, precision="fp32", threads=1), seen)
                    yield Trial(name, shift, mix, result.mix, count, before, after, result.before, result.after,
                                result.changed, result.doubts, round(seconds, 1))  # fmt: skip


def table(found: Sequence[Trial], classes: Sequence[str]) -> Iterator[str]:
    """Before and after in percent, the mean over models; spread: of the gains, their standard deviation."""
    titles = ["shift", "mix", "pictures", "mIoU", "gain", "spread", "micro-IoU", *classes, "distance", "agreement",
              "warned", "core s"]  # fmt: skip
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)
    for key in dict.fromkeys((trial.shift, trial.mix, trial.pictures) for trial in found):
        same = [trial for trial in found if (trial.shift, trial.mix, trial.pictures) == key]
        gains = [trial.gain for trial in same]
        both = [(trial.truth_before, trial.truth_after) for trial in same]
        cells = [key[0], key[1], str(key[2])]
        cells += [pair([(one.miou, other.miou) for one, other in both]), f"{100 * mean(gains):+.1f}"]
        cells += [f"{100 * float(np.std(gains, ddof=1)):.1f}" if len(gains) > 1 else "–"]
        cells += [pair([(one.micro, other.micro) for one, other in both])]
        cells += [pair([(one.iou[index], other.iou[index]) for one, other in both]) for index in range(len(classes))]
        looks = [(trial.before, trial.after) for trial in same]
        distances = [(one.distance or math.nan, other.distance or math.nan) for one, other in looks]
        cells += [pair(distances, factor=1, digits=2), pair([(one.agreement, other.agreement) for one, other in looks])]
        cells += [f"{sum(bool(trial.doubts) for trial in same)} of {len(same)}"]
        cells += [f"{mean(trial.seconds for trial in same):.0f}"]
        yield "| " + " | ".join(cells) + " |"


def pair(values: Sequence[tuple[float, float]], factor: float = 100, digits: int = 1) -> str:
    before, after = (factor * mean(side) for side in zip(*values, strict=True))
    return "–" if math.isnan(before) else f"{before:.{digits}f} → {after:.{digits}f}"


def verdicts(found: Sequence[Trial]) -> str:
    """How often a warning was right: worse is a loss of more than 0.2 points of mIoU."""
    counts = {(warned, worse): 0 for warned in (True, False) for worse in (True, False)}
    for trial in found:
        counts[bool(trial.doubts), trial.gain < -0.002] += 1
    return (
        f"warned: {counts[True, True]} worse, {counts[True, False]} not worse; "
        f"not warned: {counts[False, True]} worse, {counts[False, False]} not worse"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL[=NUMBER/COUNT]")
    parser.add_argument("--split", default="val")
    parser.add_argument("--fold-splits", nargs="+", default=["train", "val"])
    parser.add_argument("--shift", nargs="+", default=["none", "contrast=0.4", "noise=15", "magnification=2"],
                        help=f"none, or NAME=VALUE of {', '.join(shift.name for shift in SHIFTS)}")  # fmt: skip
    parser.add_argument("--mix", nargs="+", default=["auto"], help="shares, or auto: what `adapt` chooses")
    parser.add_argument("--pictures", nargs="+", type=int, help="adapt to so many of them (default: all)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Trial] = []
    for model in options.models:
        checkpoint = locate(model.split("=")[0], CHECKPOINT)
        manifest = read_manifest(checkpoint)
        pairs = opened(options.dataset, model, manifest, options.split, options.fold_splits)
        for trial in trials(checkpoint, model, pairs, options):
            found.append(trial)
            if options.json:
                options.json.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")
    print("\n".join([*table(found, manifest.class_names), "", verdicts(found)]))


if __name__ == "__main__":
    main()
