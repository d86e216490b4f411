"""Errors written for people.

Every error the package raises on purpose derives from :class:`UserError`: its message is one
readable sentence that names the file or value at fault and says what to do. The command line
prints that sentence and ends with :attr:`UserError.exit_code`, without a traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Literal

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


class EngineDoesNotFit(BadInputFile):
    """An engine file for another version of TensorRT or another GPU, which is built again from its ONNX file."""


class ContractError(UserError):
    """An array or a request that a model file's own contract does not admit (shape, dtype, size)."""


class ModelReplaced(UserError):
    """The version of a model that a service ran is gone, and another is there."""


class MissingDependency(UserError):
    """An optional library is not installed; the message names the extra that brings it."""


class NoGpu(UserError):
    """An NVIDIA GPU (or its driver) is needed and none can be used."""


def one_line(said: object, part: Literal["all", "first", "last"] = "all", limit: int = 300) -> str:
    """What an exception, a library's log or a name from a file says, for a sentence of ours.

    One line, printable, at most ``limit`` characters. ``part``: of the lines of a longer text, where only one of them
    says what happened. An exception without a text gives its type's name, any other text "no message".
    """
    try:
        lines = [" ".join(line.split()) for line in str(said).splitlines() if line.strip()]
    except Exception:  # an exception whose own __str__ raises
        lines = ["no readable message"]
    if not lines:
        return type(said).__name__ if isinstance(said, BaseException) else "no message"
    line = {"all": " ".join(lines), "first": lines[0], "last": lines[-1]}[part]
    line = "".join(sign if sign.isprintable() else "?" for sign in line)
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."


def describe(exc: BaseException) -> str:
    """One line about an exception: our own sentences as they are, others with their type."""
    if isinstance(exc, UserError):
        return one_line(exc, limit=10_000)
    name, text = type(exc).__name__, one_line(exc)
    return f"{name}: {'no message' if text == name else text}"


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
