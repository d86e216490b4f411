"""A large micrograph in tiles and, on request, whole: seconds, peak memory, and how well the labels agree.

    python benchmarks/large_micrograph.py DATA/images/test --sides 2048 4096 8192 --whole --output large.json

Micrographs of the folder, mirrored so that neighbours fit, make a square mosaic. Every run has a process of its own,
for an honest memory figure: `peak_mib` of the whole process, `added_mib` what the segmentation adds to a process that
holds model, image and labels. `seconds` are of the last run, after loading; `first_s` of the first, which compiles.
`agreement`: share of pixels with the same label in tiles as whole, where both ran.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.benchmark.machine import describe_machine, peak_memory_mib, resident_memory_mib
from hpddrnet_trt.benchmark.probe import how_it_ended
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.core.metrics import agreement
from hpddrnet_trt.core.provenance import command_line
from hpddrnet_trt.data.datasets import image_files
from hpddrnet_trt.data.micrograph import read_micrograph, to_grey8
from hpddrnet_trt.inference import Tile


def mosaic(folder: Path, side: int) -> npt.NDArray[np.uint8]:
    """``side`` x ``side`` pixels: each micrograph four times, mirrored at its right and lower border."""
    sources = image_files(folder)
    pictures = [to_grey8(read_micrograph(path).pixels)[0] for path in sources[: max(1, side // 256) ** 2]]
    height, width = (min(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    canvas = np.empty((side, side), np.uint8)
    across = -(-side // (2 * width))
    for row, top in enumerate(range(0, side, height)):
        for column, left in enumerate(range(0, side, width)):
            picture = pictures[(row // 2 * across + column // 2) % len(pictures)][:height, :width]
            turned = picture[:: -1 if row % 2 else 1, :: -1 if column % 2 else 1]
            place = canvas[top : top + height, left : left + width]
            place[...] = turned[: place.shape[0], : place.shape[1]]
    return canvas


def measure(arguments: argparse.Namespace, side: int, tile: Tile, labels: Path) -> dict[str, Any]:
    """One run, in this process; the labels are also written to ``labels``."""
    options = {} if arguments.threads is None else {"threads": arguments.threads}
    with load_segmenter(arguments.model, engine=arguments.engine, tile=tile, **options) as segmenter:
        image = mosaic(arguments.folder, side)
        out = np.full_like(image, 255)  # in memory, not just promised
        before = resident_memory_mib()
        seconds = []
        for number in range(arguments.runs):
            with tqdm(desc=f"{side}x{side}, {tile}, run {number + 1}", unit="tile", mininterval=1) as bar:

                def progress(done: int, of: int, bar: tqdm[Any] = bar) -> None:
                    bar.total = of
                    bar.update(done - bar.n)

                begin = time.perf_counter()
                result = segmenter.segment(image, out, progress=progress)
                seconds.append(time.perf_counter() - begin)
        peak = peak_memory_mib()
        np.save(labels, out)
        return {
            "side": side,
            "mode": "whole" if result.tiling is None else "tiles",
            "engine": segmenter.engine.runtime,
            "first_s": seconds[0],
            "seconds": seconds[-1],
            "peak_mib": peak,
            "added_mib": peak - before,
            "tiling": None if result.tiling is None else result.tiling.as_dict(),
        }


def run_child(arguments: argparse.Namespace, side: int, tile: Tile, labels: Path) -> dict[str, Any]:
    """:func:`measure` in a new process; its reason where it failed."""
    command = [
        sys.executable, __file__, str(arguments.folder), "--model", str(arguments.model), "--engine", arguments.engine,
        "--sides", str(side), "--tile", str(tile), "--runs", str(arguments.runs), "--child", str(labels),
    ]  # fmt: skip
    command += [] if arguments.threads is None else ["--threads", str(arguments.threads)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        return {"side": side, "mode": str(tile), "error": how_it_ended(child.returncode, "see above")}
    found: dict[str, Any] = json.loads(child.stdout)
    return found


def compare(arguments: argparse.Namespace, side: int) -> list[dict[str, Any]]:
    """In tiles and, on request, whole, with their agreement."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "tiles.npy", Path(folder) / "whole.npy"]
        runs = [run_child(arguments, side, arguments.tile, files[0])]
        if arguments.whole:
            runs.append(run_child(arguments, side, "whole", files[1]))
            if all(file.exists() for file in files):
                runs[0]["agreement"] = agreement(np.load(files[0]), np.load(files[1]))
    return runs


def tile_argument(text: str) -> Tile:
    return int(text) if text.isdigit() else text  # type: ignore[return-value]  # the segmenter checks it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="micrographs")
    parser.add_argument("--sides", type=int, nargs="+", default=[8192], help="pixels")
    parser.add_argument("--model", default="nasa-super1", help="a model that comes with the package, or a file")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tile", type=tile_argument, default=1024, help="edge in pixels, or auto")
    parser.add_argument("--whole", action="store_true", help="also in one piece")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("large-micrograph.json"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.child is not None:
            print(json.dumps(measure(arguments, arguments.sides[0], arguments.tile, arguments.child)))
            return 0
        machine = describe_machine().model_dump(mode="json")
        runs = [run for side in arguments.sides for run in compare(arguments, side)]
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    record = {"command": command_line(), "model": str(arguments.model), "machine": machine, "runs": runs}
    write_text(arguments.output, json.dumps(record, indent=1) + "\n")
    for run in runs:
        print(json.dumps(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
