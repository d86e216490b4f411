"""mIoU against the number of labeled pictures, chosen by `hpddrnet-trt rank` or drawn at random.

    python benchmarks/rank_curve.py DATASET --edge 256 --counts 2 4 8 --seeds 0 1 --work FOLDER

The training pictures of DATASET are cut into squares, the pool. For each seed the first few squares are drawn at random
and a small network is trained on them from scratch. Then the next ones are either drawn at random as well, or taken in
the order of `rank` with the network trained last; a new network is trained on all of them, with as many steps as
before. The mIoU is over all pictures of val and test, of which nothing is chosen: networks are taken after
their last step. A line for each training goes to FOLDER/curve.csv; trainings that stand there are not done again.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np

from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.description import FILE_NAME
from hpddrnet_trt.data.labels import write_pair
from hpddrnet_trt.inference import load_segmenter
from hpddrnet_trt.inference.rank import rank_pictures
from hpddrnet_trt.training import recipe_file
from hpddrnet_trt.training.config import load_config
from hpddrnet_trt.training.run import train

COLUMNS = ("dataset", "way", "seed", "pictures", "miou", "chosen")


def cut(source: Path, edge: int, folder: Path) -> list[str]:
    """Squares of the training pictures as a dataset in ``folder``, val and test as they are; the squares' names."""
    dataset = FolderDataset.open(source)
    if not folder.is_dir():
        shutil.copytree(source, folder, ignore=lambda path, names: ["train"] if "train" in names else [])
        for sample in dataset.split("train"):
            grey, mask = dataset.load(sample)
            height, width = grey.shape
            for top in range(0, height - edge + 1, edge):
                for left in range(0, width - edge + 1, edge):
                    part = np.s_[top : top + edge, left : left + edge]
                    name = f"{sample.name}_y{top:04d}_x{left:04d}"
                    write_pair(folder, "train", name, grey[part], mask[part], dataset.palette)
    return sorted(path.stem for path in (folder / "images" / "train").iterdir())


def trained(pool: Path, names: list[str], work: Path, seed: int, arguments: argparse.Namespace) -> Path:
    """The model of a training on the squares ``names``; its file, and a dataset of them beside it."""
    shutil.rmtree(work, ignore_errors=True)
    for kind in ("images", "masks"):
        for split in ("val", "test"):
            shutil.copytree(pool / kind / split, work / "data" / kind / split)
        (work / "data" / kind / "train").mkdir()
        for name in names:
            shutil.copy(pool / kind / "train" / f"{name}.png", work / "data" / kind / "train")
    shutil.copy(pool / FILE_NAME, work / "data")
    steps = arguments.steps
    config = load_config(recipe_file("small-data"), [
        f"network={{channels: {arguments.channels}, detail: true, pool_border: ignored}}",
        f"data.path={work / 'data'}", f"augmentation.crop=[{arguments.crop}, {arguments.crop}]",
        "augmentation.class_balance=0.0",
        f"optimization={{lr: 0.004, max_steps: {steps}, warmup_steps: {steps // 10}, batch_size: 4, clip_norm: 5.0,"
        " weight_decay: 0.01, ema_decay: 0.98}",
        f"run={{name: model, folder: {work}, seed: {seed}, threads: 1, val_every: {steps}, checkpoint_every: {steps}}}",
    ])  # fmt: skip
    return train(config).checkpoint


def miou(model: Path, dataset: FolderDataset) -> float:
    """Over all pictures of val and test together."""
    total = LabelComparison(len(dataset.classes))
    with load_segmenter(model) as segmenter:
        for split in ("val", "test"):
            for sample in dataset.split(split):
                grey, mask = dataset.load(sample)
                total.update(segmenter.segment(grey).labels, mask)
    return float(total.scores().miou)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--edge", type=int, default=256, help="of the squares, in pixels")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 8], help="of labeled squares")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--crop", type=int, default=128, help="of the training, in pixels")
    parser.add_argument("--all", action="store_true", help="at last also train on the whole pool")
    parser.add_argument("--work", type=Path, required=True, help="folder for pool, models and curve.csv")
    arguments = parser.parse_args()
    pool = arguments.work / arguments.dataset.name
    squares = cut(arguments.dataset, arguments.edge, pool)
    dataset = FolderDataset.open(pool)
    table = arguments.work / "curve.csv"
    done: dict[tuple[str, ...], dict[str, str]] = {}
    if table.is_file():
        with table.open(newline="") as stream:
            done = {tuple(row[key] for key in COLUMNS[:4]): row for row in csv.DictReader(stream)}
    else:
        table.write_text(",".join(COLUMNS) + "\n")

    def run(way: str, seed: int, names: list[str]) -> Path:
        key = (arguments.dataset.name, way, str(seed), str(len(names)))
        work = arguments.work / "-".join(key)
        if key in done:
            return work / "model" / "model.safetensors"
        model = trained(pool, names, work, seed, arguments)
        with table.open("a", newline="") as stream:
            csv.writer(stream).writerow([*key, f"{miou(model, dataset):.4f}", " ".join(names)])
        return model

    for seed in arguments.seeds:
        drawn = [squares[place] for place in np.random.default_rng(seed).permutation(len(squares))]
        first, *more = arguments.counts
        start = run("first", seed, drawn[:first])
        for count in more:
            run("random", seed, drawn[:count])
        names, model = drawn[:first], start
        for count in more:
            with load_segmenter(model, confidence=True) as segmenter:
                ranking = rank_pictures(segmenter, pool, labeled=model.parent.parent / "data", progress=False)
            best = [one.image.stem for one in ranking.order if one.image.stem not in names]
            names = names + best[: count - len(names)]
            model = run("ranked", seed, names)
    if arguments.all:
        run("all", arguments.seeds[0], squares)


if __name__ == "__main__":
    main()
