"""NVIDIA's real Python modules as types for mypy, made without NVIDIA's libraries and without a GPU.

To be imported, TensorRT's extension modules need nine C functions, which libraries made here offer. What such a module
then says of itself (classes, methods, keywords, enumerations, what a call returns) becomes a stub file, and mypy holds
our code against it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "hpddrnet_trt"
# Where `make environment` puts the wheels of real_modules.txt, each in a folder of its own.
FOLDER = Path(os.environ.get("HPDDRNET_REAL_MODULES") or Path(sys.prefix) / "real-modules")
CUDA = ("engines/cuda.py",)
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry",
    "getPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins",
)  # fmt: skip
_BUFFERS = ("IHostMemory",)  # which Python before 3.12 does not show


def _using(room: str) -> tuple[str, ...]:
    """Files of a room that name anything of TensorRT's."""
    paths = sorted((PACKAGE / room).glob("*.py"))
    return tuple(f"{room}/{path.name}" for path in paths if re.search(r"\btrt\.[A-Z]", path.read_text()))


ENGINES, BUILDER = _using("engines"), _using("export")


@dataclass(frozen=True)
class RealModule:
    """``package`` of the wheels in ``folder`` (None: installed here), under the name that our code gives it, ``alias``.

    ``files``: of the package, that are checked against it. ``least``: uses that they have, or types got lost on the
    way. ``rtx``: whether ``is_rtx`` is true there. ``libraries``: the version number in the names of the libraries
    that it needs and its wheel lacks.
    """

    name: str
    package: str
    alias: str
    files: tuple[str, ...]
    least: int
    folder: str | None = None
    rtx: bool = False
    libraries: int | None = None

    def missing(self) -> str | None:
        """Why it cannot be looked at here, None when it can."""
        if self.folder is not None and not (FOLDER / self.folder).is_dir():
            return f"{self.name}: its wheel is not in {FOLDER} (make environment puts it there)"
        if self.folder is None and importlib.util.find_spec(self.package.partition(".")[0]) is None:
            return f"{self.name}: {self.package} is not installed"
        if self.libraries is not None and shutil.which("cc") is None:
            return f"{self.name}: there is no C compiler (cc) for stub libraries"
        return None


MODULES = (
    RealModule("TensorRT 11.4", "tensorrt_bindings", "tensorrt", ENGINES + BUILDER, 110, "tensorrt-11.4", libraries=11),
    RealModule("TensorRT 10.8", "tensorrt_bindings", "tensorrt", ENGINES + BUILDER, 110, "tensorrt-10.8", libraries=10),
    RealModule("TensorRT lean 11.4", "tensorrt_lean_bindings", "tensorrt", ENGINES, 28, "tensorrt-lean-11.4"),
    RealModule("TensorRT-RTX", "tensorrt_rtx_bindings", "tensorrt", ENGINES + BUILDER, 115, rtx=True),
    RealModule("cuda.bindings.runtime", "cuda.bindings.runtime", "cuda.bindings.runtime", CUDA, 30),
    RealModule("cuda.core", "cuda.core._memoryview", "cuda.core.utils", CUDA, 8),
    RealModule("cuda.bindings.driver", "cuda.bindings.driver", "cuda.bindings.driver", CUDA, 5),
)


def write_stub(real: RealModule, folder: Path) -> Path:
    """The stub of a real module below ``folder``, written by a process that imports it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER / (real.folder or "")), str(REPOSITORY)])}
    if real.libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(_stub_libraries(folder / "lib", real.libraries))
    elif real.folder is not None:
        environment["LD_LIBRARY_PATH"] = str(FOLDER / real.folder / "tensorrt_lean_libs")
    target = folder / Path(*real.alias.split(".")).with_suffix(".pyi")
    target.parent.mkdir(parents=True, exist_ok=True)
    child = subprocess.run(
        [sys.executable, "-m", "tests.engines.real_modules", real.package, str(target)],
        env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout + child.stderr
    return target


def _stub_libraries(folder: Path, version: int) -> Path:
    folder.mkdir()
    (folder / "stub.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _FUNCTIONS))
    for library in _LIBRARIES:
        file = f"lib{library}.so.{version}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{file}", "stub.c", "-o", file]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def describe(package: str) -> str:
    """The text of a stub file for a module that can be imported in this process."""
    from mypy.stubgen import main as stubgen

    module = importlib.import_module(package)
    extension = f"{package}.{package.removesuffix('_bindings')}" if package.endswith("_bindings") else package
    file = Path(str(module.__file__))
    shipped = file.with_name(f"{file.name.partition('.')[0]}.pyi")
    with tempfile.TemporaryDirectory() as name:
        if not shipped.is_file():
            stubgen(["--inspect-mode", "-q", "-o", name, "-m", extension])
            shipped = Path(name, *extension.split(".")).with_suffix(".pyi")
        text = shipped.read_text()
    # A value is handed over to ours as the number that it is; ours hand over numbers.
    tree = _parsed(text.replace("typing.SupportsInt", "int").replace("typing.SupportsFloat", "float"))
    known = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for name, value in vars(module).items():
        if callable(value) and not isinstance(value, type) and not name.startswith("_") and name not in known:
            tree.body.append(_function(name, value))  # of the package itself, or compiled by Cython
    public = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in public:
        defined = {entry.name for entry in node.body if isinstance(entry, ast.FunctionDef)}
        if "__getitem__" in defined and "__iter__" not in defined:  # which is enough for Python
            node.body += ast.parse("def __iter__(self) -> typing.Iterator[typing.Any]: ...").body
        if node.name in _BUFFERS:
            node.body += ast.parse("def __buffer__(self, flags: int, /) -> memoryview: ...").body
        for entry in node.body:
            if isinstance(entry, ast.AnnAssign):
                entry.annotation = _assignable(entry.annotation)
    head = "import builtins\nimport typing\nfrom typing import Any\nbuffer = capsule = Any\n"
    # The module as an object: what our variables hold, since either of two libraries may be meant.
    lines = ["class Module:", "    __version__: str"]
    lines += [f"    {node.name}: builtins.type[{node.name}]" for node in public]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            lines += ["    @staticmethod", *(f"    {line}" for line in ast.unparse(node).splitlines())]
        elif isinstance(node, ast.AnnAssign):
            lines.append(f"    {ast.unparse(node)}")
    return head + ast.unparse(_BuiltinBool().visit(tree)) + "\n" + "\n".join(lines) + "\n"


def _assignable(kind: ast.expr) -> ast.expr:
    """What an attribute takes: the library makes sizes of tuples itself, and knows no interface as None."""
    name = kind.id if isinstance(kind, ast.Name) else ""
    written = "typing.Any" if name == "Dims" else f"{name} | None" if re.match("I[A-Z]", name) else ast.unparse(kind)
    return ast.parse(written, mode="eval").body


def _parsed(text: str) -> ast.Module:
    """The syntax tree; a signature that Python cannot have (a default before none) becomes one that takes anything."""
    while True:
        try:
            return ast.parse(text)
        except SyntaxError as exc:
            lines = text.splitlines()
            place = (exc.lineno or 1) - 1
            line = re.sub(r"\(.*\) ->", "(self, *args: Any, **kwargs: Any) ->", lines[place])
            if line == lines[place]:
                raise
            lines[place] = line
            text = "\n".join(lines)


def _function(name: str, value: Any) -> ast.FunctionDef:
    """A function by its signature; what cuda.bindings returns, the status first, stands in its documentation."""
    try:
        parameters = inspect.signature(value).parameters.values()
        written = str(inspect.Signature([one.replace(annotation=inspect.Parameter.empty) for one in parameters]))
    except ValueError:
        written = "(*args, **kwargs)"
    returned = re.search(r"\nReturns\n-+\n(.*?)(?:\n\n|\Z)", value.__doc__ or "", re.DOTALL)
    kinds = re.findall(r"^(?:\w+ ?: ?)?\w+", returned[1], re.MULTILINE) if returned else []
    status = kinds[0] if kinds and kinds[0] in ("cudaError_t", "CUresult") else None
    result = "Any" if status is None else f"tuple[{', '.join([status, *['Any'] * (len(kinds) - 1)])}]"
    written = re.sub(r"=[^,)]+", "=...", written)
    node = ast.parse(f"def {name}{written} -> {result}: ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


class _BuiltinBool(ast.NodeTransformer):
    """TensorRT has a constant called ``bool``: as a type it is Python's."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = self.visit(node.annotation)
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.parse("builtins.bool", mode="eval").body if node.id == "bool" else node


@dataclass(frozen=True)
class Findings:
    """``uses``: what files take from the module, as ``Builder.create_network`` or ``Dims.__init__(shape=)``; ``asked``:
    what they ask it for by ``getattr`` and ``hasattr``; ``errors``: mypy's, one line each."""

    uses: frozenset[str]
    asked: frozenset[str]
    errors: tuple[str, ...]


def check(real: RealModule, stub: Path, files: Sequence[Path] = ()) -> Findings:
    """Hold ``files``, by default the package's that use the module, against its stub."""
    from mypy.build import BuildSource, build
    from mypy.errors import CompileError
    from mypy.options import Options

    options = Options()
    options.mypy_path = [str(stub.parents[real.alias.count(".")])]
    options.python_version = (3, 11)
    options.per_module_options["numpy.*"] = {"follow_imports": "skip", "follow_imports_for_stubs": True}  # slow to read
    options.follow_imports = "skip"  # of everything else: the ordinary run checks it
    options.export_types = options.preserve_asts = True
    options.incremental = False
    options.cache_dir = os.devnull
    options.explicit_package_bases = options.namespace_packages = True
    # A branch for the other library is not looked at: mypy knows variables by their name.
    (options.always_true if real.rtx else options.always_false).append("is_rtx")
    # The last: an attribute that is set for the other library only.
    options.disable_error_code = ["import-untyped", "import-not-found", "has-type"]
    options.process_error_codes(error_callback=print)
    files = files or [PACKAGE / name for name in real.files]
    beside = (PACKAGE / "core").glob("*.py")
    sources = [BuildSource(str(path), _module_name(path)) for path in (*files, *beside)]
    sources.append(BuildSource(str(stub), real.alias))
    try:
        result = build(sources, options)
    except CompileError as exc:
        return Findings(frozenset(), frozenset(), tuple(exc.messages))
    uses, asked = _uses(result.types, f"{real.alias}.")
    errors = [line for line in result.errors if any(f"{path.name}:" in line for path in files)]
    return Findings(frozenset(uses), frozenset(asked), tuple(errors))


def _module_name(path: Path) -> str:
    if not path.is_relative_to(REPOSITORY):
        return path.stem
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


def _uses(types: dict[Any, Any], prefix: str) -> tuple[set[str], set[str]]:
    """Attributes, and keywords of calls, of everything whose type is the module's; and names that are asked for."""
    from mypy.nodes import CallExpr, MemberExpr, NameExpr, StrExpr
    from mypy.types import CallableType, Instance, Overloaded, TypeType, get_proper_type

    def owner(expression: Any) -> str | None:
        kind = get_proper_type(types.get(expression))
        if isinstance(kind, TypeType):
            kind = get_proper_type(kind.item)
        if isinstance(kind, CallableType | Overloaded) and kind.is_type_obj():
            name = kind.type_object().fullname
        else:
            name = kind.type.fullname if isinstance(kind, Instance) else ""
        return name.removeprefix(prefix) if name.startswith(prefix) else None

    uses, asked = set(), set()
    for node in types:
        if isinstance(node, MemberExpr) and (place := owner(node.expr)):
            uses.add(f"{place}.{node.name}")
        if not isinstance(node, CallExpr):
            continue
        if isinstance(node.callee, MemberExpr) and (place := owner(node.callee.expr)):
            uses |= {f"{place}.{node.callee.name}({name}=)" for name in node.arg_names if name}
        elif isinstance(node.callee, NameExpr) and node.callee.name in ("getattr", "hasattr"):
            place, name = owner(node.args[0]), node.args[1]
            if place and isinstance(name, StrExpr):
                asked.add(f"{place}.{name.value}")
    return uses, asked


def members(stub: Path) -> dict[str, set[str]]:
    """What each class of a stub defines, inherited names left out."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {entry.name for entry in node.body if isinstance(entry, ast.FunctionDef)}
            found[node.name] |= {ast.unparse(entry.target) for entry in node.body if isinstance(entry, ast.AnnAssign)}
    return found


if __name__ == "__main__":  # in a process of its own, which can import the module
    package, target = sys.argv[1:]
    Path(target).write_text(describe(package))
