"""Training checkpoints that are whole or not there at all."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from hpddrnet_trt.core.errors import BadInputFile, one_line
from hpddrnet_trt.core.files import atomic_path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, renames.

    Lightning's own writer goes through the system's temporary folder; when that is another file
    system the final move is a copy, which a kill can cut in half.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()  # torch.save straight to a file reports a full disk as a RuntimeError
        torch.save(checkpoint, buffer)
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            stream.write(buffer.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())


def read_training_checkpoint(path: Path) -> dict[str, Any]:
    """Load a training checkpoint to the CPU; only tensors and plain values are admitted.

    Raises :class:`BadInputFile` when it is truncated, foreign, or holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as exc:
        raise BadInputFile(
            f"{path} is not a readable training checkpoint ({one_line(exc, 'first')}); "
            "delete it to start the run again"
        ) from exc
    if not isinstance(content, dict) or "loops" not in content:
        raise BadInputFile(f"{path} is not a training checkpoint; delete it to start the run again")
    return content


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files a killed run left in ``folder``."""
    for leftover in folder.glob(".*.tmp*"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)
