"""How often do the 95 % intervals of `evaluate` hold the truth? Drawn from pictures whose truth is known.

A pool of pictures stands for all there are: simulated ones (specimens of smooth phases, predicted by a model that is
better on some specimens than on others), or those of a dataset with a model's predictions (--model, --data). Its own
figures are the truth. Some pictures, or whole specimens, are drawn from it many times, and it is counted how often the
interval holds the figure of the pool; beside it the plain percentile interval of the same resamples.

    python benchmarks/coverage.py [--model MODEL --data DATASET | --failures 0.05] [--draws 500]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.accuracy.measurements import Measured, class_errors, measure
from hpddrnet_trt.core.intervals import Interval, by_unit, resamples, t_interval
from hpddrnet_trt.core.metrics import LabelComparison, areas, mean_iou, score_intervals

CLASSES, EDGE, SPECIMENS, OF_SPECIMEN = 3, 96, 400, 4
DRAWN = (2, 5, 10, 20)


class Picture(NamedTuple):
    group: str
    counts: npt.NDArray[np.int64]
    measured: Measured


def simulated(rng: np.random.Generator, failures: float) -> list[Picture]:
    """Two phases and a rare third one; errors of a picture are those of its specimen and its own. On a share of the
    specimens the model fails: its labels have nothing to do with the picture."""
    pool = []
    for specimen in range(SPECIMENS):
        limits = np.array([0.2, 1.5]) + rng.normal(0, 0.15)
        shift, blur = rng.normal(0, 0.05), 0.10 * np.exp(rng.normal(0, 0.5))
        failed = rng.random() < failures
        for _ in range(OF_SPECIMEN):
            field = smooth(rng, 3.0)
            truth = np.digitize(field, limits).astype(np.uint8)
            if failed:
                field = smooth(rng, 3.0)
            error = shift + rng.normal(0, 0.04) + blur * np.exp(rng.normal(0, 0.3)) * smooth(rng, 2.0)
            pool.append(picture(str(specimen), truth, np.digitize(field + error, limits).astype(np.uint8), CLASSES))
    return pool


def smooth(rng: np.random.Generator, sigma: float) -> npt.NDArray[np.float64]:
    field = cv2.GaussianBlur(rng.normal(size=(EDGE, EDGE)), (0, 0), sigma)
    return np.asarray(field / field.std())


def evaluated(model: str, data: str) -> list[Picture]:
    """Every picture of a dataset, with what a model says of it."""
    from hpddrnet_trt.accuracy import assess
    from hpddrnet_trt.data.datasets import FolderDataset
    from hpddrnet_trt.inference import load_segmenter

    dataset = FolderDataset.open(data)
    with load_segmenter(model) as segmenter:
        found = [image for split in dataset.splits for image in assess(segmenter, dataset, split).images]
    return [Picture(image.group or image.name, image.counts, image.measured) for image in found]


def picture(group: str, truth: npt.NDArray[np.uint8], predicted: npt.NDArray[np.uint8], classes: int) -> Picture:
    comparison = LabelComparison(classes)
    comparison.update(predicted, truth)
    return Picture(group, comparison.counts, measure(truth, predicted, classes))


def figures(pictures: Sequence[Picture], groups: Sequence[str | None], rarest: int) -> dict[str, Interval]:
    """What is looked at: ours, and for two of them the percentile interval."""
    counts, measured = [one.counts for one in pictures], [one.measured for one in pictures]
    scores, errors = score_intervals(counts, groups), class_errors(measured, groups, rarest)
    points = np.array([[one.predicted[0, rarest] - one.truth[0, rarest], 1.0] for one in measured])
    units = by_unit(points, groups)
    found = {"mIoU": scores.miou, "IoU of the rarest class": scores.iou[rarest]}
    found["pixel accuracy"] = scores.pixel_accuracy
    found |= {f"{entry.figure.title}, error": entry.error for entry in errors}
    found["area fraction, Student's from 2 on"] = t_interval(units[:, 0] / units[:, 1], least=2)
    found["mIoU, percentile"] = percentile(by_unit(areas(np.stack(counts)), groups), mean_iou)
    found["area fraction, percentile"] = percentile(units, lambda sums: sums[:, 0] / sums[:, 1])
    return found


def percentile(totals: npt.NDArray[np.float64], statistic: Callable[..., npt.NDArray[np.float64]]) -> Interval:
    """The plain percentile bootstrap, for comparison."""
    units = len(totals)
    low, high = np.nanpercentile(statistic(np.tensordot(resamples(units), totals, axes=1)), (2.5, 97.5))
    return Interval(float(statistic(totals.sum(axis=0)[np.newaxis])[0]), float(low), float(high), units)


def coverage(
    pool: Sequence[Picture], rarest: int, truth: dict[str, Interval], drawn: int, draws: int, rng: np.random.Generator,
    *, together: bool, units: bool,
) -> dict[str, str]:  # fmt: skip
    """Share of draws whose interval holds the pool's figure, where most have one.

    ``together``: whole specimens are drawn; ``units``: and they are the units of the intervals.
    """
    specimens: dict[str, list[Picture]] = defaultdict(list)
    for one in pool:
        specimens[one.group].append(one)
    sources = list(specimens.values()) if together else [[one] for one in pool]
    held: dict[str, list[bool]] = {name: [] for name in truth}
    for _ in range(draws):
        chosen = [sources[place] for place in rng.integers(0, len(sources), drawn)]
        groups = [str(place) if units else None for place, source in enumerate(chosen) for _ in source]
        for name, found in figures([one for source in chosen for one in source], groups, rarest).items():
            if found.low is not None and found.high is not None:
                held[name].append(found.low <= truth[name].value <= found.high)
    return {name: f"{100 * np.mean(said):.1f}" if len(said) > draws / 2 else "none" for name, said in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--failures", type=float, default=0.0, help="share of simulated specimens that fail wholly")
    parser.add_argument("--draws", type=int, default=500)
    given = parser.parse_args()
    rng = np.random.default_rng(1)
    pool = simulated(rng, given.failures) if given.model is None else evaluated(given.model, given.data)
    print(f"{len(pool)} pictures of {len({one.group for one in pool})} specimens, {given.draws} draws, coverage in %\n")
    rarest = int(np.argmin(np.sum([one.counts.sum(axis=1) for one in pool], axis=0)))
    truth = figures(pool, [None] * len(pool), rarest)
    designs = {"pictures drawn one by one": (False, False), "specimens drawn, units: specimens": (True, True),
               "specimens drawn, units: pictures (wrong)": (True, False)}  # fmt: skip
    for title, (together, units) in designs.items():
        columns = [
            coverage(pool, rarest, truth, drawn, given.draws, rng, together=together, units=units) for drawn in DRAWN
        ]
        print(f"| {title} | " + " | ".join(map(str, DRAWN)) + " |\n|---|" + "--:|" * len(DRAWN))
        for name in columns[0]:
            print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")
        print(flush=True)


if __name__ == "__main__":
    main()
