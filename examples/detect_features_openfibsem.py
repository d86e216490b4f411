"""Find OpenFIBSEM's features (lamella, needle tip, landing post, ...) in an image with a model of ours.

    python examples/detect_features_openfibsem.py image.tif --model lamella.onnx \\
        --classes background=0 lamella=1 needle=2 --features NeedleTip LamellaCentre --drawing found.png

`--classes` gives each class of the model its number in OpenFIBSEM: 0 background, 1 lamella, 2 manipulator, 3 landing
post, 4 copper adaptor, 5 volume block. Prints where each feature is, in pixels and in micrometres from the middle of
the image (up is positive). Needs: pip install 'hpddrnet-trt[fibsem]'; no PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hpddrnet_trt.core.errors import UserError, require
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.integrations.fibsem import FEATURE_CLASSES, FibsemSegmentationModel, pixel_size_m


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", default="nasa-super1", help="a model that comes with the package, or a file")
    parser.add_argument("--classes", nargs="+", type=numbered, required=True, metavar="NAME=NUMBER")
    parser.add_argument("--features", nargs="+", required=True, choices=list(FEATURE_CLASSES), metavar="FEATURE")
    parser.add_argument("--pixel-size-nm", type=float, help="where the image does not say")
    parser.add_argument("--drawing", type=Path, help="PNG file for the image with mask and features")
    arguments = parser.parse_args()
    detection = require("fibsem.detection.detection", "fibsem", "detect features")
    found = detect(arguments, detection)
    for feature in found.features:
        wanted = FEATURE_CLASSES[feature.name]
        # OpenFIBSEM says (0, 0), or the middle of the image, for what is not there.
        if (wanted is not None and wanted not in found.mask) or (feature.px.x, feature.px.y) == (0, 0):
            print(f"{feature.name}: not found")
            continue
        x_um, y_um = feature.feature_m.x * 1e6, feature.feature_m.y * 1e6
        print(f"{feature.name}: x {feature.px.x:.1f}, y {feature.px.y:.1f} px = {x_um:.3f}, {y_um:.3f} um")
    if arguments.drawing is not None:
        figure = Figure(figsize=(8, 6))
        detection.plot_det(found, figure.subplots(), show=False)
        figure.savefig(arguments.drawing)


def numbered(entry: str) -> tuple[str, int]:
    """``lamella=1`` as name and number."""
    name, _, number = entry.partition("=")
    return name, int(number)


def detect(arguments: argparse.Namespace, detection: Any) -> Any:
    image, size_m = read(arguments.image)
    if arguments.pixel_size_nm is not None:
        size_m = arguments.pixel_size_nm * 1e-9
    if size_m is None:  # detect_features would take 25 nm without a word
        raise UserError(f"{arguments.image} does not say its pixel size; give --pixel-size-nm")
    features = [detection.get_feature(name) for name in arguments.features]
    with FibsemSegmentationModel(arguments.model, dict(arguments.classes)) as model:
        model.check_features(features)
        return detection.detect_features(image, model, features, pixelsize=size_m)


def read(path: Path) -> tuple[Any, float | None]:
    """An image and its pixel size in metres, from OpenFIBSEM's own files and those of vendors."""
    images = require("fibsem.structures", "fibsem", "read an image").FibsemImage
    micrograph = read_micrograph(path)  # first, because it says what is wrong with a file
    if path.suffix.lower() in (".tif", ".tiff"):
        image = images.load(str(path))
        if image.metadata is not None:
            return image, pixel_size_m(image)
    return images(micrograph.pixels), micrograph.pixel_size_m


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped")
