"""Graphs that OpenVINO has compiled, kept in the user's cache folder, so that the next start need not compile.

One file a graph and input shape, about 27 MB for HPDDRNet-23-slim: the SHA-256 of what follows (32 bytes), then what
OpenVINO exports. Its name is a checksum of all that the graph depends on: the model file, the shape, the settings,
this package, OpenVINO, the processor. Files appear whole or not at all, so processes may share the folder; a damaged
one counts as missing; above :data:`LIMIT_BYTES` those that were not used for longest go.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hpddrnet_trt import __version__
from hpddrnet_trt.core.cache import cache_folder, prune, used_now
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.files import write_bytes, write_text
from hpddrnet_trt.core.runtimes import load_openvino

logger = logging.getLogger(__name__)

FOLDER = "openvino"  # in the user's cache folder
LIMIT_BYTES = 512 * 2**20
_CHECKSUM_BYTES = 32


@cache
def processor() -> str:
    """This processor as far as compiled code and its choice depend on it: name, instructions, limits set on them."""
    parts = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        parts += [next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags")]
    except OSError:  # no Linux
        parts.append(str(load_openvino().Core().get_property("CPU", "FULL_DEVICE_NAME")))
    parts += [os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")]
    return "\n".join(parts)


def cache_key(*parts: Any) -> str:
    """A checksum of ``parts`` (JSON-able), this package's version, OpenVINO's, and the processor."""
    known = [__version__, load_openvino().__version__, processor(), *parts]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:40]


def compiled(core: Any, key: str, settings: dict[str, Any], compile_graph: Callable[[], Any]) -> Any:
    """The graph kept under ``key``, else what ``compile_graph`` gives, which is kept.

    A folder that cannot be written costs the compilation, not the graph.
    """
    try:
        path = cache_folder() / FOLDER / f"{key}.blob"
    except RuntimeError:  # a user without a home
        return compile_graph()
    graph = _kept(core, path, settings)
    if graph is not None:
        return graph
    graph = compile_graph()
    try:
        content = _exported(graph)
        write_bytes(path, hashlib.sha256(content).digest() + content)
        prune(path.parent, LIMIT_BYTES)
    except (OSError, UserError, RuntimeError) as exc:
        logger.info("a compiled graph is not kept for the next start: %s", exc)
    return graph


def remembered(folder: str, key: str, find: Callable[[], Any], valid: Callable[[Any], bool]) -> Any:
    """The value kept under ``key`` in ``folder`` of the user's cache folder, else what ``find`` gives, which is kept.

    Values are JSON-able; one that is damaged, or that ``valid`` does not take, is found anew. A folder that cannot be
    written costs finding it again.
    """
    try:
        path = cache_folder() / folder / f"{key}.json"
    except RuntimeError:  # a user without a home
        return find()
    with contextlib.suppress(OSError, ValueError, RecursionError):  # none, or a damaged one
        known = json.loads(path.read_text(encoding="utf-8"))
        if valid(known):
            used_now(path)
            return known
    found = find()
    try:
        write_text(path, json.dumps(found))
    except (OSError, UserError) as exc:
        logger.info("%s is not kept for the next start: %s", path, exc)
    return found


def _exported(graph: Any) -> bytes:
    stream = io.BytesIO()
    graph.export_model(stream)
    return stream.getvalue()


def _kept(core: Any, path: Path, settings: dict[str, Any]) -> Any | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, graph = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    if hashlib.sha256(graph).digest() != checksum:
        logger.info("%s is damaged: compiling again", path)
        return None
    try:
        made = core.import_model(io.BytesIO(graph), "CPU", settings)
    except RuntimeError as exc:
        logger.info("%s is not read by OpenVINO (%s): compiling again", path, exc)
        return None
    used_now(path)
    return made
