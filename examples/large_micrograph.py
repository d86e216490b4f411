"""Segment a micrograph of any size, in tiles where it is large, and say how well the tiles agree.

    python examples/large_micrograph.py MICROGRAPH LABELS.ome.tif [MODEL]

A stitched mosaic of 8192 x 8192 pixels needs little more memory than the picture and its labels. Ctrl-C ends it
between two tiles.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from hpddrnet_trt import load_segmenter, read_micrograph
from hpddrnet_trt.core.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("micrograph", type=Path)
    parser.add_argument("labels", type=Path, help="the kind of file by its ending")
    parser.add_argument("model", nargs="?", default="nasa-super1", help="one that comes with the package, or a file")
    arguments = parser.parse_args()

    micrograph = read_micrograph(arguments.micrograph)
    with load_segmenter(arguments.model, tile="auto") as segmenter, tqdm(unit="tile") as bar:

        def progress(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        result = segmenter.segment(micrograph, progress=progress)
    print(result)
    report = result.tiling
    if report is None:
        print("in one piece")
    else:
        print(
            f"{report.tiles} tiles of {report.tile[1]} x {report.tile[0]} pixels, {report.method}; neighbours disagree "
            f"on {report.seam_disagreement:.2%} of the pixels that both see"
        )
        if report.seam_disagreement > 0.05:
            print("that is much: try larger tiles, or a model that was trained on larger crops")
    print(f"written to {result.save(arguments.labels)}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped")
