"""``dataset.json``: what a dataset says about itself, its classes and the origin of its files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hpddrnet_trt.core.errors import BadInputFile, first_problem
from hpddrnet_trt.core.files import decoded_text, read_file, write_text
from hpddrnet_trt.core.manifest import IGNORE_INDEX, ClassInfo, default_palette

FILE_NAME = "dataset.json"


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
    pixel_size_m: float | None = None  # metres; that of the description where the file has none of its own


class DatasetDescription(_Lenient):
    """The part of ``dataset.json`` that the package reads; other keys are left alone.

    ``license`` (or ``licence``, as older versions wrote) is a text, or an object with ``spdx``. ``classes`` may be
    plain names.
    """

    name: str | None = None
    license: str | None = None
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
        if "licence" in data:
            data.setdefault("license", data["licence"])
        if isinstance(data.get("license"), dict):
            data["license"] = data["license"].get("spdx") or data["license"].get("name")
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


def read_description(path: str | Path) -> DatasetDescription:
    """Read a ``dataset.json``; :class:`BadInputFile` says what is wrong with it."""
    content = read_file(path, "dataset description")
    try:
        return DatasetDescription.model_validate_json(decoded_text(content))
    except UnicodeDecodeError as exc:
        raise BadInputFile(f"{path} is not text in UTF-8 or UTF-16; save it as UTF-8") from exc
    except ValidationError as exc:
        problem = first_problem(exc, "content")
        raise BadInputFile(f"{path} is not a valid dataset description ({problem}); correct it") from exc


def description_of(root: Path) -> DatasetDescription:
    """What the ``dataset.json`` of ``root`` says; an empty description where there is none."""
    path = root / FILE_NAME
    return read_description(path) if path.is_file() else DatasetDescription()


def stated_pixel_size(image: Path) -> float | None:
    """Metres a pixel of ``image`` has by the ``dataset.json`` of the dataset that it lies in; None where none says so.

    It may make no sense.
    """
    for root in image.parents[1:]:
        below = image.relative_to(root).parts
        if not {"images", "imgs"}.intersection(below[:2]):
            continue
        path = root / FILE_NAME
        if path.is_file():
            try:
                of_all, own = _pixel_sizes(path, path.stat().st_mtime_ns)
            except (BadInputFile, OSError):
                return None  # whoever opens the dataset is told
            name = Path(*below[2:]).with_suffix("").as_posix().removesuffix("_leftImg8bit")
            return next((own[split, name] for split in below[:2] if (split, name) in own), of_all)
    return None


@lru_cache(maxsize=16)
def _pixel_sizes(path: Path, _modified_ns: int) -> tuple[float | None, dict[tuple[str, str], float]]:
    """What a ``dataset.json`` says of all pictures, and of each by split and name."""
    description = read_description(path)
    own = {(file.split, file.name): file.pixel_size_m for file in description.files if file.pixel_size_m is not None}
    return description.pixel_size_m, own


def write_description(path: str | Path, description: DatasetDescription) -> Path:
    """Write ``dataset.json`` atomically."""
    return write_text(path, description.model_dump_json(exclude_none=True, indent=1) + "\n")
