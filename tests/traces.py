"""Traced networks, remembered for one run of all tests: tracing one takes up to half a minute, and several tests in
several processes trace the same."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import torch

FOLDER = "HPDDRNET_TEST_TRACES"  # environment variable; without it nothing is remembered


def remembered(export: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.onnx.export`` with a memory on disk of what it does not write itself, which has only ``model_proto``."""

    @wraps(export)
    def remembering(module: torch.nn.Module, examples: tuple[torch.Tensor, ...], *target: Any, **options: Any) -> Any:
        if target or FOLDER not in os.environ:
            return export(module, examples, *target, **options)
        folder = Path(os.environ[FOLDER])
        folder.mkdir(exist_ok=True)
        path = folder / f"{_key(module, examples, options)}.onnx"
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be tracing it
            if not path.exists():
                content = export(module, examples, **options).model_proto.SerializeToString()
                path.with_suffix(".part").write_bytes(content)
                path.with_suffix(".part").rename(path)
        return SimpleNamespace(model_proto=onnx.load(str(path)))

    return remembering


def _key(module: torch.nn.Module, examples: tuple[torch.Tensor, ...], options: dict[str, Any]) -> str:
    """Another one for another structure, weight, size or option."""
    digest = hashlib.sha256(repr((sorted(options.items()), [(tuple(e.shape), e.dtype) for e in examples])).encode())
    for name, part in module.named_modules():
        settings = {key: value for key, value in sorted(vars(part).items()) if not key.startswith("_")}
        digest.update(repr((name, type(part).__module__, type(part).__qualname__, part.extra_repr())).encode())
        for key, value in settings.items():
            digest.update(key.encode())
            digest.update(_bytes(value) if isinstance(value, torch.Tensor) else repr(value).encode())
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        digest.update(name.encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(values: torch.Tensor) -> bytes:
    return repr((values.dtype, tuple(values.shape))).encode() + values.detach().contiguous().numpy().tobytes()


torch.onnx.export = remembered(torch.onnx.export)  # type: ignore[assignment]
