"""The simulator: repeatable, exact masks, physics with the right sign, not solvable by a threshold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.data.check import check_dataset
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.simulate import CLAY, GRAIN, PORE, Imaging, simulate, write_dataset

CALM = Imaging(
    dose=1e5, probe_sigma=0.3, rim=0.0, escape_length=1.5, grain_spread=0.0, drift=0.0, line_flicker=0.0, charging=0.0,
    charging_length=30, shading=0.0, contrast=120, brightness=120, amplifier_noise=0.0,
)  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(st.integers(16, 80), st.integers(16, 80), st.integers(0, 2**32), st.sampled_from(["se", "bse"]))
def test_any_size_and_seed(height: int, width: int, seed: int, kind: str) -> None:
    image, mask = simulate(height, width, seed, kind)  # type: ignore[arg-type]
    assert image.shape == mask.shape == (height, width)
    assert image.dtype == mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {GRAIN, PORE, CLAY}
    again = simulate(height, width, seed, kind)  # type: ignore[arg-type]
    np.testing.assert_array_equal(image, again[0])
    np.testing.assert_array_equal(mask, again[1])


def test_seeds_differ_and_every_class_is_common() -> None:
    masks = [simulate(256, 256, seed)[1] for seed in range(6)]
    shares = np.mean([[(mask == value).mean() for value in range(3)] for mask in masks], axis=0)
    assert shares[GRAIN] > 0.25
    assert shares[CLAY] > 0.25
    assert 0.03 < shares[PORE] < 0.2
    assert not np.array_equal(masks[0], masks[1])


def test_imaging_leaves_the_specimen_alone() -> None:
    mask = simulate(96, 128, 5, imaging=CALM)[1]
    for other in (replace(CALM, dose=10, charging=0.5, rim=0.6, contrast=200), replace(CALM, grain_spread=0.3)):
        np.testing.assert_array_equal(simulate(96, 128, 5, imaging=other)[1], mask)
    np.testing.assert_array_equal(simulate(96, 128, 5, "bse", imaging=CALM)[1], mask)


def test_mask_is_exact() -> None:
    """In a nearly noiseless picture the brightness steps lie on the mask's pore outlines, drift or not."""
    for drift in (0.0, 2.0):
        image, mask = simulate(256, 256, 3, imaging=replace(CALM, drift=drift))
        solid = (mask != PORE).astype(np.uint8)
        inner = cv2.distanceTransform(1 - solid, cv2.DIST_L2, 5) >= 2
        outer = (cv2.distanceTransform(solid, cv2.DIST_L2, 5) >= 2) & (mask == CLAY)
        assert image[inner].mean() < image[outer].mean() - 35
        contrast = {}
        for shift in (-2, -1, 0, 1, 2):
            pores = np.roll(mask, shift, axis=1) == PORE
            contrast[shift] = image[~pores].mean() - image[pores].mean()
        assert max(contrast, key=contrast.__getitem__) == 0, contrast


def test_drift_bends_the_mask_with_the_picture() -> None:
    still, bent = (simulate(128, 128, 8, imaging=replace(CALM, drift=drift))[1] for drift in (0.0, 2.5))
    assert 0.01 < (still != bent).mean() < 0.5


def test_edges_are_bright() -> None:
    plain, rimmed = (simulate(256, 256, 2, imaging=replace(CALM, rim=rim)) for rim in (0.0, 0.6))
    near = (cv2.distanceTransform((plain[1] != PORE).astype(np.uint8), cv2.DIST_L2, 5) <= 1.5) & (plain[1] == CLAY)
    far = (cv2.distanceTransform((plain[1] != PORE).astype(np.uint8), cv2.DIST_L2, 5) > 8) & (plain[1] == CLAY)
    gain = rimmed[0].astype(float) - plain[0]
    assert gain[near].mean() > 20
    assert abs(gain[far].mean()) < 1.5


def test_shot_noise_follows_the_dose() -> None:
    """Halving the standard deviation takes four times the electrons, and its size is Poisson's."""
    clean = simulate(256, 256, 4, imaging=CALM)[0].astype(float)
    level = (clean - CALM.brightness) / CALM.contrast + 1  # relative emission
    grey = (clean > 20) & (clean < 200) & (level > 0.5)  # far enough from black and white not to clip
    for dose in (100, 400, 1600):
        noise = simulate(256, 256, 4, imaging=replace(CALM, dose=dose))[0] - clean
        expected = CALM.contrast * np.sqrt(level[grey].mean() / dose)
        assert noise[grey].std() == pytest.approx(expected, rel=0.08)


def test_line_flicker_is_common_to_a_line_and_charging_trails_to_the_right() -> None:
    clean = simulate(200, 200, 6, imaging=CALM)[0].astype(float)
    flicker = simulate(200, 200, 6, imaging=replace(CALM, line_flicker=0.05))[0] - clean
    assert flicker.mean(axis=1).std() > 5 * flicker.mean(axis=0).std()
    tails = np.abs(simulate(200, 200, 6, imaging=replace(CALM, charging=0.4, grain_spread=0.1))[0]
                   - simulate(200, 200, 6, imaging=replace(CALM, grain_spread=0.1))[0].astype(float))
    assert (tails.max(axis=1) > 8).mean() < 0.5  # some lines only
    assert tails.max() > 15


def test_threshold_does_not_solve_it() -> None:
    """Two Otsu thresholds on the smoothed picture, with the best assignment of phases to levels."""
    confusion = LabelComparison(3)
    for seed in range(8):
        image, mask = simulate(192, 192, 500 + seed)
        smooth = cv2.GaussianBlur(image, (0, 0), 1.5)
        upper, _ = cv2.threshold(smooth, 0, 255, cv2.THRESH_OTSU)
        dark = smooth[smooth <= upper].reshape(-1, 1)
        lower, _ = cv2.threshold(dark, 0, 255, cv2.THRESH_OTSU)
        levels = (smooth > lower).astype(np.uint8) + (smooth > upper)
        solids = min(((GRAIN, CLAY), (CLAY, GRAIN)), key=lambda pair: np.mean(np.array([PORE, *pair])[levels] != mask))
        confusion.update(np.array([PORE, *solids], np.uint8)[levels], mask)
    assert confusion.scores().miou < 0.5


def test_write_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    dataset = write_dataset(folder, train=2, val=1, test=1, size=(32, 40), seed=3, progress=False)
    assert (dataset.name, dataset.license, dataset.class_names) == (
        "simulated-mudrock", "CC0-1.0 (simulated)", ["grain", "pore", "clay"],
    )  # fmt: skip
    assert dataset.pixel_size_m == 20e-9
    assert {split: len(dataset.split(split)) for split in dataset.splits} == {"train": 2, "val": 1, "test": 1}
    image, mask = simulate(32, 40, (3, 0, 1))
    loaded = dataset.load(dataset.split("train")[1])
    np.testing.assert_array_equal(loaded[0], image)
    np.testing.assert_array_equal(loaded[1], mask)
    assert check_dataset(folder, progress=False).ok
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_write_dataset_again_reuses_the_same_and_refuses_another(tmp_path: Path) -> None:
    def write(**changes: int) -> FolderDataset:
        options = {"train": 1, "val": 0, "test": 0, "size": 24, "seed": 0, **changes}
        return write_dataset(tmp_path / "data", progress=False, **options)  # type: ignore[arg-type]

    first = write()
    stamp = (tmp_path / "data" / "dataset.json").stat().st_mtime_ns
    assert write().checksum() == first.checksum()
    assert (tmp_path / "data" / "dataset.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="holds something else"):
        write(seed=1)
    (tmp_path / "data" / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="holds something else"):
        write()


def test_impossible_requests(tmp_path: Path) -> None:
    for call in (
        lambda: simulate(8, 100, 0),
        lambda: simulate(64, 64, 0, "tem"),  # type: ignore[arg-type]
        lambda: write_dataset(tmp_path / "a", train=0, progress=False),
        lambda: write_dataset(tmp_path / "a", seed=-1, progress=False),
        lambda: write_dataset(tmp_path / "a", size=4, progress=False),
    ):
        with pytest.raises(UsageError):
            call()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError):
        write_dataset(tmp_path / "file", progress=False)
