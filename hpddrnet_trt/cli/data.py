"""Commands from datasets to a trained and scored network."""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hpddrnet_trt.cli.options import Checkpoint, Data, EngineOptions, Mode, ModelFile, Split, write_json
from hpddrnet_trt.cli.program import app, command, new_app
from hpddrnet_trt.core.errors import UsageError, require
from hpddrnet_trt.training import DEFAULT_RECIPE, recipe_file
from hpddrnet_trt.training import recipes as known_recipes

if TYPE_CHECKING:
    from hpddrnet_trt.data.datasets import FolderDataset

PANEL = "Train and score"


@command(PANEL, "train micrographs/ --recipe small-data optimization.max_steps=500")
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FOLDER] [KEY=VALUE]...", help="Dataset folder, and settings to override."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"Settings by name, see `recipes`; {DEFAULT_RECIPE} if left out.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings instead of a recipe.")] = None,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Go on from this checkpoint (.safetensors), or a shipped model's name."),
    ] = None,
    folds: Annotated[
        str | None,
        typer.Option(
            metavar="specimen|NUMBER",
            help="Judge the settings instead: train once without each specimen, or in so many folds of whole "
            "specimens, and score the pictures left out.",
        ),
    ] = None,
    under_shift: Annotated[
        bool,
        typer.Option("--under-shift", help="With --folds: mIoU at another contrast, gamma, dose, magnification, too."),
    ] = False,
) -> None:
    """Train a network on a dataset folder; an interrupted run continues where it stopped when called again.

    Sizes, steps and rates that a recipe leaves open come from the pictures and this machine.

    --folds tells whether a change of settings helps: mean and spread over the folds, of the splits train and val
    together. The split test is not looked at, unless data.fold_splits=[train,val,test] says so.
    """
    count = None if folds in (None, "specimen") else _folds(str(folds))
    if under_shift and folds is None:
        raise UsageError("--under-shift belongs to --folds; a trained model is swept by evaluate --robustness")
    if recipe is not None and config is not None:
        raise UsageError("give either --recipe or --config, not both")
    source = config or recipe_file(recipe or DEFAULT_RECIPE)
    given = arguments or []
    folders, settings = [text for text in given if "=" not in text], [text for text in given if "=" in text]
    if len(folders) > 1:
        raise UsageError(f"one dataset folder is trained on, not {len(folders)} ({', '.join(folders)})")
    for module in ("torch", "lightning", "tensorboard", "safetensors"):
        require(module, "train", "train a network")
    from hpddrnet_trt.training.plan import plan_run
    from hpddrnet_trt.training.run import train as run_training

    for room in ("training", "accuracy.folds"):  # say what they continue from, and how long it will take
        logging.getLogger(f"hpddrnet_trt.{room}").setLevel(logging.INFO)
    folder = Path(folders[0]) if folders else None
    if folds is not None:
        from hpddrnet_trt.accuracy.folds import cross_validate, fold_config, shifts_at
        from hpddrnet_trt.export.images import SHIFTED

        planned = plan_run(source, folder, settings, start=start, first=partial(fold_config, number=1, folds=count))
        judged = cross_validate(planned, count, shifts_at(SHIFTED) if under_shift else ())
        typer.echo(f"{judged.table()}\n\nwritten: {judged.file}")
        return
    planned = plan_run(source, folder, settings, start=start)
    result = run_training(planned)
    typer.echo(f"best mIoU {result.metrics['val/miou']:.4f} at step {result.metrics['step']:.0f}: {result.checkpoint}")
    if folder is not None:
        _finish(result.checkpoint, folder, planned.data.val_split)


def _folds(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise UsageError(f"--folds {text}: give `specimen` (one fold each) or a number of folds from 2 on")
    return int(text)


def _finish(checkpoint: Path, folder: Path, split: str) -> None:
    """Export what was trained, and say what can be done with it."""
    from hpddrnet_trt.core.files import sha256_of
    from hpddrnet_trt.core.manifest import read_manifest
    from hpddrnet_trt.data.datasets import find_images
    from hpddrnet_trt.export.onnx import export_onnx

    model = checkpoint.with_suffix(".onnx")
    if not model.exists() or read_manifest(model).checkpoint_sha256 != sha256_of(checkpoint):
        export_onnx(checkpoint, model, images=find_images(folder, split))
    typer.echo(f"exported: {model}")
    typer.echo(f"next: hpddrnet-trt segment MICROGRAPHS --model {model}")
    page = model.with_suffix(".html")
    typer.echo(f"      hpddrnet-trt evaluate {model} --data {folder} --split {split} --report {page}")


@command(PANEL, "adapt nasa-super1 --data other-alloy/ --out other-alloy.safetensors")
def adapt(
    model: Checkpoint,
    data: Annotated[Path, typer.Option(help="Micrographs of the new material or day (folder, pattern, or dataset).")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write (.safetensors).")],
    split: Split = "train",
    mix: Annotated[
        float | None,
        typer.Option(
            help="Share of the new pictures' statistics, above 0 to 1; the rest are the training's. Default: of 0.3, "
            "0.6 and 1 the one with which the model agrees best with itself."
        ),
    ] = None,
) -> None:
    """Carry a model to another material, instrument or day without masks.

    Statistics of its batch normalization are measured anew on those pictures, which takes seconds. Nobody can
    tell without masks whether labels became better: the distance from the training pictures and how well the model
    agrees with itself are shown, before and after, and where one became worse it is said. A few pictures with masks and
    `evaluate` tell more.
    """
    for module in ("torch", "safetensors"):
        require(module, "export", "adapt a checkpoint")
    from hpddrnet_trt.training.adapt import adapt as run_adaptation

    result = run_adaptation(model, data, out, split=split, mix=mix)
    typer.echo(f"{result.pictures} pictures give {100 * result.mix:.0f} % of the statistics")
    typer.echo(f"{100 * result.changed:.1f} % of the pixels have another label than before")
    before, after = result.before, result.after
    if before.distance is not None:
        typer.echo(f"distance from the training pictures: {before.distance:.2f} before, {after.distance:.2f} after")
    typer.echo(f"agreement with itself: {100 * before.agreement:.1f} % before, {100 * after.agreement:.1f} % after")
    for doubt in result.doubts:
        typer.echo(f"warning: {doubt}", err=True)
    typer.echo(f"written: {out}; next: hpddrnet-trt export {out}")


@command(PANEL, "recipes small-data")
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print the settings of this one.")] = None,
) -> None:
    """List the recipes that `train --recipe` takes, or print one: a file to copy and change for --config."""
    if name is not None:
        typer.echo(recipe_file(name).read_text(encoding="utf-8").rstrip())
        return
    known = known_recipes()
    width = max(map(len, known))
    for each, purpose in known.items():
        typer.echo(f"{each:{width}}  {purpose}")


@command(PANEL, "evaluate model.onnx --data DATASET --report page.html")
def evaluate(
    model: ModelFile,
    data: Data,
    engine: EngineOptions,
    split: Split = "test",
    mode: Mode = "single",
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
    """Report mIoU, per-class IoU, accuracy and errors of area, objects, sizes and boundaries of any model file.

    All with 95 % intervals over pictures, or specimens where the dataset names them, from five of these on.
    With --report also as a page with pictures, and beside it a table of all images (.csv). Learning
    curves are in it when metrics.csv of the training run lies beside the model.
    """
    from hpddrnet_trt.accuracy import assess, measure_robustness
    from hpddrnet_trt.accuracy.tables import table
    from hpddrnet_trt.data.datasets import FolderDataset
    from hpddrnet_trt.engines import model_file
    from hpddrnet_trt.inference import load_segmenter
    from hpddrnet_trt.report.accuracy import check_target, write_report
    from hpddrnet_trt.report.accuracy_figures import curves_beside

    if report is not None:
        check_target(report)
    arguments = engine.arguments("file")
    file = model_file(model, engine.engine, arguments["precision"])
    dataset = FolderDataset.open(data)
    with load_segmenter(file, **arguments, mode=mode) as segmenter:
        assessment = assess(segmenter, dataset, split, model_file=file)
        robust = measure_robustness(segmenter, dataset, split) if robustness else None
        runs = segmenter.engine
        computed = f", {runs.arithmetic.upper()}" if runs.arithmetic else ""
        typer.echo(f"{model} on {dataset.name}/{split}, mode {mode}, {runs.runtime}{computed}")
    typer.echo(table(assessment))
    if robust is not None:
        typer.echo(f"\n{robust.table()}")
    if report is not None:
        for path in write_report(assessment, report, curves=curves_beside(file), robustness=robust):
            if path is not None:
                typer.echo(f"written: {path}")
    write_json(json_file, assessment.record() | ({} if robust is None else {"robustness": robust.record()}))


# ---------------------------------------------------------------------------------------- datasets

datasets = new_app(
    name="datasets", no_args_is_help=True,
    help="Datasets: public SEM segmentation sets to list, get and convert; checks; simulated micrographs.",
)  # fmt: skip
app.add_typer(datasets, rich_help_panel=PANEL)

ImportFormat = Literal["labelme", "cvat", "coco", "qupath", "imagej", "masks"]  # FORMATS of data/importer.py
DatasetName = Annotated[str, typer.Argument(help="Name in the catalog, e.g. nasa-super1.")]
NewFolder = Annotated[Path, typer.Argument(help="Dataset folder to write; new or empty.")]


@command("Commands", "datasets list nasa-super1", name="list", group=datasets)
def list_datasets(
    name: Annotated[str | None, typer.Argument(help="Print all that is known of this one.")] = None,
) -> None:
    """List the catalog of public SEM segmentation sets; of one also addresses, checksums, licence, citation."""
    from hpddrnet_trt.data.catalog import details, find_entry, overview

    typer.echo(overview() if name is None else details(find_entry(name)))


@command("Commands", "datasets get nasa-super1 data/nasa-super1", name="get", group=datasets)
def get_dataset(
    name: DatasetName,
    folder: NewFolder,
    downloads: Annotated[
        Path | None, typer.Option(help="Where downloads are kept; `downloads` beside FOLDER if left out.")
    ] = None,
) -> None:
    """Download a dataset, verify it and convert it."""
    from hpddrnet_trt.data.catalog import find_entry
    from hpddrnet_trt.data.convert import get_dataset as get

    _echo_dataset(get(find_entry(name), folder, downloads=downloads))


@command("Commands", "datasets convert nasa-super1 downloaded.zip data/nasa-super1", name="convert", group=datasets)
def convert_dataset(
    name: DatasetName,
    source: Annotated[Path, typer.Argument(help="Folder or archive (ZIP, TAR) as the authors publish it.")],
    folder: NewFolder,
) -> None:
    """Convert files that are already here to this package's dataset layout."""
    from hpddrnet_trt.data.catalog import find_entry
    from hpddrnet_trt.data.convert import convert_dataset as convert

    _echo_dataset(convert(find_entry(name), source, folder))


def _echo_dataset(dataset: FolderDataset) -> None:
    counts = ", ".join(f"{len(dataset.split(split))} {split}" for split in dataset.splits)
    typer.echo(f"written: {dataset.root} ({counts}); look at it with: hpddrnet-trt datasets check {dataset.root}")


@command("Commands", "datasets import annotated data/mine --class 255=pore", name="import", group=datasets)
def import_dataset(
    source: Annotated[Path, typer.Argument(help="Folder or archive of pictures with their masks or annotations.")],
    folder: NewFolder,
    form: Annotated[
        ImportFormat | None, typer.Option("--format", help="What SOURCE is; recognized by itself if left out.")
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="WHAT=NAME", help="Name a label, value, range, colour; `ignore` for 255."),
    ] = None,
    specimen: Annotated[
        str | None,
        typer.Option(help="Regular expression that finds the specimen in a picture's path; `none`: split by picture."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures, if they lie elsewhere.")] = None,
    mask_mark: Annotated[str, typer.Option(help="What the names of masks end in, e.g. _phases.")] = "",
    nearest: Annotated[bool, typer.Option("--nearest", help="Take other colours and values as the nearest.")] = False,
    keep_empty: Annotated[
        bool, typer.Option("--keep-empty", help="Take pictures on which nothing is drawn as background.")
    ] = False,
) -> None:
    """Make a dataset of what annotation programs leave: labelme, CVAT, COCO, QuPath, ImageJ, napari, masks.

    Nothing of SOURCE is changed. Every picture is accounted for, on the screen and in dataset.json;
    contact-sheet.png shows pictures with their labels. --class may be given several times and orders
    the classes: pore_1=pore, 255=pore, 1-65535=pore, '#ff0000=pore', unlabeled=matrix.
    """
    from hpddrnet_trt.data.class_names import parse_rule
    from hpddrnet_trt.data.importer import CONTACT_SHEET, ImportSettings, import_folder

    rules = tuple(parse_rule(text) for text in classes or [])
    settings = ImportSettings(rules, specimen, images, mask_mark, nearest, keep_empty)
    confirm = typer.confirm if sys.stdin.isatty() else lambda question: False
    dataset, report = import_folder(source, folder, form=form, settings=settings, confirm=confirm)
    typer.echo(report.text())
    sheet = dataset.root / CONTACT_SHEET
    typer.echo(f"written: {dataset.root}; look at {sheet}, then: hpddrnet-trt train {dataset.root}")


@command("Commands", "datasets check DATASET --contact-sheet sheet.png", name="check", group=datasets)
def check_dataset(
    folder: Annotated[Path, typer.Argument(help="Dataset folder.")],
    contact_sheet: Annotated[Path | None, typer.Option(help="Write a PNG of images with their masks.")] = None,
) -> None:
    """Report counts, sizes, class fractions and every fault of a dataset; exit code 1 if it has any."""
    from hpddrnet_trt.data.check import check_dataset as run_check

    report = run_check(folder, contact_sheet=contact_sheet)
    typer.echo(report.text())
    if not report.ok:
        raise typer.Exit(1)


@command("Commands", "datasets simulate data/simulated --train 12 --size 256", name="simulate", group=datasets)
def simulate_dataset(
    folder: Annotated[Path, typer.Argument(help="Folder to write the dataset to.")],
    train_images: Annotated[int, typer.Option("--train", min=1, help="Images of the training split.")] = 48,
    val_images: Annotated[int, typer.Option("--val", min=1, help="Images of the validation split.")] = 4,
    test_images: Annotated[int, typer.Option("--test", min=1, help="Images of the test split.")] = 4,
    size: Annotated[int, typer.Option(min=64, help="Edge length in pixels.")] = 512,
    magnification: Annotated[float, typer.Option(min=0.1, max=10, help="1: 20 nm per pixel; 2: 10 nm.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers: the same seed gives the same images.")] = 0,
) -> None:
    """Write a dataset of simulated SEM images (grains, pores, clay) with exact masks."""
    from hpddrnet_trt.data.simulate import write_dataset

    dataset = write_dataset(
        folder, train=train_images, val=val_images, test=test_images, size=size, magnification=magnification, seed=seed
    )
    typer.echo(f"written: {dataset.root}")
