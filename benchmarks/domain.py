"""Does a model tell foreign pictures from its own? Distances, states and two baselines as Markdown tables.

    python benchmarks/domain.py --data DATA nasa-super1=nasa-super1 shale.onnx=shale-duvernay

``DATA`` holds dataset folders; each argument is a model with statistics of its domain and the folder it was trained
on. Negatives are its val and test pictures, positives the pictures of all other folders. Baselines: one minus the mean
probability of the labels, and the distance of grey-level statistics from those of the training pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt import Segmenter, load_segmenter
from hpddrnet_trt.data.datasets import image_files
from hpddrnet_trt.export.images import read_grey

Grey = npt.NDArray[np.uint8]
PERCENTILES = (1, 25, 50, 75, 99)
SHIFTED = 512  # pixels: the middle of a picture that is changed


@dataclass(frozen=True)
class Seen:
    """One picture as the model and the baselines see it."""

    folder: str
    split: str
    name: str
    state: str
    distance: float
    doubt: float
    grey: npt.NDArray[np.float64]


def middle(image: Grey, size: int) -> Grey:
    top, left = (max(0, edge - size) // 2 for edge in image.shape)
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def rounded(values: npt.NDArray[Any]) -> Grey:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def shifts(image: Grey) -> Iterator[tuple[str, Grey]]:
    """Contrast, brightness, noise, focus and magnification, each changed alone."""
    part = middle(image, SHIFTED).astype(np.float32)
    for gamma in (0.5, 0.7, 1.4, 2.0):
        yield f"gamma {gamma}", rounded(255 * (part / 255) ** gamma)
    for gain in (0.5, 0.7, 1.4, 2.0):
        yield f"contrast x{gain}", rounded((part - part.mean()) * gain + part.mean())
    for grey in (-40, 40):
        yield f"brightness {grey:+d}", rounded(part + grey)
    for noise in (10, 20, 40):
        yield f"noise, sd {noise}", rounded(part + np.random.default_rng(0).normal(0, noise, part.shape))
    for blur in (1, 2, 4):
        yield f"defocus, sd {blur} px", rounded(cv2.GaussianBlur(part, (0, 0), blur))
    for factor in (0.25, 0.5, 0.7, 1.5, 2.0, 3.0):
        source = middle(image, int(2 * SHIFTED / factor))
        method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
        scaled = cv2.resize(source, None, fx=factor, fy=factor, interpolation=method)
        yield f"magnification x{factor}", middle(np.asarray(scaled, np.uint8), 2 * SHIFTED)


def see(segmenter: Segmenter, image: Grey, folder: str, split: str, name: str) -> Seen:
    result = segmenter.segment(image)
    assert result.domain.distance is not None, "the model has no statistics; run hpddrnet-trt describe-domain"
    assert result.confidence is not None
    grey = np.array([image.mean(), image.std(), *np.percentile(image, PERCENTILES)])
    return Seen(
        folder, split, name, result.domain.state, result.domain.distance, 1 - float(result.confidence.mean()), grey
    )


def area_under_curve(negative: Sequence[float], positive: Sequence[float]) -> float:
    """Share of pairs in which the positive has the higher score."""
    low, high = np.array(negative)[:, None], np.array(positive)[None]
    return float((high > low).mean() + (high == low).mean() / 2)


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def states(seen: Sequence[Seen]) -> str:
    return " / ".join(str(sum(each.state == state for each in seen)) for state in ("familiar", "unusual", "foreign"))


def examine(model: str, home: str, data: Path, largest: int) -> None:
    pictures = [
        (path.relative_to(data).parts[0], path.parent.name, path)
        for folder in sorted({each.parent for each in data.rglob("*") if each.suffix in (".png", ".tif")})
        if "masks" not in folder.parts
        for path in image_files(folder)
    ]
    with load_segmenter(model, engine="onnxruntime", precision="file", confidence=True, threads=1) as segmenter:
        seen, changed = [], dict[str, list[Seen]]()
        for folder, split, path in pictures:
            image = read_grey(path)
            seen.append(see(segmenter, middle(image, largest), folder, split, path.name))
            if folder == home and split in ("val", "test"):
                for what, version in shifts(image):
                    changed.setdefault(what, []).append(see(segmenter, version, folder, split, path.name))
    own = [each for each in seen if each.folder == home]
    training = np.array([each.grey for each in own if each.split == "train"])
    held_out = [each for each in own if each.split != "train"]
    foreign = [each for each in seen if each.folder != home]
    print(f"\n### {model}, trained on {home}\n")
    print("| pictures | number | distance | familiar / unusual / foreign |\n|---|---|---|---|")
    rows = [(f"{home}, {split}", [each for each in own if each.split == split]) for split in ("train", "val", "test")]
    rows += [(name, [each for each in foreign if each.folder == name]) for name in sorted({e.folder for e in foreign})]
    for what, group in [*rows, *((f"val and test, {what}", group) for what, group in changed.items())]:
        print(f"| {what} | {len(group)} | {spread([each.distance for each in group])} | {states(group)} |")

    def grey_distance(each: Seen) -> float:
        return float(np.linalg.norm((each.grey - training.mean(0)) / np.maximum(training.std(0), 1)))

    print("\n| score | AUROC, val and test against foreign |\n|---|---|")
    for name, score in (
        ("distance", lambda each: each.distance),
        ("1 - mean probability", lambda each: each.doubt),
        ("grey levels", grey_distance),
    ):
        print(f"| {name} | {area_under_curve([*map(score, held_out)], [*map(score, foreign)]):.3f} |")
    alarms = sum(each.state != "familiar" for each in held_out)
    missed = sum(each.state == "familiar" for each in foreign)
    print(f"\nFalse alarms: {alarms} of {len(held_out)}; missed: {missed} of {len(foreign)}.", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL=FOLDER")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--largest", type=int, default=1024, help="pixels: the middle of larger pictures is read")
    arguments = parser.parse_args()
    for pair in arguments.models:
        model, home = pair.rsplit("=", 1)
        examine(model, home, arguments.data, arguments.largest)


if __name__ == "__main__":
    main()
