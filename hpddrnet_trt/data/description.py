"""``dataset.json``: what a folder dataset says about its classes, licence and groups."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hpddrnet_trt.core.errors import BadInputFile, first_problem
from hpddrnet_trt.core.files import existing_file, write_text
from hpddrnet_trt.core.manifest import IGNORE_INDEX, ClassInfo

FILE_NAME = "dataset.json"

# Distinguishable also with colour-vision deficiency (after M. Okabe and K. Ito, 2008).
_BASE_COLORS = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167),
    (86, 180, 233), (213, 94, 0), (240, 228, 66), (90, 90, 90),
)  # fmt: skip


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class DescribedClass(_Lenient):
    """One class; its mask value is ``index``, or its place in the list when that is left out."""

    name: str = Field(min_length=1)
    index: int | None = None
    color: tuple[int, int, int] | None = None


class DescribedFile(_Lenient):
    """One image; images of one ``group`` (specimen, article) belong into one split."""

    split: str
    name: str
    group: str | None = None


class DatasetDescription(_Lenient):
    """The part of ``dataset.json`` that the package reads; other keys are left alone.

    ``licence`` is a text, or an object with ``spdx``. ``classes`` may be plain names.
    """

    name: str | None = None
    licence: str | None = None
    classes: list[DescribedClass] | None = None
    ignore_index: int = IGNORE_INDEX
    pixel_size_m: float | None = None
    files: list[DescribedFile] = []
    simulation: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("it must be a JSON object")
        data = dict(data)
        if isinstance(data.get("licence"), dict):
            data["licence"] = data["licence"].get("spdx") or data["licence"].get("name")
        if isinstance(data.get("classes"), list):
            data["classes"] = [{"name": entry} if isinstance(entry, str) else entry for entry in data["classes"]]
        return data

    @model_validator(mode="after")
    def _consistent(self) -> DatasetDescription:
        if self.ignore_index != IGNORE_INDEX:
            raise ValueError(f"only {IGNORE_INDEX} can be ignored, it says {self.ignore_index}: rewrite the masks")
        if self.classes is not None:
            if not 2 <= len(self.classes) <= IGNORE_INDEX:
                raise ValueError(f"a dataset has 2 to {IGNORE_INDEX} classes, it lists {len(self.classes)}")
            indices = _mask_values(self.classes)
            if sorted(indices) != list(range(len(indices))):
                raise ValueError(f"class indices must be 0 to {len(indices) - 1}, each once; it lists {indices}")
            names = [entry.name for entry in self.classes]
            if len(set(names)) != len(names):
                raise ValueError(f"class names must differ; it lists {names}")
        return self

    def class_table(self) -> list[ClassInfo] | None:
        """The classes in the order of their mask values, with colours filled in; None if not listed."""
        if self.classes is None:
            return None
        by_value = dict(zip(_mask_values(self.classes), self.classes, strict=True))
        entries = [by_value[value] for value in sorted(by_value)]
        return [
            ClassInfo(name=entry.name, color=entry.color or color)
            for entry, color in zip(entries, default_palette(len(entries)), strict=True)
        ]


def _mask_values(classes: list[DescribedClass]) -> list[int]:
    return [place if entry.index is None else entry.index for place, entry in enumerate(classes)]


def default_palette(count: int) -> list[tuple[int, int, int]]:
    """``count`` distinguishable RGB colours (0..255); the first are always the same."""
    colors = list(_BASE_COLORS[:count])
    for place in range(len(colors), count):
        hue = (place * 0.618034) % 1.0  # golden ratio: neighbours in the list are far apart in hue
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.55 + 0.4 * (place % 2), 0.6 + 0.15 * (place % 3))
        colors.append((round(red * 255), round(green * 255), round(blue * 255)))
    return colors


def read_description(path: str | Path) -> DatasetDescription:
    """Read a ``dataset.json``; :class:`BadInputFile` says what is wrong with it."""
    path = existing_file(path, "dataset description")
    try:
        return DatasetDescription.model_validate_json(path.read_bytes())
    except ValidationError as exc:
        problem = first_problem(exc, "content")
        raise BadInputFile(f"{path} is not a valid dataset description ({problem}); correct it") from exc
    except OSError as exc:
        raise BadInputFile(f"{path} cannot be read ({exc.strerror})") from exc


def write_description(path: str | Path, description: DatasetDescription) -> Path:
    """Write ``dataset.json`` atomically."""
    return write_text(path, description.model_dump_json(exclude_none=True, indent=1) + "\n")
