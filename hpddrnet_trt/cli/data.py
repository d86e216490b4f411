"""Commands about datasets: the catalog of public ones, checks, and simulated micrographs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpddrnet_trt.cli.program import app

if TYPE_CHECKING:
    from hpddrnet_trt.data.datasets import FolderDataset

datasets_app = typer.Typer(
    name="datasets", help="Public SEM segmentation sets: list, show, get, convert.", rich_markup_mode=None
)
app.add_typer(datasets_app)

DatasetName = Annotated[str, typer.Argument(help="Name in the catalog, e.g. nasa-super1.")]
NewFolder = Annotated[Path, typer.Argument(help="Dataset folder to write; new or empty.")]


@datasets_app.callback(invoke_without_command=True)
def datasets(context: typer.Context) -> None:
    """List the catalog of public SEM segmentation sets; see also `show`, `get` and `convert`."""
    from hpddrnet_trt.data.catalog.describe import overview
    from hpddrnet_trt.data.catalog.entries import ENTRIES

    if context.invoked_subcommand is None:
        typer.echo(overview(ENTRIES.values()))


@datasets_app.command("show")
def show_dataset(name: DatasetName) -> None:
    """Print all that is known of one dataset: addresses, checksums, licence, citation, what was verified."""
    from hpddrnet_trt.data.catalog.describe import details
    from hpddrnet_trt.data.catalog.entries import find_entry

    typer.echo(details(find_entry(name)))


@datasets_app.command("get")
def get_dataset(
    name: DatasetName,
    folder: NewFolder,
    downloads: Annotated[
        Path | None, typer.Option(help="Where downloads are kept and continued; `downloads` beside FOLDER if left out.")
    ] = None,
    accept_unclear_licence: Annotated[
        bool, typer.Option("--accept-unclear-licence", help="Download although its licence is not clear.")
    ] = False,
) -> None:
    """Download a dataset (continuing an interrupted download), verify it and convert it."""
    from hpddrnet_trt.data.catalog.entries import find_entry
    from hpddrnet_trt.data.catalog.get import get_dataset as get

    _echo_dataset(
        get(find_entry(name), folder, downloads=downloads, accept_unclear_licence=accept_unclear_licence)
    )


@datasets_app.command("convert")
def convert_dataset(
    name: DatasetName,
    source: Annotated[Path, typer.Argument(help="Folder or archive (ZIP, TAR) as the authors publish it.")],
    folder: NewFolder,
) -> None:
    """Convert files that are already here to this package's dataset layout."""
    from hpddrnet_trt.data.catalog.entries import find_entry
    from hpddrnet_trt.data.catalog.get import convert_dataset as convert

    _echo_dataset(convert(find_entry(name), source, folder))


def _echo_dataset(dataset: FolderDataset) -> None:
    counts = ", ".join(f"{len(dataset.split(split))} {split}" for split in dataset.splits)
    typer.echo(f"written: {dataset.root} ({counts}); look at it with: hpddrnet-trt check-dataset {dataset.root}")


@app.command()
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


@app.command()
def simulate(
    folder: Annotated[Path, typer.Argument(help="Folder to write the dataset to.")],
    train_images: Annotated[int, typer.Option("--train", min=1)] = 48,
    val_images: Annotated[int, typer.Option("--val", min=1)] = 4,
    test_images: Annotated[int, typer.Option("--test", min=1)] = 4,
    size: Annotated[int, typer.Option(min=64, help="Edge length in pixels.")] = 512,
    magnification: Annotated[float, typer.Option(min=0.1, max=10, help="1: 20 nm per pixel; 2: 10 nm.")] = 2.0,
    seed: int = 0,
) -> None:
    """Write a dataset of simulated SEM images (grains, pores, clay) with exact masks."""
    from hpddrnet_trt.data.simulate import write_dataset

    dataset = write_dataset(
        folder, train=train_images, val=val_images, test=test_images, size=size, magnification=magnification, seed=seed
    )
    typer.echo(f"written: {dataset.root}")
