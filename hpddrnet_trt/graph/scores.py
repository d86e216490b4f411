"""Class scores from an ONNX file that was exported with labels, so that tiles of a large image can be blended.

The network computes scores at 1/4 or 1/8 of the image's size; the last nodes of a labels file only enlarge and
compare them (``hpddrnet_trt/export/reformulate.py``: ``Phases``, ``LabelOutput``). Here those nodes give way to one
bilinear enlargement, which is what a logits file ends with: the result is such a file.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from hpddrnet_trt.core.errors import require
from hpddrnet_trt.core.manifest import METADATA_KEY, Manifest, OutputContract
from hpddrnet_trt.engines.base import Engine

ENLARGEMENT = "output.enlarge/"  # nodes are named after the exported module
_NAME = "hpddrnet_scores_"  # of what is added


def write_scores_file(path: Path, manifest: Manifest, target: Path) -> bool:
    """Write the labels file ``path`` as a logits file; False, and no file, where it ends in another way than ours do.

    ``path`` is one that an engine has loaded, ``manifest`` its description.
    """
    onnx = require("onnx", "export", "read ONNX files")
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    model = onnx.load(str(path))
    graph = model.graph
    first = next((node for node in graph.node if node.name.startswith(ENLARGEMENT)), None)
    if first is None or first.op_type not in ("Pad", "Resize"):
        return False
    # Two classes are one channel: by how much the second one's logit is above the first one's.
    margin = manifest.network.num_classes == 2
    constants = {"scales": (real, [1.0, 1.0, *[float(manifest.network.logit_stride)] * 2])}
    nodes = [helper.make_node("Cast", [first.input[0]], [f"{_NAME}low"], to=real)]
    if margin:
        constants["pads"] = (onnx.TensorProto.INT64, [0, 1, 0, 0, 0, 0, 0, 0])
        nodes.append(helper.make_node("Pad", [f"{_NAME}low", f"{_NAME}pads"], [f"{_NAME}classes"]))
    scores = f"{_NAME}classes" if margin else f"{_NAME}low"
    nodes.append(
        helper.make_node(
            "Resize", [scores, "", f"{_NAME}scales"], ["logits"], mode="linear",
            coordinate_transformation_mode="half_pixel",
        )
    )  # fmt: skip
    graph.node.extend(nodes)
    graph.initializer.extend(
        helper.make_tensor(f"{_NAME}{name}", kind, [len(values)], values) for name, (kind, values) in constants.items()
    )
    batch, _, height, width = graph.input[0].type.tensor_type.shape.dim
    output = helper.make_tensor_value_info("logits", real, [None, manifest.network.num_classes, None, None])
    for place, dim in ((0, batch), (2, height), (3, width)):
        output.type.tensor_type.shape.dim[place].CopyFrom(dim)
    del graph.output[:]
    graph.output.append(output)
    description = manifest.replace(output=OutputContract(kind="logits"))
    helper.set_model_props(model, {METADATA_KEY: description.to_json()})
    onnx.save(model, str(target))
    return True


class ScoresModel:
    """The logits form of a labels file, opened when it is first asked for. Usable from several threads.

    ``open_engine`` opens a file with the engine and options of the labels file.
    """

    def __init__(self, path: Path, manifest: Manifest, open_engine: Callable[[Path], Engine]) -> None:
        self._path, self._manifest, self._open = path, manifest, open_engine
        self._lock = threading.Lock()
        self._asked = False
        self._engine: Engine | None = None
        self._remove: Callable[[], object] = lambda: None

    def engine(self) -> Engine | None:
        """None where the file holds no scores that we find."""
        with self._lock:
            if not self._asked:
                folder = Path(tempfile.mkdtemp(prefix="hpddrnet-"))
                # Engines read their file again for other input sizes: it stays as long as the engine.
                self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                target = folder / self._path.name
                if write_scores_file(self._path, self._manifest, target):
                    self._engine = self._open(target)
                self._asked = True
            return self._engine

    def close(self) -> None:
        """Close the engine; calling it again does nothing."""
        with self._lock:
            if self._engine is not None:
                self._engine.close()
            self._remove()
