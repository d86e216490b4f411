"""The distance of features from those of the training pictures, and what a picture is called by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.core.domain import FOREIGN, MARGIN, NOT_KNOWN, distances, domain_of, fit_domain
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import DomainRecord


def record(**changes: Any) -> DomainRecord:
    content = {
        "mean": [1.0, 0.0, 0.0], "scale": [1.0, 2.0, 1.0], "components": [[0.0, 1.0, 0.0]], "variances": [4.0],
        "residual": 0.25, "unusual": 1.5, "foreign": 3.0, "crops": 10, "pictures": 2,
    }  # fmt: skip
    return DomainRecord.model_validate(content | changes)


def cells(*values: tuple[float, float, float]) -> np.ndarray:
    return np.array(values, dtype=np.float32).T[:, :, None]  # [F, rows, 1]


def test_distance_is_that_of_mahalanobis() -> None:
    covariance = np.diag([0.25, 2.0**2 * 4.0, 0.25])  # in the features' own units
    points = np.random.default_rng(0).normal(size=(5, 3)) * 3
    inverse = np.linalg.inv(covariance)
    wanted = [np.sqrt((point - [1, 0, 0]) @ inverse @ (point - [1, 0, 0]) / 3) for point in points]
    assert distances(cells(*map(tuple, points)), record())[:, 0] == pytest.approx(wanted, rel=1e-5)


def test_a_picture_is_called_by_the_median_of_all_its_cells() -> None:
    near, far = (1.0, 0.0, 0.0), (1.0, 0.0, 5.0)
    assert domain_of([cells(near, near), cells(far)], record()).state == "familiar"
    foreign = domain_of([cells(near, far), cells(far)], record())
    assert (foreign.state, [tile.shape for tile in foreign.cells]) == ("foreign", [(2, 1), (1, 1)])
    assert domain_of([cells((1.0, 0.0, 1.5))], record()).state == "unusual"
    assert domain_of([cells((1.0, 0.0, float("nan")))], record()).state == "foreign"


def test_without_statistics_or_features_it_is_not_known() -> None:
    assert domain_of([cells((1.0, 0.0, 0.0))], None) == NOT_KNOWN
    assert domain_of([None], record()) == NOT_KNOWN == domain_of([], record())


@pytest.mark.parametrize(
    "changes",
    [{"scale": [1.0]}, {"components": [[1.0]]}, {"variances": []}, {"foreign": 1.0}, {"residual": 0.0},
     {"mean": [float("nan"), 0.0, 0.0]}],
)  # fmt: skip
def test_a_damaged_record_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        record(**changes)


def some_pictures(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features of twelve channels that follow three hidden ones; each picture has a mean of its own."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(3, 12))
    parts = [
        rng.normal(rng.normal(0, 0.3, 3), 1, (40, 3)) @ mixing + rng.normal(0, 0.05, (40, 12)) + 5 for _ in range(count)
    ]
    return [(part, part[:9]) for part in parts]


def test_statistics_call_new_pictures_of_their_kind_familiar_and_others_foreign() -> None:
    known = fit_domain(some_pictures(6), [some_pictures(1, 7)[0][1]], crops=60, source="x (train)")
    assert (known.pictures, known.crops, known.source) == (6, 60, "x (train)")
    assert known.foreign == pytest.approx(FOREIGN * known.unusual, rel=1e-4)
    assert known.unusual >= MARGIN  # a training picture is at a distance of 1
    assert fit_domain(some_pictures(6), [some_pictures(1, 7)[0][1]], crops=60, source="x (train)") == known
    for seed in range(20, 30):
        cells = some_pictures(1, seed)[0][1]
        assert domain_of([cells.T[:, :, None]], known).state == "familiar"
        other = cells + np.random.default_rng(seed).normal(0, 3, 12)  # outside the three directions
        assert domain_of([other.T[:, :, None]], known).state == "foreign"


@pytest.mark.parametrize("count", [1, 2])
def test_few_pictures_are_enough(count: int) -> None:
    known = fit_domain(some_pictures(count), crops=4, source="x")
    assert domain_of([some_pictures(count)[0][1].T[:, :, None]], known).state == "familiar"


def test_features_that_tell_nothing_are_refused() -> None:
    for value in (1.0, np.nan):
        cells = np.full((8, 4), value)
        with pytest.raises(UserError, match="same everywhere or not finite"):
            fit_domain([(cells, cells)] * 2, crops=2, source="x")
