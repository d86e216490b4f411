"""Optimization profiles: the ``--shapes`` grammar, its checks, and which profile runs an input."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.manifest import AxisRange, InputContract
from hpddrnet_trt.engines.profiles import Profile, choose_profile, default_profiles, narrowed, parse_shapes

CONTRACT = InputContract(
    batch=AxisRange(minimum=1, maximum=8),
    height=AxisRange(minimum=64, maximum=2048),
    width=AxisRange(minimum=64, maximum=2048),
)


def test_profiles_are_parsed() -> None:
    profiles = parse_shapes("1x1x64x64:2x1x128x256:8x1x2048x2048, 4x1x512x512", CONTRACT)
    assert profiles == [
        Profile((1, 1, 64, 64), (2, 1, 128, 256), (8, 1, 2048, 2048)),
        Profile((4, 1, 512, 512), (4, 1, 512, 512), (4, 1, 512, 512)),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1x1x64x64:1x1x64x64", "give MIN:OPT:MAX or one shape"),
        ("", "is not a shape"),
        ("1x1x64x", "is not a shape"),
        ("-1x1x64x64", "is not a shape"),
        ("64x64", "is not a shape"),
        ("1x3x64x64", "takes 1; write 1x1x64x64"),
        ("1x1x64x70", "width 70 is not a multiple of 8; write 72"),
        ("1x1x0x64", "height 0 is not a multiple of 8; write 8"),
        ("9x1x64x64", "batch 9 is outside what the ONNX file admits (1..8)"),
        ("1x1x4096x64", "height 4096 is outside"),
        ("1x1x128x64:1x1x64x64:1x1x256x64", "height 128:64:256 is not in rising order"),
    ],
)
def test_bad_shapes_say_what_to_write(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_shapes(text, CONTRACT)
    assert says in str(caught.value)


_sizes = st.tuples(st.integers(1, 8), st.just(1), *[st.integers(8, 256).map(lambda size: size * 8)] * 2)


@st.composite
def _profiles(draw: st.DrawFn) -> Profile:
    rising = [sorted(axis) for axis in zip(*(draw(_sizes) for _ in range(3)), strict=True)]
    low, best, high = zip(*rising, strict=True)
    return Profile(low, best, high)


@given(st.lists(_profiles(), min_size=1, max_size=4), _sizes)
def test_profiles_survive_writing_and_choose_well(profiles: list[Profile], shape: Any) -> None:
    assert parse_shapes(",".join(map(str, profiles)), CONTRACT) == profiles
    assert [Profile.from_record(profile.as_record()) for profile in profiles] == profiles
    hull = narrowed(CONTRACT, profiles)
    admitting = [profile for profile in profiles if profile.admits(shape)]
    if not admitting:
        with pytest.raises(ContractError, match="outside this engine's profile"):
            choose_profile(profiles, shape)
        return
    chosen = profiles[choose_profile(profiles, shape)]
    assert chosen.admits(shape)
    assert chosen.distance(shape) == min(profile.distance(shape) for profile in admitting)
    assert hull.batch.admits(shape[0])
    assert hull.height.admits(shape[2])
    assert hull.width.admits(shape[3])


def test_default_profile_follows_the_ranges() -> None:
    assert str(default_profiles(InputContract())[0]) == "1x1x8x8:1x1x1024x1024:1x1x2048x2048"
    narrow = InputContract(height=AxisRange(minimum=100, maximum=500), width=AxisRange(minimum=3000))
    assert str(default_profiles(narrow)[0]) == "1x1x104x3000:1x1x496x3000:1x1x496x3000"


def test_damaged_profile_record() -> None:
    for record in ({"min": [1, 1, 8, 8]}, {"min": [1], "opt": [1], "max": [1]}):
        with pytest.raises(ContractError, match="build the engine again"):
            Profile.from_record(record)
