"""Segment micrographs as the microscope saves them, and keep a table of area fractions.

    python examples/watch_a_folder.py /mnt/microscope/today --output labels --table fractions.csv

Runs until Ctrl-C, or with --stop-after 60 until nothing has come for a minute. Label images and overlays go to
--output, one row per micrograph to --table. The command `hpddrnet-trt watch` does the same without the table.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.inference.watch import Happened, WatchEvent, WatchSettings, stop_on_signal, watch_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("labels"))
    parser.add_argument("--table", type=Path, default=Path("fractions.csv"))
    parser.add_argument("--model", default="nasa-super1", help="a model that comes with the package, or a file")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--settle", type=float, default=2.0, help="seconds without a change: the file is complete")
    parser.add_argument("--stop-after", type=float, help="seconds without anything new after which to end")
    arguments = parser.parse_args()

    with (
        load_segmenter(arguments.model, engine=arguments.engine) as segmenter,
        arguments.table.open("a", newline="", encoding="utf-8") as stream,
    ):
        names = [entry.name for entry in segmenter.manifest.classes]
        table = csv.writer(stream)
        if stream.tell() == 0:
            table.writerow(["micrograph", *names])

        def note(event: WatchEvent) -> None:
            print(f"{event.path.name}: {event.happened.value} {event.reason or ''}")
            if event.happened is Happened.SEGMENTED and event.fractions is not None:
                table.writerow([event.path, *(f"{event.fractions[name]:.4f}" for name in names)])
                stream.flush()

        with stop_on_signal() as stop:
            summary = watch_folder(
                segmenter, arguments.folder, arguments.output,
                settings=WatchSettings(settle_s=arguments.settle, stop_after_s=arguments.stop_after),
                on_event=note, stop=stop,
            )  # fmt: skip
    print(summary)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped")
