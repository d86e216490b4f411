"""Models that come with the package, known by name instead of path.

Each is four files: ``NAME.onnx`` (for every PC), ``NAME.int8.onnx`` (the same calibrated, the fastest on most PCs),
``NAME.delta``, which gives the trained network with the first (``NAME.safetensors``, for PyTorch: export, fine-tuning;
:mod:`hpddrnet_trt.weights.delta`), and ``NAME.md``, its card: data, split, figures, limits, licence.
"""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from functools import cache
from pathlib import Path

from hpddrnet_trt.core.cache import cache_folder
from hpddrnet_trt.core.errors import BadInputFile, UserError
from hpddrnet_trt.core.files import sha256_of, write_bytes
from hpddrnet_trt.weights import delta

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
DEFAULT = "nasa-super1"
CHECKPOINT = ".safetensors"
INT8 = ".int8.onnx"


def shipped_models() -> list[str]:
    """Names of the models in this folder."""
    return sorted(path.name.removesuffix(INT8) for path in FOLDER.glob(f"*{INT8}"))


def locate(model: str | Path, suffix: str = ".onnx") -> Path:
    """The file with that ending when ``model`` is a shipped model's name, else ``model`` as a path.

    ``suffix``: ``.onnx``, :data:`INT8` or :data:`CHECKPOINT`, which is written into the user's cache folder when it
    is first asked for. A folder of that name in the working directory (the dataset, perhaps) does not matter.

    Raises :class:`BadInputFile` where the package's own files are damaged.
    """
    if str(model) not in shipped_models():
        return Path(model)
    return _checkpoint(str(model)) if suffix == CHECKPOINT else FOLDER / f"{model}{suffix}"


def _checkpoint(name: str) -> Path:
    source = FOLDER / f"{name}.delta"
    wanted = delta.checksum(source)
    try:
        target = cache_folder() / "models" / wanted[:16] / f"{name}{CHECKPOINT}"
        if target.is_file() and sha256_of(target) == wanted:
            return target
        return write_bytes(target, delta.restore(source, FOLDER / f"{name}.onnx"))
    except (OSError, UserError, RuntimeError) as exc:  # RuntimeError: a user without a home
        if isinstance(exc, BadInputFile):
            raise
        logger.info("the checkpoint of %s is not kept for the next run: %s", name, exc)
        return _temporary_checkpoint(name)


@cache
def _temporary_checkpoint(name: str) -> Path:
    """The same in a folder that goes with this process."""
    folder = Path(tempfile.mkdtemp(prefix="hpddrnet-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_bytes(folder / f"{name}{CHECKPOINT}", delta.restore(FOLDER / f"{name}.delta", FOLDER / f"{name}.onnx"))
