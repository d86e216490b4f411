"""Commands that measure: engines against PyTorch, label maps against label maps, and what this machine can run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpddrnet_trt.cli.options import Data, Split, parse_size, write_json
from hpddrnet_trt.cli.program import INTERRUPTED, command
from hpddrnet_trt.core.errors import UsageError

if TYPE_CHECKING:
    from hpddrnet_trt.benchmark.result import BenchmarkResult, Settings

PANEL = "Measure"
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")]
Publish = Annotated[
    Path | None, typer.Option(help="Also copy the report there, named after the machine's GPU or CPU and the day.")
]
Against = Annotated[Path | None, typer.Option(help="An older result.json: also show what changed since.")]


class Measure(StrEnum):
    """What a benchmark takes beside the end-to-end latency (an enumeration: Typer repeats no Literal)."""

    INFERENCE = "inference"
    THROUGHPUT = "throughput"
    LAYERS = "layers"
    ROOFLINE = "roofline"


@dataclass(frozen=True)
class TimingOptions:
    """What is timed, and how long."""

    size: Annotated[
        list[str] | None, typer.Option(help="Timed frame, e.g. 1024x1024; repeat for several; default: as the images.")
    ] = None
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Frames per inference; repeat for several.")] = None
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; each runs every engine once.")] = 30
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per engine.")] = None
    measure: Annotated[
        list[Measure] | None,
        typer.Option(help="Beside the end-to-end latency; repeat for several; default: all of these."),
    ] = None
    latency_only: Annotated[bool, typer.Option("--latency-only", help="Nothing beside that latency.")] = False
    memory_size: Annotated[
        list[str] | None, typer.Option(help="Frame whose peak memory is measured; repeat; default: the timed ones.")
    ] = None

    def settings(self) -> Settings:
        """The same for the benchmark; :class:`UsageError` for what makes no sense."""
        from hpddrnet_trt.benchmark.result import make_settings

        if self.measure and self.latency_only:
            raise UsageError("--measure asks for more than --latency-only; give one of them")
        wanted = set() if self.latency_only else set(self.measure or Measure)
        return make_settings(
            sizes=tuple(map(parse_size, self.size or ())), batches=tuple(self.batch or (1,)), rounds=self.rounds,
            threads=self.threads, memory_sizes=tuple(map(parse_size, self.memory_size or ())),
            inference=Measure.INFERENCE in wanted, throughput=Measure.THROUGHPUT in wanted,
            layers=Measure.LAYERS in wanted, roofline=Measure.ROOFLINE in wanted,
        )  # fmt: skip


@command(PANEL, "benchmark model.onnx nasa-super1 --data DATASET --size 1024x1024")
def benchmark(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Model files, or a folder that holds them.")],
    data: Data,
    timing: TimingOptions,
    split: Split = "test",
    output: Output = Path("report"),
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines", help="Also what others would run: PyTorch AMP and compiled, the plain export with defaults."
        ),
    ] = False,
    against: Against = None,
    publish: Publish = None,
) -> None:
    """Compare every engine and precision with the PyTorch reference in one interleaved run.

    Without a checkpoint, or without PyTorch, the FP32 ONNX file in ONNX Runtime is the reference.
    """
    from hpddrnet_trt.benchmark.entries import entries_for, model_files, reading_of
    from hpddrnet_trt.benchmark.images import load_images, own_size
    from hpddrnet_trt.benchmark.result import load_result
    from hpddrnet_trt.benchmark.run import run_benchmark
    from hpddrnet_trt.engines import CHECKPOINTS

    settings = timing.settings()
    old = None if against is None else load_result(against)
    files = model_files(models)
    images = load_images(data, split, **reading_of(files)._asdict())
    entries = entries_for(files)
    if baselines:
        from hpddrnet_trt.benchmark.baselines import baseline_entries

        checkpoint = next((file for file in files if file.suffix.lower() in CHECKPOINTS), None)
        if checkpoint is None:
            raise UsageError("--baselines needs a checkpoint among the models; add its .safetensors file")
        main = settings.sizes[-1] if settings.sizes else own_size(images.images)
        entries += baseline_entries(checkpoint, output / "baselines", size=main, batch=settings.batches[0])
    result = run_benchmark(entries, images, settings)
    _report(result, output, old, publish)
    if not result.complete:
        raise typer.Exit(INTERRUPTED)


@command(PANEL, "benchmark report report/result.json --against older.json", name="benchmark report")
def benchmark_report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT...", help="Files result.json of benchmarks.")],
    output: Output = Path("report"),
    against: Against = None,
    publish: Publish = None,
) -> None:
    """Make the report of saved results again; several Python environments of one machine become one report.

    Of several results the first must hold the reference.
    """
    from hpddrnet_trt.benchmark.compare import merge
    from hpddrnet_trt.benchmark.result import load_result

    loaded = [load_result(path) for path in results]
    old = None if against is None else load_result(against)
    _report(loaded[0] if len(loaded) == 1 else merge(loaded), output, old, publish)


def _report(result: BenchmarkResult, output: Path, old: BenchmarkResult | None, publish: Path | None) -> None:
    from hpddrnet_trt.benchmark.compare import compare, differences, format_changes
    from hpddrnet_trt.benchmark.table import format_table
    from hpddrnet_trt.report.benchmark import headline, publish_report, write_report

    written = write_report(result, output)
    typer.echo(f"{format_table(result)}\n{headline(result)}")
    if old is not None:
        changes = compare(old, result)
        typer.echo(f"\nsince {old.created}:\n{format_changes(changes, differences(old, result))}")
    if publish is not None:
        typer.echo(f"published: {publish_report(written, result, publish)}")
    typer.echo(f"report: {written.html}")


@command(PANEL, "compare nasa-super1 model.int8.onnx --images DATASET")
def compare(
    a: Annotated[Path, typer.Argument(help="The reference: a model file, a shipped model's name, or label maps.")],
    b: Annotated[Path, typer.Argument(help="What is compared with it: a model file, or a folder of label maps.")],
    images: Annotated[
        Path | None, typer.Option(help="For models: micrographs, a folder, or a dataset.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split, where the micrographs are a dataset.")] = "val",
    layers: Annotated[
        bool, typer.Option("--layers", help="Instead compare two ONNX files tensor by tensor: where does B go wrong?")
    ] = False,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="With --layers: run B on this machine's GPU with TensorRT.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Compare the label maps of two models on the same micrographs, or those in two folders.

    Of folders, the files of equal name are compared; A may be masks, where 255 does not count.
    """
    from hpddrnet_trt.accuracy.layers import compare_layers
    from hpddrnet_trt.data.datasets import find_images
    from hpddrnet_trt.inference import load_segmenter
    from hpddrnet_trt.inference.compare import compare_folders, compare_models

    compared: Any
    if a.is_dir() and b.is_dir() and images is None:
        compared = compare_folders(a, b)
    elif images is None:
        raise UsageError("two models are compared on micrographs: give them with --images; or give two folders")
    elif layers:
        compared = compare_layers(a, b, find_images(images, split), tensorrt=tensorrt)
    else:
        paths = find_images(images, split)
        with load_segmenter(a, precision="file") as first, load_segmenter(b, precision="file") as second:
            compared = compare_models(first, second, paths)
    typer.echo(compared.text())
    write_json(json_file, compared.record())


@command(PANEL, "engines")
def engines() -> None:
    """List the runtimes of this machine: version, or the reason why one is missing."""
    from hpddrnet_trt.engines import available_engines

    for name, state in available_engines().items():
        typer.echo(f"{name:<14} {state}")


@command(PANEL, "grains labels/")
def grains(
    folder: Annotated[Path, typer.Argument(help="Where `segment --write regions,grains` has written.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for grains.csv and grains.png; default: the same.")
    ] = None,
) -> None:
    """Grain size over all pictures of a folder, with intervals over pictures, and the distribution of diameters.

    Number density, mean diameter and intercept, ASTM grain size number by intercepts and planimetric (docs/grains.md).
    """
    from hpddrnet_trt.report.grains import grain_text, write_grain_report

    table, figure = write_grain_report(folder, output or folder)
    typer.echo(f"{grain_text(table)}\nwritten to {table} and {figure}")
