"""Models that come with the package, known by name instead of path.

Each is three files: ``NAME.safetensors`` (the trained network, for PyTorch: export, fine-tuning),
``NAME.onnx`` (the same for every PC) and ``NAME.md``, its card: data, split, figures, limits, licence.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
DEFAULT = "nasa-super1"


def shipped_models() -> list[str]:
    """Names of the models in this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.onnx"))


def locate(model: str | Path, suffix: str = ".onnx") -> Path:
    """The shipped file with that ending when ``model`` is a shipped model's name, else ``model`` as a path.

    A folder of that name in the working directory (the dataset, perhaps) does not matter.
    """
    return FOLDER / f"{model}{suffix}" if str(model) in shipped_models() else Path(model)
