"""What is compared: model files, the engines that run them, and what people call the pair."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.files import existing_file
from hpddrnet_trt.core.magnification import PixelSizes
from hpddrnet_trt.core.manifest import IntensityRecord, Manifest, read_manifest
from hpddrnet_trt.data.intensity import IntensityRange, range_of
from hpddrnet_trt.engines import CHECKPOINTS, ENGINES, engine_status, engines_for
from hpddrnet_trt.weights import locate

logger = logging.getLogger(__name__)

MODEL_SUFFIXES = (".safetensors", ".onnx", ".engine")
_PLAIN_OPTIONS = {"output", "device", "threads"}  # of the torch engine: none changes how it computes


@dataclass(frozen=True)
class Entry:
    """One thing to compare: a model file, the engine that runs it and that engine's options.

    ``make``: what writes the file, called before it is first loaded where it does not exist yet. ``only``: the one
    size and batch (height, width, batch) that it is timed at, None for all.
    """

    label: str
    path: Path
    engine: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[], object] | None = None
    only: tuple[int, int, int] | None = None

    def takes(self, shape: tuple[int, int, int]) -> bool:
        return self.only is None or self.only == shape

    @property
    def is_torch(self) -> bool:
        return self.engine == "torch" or (self.engine == "auto" and self.path.suffix.lower() in CHECKPOINTS)

    @property
    def can_be_reference(self) -> bool:
        """PyTorch as it comes: eager, FP32, no option that makes it faster."""
        return self.is_torch and set(self.options) <= _PLAIN_OPTIONS


def entries_for(files: Sequence[str | Path]) -> list[Entry]:
    """Every file with every engine of this installation that runs its kind, labelled for people.

    The engine that ``auto`` would choose always, so that its row says why it cannot run; the others where
    they are installed (:data:`~hpddrnet_trt.engines.ENGINES` says with which options). Raises
    :class:`BadInputFile` for a file that does not exist; one that cannot be read becomes a row
    with the reason.
    """
    entries: list[Entry] = []
    for path in (existing_file(file, "model file") for file in files):
        manifest = manifest_or_none(path)
        for engine, options in _engines_of(path, manifest):
            kind = ENGINES.get(engine)  # none of "auto"
            entry = Entry("" if kind is None else kind.label, path, engine, options)
            # TensorRT's explicit quantisation, run by a CPU engine, is told from ONNX Runtime's own.
            explicit = manifest is not None and manifest.quantized_for == "tensorrt"
            form = "Q/DQ" if explicit and kind is not None and not kind.gpu else None
            parts = [entry.label, precision_of(entry, manifest), form]
            label = " ".join(part for part in parts if part)
            if manifest is None or any(other.label == label for other in entries):
                label = f"{label} ({path.name})"
            entries.append(replace(entry, label=label))
    return entries


def model_files(paths: Sequence[str | Path]) -> list[Path]:
    """Model files meant by ``paths``: files as given, those lying directly in given folders, and both of a
    model that comes with the package.

    Checkpoints come first, then ``model.onnx`` before ``model.int8.onnx``, so that the reference is the first row.
    Raises :class:`BadInputFile` for a folder without any.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files += dict.fromkeys(locate(path, suffix) for suffix in (".safetensors", ".onnx"))
            continue
        inside = [item for item in path.iterdir() if item.suffix in MODEL_SUFFIXES and not item.name.startswith(".")]
        if not inside:
            raise BadInputFile(f"{path} holds no model file ({', '.join(MODEL_SUFFIXES)}); train or export one first")
        files += sorted(inside, key=_order)
    return files


def _order(file: Path) -> tuple[int, int, str]:
    return MODEL_SUFFIXES.index(file.suffix), len(file.suffixes), file.name


class Reading(NamedTuple):
    """How pictures are read for the models of a benchmark: keywords of :func:`~.images.load_images`."""

    intensity_range: IntensityRange = None
    read_at_m: PixelSizes | None = None


def reading_of(files: Sequence[Path]) -> Reading:
    """The intensity range and pixel sizes at which all models are shown their images.

    :class:`UsageError` where they have several: then no picture means the same to all.
    """
    manifests = [manifest for manifest in map(manifest_or_none, files) if manifest is not None]
    records = [manifest.intensity or IntensityRecord() for manifest in manifests]
    sizes = {manifest.read_at_m for manifest in manifests if manifest.read_at_m is not None}
    ranges = {(record.unit, record.black, record.white) for record in records}
    for what, several in (("intensity ranges", ranges), ("pixel sizes", sizes)):
        if len(several) > 1:
            raise UsageError(
                f"the models were trained on pictures of different {what}, so no picture means the same to all; "
                "compare models of one training"
            )
    return Reading(range_of(records[0]) if records else None, next(iter(sizes), None))


def manifest_or_none(path: Path) -> Manifest | None:
    """The description of a model file, None for one that has none or cannot be read."""
    if path.suffix.lower() in (".pth", ".pt"):
        return None  # foreign checkpoints describe themselves only through their weights
    try:
        return read_manifest(path)
    except BadInputFile as exc:
        logger.info("%s", exc)
        return None


def precision_of(entry: Entry, manifest: Manifest | None) -> str | None:
    """What an entry computes in, e.g. ``FP16``: its options for a checkpoint, whose weights are FP32, else the file."""
    if entry.path.suffix.lower() in CHECKPOINTS:
        autocast = str(entry.options.get("autocast", "off"))
        return "FP32" if autocast == "off" else autocast.upper()
    if entry.options.get("precision") == "bf16":
        return "BF16"
    return manifest.precision.upper() if manifest is not None and manifest.precision is not None else None


def _engines_of(path: Path, manifest: Manifest | None) -> list[tuple[str, dict[str, Any]]]:
    """Engines with their options; ``auto``, which will say what is wrong, for a file that none runs."""
    if manifest is not None and manifest.engine is not None:
        names: list[str] = [manifest.engine.runtime]
    else:
        first, *others = engines_for(path) or ["auto"]
        names = [first, *(name for name in others if not ENGINES[name].gpu and engine_status(name).usable)]
    return [
        (name, options) for name in names for options in (ENGINES[name].variants(manifest) if name in ENGINES else [{}])
    ]
