"""Is a picture like those of the training? What the network saw of it decides, however it went through."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.core.domain import NOT_KNOWN, Domain
from hpddrnet_trt.core.manifest import AxisRange, InputContract
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.result import Segmentation
from tests.toy import ToyEngine, manifest


def grey(level: int, height: int = 64, width: int = 96) -> npt.NDArray[np.uint8]:
    return np.full((height, width), level, np.uint8)


def ramp(height: int = 64, width: int = 96) -> npt.NDArray[np.uint8]:
    """From the toy's middle grey at the left to 20 levels more for every 8 pixels."""
    return np.tile((120 + 2.5 * np.arange(width)).clip(0, 255).astype(np.uint8), (height, 1))


def toy(output: str = "logits", engine: type[ToyEngine] = ToyEngine, **options: Any) -> Segmenter:
    description = {name: options.pop(name) for name in ("size", "input") if name in options}
    return Segmenter(engine(manifest(output, domain=True, **description)), **options)


@pytest.mark.parametrize(
    ("level", "state", "distance"),
    [(120, "familiar", 0), (150, "familiar", 1.5), (170, "unusual", 2.5), (220, "foreign", 5), (0, "foreign", 6)],
)
def test_the_distance_of_the_features_is_the_pictures(level: int, state: str, distance: float) -> None:
    domain = toy().segment(grey(level)).domain
    assert (domain.state, domain.distance) == (state, pytest.approx(distance, abs=1e-4))
    assert [cells.shape for cells in domain.cells] == [(8, 12)]


def test_a_model_without_statistics_does_not_know() -> None:
    assert Segmenter(ToyEngine()).segment(grey(0)).domain is NOT_KNOWN
    silent = manifest("logits", domain=True).replace(output={"kind": "logits"})  # statistics, and no features
    assert Segmenter(ToyEngine(silent)).segment(grey(0)).domain is NOT_KNOWN


def _many(segmenter: Segmenter, *images: npt.NDArray[np.uint8]) -> list[Domain]:
    results = list(segmenter.segment_many(images))
    return [result.domain for result in results if isinstance(result, Segmentation)]


@pytest.mark.parametrize("output", ["labels", "logits"])
def test_whole_in_tiles_in_batches_and_in_rows(output: str) -> None:
    """Tiles overlap, so a ramp, which is in no tile as a whole, keeps its median only about."""
    image, level = ramp(), grey(170)
    whole = toy(output).segment(image).domain
    assert whole.distance is not None
    tiled = toy(output, tile=32).segment(image)
    assert tiled.tiling is not None
    assert len(tiled.domain.cells) == tiled.tiling.tiles
    assert tiled.domain.distance == pytest.approx(whole.distance, abs=0.3)
    for segmenter in (toy(output), toy(output, tile=32), toy(output, confidence=output == "logits")):
        for domains in (
            [result.domain for result in segmenter.segment_batch([level, image, level])], _many(segmenter, level, image)
        ):  # fmt: skip
            assert [domain.state for domain in domains[:2]] == ["unusual", "foreign"]
            assert domains[0].distance == pytest.approx(2.5, abs=1e-4)


@pytest.mark.parametrize("mode", ["flip", "multiscale"])
def test_averaged_views_do_not_count(mode: Any) -> None:
    """Smaller and larger views are no pictures of the magnification that the model was trained at."""
    single, averaged = (toy(mode=views).segment(ramp()).domain for views in ("single", mode))
    assert averaged == single
    assert np.array_equal(averaged.cells[0], single.cells[0])
    (one, other) = (toy(mode=views, tile=32).segment(ramp()).domain for views in ("single", mode))
    assert one == other
    assert _many(toy(mode=mode), ramp(), ramp()) == [single, single]


def test_the_guard_sees_what_the_network_sees() -> None:
    """A picture that is resized first is judged in that size, one with a grey window in its levels."""
    assert toy(resize=(48, 32)).segment(ramp()).domain.cells[0].shape == (4, 6)
    assert toy(window=(0.0, 510.0)).segment(grey(240)).domain.distance == pytest.approx(0, abs=0.05)


def test_what_pads_a_picture_is_not_judged() -> None:
    """A fixed input shows mirror images beside a small picture, and in a batch copies of the last one."""
    expected = toy().segment(ramp(24, 40)).domain
    fixed = toy(size=64).segment(ramp(24, 40)).domain
    assert [cells.shape for cells in fixed.cells] == [(3, 5)]
    assert fixed.distance == pytest.approx(expected.distance, abs=1e-5)
    contract = InputContract(batch=AxisRange(minimum=4, maximum=4))
    batch = toy(input=contract)
    assert [domain.distance for domain in _many(batch, grey(140), grey(160), grey(180))] == pytest.approx([1, 2, 3])
    assert toy(size=64).segment(grey(160, 1, 1)).domain.distance == pytest.approx(2, abs=1e-4)


def test_features_that_are_no_numbers_are_foreign() -> None:
    class Overflowed(ToyEngine):
        def infer(self, images: npt.NDArray[Any]) -> Any:
            found = super().infer(images)
            assert found.domain_features is not None
            found.domain_features[:] = np.nan
            return found

    domain = toy(engine=Overflowed).segment(grey(120)).domain
    assert domain.state == "foreign"
