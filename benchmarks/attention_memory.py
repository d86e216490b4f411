"""Peak memory by image size for every way to compute position attention: measured on CPU, by TensorRT's builder else.

    python benchmarks/attention_memory.py MODEL.onnx [--checkpoint F.safetensors] [--typed MODEL.int8.onnx ...]

``typed``: files of lower precision made from the model. Writes a table (Markdown) and the figures as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path

from hpddrnet_trt.benchmark.attention_memory import Usage, attention_memory, table
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.core.provenance import command_line, library_versions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="FP32 ONNX file with dynamic sizes")
    parser.add_argument("--checkpoint", type=Path, help="also its checkpoint, in PyTorch")
    parser.add_argument("--typed", type=Path, nargs="*", default=[], help="ONNX files of lower precision, for TensorRT")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="pixels")
    parser.add_argument("--output", type=Path, default=Path("attention-memory.json"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    def tell(usage: Usage) -> None:
        figure = f"{usage.mib:,.0f} MiB" if usage.mib is not None else usage.reason
        print(f"{usage.form}, {usage.side}x{usage.side}: {figure}", file=sys.stderr)

    try:
        found = attention_memory(
            arguments.model, arguments.sides, checkpoint=arguments.checkpoint, typed=arguments.typed, on_result=tell
        )
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    usages = [dataclasses.asdict(usage) for usage in found]
    record = {"command": command_line(), "versions": library_versions(), "usages": usages}
    write_text(arguments.output, json.dumps(record, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
