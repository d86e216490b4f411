"""How often do the 95 % intervals of `segment` hold the true area fraction?

The temperature and the errors of fractions are measured on one split, as at the end of training, and the intervals are
tried on another: on whole pictures and on crops of them, with the masks as truth. Beside them what pixels that were
independent would give. Without --data, on simulated micrographs whose truth is exact, for several numbers of held-out
pictures, each drawn many times.

    python benchmarks/fraction_coverage.py nasa-super1 --data DATASET
    python benchmarks/fraction_coverage.py runs/demo/demo.safetensors --pictures 60
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.manifest import FractionErrorRecord
from hpddrnet_trt.core.uncertainty import (
    CROPS,
    FractionErrors,
    Reliability,
    ScoredPicture,
    fit_fraction_errors,
    fit_temperature,
    fraction_errors,
    half_widths,
)
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.inference import Segmenter, load_segmenter
from hpddrnet_trt.inference.uncertainty import scored, scored_picture

HELD_OUT = (1, 2, 4, 8, 16)
DRAWS = 100
SIMULATED = {"height": 512, "width": 512, "magnification": 2.0}  # as of the recipe demo
SEED = 777  # of none of its pictures


def held(sizes: FractionErrors, record: FractionErrorRecord) -> npt.NDArray[np.bool_]:
    """Which fractions ``[n, C]`` lie in their interval."""
    widths = half_widths(sizes.shares, round(sizes.pixels), record)
    return np.asarray(np.abs(sizes.errors) <= widths)


def independent(sizes: FractionErrors) -> npt.NDArray[np.bool_]:
    """The same were pixels independent: 1.96 standard deviations of a sum of coin tosses."""
    return np.asarray(np.abs(sizes.errors) <= 1.96 * np.sqrt(sizes.shares / sizes.pixels))


def on_splits(segmenter: Segmenter, dataset: FolderDataset) -> None:
    pictures = {split: list(scored(segmenter, dataset, dataset.split(split))) for split in ("val", "test")}
    print("| measured on | tried on | temperature | ECE before, after | fractions of | n | held | were pixels "
          "independent | half width, error (points of area) |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for known, new in (("val", "test"), ("test", "val")):
        temperature = fit_temperature(pictures[known])
        record = fit_fraction_errors(pictures[known], temperature)
        assert record is not None
        errors = [Reliability.of(pictures[new], each).expected_calibration_error for each in (None, temperature)]
        for crop in (*CROPS, None):
            sizes = fraction_errors(pictures[new], temperature, crop)
            if sizes is None:
                continue
            half = half_widths(sizes.shares, round(sizes.pixels), record)
            name = "pictures" if crop is None else f"crops of {crop}"
            print(
                f"| {known} ({record.pictures}) | {new} | {temperature:.2f} | {errors[0]:.3f}, {errors[1]:.3f} | "
                f"{name} | {sizes.errors.size} | {held(sizes, record).mean():.0%} | {independent(sizes).mean():.0%} | "
                f"{100 * half.mean():.2f}, {100 * np.abs(sizes.errors).mean():.2f} |"
            )


def on_simulated(segmenter: Segmenter, count: int) -> None:
    pool = [scored_simulation(segmenter, number) for number in range(count)]
    rng = np.random.default_rng(0)
    print("| held-out pictures | fractions of | held, mean | held, worst of 20 draws | were pixels independent | half "
          "width, error (points of area) |\n|---|---|---|---|---|---|")  # fmt: skip
    for known in HELD_OUT:
        rows: dict[int | None, list[tuple[float, float, float, float]]] = {crop: [] for crop in (*CROPS, None)}
        for _ in range(DRAWS):
            order = rng.permutation(count)
            temperature = fit_temperature([pool[place] for place in order[:known]])
            record = fit_fraction_errors([pool[place] for place in order[:known]], temperature)
            assert record is not None
            new: Sequence[ScoredPicture] = [pool[place] for place in order[known : known + 20]]
            for crop, found in rows.items():
                sizes = fraction_errors(new, temperature, crop)
                assert sizes is not None
                half = half_widths(sizes.shares, round(sizes.pixels), record).mean()
                error = float(np.abs(sizes.errors).mean())
                found.append((float(held(sizes, record).mean()), float(independent(sizes).mean()), float(half), error))
        for crop, found in rows.items():
            shares = np.array(found)
            print(
                f"| {known} | {'pictures' if crop is None else f'crops of {crop}'} | {shares[:, 0].mean():.1%} | "
                f"{np.quantile(shares[:, 0], 0.05):.0%} | {shares[:, 1].mean():.0%} | {100 * shares[:, 2].mean():.2f}, "
                f"{100 * shares[:, 3].mean():.2f} |"
            )


def scored_simulation(segmenter: Segmenter, number: int) -> ScoredPicture:
    grey, truth = simulate(seed=[SEED, number], **SIMULATED)  # type: ignore[arg-type]
    return scored_picture(segmenter.segment(grey), truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", help="dataset with masks; without: simulated micrographs")
    parser.add_argument("--pictures", type=int, default=60, help="simulated ones")
    arguments = parser.parse_args()
    with load_segmenter(arguments.model, precision="file", intervals=True) as segmenter:
        if arguments.data:
            on_splits(segmenter, FolderDataset.open(arguments.data))
        else:
            on_simulated(segmenter, arguments.pictures)


if __name__ == "__main__":
    main()
