"""Numbers, sizes and lengths, library messages made one line, and the command that was given."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpddrnet_trt.core import errors
from hpddrnet_trt.core.errors import UserError, describe, one_line
from hpddrnet_trt.core.provenance import command_line
from hpddrnet_trt.core.text import (
    METRES,
    SQUARE,
    SQUARE_MEASURED,
    is_square,
    length,
    megabytes,
    micrometres,
    number,
    percent,
    scaled,
)

sizes = st.floats(1e-12, 1e-3)


@given(sizes, st.floats(0.5, 2), st.sampled_from((SQUARE, SQUARE_MEASURED)))
def test_sides_are_alike_in_any_unit(width: float, ratio: float, tolerance: float) -> None:
    height = width * ratio
    if abs(abs(1 - min(ratio, 1 / ratio)) - tolerance) < 1e-9:
        return  # on the border itself, where rounding decides
    assert is_square(width, height, tolerance) == is_square(height, width, tolerance)
    assert is_square(width, height, tolerance) == is_square(1e9 * width, 1e9 * height, tolerance)


def test_tolerances() -> None:
    ratios = (1.0, 1.004, 1.008, 1.02)
    assert [is_square(1e-9, ratio * 1e-9) for ratio in ratios] == [True, True, False, False]
    assert [is_square(1e-9, ratio * 1e-9, SQUARE_MEASURED) for ratio in ratios] == [True, True, True, False]


@pytest.mark.parametrize(
    ("metres", "text"),
    [(2e-12, "0.002 nm"), (5e-9, "5 nm"), (55.81e-9, "55.81 nm"), (1e-6, "1 µm"), (1.25e-6, "1.25 µm"), (2e-3, "2 mm"),
     (3.0, "3 m")],
)  # fmt: skip
def test_lengths_for_people(metres: float, text: str) -> None:
    assert length(metres) == text
    amount, unit = text.split()
    assert float(amount) * METRES[unit] == pytest.approx(metres)


def test_numbers_for_people() -> None:
    assert [number(value) for value in (0.1234, 4.5649, 1234.6, 0, math.inf)] == ["0.123", "4.56", "1235", "0", "inf"]
    assert [percent(value) for value in (0.98765, None, math.nan)] == ["98.77 %", "–", "–"]
    assert [scaled(value) for value in (812, 24_100, 1_260_000, 3.4e9)] == ["812", "24.1 k", "1.26 M", "3.40 G"]
    assert megabytes(12_340_000) == "12.3 MB"


@given(st.floats(1e-12, 1e-2))
def test_micrometres_have_no_noise(metres: float) -> None:
    assert micrometres(metres) == pytest.approx(1e6 * metres)
    assert micrometres(50e-9) == 0.05


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("said", "part", "text"),
    [
        (ValueError("  one\n\n two\tthree "), "all", "one two three"),
        (ValueError("one\ntwo"), "first", "one"),
        ("file.cpp:12\nwhat happened\n", "last", "what happened"),
        ("\x1b[31mred", "all", "?[31mred"),
        (ValueError(), "first", "ValueError"),
        (Unreadable(), "all", "no readable message"),
        ("", "last", "no message"),
        ("a" * 301, "all", "a" * 296 + " ..."),
    ],
)
def test_a_librarys_message_becomes_one_line(said: object, part: Literal["all", "first", "last"], text: str) -> None:
    assert one_line(said, part) == text


def test_exceptions_are_described() -> None:
    assert describe(UserError("a whole sentence; do this")) == "a whole sentence; do this"
    assert describe(RuntimeError("boom\n at 0x0")) == "RuntimeError: boom at 0x0"
    assert describe(KeyError()) == "KeyError: no message"
    assert describe(Unreadable()) == "Unreadable: no readable message"


def test_the_command_can_be_repeated() -> None:
    assert command_line().split()[0] == Path(sys.orig_argv[0]).name


def test_the_documented_address_of_the_errors_stays() -> None:
    with pytest.warns(DeprecationWarning, match=r"hpddrnet_trt\.core\.errors\.UserError now"):
        from hpddrnet_trt.errors import UserError as documented
    assert documented is UserError
    import hpddrnet_trt.errors as shim

    for name in shim.__all__:
        with pytest.warns(DeprecationWarning, match=name):
            assert getattr(shim, name) is getattr(errors, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = shim.nonsense
