"""Label maps against label maps: of two models on the same micrographs, or of two folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpddrnet_trt.core.errors import BadInputFile, ContractError, UsageError
from hpddrnet_trt.core.intervals import Interval, bootstrap
from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.data.labels import read_mask
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.journal import JOURNAL
from hpddrnet_trt.results import format_of

ENDINGS = (".png", ".tif", ".tiff")  # of label maps
MOST_CLASSES = IGNORE_INDEX  # that an 8-bit label map can hold


@dataclass(frozen=True)
class ComparedLabels:
    """How the label maps of ``b`` agree with those of ``a``: ``counts``, and what was left out, in ``remarks``."""

    a: str
    b: str
    class_names: tuple[str, ...]
    counts: LabelComparison
    remarks: tuple[str, ...] = ()

    def text(self) -> str:
        """For people: equal pixels, and for each class its share in both and the IoU."""
        counts, total = self.counts.counts, max(int(self.counts.counts.sum()), 1)
        width = max(map(len, self._ious()), default=0)
        lines = [
            f"{self.counts.images} label maps, {self.b} beside {self.a}",
            f"labels equal on {100 * self.counts.agreement:.3f} % of the pixels, on "
            f"{100 * self.counts.worst_agreement:.3f} % of the worst map",
        ]
        mean = self._mean_agreement()
        if mean.low is not None:
            lines.append(f"mean of the maps {100 * mean.value:.3f} % {mean.text(3, 100)} (95 %)")
        for name, iou in self._ious().items():
            index = self.class_names.index(name)
            first, second = counts[index].sum() / total, counts[:, index].sum() / total
            lines.append(f"  {name:<{width}}  IoU {iou:.4f}, area {100 * first:.2f} % and {100 * second:.2f} %")
        return "\n".join([*lines, *(f"remark: {remark}" for remark in self.remarks)])

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "a": self.a,
            "b": self.b,
            "maps": self.counts.images,
            "agreement": self.counts.agreement,
            "worst_agreement": self.counts.worst_agreement,
            "mean_agreement": asdict(self._mean_agreement()),
            "iou": self._ious(),
            "remarks": list(self.remarks),
        }

    def _mean_agreement(self) -> Interval:
        """Of the maps, each counting once."""
        values = np.asarray(self.counts.image_agreements)
        totals = np.stack([values, np.ones_like(values)], axis=1)
        return bootstrap(totals, lambda sums: sums[:, 0] / sums[:, 1], fraction=True, of="maps")

    def _ious(self) -> dict[str, float]:
        return self.counts.class_ious(self.class_names)


def compare_models(a: Segmenter, b: Segmenter, images: Sequence[Path], *, progress: bool = True) -> ComparedLabels:
    """The labels of two models of the same classes on micrographs, each whole and on the runtime users run it on.

    Raises :class:`UsageError` for different classes, and what reading and segmenting raise.
    """
    names, others = a.manifest.class_names, b.manifest.class_names
    if names != others:
        raise UsageError(
            f"the models' classes are {', '.join(names)} and {', '.join(others)}; give two files of the same model"
        )
    counts = LabelComparison(len(names))
    for path in progress_bar(images, desc="compare", unit="image", show=progress):
        micrograph = read_micrograph(path)
        counts.update(b.segment(micrograph).labels, a.segment(micrograph).labels)
    return ComparedLabels(_described(a), _described(b), tuple(names), counts)


def compare_folders(a: str | Path, b: str | Path) -> ComparedLabels:
    """The label maps (PNG, TIFF) of equal name in two folders; ``a`` may be masks, where 255 does not count.

    Classes are named as the folders' journals name them, by number without one. Raises :class:`UsageError` when no
    name is in both, :class:`BadInputFile` for a file that is no label map, or of another size than its twin.
    """
    first, second = _maps(Path(a)), _maps(Path(b))
    both = [name for name in first if name in second]
    if not both:
        raise UsageError(f"{a} and {b} have no label map of the same name; give the folders of two runs")
    counts = LabelComparison(MOST_CLASSES)
    for name in both:
        reference, labels = read_mask(first[name]), read_mask(second[name])
        try:
            counts.update(labels, reference)
        except ContractError as exc:
            raise BadInputFile(f"{second[name]} and {first[name]} are no two label maps of one image: {exc}") from exc
    named = _class_names(Path(a)) or _class_names(Path(b))
    names = (*named, *(f"class {index}" for index in range(len(named), MOST_CLASSES)))
    remarks = [
        f"{len(one) - len(both)} maps of {folder} have no twin and are left out"
        for folder, one in ((a, first), (b, second))
        if len(one) > len(both)
    ]
    return ComparedLabels(str(a), str(b), names, counts, tuple(remarks))


def _maps(folder: Path) -> dict[str, Path]:
    """Label maps by their name without ending; of several kinds of file for one image the first by name."""
    maps: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in ENDINGS and not path.name.startswith(".") and format_of(path).holds == "labels":
            maps.setdefault(path.stem.removesuffix(".ome"), path)
    return maps


def _class_names(folder: Path) -> tuple[str, ...]:
    """Of the first line of the journal that ``segment`` keeps; nothing where there is none."""
    try:
        with (folder / JOURNAL).open(encoding="utf-8") as stream:
            return tuple(json.loads(stream.readline())["fractions"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _described(segmenter: Segmenter) -> str:
    manifest = segmenter.manifest
    return f"{manifest.name} ({manifest.precision or 'fp32'}, {segmenter.engine.runtime})"
