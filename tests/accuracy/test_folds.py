"""Cross-validation: every labelled picture is judged once, by a model that never saw its specimen."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hpddrnet_trt.accuracy.folds import CrossValidation, Fold, cross_validate, fold_config, shifts_at
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.data.simulate import write_dataset
from hpddrnet_trt.training import recipe_file
from hpddrnet_trt.training.config import TrainConfig
from hpddrnet_trt.training.plan import plan_run
from tests.training.conftest import TINY


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Of four pictures of specimens p and q to learn from, and one that must not be looked at."""
    dataset = write_dataset(tmp_path / "data", train=3, val=1, test=1, size=64, seed=1, progress=False)
    names = {split: [sample.name for sample in dataset.split(split)] for split in ("train", "val")}
    groups = zip([("train", name) for name in names["train"]] + [("val", names["val"][0])], "ppqq", strict=True)
    described = json.loads((dataset.root / "dataset.json").read_text())
    described["files"] = [{"split": split, "name": name, "group": group} for (split, name), group in groups]
    (dataset.root / "dataset.json").write_text(json.dumps(described))
    dataset.split("test")[0].image.write_bytes(b"no picture")
    return planned(tmp_path)


def planned(tmp_path: Path, *settings: str) -> TrainConfig:
    """The fixture's, by the command ``train data --folds 2``."""
    short = ["optimization.max_steps=8", "optimization.warmup_steps=2", "run.progress=true"]
    given = ["network={}", *TINY, *short, f"run.folder={tmp_path / 'runs'}", *settings]
    first = partial(fold_config, number=1, folds=2)
    return plan_run(recipe_file("demo"), tmp_path / "data", given, first=first)


def test_every_specimen_is_held_out_once_and_test_is_not_looked_at(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    result = cross_validate(config, None)
    estimates = [line for line in capsys.readouterr().err.splitlines() if "a step, about" in line]
    assert ["with the runs that follow" in line for line in estimates] == [True, False]
    assert [fold.specimens for fold in result.folds] == [["p"], ["q"]]
    held_out = [name for fold in result.folds for name in fold.pictures]
    assert len(held_out) == len(set(held_out)) == 4
    assert not any(name.startswith("test/") for name in held_out)
    record = json.loads(result.file.read_text())
    assert record["folds"][0]["figures"]["mIoU"] == result.folds[0].figures["mIoU"]
    kinds = {"mIoU", "micro IoU, per picture", "IoU pore", "boundary F pore", "centerline F pore", "area error pore"}
    assert kinds <= record["summary"].keys()
    assert "fold 2 held out: q" in result.table()

    runs = {path: path.stat().st_mtime_ns for path in config.run.folder.rglob("*.safetensors")}
    assert len(runs) == 2
    assert cross_validate(config, 2).folds == result.folds  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in config.run.folder.rglob("*.safetensors")} == runs
    caplog.clear()
    with (
        caplog.at_level("INFO"),
        pytest.raises(UsageError, match=r"3 folds of whole specimens.*train, val hold 2: p, q; choose fewer folds"),
    ):
        cross_validate(config, 3)
    assert not caplog.messages  # no training is announced that cannot be

    assert planned(tmp_path) == config  # the same command goes on there, another one elsewhere
    assert planned(tmp_path, "loss.kind=ohem").run.name == f"{config.run.name}-2"


def test_simulated_pictures_are_specimens_of_their_own(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, train=3, val=1, test=0, size=64, progress=False)
    folds = [dataset.fold(number, 4, ["train", "val"], train="a", held_out="b") for number in (1, 2, 3, 4)]
    assert [len(fold.split("b")) for fold in folds] == [1, 1, 1, 1]


def test_an_enlarged_picture_keeps_its_size_and_shows_its_middle() -> None:
    image = np.zeros((40, 60), dtype=np.uint8)
    image[10:30, 15:45] = 200
    (shift,) = shifts_at([("magnification", 2), ("magnification", 0.5)])
    assert shift.values == (0.5, 1.0, 2)
    rng = np.random.default_rng(0)
    enlarged, mask = shift(image, image // 200, 2, rng)
    assert enlarged.shape == mask.shape == image.shape
    assert enlarged.min() == 200
    assert mask.min() == 1
    assert shift(image, image, 0.5, rng)[0].shape == (20, 30)
    with pytest.raises(UsageError, match="no shift 'tilt'; choose of contrast"):
        shifts_at([("tilt", 1)])


def test_mean_and_spread_are_of_the_folds_that_have_the_figure(tmp_path: Path) -> None:
    folds = [Fold([name], [name], {"IoU a": value, "IoU b": other}) for name, value, other in
             (("p", 0.5, math.nan), ("q", 0.7, 0.2))]  # fmt: skip
    result = CrossValidation(folds, tmp_path / "folds.json")
    assert result.summary()["IoU a"] == pytest.approx((0.6, math.sqrt(0.02)))
    mean, spread = result.summary()["IoU b"]
    assert mean == 0.2
    assert math.isnan(spread)
    lines = result.table().splitlines()
    assert lines[1].split() == ["IoU", "a", "60.0", "14.1", "50.0", "70.0"]
    assert lines[2].split() == ["IoU", "b", "20.0", "–", "–", "20.0"]
