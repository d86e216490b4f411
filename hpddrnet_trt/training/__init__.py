"""From a dataset to a checkpoint; recipes that come with the package are known by name instead of path.

A recipe is a YAML file of settings in the folder ``recipes``; its first line says what it is for.
"""

from __future__ import annotations

import os
from pathlib import Path

from hpddrnet_trt.core.errors import UsageError

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "small-data"

# Threads of PyTorch that wait for each other sleep. By default they spin, and beside one other busy process two
# threads then train several times slower than one. OpenMP reads this once, before PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def recipes() -> dict[str, str]:
    """Names of the recipes of this package, and what each is for."""
    files = sorted(RECIPES.glob("*.yaml"))
    return {_name(path): path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in files}


def recipe_file(name: str) -> Path:
    """The file of a recipe; :class:`UsageError` when there is none of that name."""
    files = {_name(path): path for path in RECIPES.glob("*.yaml")}
    if name not in files:
        raise UsageError(f"no recipe is called {name!r}; choose one of {', '.join(sorted(files))}, or use --config")
    return files[name]


def _name(path: Path) -> str:
    return path.stem.replace("_", "-")
