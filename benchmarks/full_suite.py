"""The complete comparison on this machine, unattended: every file and engine of one model, and what others would run.

    python benchmarks/full_suite.py [--checkpoint nasa-super1] [--data DATASET] [--output runs/full] [--publish DIR]

Makes files in every precision and the engines that this machine can build, then measures all of them
against PyTorch at several sizes and batches (`hpddrnet-trt benchmark`). Without --data micrographs are
simulated: speed is the same, accuracy is then only the agreement with the reference.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path

from hpddrnet_trt.benchmark.preparation import prepare
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.data.simulate import write_dataset
from hpddrnet_trt.engines.cuda import gpu_or_none
from hpddrnet_trt.weights import DEFAULT, locate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path(DEFAULT), help="file, or a shipped model's name")
    parser.add_argument("--data", type=Path, help="dataset with train and test splits")
    parser.add_argument("--output", type=Path, default=Path("runs/full"))
    parser.add_argument("--publish", type=Path, help="folder for <gpu>-<date>.json and .html")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        return run(arguments)
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code


def run(arguments: argparse.Namespace) -> int:
    gpu = gpu_or_none()
    training = measured = arguments.data
    if arguments.data is None:
        training = arguments.output / "data"
        measured = training / "images" / "test"  # without masks: their classes are not the model's
        if not training.exists():
            write_dataset(training)
    runtimes = ("auto",) if gpu is None else ("tensorrt", "tensorrt-rtx")
    made = prepare(
        locate(arguments.checkpoint, ".safetensors"), training, arguments.output,
        shapes="1x1x512x512:1x1x1024x1024:8x1x1024x1024,1x1x2048x2048:1x1x2048x2048:8x1x2048x2048", runtimes=runtimes,
    )  # fmt: skip
    for name, reason in made.problems.items():
        print(f"not made: {name}: {reason}", file=sys.stderr)
    if gpu is None:  # engines are built, but nothing here runs them; sizes that a CPU finishes
        sizes, batches = ["1024x1024", "512x512"], ["1"]
    else:
        sizes, batches = ["512x512", "2048x2048", "1024x1024"], ["1", "8"]
    command = [
        sys.executable, "-m", "hpddrnet_trt", "benchmark", *map(str, made.files), "--data", str(measured),
        "--baselines", "--output", str(arguments.output / "report"),
    ]  # fmt: skip
    command += [part for size in sizes for part in ("--size", size)]
    command += [part for batch in batches for part in ("--batch", batch)]
    if arguments.publish is not None:
        command += ["--publish", str(arguments.publish)]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
