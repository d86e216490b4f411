"""The errors by their documented address: ``hpddrnet_trt.errors`` stays importable, they live in ``core.errors``."""

from __future__ import annotations

import warnings
from typing import Any

from hpddrnet_trt.core import errors

__all__ = [  # resolved below, so that a static analyser does not take them for copies
    "BadInputFile",  # noqa: F822
    "ContractError",  # noqa: F822
    "MissingDependency",  # noqa: F822
    "NoGpu",  # noqa: F822
    "UsageError",  # noqa: F822
    "UserError",  # noqa: F822
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"hpddrnet_trt.errors.{name} is hpddrnet_trt.core.errors.{name} now; import it from there",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(errors, name)
