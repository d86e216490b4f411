"""Errors written for people.

Every error the package raises on purpose derives from :class:`UserError`: its message is one
readable sentence that names the file or value at fault and says what to do. The command line
prints that sentence and ends with :attr:`UserError.exit_code`, without a traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """Something in the input, the environment or the files is wrong (exit code 1)."""

    exit_code = 1


class UsageError(UserError):
    """The command or function was asked for something that makes no sense (exit code 2)."""

    exit_code = 2


class BadInputFile(UserError):
    """A file that cannot be read, is truncated, or is not what it was taken for."""


class ContractError(UserError):
    """An array or a request that a model file's own contract does not admit (shape, dtype, size)."""


class MissingDependency(UserError):
    """An optional library is not installed; the message names the extra that brings it."""


class NoGpu(UserError):
    """An NVIDIA GPU (or its driver) is needed and none can be used."""


def brief(text: object, limit: int = 300) -> str:
    """``text`` (an exception, a name from a file) for a sentence: one line, printable, at most ``limit`` characters."""
    line = "".join(sign if sign.isprintable() else "?" for sign in " ".join(str(text).split()))
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."


def first_problem(invalid: ValidationError, whole: str) -> str:
    """What pydantic found first, as ``place: message``; ``whole`` names the place of the document itself."""
    first = invalid.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc']) or whole}: {first['msg']}"


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` or raise :class:`MissingDependency` naming the extra that brings it.

    Parameters: ``module`` dotted import name; ``extra`` the extra of this package (``"train"``);
    ``purpose`` what it is needed for, to complete the sentence "... is needed to <purpose>".
    """
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise MissingDependency(
            f"the Python package {module.split('.')[0]!r} is needed to {purpose} and could not be "
            f"imported ({exc}); install it with: pip install 'hpddrnet-trt[{extra}]'"
        ) from exc
