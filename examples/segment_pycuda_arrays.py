"""Segment frames that PyCUDA holds on the GPU: frame in, labels out, in order on your stream.

    python examples/segment_pycuda_arrays.py model.engine micrograph.tif
    python examples/segment_pycuda_arrays.py model.engine micrograph.tif --own-context

The first command makes the GPU's primary context PyCUDA's (`pycuda.autoprimaryctx`): arrays are used in place and
nobody waits on the host. The second is for programs with a context of their own (`pycuda.autoinit`): frame and labels
are copied between the contexts, and the host waits for each frame. Sides are multiples of 8. Needs an NVIDIA GPU and
pip install 'hpddrnet-trt[tensorrt,pycuda]' (PyCUDA is compiled against the CUDA toolkit); not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from hpddrnet_trt import read_micrograph
from hpddrnet_trt.core.errors import UserError, require
from hpddrnet_trt.data.intensity import to_grey8
from hpddrnet_trt.engines.cuda import find_gpu
from hpddrnet_trt.engines.tensorrt import TensorRTEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an engine file with labels output")
    parser.add_argument("micrograph", type=Path)
    parser.add_argument("--own-context", action="store_true", help="as programs with pycuda.autoinit")
    arguments = parser.parse_args()

    frame = to_grey8(read_micrograph(arguments.micrograph).pixels)[0]
    gpu = find_gpu()  # a sentence where there is none; PyCUDA would raise its own error
    context = "pycuda.autoinit" if arguments.own_context else "pycuda.autoprimaryctx"
    require(context, "pycuda", "hold arrays on the GPU")
    driver = require("pycuda.driver", "pycuda", "make a CUDA stream")
    gpuarray = require("pycuda.gpuarray", "pycuda", "hold arrays on the GPU")

    with TensorRTEngine(arguments.model) as engine:
        stream = driver.Stream()
        frame_on_gpu = gpuarray.to_gpu_async(frame[None, None], stream=stream)  # [batch, 1, height, width]
        labels = gpuarray.empty((1, *frame.shape), np.uint8)
        engine.infer_device(frame_on_gpu, out=labels, stream=stream)
        found = labels.get_async(stream=stream)  # after the inference: it is queued on the same stream
        stream.synchronize()
        shares = np.bincount(found.ravel(), minlength=len(engine.manifest.classes)) / found.size
    print(f"on {gpu.name}, {context}")
    for entry, share in zip(engine.manifest.classes, shares, strict=True):
        print(f"  {entry.name} {share:.1%}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped")
