"""The figures of a mosaic, as sums over the records of its blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.core.text import aligned, duration, megabytes, percent, scaled
from hpddrnet_trt.mosaic.layout import BlockRecord
from hpddrnet_trt.results.regions import AreaFraction
from hpddrnet_trt.results.tables import FRACTIONS, fraction_row, number, write_rows

FOREIGN = ("foreign_pixels", "foreign_fraction")
MAX_PROBLEMS = 20  # in words; all are in the records


@dataclass(frozen=True)
class MosaicSummary:
    """What the blocks that are done hold, together.

    ``fractions``: of each class, of the pixels with a label. ``foreign_pixels``: of each class, those that tiles
    foreign to the model decide. ``blocks`` of ``all_blocks`` are done. ``empty``, ``unreadable``: pixels without a
    label. ``tiles``: of the mosaic, by the domain's state; ``tiles_computed``: more, since blocks compute those at
    their borders each for itself. ``seam_disagreement``: of pixels that two neighboring tiles both see the share with
    two labels, as :class:`~hpddrnet_trt.inference.tiling.TilingReport` says it. ``problem_count``, and the first
    ``problems`` in words. ``seconds``: by stage, over all workers. ``peak_bytes``: the greatest of a worker.
    ``checksum``: SHA-256 over those of the blocks; equal labels have equal ones.
    """

    fractions: tuple[AreaFraction, ...]
    foreign_pixels: tuple[int, ...]
    blocks: int
    all_blocks: int
    empty: int
    unreadable: int
    tiles: dict[str, int]
    tiles_computed: int
    seam_disagreement: float
    problem_count: int
    problems: tuple[str, ...]
    seconds: dict[str, float]
    bytes_read: int
    peak_bytes: int
    checksum: str

    @property
    def labeled(self) -> int:
        return sum(entry.pixels for entry in self.fractions)

    @property
    def pixels(self) -> int:
        """Of the blocks that are done, with a label or without."""
        return self.labeled + self.empty + self.unreadable

    @property
    def pixels_per_second(self) -> float | None:
        """Of one worker, over all its stages; None where nothing took time."""
        total = sum(self.seconds.values())
        return self.pixels / total if total else None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with areas in square metres."""
        fractions = [
            {**asdict(entry), "foreign_pixels": foreign}
            for entry, foreign in zip(self.fractions, self.foreign_pixels, strict=True)
        ]
        return {**asdict(self), "fractions": fractions, "pixels": self.pixels,
                "pixels_per_second": self.pixels_per_second}  # fmt: skip

    def write_areas(self, path: str | Path) -> Path:
        """Write a CSV with a row for each class: columns of ``fractions.csv``, and :data:`FOREIGN`."""
        rows = (
            [*fraction_row(entry), foreign, number(_share(foreign, entry.pixels))]
            for entry, foreign in zip(self.fractions, self.foreign_pixels, strict=True)
        )
        return write_rows(path, (*FRACTIONS, *FOREIGN), rows)

    def __str__(self) -> str:
        """Table of classes and a few lines, for people."""
        header = ("class", "pixels", "fraction", "area µm²", "foreign to the model")
        table = [
            (
                entry.name,
                str(entry.pixels),
                percent(entry.fraction),
                "–" if entry.area_m2 is None else f"{entry.area_m2 * 1e12:.5g}",
                percent(_share(foreign, entry.pixels)),
            )
            for entry, foreign in zip(self.fractions, self.foreign_pixels, strict=True)
        ]
        lines = aligned([header, *table], {0})
        lines.append(
            f"{self.blocks} of {self.all_blocks} blocks, {scaled(self.pixels)} pixels: "
            f"{percent(_share(self.empty, self.pixels))} empty, "
            f"{percent(_share(self.unreadable, self.pixels))} unreadable"
        )
        states = ", ".join(f"{count} {state}" for state, count in self.tiles.items())
        lines.append(
            f"{sum(self.tiles.values())} tiles ({states or 'none'}); neighbors disagree in "
            f"{percent(self.seam_disagreement)} of the pixels that both see"
        )
        if self.pixels_per_second is not None:
            stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in self.seconds.items())
            lines.append(
                f"{stages} of all workers, {scaled(self.pixels_per_second)} pixels a second each; "
                f"at most {megabytes(self.peak_bytes)} of memory"
            )
        lines += self.problems
        if self.problem_count > len(self.problems):
            lines.append(f"and {self.problem_count - len(self.problems)} more problems")
        return "\n".join(lines)


def summarize(
    records: Iterable[BlockRecord], classes: Sequence[ClassInfo], pixel_size_m: float | None, all_blocks: int
) -> MosaicSummary:
    """The sums over ``records``, which are taken one by one, in the layout's order."""
    pixels, foreign = [0] * len(classes), [0] * len(classes)
    sums: Counter[str] = Counter()
    tiles: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    problems: list[str] = []
    peak, checksum = 0, sha256()
    for record in records:
        pixels = [one + other for one, other in zip(pixels, record.pixels, strict=True)]
        foreign = [one + other for one, other in zip(foreign, record.foreign_pixels, strict=True)]
        shared, different = record.seam_pixels
        sums.update(
            blocks=1, empty=record.empty, unreadable=record.unreadable, tiles=record.tiles, shared=shared,
            different=different, problems=len(record.problems), read=record.bytes_read,
        )  # fmt: skip
        tiles.update(record.own_tiles)
        for stage, spent in record.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
        problems += record.problems[: MAX_PROBLEMS - len(problems)]
        peak = max(peak, record.peak_bytes)
        checksum.update(f"{record.block.name} {record.checksum}\n".encode())
    labeled = sum(pixels)
    area = None if pixel_size_m is None else pixel_size_m**2
    return MosaicSummary(
        fractions=tuple(
            AreaFraction(entry.name, count, count / labeled if labeled else 0.0, None if area is None else count * area)
            for entry, count in zip(classes, pixels, strict=True)
        ),
        foreign_pixels=tuple(foreign),
        blocks=sums["blocks"],
        all_blocks=all_blocks,
        empty=sums["empty"],
        unreadable=sums["unreadable"],
        tiles=dict(tiles),
        tiles_computed=sums["tiles"],
        seam_disagreement=sums["different"] / sums["shared"] if sums["shared"] else 0.0,
        problem_count=sums["problems"],
        problems=tuple(problems),
        seconds=seconds,
        bytes_read=sums["read"],
        peak_bytes=peak,
        checksum=checksum.hexdigest(),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
