"""Segment frames inside your own program, without PyTorch.

    python examples/embed_in_your_program.py micrograph.tif
    python examples/embed_in_your_program.py micrograph.tif --model model.engine --engine tensorrt

An environment that runs it (add `[openvino]`, `[tensorrt]` or `[tensorrt-rtx]` for a faster engine):

    python -m venv runner && runner/bin/pip install .
    runner/bin/python examples/embed_in_your_program.py micrograph.tif
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpddrnet_trt import load_segmenter, read_micrograph
from hpddrnet_trt.core.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--model", default="nasa-super1", help="a model that comes with the package, or a file")
    parser.add_argument("--engine", default="auto")
    arguments = parser.parse_args()

    micrograph = read_micrograph(arguments.picture)
    with load_segmenter(arguments.model, engine=arguments.engine) as segmenter:
        result = segmenter.segment(micrograph)  # or an array [height, width] of your own
        print(f"by {segmenter.engine.runtime}, PyTorch {'is' if 'torch' in sys.modules else 'is not'} loaded")
    print(result)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped")
