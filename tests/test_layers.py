"""What may import what: heavy libraries, direction, circles."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hpddrnet_trt

PACKAGE = Path(hpddrnet_trt.__file__).parent
# Not there on a microscope PC that runs a TensorRT engine, or slow to load: imported where used.
HEAVY = ("torch", "torchvision", "lightning", "tensorboard", "safetensors", "onnx", "onnxscript", "onnxsim",
         "onnxruntime", "openvino", "tensorrt", "tensorrt_lean", "tensorrt_rtx", "cuda", "pycuda", "polygraphy",
         "matplotlib", "jinja2", "psutil", "skimage", "roifile", "zarr", "ome_zarr", "nion", "niondata",
         "nionswift_plugin", "fibsem", "pymmcore", "pymmcore_plus", "useq", "napari", "npe2", "qtpy", "magicgui",
         "psygnal", "tritonclient", "grpc", "dask", "distributed", "pyarrow")  # fmt: skip
# The parts that are PyTorch. Everything else is for every PC: a new module belongs there unless named here.
WITH_TORCH = (
    "hpddrnet_trt.models.checkpoints",
    "hpddrnet_trt.models.domain",
    "hpddrnet_trt.models.foreign",
    "hpddrnet_trt.models.network",
    "hpddrnet_trt.training.",
    "hpddrnet_trt.export.reformulate",
    "hpddrnet_trt.engines.torch",
)
# From the ground up. A module imports its own floor and lower ones; longest matching name counts.
FLOORS = (
    ("core",),
    ("errors",),  # the address by which core.errors is documented
    ("weights",),
    ("models",),
    ("graph",),
    ("data",),
    ("engines",),
    ("results",),
    ("inference",),
    ("stream",),
    ("mosaic",),
    ("export",),
    ("packages",),
    ("training",),
    ("accuracy",),
    ("benchmark",),
    ("report",),
    ("integrations",),
    ("cli",),
    ("__main__",),
)
FREE = "hpddrnet_trt"  # the face holds the version, and its exports are resolved on first use

CHILD = """
import importlib, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in HEAVY:
            raise ImportError('blocked: ' + name)

HEAVY, modules = json.loads(sys.argv[1])
sys.meta_path.insert(0, Blocker())
for name in HEAVY:
    try:
        importlib.import_module(name)
    except ImportError as exc:
        assert 'blocked' in str(exc), exc
    else:
        raise AssertionError(name + ' is not blocked')
failures = {}
for name in modules:
    try:
        importlib.import_module(name)
    except ImportError as exc:
        failures[name] = str(exc)
print(json.dumps(failures))
"""


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, also inside functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return {name for name in found if name in MODULES}


def floor(module: str) -> tuple[int, str]:
    """Number of the floor and the room on it."""
    inside = module.removeprefix("hpddrnet_trt.")
    rooms = [
        (len(room), number, room)
        for number, names in enumerate(FLOORS)
        for room in names
        if inside == room or inside.startswith(f"{room}.")
    ]
    assert rooms, f"{module} has no floor: name it in FLOORS, and in the design"
    return max(rooms)[1:]


def test_runtime_modules_import_without_heavy_libraries() -> None:
    runtime = [name for name in MODULES if not name.startswith(WITH_TORCH) and name != "hpddrnet_trt.__main__"]
    for expected in ("cli", "inference", "accuracy", "core.metrics", "core.manifest", "data.micrograph",
                     "data.datasets", "export.tensorrt", "engines", "engines.tensorrt", "engines.onnxruntime",
                     "report.accuracy", "benchmark"):  # fmt: skip
        assert f"hpddrnet_trt.{expected}" in runtime
    arguments = [sys.executable, "-c", CHILD, json.dumps([HEAVY, runtime])]
    child = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout.splitlines()[-1]) == {}


def test_the_blocker_blocks() -> None:
    """The test above can fail: a module with PyTorch does not import there."""
    arguments = [sys.executable, "-c", CHILD, json.dumps([HEAVY, ["hpddrnet_trt.models.network"]])]
    child = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert json.loads(child.stdout) == {"hpddrnet_trt.models.network": "blocked: torch"}


@pytest.mark.parametrize("module", [name for name in MODULES if name != FREE])
def test_no_import_points_upwards(module: str) -> None:
    number, room = floor(module)
    wrong = []
    for target in imports(MODULES[module]) - {FREE}:
        below, other = floor(target)
        if below > number or (below == number and other != room):
            wrong.append(target)
    assert wrong == []


def test_no_circles() -> None:
    graph = {name: imports(path) - {FREE} for name, path in MODULES.items() if name != FREE}
    done: set[str] = set()
    while len(done) < len(graph):
        free = {name for name, targets in graph.items() if name not in done and targets <= done}
        assert free, f"modules in a circle: {sorted(set(graph) - done)}"
        done |= free


def test_tables_name_what_exists() -> None:
    """A module that was renamed leaves the tables, too."""
    for prefix in WITH_TORCH:
        assert any(name.startswith(prefix) for name in MODULES), prefix
    for names in FLOORS:
        for room in names:
            assert any(f"{name}.".startswith(f"hpddrnet_trt.{room}.") for name in MODULES), room


def test_the_architecture_page_tells_the_truth() -> None:
    """Its table has the rooms in the order of the floors, and what it names exists."""
    page = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert rooms == [room for floor in FLOORS for room in floor if room not in ("errors", "__main__")]
    named = set(re.findall(r"`([a-z_]+/[\w./]*)[:`]", page))
    assert len(named) > 40
    missing = {path for path in named if not (PACKAGE / path).exists() and not (PACKAGE.parent / path).exists()}
    assert {path for path in missing if "NAME" not in path} == set()
