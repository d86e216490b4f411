"""The order in which pictures are to be labeled."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from hpddrnet_trt.core.domain import Domain
from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.rank import RANKING, Ranked, Ranking, farthest_first, looks, rank_pictures, read_ranking
from tests.toy import ToyEngine, grey_image


@pytest.fixture
def segmenter() -> Segmenter:
    return Segmenter(ToyEngine(), confidence=True)


def test_unsure_pictures_come_first_and_copies_last(segmenter: Segmenter, tmp_path: Path) -> None:
    """The toy is unsure between its classes: grey near 80 (two alike), sure where all is black."""
    pictures = {"black": 0, "unsure": 80, "unsure_copy": 80, "bright": 200}
    for name, grey in pictures.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((24, 24), grey, np.uint8))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = rank_pictures(segmenter, tmp_path, progress=False)
    names = [one.image.stem for one in found.order]
    assert names[0] == "unsure"
    assert names[-1] == "unsure_copy"
    assert set(names) == set(pictures)
    assert found.order[0].novelty == np.inf
    assert found.order[-1].novelty == 0
    expected = 1 - segmenter.segment(np.full((24, 24), 80, np.uint8)).confidence.mean()  # type: ignore[union-attr]
    assert found.order[0].expected_error == pytest.approx(expected)
    assert [path.name for path, _ in found.failed] == ["broken.png"]
    written = found.write(tmp_path / "order.csv")
    assert written.read_text().splitlines()[0] == ",".join(RANKING)
    assert read_ranking(written) == [(tmp_path / f"{name}.png").absolute() for name in names]


def test_what_is_labeled_stands_before_all_and_is_left_out(segmenter: Segmenter, tmp_path: Path) -> None:
    for name, grey in {"labeled/images/train/a": 80, "new/a": 80, "new/b": 40}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((24, 24), grey, np.uint8))
    found = rank_pictures(segmenter, tmp_path / "new", labeled=tmp_path / "labeled", progress=False)
    assert [one.image.stem for one in found.order] == ["b", "a"]
    assert found.order[1].novelty == 0
    with pytest.raises(UsageError, match="already; give some"):
        rank_pictures(segmenter, tmp_path / "new", labeled=tmp_path / "new", progress=False)


def test_far_from_training_counts_more() -> None:
    far, near = (Ranked(Path("a"), 0.1, 1.0, Domain("foreign", distance)) for distance in (5.0, 0.3))
    assert (far.worth, near.worth, Ranked(Path("a"), 0.1, 1.0).worth) == pytest.approx((0.5, 0.1, 0.1))
    assert str(Ranking([far], [])).endswith("10.0% of its pixels expected to be wrong, foreign")


def test_farthest_first_by_hand() -> None:
    places = np.array([[0.0], [1.0], [10.0], [11.0]])
    assert [index for index, _ in farthest_first(np.array([1.0, 2, 1, 1]), places)] == [1, 3, 0, 2]
    assert [index for index, _ in farthest_first(np.ones(4), places, before=1)] == [3, 1, 2]
    assert [index for index, _ in farthest_first(np.array([1.0, 3, 2]), np.zeros((3, 1)))] == [1, 2, 0]  # all alike


def test_looks_tell_focus_and_magnification() -> None:
    sharp = grey_image(64, 64)
    blurred = cv2.GaussianBlur(sharp, (0, 0), 2)
    assert looks(sharp, [1.0])[3] > looks(blurred, [1.0])[3]
    assert np.isfinite(looks(sharp[:1, :1], [0.5, 0.5])).all()


def test_refusals(segmenter: Segmenter, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="confidence=True"):
        rank_pictures(Segmenter(ToyEngine()), tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(BadInputFile, match=r"none of the pictures could be read; .*broken\.png"):
        rank_pictures(segmenter, tmp_path, progress=False)
    for content in (b"a,b\n1,2\n", b"\xff\xfe\x00", b"rank,image\n1\n"):
        (tmp_path / "x.csv").write_bytes(content)
        with pytest.raises(BadInputFile, match="no order of pictures"):
            read_ranking(tmp_path / "x.csv")
    with pytest.raises(BadInputFile, match="does not exist"):
        read_ranking(tmp_path / "none.csv")
