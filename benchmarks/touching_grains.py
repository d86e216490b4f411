"""How well touching objects are told apart: simulated grains, whose number is known.

    python benchmarks/touching_grains.py

Discs, most of which touch another (70 %) and overlap it by up to a share of the sum of their radii; and the cells of a
Voronoi tessellation with a wall of 3 pixels that is missing in places. An object is found when a part overlaps it by an
intersection over union of more than one half; two in one part count as merged, one in two parts as cut.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.results.separate import separate

Numbers = npt.NDArray[np.int32]


def field(rng: np.random.Generator, size: int, sigma: float) -> npt.NDArray[np.float32]:
    """Smooth noise of unit variance."""
    noise = cv2.GaussianBlur(rng.standard_normal((size, size)).astype(np.float32), (0, 0), sigma)
    return np.asarray(noise / noise.std())


def discs(
    seed: int, count: int = 150, size: int = 700, radii: tuple[float, float] = (8, 30), overlap: float = 0.12,
    rough: float = 0.0,
) -> Numbers:  # fmt: skip
    """Numbers of discs, ``rough`` pixels of noise on their outlines."""
    rng = np.random.default_rng(seed)
    placed: list[tuple[float, float, float]] = []
    while len(placed) < count:
        radius, (x, y) = rng.uniform(*radii), rng.uniform(0, size, 2)
        if placed and rng.random() < 0.7:
            a, b, other = placed[rng.integers(len(placed))]
            angle, distance = rng.uniform(0, 2 * np.pi), (other + radius) * (1 - rng.uniform(0, overlap))
            x, y = a + distance * np.cos(angle), b + distance * np.sin(angle)
        free = all(np.hypot(x - a, y - b) > (radius + other) * (1 - overlap) for a, b, other in placed)
        if free and min(x, y) >= 0 and max(x, y) < size:
            placed.append((x, y, radius))
    numbers, nearest = np.zeros((size, size), np.int32), np.full((size, size), np.inf)
    rows, columns = np.mgrid[:size, :size]
    noise = rough * field(rng, size, 2)
    for number, (x, y, radius) in enumerate(placed, start=1):
        distance = np.hypot(columns - x, rows - y) - radius + noise
        inside = (distance < 0) & (distance < nearest)
        numbers[inside], nearest[inside] = number, distance[inside]
    return numbers


def cells(seed: int, count: int = 200, size: int = 700, open_from: float = 0.5) -> Numbers:
    """Numbers of Voronoi cells; the wall is missing where a smooth field exceeds ``open_from`` standard deviations."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    first, second = (np.full((size, size), np.inf, np.float32) for _ in range(2))
    numbers = np.zeros((size, size), np.int32)
    for number, (x, y) in enumerate(rng.uniform(0, size, (count, 2)), start=1):
        distance = np.hypot(columns - x, rows - y)
        second = np.minimum(second, np.maximum(first, distance))
        numbers[distance < first] = number
        first = np.minimum(first, distance)
    wall = (second - first < 3) & (field(rng, size, 8) < open_from)
    return np.where(wall, 0, numbers)


def compare(truth: Numbers, parts: Numbers) -> tuple[int, int, int]:
    """Objects found, parts that merge several, objects that are cut."""
    of_truth, of_parts = np.bincount(truth.ravel()), np.bincount(parts.ravel())
    pairs, shared = np.unique(np.stack([truth.ravel(), parts.ravel()]), axis=1, return_counts=True)
    (a, b), shared = pairs[:, pairs.all(axis=0)], shared[pairs.all(axis=0)]
    found = shared / (of_truth[a] + of_parts[b] - shared) > 0.5
    merged = np.bincount(b[shared > of_truth[a] / 2]) > 1
    cut = np.bincount(a[shared > of_parts[b] / 2]) > 1
    return int(found.sum()), int(merged.sum()), int(cut.sum())


KINDS: dict[str, Callable[[int], Numbers]] = {
    "discs, radius 8 to 30, overlap to 12 %": discs,
    "the same, outline rough by 1 pixel": lambda seed: discs(seed, rough=1.0),
    "the same, overlap to 25 %": lambda seed: discs(seed, overlap=0.25),
    "discs, radius 3 to 9": lambda seed: discs(seed, 400, 500, (3, 9)),
    "Voronoi cells, a third of the walls missing": cells,
    "Voronoi cells, a sixth missing": lambda seed: cells(seed, open_from=1.0),
}


def main() -> None:
    print("| grains | true | connected regions | separated | found | merged | cut |\n|---|---|---|---|---|---|---|")
    for kind, make in KINDS.items():
        sums = np.zeros(6, int)
        for seed in range(3):
            truth = make(seed)
            connected = cv2.connectedComponents((truth > 0).astype(np.uint8))[0] - 1
            parts, count = separate(truth > 0, smallest=10)
            sums += [np.count_nonzero(np.bincount(truth.ravel())[1:]), connected, count, *compare(truth, parts)]
        print(f"| {kind} | " + " | ".join(map(str, sums)) + " |", flush=True)


if __name__ == "__main__":
    main()
