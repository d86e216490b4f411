"""Arg-max and softmax against numpy."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hpddrnet_trt.core.scores import arg_max, softmax

SCORES = st.integers(2, 6).flatmap(
    lambda classes: arrays(np.float32, (2, classes, 3, 5), elements=st.integers(-3, 3).map(np.float32))
)


@settings(deadline=None)  # machines can be busy
@given(SCORES)
def test_arg_max_is_numpys_also_on_ties(scores: np.ndarray) -> None:
    labels = arg_max(scores)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, scores.argmax(axis=1))


@settings(deadline=None)  # machines can be busy
@given(SCORES)
def test_softmax_sums_to_one_and_ignores_shifts(scores: np.ndarray) -> None:
    probabilities = softmax(scores)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert np.allclose(softmax(scores + 1000), probabilities, atol=1e-5)
    assert np.array_equal(arg_max(probabilities), probabilities.argmax(axis=1))
    assert np.allclose(np.log(probabilities[:, 0] / probabilities[:, 1]), scores[:, 0] - scores[:, 1], atol=1e-4)


def test_softmax_of_large_scores_is_finite() -> None:
    assert np.isfinite(softmax(np.array([[[1e5], [-1e5]]], np.float32))).all()
