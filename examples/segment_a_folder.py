"""Segment all micrographs of a folder and save what an image analyst wants: overlays, regions, ROIs for ImageJ.

    python examples/segment_a_folder.py MICROGRAPHS RESULTS [MODEL]

The same on the command line, with a progress bar and resuming:

    hpddrnet-trt segment MICROGRAPHS --output RESULTS --write png,regions,rois

Needs pip install 'hpddrnet-trt[results]'.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpddrnet_trt import load_segmenter, read_micrograph
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.data.datasets import image_files
from hpddrnet_trt.data.intensity import to_grey8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("micrographs", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("model", nargs="?", default="nasa-super1", help="one that comes with the package, or a file")
    arguments = parser.parse_args()

    folder = arguments.results
    with load_segmenter(arguments.model) as segmenter:
        for path in image_files(arguments.micrographs):
            micrograph = read_micrograph(path)  # with the pixel size, where the file says it
            result = segmenter.segment(micrograph)
            result.save(folder / f"{path.stem}.png")
            result.save(folder / f"{path.stem}.rois.zip")
            result.save(folder / f"{path.stem}.regions.csv")
            result.save_overlay(folder / f"{path.stem}.overlay.png", to_grey8(micrograph.pixels, result.window)[0])

            print(result)
            matrix = result.classes[0].name
            regions = result.regions(background=[matrix])
            if len(regions) and regions.equivalent_diameter_m is not None:
                print(f"  {len(regions)} regions, mean diameter {1e9 * regions.equivalent_diameter_m.mean():.0f} nm")
            elif len(regions):
                print(f"  {len(regions)} regions, mean diameter {regions.equivalent_diameter_px.mean():.1f} pixels")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped")
