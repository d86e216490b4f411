"""bioimage.io packages of others: what versions 0.4 and 0.5 of the format say about an ONNX segmenter.

A package comes from a stranger. Nothing is unpacked by the names in it; what is read has limits, and its text is read
as data. Of the preprocessing that the format knows, what can be told before a picture is seen becomes the model's
normalization; ``scale_range``, as the first step, becomes its intensity range. Anything else is refused.
"""

from __future__ import annotations

import hashlib
import math
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from hpddrnet_trt.core.errors import BadInputFile, UsageError, one_line
from hpddrnet_trt.core.files import existing_file, write_bytes
from hpddrnet_trt.core.magnification import plausible
from hpddrnet_trt.core.manifest import (
    ClassInfo,
    DataRecord,
    IntensityRecord,
    Manifest,
    Normalization,
    default_palette,
    read_manifest,
)
from hpddrnet_trt.core.text import METRES
from hpddrnet_trt.export.adopt import adopt
from hpddrnet_trt.export.adopt_settings import AdoptSettings
from hpddrnet_trt.graph.check import check_onnx
from hpddrnet_trt.graph.model import check_target

MAX_ENTRIES = 10_000
MAX_TEXT = 1 << 18  # bytes of the description; they have some ten thousand
MAX_MODEL = 2 << 30  # of an ONNX file, which protobuf limits
MAX_RATIO = 200  # to which weights are not compressed
DESCRIPTIONS = ("rdf.yaml", "bioimageio.yaml", "model.yaml")
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError)
_NONSENSE = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)
_AXES = {"b": "batch", "c": "channel", "y": "y", "x": "x"}  # letters of version 0.4
Record = dict[str, Any]


def adopt_package(
    source: str | Path, target: str | Path, given: Record, *, images: Sequence[Path] = ()
) -> Manifest:
    """Write the ONNX segmenter in a bioimage.io package as a file of this package, and return its description.

    ``given``: fields of :class:`~hpddrnet_trt.export.adopt_settings.AdoptSettings` that count before what the package
    says. A file that this package wrote comes out as it went in. Raises :class:`BadInputFile` for a package that is
    damaged, holds no ONNX segmenter, or asks for what is not known here, and what
    :func:`~hpddrnet_trt.export.adopt.adopt` does.
    """
    source, target = existing_file(source, "package"), Path(target)
    check_target(source, target)
    with _opened(source) as package, tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
        described = package.description()
        model = package.model(described, Path(folder))
        try:
            ours = read_manifest(model)
        except BadInputFile:
            ours = None
        if ours is not None:
            if given:
                raise UsageError(f"{source} holds a model that describes itself; leave {', '.join(given)} out")
            check_onnx(model, "operators")
            write_bytes(target, model.read_bytes())
            return ours
        try:
            found = _settings(described, given)
        except BadInputFile as exc:
            raise _bad(source, str(exc)) from exc
        except _NONSENSE as exc:
            raise _bad(source, f"its description does not follow the format ({one_line(exc)})") from exc
        return adopt(model, target, AdoptSettings(**{**found, **given}), images=images)


class _Package:
    """A zip file whose description and weights are read within limits."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self._archive = path, archive
        if len(archive.infolist()) > MAX_ENTRIES:
            raise _bad(path, f"it has more than {MAX_ENTRIES} files")
        self._inside = {str(PurePosixPath(entry.filename)): entry for entry in archive.infolist()}
        places = [name for name in self._inside if PurePosixPath(name).name in DESCRIPTIONS]
        if not places:
            raise _bad(path, f"it holds no {DESCRIPTIONS[0]}, so it is no bioimage.io package")
        self._place = PurePosixPath(min(places, key=lambda name: name.count("/")))

    def description(self) -> Record:
        try:
            content = yaml.safe_load(self._read(self._place.name, MAX_TEXT).decode("utf-8"))
        except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as exc:
            raise _bad(self.path, f"its {self._place.name} is not readable YAML ({one_line(exc)})") from exc
        if not isinstance(content, dict) or content.get("type") != "model":
            raise _bad(self.path, f"its {self._place.name} describes no model")
        version = str(content.get("format_version"))
        if not version.startswith(("0.4.", "0.5.")):
            raise _bad(self.path, f"it has version {one_line(version, limit=20)} of the format; 0.4 and 0.5 are read")
        return content

    def model(self, described: Record, folder: Path) -> Path:
        """The ONNX file, and one with its weights where it has one, written into ``folder``."""
        weights = described.get("weights")
        held = weights if isinstance(weights, dict) else {}
        onnx = held.get("onnx")
        if not isinstance(onnx, dict):
            kinds = one_line(", ".join(map(str, held)) or "none", limit=100)
            raise _bad(self.path, f"it has no ONNX weights (it has: {kinds}); export the network as ONNX")
        beside = onnx.get("external_data")
        if isinstance(beside, dict):
            self._write(beside, folder / PurePosixPath(str(beside.get("source"))).name)
        return self._write(onnx, folder / f"{self.path.stem}.onnx")

    def _write(self, named: Record, target: Path) -> Path:
        content = self._read(str(named.get("source")), MAX_MODEL)
        wanted = named.get("sha256")
        if wanted is not None and hashlib.sha256(content).hexdigest() != wanted:
            raise _bad(self.path, f"its {target.name} is not the one that it describes (SHA-256 differs)")
        return write_bytes(target, content)

    def _read(self, name: str, limit: int) -> bytes:
        """A file beside the description, of at most ``limit`` bytes."""
        shown = one_line(name, limit=100)
        entry = self._inside.get(str(self._place.parent / name))
        if entry is None:
            raise _bad(self.path, f"the file {shown!r} that its description names is not in it")
        if stat.S_ISLNK(entry.external_attr >> 16) or entry.is_dir():
            raise _bad(self.path, f"its {shown!r} is no file but a link or a folder")
        if entry.file_size > limit or entry.file_size > max(MAX_TEXT, MAX_RATIO * entry.compress_size):
            raise _bad(self.path, f"its {shown!r} is said to have {entry.file_size} bytes, more than such a file has")
        try:
            return self._archive.read(entry)  # no more than file_size
        except _DAMAGED as exc:
            raise _bad(self.path, f"its {shown!r} cannot be read ({one_line(exc)})") from exc


@contextmanager
def _opened(path: Path) -> Iterator[_Package]:
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGED as exc:
        raise _bad(path, f"it is no readable zip file ({one_line(exc)})") from exc
    with archive:
        yield _Package(path, archive)


def _bad(path: Path, why: str) -> BadInputFile:
    return BadInputFile(f"{path} is refused: {why}")


# ---------------------------------------------------------------------------- what its description says


def _settings(described: Record, given: Record) -> Record:
    """Fields of AdoptSettings. Raises :class:`BadInputFile` with the reason only, and anything for nonsense."""
    inputs, outputs = described["inputs"], described["outputs"]
    if len(inputs) != 1:
        raise BadInputFile(f"its network takes {len(inputs)} inputs, and a segmenter one picture")
    axes, name = _axes(inputs[0]), str(described["name"])[:200]
    if unknown := set(axes) - set(_AXES.values()):
        raise BadInputFile(f"its network takes an axis {min(unknown)!r}, and micrographs have two")
    trained, pixel = described.get("training_data"), _pixel_size(axes)
    found: Record = {
        "multiple": _multiple(axes),
        "name": name,
        "data": DataRecord(
            name=str(trained["id"] if isinstance(trained, dict) and "id" in trained else f"that of {name}")[:200],
            license=described["license"] if isinstance(described.get("license"), str) else None,
            pixel_size_m=None if pixel is None else (pixel, pixel),
        ),
    }
    if "classes" not in given:
        found["classes"] = _classes(outputs[0])
    if "normalization" not in given:
        found["normalization"], found["intensity"] = _grey_levels(inputs[0], axes)
    return found


def _axes(tensor: Record) -> dict[str, Record]:
    """What is known of each axis, ``batch``, ``channel``, ``y``, ``x`` and others, in both versions' ways."""
    if not isinstance(tensor["axes"], str):
        return {
            str(axis["type"] if axis["type"] in ("batch", "channel") else axis.get("id", axis["type"])): axis
            for axis in tensor["axes"]
        }
    shape, letters = tensor["shape"], tensor["axes"]
    if isinstance(shape, dict):  # of an output, which says there how it follows from the input
        least, step = shape.get("min", [None] * len(letters)), shape.get("step", [0] * len(letters))
        sizes = [{"min": size, "step": more} if more else size for size, more in zip(least, step, strict=True)]
    else:
        sizes = list(shape)
    return {_AXES.get(letter, letter): {"size": size} for letter, size in zip(letters, sizes, strict=True)}


def _multiple(axes: dict[str, Record]) -> int:
    """Of which height and width are."""
    multiples = []
    for name in ("y", "x"):
        size = axes[name]["size"]
        if isinstance(size, dict) and "axis_id" in size:
            size = axes[size["axis_id"]]["size"]
        least, step = (int(size["min"]), int(size["step"])) if isinstance(size, dict) else (int(size), int(size))
        if least % step:
            raise BadInputFile(f"its network takes {least} pixels and {step} more each, which are multiples of nothing")
        multiples.append(step)
    return math.lcm(*multiples)


def _pixel_size(axes: dict[str, Record]) -> float | None:
    """In metres, where both axes have the same."""
    height, width = (
        METRES.get(str(axes[name].get("unit")), math.nan) * float(axes[name].get("scale", 1)) for name in ("y", "x")
    )
    return height if math.isclose(height, width, rel_tol=1e-3) and plausible(height) else None


def _classes(tensor: Record) -> list[ClassInfo]:
    """Named by the channels of scores, or by the values of labels; one channel alone is that of the second class."""
    channel, data = _axes(tensor).get("channel", {}), tensor.get("data")
    names = channel.get("channel_names") or (data.get("values") if isinstance(data, dict) else None)
    if not isinstance(names, list):
        size = channel.get("size")
        names = [f"class {index}" for index in range(size)] if isinstance(size, int) and size < 256 else []
    for step, values in _steps(tensor, "postprocessing"):
        halved = step == "sigmoid" or (step == "binarize" and values.get("threshold") == 0.5)
        if step not in ("ensure_dtype", "softmax") and not (halved and len(names) == 1):
            raise BadInputFile(f"its scores go through {step!r}, so they are not those of one class for each pixel")
    if not names:
        raise BadInputFile("it does not say how many classes there are; give --classes")
    if len(names) == 1:
        names = ["background", "foreground"]
    palette = default_palette(len(names))
    return [ClassInfo(name=str(name), color=color) for name, color in zip(names, palette, strict=True)]


def _steps(tensor: Record, kind: str) -> list[tuple[str, Record]]:
    return [(str(step.get("id") or step["name"]), step.get("kwargs") or {}) for step in tensor.get(kind) or []]


@np.errstate(all="ignore")
def _grey_levels(tensor: Record, axes: dict[str, Record]) -> tuple[Normalization, IntensityRecord | None]:
    """What the preprocessing makes of grey levels 0..255, and how a picture is brought to them."""
    data = tensor.get("data") or {"type": tensor["data_type"], "range": tensor.get("data_range")}
    data = data[0] if isinstance(data, list) else data
    kind, most = str(data.get("type", "float32")), (data.get("range") or [None, None])[1]
    white = {"uint8": 255, "uint16": 65535}.get(kind, most)
    steps = [step for step in _steps(tensor, "preprocessing") if not _keeps_values(*step, kind)]
    intensity = None
    if steps and steps[0][0] == "scale_range" and _over_the_picture(steps[0][1], axes):
        low, high = (float(steps[0][1].get(f"{end}_percentile", usual)) for end, usual in (("min", 0), ("max", 100)))
        intensity, white, steps = IntensityRecord(unit="percentile", black=low, white=high), 1, steps[1:]
    if white is None:
        raise BadInputFile("it does not say which value is white; give --normalization")
    factor, shift = np.full(3, float(white) / 255), np.zeros(3)
    for name, values in steps:
        if name == "scale_linear":
            gain, offset = _by_channel(values.get("gain", 1.0)), _by_channel(values.get("offset", 0.0))
        elif name.endswith("zero_mean_unit_variance") and "mean" in values:
            gain = 1 / _by_channel(values["std"])
            offset = -_by_channel(values["mean"]) * gain
        else:
            raise BadInputFile(
                f"its pictures go through {name!r}, which depends on each picture; give --normalization to do without, "
                "or export the network with it inside"
            )
        factor, shift = factor * gain, shift * gain + offset
    if not (factor > 0).all():
        raise BadInputFile("its preprocessing makes white darker than black; give --normalization")
    means = {"mean": (-shift / factor).tolist(), "std": (1 / factor).tolist()}
    return Normalization.model_validate(means), intensity


def _keeps_values(name: str, values: Record, kind: str) -> bool:
    """Whether a step changes the type of grey values only."""
    return name == "ensure_dtype" and (str(values["dtype"]).startswith("float") or values["dtype"] == kind)


def _by_channel(values: Any) -> npt.NDArray[np.float64]:
    return np.broadcast_to(np.ravel(np.asarray(values, np.float64)), 3)


def _over_the_picture(values: Record, axes: dict[str, Record]) -> bool:
    """Whether a range is that of each picture by itself; its channels are the same grey levels."""
    over = values.get("axes") or list(axes)
    over = {_AXES.get(letter, letter) for letter in over} if isinstance(over, str) else set(over)
    return values.get("mode", "per_sample") == "per_sample" and "reference_tensor" not in values and {"y", "x"} <= over
