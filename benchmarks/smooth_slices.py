"""What the vote of neighboring slices does to a volume whose truth is known.

    python benchmarks/smooth_slices.py ../shared/data/nasa-super1

A volume is a micrograph with its mask, both warped a little more in each slice (so that borders move by so many pixels
from one to the next, at most), with noise and a brightness of its own in every slice. Into it go discs from elsewhere
in the same slice that are there for a few slices only: features thinner than the window. The model segments each slice;
then the slices vote. Errors are percentages of pixels whose label is not that of the mask: of all pixels outside the
discs, and of those pixels of the discs whose class is another than without them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.inference import Segmenter, load_segmenter
from hpddrnet_trt.mosaic.store import majority

SLICES, RADIUS, DISCS = 13, 28, 8  # of a volume, of a disc in pixels, for each thickness
THICKNESSES, WINDOWS = (1, 2, 3, 4, 5), (1, 3, 5, 7)
Pixels = npt.NDArray[np.uint8]


def volume(picture: Pixels, mask: Pixels, speed: float, rng: np.random.Generator) -> tuple[Pixels, Pixels, Pixels]:
    """Slices and their truth ``[Z, H, W]``, and the thickness of the disc that changes a pixel, 0 outside discs."""
    height, width = mask.shape
    shift = np.stack([cv2.GaussianBlur(rng.standard_normal(mask.shape), (0, 0), 40) for _ in "yx"])
    shift *= speed / np.hypot(*shift).max()
    grid = np.indices(mask.shape)
    starts = [(k, rng.integers(1, SLICES - k)) for k in THICKNESSES for _ in range(DISCS)]
    places = rng.permutation([(y, x) for y in range(40, height - 40, 60) for x in range(40, width - 40, 60)])
    slices, truth = np.empty((2, SLICES, height, width), np.uint8)
    discs = np.zeros(slices.shape, np.uint8)
    for z in range(SLICES):
        y, x = (grid + (z - SLICES // 2) * shift).astype(np.float32)
        warped = cv2.remap(picture, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
        labels = cv2.remap(mask, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
        inside = np.zeros(mask.shape, np.uint8)
        for (thickness, first), (top, left) in zip(starts, places, strict=False):
            if first <= z < first + thickness:
                cv2.circle(inside, (int(left), int(top)), RADIUS, thickness, -1)
        elsewhere, seen = (np.roll(one, (height // 2 + 17, width // 2 + 29), (0, 1)) for one in (labels, warped))
        slices[z] = np.where(inside > 0, seen, warped)
        truth[z] = np.where(inside > 0, elsewhere, labels)
        discs[z] = np.where(elsewhere != labels, inside, np.where(inside > 0, 255, 0))
    return slices, truth, discs


def noisy(slices: Pixels, sigma: float, rng: np.random.Generator) -> Pixels:
    gain = rng.normal(1, 0.03, (SLICES, 1, 1))
    return np.clip(slices * gain + rng.normal(0, sigma, slices.shape), 0, 255).astype(np.uint8)


def voted(labels: Pixels, window: int) -> Pixels:
    reach = window // 2
    spans = [(max(0, z - reach), z + reach + 1) for z in range(SLICES)]
    return np.stack([majority(labels[first:end], z - first) for z, (first, end) in enumerate(spans)])


def measure(segmenter: Segmenter, pairs: list[tuple[Pixels, Pixels]], speed: float, sigma: float) -> None:
    """Print a row for each window."""
    rows = {window: np.zeros((2, 1 + len(THICKNESSES))) for window in WINDOWS}  # wrong and all pixels
    for seed, (picture, mask) in enumerate(pairs):
        rng = np.random.default_rng(seed)
        slices, truth, discs = volume(picture, mask, speed, rng)
        labels = np.stack([segmenter.segment(one).labels for one in noisy(slices, sigma, rng)])
        for window, sums in rows.items():
            wrong = voted(labels, window) != truth
            for column, thickness in enumerate((0, *THICKNESSES)):
                sums[:, column] += wrong[discs == thickness].sum(), (discs == thickness).sum()
    for window, (bad, every) in rows.items():
        slow, *thin = 100 * bad / every
        cells = [f"{slow:.2f}", *(f"{share:.0f}" for share in thin)]
        print(f"| {speed:g} | {sigma:g} | {'none' if window == 1 else window} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--model", default="nasa-super1")
    arguments = parser.parse_args()
    dataset = FolderDataset.open(arguments.dataset)
    pairs = [(picture[..., 0] if picture.ndim == 3 else picture, mask)
             for picture, mask in map(dataset.load, dataset.split("test"))]  # fmt: skip
    print("| pixels a slice | noise | slices | slow | " + " | ".join(f"{k} thick" for k in THICKNESSES) + " |")
    print("|" + "---|" * (4 + len(THICKNESSES)))
    with load_segmenter(arguments.model) as segmenter:
        for speed in (0.5, 2.0):
            for sigma in (0.0, 12.0, 24.0):
                measure(segmenter, pairs, speed, sigma)


if __name__ == "__main__":
    main()
