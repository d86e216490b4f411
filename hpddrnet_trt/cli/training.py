"""Commands from data to a trained and scored network."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from hpddrnet_trt.cli.options import Data, Engine, Mode, ModelFile, Split
from hpddrnet_trt.cli.program import app
from hpddrnet_trt.core.errors import require


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file, e.g. train/configs/demo.yaml.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override settings.")] = None,
) -> None:
    """Train a network; an interrupted run continues where it stopped when called again."""
    for module in ("torch", "lightning", "tensorboard", "safetensors"):
        require(module, "train", "train a network")
    from hpddrnet_trt.training.config import load_config
    from hpddrnet_trt.training.run import train as run_training

    logging.getLogger("hpddrnet_trt.training").setLevel(logging.INFO)  # says what it continues from
    result = run_training(load_config(config, settings or []))
    typer.echo(f"best mIoU {result.metrics['val/miou']:.4f} at step {result.metrics['step']:.0f}: {result.checkpoint}")


@app.command()
def measure_training(
    config: Annotated[Path, typer.Option(help="YAML file, e.g. train/configs/demo.yaml.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override settings.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 50,
) -> None:
    """Measure whether loading and augmenting limit the training of a configuration; keeps nothing."""
    for module in ("torch", "lightning"):
        require(module, "train", "measure training")
    from hpddrnet_trt.training.config import load_config
    from hpddrnet_trt.training.throughput import measure_throughput

    typer.echo(measure_throughput(load_config(config, settings or []), steps=steps).text())


@app.command()
def evaluate(
    model: ModelFile,
    data: Data,
    split: Split = "test",
    mode: Mode = "single",
    engine: Engine = "auto",
    report: Annotated[
        Path | None,
        typer.Option(help="Write a page (.html): confusion, area fractions, worst images, learning curves."),
    ] = None,
    robustness: Annotated[
        bool,
        typer.Option("--robustness", help="Also score the images under changed contrast, noise, magnification, ..."),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Report mIoU, per-class IoU, pixel and mean accuracy of a checkpoint or any model file.

    With --report also as a page with pictures, and beside it a table of all images (.csv). Learning
    curves are in it when metrics.csv of the training run lies beside the model.
    """
    import json

    from hpddrnet_trt.accuracy import assess, measure_robustness
    from hpddrnet_trt.core.files import write_text
    from hpddrnet_trt.data.datasets import FolderDataset
    from hpddrnet_trt.engines import model_file
    from hpddrnet_trt.inference import load_segmenter
    from hpddrnet_trt.report.accuracy import check_target, write_report
    from hpddrnet_trt.report.learning_curves import curves_beside

    if report is not None:
        check_target(report)
    file = model_file(model, engine)
    dataset = FolderDataset.open(data)
    with load_segmenter(file, engine=engine, mode=mode) as segmenter:
        found = assess(segmenter, dataset, split, model_file=file)
        robust = measure_robustness(segmenter, dataset, split) if robustness else None
        typer.echo(f"{model} on {dataset.name}/{split}, mode {mode}, {segmenter.engine.runtime}")
    typer.echo(found.scores.table(found.class_names))
    if robust is not None:
        typer.echo(f"\n{robust.table()}")
    if report is not None:
        for path in write_report(found, report, curves=curves_beside(file), robustness=robust):
            if path is not None:
                typer.echo(f"written: {path}")
    if json_file is not None:
        record = found.record() | ({} if robust is None else {"robustness": robust.record()})
        write_text(json_file, json.dumps(record, indent=1, allow_nan=False) + "\n")
        typer.echo(f"written: {json_file}")
