"""Optimization profiles: the ``--shapes`` grammar, its checks, and which profile runs an input.

A profile is a box of input shapes ``[batch, channels, height, width]`` with one shape inside it that
the engine is tuned for. Written ``MIN:OPT:MAX``, e.g. ``1x1x512x512:4x1x1024x1024:8x1x2048x2048``;
a lone shape stands for all three; several profiles are separated by commas.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.manifest import AxisRange, InputContract

Shape = tuple[int, int, int, int]

EXAMPLE = "1x1x512x512:4x1x1024x1024:8x1x2048x2048"
AXES = ("batch", "channels", "height", "width")
# Without --shapes a dynamic model is tuned for one 1024x1024 micrograph and admits up to 2048x2048;
# larger boxes cost memory even for small inputs, because the scratch space is sized for the largest.
DEFAULT_SIZE = 1024
DEFAULT_MAXIMUM = 2048


@dataclass(frozen=True)
class Profile:
    """One box of admitted input shapes, all three ``(batch, channels, height, width)``."""

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def admits(self, shape: Sequence[int]) -> bool:
        """Whether ``shape`` lies inside the box."""
        return len(shape) == 4 and all(
            low <= size <= high for low, size, high in zip(self.minimum, shape, self.maximum, strict=True)
        )

    def distance(self, shape: Sequence[int]) -> float:
        """How far ``shape`` is from what the profile is tuned for: product of size ratios (1 is equal)."""
        return prod(max(size, best) / min(size, best) for size, best in zip(shape, self.optimum, strict=True))

    def as_record(self) -> dict[str, list[int]]:
        """The form stored in :class:`~hpddrnet_trt.core.manifest.EngineRecord`."""
        return {"min": list(self.minimum), "opt": list(self.optimum), "max": list(self.maximum)}

    @classmethod
    def from_record(cls, record: dict[str, list[int]]) -> Profile:
        """Inverse of :meth:`as_record`; raises :class:`ContractError` on a record that is none."""
        boxes = [tuple(record.get(key, ())) for key in ("min", "opt", "max")]
        rising = all(1 <= low <= best <= high for low, best, high in zip(*boxes, strict=False))
        if not rising or any(len(box) != len(AXES) for box in boxes):
            raise ContractError(
                f"the profile {str(record)[:200]} is not of three shapes in rising order; build the engine again"
            )
        return cls(*boxes)  # type: ignore[arg-type]  # lengths checked above

    def __str__(self) -> str:
        shapes = [self.minimum]
        if self.minimum != self.maximum:
            shapes += [self.optimum, self.maximum]
        return ":".join("x".join(map(str, shape)) for shape in shapes)


def is_static(contract: InputContract) -> bool:
    """Whether the model admits exactly one input shape."""
    return all(axis.fixed is not None for axis in (contract.batch, contract.height, contract.width))


def parse_shapes(text: str, contract: InputContract) -> list[Profile]:
    """Profiles from their written form, checked against what the model admits.

    Raises :class:`UsageError` that says what to write instead.
    """
    profiles = []
    for part in text.split(","):
        pieces = part.strip().split(":")
        if len(pieces) not in (1, 3):
            raise UsageError(f"--shapes {part!r}: give MIN:OPT:MAX or one shape, e.g. {EXAMPLE}")
        shapes = [_parse_shape(piece.strip(), contract) for piece in pieces]
        profile = Profile(shapes[0], shapes[len(shapes) // 2], shapes[-1])
        for name, low, best, high in zip(AXES, profile.minimum, profile.optimum, profile.maximum, strict=True):
            if not low <= best <= high:
                raise UsageError(
                    f"--shapes {profile}: {name} {low}:{best}:{high} is not in rising order; "
                    "write the smallest shape first, then the usual one, then the largest"
                )
        profiles.append(profile)
    return profiles


def _parse_shape(written: str, contract: InputContract) -> Shape:
    if not re.fullmatch(r"\d+x\d+x\d+x\d+", written):
        raise UsageError(
            f"--shapes: {written!r} is not a shape; write batch x channels x height x width, e.g. 1x1x1024x1024"
        )
    batch, channels, height, width = map(int, written.split("x"))
    if channels != contract.channels:
        raise UsageError(
            f"--shapes: {written} has {channels} channel(s), the model takes {contract.channels}; "
            f"write {batch}x{contract.channels}x{height}x{width}"
        )
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % contract.multiple:
            nearest = max(round(size / contract.multiple), 1) * contract.multiple
            raise UsageError(
                f"--shapes: {written}: {name} {size} is not a multiple of {contract.multiple}; write {nearest}"
            )
    for name, size in (("batch", batch), ("height", height), ("width", width)):
        axis: AxisRange = getattr(contract, name)
        if not axis.admits(size):
            raise UsageError(
                f"--shapes: {written}: {name} {size} is outside what the ONNX file admits ({axis}); "
                "change the number, or export the ONNX file again with another range"
            )
    return batch, channels, height, width


def default_profiles(contract: InputContract) -> list[Profile]:
    """One profile for a model without ``--shapes``: its only shape, or a sensible box of its ranges."""
    sizes = [_default_axis(axis, contract.multiple) for axis in (contract.height, contract.width)]
    batch = contract.batch.minimum
    boxes = [(batch, contract.channels, sizes[0][place], sizes[1][place]) for place in range(3)]
    return [Profile(*boxes)]


def _default_axis(axis: AxisRange, multiple: int) -> tuple[int, int, int]:
    low = -(-axis.minimum // multiple) * multiple
    high = max(low, (DEFAULT_MAXIMUM if axis.maximum is None else min(axis.maximum, DEFAULT_MAXIMUM)))
    high -= high % multiple
    return low, min(max(low, DEFAULT_SIZE), high), high


def choose_profile(profiles: Sequence[Profile], shape: Sequence[int]) -> int:
    """Index of the profile that runs ``shape``: among those admitting it, the one tuned nearest to it.

    Raises :class:`ContractError` naming the profiles when none admits the shape.
    """
    admitting = [index for index, profile in enumerate(profiles) if profile.admits(shape)]
    if not admitting:
        raise ContractError(
            f"input shape {'x'.join(map(str, shape))} is outside this engine's profile(s) "
            f"{', '.join(map(str, profiles))}; resize or tile the image, or build an engine with other --shapes"
        )
    return min(admitting, key=lambda index: profiles[index].distance(shape))


def narrowed(contract: InputContract, profiles: Sequence[Profile]) -> InputContract:
    """The contract of an engine: the ranges that its profiles span together."""

    def span(axis: int) -> AxisRange:
        return AxisRange(
            minimum=min(profile.minimum[axis] for profile in profiles),
            maximum=max(profile.maximum[axis] for profile in profiles),
        )

    return contract.model_copy(update={"batch": span(0), "height": span(2), "width": span(3)})
