"""Models in the packages of other programs: bioimage.io (Fiji, ilastik, QuPath, napari), CZANN (ZEN, arivis).

A package is one zip file: the ONNX file, what describes it to that program, and, in a bioimage.io package, a test
picture with the labels that belong to it. :data:`FORMATS` holds which there are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.packages.bioimageio import bioimageio_files
from hpddrnet_trt.packages.bioimageio_reader import adopt_package
from hpddrnet_trt.packages.contents import Files, PackageSettings, Packed, pack, read_packed
from hpddrnet_trt.packages.czann import czann_files

__all__ = ["FORMATS", "PackageFormat", "PackageSettings", "adopt_package", "package_model"]


class PackageFormat(NamedTuple):
    """A kind of package: its ending, and what makes its files."""

    ending: str
    files: Callable[[Packed, PackageSettings], Files]


FORMATS = {
    "bioimageio": PackageFormat(".zip", bioimageio_files),
    "czann": PackageFormat(".czann", czann_files),
}


def package_model(
    model: str | Path, target: str | Path, form: str, settings: PackageSettings | None = None
) -> Path:
    """Write the ONNX file ``model`` as a package of the kind ``form`` to ``target``, whole or not at all.

    Raises :class:`UsageError` for a target with another ending, and for what the format asks for and neither the
    model's description nor ``settings`` knows; :class:`BadInputFile` for a file that cannot be packed.
    """
    if form not in FORMATS:
        raise UsageError(f"unknown package format {form!r}; choose one of: {', '.join(FORMATS)}")
    target, wanted = Path(target), FORMATS[form].ending
    if target.suffix.lower() != wanted:
        raise UsageError(
            f"the package {target} must end with {wanted}; write {target.with_suffix(wanted)}, or choose another "
            "--format"
        )
    return pack(target, FORMATS[form].files(read_packed(Path(model)), settings or PackageSettings()))
