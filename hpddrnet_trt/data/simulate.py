"""Simulated scanning electron micrographs of mudrock, with exact masks.

A stand-in for real data, so that every stage runs with nothing at hand. It is a picture of the
physics, not a Monte Carlo of it; the order of the steps is that of the instrument:

1. *Specimen.* Three phases, drawn as implicit functions of the specimen point (x, y): angular
   mineral **grains** (convex polygons with rough edges, log-normal sizes), **pores** (lens-shaped
   gaps along the bedding, gaps on one side of grains, small holes inside grains) and the **clay**
   between them (laminated along the bedding direction). Specimen lengths are in units of the
   nominal pixel, 20 nm; at ``magnification`` m a pixel is 20 nm / m.
2. *Scan.* The beam visits row after row while the stage drifts: row r sees the specimen shifted by
   a smooth random walk (pixels). Specimen and mask are evaluated at the same shifted points, so
   the mask is exact: a pixel's label is the phase under the centre of the beam.
3. *Emission.* Electrons per primary electron: a material yield for each phase and grain, texture,
   and topography. A surface sloping by t emits about 1/cos(t) more secondary electrons, which shows
   as bright rims that fall off with the escape length (pixels). Inside a pore the walls collect
   what the floor emits: the signal decays from the rim inwards, shallow pores stay grey. In
   ``kind="bse"`` (backscattered electrons) material contrast is stronger and rims are nearly absent.
4. *Probe.* The beam's spot blurs the emission: a Gaussian of ``probe_sigma`` pixels (defocus).
5. *Charging.* Insulating grains hold charge for a while, which appears as tails to the right of
   them along the scan line (exponential, tens of pixels), in some pictures only.
6. *Counting.* Poisson shot noise at ``dose`` primary electrons per pixel, then the emission
   current's flicker, equal for all pixels of a scan line (fractions), then the amplifier's noise.
7. *Display.* Contrast and brightness as an operator would set them, 8 bits, a little clipping.

Contrast, dose, blur and drift are drawn anew for every picture. Grey levels of the phases overlap
on purpose: a threshold cannot separate grains from clay; texture and shape can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.files import atomic_folder
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.data.datasets import SPLITS, FolderDataset
from hpddrnet_trt.data.description import (
    FILE_NAME,
    DatasetDescription,
    DescribedClass,
    DescribedFile,
    read_description,
    write_description,
)
from hpddrnet_trt.data.labels import write_pair

SIMULATOR_VERSION = 1  # raise it when the same seed no longer gives the same pictures
Kind = Literal["se", "bse"]
KINDS: tuple[Kind, ...] = ("se", "bse")
GRAIN, PORE, CLAY = 0, 1, 2
CLASSES = (
    DescribedClass(name="grain", index=GRAIN, color=(230, 159, 0)),
    DescribedClass(name="pore", index=PORE, color=(0, 114, 178)),
    DescribedClass(name="clay", index=CLAY, color=(90, 90, 90)),
)
PIXEL_SIZE_M = 20e-9
MIN_SIZE = 16

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Imaging:
    """Conditions of one acquisition; units in the names' comments."""

    dose: float  # primary electrons per pixel
    probe_sigma: float  # pixels
    rim: float  # extra emission at an edge, relative to the flat surface
    escape_length: float  # nominal pixels (20 nm): a property of the specimen
    grain_spread: float  # standard deviation of the grains' yield, relative to clay's
    drift: float  # pixels, standard deviation over the picture
    line_flicker: float  # standard deviation of a line's gain
    charging: float  # height of the tails relative to the signal; 0 for most pictures
    charging_length: float  # pixels
    shading: float  # relative gain change from one side of the picture to the other
    contrast: float  # grey levels (of 255) per unit of clay's yield
    brightness: float  # grey level of clay
    amplifier_noise: float  # grey levels

    @classmethod
    def draw(cls, rng: np.random.Generator, kind: Kind) -> Imaging:
        """Draw the conditions of one picture."""
        se = kind == "se"
        return cls(
            dose=float(np.exp(rng.uniform(np.log(25), np.log(180)))),
            probe_sigma=float(rng.uniform(0.5, 1.4)),
            rim=float(rng.uniform(0.25, 0.7) if se else rng.uniform(0.0, 0.08)),
            escape_length=float(rng.uniform(1.0, 2.2)),
            grain_spread=float(rng.uniform(0.10, 0.18) if se else rng.uniform(0.18, 0.3)),
            drift=float(rng.uniform(0.0, 2.0)),
            line_flicker=float(rng.uniform(0.004, 0.02)),
            charging=float(rng.uniform(0.15, 0.45) if se and rng.random() < 0.35 else 0.0),
            charging_length=float(rng.uniform(15, 60)),
            shading=float(rng.uniform(-0.15, 0.15)),
            contrast=float(rng.uniform(95, 190)),
            brightness=float(rng.uniform(95, 150)),
            amplifier_noise=float(rng.uniform(1.0, 4.0)),
        )


def simulate(
    height: int,
    width: int,
    seed: int | Sequence[int],
    kind: Kind = "se",
    *,
    imaging: Imaging | None = None,
    magnification: float = 1.0,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Simulate one micrograph: picture and mask, both uint8 ``[height, width]``.

    ``magnification`` enlarges the specimen: 2 shows half the field of view at 10 nm per pixel.
    The same arguments give the same arrays. ``imaging`` fixes the conditions that are drawn
    otherwise; apart from its drift, neither it nor ``kind`` changes the specimen and the mask.
    Raises :class:`UsageError` for sizes below 16 pixels or an unknown ``kind``.
    """
    if min(height, width) < MIN_SIZE:
        raise UsageError(f"a simulated picture is at least {MIN_SIZE} pixels wide and high, got {width} x {height}")
    if not 0.1 <= magnification <= 10:
        raise UsageError(f"the magnification of a simulated picture is 0.1 to 10, got {magnification}")
    if kind not in KINDS:
        raise UsageError(f"unknown kind of simulated picture {kind!r}; choose one of {', '.join(KINDS)}")
    # Three independent streams: fixing the conditions leaves specimen and noise as they were.
    specimen_rng, imaging_rng, noise_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    conditions = imaging or Imaging.draw(imaging_rng, kind)
    scan = _Scan.draw(height, width, conditions.drift, magnification, noise_rng)
    specimen = _Specimen.draw(scan, specimen_rng)
    emission = _emission(specimen, conditions, kind, conditions.escape_length * magnification)
    emission = cv2.GaussianBlur(emission, (0, 0), conditions.probe_sigma).astype(np.float32)
    emission += _charging(specimen, conditions, noise_rng)
    return _detect(emission, conditions, noise_rng), specimen.labels


@dataclass(frozen=True)
class _Scan:
    """Specimen coordinates under the beam, float32 ``[H, W]`` each in nominal pixels, and how far
    (in pixels) the drift carries them."""

    x: Array
    y: Array
    margin: int
    magnification: float

    @classmethod
    def draw(cls, height: int, width: int, drift: float, magnification: float, rng: np.random.Generator) -> _Scan:
        # Three knots at least, so that short pictures drift smoothly too.
        knots = max(4, height // 48)
        path = rng.standard_normal((knots, 2)).cumsum(axis=0)
        path -= path.mean(axis=0)
        path *= drift / max(float(path.std()), 1e-6)
        shift = cv2.resize(path.astype(np.float32), (2, height), interpolation=cv2.INTER_CUBIC)
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        margin = int(np.ceil(np.abs(shift).max())) + 2
        scale = np.float32(magnification)
        return cls((x + shift[:, :1]) / scale, (y + shift[:, 1:]) / scale, margin, magnification)

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.x.shape
        return height, width

    @property
    def extent(self) -> tuple[float, float]:
        """Height and width of the field of view in nominal pixels."""
        height, width = self.shape
        return height / self.magnification, width / self.magnification

    def noise(self, rng: np.random.Generator, scale: float) -> Array:
        """Smooth unit-variance noise, fixed to the specimen, with features of ``scale`` nominal pixels."""
        return _lattice_noise(rng, self.x, self.y, scale, scale)

    def window(self, x: float, y: float, reach: float) -> tuple[slice, slice]:
        """Rows and columns that can see the disc around specimen point (x, y)."""
        x, y, reach = x * self.magnification, y * self.magnification, reach * self.magnification + self.margin
        height, width = self.shape
        rows = slice(max(0, int(y - reach)), min(height, int(y + reach) + 2))
        columns = slice(max(0, int(x - reach)), min(width, int(x + reach) + 2))
        return rows, columns


def _lattice_noise(rng: np.random.Generator, x: Array, y: Array, scale_x: float, scale_y: float) -> Array:
    """Unit-variance noise: random values on a lattice of the given spacings, cubic between them."""
    u, v = x / np.float32(scale_x), y / np.float32(scale_y)
    u0, v0 = float(u.min()) - 2, float(v.min()) - 2
    size = (int(float(v.max()) - v0) + 4, int(float(u.max()) - u0) + 4)
    lattice = rng.standard_normal(size, dtype=np.float32)
    field = cv2.remap(lattice, u - np.float32(u0), v - np.float32(v0), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    # Between lattice points cubic interpolation averages; 0.72 is its mean standard deviation.
    return (field / np.float32(0.72)).astype(np.float32)


@dataclass(frozen=True)
class _Specimen:
    """What lies under every pixel: phase, depth into pores, and the phases' own emission."""

    labels: npt.NDArray[np.uint8]
    grain_tone: Array  # deviation of a grain's yield, in units of Imaging.grain_spread
    pore_depth: Array  # 0 shallow .. 1 deep, where there is a pore
    texture: Array  # relative change of the yield

    @classmethod
    def draw(cls, scan: _Scan, rng: np.random.Generator) -> _Specimen:
        bedding = float(rng.uniform(-0.5, 0.5))
        roughness = scan.noise(rng, 9.0)
        labels = np.full(scan.shape, CLAY, dtype=np.uint8)
        tone = np.zeros(scan.shape, dtype=np.float32)
        depth = np.zeros(scan.shape, dtype=np.float32)
        grain_texture = 0.03 * scan.noise(rng, 22.0) + 0.02 * scan.noise(rng, 3.0)
        clay_texture = _lamination(scan, rng, bedding)
        grains = _draw_grains(scan, rng, roughness, labels, tone)
        _draw_pores(scan, rng, bedding, roughness, labels, depth, grains)
        texture = np.where(labels == CLAY, clay_texture, grain_texture).astype(np.float32)
        return cls(labels, tone, depth, texture)


def _lamination(scan: _Scan, rng: np.random.Generator, bedding: float) -> Array:
    """Clay platelets: noise drawn out along the bedding, in two sizes, over slow density changes."""
    cosine, sine = np.float32(np.cos(bedding)), np.float32(np.sin(bedding))
    waviness = 4 * scan.noise(rng, 50.0)
    along = cosine * scan.x + sine * scan.y
    across = cosine * scan.y - sine * scan.x + waviness
    fine = _lattice_noise(rng, along, across, 11.0, 2.2)
    coarse = _lattice_noise(rng, along, across, 26.0, 5.0)
    return (0.11 * fine + 0.09 * coarse + 0.06 * scan.noise(rng, 60.0)).astype(np.float32)


class _Grain(NamedTuple):
    x: float
    y: float
    radius: float


def _draw_grains(
    scan: _Scan, rng: np.random.Generator, roughness: Array, labels: npt.NDArray[np.uint8], tone: Array
) -> list[_Grain]:
    """Convex polygons with 5 to 9 sides, later ones over earlier ones, about 40 % of the area."""
    height, width = scan.extent
    density = rng.uniform(0.30, 0.65)
    grains: list[_Grain] = []
    covered = 0.0
    while covered < density * height * width:
        radius = float(np.clip(rng.lognormal(np.log(17), 0.5), 6, 60))
        x, y = float(rng.uniform(-radius, width + radius)), float(rng.uniform(-radius, height + radius))
        sides = int(rng.integers(5, 10))
        angles = 2 * np.pi * (np.arange(sides) + rng.uniform(-0.3, 0.3, sides)) / sides + rng.uniform(0, 2 * np.pi)
        elongation = float(rng.uniform(0.55, 1.0))
        distances = radius * (elongation + (1 - elongation) * np.cos(angles - rng.uniform(0, np.pi)) ** 2)
        distances *= rng.uniform(0.85, 1.15, sides)
        grain_tone = float(np.clip(rng.standard_normal(), -1.8, 2.2))  # no grain as dark as a deep pore
        grains.append(_Grain(x, y, radius))
        covered += 2.6 * radius**2 * elongation * _visible_share(x, y, radius, width, height)
        rows, columns = scan.window(x, y, 1.6 * radius)
        px, py = scan.x[rows, columns] - np.float32(x), scan.y[rows, columns] - np.float32(y)
        edge = np.full(px.shape, -np.inf, dtype=np.float32)
        for angle, distance in zip(angles, distances, strict=True):
            side = np.float32(np.cos(angle)) * px + np.float32(np.sin(angle)) * py - np.float32(distance)
            np.maximum(edge, side, out=edge)
        inside = edge + np.float32(0.8) * roughness[rows, columns] < 0
        labels[rows, columns][inside] = GRAIN
        tone[rows, columns][inside] = grain_tone
    return grains


def _visible_share(x: float, y: float, radius: float, width: float, height: float) -> float:
    """Rough share of a grain's bounding square that lies in the picture."""
    spans = [
        max(0.0, min(centre + radius, size) - max(centre - radius, 0.0)) / (2 * radius)
        for centre, size in ((x, width), (y, height))
    ]
    return spans[0] * spans[1]


def _draw_pores(
    scan: _Scan,
    rng: np.random.Generator,
    bedding: float,
    roughness: Array,
    labels: npt.NDArray[np.uint8],
    depth: Array,
    grains: list[_Grain],
) -> None:
    """Lenses in the clay, gaps beside grains, holes in grains; ``labels`` and ``depth`` are drawn into."""
    height, width = scan.extent
    area = height * width

    def draw(centre: tuple[float, float], a: float, b: float, angle: float, host: int) -> None:
        """Open an elliptical pore with semi-axes a, b (pixels), only where ``host`` is."""
        rows, columns = scan.window(centre[0], centre[1], 1.4 * max(a, b) + 2)
        px, py = scan.x[rows, columns] - np.float32(centre[0]), scan.y[rows, columns] - np.float32(centre[1])
        cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = (cosine * px + sine * py) / np.float32(a), (cosine * py - sine * px) / np.float32(b)
        inside = u**2 + v**2 + np.float32(0.25) * roughness[rows, columns] < 1
        inside &= labels[rows, columns] == host
        labels[rows, columns][inside] = PORE
        depth[rows, columns][inside] = rng.uniform(0.45, 1.0)

    for _ in range(rng.poisson(area * rng.uniform(0.9, 2.2) / 1000)):  # between platelets
        half_length = float(np.clip(rng.lognormal(np.log(7), 0.5), 3, 28))
        thickness = float(rng.uniform(1.2, 2.2) + 0.16 * half_length)
        point = (float(rng.uniform(0, width)), float(rng.uniform(0, height)))
        draw(point, half_length, thickness, bedding + float(rng.normal(0, 0.3)), CLAY)
    for grain in grains:
        if rng.random() < 0.5:  # shrinkage gap: clay torn off one side of the grain
            angle = float(rng.uniform(0, 2 * np.pi))
            point = (grain.x + 0.95 * grain.radius * np.cos(angle), grain.y + 0.95 * grain.radius * np.sin(angle))
            half_length, thickness = grain.radius * float(rng.uniform(0.3, 0.8)), float(rng.uniform(1.8, 4.0))
            draw(point, half_length, thickness, angle + np.pi / 2, CLAY)
        if rng.random() < 0.2:  # dissolution pore
            offset = rng.normal(0, 0.25 * grain.radius, 2)
            size = float(rng.uniform(1.5, 0.2 * grain.radius + 2))
            draw((grain.x + offset[0], grain.y + offset[1]), size, 0.8 * size, float(rng.uniform(0, np.pi)), GRAIN)


def _emission(specimen: _Specimen, conditions: Imaging, kind: Kind, escape_length: float) -> Array:
    """Electrons per primary electron relative to flat clay, ``[H, W]``; ``escape_length`` in pixels."""
    labels = specimen.labels
    mean_grain = 1.0 if kind == "se" else 1.12
    grain = mean_grain + conditions.grain_spread * specimen.grain_tone
    flat = np.where(labels == GRAIN, grain, 1.0) * (1 + specimen.texture)
    solid = flat * (1 + conditions.rim * _rims(labels, escape_length))
    inwards = _distance(labels == PORE)
    # The floor of a pore is seen through its mouth: signal falls with depth and distance from the rim.
    floor = 1 - specimen.pore_depth * (0.45 + 0.45 * (1 - np.exp(-inwards / (1.5 * escape_length))))
    return np.where(labels == PORE, floor * (1 + 0.5 * specimen.texture), solid).clip(0.03).astype(np.float32)


def _rims(labels: npt.NDArray[np.uint8], escape_length: float) -> Array:
    """Edge brightening: 1 at the brink of a pore, 0.45 at a grain's edge, falling off inwards."""
    pore_edge = np.exp(-_distance(labels != PORE) / escape_length)
    grain_edge = np.exp(-_distance(labels == GRAIN) / escape_length) * (labels == GRAIN)
    return np.maximum(pore_edge, np.float32(0.45) * grain_edge).astype(np.float32)


def _distance(region: npt.NDArray[np.bool_]) -> Array:
    """Distance of the region's pixels to its outside, minus half a pixel (pixels)."""
    distance = cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, 5).astype(np.float32)
    return np.minimum(np.maximum(distance - np.float32(0.5), 0), 255).astype(np.float32)


def _charging(specimen: _Specimen, conditions: Imaging, rng: np.random.Generator) -> Array:
    """Tails along the scan direction behind insulating grains, brighter or darker line by line."""
    height = specimen.labels.shape[0]
    line_charge = rng.standard_normal((height, 1), dtype=np.float32)
    active = rng.random((height, 1)) < 0.25
    if conditions.charging == 0:
        return np.zeros(specimen.labels.shape, dtype=np.float32)
    line_charge = np.asarray(cv2.GaussianBlur(line_charge, (1, 0), 0.1, sigmaY=0.8), dtype=np.float32)
    insulating = (specimen.labels == GRAIN) & (specimen.grain_tone > 0.3)
    reach = int(3 * conditions.charging_length)
    # filter2D correlates around its anchor: weights of pixels to the left, nearest one last.
    decay = np.exp(-np.arange(reach, -1, -1, dtype=np.float32) / conditions.charging_length)[None]
    stored = cv2.filter2D(
        insulating.astype(np.float32), -1, decay / decay.sum(), anchor=(reach, 0), borderType=cv2.BORDER_REPLICATE
    )
    return (conditions.charging * line_charge * active * stored).astype(np.float32)


def _detect(emission: Array, conditions: Imaging, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Count electrons line by line and set contrast and brightness: relative signal to 8 bits."""
    height, width = emission.shape
    ramp = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None] * np.float32(conditions.shading)
    expected = np.maximum(emission * (1 + ramp), 0) * conditions.dose
    signal = rng.poisson(expected).astype(np.float32) / np.float32(conditions.dose)
    signal *= 1 + np.float32(conditions.line_flicker) * rng.standard_normal((height, 1), dtype=np.float32)
    grey = conditions.brightness + conditions.contrast * (signal - 1)
    grey += conditions.amplifier_noise * rng.standard_normal(emission.shape, dtype=np.float32)
    return np.rint(np.clip(grey, 0, 255)).astype(np.uint8)


def write_dataset(
    folder: str | Path,
    *,
    train: int = 24,
    val: int = 6,
    test: int = 6,
    size: int | tuple[int, int] = 256,
    seed: int = 0,
    kind: Kind = "se",
    magnification: float = 1.0,
    progress: bool = True,
) -> FolderDataset:
    """Write a simulated dataset in the package's own layout and return it opened.

    ``train``, ``val``, ``test``: pictures per split; ``size``: edge, or (height, width), in
    pixels. A folder that already holds the very same simulation is used as it is; any other
    non-empty folder is refused with :class:`UserError`. The folder appears only when complete.
    """
    folder = Path(folder)
    height, width = (size, size) if isinstance(size, int) else size
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    if min(counts.values()) < 0 or train < 1:
        raise UsageError(f"a simulated dataset has at least one training picture, got {counts}")
    if seed < 0:
        raise UsageError(f"the seed of a simulation is 0 or more, got {seed}")
    simulation = {
        "version": SIMULATOR_VERSION, "kind": kind, "height": height, "width": width, "seed": seed, "counts": counts,
        "magnification": magnification,
    }  # fmt: skip
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if _same_simulation(folder, simulation):
            return FolderDataset.open(folder)
        raise UserError(f"{folder} exists and holds something else; remove it or choose another folder")
    palette = [entry.color for entry in CLASSES if entry.color is not None]
    jobs = [(split, place) for split in SPLITS for place in range(counts[split])]
    with atomic_folder(folder) as target:
        for split, place in progress_bar(jobs, desc="simulating micrographs", unit="image", show=progress):
            # The split's number is part of the seed: no picture can occur in two splits.
            image, mask = simulate(
                height, width, (seed, SPLITS.index(split), place), kind, magnification=magnification
            )
            write_pair(target, split, _file_name(split, place), image, mask, palette)
        named = [(split, _file_name(split, place)) for split, place in jobs]  # each of a specimen of its own
        description = DatasetDescription(
            name="simulated-mudrock",
            license="CC0-1.0 (simulated)",
            classes=list(CLASSES),
            pixel_size_m=PIXEL_SIZE_M / magnification,
            files=[DescribedFile(split=split, name=name, group=name) for split, name in named],
            simulation=simulation,
        )
        write_description(target / FILE_NAME, description)
    return FolderDataset.open(folder)


def _file_name(split: str, place: int) -> str:
    return f"{split}_{place:04d}"


def _same_simulation(folder: Path, simulation: Mapping[str, object]) -> bool:
    if not (folder / FILE_NAME).is_file():
        return False
    try:
        return read_description(folder / FILE_NAME).simulation == simulation
    except BadInputFile:
        return False
